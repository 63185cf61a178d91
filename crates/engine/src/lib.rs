//! The step: plan → forward → commit. Where the pure scheduler and the model meet, for base and reward workers alike.

pub mod fused;
pub mod likeliest;
pub mod prompt;
mod row;

use std::{
    collections::HashMap,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use uniarm_decode::{
    TopList,
    drafting::{CostMeter, StepCost},
    scheduler::{
        AddError, ExtendError, NewSequence, PlannedRow, Priority, Scheduler, SchedulerOptions,
        SchedulerStats, SequenceId, StepPlan, Tenant,
    },
};
use uniarm_model::{Conditioned, DeviceRow, Forward, Likeliest, Lists, ModelError, Row};

pub use row::LogitsRow;
use row::StepRows;

/// Sequences, their paged cache and the model, advanced one step at a time by the thread that owns it.
pub struct Executor {
    forward: Box<dyn Forward>,
    scheduler: Scheduler,
    adapters: HashMap<SequenceId, Conditioned>,
    /// Wanted logits of the step, row-major; reused.
    logits: StepRows,
    /// Lists in place of some of them; reused.
    lists: Lists,
    /// Block tables of the step's rows, one after the other; reused.
    blocks: Vec<u32>,
    costs: CostMeter,
    clock: Clock,
    started: Instant,
}

/// What an executor tells the time by: the machine's clock, or one that a simulation holds.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Instant + Send + Sync>);

/// Rows of the steps that are timed before work begins.
const TRIAL_ROWS: [usize; 5] = [1, 2, 4, 8, 16];

/// Each is timed so often, and the fastest counts: other users of the machine only ever slow it down.
const TRIAL_REPEATS: usize = 3;

/// After a step that takes longer than this no other is timed: a large model must not delay its own start.
const TRIAL_LONGEST: Duration = Duration::from_millis(250);

/// Limits of an executor beyond those of the model itself.
#[derive(Debug, Clone)]
pub struct ExecutorOptions {
    /// Tokens of one step over all sequences.
    pub step_tokens: usize,
    /// Tokens of one sequence's prefill in one step: a long prompt must not hold up the others for long.
    pub prefill_chunk: usize,
    /// Sequences that run at once.
    pub running_max: usize,
    /// Whether a sequence that has nothing to compute still runs; if not, it keeps only its blocks.
    pub idle_keep_places: bool,
    /// Sequences that wait for their first step.
    pub waiting_max: usize,
    pub prefix_cache: bool,
    pub clock: Clock,
}

/// What one step did.
#[derive(Debug, Clone, Default)]
pub struct StepReport {
    /// Sequences in the forward; none: there was nothing to do.
    pub sequences: Vec<SequenceId>,
    pub tokens: usize,
    /// Positions whose logits were handed out.
    pub rows: usize,
    /// Of these, those that came as lists.
    pub lists: usize,
    /// Bytes of logits that came from other processes.
    pub gathered_bytes: usize,
    /// When its planning began, as the scheduler counts time.
    pub planned_at: Duration,
    pub schedule: Duration,
    pub forward: Duration,
    pub preempted: usize,
    /// Sequences past their deadline: the caller removes them.
    pub expired: Vec<SequenceId>,
}

/// What a step computes for one position.
pub enum Logits {
    /// Of the whole vocabulary.
    Row(LogitsRow),
    /// Of the likeliest tokens; empty, where that row has too few numbers. By its number [`Executor::listed_row`] finds the row.
    List(TopList, u64),
}

/// A step before it is computed.
#[must_use]
pub struct PlannedStep {
    plan: StepPlan,
    report: StepReport,
    /// Of each row, the lists that would do in place of its logits.
    lists: Vec<Option<Likeliest>>,
}

/// Tokens that a sequence of `forward` may have: the model's context, or the whole cache where that is smaller.
pub fn context_tokens(forward: &dyn Forward) -> usize {
    forward.context_tokens().min(forward.blocks() * forward.block_tokens())
}

// === impl Clock ===

impl Clock {
    pub fn new(now: impl Fn() -> Instant + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    fn now(&self) -> Instant {
        (self.0)()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new(Instant::now)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

// === impl ExecutorOptions ===

impl Default for ExecutorOptions {
    fn default() -> Self {
        Self {
            step_tokens: 512,
            prefill_chunk: 256,
            running_max: 256,
            idle_keep_places: true,
            waiting_max: 1024,
            prefix_cache: true,
            clock: Clock::default(),
        }
    }
}

// === impl Executor ===

impl Executor {
    /// Takes a model in, and times a few small steps of it.
    ///
    /// # Errors
    /// When the model cannot compute these steps.
    pub fn new(mut forward: Box<dyn Forward>, options: &ExecutorOptions) -> Result<Self, ModelError> {
        let costs = time_trials(&mut *forward, &options.clock)?;
        let scheduler = Scheduler::new(SchedulerOptions {
            block_tokens: forward.block_tokens(),
            blocks: forward.blocks(),
            step_tokens: options.step_tokens,
            prefill_chunk: options.prefill_chunk,
            running_max: options.running_max,
            idle_keep_places: options.idle_keep_places,
            waiting_max: options.waiting_max,
            prefix_cache: options.prefix_cache,
        });
        Ok(Self {
            forward,
            scheduler,
            adapters: HashMap::new(),
            logits: StepRows::default(),
            lists: Lists::default(),
            blocks: Vec::new(),
            costs,
            clock: options.clock.clone(),
            started: options.clock.now(),
        })
    }

    /// Logits of one row.
    pub fn vocabulary(&self) -> usize {
        self.forward.vocabulary()
    }

    /// Tokens that a sequence may have: the model's context, or the whole cache where that is smaller.
    pub fn context_tokens(&self) -> usize {
        context_tokens(&*self.forward)
    }

    /// Time as the scheduler counts it; deadlines of sequences are on this clock.
    pub fn now(&self) -> Duration {
        self.instant() - self.started
    }

    /// Now, on the clock that this executor was given.
    pub fn instant(&self) -> Instant {
        self.clock.now()
    }

    /// The scheduler's time of an instant; one that has passed already is zero.
    pub fn time_of(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.started)
    }

    /// Takes a sequence in; `adapter` steers the model in its rows alone.
    ///
    /// # Errors
    /// When the queue is full or the sequence can never fit.
    pub fn add(&mut self, sequence: NewSequence, adapter: Option<Conditioned>) -> Result<(), AddError> {
        let id = sequence.id;
        self.scheduler.add(self.now(), sequence)?;
        if let Some(adapter) = adapter {
            self.adapters.insert(id, adapter);
        }
        Ok(())
    }

    /// Appends chosen tokens: the next step computes them.
    ///
    /// # Errors
    /// When the sequence is unknown or would outgrow what it was admitted with.
    pub fn extend(&mut self, id: SequenceId, tokens: &[u32]) -> Result<(), ExtendError> {
        self.scheduler.extend(id, tokens)
    }

    /// Forgets the tokens from index `len` on: drafts that were wrong.
    pub fn truncate(&mut self, id: SequenceId, len: usize) {
        self.scheduler.truncate(id, len);
    }

    /// The tokens of a sequence, those that wait for a step included.
    pub fn tokens(&self, id: SequenceId) -> Option<&[u32]> {
        self.scheduler.tokens(id)
    }

    /// What a step costs, as the latest steps tell.
    pub fn step_cost(&self) -> StepCost {
        self.costs.cost()
    }

    /// Forgets the sequence and frees its blocks at once.
    pub fn remove(&mut self, id: SequenceId) {
        self.adapters.remove(&id);
        self.scheduler.remove(id);
    }

    /// Whether a step has ever had room for the sequence.
    pub fn has_started(&self, id: SequenceId) -> bool {
        self.scheduler.has_started(id)
    }

    /// Prompt tokens that were found in the prefix cache.
    pub fn cached_tokens(&self, id: SequenceId) -> usize {
        self.scheduler.cached_tokens(id)
    }

    /// How many of those in line a new sequence of this priority would find before it.
    pub fn ahead(&self, priority: Priority) -> usize {
        self.scheduler.ahead(priority)
    }

    /// The same for a sequence of this tenant.
    pub fn ahead_of(&self, priority: Priority, tenant: Tenant) -> usize {
        self.scheduler.ahead_of(priority, tenant)
    }

    pub fn stats(&self) -> SchedulerStats {
        self.scheduler.stats()
    }

    /// The whole row behind a list of this number, and how many bytes of it came from other processes; `None`: it is not
    /// kept any more.
    ///
    /// # Errors
    /// When another process fails to hand over its part.
    pub fn listed_row(&mut self, number: u64) -> Result<Option<(LogitsRow, usize)>, ModelError> {
        let mut row = Vec::new();
        match self.forward.listed_rows(&[number], &mut row) {
            Ok(gathered) => Ok(Some((row.into(), gathered))),
            Err(ModelError::Invalid { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The whole rows behind lists of these numbers, on the model's device.
    ///
    /// # Errors
    /// As [`Forward::detach_rows`]: one that is not kept any more, or a model that has no such rows.
    pub fn detach_rows(&mut self, numbers: &[u64]) -> Result<Vec<DeviceRow>, ModelError> {
        self.forward.detach_rows(numbers)
    }

    /// Computes the tokens from index `from` on once more, and hands out their logits again.
    pub fn repeat(&mut self, id: SequenceId, from: usize) {
        let Some(tokens) = self.tokens(id).and_then(|tokens| tokens.get(from..)).map(<[u32]>::to_vec) else {
            return;
        };
        self.truncate(id, from);
        self.extend(id, &tokens).expect("it has had all of these tokens");
    }

    /// Decides what the next step computes: who begins is known before it takes its time.
    pub fn plan(&mut self) -> PlannedStep {
        let began = self.instant();
        let plan = self.scheduler.plan(self.now());
        let report = StepReport {
            sequences: plan.rows.iter().map(|row| row.sequence).collect(),
            tokens: plan.rows.iter().map(|row| row.tokens.len()).sum(),
            rows: plan.rows.iter().map(|row| row.tokens.len() - row.logits_from).sum(),
            planned_at: began - self.started,
            preempted: plan.preempted.len(),
            expired: plan.expired.clone(),
            schedule: self.instant() - began,
            ..StepReport::default()
        };
        let lists = vec![None; plan.rows.len()];
        PlannedStep { plan, report, lists }
    }

    /// Runs the forward, and hands the logits of each wanted position, with the index of its token in the sequence, to
    /// `deliver`. Rows of earlier steps that are still held should have been kept ([`LogitsRow::keep`]). The plan is committed
    /// only after the forward succeeded: a failure leaves every sequence where it was.
    ///
    /// # Errors
    /// When the forward fails.
    pub fn compute(
        &mut self,
        planned: PlannedStep,
        mut deliver: impl FnMut(SequenceId, usize, Logits),
    ) -> Result<StepReport, ModelError> {
        let PlannedStep { plan, mut report, mut lists } = planned;
        if plan.rows.is_empty() {
            self.forward.idle()?;
            return Ok(report);
        }

        let began = self.instant();
        self.blocks.clear();
        self.blocks.extend(plan.rows.iter().flat_map(|row| &row.blocks).map(|block| block.0));
        let mut tables = self.blocks.as_slice();
        let rows: Vec<Row<'_>> = plan
            .rows
            .iter()
            .map(|row| Row {
                tokens: &row.tokens,
                start: row.start,
                blocks: tables.split_off(..row.blocks.len()).expect("they were laid out just now"),
                logits_from: row.logits_from,
                adapter: self.adapters.get(&row.sequence),
            })
            .collect();
        if !self.forward.gives_lists() {
            lists.fill(None);
        }
        // (wanted rows without a list, vocabulary), and lists
        self.forward.forward_listed((&rows, &lists), (self.logits.writable(), &mut self.lists))?;
        report.forward = self.instant() - began;
        self.costs.observe(report.tokens, report.forward.as_secs_f64());

        let mut whole = self.logits.iter(self.forward.vocabulary());
        let mut listed = self.lists.iter().zip(self.lists.first..);
        for (row, wanted) in plan.rows.iter().zip(&lists) {
            for index in row.logits_from..row.tokens.len() {
                let logits = match wanted {
                    None => Logits::Row(whole.next().expect("the forward writes every wanted row")),
                    Some(wanted) => {
                        report.lists += 1;
                        let (list, number) = listed.next().expect("the forward makes every wanted list");
                        Logits::List(likeliest::top_list_of(wanted, list), number)
                    }
                };
                deliver(row.sequence, row.start + index, logits);
            }
        }
        report.gathered_bytes = self.lists.gathered_bytes;
        self.scheduler.commit(&plan);
        Ok(report)
    }
}

// === impl PlannedStep ===

impl PlannedStep {
    /// There is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.plan.rows.is_empty()
    }

    /// `list` says of a sequence, and of the index of its first token whose logits are wanted, which list would do in place
    /// of whole rows, if any. Models that have rows at hand give these.
    pub fn take_lists(&mut self, list: impl Fn(SequenceId, usize) -> Option<Likeliest>) {
        let of = |row: &PlannedRow| {
            let wants_logits = row.logits_from < row.tokens.len(); // a part of a prompt wants none
            wants_logits.then(|| list(row.sequence, row.start + row.logits_from)).flatten()
        };
        self.lists = self.plan.rows.iter().map(of).collect();
    }
}

/// Times steps of few rows, before any sequence lives in the cache.
fn time_trials(forward: &mut dyn Forward, clock: &Clock) -> Result<CostMeter, ModelError> {
    let tables: Vec<[u32; 1]> = (0..forward.blocks() as u32).map(|block| [block]).collect();
    let mut logits = Vec::new();
    let mut costs = CostMeter::default();
    for count in TRIAL_ROWS.into_iter().filter(|count| *count <= tables.len()) {
        let rows: Vec<Row<'_>> = tables[..count]
            .iter()
            .map(|blocks| Row { tokens: &[0], start: 0, blocks, logits_from: 0, adapter: None })
            .collect();
        forward.forward(&rows, &mut logits)?; // memory is touched for the first time
        let mut fastest = Duration::MAX;
        for _ in 0..TRIAL_REPEATS {
            let began = clock.now();
            forward.forward(&rows, &mut logits)?;
            fastest = fastest.min(clock.now() - began);
            if fastest > TRIAL_LONGEST {
                break;
            }
        }
        costs.observe(count, fastest.as_secs_f64());
        if fastest > TRIAL_LONGEST {
            break;
        }
    }
    Ok(costs)
}
