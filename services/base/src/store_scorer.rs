//! Where a base worker finds its reward workers: over gRPC, and in the store those who came after a request was placed.

use uniarm_cluster::SnapshotReceiver;
use uniarm_proto::{Dice, Member, RewardWorker, Role};

use crate::guide::{DialFuture, GrpcScorer, Scorer};

/// Dials over gRPC, and knows from the store who has come since.
pub struct StoreScorer {
    grpc: GrpcScorer,
    members: SnapshotReceiver,
    dice: Dice,
}

// === impl StoreScorer ===

impl StoreScorer {
    pub fn new(grpc: GrpcScorer, members: SnapshotReceiver) -> Self {
        Self { grpc, members, dice: Dice::default() }
    }

    #[must_use]
    pub fn with_dice(self, dice: Dice) -> Self {
        Self { dice, ..self }
    }
}

impl Scorer for StoreScorer {
    fn dial(&self, worker: &RewardWorker) -> DialFuture {
        self.grpc.dial(worker)
    }

    fn workers(&self, reward: &str) -> Vec<RewardWorker> {
        let snapshot = self.members.borrow();
        let serves = |member: &Member| member.reward_models.iter().any(|served| served.name == reward);
        let serving = snapshot.with_role(Role::Reward).filter(|member| serves(member));
        let mut workers: Vec<_> = serving.map(|member| member.as_reward_worker()).collect();
        // Sessions of a lost worker spread over the others.
        let first = self.dice.below(workers.len());
        workers.rotate_left(first);
        workers
    }
}
