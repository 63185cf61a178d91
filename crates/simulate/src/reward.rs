//! A reward worker: sessions of many base workers in one batch, and drafts ahead. The turns of `services/reward`'s
//! engine, with a clock in place of a model.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use uniarm_decode::drafting::{DraftMode, Pace};
use uniarm_decode::{
    CacheRoot, NewSequence, PlannedRow, Priority as Rank, SchedulerOptions, SequenceId, StepPlan, Tenant,
};

use crate::base::rank;
use crate::setup::Pool;
use crate::stepper::{Ending, Stepper};
use crate::world::{Drafted, Event, Load, Op, OpKind, Reply, ReplyKind, Worker, World};

/// How long an idle engine sleeps between looks.
const IDLE_WAIT: Duration = Duration::from_millis(500);

/// A second sequence needs a cache of which one part in so many is free.
const PLAIN_FREE_SHARE: usize = 3;

/// Tells a session's second sequence, the plain backbone's, from the first.
const PLAIN: u64 = 1 << 63;

/// One reward worker.
pub(crate) struct Reward {
    number: usize,
    pub(crate) stepper: Stepper,
    sessions: HashMap<usize, Session>,
    inbox: Vec<(usize, Op)>,
    /// Replies that go out when the step ends: one message for each base worker.
    outbox: BTreeMap<usize, Vec<Reply>>,
    wakes_at: Option<Duration>,
}

struct Session {
    base: usize,
    epoch: u32,
    pace: Pace,
    /// Tokens of the answer that the sequence has, drafts included.
    tokens: usize,
    /// Those that the base worker has chosen.
    confirmed: usize,
    /// What it would choose after the last token, once that row is made.
    drafted: Option<Drafted>,
    /// Of the plain backbone, where the mode wants one: whether its row after the last token is made.
    plain: Option<bool>,
}

// === impl Reward ===

impl Reward {
    pub(crate) fn new(number: usize, pool: &Pool) -> Self {
        let scheduler = SchedulerOptions { idle_keep_places: false, ..pool.scheduler };
        Self {
            number,
            stepper: Stepper::new(2 * number + 1, &Pool { scheduler, ..pool.clone() }),
            sessions: HashMap::new(),
            inbox: Vec::new(),
            outbox: BTreeMap::new(),
            wakes_at: None,
        }
    }

