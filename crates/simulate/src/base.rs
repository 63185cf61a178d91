//! A base worker: takes requests in, decides tokens whose rows are here, lays drafts, and steps. The turns of
//! `services/base`'s engine, with a clock in place of a model.

mod leave;

use std::collections::BTreeMap;
use std::time::Duration;

use uniarm_decode::alignment::{Alignment, Group, patience};
use uniarm_decode::drafting::DraftMode;
use uniarm_decode::{CacheRoot, NewSequence, Priority as Rank, SequenceId, Tenant};

use self::leave::Stopping;
use crate::pace::Paces;
use crate::setup::Setup;
use crate::stepper::{Ending, Stepper};
use crate::trace::ArrivalPriority;
use crate::world::{Event, Load, Op, OpKind, Outcome, Reply, ReplyKind, Worker, World};

/// How long an idle engine with requests sleeps between looks.
const STALLED_WAIT: Duration = Duration::from_millis(5);

/// Tokens after which the pace of an answer is set anew.
const PACE_TOKENS: usize = 8;

/// First wait before a session that every worker refused is tried again; doubles up to the longest.
const REOPEN_FIRST: Duration = Duration::from_millis(50);
const REOPEN_LONGEST: Duration = Duration::from_secs(2);

/// One base worker.
pub(crate) struct Base {
    number: usize,
    pub(crate) stepper: Stepper,
    paces: Paces,
    alignment: Alignment<usize>,
    /// Requests that hold a permit.
    requests: usize,
    /// Guided requests that have begun here, and so have sessions.
    guided: Vec<usize>,
    /// Guided requests that have not.
    unopened: Vec<usize>,
    inbox: Vec<Message>,
    /// Requests that something arrived for since the last decision.
    touched: Vec<usize>,
    /// Operations of this turn: one message for each reward worker.
    outbox: BTreeMap<usize, Vec<Op>>,
    wakes_at: Option<Duration>,
    stopping: Stopping,
    /// Requests that it handed over.
    pub(crate) moved: Vec<usize>,
    pub(crate) ended: Vec<(usize, Outcome)>,
}

pub(crate) enum Message {
    Start {
        request: usize,
    },
    Replies {
        reward: usize,
        replies: Vec<Reply>,
        load: Load,
    },
    Reopen {
        request: usize,
    },
    /// A reward worker leaves: its sessions move.
    Leaves {
        reward: usize,
    },
}

// === impl Base ===

impl Base {
    pub(crate) fn new(number: usize, setup: &Setup) -> Self {
        Self {
            number,
            stepper: Stepper::new(2 * number, &setup.base),
            paces: Paces::new(setup),
            alignment: Alignment::default(),
            requests: 0,
            guided: Vec::new(),
            unopened: Vec::new(),
            inbox: Vec::new(),
            touched: Vec::new(),
            outbox: BTreeMap::new(),
            wakes_at: None,
            stopping: Stopping::No,
            moved: Vec::new(),
            ended: Vec::new(),
        }
    }

    /// A placed request arrives: it takes a permit, or its router hears that there is none.
    pub(crate) fn receive(&mut self, request: usize, now: Duration, world: &mut World<'_>) {
        let priority = uniarm_proto::Priority::from(world.arrivals[request].priority);
        let is_full = self.requests >= priority.places(world.setup.base_requests_max);
        if is_full || self.stopping != Stopping::No {
            world.queue.push(now + world.setup.front.transit(0), Event::Refused { request });
        } else {
            self.requests += 1;
            let state = &mut world.requests[request];
            (state.held_by, state.accepted_at) = (Some(self.number), state.accepted_at.or(Some(now)));
            self.inbox.push(Message::Start { request });
        }
    }

    pub(crate) fn take(&mut self, message: Message) {
        self.inbox.push(message);
    }

    pub(crate) fn woke(&mut self) {
        self.wakes_at = None;
    }

    /// The forward is done: its rows are here.
    pub(crate) fn end_step(&mut self, now: Duration, version: u64, world: &mut World<'_>) -> bool {
        let Some(plan) = self.stepper.end(now, version) else { return false };
        for row in plan.rows.iter().filter(|row| row.logits_from < row.tokens.len()) {
            let request = row.sequence.0 as usize;
            let state = &mut world.requests[request];
            if state.outcome.is_none() && state.held_by == Some(self.number) {
                state.rows_at = now;
                state.rows = row.start + row.tokens.len() + 1 - world.arrivals[request].prompt_tokens;
                self.touched.push(request);
            }
        }
        true
    }

