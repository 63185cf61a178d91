//! The engine: one OS thread owns the model, the sequences and the guide, and is fed through an inbox.
//!
//! A turn: read the inbox → decide every answer whose rows are here → tell the reward workers → one forward → decide
//! again. While the forward runs, the reward workers compute the same positions, so a step costs the longer of
//! the two and not their sum.

mod begin;
mod sessions;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{self, Duration},
};

use tokio::time::Instant;
use uniarm_decode::{
    Chooser,
    alignment::{Alignment, Group},
    scheduler::SequenceId,
};
use uniarm_engine::Executor;
use uniarm_model::ModelError;
use uniarm_proto::{Event, Refusal, ReplyBatch, SessionId, pb};
use uniarm_runtime::{
    drain::{DrainRate, Line},
    drive::{Commands, Turn, Turned},
};

use crate::{
    accept::{Accepted, SharedSettings},
    choice::{Choice, Chosen, Decision, Mode, RequestKey, Rules, ends},
    guide::{Epoch, LinkId, Links},
    handle::RetryAfter,
    metrics::{BaseMetrics, OutcomeLabel},
    pacing::Pacing,
    request::Request,
    steps::StepMeter,
};

/// How long an idle engine sleeps between looks at its clients; a message wakes it at once.
const IDLE_WAIT: Duration = Duration::from_millis(500);

/// The same while requests wait for something outside: a client that hung up frees its blocks within this.
const STALLED_WAIT: Duration = Duration::from_millis(5);

/// Tokens of an answer after which its pace is looked at again.
const PACE_TOKENS: usize = 8;

/// The inbox has no bound of its own: requests are bounded by their permits, and a session has at most two replies
/// outstanding.
pub(crate) enum Command {
    Start(Box<Accepted>),
    Replies {
        link: LinkId,
        batch: ReplyBatch,
    },
    LinkUp {
        link: LinkId,
        epoch: Epoch,
    },
    LinkDown {
        link: LinkId,
    },
    /// This worker is leaving: requests that run go on elsewhere.
    HandOver,
    /// The last handle is gone.
    Stop,
}

/// State of the thread that owns the model.
pub(crate) struct Engine {
    settings: SharedSettings,
    executor: Executor,
    /// One for each length of a row: a reward model may have the shorter vocabulary.
    choosers: HashMap<usize, Chooser>,
    links: Links,
    pacing: Pacing,
    alignment: Alignment<LinkId>,
    /// Silence of a reward worker after which another one is asked besides.
    hedge_after: Option<Duration>,
    runtime: tokio::runtime::Handle,
    /// In an order: what is done for all of them is done in the same order in every run.
    requests: BTreeMap<RequestKey, Request>,
    choices: BTreeMap<SequenceId, Choice>,
    sessions: HashMap<SessionId, (SequenceId, usize)>,
    next_request: u64,
    next_sequence: u64,
    next_session: u64,
    /// When streams of workers that are going away were looked at.
    left_at: Option<Instant>,
    /// What each token of this turn took, without its way out.
    emitted: Vec<Duration>,
    drain: DrainRate,
    line: Line,
    retry_after: RetryAfter,
    metrics: BaseMetrics,
    meter: StepMeter,
}

// === impl Engine ===

impl Engine {
    pub(crate) fn new(
        settings: SharedSettings,
        executor: Executor,
        (links, pacing, hedge_after): (Links, Pacing, Option<Duration>),
        runtime: tokio::runtime::Handle,
        retry_after: RetryAfter,
        (metrics, meter): (BaseMetrics, StepMeter),
    ) -> Self {
        Self {
            settings,
            executor,
            choosers: HashMap::new(),
            links,
            pacing,
            alignment: Alignment::default(),
            hedge_after,
            runtime,
            requests: BTreeMap::new(),
            choices: BTreeMap::new(),
            sessions: HashMap::new(),
            next_request: 0,
            next_sequence: 0,
            next_session: 0,
            left_at: None,
            emitted: Vec::new(),
            drain: DrainRate::default(),
            line: Line::default(),
            retry_after,
            metrics,
            meter,
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Start(accepted) => self.start(*accepted),
            Command::Replies { link, batch } => {
                self.links.heard(link, Instant::now());
                if let Some(load) = &batch.load {
                    self.pacing.on_load(link, load, Instant::now());
                    self.links.set_leaving(link, load.draining);
                }
                for (session, generation, reply) in batch.replies {
                    self.on_reply(link, (session, generation), reply);
                }
            }
            Command::LinkUp { link, epoch } => self.links.came_up(link, epoch),
            Command::LinkDown { link } => self.on_link_down(link),
            Command::HandOver => self.hand_over(),
            Command::Stop => {}
        }
    }

