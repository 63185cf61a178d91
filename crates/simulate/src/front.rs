//! The routers: permits, and the real placement over a snapshot of the members.

use std::sync::Arc;

use uniarm_cluster::Snapshot;
use uniarm_proto::{
    BaseModel, GenerateRequest, Generation, GuidanceTerm, Input, Member, MemberId, OnRewardLoss, RewardModel,
    Role, Sampling,
};
use uniarm_router::{
    ATTEMPTS_MAX, LoadTable, members_of,
    place::{Scope, place},
};

use crate::setup::Setup;
use crate::world::{Event, Outcome, World};

/// The one model of each pool.
const BASE_MODEL: &str = "base";
const REWARD_MODEL: &str = "reward";

/// All routers. Each counts only what it relays itself, as in a real cluster.
pub(crate) struct Front {
    snapshot: Snapshot,
    routers: Vec<Router>,
    unguided: GenerateRequest,
    guided: GenerateRequest,
}

#[derive(Default)]
struct Router {
    loads: LoadTable,
    under_way: usize,
}

// === impl Front ===

impl Front {
    pub(crate) fn new(setup: &Setup) -> Self {
        let term = GuidanceTerm { reward: REWARD_MODEL.into(), preference: Vec::new(), strength: 1.0 };
        Self {
            snapshot: snapshot(0..setup.base.workers, 0..setup.reward.workers, 1),
            routers: (0..setup.routers.max(1)).map(|_| Router::default()).collect(),
            unguided: request(Vec::new()),
            guided: request(vec![term]),
        }
    }

    /// Workers have come or left.
    pub(crate) fn see(&mut self, bases: impl Iterator<Item = usize>, rewards: impl Iterator<Item = usize>) {
        self.snapshot = snapshot(bases, rewards, self.snapshot.revision() + 1);
    }

    /// A request comes in: it takes a permit, or is refused.
    pub(crate) fn arrive(&mut self, request: usize, now: std::time::Duration, world: &mut World<'_>) {
        let number = request % self.routers.len();
        let router = &mut self.routers[number];
        let priority = uniarm_proto::Priority::from(world.arrivals[request].priority);
        if router.under_way >= priority.places(world.setup.router_requests_max) {
            world.requests[request].outcome = Some(Outcome::Refused);
            return;
        }
        router.under_way += 1;
        world.requests[request].router = number;
        self.attempt(request, now, world);
    }

    /// A base worker had no room: another one is tried, as long as attempts are left.
    pub(crate) fn refused(&mut self, request: usize, now: std::time::Duration, world: &mut World<'_>) {
        world.requests[request].load = None;
        self.attempt(request, now, world);
    }

    /// A base worker left in the middle of an answer: another one goes on with it.
    pub(crate) fn moved(&mut self, request: usize, now: std::time::Duration, world: &mut World<'_>) {
        self.attempt(request, now, world);
    }

    /// The last token of a request has passed, or its refusal.
    pub(crate) fn ended(&mut self, request: usize, outcome: Outcome, world: &mut World<'_>) {
        let state = &mut world.requests[request];
        state.outcome = Some(outcome);
        state.load = None;
        self.routers[state.router].under_way -= 1;
    }

    fn attempt(&mut self, request: usize, now: std::time::Duration, world: &mut World<'_>) {
        let asked = if world.arrivals[request].guided { &self.guided } else { &self.unguided };
        let state = &world.requests[request];
        let dice = world.placement_dice(request, state.attempts);
        let loads = &self.routers[state.router].loads;
        let placed = match state.attempts < ATTEMPTS_MAX {
            true => {
                let seen = (&self.snapshot, Scope::everything());
                place(seen, asked, loads, dice, &state.avoid).ok()
            }
            false => None,
        };
        let Some(placement) = placed else {
            self.ended(request, Outcome::Refused, world);
            return;
        };
        let load = loads.count(members_of(&placement));
        let state = &mut world.requests[request];
        state.load = Some(load);
        state.attempts += 1;
        let rewards = placement.placed.placements.first();
        state.rewards = rewards.into_iter().flatten().map(|worker| index_of(&worker.member)).collect();
        let base = index_of(&placement.base.id);
        state.avoid.insert(placement.base.id.clone());
        world.queue.push(now + world.setup.front.transit(0), Event::Placed { base, request });
    }
}

fn snapshot(
    bases: impl Iterator<Item = usize>,
    rewards: impl Iterator<Item = usize>,
    revision: u64,
) -> Snapshot {
    let bases = bases.map(|index| member(Role::Base, index));
    Snapshot::new(bases.chain(rewards.map(|index| member(Role::Reward, index))), revision)
}

fn member(role: Role, index: usize) -> Arc<Member> {
    let base = BaseModel {
        name: BASE_MODEL.into(),
        context_tokens: u32::MAX,
        vocabulary: 1,
        has_chat_template: true,
    };
    let reward = RewardModel {
        name: REWARD_MODEL.into(),
        objectives: Vec::new(),
        backbone: REWARD_MODEL.into(),
        method: "plain".into(),
        single_objective: false,
        ..RewardModel::default()
    };
    Arc::new(Member {
        id: MemberId(format!("{role}-{index:06}")),
        generation: Generation(1),
        role,
        address: String::new(),
        tokenizer: None,
        vocabulary: 1,
        capacity: 1,
        base_model: (role == Role::Base).then_some(base),
        reward_models: if role == Role::Reward { vec![reward] } else { Vec::new() },
        group: String::new(),
        rank: 0,
        size: 1,
        adapter_faults: Vec::new(),
    })
}

fn index_of(member: &MemberId) -> usize {
    let (_, index) = member.0.rsplit_once('-').expect("a member is named after its index");
    index.parse().expect("a member is named after its index")
}

fn request(guidance: Vec<GuidanceTerm>) -> GenerateRequest {
    GenerateRequest {
        request_id: String::new(),
        model: BASE_MODEL.into(),
        input: Input::Tokens(Vec::new()),
        sampling: Sampling::default(),
        guidance,
        base_strength: 1.0,
        on_reward_loss: OnRewardLoss::Wait,
        priority: uniarm_proto::Priority::Normal,
        exchange: None,
        skip: 0,
        audit: false,
    }
}
