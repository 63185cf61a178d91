//! The engine: one OS thread owns the model, the sequences and the guide, and is fed through an inbox.
//!
//! A turn: read the inbox → decide every answer whose rows are here → tell the reward workers → one forward → decide
//! again. While the forward runs, the reward workers compute the same positions, so a step costs the longer of
//! the two and not their sum.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as async_mpsc};
use uniarm_decode::{
    Chooser, Sampling,
    blocks::CacheRoot,
    scheduler::{AddError, NewSequence, Priority as Rank, SequenceId},
};
use uniarm_engine::{Executor, ExecutorOptions};
use uniarm_model::Forward;
use uniarm_proto::{
    Event, Failure, FailureCode, OnRewardLoss, Open, Placed, Priority, Refusal, ReplyBatch,
    SessionGeneration, SessionId, SessionReply, pb,
};
use uniarm_runtime::Metrics;

use crate::{
    accept::{Accepted, SharedSettings, decode_sampling},
    choice::{Choice, Chosen, Mode, RequestKey, Rules},
    guide::{Epoch, LinkId, Links, Scorer},
    metrics::{BaseMetrics, ModeLabel, OutcomeLabel},
    outlet::{OUTLET_EVENTS_MAX, Outlet},
    term::Term,
};

/// How long an idle engine sleeps between looks at its clients; a message wakes it at once.
const IDLE_WAIT: Duration = Duration::from_millis(500);

/// The same while requests wait for something outside: a client that hung up frees its blocks within this.
const STALLED_WAIT: Duration = Duration::from_millis(5);

/// What a refused client is told to wait: about the time in which a busy worker finishes a request.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Limits of a base worker.
#[derive(Debug, Clone)]
pub struct BaseOptions {
    pub executor: ExecutorOptions,
    /// Requests that it holds at once, running or waiting.
    pub requests_max: usize,
}

/// Starts engines.
pub struct BaseEngine;

/// What the rest of the process holds of an engine.
#[derive(Clone)]
pub struct BaseHandle {
    settings: SharedSettings,
    inbox: mpsc::Sender<Command>,
    permits: Arc<Semaphore>,
    _stop: Arc<StopOnDrop>,
}

/// The inbox has no bound of its own: requests are bounded by their permits, and a session has at most two replies
/// outstanding.
pub(crate) enum Command {
    Start(Box<Accepted>),
    Replies {
        batch: ReplyBatch,
    },
    LinkUp {
        link: LinkId,
        epoch: Epoch,
    },
    LinkDown {
        link: LinkId,
    },
    /// The last handle is gone.
    Stop,
}

/// Stops the engine with the last handle: the inbox alone cannot tell, because the streams hold it too.
struct StopOnDrop(mpsc::Sender<Command>);

/// A request that runs.
struct Request {
    placed: Placed,
    sampling: Sampling,
    seed: u64,
    list_length: u32,
    outlet: Outlet,
    /// Answers that are not finished.
    running: Vec<SequenceId>,
    accepted_at: Instant,
    deadline: Option<Instant>,
    planned_at: Option<Instant>,
    first_token_at: Option<Instant>,
    last_token_at: Option<Instant>,
    stalled: Duration,
    usage: pb::Usage,
    exchange: pb::ExchangeUse,
    _permit: OwnedSemaphorePermit,
    span: tracing::Span,
}

struct Engine {
    settings: SharedSettings,
    executor: Executor,
    /// One for each length of a row: a reward model may have the shorter vocabulary.
    choosers: HashMap<usize, Chooser>,
    links: Links,
    runtime: tokio::runtime::Handle,
    requests: HashMap<RequestKey, Request>,
    choices: HashMap<SequenceId, Choice>,
    sessions: HashMap<SessionId, (SequenceId, usize)>,
    next_request: u64,
    next_sequence: u64,
    next_session: u64,
    metrics: BaseMetrics,
}

// === impl BaseOptions ===

