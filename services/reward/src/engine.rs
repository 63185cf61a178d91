//! The engine: one OS thread owns the model and all sessions, and is fed through an inbox that never blocks it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as async_mpsc};
use uniarm_decode::{
    Chooser,
    blocks::CacheRoot,
    scheduler::{AddError, ExtendError, NewSequence, Priority as Rank, SequenceId},
};
use uniarm_engine::{Executor, ExecutorOptions};
use uniarm_model::{Conditioned, Forward, ModelError};
use uniarm_proto::{
    Advance, Answer, DraftMode, Failure, FailureCode, Load, Priority, ProtocolError, ReplyBatch,
    SessionGeneration, SessionId, SessionOp, SessionPace, SessionReply,
};
use uniarm_runtime::Metrics;

use crate::{
    catalogue::RewardCatalogue,
    metrics::RewardMetrics,
    prepare::{Prepared, prepare},
    session::{Session, Step},
};

/// Batches of operations that one connection may have in the inbox: enough to keep the engine fed, few enough that a
/// flood waits in the flooder's own TCP buffers.
const CONNECTION_BATCHES_MAX: usize = 64;

/// How long an idle engine sleeps between looks at its inbox; a message wakes it at once.
const IDLE_WAIT: Duration = Duration::from_millis(500);

/// Drafts of two rows take twice the cache: they start only while one block in so many is free.
const PLAIN_FREE_SHARE: usize = 3;

/// What the number of sessions that a step answered weighs in its average.
const STEP_SESSIONS_WEIGHT: f32 = 0.1;

/// Limits of a reward worker.
#[derive(Debug, Clone, Default)]
pub struct RewardOptions {
    pub executor: ExecutorOptions,
}

/// Starts engines.
pub struct RewardEngine;

