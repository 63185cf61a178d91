//! The engine: one OS thread owns the model and all sessions, and is fed through an inbox that never blocks it.

mod rows;

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::mpsc as async_mpsc;
use uniarm_decode::{
    Chooser,
    blocks::CacheRoot,
    scheduler::{AddError, ExtendError, NewSequence, Priority as Rank, SequenceId, Tenant},
};
use uniarm_engine::{Executor, Logits};
use uniarm_model::{Conditioned, ModelError};
use uniarm_proto::{
    Advance, DraftMode, Failure, FailureCode, LaneState, Load, Priority, ReplyBatch, SessionGeneration,
    SessionId, SessionPace, SessionReply,
};
use uniarm_runtime::{
    drain::Line,
    drive::{Commands, Turn, Turned},
};

use crate::{
    handle::{Command, ConnectionId, ReadyKind, ReadyOp},
    lane::Lane,
    metrics::RewardMetrics,
    prepare::Prepared,
    session::{Session, Step},
    steps::StepMeter,
};

/// How long an idle engine sleeps between looks at its inbox; a message wakes it at once.
const IDLE_WAIT: Duration = Duration::from_millis(500);

/// Drafts of two rows take twice the cache: they start only while one block in so many is free.
const PLAIN_FREE_SHARE: usize = 3;

type SessionKey = (ConnectionId, SessionId);

pub(crate) struct Engine {
    executor: Executor,
    /// In an order: what is done for all of them is done in the same order in every run.
    sessions: BTreeMap<SessionKey, Session>,
    by_sequence: HashMap<SequenceId, (SessionKey, RowKind)>,
    /// One for each length of a row: a base model may have the shorter vocabulary.
    choosers: HashMap<usize, Chooser>,
    connections: BTreeMap<ConnectionId, Peer>,
    backbone: Bytes,
    next_sequence: u64,
    draining: bool,
    line: Line,
    /// Since when it has had nothing to do.
    idle_since: Option<Instant>,
    metrics: RewardMetrics,
    meter: StepMeter,
}

/// What a sequence computes for its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RowKind {
    Reward,
    /// The backbone alone, for drafts.
    Plain,
}

struct Peer {
    replies: async_mpsc::UnboundedSender<ReplyBatch>,
    batch: ReplyBatch,
    lane: Option<Lane>,
}

// === impl Engine ===

impl Engine {
    /// `backbone`: SHA-256 of the model's weights.
    pub(crate) fn new(
        executor: Executor,
        backbone: [u8; 32],
        (metrics, meter): (RewardMetrics, StepMeter),
    ) -> Self {
        Self {
            executor,
            sessions: BTreeMap::new(),
            by_sequence: HashMap::new(),
            choosers: HashMap::new(),
            connections: BTreeMap::new(),
            backbone: Bytes::copy_from_slice(&backbone),
            next_sequence: 0,
            draining: false,
            line: Line::default(),
            idle_since: None,
            metrics,
            meter,
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Connect { connection, replies } => {
                let batch = ReplyBatch { load: Some(self.load()), ..ReplyBatch::default() };
                self.connections.insert(connection, Peer { replies, batch, lane: None });
            }
            Command::Ops { connection, ops, .. } => {
                for op in ops {
                    self.apply_op(connection, op);
                }
            }
            Command::Lane { connection, lane } => {
                if let Some(peer) = self.connections.get_mut(&connection) {
                    let (lane, state) = match lane {
                        Ok(lane) => (Some(lane), LaneState::Joined),
                        Err(reason) => (None, LaneState::Closed(reason)),
                    };
                    (peer.lane, peer.batch.lane) = (lane, Some(state));
                }
            }
            Command::Drain => {
                self.draining = true;
                let load = self.load();
                self.connections.values_mut().for_each(|peer| peer.batch.load = Some(load.clone()));
            }
            Command::Disconnect { connection } => {
                self.connections.remove(&connection);
                let gone: Vec<_> = self.sessions.keys().filter(|key| key.0 == connection).copied().collect();
                for key in gone {
                    self.close(key);
                }
            }
        }
    }

    fn apply_op(&mut self, connection: ConnectionId, op: ReadyOp) {
        let ReadyOp { session, generation, kind } = op;
        let key = (connection, session);
        match kind {
            ReadyKind::Open(prepared) => self.open(key, generation, *prepared),
            ReadyKind::Refuse(failure) => {
                if self.is_current(key, generation) {
                    self.close(key);
                }
                self.reply(key, generation, SessionReply::Failure(failure));
            }
            // Everything else is about a session that must be there in this generation: if not, it is late.
            _ if !self.is_current(key, generation) => {}
            ReadyKind::Advance(advance) => self.advance(key, advance),
            ReadyKind::Query { position, ids } => self.query(key, position, ids),
            ReadyKind::Pace(pace) => self.set_pace(key, pace),
            ReadyKind::Close => self.close(key),
        }
    }