impl Default for BaseOptions {
    fn default() -> Self {
        Self { executor: ExecutorOptions::default(), requests_max: 1024 }
    }
}

// === impl BaseEngine ===

impl BaseEngine {
    /// Starts the engine's thread; the streams to reward workers live on the current tokio runtime. It ends when the
    /// last handle is gone.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(
        forward: Box<dyn Forward>,
        settings: crate::BaseSettings,
        scorer: Arc<dyn Scorer>,
        options: &BaseOptions,
        metrics: &Metrics,
    ) -> std::io::Result<BaseHandle> {
        let (inbox, commands) = mpsc::channel();
        let settings = Arc::new(settings);
        let runtime = tokio::runtime::Handle::current();
        let engine = Engine {
            settings: Arc::clone(&settings),
            choosers: HashMap::new(),
            executor: Executor::new(forward, &options.executor),
            links: Links::new(scorer, runtime.clone(), inbox.clone()),
            runtime,
            requests: HashMap::new(),
            choices: HashMap::new(),
            sessions: HashMap::new(),
            next_request: 0,
            next_sequence: 0,
            next_session: 0,
            metrics: BaseMetrics::new(metrics),
        };
        thread::Builder::new().name("base-engine".into()).spawn(move || engine.run(&commands))?;
        let _stop = Arc::new(StopOnDrop(inbox.clone()));
        Ok(BaseHandle { settings, inbox, permits: Arc::new(Semaphore::new(options.requests_max)), _stop })
    }
}

// === impl BaseHandle ===

impl BaseHandle {
    /// Takes a placed request in; its events come out of the receiver, and dropping that cancels the request.
    ///
    /// # Errors
    /// When the request cannot be read by this model, or there is no room for it.
    pub async fn run(
        &self,
        placed: Placed,
        deadline: Option<Instant>,
    ) -> Result<async_mpsc::Receiver<Result<Event, Refusal>>, Refusal> {
        let accepted_at = Instant::now();
        let permit = self.admit()?;
        self.settings.check(&placed)?;
        let seed = placed.request.sampling.seed;
        let seed = seed.ok_or_else(|| Refusal::invalid("sampling.seed", "must be drawn by the router"))?;
        let input = placed.request.input.clone();
        let settings = Arc::clone(&self.settings);
        let prompt = tokio::task::spawn_blocking(move || settings.read(&input)).await;
        let prompt = prompt.map_err(|_| Refusal::internal("reading the prompt panicked"))??;
        let (events, receiver) = async_mpsc::channel(OUTLET_EVENTS_MAX);
        let accepted = Accepted {
            prompt,
            seed,
            sampling: decode_sampling(&placed.request.sampling),
            list_length: self.settings.list_length_for(&placed),
            accepted_at,
            deadline,
            events,
            permit,
            span: tracing::Span::current(),
            placed,
        };
        let sent = self.inbox.send(Command::Start(Box::new(accepted)));
        sent.map_err(|_| Refusal::unavailable("engine_stopped", "the base engine stopped"))?;
        Ok(receiver)
    }

    /// A place for a request, or the reason why there is none.
    fn admit(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        Arc::clone(&self.permits).try_acquire_owned().map_err(|_| {
            Refusal::exhausted(
                "base_queue_full",
                "this base worker holds as many requests as it may",
                RETRY_AFTER,
            )
        })
    }
}

// === impl StopOnDrop ===

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        let _ = self.0.send(Command::Stop);
    }
}

// === impl Engine ===

impl Engine {
    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        let mut busy = false;
        loop {
            if !busy {
                let wait = if self.requests.is_empty() { IDLE_WAIT } else { STALLED_WAIT };
                match commands.recv_timeout(wait) {
                    Ok(Command::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    Ok(command) => self.apply(command),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                }
            }
            while let Ok(command) = commands.try_recv() {
                if matches!(command, Command::Stop) {
                    return;
                }
                self.apply(command);
            }
            self.look_after_requests();
            self.decide_all();
            self.links.flush();
            busy = self.step();
            self.report();
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Start(accepted) => self.start(*accepted),
            Command::Replies { batch } => {
                for (session, generation, reply) in batch.replies {
                    self.on_reply(session, generation, reply);
                }
            }
            Command::LinkUp { link, epoch } => self.links.came_up(link, epoch),
            Command::LinkDown { link } => self.on_link_down(link),
            Command::Stop => {}
        }
    }

