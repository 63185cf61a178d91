//! A link between base and reward engine that does what networks and restarts do.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::sync::mpsc;
use uniarm_base::{LinkStream, Scorer, guide::DialFuture};
use uniarm_proto::{OpBatch, ReplyBatch, RewardWorker, SessionReply};
use uniarm_reward::{RewardHandle, local};

/// Old messages that may come again.
const REMEMBERED: usize = 8;

/// What a link does, each with its probability for a message.
#[derive(Clone, Copy, Debug)]
pub struct Chaos {
    pub seed: u64,
    /// Is held up for up to two milliseconds.
    delay: f64,
    /// Comes twice, now and later.
    repeat: f64,
    /// Its rows come in another order.
    reorder: f64,
    /// Is lost with its stream, and with it all sessions.
    lose: f64,
}

/// Dials a reward engine over such a link.
pub struct ChaosScorer {
    reward: RewardHandle,
    chaos: Chaos,
    /// Streams so far: each has its own fate.
    dialled: AtomicU64,
}

impl Chaos {
    pub const NONE: Self = Self { seed: 0, delay: 0.0, repeat: 0.0, reorder: 0.0, lose: 0.0 };

    pub fn drawn(random: &mut StdRng) -> Self {
        let mut draw = |most: f64| if random.random() { random.random_range(0.0..most) } else { 0.0 };
        let (delay, repeat, reorder, lose) = (draw(0.4), draw(0.4), draw(0.8), draw(0.01));
        Self { seed: random.random(), delay, repeat, reorder, lose }
    }
}

impl ChaosScorer {
    pub fn new(reward: RewardHandle, chaos: Chaos) -> Self {
        Self { reward, chaos, dialled: AtomicU64::new(0) }
    }
}

impl Scorer for ChaosScorer {
    fn dial(&self, _: &RewardWorker) -> DialFuture {
        let life = self.dialled.fetch_add(1, Ordering::Relaxed);
        let (own_ops, own_replies) = local::connect(&self.reward);
        let chaos = self.chaos;
        Box::pin(async move {
            let (ops, ops_in) = mpsc::channel(16);
            let (replies_out, replies) = mpsc::unbounded_channel();
            tokio::spawn(relay(chaos, life, (ops_in, own_ops), (own_replies, replies_out)));
            Ok(LinkStream { ops, replies })
        })
    }
}

/// Both directions, until one end closes or the stream is lost.
async fn relay(
    chaos: Chaos,
    life: u64,
    (mut ops_in, ops_out): (mpsc::Receiver<OpBatch>, mpsc::Sender<OpBatch>),
    (mut replies_in, replies_out): (mpsc::UnboundedReceiver<ReplyBatch>, mpsc::UnboundedSender<ReplyBatch>),
) {
    let random = Mutex::new(StdRng::seed_from_u64(chaos.seed ^ life.wrapping_mul(0x9e37_79b9)));
    let chance = |probability: f64| random.lock().unwrap().random_bool(probability);
    let pick = |count: usize| random.lock().unwrap().random_range(0..count);
    let (mut old_ops, mut old_replies) = (VecDeque::new(), VecDeque::new());
    loop {
        tokio::select! {
            batch = ops_in.recv() => {
                let Some(batch) = batch else { return };
                if chance(chaos.lose) {
                    return;
                }
                if chance(chaos.delay) {
                    tokio::time::sleep(Duration::from_micros(pick(2000) as u64)).await;
                }
                let again = chance(chaos.repeat).then(|| remembered(&mut old_ops, &batch, pick(REMEMBERED)));
                if ops_out.send(batch).await.is_err() {
                    return;
                }
                if let Some(again) = again && ops_out.send(again).await.is_err() {
                    return;
                }
            }
            batch = replies_in.recv() => {
                let Some(mut batch) = batch else { return };
                if chance(chaos.lose) {
                    return;
                }
                if chance(chaos.delay) {
                    tokio::time::sleep(Duration::from_micros(pick(2000) as u64)).await;
                }
                // A session is opened before it has rows: that order is part of the contract.
                let is_row = |reply: &SessionReply| !matches!(reply, SessionReply::Opened { .. });
                if chance(chaos.reorder) && batch.replies.iter().all(|(.., reply)| is_row(reply)) {
                    batch.replies.shuffle(&mut *random.lock().unwrap());
                }
                let again = chance(chaos.repeat).then(|| remembered(&mut old_replies, &batch, pick(REMEMBERED)));
                if replies_out.send(batch).is_err() {
                    return;
                }
                if let Some(again) = again && replies_out.send(again).is_err() {
                    return;
                }
            }
        }
    }
}

/// Remembers a message, and gives back one that was remembered earlier, or itself.
fn remembered<T: Clone>(old: &mut VecDeque<T>, batch: &T, pick: usize) -> T {
    old.push_front(batch.clone());
    old.truncate(REMEMBERED);
    old.get(pick).unwrap_or(batch).clone()
}
