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

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as async_mpsc};
use uniarm_decode::{
    Noise,
    guidance::{log_sum_exp, noisy_top_list, top_list},
    scheduler::{AddError, NewSequence, Priority as Rank, SequenceId},
};
use uniarm_engine::{Executor, ExecutorOptions};
use uniarm_model::Forward;
use uniarm_proto::{
    Answer, Failure, FailureCode, Load, Priority, ProtocolError, ReplyBatch, SessionGeneration, SessionId,
    SessionOp, SessionReply, SessionRow,
};
use uniarm_runtime::Metrics;

use crate::{
    catalogue::RewardCatalogue,
    metrics::RewardMetrics,
    prepare::{Prepared, prepare},
};

/// Batches of operations that one connection may have in the inbox: enough to keep the engine fed, few enough that a
/// flood waits in the flooder's own TCP buffers.
const CONNECTION_BATCHES_MAX: usize = 64;

/// How long an idle engine sleeps between looks at its inbox; a message wakes it at once.
const IDLE_WAIT: Duration = Duration::from_millis(500);

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
    Advance { position: u32, ids: Vec<u32> },
    Query { position: u32, ids: Vec<u32> },
    Close,
    Refuse(Failure),
}

type SessionKey = (ConnectionId, SessionId);

struct Session {
    generation: SessionGeneration,
    sequence: SequenceId,
    prompt_tokens: usize,
    list_length: usize,
    vocabulary: usize,
    noise: Option<(Noise, f32)>,
    /// Position that the next row chooses = tokens of the answer so far.
    position: u32,
    /// The row at `position`, once it is computed: queries ask for more of it.
    row: Vec<f32>,
    has_row: bool,
}

struct Engine {
    executor: Executor,
    sessions: HashMap<SessionKey, Session>,
    by_sequence: HashMap<SequenceId, SessionKey>,
    connections: HashMap<ConnectionId, Peer>,
    next_sequence: u64,
    metrics: RewardMetrics,
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
    /// When the operating system gives no thread.
    pub fn start(
        forward: Box<dyn Forward>,
        catalogue: RewardCatalogue,
        options: &RewardOptions,
        metrics: &Metrics,
    ) -> std::io::Result<RewardHandle> {
        let (inbox, commands) = mpsc::channel();
        let engine = Engine {
            executor: Executor::new(forward, &options.executor),
            sessions: HashMap::new(),
            by_sequence: HashMap::new(),
            connections: HashMap::new(),
            next_sequence: 0,
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
            Ok(SessionOp::Advance { position, ids }) => ReadyKind::Advance { position, ids },
            Ok(SessionOp::Query { position, ids }) => ReadyKind::Query { position, ids },
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
            ReadyKind::Advance { position, ids } => self.advance(key, position, &ids),
            ReadyKind::Query { position, ids } => self.query(key, position, ids),
            ReadyKind::Close => self.close(key),
        }
    }

    fn open(&mut self, key: SessionKey, generation: SessionGeneration, prepared: Prepared) {
        match self.sessions.get(&key) {
            Some(session) if session.generation >= generation => return, // repeated
            Some(_) => self.close(key),
            None => {}
        }
        let sequence = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let tokens = prepared.tokens.len();
        let new = NewSequence {
            id: sequence,
            logits_from: tokens - 1,
            tokens_max: prepared.tokens_max.max(tokens),
            tokens: prepared.tokens,
            root: prepared.root,
            priority: rank(prepared.priority),
            deadline: None,
        };
        if let Err(error) = self.executor.add(new, prepared.adapter) {
            self.reply(key, generation, SessionReply::Failure(refused(&error)));
            return;
        }
        let session = Session {
            generation,
            sequence,
            prompt_tokens: prepared.prompt_tokens,
            list_length: prepared.list_length,
            vocabulary: prepared.vocabulary,
            noise: prepared.noise,
            position: (tokens - prepared.prompt_tokens) as u32,
            row: Vec::new(),
            has_row: false,
        };
        let opened = SessionReply::Opened {
            prompt_tokens: session.prompt_tokens as u32,
            vocabulary: session.vocabulary as u32,
            answer_tokens_max: (prepared.tokens_max.max(tokens) - session.prompt_tokens) as u32,
        };
        self.sessions.insert(key, session);
        self.by_sequence.insert(sequence, key);
        self.reply(key, generation, opened);
    }

