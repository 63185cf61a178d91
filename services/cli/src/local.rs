//! Guidance inside one process: base and reward share memory instead of a wire.

use uniarm_base::{LinkError, LinkStream, Scorer, guide::DialFuture};
use uniarm_proto::RewardWorker;
use uniarm_reward::{RewardHandle, local};

pub struct LocalScorer {
    reward: RewardHandle,
}

impl LocalScorer {
    pub fn new(reward: RewardHandle) -> Self {
        Self { reward }
    }
}

impl Scorer for LocalScorer {
    fn dial(&self, _: &RewardWorker) -> DialFuture {
        let reward = self.reward.clone();
        Box::pin(async move {
            let (ops, replies) = local::connect(&reward);
            Ok::<_, LinkError>(LinkStream { ops, replies })
        })
    }
}