    fn open(&mut self, key: SessionKey, generation: SessionGeneration, prepared: Prepared) {
        match self.sessions.get(&key) {
            Some(session) if session.generation >= generation => return, // repeated
            Some(_) => self.close(key),
            None => {}
        }
        let sequence = self.next_sequence();
        let new = NewSequence {
            id: sequence,
            logits_from: prepared.tokens.len() - 1,
            tokens_max: prepared.tokens_max,
            tokens: prepared.tokens.clone(),
            root: prepared.root,
            priority: rank(prepared.priority),
            tenant: Tenant(prepared.tenant),
            deadline: None,
        };
        if let Err(error) = self.executor.add(new, prepared.adapter.clone()) {
            self.reply(key, generation, SessionReply::Failure(refused(&error)));
            return;
        }
        let session = Session::new(generation, sequence, prepared);
        let opened = SessionReply::Opened {
            prompt_tokens: session.prompt_tokens as u32,
            vocabulary: session.vocabulary as u32,
            answer_tokens_max: session.room,
            backbone: self.backbone.clone(),
            // Its server knows the name that it goes by.
            worker: None,
        };
        self.sessions.insert(key, session);
        self.by_sequence.insert(sequence, (key, RowKind::Reward));
        self.reply(key, generation, opened);
        self.pair(key);
    }

    fn advance(&mut self, key: SessionKey, advance: Advance) {
        let session = self.sessions.get_mut(&key).expect("it is current");
        let (generation, vocabulary) = (session.generation, session.vocabulary);
        if let Some(id) = advance.ids.iter().find(|id| **id as usize >= vocabulary) {
            let message = format!("token id {id} is outside the vocabulary of {vocabulary}");
            return self.fail(key, generation, "advance.ids", message);
        }
        if let Step::Go { keep, ids } = session.advance(advance)
            && let Err(error) = self.replace(key, keep, &ids)
        {
            return self.fail(key, generation, "advance.ids", error.to_string());
        }
        self.go_on(key);
    }

    /// Appends the session's draft, if its window has room.
    fn go_on(&mut self, key: SessionKey) {
        let session = self.sessions.get_mut(&key).expect("it is current");
        let keep = session.length();
        if let Some(token) = session.go_on() {
            self.metrics.drafts.inc();
            let extended = self.replace(key, keep, &[token]);
            extended.expect("a draft is made only where its sequence has room");
        }
    }

    /// Keeps so many tokens of the answer in the session's sequences, then appends `ids`.
    fn replace(&mut self, key: SessionKey, keep: u32, ids: &[u32]) -> Result<(), ExtendError> {
        let Self { executor, sessions, by_sequence, .. } = self;
        let session = sessions.get_mut(&key).expect("it is current");
        executor.truncate(session.sequence, session.prompt_tokens + keep as usize);
        executor.extend(session.sequence, ids)?;
        if let Some(plain) = &session.plain {
            executor.truncate(plain.sequence, plain.prompt_tokens + keep as usize);
            if executor.extend(plain.sequence, ids).is_err() {
                // Drafts get worse, nothing else.
                executor.remove(plain.sequence);
                by_sequence.remove(&plain.sequence);
                session.plain = None;
            }
        }
        Ok(())
    }

    fn set_pace(&mut self, key: SessionKey, pace: SessionPace) {
        let session = self.sessions.get_mut(&key).expect("it is current");
        session.set_pace(pace);
        self.pair(key);
        self.go_on(key);
    }

    /// Starts or stops the second sequence of a session, as its pace wants it and the cache has room for it.
    fn pair(&mut self, key: SessionKey) {
        let session = self.sessions.get_mut(&key).expect("it is current");
        let wanted = session.pace.draft == DraftMode::Dual && !session.plain_prompt.is_empty();
        match (&session.plain, wanted) {
            (Some(plain), false) => {
                self.executor.remove(plain.sequence);
                self.by_sequence.remove(&plain.sequence);
                session.plain = None;
            }
            (None, true) => self.start_plain(key),
            _ => {}
        }
    }

