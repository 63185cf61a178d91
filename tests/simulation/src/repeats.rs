//! Messages between base and reward worker that come again: TCP repeats nothing, a proxy or a careless retry may.

use std::collections::VecDeque;

use tokio::sync::mpsc;
use uniarm_base::{LinkStream, Scorer, guide::DialFuture};
use uniarm_proto::{Dice, OpBatch, ReplyBatch, RewardWorker};

/// Old messages that may come again.
const REMEMBERED: usize = 8;

/// A scorer some of whose messages come twice.
pub struct Repeating<S> {
    scorer: S,
    share: f64,
    dice: Dice,
}

struct Memory<T> {
    old: VecDeque<T>,
    share: f64,
    dice: Dice,
}

// === impl Repeating ===

impl<S> Repeating<S> {
    pub fn new(scorer: S, share: f64, dice: Dice) -> Self {
        Self { scorer, share, dice }
    }
}

impl<S: Scorer> Scorer for Repeating<S> {
    fn dial(&self, worker: &RewardWorker) -> DialFuture {
        let dialling = self.scorer.dial(worker);
        if self.share == 0.0 {
            return dialling;
        }
        let (share, dice) = (self.share, self.dice.clone());
        Box::pin(async move {
            let stream = dialling.await?;
            let (ops, ops_in) = mpsc::channel(16);
            let (replies_out, replies) = mpsc::unbounded_channel();
            tokio::spawn(relay(share, dice, (ops_in, stream.ops), (stream.replies, replies_out)));
            Ok(LinkStream { ops, replies })
        })
    }

    fn workers(&self, reward: &str) -> Vec<RewardWorker> {
        self.scorer.workers(reward)
    }
}

/// Both directions, until one end closes.
async fn relay(
    share: f64,
    dice: Dice,
    (mut ops_in, ops_out): (mpsc::Receiver<OpBatch>, mpsc::Sender<OpBatch>),
    (mut replies_in, replies_out): (mpsc::UnboundedReceiver<ReplyBatch>, mpsc::UnboundedSender<ReplyBatch>),
) {
    let (mut old_ops, mut old_replies) = (Memory::new(share, dice.clone()), Memory::new(share, dice));
    loop {
        tokio::select! {
            biased;
            batch = ops_in.recv() => {
                let Some(batch) = batch else { return };
                let again = old_ops.again(&batch);
                for batch in std::iter::once(batch).chain(again) {
                    if ops_out.send(batch).await.is_err() {
                        return;
                    }
                }
            }
            batch = replies_in.recv() => {
                let Some(batch) = batch else { return };
                let again = old_replies.again(&batch);
                for batch in std::iter::once(batch).chain(again) {
                    if replies_out.send(batch).is_err() {
                        return;
                    }
                }
            }
        }
    }
}

// === impl Memory ===

impl<T: Clone> Memory<T> {
    fn new(share: f64, dice: Dice) -> Self {
        Self { old: VecDeque::new(), share, dice }
    }

    /// Remembers a message; now and then, one that comes again.
    fn again(&mut self, message: &T) -> Option<T> {
        self.old.push_front(message.clone());
        self.old.truncate(REMEMBERED);
        let comes_again = self.dice.roll::<f64>() < self.share;
        comes_again.then(|| self.old[self.dice.below(self.old.len())].clone())
    }
}