    /// Ends what its client or its deadline has ended.
    fn look_after_requests(&mut self) {
        let now = Instant::now();
        self.meter.turn(self.executor.time_of(now.into_std()));
        let mut ended = Vec::new();
        for (key, request) in &mut self.requests {
            request.outlet.flush();
            if request.outlet.is_closed() {
                ended.push((*key, Refusal::cancelled("the client hung up")));
            } else if request.deadline.is_some_and(|deadline| deadline <= now) {
                ended.push((*key, Refusal::deadline("the deadline passed before the last token")));
            }
        }
        for (key, refusal) in ended {
            self.end_request(key, Err(refusal));
        }
        self.leave_leaving_links(now);
        self.hedge(now);
    }

    fn decide_all(&mut self) {
        let held = self.held_links();
        let free = |choice: &&Choice| choice.lock_step_link().is_none_or(|link| !held.contains(&link));
        let sequences: Vec<SequenceId> =
            self.choices.values().filter(free).map(|choice| choice.sequence).collect();
        for sequence in sequences {
            self.decide(sequence);
        }
    }

    /// Streams whose sequences wait for each other.
    fn held_links(&mut self) -> Vec<LinkId> {
        let mut groups: BTreeMap<LinkId, Group> = BTreeMap::new();
        for choice in self.choices.values() {
            if let Some(link) = choice.lock_step_link() {
                let group = groups.entry(link).or_default();
                match choice.has_reward_rows() {
                    true => group.ready += 1,
                    false => group.waiting += 1,
                }
            }
        }
        let now = self.executor.now();
        let Self { alignment, pacing, .. } = self;
        let holds = |(link, group): (LinkId, Group)| {
            alignment.holds(link, group, now, pacing.patience(link)).then_some(link)
        };
        groups.into_iter().filter_map(holds).collect()
    }

    /// Walks along the answer's drafts, as far as rows are here and drafts are right.
    fn decide(&mut self, sequence: SequenceId) {
        while let Some(choice) = self.choices.get_mut(&sequence) {
            let request =
                self.requests.get_mut(&choice.request).expect("an answer belongs to a running request");
            if request.outlet.is_parked() {
                choice.paced_at = None; // the client's time says nothing of a pace
                return;
            }
            let asked = &request.placed.request;
            let rules = Rules {
                sampling: &request.sampling,
                base_strength: asked.base_strength,
                on_loss: asked.on_reward_loss,
                logprobs: asked.sampling.logprobs,
                tokenizer: &self.settings.tokenizer,
                vocabulary: self.executor.vocabulary(),
            };
            match choice.decide(&rules, &mut self.choosers, &mut self.links, &self.metrics) {
                Decision::Chosen(chosen) => self.take(sequence, chosen),
                Decision::Waits => return,
                Decision::NeedsRow { number, index } => match self.executor.listed_row(number) {
                    Ok(Some((row, gathered))) => {
                        self.metrics.logits.on_fetched(gathered);
                        choice.on_whole_row(row);
                    }
                    // What has failed fails again in the next step, which says so.
                    Ok(None) | Err(_) => {
                        self.metrics.logits.on_repeated();
                        choice.want_row();
                        return self.executor.repeat(sequence, index);
                    }
                },
            }
        }
    }

    /// Tokens go to their clients, once the reward workers have theirs.
    fn deliver(&mut self) {
        let began = Instant::now();
        self.requests.values_mut().for_each(|request| request.outlet.flush());
        let way_out = began.elapsed() / self.emitted.len().max(1) as u32;
        for emitted in self.emitted.drain(..) {
            self.metrics.emit.observe((emitted + way_out).as_secs_f64());
        }
    }