    /// One turn of an idle engine: inbox, decisions, messages, step.
    pub(crate) fn turn(&mut self, now: Duration, crowded: bool, world: &mut World<'_>) -> Option<Ending> {
        for message in std::mem::take(&mut self.inbox) {
            self.apply(message, now, world);
        }
        if self.stopping == Stopping::HandsOver {
            self.hand_over(world);
        }
        let mut spent = Duration::ZERO;
        let held = self.held(now, world);
        for request in std::mem::take(&mut self.touched) {
            match self.group_of(request, world).is_some_and(|reward| held.contains(&reward)) {
                true => self.touched.push(request),
                false => self.decide(request, now, &mut spent, world),
            }
        }
        let plan = self.stepper.scheduler.plan(now);
        for id in &plan.expired {
            self.end(id.0 as usize, Outcome::Expired, world);
        }
        self.open_begun(world);
        for (reward, ops) in std::mem::take(&mut self.outbox) {
            world.send_ops(now + spent, self.number, reward, ops);
        }
        if plan.rows.is_empty() && spent.is_zero() {
            self.sleep(now, world);
            return None;
        }
        if !plan.rows.is_empty() {
            self.alignment.stepped();
        }
        Some(self.stepper.begin(now, plan, [spent, Duration::ZERO], crowded))
    }

    fn apply(&mut self, message: Message, now: Duration, world: &mut World<'_>) {
        match message {
            Message::Start { request } => self.start(request, now, world),
            Message::Replies { reward, replies, load } => {
                self.paces.hear(reward, load);
                for reply in replies {
                    self.on_reply(&reply, now, world);
                }
            }
            Message::Reopen { request } if world.requests[request].held_by == Some(self.number) => {
                self.open(request, world);
            }
            Message::Reopen { .. } => {} // handed over meanwhile
            Message::Leaves { reward } => self.leave_reward(reward, world),
        }
    }

    fn start(&mut self, request: usize, now: Duration, world: &mut World<'_>) {
        let arrival = &world.arrivals[request];
        let mut tokens = world.prompt(request);
        let tokens_max = tokens.len() + arrival.answer_tokens;
        // Of an answer that another worker began.
        tokens.extend(world.tokens(request, 0..world.requests[request].answer));
        let new = NewSequence {
            id: SequenceId(request as u64),
            logits_from: tokens.len() - 1,
            tokens_max,
            tokens,
            root: CacheRoot(0),
            priority: rank(arrival.priority),
            tenant: Tenant(0),
            deadline: world.deadline(request),
        };
        if self.stepper.scheduler.add(now, new).is_err() {
            self.forget(request, Outcome::Refused, world);
            return;
        }
        if arrival.guided {
            self.unopened.push(request);
        }
    }

    /// Opens the sessions of answers that have got a place.
    fn open_begun(&mut self, world: &mut World<'_>) {
        let scheduler = &self.stepper.scheduler;
        let begun: Vec<_> = self
            .unopened
            .extract_if(.., |request| scheduler.has_started(SequenceId(*request as u64)))
            .collect();
        for request in begun {
            self.guided.push(request);
            self.pass_over_gone(request, world);
            self.open(request, world);
        }
    }

    fn open(&mut self, request: usize, world: &mut World<'_>) {
        let state = &world.requests[request];
        if state.outcome.is_none() {
            let answer = state.answer;
            self.set_pace(request, world);
            self.push(request, OpKind::Open { answer }, world);
        }
    }

    fn on_reply(&mut self, reply: &Reply, now: Duration, world: &mut World<'_>) {
        let request = reply.request;
        let state = &mut world.requests[request];
        if state.outcome.is_some() || state.epoch != reply.epoch || state.held_by != Some(self.number) {
            return; // late
        }
        match reply.kind {
            ReplyKind::Row { position, draft } => {
                state.heard = position + 1;
                state.drafts.extend(draft);
                state.refusals = 0;
            }
            ReplyKind::Answer { position } => {
                state.queried = position + 1;
                state.querying = false;
            }
            ReplyKind::Refused => {
                self.on_refusal(request, now, world);
                return;
            }
        }
        self.touched.push(request);
    }