    pub(crate) fn take(&mut self, base: usize, ops: Vec<Op>) {
        self.inbox.extend(ops.into_iter().map(|op| (base, op)));
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    pub(crate) fn woke(&mut self) {
        self.wakes_at = None;
    }

    /// The forward is done: rows and drafts go out.
    pub(crate) fn end_step(&mut self, now: Duration, version: u64, world: &mut World<'_>) -> bool {
        let Some(plan) = self.stepper.end(now, version) else { return false };
        let rows = || plan.rows.iter().filter(|row| row.logits_from < row.tokens.len());
        // A draft wants both rows of its position, in whatever order they stand in the step.
        rows().for_each(|row| self.on_plain_row(row, world));
        rows().for_each(|row| self.on_row(row, world));
        self.flush(now, world);
        true
    }

    /// One turn of an idle engine: inbox, then a step; replies that need no step go out at once without one.
    pub(crate) fn turn(&mut self, now: Duration, crowded: bool, world: &mut World<'_>) -> Option<Ending> {
        for (base, op) in std::mem::take(&mut self.inbox) {
            self.apply(base, &op, now, world);
        }
        let plan = self.stepper.scheduler.plan(now);
        if plan.rows.is_empty() {
            self.flush(now, world);
            self.sleep(now, world);
            return None;
        }
        let listing = self.listing(&plan);
        Some(self.stepper.begin(now, plan, [Duration::ZERO, listing], crowded))
    }

    fn apply(&mut self, base: usize, op: &Op, now: Duration, world: &mut World<'_>) {
        match op.kind {
            OpKind::Open { answer } => self.open(base, op, answer, now, world),
            OpKind::Advance { answer } => self.advance(op, answer, now, world),
            OpKind::Rollback { answer } => self.roll_back(op, answer, world),
            OpKind::Query { position } => {
                let kind = ReplyKind::Answer { position };
                self.reply(base, Reply { request: op.request, epoch: op.epoch, kind });
            }
            OpKind::Close => {
                self.sessions.remove(&op.request);
                self.stepper.scheduler.remove(steered(op.request));
                self.stepper.scheduler.remove(plain(op.request));
            }
        }
    }

    fn open(&mut self, base: usize, op: &Op, answer: usize, now: Duration, world: &mut World<'_>) {
        let new = NewSequence {
            root: world.root(op.request),
            ..sequence(op.request, world.steered_prompt(op.request), answer, world)
        };
        if self.stepper.scheduler.add(now, new).is_err() {
            self.reply(base, Reply { request: op.request, epoch: op.epoch, kind: ReplyKind::Refused });
            return;
        }
        let session = Session {
            base,
            epoch: op.epoch,
            pace: op.pace,
            tokens: answer,
            confirmed: answer,
            drafted: None,
            plain: None,
        };
        self.sessions.insert(op.request, session);
        self.pair(op.request, now, world);
    }

    fn advance(&mut self, op: &Op, answer: usize, now: Duration, world: &mut World<'_>) {
        let Some(session) = self.sessions.get_mut(&op.request) else { return };
        session.confirmed = answer;
        session.pace = op.pace;
        let known = session.tokens;
        if known < answer {
            self.extend(op.request, &world.tokens(op.request, known..answer));
        }
        self.pair(op.request, now, world);
        self.go_on(op.request, world);
    }

    fn roll_back(&mut self, op: &Op, answer: usize, world: &mut World<'_>) {
        let Some(session) = self.sessions.get_mut(&op.request) else { return };
        let known = session.tokens.min(answer - 1);
        (session.epoch, session.pace, session.confirmed) = (op.epoch, op.pace, answer);
        session.tokens = known;
        let prompt = world.steered_prompt_tokens(op.request);
        self.stepper.scheduler.truncate(steered(op.request), prompt + known);
        let prompt = world.arrivals[op.request].prompt_tokens;
        self.stepper.scheduler.truncate(plain(op.request), prompt + known);
        self.extend(op.request, &world.tokens(op.request, known..answer));
    }

    /// Starts or stops the second sequence of a session, as its pace wants it and the cache has room for it.
    fn pair(&mut self, request: usize, now: Duration, world: &World<'_>) {
        let Some(session) = self.sessions.get_mut(&request) else { return };
        let wanted = session.pace.mode == DraftMode::Dual;
        if !wanted && session.plain.take().is_some() {
            self.stepper.scheduler.remove(plain(request));
        }
        let stats = self.stepper.scheduler.stats();
        if !wanted || session.plain.is_some() || stats.free_blocks * PLAIN_FREE_SHARE < stats.total_blocks {
            return;
        }
        let new = NewSequence {
            id: plain(request),
            priority: Rank::Low,
            ..sequence(request, world.prompt(request), session.tokens, world)
        };
        // A full queue costs only drafts.
        if self.stepper.scheduler.add(now, new).is_ok() {
            session.plain = Some(false);
        }
    }

    fn on_plain_row(&mut self, row: &PlannedRow, world: &World<'_>) {
        let request = (row.sequence.0 & !PLAIN) as usize;
        let Some(session) = self.sessions.get_mut(&request) else { return };
        if row.sequence == plain(request) && position(row, request, world) == session.tokens {
            session.plain = Some(true);
        }
    }

    /// Answers with a list, and a draft if it makes any.
    fn on_row(&mut self, row: &PlannedRow, world: &mut World<'_>) {
        let request = (row.sequence.0 & !PLAIN) as usize;
        let Some(session) = self.sessions.get_mut(&request) else { return };
        let position = position(row, request, world);
        // Where blocks were short the rest of its tokens comes in a later step.
        if row.sequence == plain(request) || position < session.tokens {
            return;
        }
        let mode = match (session.pace.mode, session.plain) {
            (DraftMode::Off, _) => None,
            (_, None) => Some(DraftMode::Single),
            (_, Some(true)) => Some(DraftMode::Dual),
            (_, Some(false)) => None,
        };
        let ends = position + 1 >= world.arrivals[request].answer_tokens;
        session.drafted = mode.filter(|_| !ends).map(|mode| world.draft(request, position, mode));
        let kind = ReplyKind::Row { position, draft: session.drafted };
        let (base, epoch) = (session.base, session.epoch);
        self.reply(base, Reply { request, epoch, kind });
        self.go_on(request, world);
    }

    /// Goes on with its own draft, as far as the window reaches and the answer can go.
    fn go_on(&mut self, request: usize, world: &World<'_>) {
        let Some(session) = self.sessions.get(&request) else { return };
        let Some(drafted) = session.drafted else { return };
        let position = session.tokens;
        if position - session.confirmed < session.pace.window as usize {
            self.extend(request, &[world.draft_token(request, position, drafted)]);
        }
    }

    fn extend(&mut self, request: usize, tokens: &[u32]) {
        let session = self.sessions.get_mut(&request).expect("it was just there");
        session.tokens += tokens.len();
        session.drafted = None;
        let extended = self.stepper.scheduler.extend(steered(request), tokens);
        extended.expect("it was opened with room for its answer");
        if session.plain.is_some() {
            session.plain = Some(false);
            let extended = self.stepper.scheduler.extend(plain(request), tokens);
            extended.expect("it was opened with room for its answer");
        }
    }

    /// Time for the lists and drafts of a step.
    fn listing(&self, plan: &StepPlan) -> Duration {
        let mut time = Duration::ZERO;
        for row in plan.rows.iter().filter(|row| row.logits_from < row.tokens.len()) {
            let session = self.sessions.get(&(row.sequence.0 as usize));
            time += session.map_or(Duration::ZERO, |session| match session.pace.mode {
                DraftMode::Off => self.stepper.cost.list(),
                DraftMode::Single | DraftMode::Dual => self.stepper.cost.list() + self.stepper.cost.draft(),
            });
        }
        time
    }

    fn reply(&mut self, base: usize, reply: Reply) {
        self.outbox.entry(base).or_default().push(reply);
    }

    fn flush(&mut self, now: Duration, world: &mut World<'_>) {
        let load = Load { cost: self.stepper.meter.cost(), sessions: self.sessions.len() as f64 };
        for (base, replies) in std::mem::take(&mut self.outbox) {
            world.send_replies(now, [self.number, base], replies, load.clone());
        }
    }

    fn sleep(&mut self, now: Duration, world: &mut World<'_>) {
        if self.wakes_at.is_none() && self.stepper.scheduler.stats().waiting > 0 {
            let next = now + IDLE_WAIT;
            self.wakes_at = Some(next);
            world.queue.push(next, Event::Wake(Worker::Reward(self.number)));
        }
    }
}

fn steered(request: usize) -> SequenceId {
    SequenceId(request as u64)
}

fn plain(request: usize) -> SequenceId {
    SequenceId(request as u64 | PLAIN)
}

/// A prompt and the first tokens of the answer.
fn sequence(request: usize, prompt: Vec<u32>, answer: usize, world: &World<'_>) -> NewSequence {
    let arrival = &world.arrivals[request];
    let tokens_max = prompt.len() + arrival.answer_tokens;
    let mut tokens = prompt;
    tokens.extend(world.tokens(request, 0..answer));
    NewSequence {
        id: steered(request),
        logits_from: tokens.len() - 1,
        tokens_max,
        tokens,
        root: CacheRoot(0),
        priority: rank(arrival.priority),
        tenant: Tenant(0),
        deadline: None,
    }
}

/// The position that a row's last logits choose.
fn position(row: &PlannedRow, request: usize, world: &World<'_>) -> usize {
    let prompt = match row.sequence == plain(request) {
        true => world.arrivals[request].prompt_tokens,
        false => world.steered_prompt_tokens(request),
    };
    row.start + row.tokens.len() - prompt
}
