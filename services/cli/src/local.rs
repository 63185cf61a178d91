//! Guidance inside one process: base and reward share memory instead of a wire.

use uniarm_base::{GrpcScorer, LinkError, LinkStream, Scorer, guide::DialFuture};
use uniarm_proto::{MemberId, RewardWorker};
use uniarm_reward::{RewardHandle, local};

pub struct LocalScorer {
    reward: RewardHandle,
    /// Who the reward worker of this process is; all others are dialled.
    beside: Option<(MemberId, GrpcScorer)>,
}

impl LocalScorer {
    /// The only reward worker that there is.
    pub fn new(reward: RewardHandle) -> Self {
        Self { reward, beside: None }
    }

    /// One of several: the others are elsewhere.
    pub fn beside(reward: RewardHandle, own: MemberId, others: GrpcScorer) -> Self {
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
}