    /// The session goes to the next worker in line; after each round of all of them there is a wait.
    fn on_refusal(&mut self, request: usize, now: Duration, world: &mut World<'_>) {
        let state = &mut world.requests[request];
        state.refusals += 1;
        state.epoch += 1;
        state.drafts.clear();
        self.next_reward(request, world);
        let state = &world.requests[request];
        let rounds = (state.refusals / state.rewards.len()).min(16) as u32;
        match rounds.checked_sub(1) {
            None => self.open(request, world),
            Some(doublings) => {
                let wait = REOPEN_FIRST.saturating_mul(1 << doublings).min(REOPEN_LONGEST);
                world.queue.push(now + wait, Event::Reopen { base: self.number, request });
            }
        }
    }

    /// Reward workers whose sequences wait for each other.
    fn held(&mut self, now: Duration, world: &World<'_>) -> Vec<usize> {
        let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
        for &request in &self.guided {
            if let Some(reward) = self.group_of(request, world) {
                let state = &world.requests[request];
                let group = groups.entry(reward).or_default();
                match state.heard > state.answer && !state.querying {
                    true => group.ready += 1,
                    false => group.waiting += 1,
                }
            }
        }
        let Self { alignment, paces, .. } = self;
        let holds = |(reward, group): (usize, Group)| {
            let patience =
                paces.load(reward).map_or(Duration::ZERO, |load| patience(&load.cost, load.sessions));
            alignment.holds(reward, group, now, patience).then_some(reward)
        };
        groups.into_iter().filter_map(holds).collect()
    }

    /// The reward worker of an answer that advances token by token and has its base row.
    fn group_of(&self, request: usize, world: &World<'_>) -> Option<usize> {
        let state = &world.requests[request];
        let begun = state.answer > 0 && state.rows > state.answer && state.outcome.is_none();
        (begun && world.arrivals[request].guided && state.pace.gather <= 1)
            .then(|| state.rewards[state.current])
    }

    /// Chooses every token whose rows are here, tells the reward worker, and prepares the next pass.
    fn decide(&mut self, request: usize, now: Duration, spent: &mut Duration, world: &mut World<'_>) {
        let arrival = &world.arrivals[request];
        let before = world.requests[request].answer;
        if arrival.guided && before == 0 {
            self.set_pace(request, world); // the session is open, and its worker has said what its steps cost
        }
        let mut goes_on = true;
        while goes_on && self.may_choose(request, world) {
            *spent += self.stepper.cost.choose(arrival.guided);
            world.emit(request, now + *spent);
            goes_on = self.accept(request, world);
        }
        let state = &mut world.requests[request];
        if state.answer == arrival.answer_tokens {
            self.end(request, Outcome::Finished, world);
        }
        let state = &mut world.requests[request];
        if state.outcome.is_some() {
            return;
        }
        if arrival.guided && state.answer > before {
            let answer = state.answer;
            if answer / PACE_TOKENS > before / PACE_TOKENS {
                self.set_pace(request, world);
            }
            let state = &mut world.requests[request];
            let kind = match goes_on {
                true => OpKind::Advance { answer },
                false => {
                    state.epoch += 1;
                    OpKind::Rollback { answer }
                }
            };
            self.push(request, kind, world);
        }
        self.lay(request, world);
    }

    /// Whether the base row and the reward's list for the next position are here and suffice.
    fn may_choose(&mut self, request: usize, world: &mut World<'_>) -> bool {
        let state = &world.requests[request];
        let position = state.answer;
        if state.outcome.is_some() || position >= state.rows {
            return false; // with the last token no row is left
        }
        if !world.arrivals[request].guided {
            return true;
        }
        if position >= state.heard {
            return false;
        }
        if state.queried > position || world.is_certified(request, position) {
            return true;
        }
        if !state.querying {
            world.requests[request].querying = true;
            self.push(request, OpKind::Query { position }, world);
        }
        false
    }