    fn start(&mut self, accepted: Accepted) {
        let key = RequestKey(self.next_request);
        self.next_request += 1;
        let Accepted {
            placed,
            prompt,
            seed,
            sampling,
            list_length,
            accepted_at,
            deadline,
            events,
            permit,
            span,
        } = accepted;
        let asked = &placed.request;
        let started = pb::Started {
            request_id: asked.request_id.clone(),
            model: self.settings.model.clone(),
            seed,
            prompt_tokens: prompt.len() as u32,
            guidance: asked.guidance.iter().cloned().map(Into::into).collect(),
        };
        let mut request = Request {
            sampling,
            seed,
            list_length,
            outlet: Outlet::new(events),
            running: Vec::new(),
            accepted_at,
            deadline,
            planned_at: None,
            first_token_at: None,
            last_token_at: None,
            stalled: Duration::ZERO,
            usage: pb::Usage { prompt_tokens: prompt.len() as u32, ..pb::Usage::default() },
            exchange: pb::ExchangeUse::default(),
            _permit: permit,
            span,
            placed,
        };
        request.outlet.send(Ok(Event::Started(started)));
        let mut refused = None;
        for number in 0..request.placed.request.sampling.n {
            match self.start_choice(key, &request, &prompt, number) {
                Ok(sequence) => request.running.push(sequence),
                Err(error) => {
                    refused = Some(refusal_of(&error));
                    break;
                }
            }
        }
        self.requests.insert(key, request);
        if let Some(refusal) = refused {
            self.end_request(key, Err(refusal));
        }
    }

    fn start_choice(
        &mut self,
        key: RequestKey,
        request: &Request,
        prompt: &[u32],
        number: u32,
    ) -> Result<SequenceId, AddError> {
        let asked = &request.placed.request;
        let sequence = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let tokens_max = prompt.len() + asked.sampling.max_tokens as usize;
        let new = NewSequence {
            id: sequence,
            tokens: prompt.to_vec(),
            logits_from: prompt.len() - 1,
            tokens_max: tokens_max.min(self.executor.context_tokens()),
            root: CacheRoot(0),
            priority: rank(asked.priority),
            deadline: request.deadline.map(|deadline| self.executor.time_of(deadline)),
        };
        self.executor.add(new, None)?;
        let noise = (request.seed, number);
        let mut choice = Choice::new(key, sequence, prompt, noise, asked.sampling.stop.clone());
        for (index, (term, workers)) in asked.guidance.iter().zip(&request.placed.placements).enumerate() {
            let session = SessionId(self.next_session);
            self.next_session += 1;
            self.sessions.insert(session, (sequence, index));
            choice.terms.push(Term::new(term.clone(), workers.clone(), session, &mut self.links));
        }
        self.choices.insert(sequence, choice);
        Ok(sequence)
    }