    /// Hands on what the decisions have made known: verdicts and drafts to the reward workers, tokens to the base model.
    fn feed_all(&mut self) {
        let Self { choices, requests, executor, links, settings, .. } = self;
        for choice in choices.values_mut() {
            let asked = &requests[&choice.request].placed.request.sampling;
            let room = choice.room(executor.context_tokens()).min(asked.max_tokens as usize);
            choice.share_drafts(room, links);
            choice.give_verdicts(links);
            let tokens = choice.feed(room, |token| ends(&settings.tokenizer, asked, token));
            if !tokens.is_empty() {
                let extended = executor.extend(choice.sequence, &tokens);
                extended.expect("an answer that goes on is known and has room");
            }
        }
    }

    /// A token is chosen: the answer grows, the client hears of it, and the next step is prepared or the answer ends.
    fn take(&mut self, sequence: SequenceId, chosen: Chosen) {
        let began = Instant::now();
        let choice = self.choices.get_mut(&sequence).expect("it was just decided");
        let request = self.requests.get_mut(&choice.request).expect("an answer belongs to a running request");
        request.count(&chosen, &self.metrics, choice.last_token_at);
        if let Some(mode) = chosen.mode {
            for term in choice.terms.iter().filter(|term| request.list_length(term) > 0) {
                self.pacing.on_list(&term.guide, mode > Mode::Certified);
            }
        }

        let token = chosen.token;
        let position = choice.answer.len();
        let asked = &request.placed.request.sampling;
        let tokenizer = &self.settings.tokenizer;
        let said = choice.say(token, asked, tokenizer, self.executor.context_tokens());
        if said.reason.is_some() {
            choice.accept_last(token, &mut self.links);
        } else {
            let settled = choice.accept(token, &mut self.links);
            if let Some(keep) = settled.keep {
                self.executor.truncate(sequence, keep);
            }
            if let Some(draft) = settled.draft {
                let right = draft.token == token;
                request.speculation.drafted += 1;
                request.speculation.accepted += u32::from(right);
                self.metrics.drafts.of(right).inc();
                let drafter = choice.drafter.expect("a draft has a drafter");
                self.pacing.on_verdict(&choice.terms[drafter].guide, draft.mode, right);
            }
        }
        request.outlet.push(Ok(Event::Tokens(pb::Tokens {
            choice: choice.number,
            position: position as u32,
            ids: vec![token],
            text: said.text,
            details: chosen.detail.into_iter().collect(),
            unguided: if chosen.unguided { vec![0] } else { Vec::new() },
            served: chosen.scorers.map(|rewards| self.settings.served(rewards)),
        })));
        if let Some(reason) = said.reason {
            request.outlet.push(Ok(Event::Finished(choice.finished(reason, said.stop))));
            self.end_choice(sequence);
        }
        self.emitted.push(began.elapsed());
        if position % PACE_TOKENS == PACE_TOKENS - 1 {
            self.review_pace(sequence);
        }
    }

    /// Forgets an answer; with the last one its request ends.
    fn end_choice(&mut self, sequence: SequenceId) {
        let Some(key) = self.forget_choice(sequence) else { return };
        let request = self.requests.get_mut(&key).expect("an answer belongs to a running request");
        request.running.retain(|running| *running != sequence);
        if request.running.is_empty() {
            self.end_request(key, Ok(()));
        }
    }

    fn forget_choice(&mut self, sequence: SequenceId) -> Option<RequestKey> {
        let mut choice = self.choices.remove(&sequence)?;
        choice.close(&mut self.links);
        for term in &choice.terms {
            self.sessions.remove(&term.session);
        }
        if let Some(request) = self.requests.get_mut(&choice.request) {
            // The prompt counts once, and the other answers find what the first one has computed.
            if choice.number == 0 {
                let cached = self.executor.cached_tokens(sequence).min(choice.prompt_tokens);
                request.usage.cached_prompt_tokens = cached as u32;
            }
        }
        self.executor.remove(sequence);
        Some(choice.request)
    }

    fn end_request(&mut self, key: RequestKey, result: Result<(), Refusal>) {
        let Some(running) = self.requests.get_mut(&key).map(|request| std::mem::take(&mut request.running))
        else {
            return;
        };
        for sequence in running {
            self.forget_choice(sequence);
        }
        let mut request = self.requests.remove(&key).expect("it was just there");
        let outcome = match &result {
            Ok(()) => "ok",
            Err(refusal) => refusal.code.name(),
        };
        // Who never had a place gives none back.
        let done = u64::from(request.planned_at.is_some());
        self.drain.observe(self.executor.now(), done, !self.requests.is_empty());
        self.retry_after.set(self.drain.retry_after());
        self.metrics.requests.get_or_create(&OutcomeLabel { outcome }).inc();
        request.log(outcome);
        match result {
            Ok(()) => request.outlet.push(Ok(Event::Summary(request.summary()))),
            Err(refusal) => request.outlet.push(Err(refusal)),
        }
        request.outlet.finish(&self.runtime);
    }

