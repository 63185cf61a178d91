//! Standing streams to the reward workers: one for each pair, kept up by a task, used by all sequences.
//!
//! The engine pushes operations without waiting and hears of replies, of a stream that came up and of one that went
//! down through its inbox. Each life of a stream has an epoch: operations meant for an earlier life are dropped.

use std::{
    collections::{BTreeMap, HashMap},
    future::{self, Future},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures_util::stream;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};
use uniarm_proto::{
    Dice, OpBatch, ProtocolError, ReplyBatch, RewardWorker, SessionGeneration, SessionId, SessionOp,
    client::{self, Dialer},
    pb,
    session::{op_to_wire, reply_from_wire},
};
use uniarm_runtime::drive::Inbox;

use crate::{
    engine::Command,
    lane::{Arrivals, Lanes},
};

/// First wait before a lost worker is dialled again; doubles up to the longest.
const REDIAL_FIRST: Duration = Duration::from_millis(50);
const REDIAL_LONGEST: Duration = Duration::from_secs(2);

/// A worker that does not complete a dial within this is treated as away.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);

/// A worker that nobody waits for is dialled for so long: until then everyone knows that it is away.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Messages on their way into a stream: the engine sends at most one for each step.
const OUTGOING_MESSAGES_MAX: usize = 16;

/// How guidance is scored: over gRPC or in this process.
pub trait Scorer: Send + Sync + 'static {
    /// Opens a stream to a reward worker.
    fn dial(&self, worker: &RewardWorker) -> DialFuture;

    /// Who serves a reward model now. Empty: nobody here knows better than the request's placement.
    fn workers(&self, _reward: &str) -> Vec<RewardWorker> {
        Vec::new()
    }
}

pub type DialFuture = Pin<Box<dyn Future<Output = Result<LinkStream, LinkError>> + Send>>;

/// An open stream. It is lost when either end closes.
pub struct LinkStream {
    pub ops: mpsc::Sender<OpBatch>,
    pub replies: mpsc::UnboundedReceiver<ReplyBatch>,
}

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("reward worker {worker} at {address} cannot be reached: {reason}")]
    Unreachable { worker: String, address: String, reason: String },
}