    fn on_reply(&mut self, session: SessionId, generation: SessionGeneration, reply: SessionReply) {
        let Some((sequence, index)) = self.sessions.get(&session).copied() else { return };
        let choice = self.choices.get_mut(&sequence).expect("a session belongs to a running answer");
        let position = choice.answer.len();
        let term = &mut choice.terms[index];
        if term.generation() != generation {
            return; // an answer to an earlier life of the session
        }
        let request = self.requests.get_mut(&choice.request).expect("an answer belongs to a running request");
        let bytes = reply.payload_bytes() as u64;
        request.exchange.bytes += bytes;
        let received = match reply {
            SessionReply::Opened { vocabulary, answer_tokens_max, .. } => {
                term.opened(vocabulary as usize, answer_tokens_max as usize);
                Ok(())
            }
            SessionReply::Row(row) => {
                let mode = if row.ids.is_empty() { Mode::Dense } else { Mode::Certified };
                self.metrics.exchange_bytes.get_or_create(&ModeLabel { mode: mode.name() }).inc_by(bytes);
                term.on_row(position, row)
            }
            SessionReply::Answer(answer) => {
                let mode = if answer.ids.is_empty() { Mode::Dense } else { Mode::Queried };
                self.metrics.exchange_bytes.get_or_create(&ModeLabel { mode: mode.name() }).inc_by(bytes);
                term.on_answer(position, answer)
            }
            SessionReply::Failure(failure) => {
                let key = choice.request;
                self.on_failure(key, sequence, index, failure);
                return;
            }
        };
        if let Err(error) = received {
            tracing::error!(%error, "a reward worker broke the contract");
            self.lose_term(sequence, index, &error.to_string());
        }
    }

    fn on_failure(&mut self, key: RequestKey, sequence: SequenceId, index: usize, failure: Failure) {
        match failure.code {
            FailureCode::InvalidArgument => {
                let field = failure.field.replacen("guidance.", &format!("guidance[{index}]."), 1);
                self.end_request(key, Err(Refusal::invalid(field, failure.message)));
            }
            FailureCode::ResourceExhausted | FailureCode::Internal => {
                self.lose_term(sequence, index, &failure.message);
            }
        }
    }

    fn on_link_down(&mut self, link: LinkId) {
        self.links.went_down(link);
        let mut lost = Vec::new();
        for choice in self.choices.values() {
            for (index, term) in choice.terms.iter().enumerate() {
                if term.link == link {
                    lost.push((choice.sequence, index));
                }
            }
        }
        if lost.is_empty() {
            self.links.forget(link);
        }
        for (sequence, index) in lost {
            self.lose_term(sequence, index, "its reward worker cannot be reached");
        }
    }

    /// The term goes to the next worker in line; where there is none, the request's policy decides.
    fn lose_term(&mut self, sequence: SequenceId, index: usize, why: &str) {
        let Some(choice) = self.choices.get_mut(&sequence) else { return };
        let term = &mut choice.terms[index];
        term.lose(&mut self.links);
        self.metrics.reward_losses.inc();
        let key = choice.request;
        if term.is_lost() && self.requests[&key].placed.request.on_reward_loss == OnRewardLoss::Fail {
            let message = format!("guidance[{index}] ({}) lost its reward: {why}", term.asked.reward);
            self.end_request(key, Err(Refusal::unavailable("reward_lost", message)));
        }
    }

    /// Ends what its client or its deadline has ended, and opens the sessions that can be.
    fn look_after_requests(&mut self) {
        let now = Instant::now();
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
        for choice in self.choices.values_mut() {
            let request = &self.requests[&choice.request];
            for term in &mut choice.terms {
                if term.can_open(now, &self.links) {
                    let open = open_message(&self.settings, request, choice.number, &choice.answer, term);
                    term.open(open, &mut self.links);
                }
            }
        }
    }

    fn decide_all(&mut self) {
        let sequences: Vec<SequenceId> = self.choices.keys().copied().collect();
        for sequence in sequences {
            self.decide(sequence);
        }
    }

    fn decide(&mut self, sequence: SequenceId) {
        let Some(choice) = self.choices.get_mut(&sequence) else { return };
        let request = self.requests.get_mut(&choice.request).expect("an answer belongs to a running request");
        if request.outlet.is_parked() {
            return;
        }
        let asked = &request.placed.request;
        let rules = Rules {
            sampling: &request.sampling,
            on_loss: asked.on_reward_loss,
            logprobs: asked.sampling.logprobs,
            tokenizer: &self.settings.tokenizer,
        };
        if let Some(chosen) = choice.decide(&rules, &mut self.choosers, &mut self.links, &self.metrics) {
            self.take(sequence, chosen);
        }
    }