    /// Ends all requests in a way that makes their routers place them elsewhere, with their tokens so far.
    fn hand_over(&mut self) {
        let keys: Vec<_> = self.requests.keys().copied().collect();
        for key in keys {
            self.end_request(key, Err(Refusal::draining()));
        }
    }

    /// One forward; false: there was nothing to do.
    fn step(&mut self) -> bool {
        let mut planned = self.executor.plan();
        self.open_sessions(Instant::now());
        let Self { executor, choices, requests, .. } = self;
        planned.take_lists(|sequence, index| {
            let choice = &choices[&sequence];
            choice.base_list(index, requests[&choice.request].base_ranking()?)
        });
        if !planned.is_empty() {
            choices.values_mut().for_each(Choice::keep_rows);
        }
        let mut passes = HashSet::new();
        let result = executor.compute(planned, |sequence, index, logits| {
            let choice = choices.get_mut(&sequence).expect("a planned sequence has its answer");
            choice.on_base_row(index, logits);
            passes.insert(sequence);
        });
        let report = match result {
            Ok(report) => report,
            Err(error @ ModelError::Group(_)) => {
                tracing::error!(%error, "all requests go on elsewhere");
                self.hand_over();
                return false;
            }
            Err(error) => {
                tracing::error!(%error, "the forward failed; all requests end");
                let keys: Vec<_> = self.requests.keys().copied().collect();
                for key in keys {
                    self.end_request(key, Err(Refusal::internal(error.to_string())));
                }
                return false;
            }
        };
        self.meter.planned(&report);
        if report.sequences.is_empty() {
            return false;
        }
        self.alignment.stepped();
        let now = Instant::now();
        for sequence in &report.sequences {
            if let Some(choice) = self.choices.get(sequence)
                && let Some(request) = self.requests.get_mut(&choice.request)
            {
                request.planned_at.get_or_insert(now - report.forward);
                request.speculation.base_passes += u32::from(passes.contains(sequence));
            }
        }
        self.metrics.steps.inc();
        self.metrics.computed.inc_by(report.tokens as u64);
        self.metrics.logits.on_step(report.rows, report.lists, report.gathered_bytes);
        self.metrics.preemptions.inc_by(report.preempted as u64);
        self.metrics.schedule.observe(report.schedule.as_secs_f64());
        self.metrics.forward.observe(report.forward.as_secs_f64());
        let ended = (now.into_std(), self.executor.time_of(now.into_std()));
        self.meter.publish((&report, passes.len()), ended, self.executor.stats(), &self.metrics);
        true
    }

    fn report(&mut self) {
        let stats = self.executor.stats();
        self.line.observe(self.executor.now(), stats.admitted, stats.is_full);
        self.metrics.held.set(self.requests.len() as i64);
        if self.requests.is_empty() {
            self.meter.rest();
        }
        self.metrics.running.set(stats.running as i64);
        self.metrics.waiting.set(stats.waiting as i64);
        self.metrics.places.set(stats.running_max as i64);
        self.metrics.free_blocks.set(stats.free_blocks as i64);
        self.metrics.blocks.set(stats.total_blocks as i64);
    }
}

impl Turn for Engine {
    type Command = Command;

    fn turn(&mut self, commands: &mut Commands<Command>) -> Turned {
        while let Some(command) = commands.take() {
            if matches!(command, Command::Stop) {
                return Turned::Ended;
            }
            self.apply(command);
        }
        if commands.is_closed() {
            return Turned::Ended;
        }
        self.look_after_requests();
        self.decide_all();
        self.feed_all();
        self.links.flush();
        self.deliver();
        let busy = self.step();
        self.report();
        if busy { Turned::Busy } else { Turned::Idle }
    }

    fn patience(&self) -> Duration {
        if self.requests.is_empty() { IDLE_WAIT } else { STALLED_WAIT }
    }

    fn now(&self) -> time::Instant {
        self.executor.instant()
    }
}
