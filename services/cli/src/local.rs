//! Where a base worker finds its reward workers: in its own process, or through the store.

use uniarm_base::{GrpcScorer, LinkError, LinkStream, Scorer, guide::DialFuture};
use uniarm_cluster::SnapshotReceiver;
use uniarm_proto::{MemberId, RewardWorker, Role};
use uniarm_reward::{RewardHandle, local};

/// Base and reward share memory instead of a wire.
pub struct LocalScorer {
    reward: RewardHandle,
    /// Who the reward worker of this process is; all others are dialled.
    beside: Option<(MemberId, StoreScorer)>,
}

/// Dials over gRPC, and knows from the store who has come since a request was placed.
pub struct StoreScorer {
    dialler: GrpcScorer,
    members: SnapshotReceiver,
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

// === impl StoreScorer ===

impl StoreScorer {
    pub fn new(dialler: GrpcScorer, members: SnapshotReceiver) -> Self {
        Self { dialler, members }
    }
}

impl Scorer for StoreScorer {
    fn dial(&self, worker: &RewardWorker) -> DialFuture {
        self.dialler.dial(worker)
    }

    fn workers(&self, reward: &str) -> Vec<RewardWorker> {
        let snapshot = self.members.borrow();
        let serves = |member: &&std::sync::Arc<uniarm_proto::Member>| {
            member.reward_models.iter().any(|served| served.name == reward)
        };
        let mut workers: Vec<_> =
            snapshot.with_role(Role::Reward).filter(serves).map(|member| member.as_reward_worker()).collect();
        // Sessions of a lost worker spread over the others.
        let first = rand::random_range(0..workers.len().max(1));
        workers.rotate_left(first);
        workers
    }
}
