//! A base worker that finds a reward worker in its own process.

use uniarm_base::{LinkError, LinkStream, Scorer, StoreScorer, guide::DialFuture};
use uniarm_proto::{MemberId, RewardWorker};
use uniarm_reward::{RewardHandle, local};

/// Base and reward share memory instead of a wire.
pub struct LocalScorer {
    reward: RewardHandle,
    /// Who the reward worker of this process is; all others are dialled.
    beside: Option<(MemberId, StoreScorer)>,
}

// === impl LocalScorer ===

impl LocalScorer {
    /// The only reward worker that there is.
    pub fn new(reward: RewardHandle) -> Self {
        Self { reward, beside: None }
    }

    /// One of several: the others are elsewhere.
    pub fn beside(reward: RewardHandle, own: MemberId, others: StoreScorer) -> Self {
        Self { reward, beside: Some((own, others)) }
    }
}

impl Scorer for LocalScorer {
    fn dial(&self, worker: &RewardWorker) -> DialFuture {
        if let Some((own, others)) = &self.beside
            && worker.member != *own
        {
            return others.dial(worker);
        }
        let reward = self.reward.clone();
        Box::pin(async move {
            let (ops, replies) = local::connect(&reward);
            Ok::<_, LinkError>(LinkStream { ops, replies })
        })
    }

    fn workers(&self, reward: &str) -> Vec<RewardWorker> {
        self.beside.as_ref().map_or_else(Vec::new, |(_, others)| others.workers(reward))
    }
}