    /// Takes a chosen token in. False: it is not the drafted one, and everything beyond it is void.
    fn accept(&mut self, request: usize, world: &mut World<'_>) -> bool {
        let state = &mut world.requests[request];
        let verified = state.laid > state.answer;
        state.answer += 1;
        let Some(drafted) = state.drafts.pop_front() else { return true };
        self.paces.observe(drafted);
        if verified {
            world.tally.drafted += 1;
            world.tally.accepted += u64::from(drafted.right);
        }
        if drafted.right {
            return true;
        }
        state.drafts.clear();
        state.heard = state.answer;
        state.rows = state.answer;
        if verified {
            state.laid = state.answer - 1;
            let tokens = world.arrivals[request].prompt_tokens + state.laid;
            self.stepper.scheduler.truncate(SequenceId(request as u64), tokens);
        }
        false
    }

    /// Appends the chosen token and the drafts that have arrived, once as many positions have gathered as one pass is to
    /// verify or no more will come.
    fn lay(&mut self, request: usize, world: &mut World<'_>) {
        let arrival = &world.arrivals[request];
        let state = &world.requests[request];
        let (answer, laid, pace) = (state.answer, state.laid, state.pace);
        let useful = arrival.answer_tokens - 1 - answer;
        let path = state.drafts.len().min(useful);
        let positions = usize::from(laid < answer) + path.saturating_sub(laid.saturating_sub(answer));
        // Before its first row the sequence is a prompt, and the prompt comes first.
        if positions == 0 || state.rows == 0 {
            return;
        }
        let waits = state.heard > answer + path; // a row without a draft
        let is_drafting = arrival.guided && pace.mode != DraftMode::Off && !waits;
        if positions < pace.gather as usize && path < useful && is_drafting && path <= pace.window as usize {
            return;
        }
        let mut tokens = world.tokens(request, laid.min(answer)..answer);
        let fresh = laid.max(answer) - answer..path;
        for (position, drafted) in (laid.max(answer)..).zip(state.drafts.range(fresh)) {
            tokens.push(world.draft_token(request, position, *drafted));
        }
        let id = SequenceId(request as u64);
        self.stepper.scheduler.extend(id, &tokens).expect("an answer that goes on is known and has room");
        world.requests[request].laid = answer + path;
    }

    fn set_pace(&mut self, request: usize, world: &mut World<'_>) {
        let state = &mut world.requests[request];
        state.pace = self.paces.of(state.rewards[state.current], &self.stepper);
    }

    fn end(&mut self, request: usize, outcome: Outcome, world: &mut World<'_>) {
        if world.requests[request].outcome.is_some() {
            return;
        }
        self.unopened.retain(|unopened| *unopened != request);
        if let Some(at) = self.guided.iter().position(|guided| *guided == request) {
            self.guided.remove(at);
            self.push(request, OpKind::Close, world);
        }
        self.stepper.scheduler.remove(SequenceId(request as u64));
        world.requests[request].outcome = Some(outcome);
        self.forget(request, outcome, world);
    }

    fn forget(&mut self, request: usize, outcome: Outcome, world: &mut World<'_>) {
        world.requests[request].held_by = None;
        self.requests -= 1;
        self.ended.push((request, outcome));
    }

    fn push(&mut self, request: usize, kind: OpKind, world: &World<'_>) {
        let state = &world.requests[request];
        let reward = state.rewards[state.current];
        let op = Op { request, epoch: state.epoch, pace: state.pace, kind };
        self.outbox.entry(reward).or_default().push(op);
    }

    /// Without a message the engine looks again by itself while somebody waits for blocks or is held, and at the next deadline.
    fn sleep(&mut self, now: Duration, world: &mut World<'_>) {
        let waits = self.stepper.scheduler.stats().waiting > 0 || !self.touched.is_empty();
        let look = waits.then_some(now + STALLED_WAIT);
        let next = look.into_iter().chain(self.stepper.scheduler.next_deadline()).min();
        if let Some(next) = next
            && self.wakes_at.is_none_or(|at| next < at)
        {
            self.wakes_at = Some(next);
            world.queue.push(next.max(now), Event::Wake(Worker::Base(self.number)));
        }
    }
}

pub(crate) fn rank(priority: ArrivalPriority) -> Rank {
    match priority {
        ArrivalPriority::Low => Rank::Low,
        ArrivalPriority::Normal => Rank::Normal,
        ArrivalPriority::High => Rank::High,
    }
}