    /// A token is chosen: the answer grows, the client hears of it, and the next step is prepared or the answer ends.
    fn take(&mut self, sequence: SequenceId, chosen: Chosen) {
        let began = Instant::now();
        let choice = self.choices.get_mut(&sequence).expect("it was just decided");
        let request = self.requests.get_mut(&choice.request).expect("an answer belongs to a running request");
        request.count(&chosen, &self.metrics, choice.last_token_at);

        let token = chosen.token;
        let position = choice.answer.len();
        let asked = &request.placed.request.sampling;
        let tokenizer = &self.settings.tokenizer;
        let ends =
            (tokenizer.eos().contains(&token) && !asked.ignore_eos) || asked.stop_token_ids.contains(&token);
        let mut text = String::new();
        let mut stop = String::new();
        let mut reason = None;
        if ends {
            reason = Some(pb::FinishReason::Stop);
        } else {
            let delta = choice.text.push(tokenizer.token_bytes(token));
            text = delta.text;
            if let Some(index) = delta.stop {
                reason = Some(pb::FinishReason::Stop);
                stop.clone_from(&asked.stop[index]);
            } else if position + 1 >= asked.max_tokens as usize {
                reason = Some(pb::FinishReason::Length);
            } else if position + 1 >= choice.room(self.executor.context_tokens()) {
                reason = Some(pb::FinishReason::Context);
            }
        }
        if reason.is_some() {
            choice.accept_last(token, &mut self.links);
            if stop.is_empty() {
                text.push_str(&choice.text.finish());
            }
        } else {
            choice.accept(token, &mut self.links);
            let extended = self.executor.extend(sequence, &[token]);
            extended.expect("an answer that goes on is known and has room");
        }
        if position >= request.placed.request.skip as usize {
            request.outlet.send(Ok(Event::Tokens(pb::Tokens {
                choice: choice.number,
                position: position as u32,
                ids: vec![token],
                text,
                details: chosen.detail.into_iter().collect(),
                unguided: if chosen.unguided { vec![0] } else { Vec::new() },
            })));
        }
        if let Some(reason) = reason {
            request.outlet.send(Ok(Event::Finished(pb::Finished {
                choice: choice.number,
                reason: reason as i32,
                completion_tokens: choice.answer.len() as u32,
                stop,
            })));
            self.end_choice(sequence);
        }
        self.metrics.emit.observe(began.elapsed().as_secs_f64());
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
            request.usage.cached_prompt_tokens += self.executor.cached_tokens(sequence) as u32;
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
        self.metrics.requests.get_or_create(&OutcomeLabel { outcome }).inc();
        request.log(outcome);
        match result {
            Ok(()) => request.outlet.send(Ok(Event::Summary(request.summary()))),
            Err(refusal) => request.outlet.send(Err(refusal)),
        }
        request.outlet.finish(&self.runtime);
    }

    /// One forward; false: there was nothing to do.
    fn step(&mut self) -> bool {
        let Self { executor, choices, .. } = self;
        let result = executor.step(|sequence, index, logits| {
            let choice = choices.get_mut(&sequence).expect("a planned sequence has its answer");
            choice.on_base_row(index, logits);
        });
        let report = match result {
            Ok(report) => report,
            Err(error) => {
                tracing::error!(%error, "the forward failed; all requests end");
                let keys: Vec<_> = self.requests.keys().copied().collect();
                for key in keys {
                    self.end_request(key, Err(Refusal::internal(error.to_string())));
                }
                return false;
            }
        };
        if report.sequences.is_empty() {
            return false;
        }
        let now = Instant::now();
        for sequence in &report.sequences {
            if let Some(choice) = self.choices.get(sequence)
                && let Some(request) = self.requests.get_mut(&choice.request)
            {
                request.planned_at.get_or_insert(now - report.forward);
            }
        }
        self.metrics.steps.inc();
        self.metrics.computed.inc_by(report.tokens as u64);
        self.metrics.preemptions.inc_by(report.preempted as u64);
        self.metrics.schedule.observe(report.schedule.as_secs_f64());
        self.metrics.forward.observe(report.forward.as_secs_f64());
        true
    }