    fn advance(&mut self, key: SessionKey, position: u32, ids: &[u32]) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        if position != session.position || ids.is_empty() {
            return; // late or repeated
        }
        let (sequence, generation, vocabulary) = (session.sequence, session.generation, session.vocabulary);
        let outside = ids.iter().find(|id| **id as usize >= vocabulary);
        let result = match outside {
            Some(id) => Err(format!("token id {id} is outside the vocabulary of {vocabulary}")),
            None => self.executor.extend(sequence, ids).map_err(|error| error.to_string()),
        };
        if let Err(message) = result {
            self.close(key);
            let field = "advance.ids".into();
            let failure = Failure { code: FailureCode::InvalidArgument, field, message };
            self.reply(key, generation, SessionReply::Failure(failure));
            return;
        }
        let session = self.sessions.get_mut(&key).expect("it was there at the start");
        session.position += ids.len() as u32;
        session.has_row = false;
    }

    fn query(&mut self, key: SessionKey, position: u32, ids: Vec<u32>) {
        let Some(session) = self.sessions.get(&key) else { return };
        if position != session.position || !session.has_row {
            return; // late or repeated
        }
        let row = &session.row[..session.vocabulary];
        let values = if ids.is_empty() {
            row.to_vec()
        } else {
            // An id outside has no logit: it can never be chosen.
            ids.iter().map(|id| row.get(*id as usize).copied().unwrap_or(f32::NEG_INFINITY)).collect()
        };
        let generation = session.generation;
        self.metrics.queries.inc();
        self.reply(key, generation, SessionReply::Answer(Answer { position, ids, values }));
    }

    fn close(&mut self, key: SessionKey) {
        if let Some(session) = self.sessions.remove(&key) {
            self.by_sequence.remove(&session.sequence);
            self.executor.remove(session.sequence);
        }
    }

    fn is_current(&self, key: SessionKey, generation: SessionGeneration) -> bool {
        self.sessions.get(&key).is_some_and(|session| session.generation == generation)
    }

    /// One step; false: there was nothing to do.
    fn step(&mut self) -> bool {
        let Self { executor, sessions, by_sequence, connections, metrics, .. } = self;
        let mut replying = Duration::ZERO;
        let result = executor.step(|sequence, index, logits| {
            let began = Instant::now();
            let key = by_sequence.get(&sequence).expect("a planned sequence has its session");
            let session = sessions.get_mut(key).expect("both maps change together");
            session.row.clear();
            session.row.extend_from_slice(logits);
            session.has_row = true;
            debug_assert_eq!(session.position as usize, index + 1 - session.prompt_tokens);
            let reply = SessionReply::Row(session_row(session));
            if let Some(peer) = connections.get_mut(&key.0) {
                peer.batch.replies.push((key.1, session.generation, reply));
            }
            metrics.rows.inc();
            replying += began.elapsed();
        });
        match result {
            Ok(report) if report.sequences.is_empty() => false,
            Ok(report) => {
                metrics.steps.inc();
                metrics.tokens.inc_by(report.tokens as u64);
                metrics.preemptions.inc_by(report.preempted as u64);
                metrics.schedule.observe(report.schedule.as_secs_f64());
                metrics.forward.observe(report.forward.as_secs_f64());
                metrics.reply.observe(replying.as_secs_f64());
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
        Load {
            sessions: self.sessions.len() as u32,
            waiting: stats.waiting as u32,
            free_blocks: stats.free_blocks as u32,
            total_blocks: stats.total_blocks as u32,
        }
    }
}

fn session_row(session: &Session) -> SessionRow {
    let row = &session.row[..session.vocabulary];
    let log_normalizer = log_sum_exp(row);
    let position = session.position;
    let list = match (session.list_length, &session.noise) {
        (0, _) => {
            return SessionRow {
                position,
                ids: Vec::new(),
                values: row.to_vec(),
                log_normalizer,
                floor: None,
            };
        }
        (k, None) => top_list(row, k),
        (k, Some((noise, scale))) => noisy_top_list(row, k, *scale, noise, position),
    };
    let floor = list.ranking().map(|ranking| ranking.floor);
    SessionRow { position, ids: list.ids().to_vec(), values: list.values().to_vec(), log_normalizer, floor }
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
