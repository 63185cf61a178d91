//! A worker's thread: the real scheduler, and the step that is under way in virtual time.

use std::sync::Arc;
use std::time::Duration;

use uniarm_decode::drafting::CostMeter;
use uniarm_decode::{Scheduler, StepPlan};

use crate::cost::{Cost, Work};
use crate::observed::Slowdown;
use crate::setup::Pool;

/// Rows of the larger of the two steps that a worker tries before it is ready.
const TRIAL_ROWS: [usize; 5] = [1, 2, 4, 8, 16];

/// When a step ends, unless something happens to it before: then a later version says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) at: Duration,
    pub(crate) version: u64,
}

/// Plans, and keeps the time of the step that runs.
pub(crate) struct Stepper {
    pub(crate) scheduler: Scheduler,
    pub(crate) cost: Arc<Cost>,
    pub(crate) used: Used,
    /// What the worker itself measures.
    pub(crate) meter: CostMeter,
    /// Of the next step without and with prompts.
    numbers: [usize; 2],
    current: Option<Step>,
    version: u64,
}

/// What a worker has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Used {
    pub(crate) steps: u64,
    pub(crate) rows: u64,
    pub(crate) tokens: u64,
    pub(crate) busy: Duration,
    /// The part of it that models computed.
    pub(crate) forward: Duration,
}

struct Step {
    plan: StepPlan,
    work: Work,
    /// What the forward takes, over its cost.
    swing: f64,
    /// When the thread took it up, and when its forward began.
    began: Duration,
    forward_at: Duration,
    /// The part of the forward that is done, as of `since`.
    done: f64,
    since: Duration,
    crowded: bool,
    /// Work on the thread after the forward.
    after: Duration,
}

// === impl Stepper ===

impl Stepper {
    /// `worker`: a number that no other worker of either pool has; each is disturbed at its own times.
    pub(crate) fn new(worker: usize, pool: &Pool) -> Self {
        let mut meter = CostMeter::default();
        for rows in TRIAL_ROWS {
            let work = Work { tokens: rows, wanted: rows, ..Work::default() };
            meter.observe(rows, pool.cost.step(&work, false).as_secs_f64());
        }
        Self {
            meter,
            scheduler: Scheduler::new(pool.scheduler),
            cost: Arc::clone(&pool.cost),
            used: Used::default(),
            numbers: [Slowdown::first(worker); 2],
            current: None,
            version: 0,
        }
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.current.is_some()
    }

    /// Takes up a planned step at `now`: `before` on the thread, the forward, `after` on the thread.
    pub(crate) fn begin(
        &mut self,
        now: Duration,
        plan: StepPlan,
        [before, after]: [Duration; 2],
        crowded: bool,
    ) -> Ending {
        let work = Work::of(&plan);
        let mut swing = 1.0;
        if work.tokens > 0 {
            let number = &mut self.numbers[usize::from(work.has_prompts())];
            swing = self.cost.swing(&work, *number);
            *number += 1;
            self.used.steps += 1;
            self.used.rows += plan.rows.len() as u64;
            self.used.tokens += work.tokens as u64;
        }
        self.current = Some(Step {
            plan,
            work,
            swing,
            began: now,
            forward_at: now + before,
            done: 0.0,
            since: now + before,
            crowded,
            after,
        });
        self.ending()
    }

    /// Another worker on the same machine began or ended a step: the rest of this one runs at another speed.
    pub(crate) fn crowd(&mut self, now: Duration, crowded: bool) -> Option<Ending> {
        let step = self.current.as_mut()?;
        if step.crowded == crowded {
            return None;
        }
        let whole = self.cost.step(&step.work, step.crowded).as_secs_f64() * step.swing;
        let passed = now.saturating_sub(step.since).as_secs_f64();
        if whole > 0.0 {
            step.done = (step.done + passed / whole).min(1.0);
        }
        step.since = step.since.max(now);
        step.crowded = crowded;
        Some(self.ending())
    }

    /// The plan of the step that ends now; none if the ending was replaced by another.
    pub(crate) fn end(&mut self, now: Duration, version: u64) -> Option<StepPlan> {
        if version != self.version {
            return None;
        }
        let step = self.current.take()?;
        self.used.busy += now - step.began;
        if step.work.tokens > 0 {
            let forward = now.saturating_sub(step.after).saturating_sub(step.forward_at);
            self.used.forward += forward;
            self.meter.observe(step.work.tokens, forward.as_secs_f64());
        }
        self.scheduler.commit(&step.plan);
        Some(step.plan)
    }

    fn ending(&mut self) -> Ending {
        self.version += 1;
        let step = self.current.as_ref().expect("a step is under way");
        let forward = match step.work.tokens {
            0 => Duration::ZERO,
            _ => self.cost.step(&step.work, step.crowded).mul_f64(step.swing * (1.0 - step.done)),
        };
        Ending { at: step.since + forward + step.after, version: self.version }
    }
}
