//! What the rest of the process holds of a reward engine: it starts one, and hands operations of base workers to it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as async_mpsc, watch};
use uniarm_engine::{Executor, ExecutorOptions};
use uniarm_model::{Forward, ModelError, RowLanes};
use uniarm_proto::{
    Advance, Failure, FailureCode, ProtocolError, ReplyBatch, SessionGeneration, SessionId, SessionOp,
    SessionPace,
};
use uniarm_runtime::{
    Metrics,
    drive::{Driver, Inbox, drive, inbox},
};

use crate::{
    catalogue::RewardCatalogue,
    engine::Engine,
    lane::Lane,
    metrics::RewardMetrics,
    prepare::{Prepared, prepare},
    steps::StepMeter,
};

/// Batches of operations that one connection may have in the inbox: enough to keep the engine fed, few enough that a
/// flood waits in the flooder's own TCP buffers.
const CONNECTION_BATCHES_MAX: usize = 64;

/// Limits of a reward worker.
#[derive(Debug, Clone, Default)]
pub struct RewardOptions {
    pub executor: ExecutorOptions,
    pub driver: Driver,
    /// Lanes of the model's device, for base workers that offer some. `None`: its rows are on no device of its own.
    pub lanes: Option<Arc<dyn RowLanes>>,
}

/// Starts engines.
pub struct RewardEngine;

/// What the rest of the process holds of an engine.
#[derive(Clone)]
pub struct RewardHandle {
    /// One after the other; a session is opened by the one that is here then.
    catalogue: Arc<watch::Sender<Arc<RewardCatalogue>>>,
    inbox: Inbox<Command>,
    connections: Arc<AtomicU64>,
    lanes: Option<Arc<dyn RowLanes>>,
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
    /// It has had the one lane that it may have.
    is_offered: bool,
}

/// An operation as it came: already decoded, or refused by the contract.
pub type IncomingOp = (SessionId, SessionGeneration, Result<SessionOp, ProtocolError>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ConnectionId(u64);

pub(crate) enum Command {
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
    /// A lane beside the stream, or why there is none, or none any more.
    Lane {
        connection: ConnectionId,
        lane: Result<Lane, String>,
    },
    Drain,
}

/// An operation whose slow part is done.
pub(crate) struct ReadyOp {
    pub(crate) session: SessionId,
    pub(crate) generation: SessionGeneration,
    pub(crate) kind: ReadyKind,
}

pub(crate) enum ReadyKind {
    Open(Box<Prepared>),
    Advance(Advance),
    Query { position: u32, ids: Vec<u32> },
    Pace(SessionPace),
    Close,
    Refuse(Failure),
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
        let (inbox, commands) = inbox();
        // Which sessions go on is the base workers' affair: places are for those that do.
        let limits = ExecutorOptions { idle_keep_places: false, ..options.executor.clone() };
        let executor = Executor::new(forward, &limits)?;
        let fingerprint = catalogue.backbone.fingerprint;
        let own = (RewardMetrics::new(metrics), StepMeter::new(metrics));
        let engine = Engine::new(executor, fingerprint, own);
        drive(options.driver, "reward-engine", engine, commands)?;
        let catalogue = Arc::new(watch::Sender::new(Arc::new(catalogue)));
        Ok(RewardHandle { catalogue, inbox, connections: Arc::default(), lanes: options.lanes.clone() })
    }
}

// === impl RewardHandle ===

impl RewardHandle {
    /// What it serves now.
    #[must_use]
    pub fn catalogue(&self) -> Arc<RewardCatalogue> {
        self.catalogue.borrow().clone()
    }

    /// What it serves now, and each time that this has changed.
    #[must_use]
    pub fn watch_catalogue(&self) -> watch::Receiver<Arc<RewardCatalogue>> {
        self.catalogue.subscribe()
    }

    /// Serves this from the next session on.
    pub(crate) fn set_catalogue(&self, catalogue: RewardCatalogue) {
        self.catalogue.send_replace(Arc::new(catalogue));
    }

    /// Tells all base workers that this worker is going away; they move what they can, and leave.
    pub fn begin_drain(&self) {
        let _ = self.inbox.send(Command::Drain);
    }

    /// Opens a stream: operations in, replies out. The receiver ends if the engine does.
    pub fn connect(&self) -> (Connection, async_mpsc::UnboundedReceiver<ReplyBatch>) {
        let id = ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed));
        let (replies, receiver) = async_mpsc::unbounded_channel();
        // A failed send means that the engine is gone: then the receiver says so, because `replies` went with it.
        let _ = self.inbox.send(Command::Connect { connection: id, replies });
        let credits = Arc::new(Semaphore::new(CONNECTION_BATCHES_MAX));
        (Connection { id, handle: self.clone(), credits, is_offered: false }, receiver)
    }
}

// === impl Connection ===

impl Connection {
    /// Hands a batch to the engine, in order; waits while too many of this connection are queued.
    pub async fn submit(&self, ops: Vec<IncomingOp>) {
        let credit = Arc::clone(&self.credits).acquire_owned().await;
        let _credit = credit.expect("the semaphore is never closed");
        let is_slow = |op: &IncomingOp| matches!(&op.2, Ok(SessionOp::Open(open)) if !open.input.is_tokens());
        let ready = if ops.iter().any(is_slow) {
            let handle = self.handle.clone();
            let prepared = tokio::task::spawn_blocking(move || ready_ops(&handle, ops)).await;
            match prepared {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "preparing sessions panicked");
                    return;
                }
            }
        } else {
            ready_ops(&self.handle, ops)
        };
        let _ = self.handle.inbox.send(Command::Ops { connection: self.id, ops: ready, _credit });
    }

    /// Takes the lane that the base worker offers, if that is possible; the answer is among the replies. Further offers are
    /// none.
    pub fn take_lane(&mut self, offer: Vec<u8>) {
        if std::mem::replace(&mut self.is_offered, true) {
            return;
        }
        let (connection, inbox) = (self.id, self.handle.inbox.clone());
        match self.handle.lanes.clone() {
            Some(lanes) => Lane::join(lanes, offer, (connection, inbox)),
            None => {
                let reason = "this reward worker's rows are on no GPU of its own".to_owned();
                let _ = inbox.send(Command::Lane { connection, lane: Err(reason) });
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.handle.inbox.send(Command::Disconnect { connection: self.id });
    }
}

fn ready_ops(handle: &RewardHandle, ops: Vec<IncomingOp>) -> Vec<ReadyOp> {
    let ready = |(session, generation, op): IncomingOp| {
        let kind = match op {
            Ok(SessionOp::Open(open)) => match prepare(&handle.catalogue(), &open) {
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