    fn start_plain(&mut self, key: SessionKey) {
        let stats = self.executor.stats();
        if stats.free_blocks * PLAIN_FREE_SHARE < stats.total_blocks {
            return;
        }
        let id = self.next_sequence();
        let session = self.sessions.get_mut(&key).expect("it is current");
        let own = self.executor.tokens(session.sequence).expect("a session has its sequence");
        let tokens = [&session.plain_prompt, &own[session.prompt_tokens..]].concat();
        let new = NewSequence {
            id,
            logits_from: tokens.len() - 1,
            tokens_max: (session.plain_prompt.len() + session.room as usize).max(tokens.len()),
            tokens,
            root: CacheRoot(0),
            priority: Rank::Low,
            tenant: session.tenant,
            deadline: None,
        };
        // A full queue costs only drafts.
        if self.executor.add(new, None::<Conditioned>).is_ok() {
            session.start_plain(id);
            self.by_sequence.insert(id, (key, RowKind::Plain));
        }
    }

    fn fail(&mut self, key: SessionKey, generation: SessionGeneration, field: &str, message: String) {
        self.close(key);
        let failure = Failure { code: FailureCode::InvalidArgument, field: field.to_owned(), message };
        self.reply(key, generation, SessionReply::Failure(failure));
    }

    fn close(&mut self, key: SessionKey) {
        let Some(session) = self.sessions.remove(&key) else { return };
        for sequence in
            [Some(session.sequence), session.plain.map(|plain| plain.sequence)].into_iter().flatten()
        {
            self.by_sequence.remove(&sequence);
            self.executor.remove(sequence);
        }
    }

    fn next_sequence(&mut self) -> SequenceId {
        self.next_sequence += 1;
        SequenceId(self.next_sequence)
    }

    fn is_current(&self, key: SessionKey, generation: SessionGeneration) -> bool {
        self.sessions.get(&key).is_some_and(|session| session.generation == generation)
    }

    /// One step; false: there was nothing to do.
    fn step(&mut self) -> bool {
        let Self { executor, sessions, by_sequence, connections, .. } = self;
        let mut answered: Vec<SessionKey> = Vec::new();
        let mut drafted = 0;
        let mut planned = executor.plan();
        let vocabulary = executor.vocabulary();
        planned.take_lists(|sequence, index| match by_sequence[&sequence] {
            (key, RowKind::Reward) => {
                let has_lane = connections.get(&key.0).is_some_and(|peer| peer.lane.is_some());
                sessions[&key].wanted_list(index, vocabulary, has_lane)
            }
            (_, RowKind::Plain) => None,
        });
        if !planned.is_empty() {
            sessions.values_mut().for_each(Session::keep_rows);
        }
        let result = executor.compute(planned, |sequence, index, logits| {
            let (key, kind) = by_sequence.get(&sequence).expect("a planned sequence has its session");
            let session = sessions.get_mut(key).expect("both maps change together");
            match (kind, logits) {
                (RowKind::Plain, Logits::List(..)) => unreachable!("no list was asked for"),
                (RowKind::Plain, Logits::Row(row)) => {
                    session.on_plain_row(index, row);
                    drafted += 1;
                }
                (RowKind::Reward, logits) => {
                    session.on_row(index, logits);
                    drafted += usize::from(session.is_ahead(index));
                    if answered.last() != Some(key) {
                        answered.push(*key);
                    }
                }
            }
        });
        let began = Instant::now();
        self.detach(&answered);
        answered.iter().for_each(|key| self.answer(*key));
        let metrics = &self.metrics;
        match result {
            Ok(report) if report.sequences.is_empty() => false,
            Ok(report) => {
                metrics.steps.inc();
                metrics.logits.on_step(report.rows, report.lists, report.gathered_bytes);
                metrics.tokens.inc_by(report.tokens as u64);
                metrics.preemptions.inc_by(report.preempted as u64);
                metrics.schedule.observe(report.schedule.as_secs_f64());
                metrics.forward.observe(report.forward.as_secs_f64());
                let replied = began.elapsed();
                metrics.reply.observe(replied.as_secs_f64());
                let times = (began, self.executor.time_of(began), replied);
                self.meter.publish((&report, drafted), times, self.executor.stats(), metrics);
                true
            }
            // This process ends, and with it its streams: sessions are opened elsewhere then.
            Err(ModelError::Group(_)) => false,
            Err(error) => {
                tracing::error!(%error, "the forward failed; all sessions are closed");
                let keys: Vec<_> = self.sessions.keys().copied().collect();
                for key in keys {
                    let generation = self.sessions[&key].generation;
                    self.close(key);
                    let failure = Failure {
                        code: FailureCode::Internal,
                        field: String::new(),
                        message: error.to_string(),
                    };
                    self.reply(key, generation, SessionReply::Failure(failure));
                }
                false
            }
        }
    }