    fn report(&self) {
        let stats = self.executor.stats();
        self.metrics.running.set(stats.running as i64);
        self.metrics.waiting.set(stats.waiting as i64);
        self.metrics.free_blocks.set(stats.free_blocks as i64);
    }
}

// === impl Request ===

impl Request {
    /// Books one token.
    fn count(&mut self, chosen: &Chosen, metrics: &BaseMetrics, previous: Option<Instant>) {
        let now = Instant::now();
        if self.first_token_at.is_none() {
            self.first_token_at = Some(now);
            metrics.first_token.observe((now - self.accepted_at).as_secs_f64());
        }
        if let Some(previous) = previous {
            metrics.inter_token.observe((now - previous).as_secs_f64());
        }
        self.last_token_at = Some(now);
        self.usage.completion_tokens += 1;
        metrics.tokens.inc();
        if chosen.unguided {
            self.usage.unguided_tokens += 1;
            metrics.unguided.inc();
        }
        if let Some(mode) = chosen.mode {
            self.stalled += chosen.stalled;
            metrics.reward_wait.observe(chosen.stalled.as_secs_f64());
            metrics.decided.get_or_create(&ModeLabel { mode: mode.name() }).inc();
            match mode {
                Mode::Certified => self.exchange.certified += 1,
                Mode::Queried => self.exchange.queried += 1,
                Mode::Dense => self.exchange.dense += 1,
            }
        }
    }

    fn summary(&self) -> pb::Summary {
        let milliseconds = |until: Option<Instant>| {
            until.map_or(0.0, |until| (until - self.accepted_at).as_secs_f64() * 1e3)
        };
        pb::Summary {
            usage: Some(self.usage),
            timing: Some(pb::Timing {
                queue_ms: milliseconds(self.planned_at),
                first_token_ms: milliseconds(self.first_token_at),
                total_ms: milliseconds(self.last_token_at),
                reward_stall_ms: self.stalled.as_secs_f64() * 1e3,
            }),
            exchange: Some(self.exchange),
        }
    }

    fn log(&self, outcome: &'static str) {
        let _entered = self.span.enter();
        tracing::info!(
            request = self.placed.request.request_id,
            outcome,
            prompt_tokens = self.usage.prompt_tokens,
            completion_tokens = self.usage.completion_tokens,
            certified = self.exchange.certified,
            queried = self.exchange.queried,
            dense = self.exchange.dense,
            milliseconds = self.accepted_at.elapsed().as_millis() as u64,
            "request ended"
        );
    }
}

fn open_message(
    settings: &SharedSettings,
    request: &Request,
    number: u32,
    answer: &[u32],
    term: &Term,
) -> Open {
    // The lower tail certifies nothing: with a negative strength only whole rows decide.
    let list_length = if term.asked.strength < 0.0 { 0 } else { request.list_length };
    Open {
        reward: term.asked.reward.clone(),
        preference: term.asked.preference.clone(),
        input: request.placed.request.input.clone(),
        answer: answer.to_vec(),
        list_length,
        priority: request.placed.request.priority,
        tokenizer: Some(settings.tokenizer_fingerprint()),
        vocabulary: settings.vocabulary as u32,
        seed: request.seed,
        choice: number,
        temperature: request.sampling.temperature,
        answer_tokens_max: request.placed.request.sampling.max_tokens,
    }
}

fn rank(priority: Priority) -> Rank {
    match priority {
        Priority::Low => Rank::Low,
        Priority::Normal => Rank::Normal,
        Priority::High => Rank::High,
    }
}

fn refusal_of(error: &AddError) -> Refusal {
    match error {
        AddError::QueueFull { .. } => Refusal::exhausted("base_queue_full", error.to_string(), RETRY_AFTER),
        _ => Refusal::invalid("input", error),
    }
}