/// Dials reward workers over gRPC.
#[derive(Default)]
pub struct GrpcScorer {
    pub dialer: Dialer,
    /// Where whole rows are to come from GPU to GPU.
    pub lanes: Option<Lanes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LinkId(u64);

/// One life of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Epoch(u64);

/// The engine's side of all streams.
pub(crate) struct Links {
    scorer: Arc<dyn Scorer>,
    dice: Dice,
    runtime: tokio::runtime::Handle,
    inbox: Inbox<Command>,
    by_worker: HashMap<RewardWorker, LinkId>,
    links: BTreeMap<LinkId, LinkHandle>,
    next: u64,
}

struct LinkHandle {
    worker: RewardWorker,
    ops: mpsc::UnboundedSender<(Epoch, OpBatch)>,
    state: LinkState,
    /// Its worker is going away.
    is_leaving: bool,
    /// When it said something, or was new, last.
    heard_at: Instant,
    /// Operations of this step, sent as one message.
    outbox: OpBatch,
}

enum LinkState {
    /// For the first time.
    Dialling,
    Up(Epoch),
    /// It is dialled again and again, by its task alone.
    Down {
        since: Instant,
    },
}

// === impl GrpcScorer ===

impl Scorer for GrpcScorer {
    fn dial(&self, worker: &RewardWorker) -> DialFuture {
        let (worker, dialer) = (worker.clone(), self.dialer.clone());
        let lanes = self.lanes.clone();
        Box::pin(async move {
            let unreachable = |reason: String| LinkError::Unreachable {
                worker: worker.member.to_string(),
                address: worker.address.clone(),
                reason,
            };
            let channel = dialer.connect(&worker.address).await;
            let channel = channel.map_err(|error| unreachable(reason_of(&error)))?;
            let (ops, outgoing) = mpsc::channel::<OpBatch>(OUTGOING_MESSAGES_MAX);
            let (offer, offered) = oneshot::channel();
            let outgoing = stream::unfold((outgoing, Some(offered)), next_request);
            let response = client::reward(channel).exchange(outgoing).await;
            let incoming = response.map_err(|status| unreachable(status.to_string()))?.into_inner();
            let (sender, replies) = mpsc::unbounded_channel();
            let lanes = lanes.filter(|lanes| lanes.may_offer(&worker));
            let arrivals = Arrivals::new(worker.clone(), lanes.map(|lanes| (lanes, offer)));
            tokio::spawn(relay(worker, incoming, arrivals, sender));
            Ok(LinkStream { ops, replies })
        })
    }
}

/// What goes to a worker: operations until there are no more, and the offer of a lane as soon as it is made.
type Outgoing = (mpsc::Receiver<OpBatch>, Option<oneshot::Receiver<Vec<u8>>>);

async fn next_request((mut ops, mut offer): Outgoing) -> Option<(pb::RewardRequest, Outgoing)> {
    loop {
        let made = async {
            match &mut offer {
                Some(offer) => offer.await.ok(),
                None => future::pending().await,
            }
        };
        let request = tokio::select! {
            biased;
            batch = ops.recv() => ops_to_wire(batch?),
            made = made => {
                offer = None;
                let Some(nccl_id) = made else { continue }; // there is no lane
                let lane = Some(pb::LaneOffer { nccl_id: nccl_id.into() });
                pb::RewardRequest { ops: Vec::new(), lane }
            }
        };
        return Some((request, (ops, offer)));
    }
}

/// Hands on what comes from a worker, until either side ends.
async fn relay(
    worker: RewardWorker,
    mut incoming: tonic::Streaming<pb::RewardReply>,
    mut arrivals: Arrivals,
    sender: mpsc::UnboundedSender<ReplyBatch>,
) {
    let worker = worker.member;
    loop {
        let arrived = tokio::select! {
            biased;
            batch = arrivals.next() => match batch.map(|batch| sender.send(batch)) {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => return,
                Err(lost) => Err(lost),
            },
            message = incoming.message() => match message.map(|message| message.map(replies_from_wire)) {
                Ok(Some(Ok(batch))) => arrivals.push(batch),
                Ok(None) => return,
                Ok(Some(Err(error))) => {
                    tracing::error!(%worker, %error, "a reward worker broke the contract");
                    return;
                }
                Err(status) => {
                    tracing::info!(%worker, %status, "the reward stream ended");
                    return;
                }
            },
        };
        if let Err(lost) = arrived {
            tracing::warn!(%worker, %lost, "the reward stream ends");
            return;
        }
    }
}

fn ops_to_wire(batch: OpBatch) -> pb::RewardRequest {
    let ops =
        batch.into_iter().map(|(session, generation, op)| op_to_wire(session, generation, op)).collect();
    pb::RewardRequest { ops, lane: None }
}

fn replies_from_wire(message: pb::RewardReply) -> Result<ReplyBatch, ProtocolError> {
    let mut batch = ReplyBatch {
        replies: Vec::new(),
        load: message.load.map(Into::into),
        lane: message.lane.map(Into::into),
    };
    for reply in message.replies {
        let (session, generation, reply) = reply_from_wire(reply);
        if let Some(reply) = reply? {
            batch.replies.push((session, generation, reply));
        }
    }
    Ok(batch)
}

/// The last cause says what happened; tonic's own words are "transport error".
fn reason_of(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

// === impl Links ===

impl Links {
    pub(crate) fn new(
        scorer: Arc<dyn Scorer>,
        dice: Dice,
        runtime: tokio::runtime::Handle,
        inbox: Inbox<Command>,
    ) -> Self {
        Self { scorer, dice, runtime, inbox, by_worker: HashMap::new(), links: BTreeMap::new(), next: 0 }
    }

    /// A number from 0 to 1 for waits that should differ.
    pub(crate) fn roll(&self) -> f64 {
        self.dice.roll()
    }

    /// The stream to `worker`; a new one is dialled.
    pub(crate) fn to(&mut self, worker: &RewardWorker) -> LinkId {
        if let Some(id) = self.by_worker.get(worker) {
            return *id;
        }
        let id = LinkId(self.next);
        self.next += 1;
        let (ops, incoming) = mpsc::unbounded_channel();
        let task = LinkTask {
            id,
            worker: worker.clone(),
            scorer: Arc::clone(&self.scorer),
            dice: self.dice.clone(),
            ops: incoming,
            inbox: self.inbox.clone(),
        };
        self.runtime.spawn(task.run());
        self.by_worker.insert(worker.clone(), id);
        let state = LinkState::Dialling;
        let (worker, heard_at) = (worker.clone(), Instant::now());
        let link = LinkHandle { worker, ops, state, is_leaving: false, heard_at, outbox: Vec::new() };
        self.links.insert(id, link);
        id
    }

    pub(crate) fn is_up(&self, id: LinkId) -> bool {
        self.links.get(&id).is_some_and(|link| link.epoch().is_some())
    }

    /// Whether a session may be opened there, as far as is known.
    pub(crate) fn is_well(&self, worker: &RewardWorker) -> bool {
        let link = self.by_worker.get(worker).and_then(|id| self.links.get(id));
        link.is_none_or(|link| !link.is_leaving && !matches!(link.state, LinkState::Down { .. }))
    }

    /// The stream to a worker, if there is one.
    pub(crate) fn known(&self, worker: &RewardWorker) -> Option<LinkId> {
        self.by_worker.get(worker).copied()
    }

    /// Who serves a reward model now; empty: nobody knows.
    pub(crate) fn serving(&self, reward: &str) -> Vec<RewardWorker> {
        self.scorer.workers(reward)
    }

    pub(crate) fn set_leaving(&mut self, id: LinkId, is_leaving: bool) {
        if let Some(link) = self.links.get_mut(&id) {
            link.is_leaving = is_leaving;
        }
    }

    pub(crate) fn heard(&mut self, id: LinkId, now: Instant) {
        if let Some(link) = self.links.get_mut(&id) {
            link.heard_at = now;
        }
    }

    /// Whether a stream that is up has brought nothing for so long.
    pub(crate) fn is_silent(&self, id: LinkId, now: Instant, after: Duration) -> bool {
        let link = self.links.get(&id);
        link.is_some_and(|link| {
            link.epoch().is_some() && now.saturating_duration_since(link.heard_at) >= after
        })
    }

    /// Streams whose workers are going away.
    pub(crate) fn leaving(&self) -> Vec<LinkId> {
        let leaving =
            |(id, link): (&LinkId, &LinkHandle)| (link.is_leaving && link.epoch().is_some()).then_some(*id);
        self.links.iter().filter_map(leaving).collect()
    }

    /// Whether a stream that nobody uses has been down for so long that its worker will not come back.
    pub(crate) fn is_given_up(&self, id: LinkId) -> bool {
        let link = self.links.get(&id);
        link.is_some_and(
            |link| matches!(link.state, LinkState::Down { since } if since.elapsed() >= FORGET_AFTER),
        )
    }

    pub(crate) fn came_up(&mut self, id: LinkId, epoch: Epoch) {
        if let Some(link) = self.links.get_mut(&id) {
            link.state = LinkState::Up(epoch);
            link.is_leaving = false;
        }
    }

    pub(crate) fn went_down(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(&id) {
            if !matches!(link.state, LinkState::Down { .. }) {
                link.state = LinkState::Down { since: Instant::now() };
            }
            link.outbox.clear();
        }
    }

    /// Ends a stream that nobody uses: its worker is going away, or has been away for long.
    pub(crate) fn forget(&mut self, id: LinkId) {
        if let Some(link) = self.links.remove(&id) {
            self.by_worker.remove(&link.worker);
        }
    }

    /// Queues an operation for the next `flush`; without a stream it is dropped, and its session is opened again
    /// when the stream comes up.
    pub(crate) fn push(
        &mut self,
        id: LinkId,
        session: SessionId,
        generation: SessionGeneration,
        op: SessionOp,
    ) {
        if let Some(link) = self.links.get_mut(&id)
            && link.epoch().is_some()
        {
            link.outbox.push((session, generation, op));
        }
    }

    /// Sends what has gathered: one message for each reward worker.
    pub(crate) fn flush(&mut self) {
        for link in self.links.values_mut() {
            if let Some(epoch) = link.epoch()
                && !link.outbox.is_empty()
            {
                // The receiver lives as long as this handle.
                let _ = link.ops.send((epoch, std::mem::take(&mut link.outbox)));
            }
        }
    }
}

// === impl LinkHandle ===

impl LinkHandle {
    /// The stream's life, while it is up.
    fn epoch(&self) -> Option<Epoch> {
        match self.state {
            LinkState::Up(epoch) => Some(epoch),
            LinkState::Dialling | LinkState::Down { .. } => None,
        }
    }
}

/// Keeps one stream up.
struct LinkTask {
    id: LinkId,
    worker: RewardWorker,
    scorer: Arc<dyn Scorer>,
    dice: Dice,
    ops: mpsc::UnboundedReceiver<(Epoch, OpBatch)>,
    inbox: Inbox<Command>,
}

// === impl LinkTask ===

impl LinkTask {
    /// Runs until the engine forgets the stream.
    async fn run(mut self) {
        let mut wait = REDIAL_FIRST;
        for life in 0.. {
            match timeout(DIAL_TIMEOUT, self.scorer.dial(&self.worker)).await {
                Ok(Ok(stream)) => {
                    wait = REDIAL_FIRST;
                    if self.pump(stream, Epoch(life)).await.is_none() {
                        return;
                    }
                    tracing::warn!(worker = %self.worker.member, address = %self.worker.address, "a reward stream was lost");
                }
                Ok(Err(error)) => tracing::debug!(%error, "dial failed"),
                Err(_) => tracing::debug!(worker = %self.worker.member, "dial timed out"),
            }
            if self.inbox.send(Command::LinkDown { link: self.id }).is_err() {
                return;
            }
            // Base workers that lost one reward worker together do not come back to it together.
            let rest = tokio::time::sleep(wait.mul_f64(0.5 + 0.5 * self.dice.roll::<f64>()));
            tokio::pin!(rest);
            loop {
                tokio::select! {
                    biased;
                    () = &mut rest => break,
                    stale = self.ops.recv() => if stale.is_none() { return },
                }
            }
            wait = (wait * 2).min(REDIAL_LONGEST);
        }
    }

    /// Moves messages both ways until the stream is lost (`Some`) or the engine forgets it (`None`).
    async fn pump(&mut self, mut stream: LinkStream, epoch: Epoch) -> Option<()> {
        self.inbox.send(Command::LinkUp { link: self.id, epoch }).ok()?;
        loop {
            tokio::select! {
                biased;
                batch = self.ops.recv() => {
                    let (meant_for, batch) = batch?;
                    if meant_for == epoch && stream.ops.send(batch).await.is_err() {
                        return Some(());
                    }
                }
                batch = stream.replies.recv() => {
                    let Some(batch) = batch else { return Some(()) };
                    self.inbox.send(Command::Replies { link: self.id, batch }).ok()?;
                }
            }
        }
    }
}