/// What the rest of the process holds of an engine.
#[derive(Clone)]
pub struct RewardHandle {
    catalogue: Arc<RewardCatalogue>,
    inbox: mpsc::Sender<Command>,
    connections: Arc<AtomicU64>,
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the model cannot compute: {0}")]
    Model(#[from] ModelError),
    #[error("the operating system gives no thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// One base worker's stream. Dropping it closes all its sessions.
pub struct Connection {
    id: ConnectionId,
    handle: RewardHandle,
    credits: Arc<Semaphore>,
}

/// An operation as it came: already decoded, or refused by the contract.
pub type IncomingOp = (SessionId, SessionGeneration, Result<SessionOp, ProtocolError>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct ConnectionId(u64);

enum Command {
    /// Replies go to `replies`. The channel has no bound of its own because the protocol bounds it: a session has at
    /// most one row and one answer outstanding.
    Connect {
        connection: ConnectionId,
        replies: async_mpsc::UnboundedSender<ReplyBatch>,
    },
    Ops {
        connection: ConnectionId,
        ops: Vec<ReadyOp>,
        _credit: OwnedSemaphorePermit,
    },
    Disconnect {
        connection: ConnectionId,
    },
}

/// An operation whose slow part is done.
struct ReadyOp {
    session: SessionId,
    generation: SessionGeneration,
    kind: ReadyKind,
}

enum ReadyKind {
    Open(Box<Prepared>),
    Advance(Advance),
    Query { position: u32, ids: Vec<u32> },
    Pace(SessionPace),
    Close,
    Refuse(Failure),
}

type SessionKey = (ConnectionId, SessionId);

struct Engine {
    executor: Executor,
    sessions: HashMap<SessionKey, Session>,
    by_sequence: HashMap<SequenceId, (SessionKey, RowKind)>,
    /// One for each length of a row: a base model may have the shorter vocabulary.
    choosers: HashMap<usize, Chooser>,
    connections: HashMap<ConnectionId, Peer>,
    backbone: Bytes,
    next_sequence: u64,
    /// Sessions that a step answers, on average.
    step_sessions: f32,
    metrics: RewardMetrics,
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
}

// === impl RewardEngine ===

impl RewardEngine {
    /// Starts the engine's thread. It ends when the last handle and connection are gone.
    ///
    /// # Errors
    /// When the model cannot compute, or the operating system gives no thread.
    pub fn start(
        forward: Box<dyn Forward>,
        catalogue: RewardCatalogue,
        options: &RewardOptions,
        metrics: &Metrics,
    ) -> Result<RewardHandle, StartError> {
        let (inbox, commands) = mpsc::channel();
        let engine = Engine {
            executor: Executor::new(forward, &options.executor)?,
            sessions: HashMap::new(),
            by_sequence: HashMap::new(),
            choosers: HashMap::new(),
            connections: HashMap::new(),
            backbone: Bytes::copy_from_slice(&catalogue.backbone.fingerprint),
            next_sequence: 0,
            step_sessions: 1.0,
            metrics: RewardMetrics::new(metrics),
        };
        thread::Builder::new().name("reward-engine".into()).spawn(move || engine.run(&commands))?;
        Ok(RewardHandle { catalogue: Arc::new(catalogue), inbox, connections: Arc::default() })
    }
}

// === impl RewardHandle ===

impl RewardHandle {
    pub fn catalogue(&self) -> &RewardCatalogue {
        &self.catalogue
    }

    /// Opens a stream: operations in, replies out. The receiver ends if the engine does.
    pub fn connect(&self) -> (Connection, async_mpsc::UnboundedReceiver<ReplyBatch>) {
        let id = ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed));
        let (replies, receiver) = async_mpsc::unbounded_channel();
        // A failed send means that the engine is gone: then the receiver says so, because `replies` went with it.
        let _ = self.inbox.send(Command::Connect { connection: id, replies });
        let credits = Arc::new(Semaphore::new(CONNECTION_BATCHES_MAX));
        (Connection { id, handle: self.clone(), credits }, receiver)
    }
}

// === impl Connection ===

impl Connection {
    /// Hands a batch to the engine, in order; waits while too many of this connection are queued.
    pub async fn submit(&self, ops: Vec<IncomingOp>) {
        let credit = Arc::clone(&self.credits).acquire_owned().await;
        let _credit = credit.expect("the semaphore is never closed");
        let ready = if ops.iter().any(|(_, _, op)| matches!(op, Ok(SessionOp::Open(_)))) {
            let catalogue = Arc::clone(&self.handle.catalogue);
            let prepared = tokio::task::spawn_blocking(move || ready_ops(&catalogue, ops)).await;
            match prepared {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "preparing sessions panicked");
                    return;
                }
            }
        } else {
            ready_ops(&self.handle.catalogue, ops)
        };
        let _ = self.handle.inbox.send(Command::Ops { connection: self.id, ops: ready, _credit });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.handle.inbox.send(Command::Disconnect { connection: self.id });
    }
}

fn ready_ops(catalogue: &RewardCatalogue, ops: Vec<IncomingOp>) -> Vec<ReadyOp> {
    let ready = |(session, generation, op): IncomingOp| {
        let kind = match op {
            Ok(SessionOp::Open(open)) => match prepare(catalogue, &open) {
                Ok(prepared) => ReadyKind::Open(Box::new(prepared)),
                Err(failure) => ReadyKind::Refuse(failure),
            },
            Ok(SessionOp::Advance(advance)) => ReadyKind::Advance(advance),
            Ok(SessionOp::Query { position, ids }) => ReadyKind::Query { position, ids },
            Ok(SessionOp::Pace(pace)) => ReadyKind::Pace(pace),
            Ok(SessionOp::Close) => ReadyKind::Close,
            Err(error) => ReadyKind::Refuse(Failure {
                code: FailureCode::InvalidArgument,
                field: error.field().to_owned(),
                message: error.to_string(),
            }),
        };
        ReadyOp { session, generation, kind }
    };
    ops.into_iter().map(ready).collect()
}

// === impl Engine ===