    /// Sends the rows that a step has computed for a session, and goes on with its draft.
    fn answer(&mut self, key: SessionKey) {
        while let Some(position) = self.sessions[&key].empty_list() {
            if !self.fetch(key, position) {
                return;
            }
        }
        let session = self.sessions.get_mut(&key).expect("a row came for it");
        let vocabulary = session.vocabulary;
        let chooser = self.choosers.entry(vocabulary).or_insert_with(|| Chooser::new(vocabulary));
        let generation = session.generation;
        for (row, detached) in session.answer(chooser) {
            self.metrics.rows.inc();
            self.reply(key, generation, SessionReply::Row(row));
            if let Some(detached) = detached {
                self.put_on_lane(key.0, detached, vocabulary);
            }
        }
        let session = self.sessions.get_mut(&key).expect("a row came for it");
        for (position, ids) in session.asked() {
            self.query(key, position, ids);
        }
        self.go_on(key);
    }

    fn reply(&mut self, key: SessionKey, generation: SessionGeneration, reply: SessionReply) {
        if let Some(peer) = self.connections.get_mut(&key.0) {
            peer.batch.replies.push((key.1, generation, reply));
        }
    }

    /// Sends what has gathered: one message for each connection and step. Load rides along on busy steps.
    fn flush(&mut self, busy: bool) {
        let load = self.load();
        self.metrics.sessions.set(i64::from(load.sessions));
        self.metrics.waiting.set(i64::from(load.waiting));
        self.metrics.places.set(self.executor.stats().running_max as i64);
        self.metrics.free_blocks.set(i64::from(load.free_blocks));
        self.metrics.blocks.set(i64::from(load.total_blocks));
        let least = load.step_points.first().map_or(0.0, |(_, micros)| f64::from(*micros) / 1e6);
        self.metrics.least_forward.set(least);
        for peer in self.connections.values_mut() {
            let ReplyBatch { replies, load: news, lane } = &peer.batch;
            if replies.is_empty() && news.is_none() && lane.is_none() {
                continue;
            }
            let mut batch = std::mem::take(&mut peer.batch);
            if busy {
                batch.load = Some(load.clone());
            }
            // The receiver is gone just before its Disconnect arrives.
            let _ = peer.replies.send(batch);
        }
    }

    /// How long a new session of this priority would stand in line.
    fn wait_ms(&self, priority: Priority) -> u32 {
        let wait = self.line.wait(self.executor.ahead(rank(priority)));
        u32::try_from(wait.as_millis()).unwrap_or(u32::MAX)
    }

    fn load(&self) -> Load {
        let stats = self.executor.stats();
        let cost = self.executor.step_cost();
        let points = cost.points().iter().map(|(rows, seconds)| (*rows as f32, (seconds * 1e6) as f32));
        Load {
            step_points: points.collect(),
            draining: self.draining,
            wait_ms: [Priority::Low, Priority::Normal, Priority::High].map(|priority| self.wait_ms(priority)),
            sessions: self.sessions.len() as u32,
            waiting: stats.waiting as u32,
            free_blocks: stats.free_blocks as u32,
            total_blocks: stats.total_blocks as u32,
        }
    }
}

impl Turn for Engine {
    type Command = Command;

    fn turn(&mut self, commands: &mut Commands<Command>) -> Turned {
        if let Some(since) = self.idle_since.take()
            && !self.sessions.is_empty()
        {
            self.metrics.stall.observe((self.now() - since).as_secs_f64());
        }
        while let Some(command) = commands.take() {
            self.apply(command);
        }
        if commands.is_closed() {
            return Turned::Ended;
        }
        let busy = self.step();
        let stats = self.executor.stats();
        self.line.observe(self.executor.now(), stats.admitted, stats.is_full);
        self.flush(busy);
        if busy {
            return Turned::Busy;
        }
        self.idle_since = Some(self.now());
        if self.sessions.is_empty() {
            self.meter.rest();
        }
        Turned::Idle
    }

    fn patience(&self) -> Duration {
        IDLE_WAIT
    }

    fn now(&self) -> Instant {
        self.executor.instant()
    }
}

fn rank(priority: Priority) -> Rank {
    match priority {
        Priority::Low => Rank::Low,
        Priority::Normal => Rank::Normal,
        Priority::High => Rank::High,
    }
}

fn refused(error: &AddError) -> Failure {
    let code = match error {
        AddError::QueueFull { .. } => FailureCode::ResourceExhausted,
        _ => FailureCode::InvalidArgument,
    };
    Failure { code, field: "input".into(), message: error.to_string() }
}