impl Engine {
    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        let mut busy = false;
        loop {
            if !busy {
                let began = Instant::now();
                match commands.recv_timeout(IDLE_WAIT) {
                    Ok(command) => self.apply(command),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                }
                if !self.sessions.is_empty() {
                    self.metrics.stall.observe(began.elapsed().as_secs_f64());
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.apply(command);
            }
            busy = self.step();
            self.flush(busy);
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Connect { connection, replies } => {
                let batch = ReplyBatch { load: Some(self.load()), ..ReplyBatch::default() };
                self.connections.insert(connection, Peer { replies, batch });
            }
            Command::Ops { connection, ops, .. } => {
                for op in ops {
                    self.apply_op(connection, op);
                }
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
            deadline: None,
        };
        // A full queue costs only drafts.
        if self.executor.add(new, None::<Conditioned>).is_ok() {
            session.start_plain(id);
            self.by_sequence.insert(id, (key, RowKind::Plain));
        }
    }

    fn query(&mut self, key: SessionKey, position: u32, ids: Vec<u32>) {
        let session = &self.sessions[&key];
        let Some(values) = session.query(position, &ids) else { return }; // late or repeated
        let generation = session.generation;
        self.metrics.queries.inc();
        self.reply(key, generation, SessionReply::Answer(Answer { position, ids, values }));
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
        let Self { executor, sessions, by_sequence, .. } = self;
        let mut answered: Vec<SessionKey> = Vec::new();
        let result = executor.step(|sequence, index, logits| {
            let (key, kind) = by_sequence.get(&sequence).expect("a planned sequence has its session");
            let session = sessions.get_mut(key).expect("both maps change together");
            match kind {
                RowKind::Plain => session.on_plain_row(index, logits),
                RowKind::Reward => {
                    session.on_row(index, logits);
                    if answered.last() != Some(key) {
                        answered.push(*key);
                    }
                }
            }
        });
        let began = Instant::now();
        answered.iter().for_each(|key| self.answer(*key));
        if !answered.is_empty() {
            self.step_sessions += STEP_SESSIONS_WEIGHT * (answered.len() as f32 - self.step_sessions);
        }
        let metrics = &self.metrics;
        match result {
            Ok(report) if report.sequences.is_empty() => false,
            Ok(report) => {
                metrics.steps.inc();
                metrics.tokens.inc_by(report.tokens as u64);
                metrics.preemptions.inc_by(report.preempted as u64);
                metrics.schedule.observe(report.schedule.as_secs_f64());
                metrics.forward.observe(report.forward.as_secs_f64());
                metrics.reply.observe(began.elapsed().as_secs_f64());
                true
            }
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
        let session = self.sessions.get_mut(&key).expect("a row came for it");
        let vocabulary = session.vocabulary;
        let chooser = self.choosers.entry(vocabulary).or_insert_with(|| Chooser::new(vocabulary));
        let generation = session.generation;
        for row in session.answer(chooser) {
            self.metrics.rows.inc();
            self.reply(key, generation, SessionReply::Row(row));
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
        self.metrics.free_blocks.set(i64::from(load.free_blocks));
        for peer in self.connections.values_mut() {
            if peer.batch.replies.is_empty() && peer.batch.load.is_none() {
                continue;
            }
            let mut batch = std::mem::take(&mut peer.batch);
            if busy {
                batch.load = Some(load);
            }
            // The receiver is gone just before its Disconnect arrives.
            let _ = peer.replies.send(batch);
        }
    }

    fn load(&self) -> Load {
        let stats = self.executor.stats();
        let cost = self.executor.step_cost();
        Load {
            step_fixed_us: (cost.fixed * 1e6) as f32,
            step_row_us: (cost.per_row * 1e6) as f32,
            step_sessions: self.step_sessions,
            sessions: self.sessions.len() as u32,
            waiting: stats.waiting as u32,
            free_blocks: stats.free_blocks as u32,
            total_blocks: stats.total_blocks as u32,
        }
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
