//! Where a request goes. Pure: a snapshot, what is under way, and dice are arguments.

use std::collections::BTreeSet;

use uniarm_cluster::Snapshot;
use uniarm_proto::{
    BaseModel, GenerateRequest, GuidanceTerm, Member, MemberId, Placed, Progress, Refusal, RewardModel,
    RewardWorker, Role,
};

use crate::resolve::{Rewards, list, resolve_guidance, unknown};

/// Reward workers that a placement names for a term. A request that has lost so many meets a cluster without reward
/// workers; the names of a thousand would be 60 KB in every request.
const REWARD_WORKERS_MAX: usize = 16;

/// The served names that somebody may use; all others are as if nobody served them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    base_models: Option<BTreeSet<String>>,
    reward_models: Option<BTreeSet<String>>,
}

/// What this router has under way on a member.
pub trait Loads {
    fn under_way(&self, member: &MemberId) -> usize;
}

/// A base worker and the request as that worker will get it.
#[derive(Debug)]
pub struct Placement {
    pub base: std::sync::Arc<Member>,
    pub placed: Placed,
}

// === impl Scope ===

impl Scope {
    /// Whatever is served.
    #[must_use]
    pub fn everything() -> &'static Self {
        static EVERYTHING: Scope = Scope::only(None, None);
        &EVERYTHING
    }

    /// `None`: all.
    #[must_use]
    pub const fn only(
        base_models: Option<BTreeSet<String>>,
        reward_models: Option<BTreeSet<String>>,
    ) -> Self {
        Self { base_models, reward_models }
    }

    /// What is served of it.
    pub fn base_models<'a>(&self, snapshot: &'a Snapshot) -> impl Iterator<Item = &'a BaseModel> {
        let members = snapshot.with_role(Role::Base);
        members.filter_map(|member| member.base_model.as_ref()).filter(|model| self.has_base(model))
    }

    /// What is served of it.
    pub fn reward_models<'a>(&self, snapshot: &'a Snapshot) -> Rewards<'a> {
        let served = snapshot.with_role(Role::Reward).flat_map(|member| &member.reward_models);
        Rewards::of(served.filter(|reward| self.has_reward(reward)))
    }

    pub(crate) fn has_base(&self, model: &BaseModel) -> bool {
        self.base_models.as_ref().is_none_or(|names| names.contains(&model.name))
    }

    /// A name means all of its versions; NAME@VERSION means that one.
    pub(crate) fn has_reward(&self, reward: &RewardModel) -> bool {
        let names = self.reward_models.as_ref();
        names.is_none_or(|names| names.contains(&reward.name) || names.contains(reward.bare_name()))
    }
}

/// Chooses a base worker that serves the request's model, and the reward workers for each of its terms. `dice` are two
/// random numbers; members in `avoid` have failed this request already.
///
/// # Errors
/// When a name is not served (the field is named, and the nearest valid name), or nobody is there to serve it.
pub fn place(
    (snapshot, scope): (&Snapshot, &Scope),
    request: &GenerateRequest,
    loads: &dyn Loads,
    dice: [u32; 2],
    avoid: &BTreeSet<MemberId>,
) -> Result<Placement, Refusal> {
    let base = choose_base((snapshot, scope), &request.model, loads, dice, avoid)?;
    let mut request = request.clone();
    if let Some(served) = &base.base_model {
        request.model.clone_from(&served.name);
    }
    request.guidance = resolve_guidance(&scope.reward_models(snapshot), request.guidance)?;
    let placements = request.guidance.iter().map(|term| workers(snapshot, term, loads, dice[1])).collect();
    let progress = Progress::default();
    Ok(Placement {
        placed: Placed { request, progress, placements, generation: base.generation, tenant: 0 },
        base,
    })
}

/// Chooses again for a request whose base worker was lost. Names stay resolved as they were. A term that nobody serves
/// now keeps the workers that it had: whether to wait for them is the request's to say, and the base worker's to do.
///
/// # Errors
/// When no base worker is there to take it.
pub fn place_again(
    snapshot: &Snapshot,
    placed: &Placed,
    loads: &dyn Loads,
    dice: [u32; 2],
    avoid: &BTreeSet<MemberId>,
) -> Result<Placement, Refusal> {
    // Whoever asks might use it when the request began.
    let base = choose_base((snapshot, Scope::everything()), &placed.request.model, loads, dice, avoid)?;
    let mut placed = Placed { generation: base.generation, ..placed.clone() };
    for (term, known) in placed.request.guidance.iter().zip(&mut placed.placements) {
        let now = workers(snapshot, term, loads, dice[1]);
        if !now.is_empty() {
            *known = now;
        }
    }
    Ok(Placement { placed, base })
}

/// Reward workers that serve a term, best first.
fn workers(snapshot: &Snapshot, term: &GuidanceTerm, loads: &dyn Loads, die: u32) -> Vec<RewardWorker> {
    let mut workers: Vec<_> =
        snapshot.with_role(Role::Reward).filter(|member| serving(member, &term.reward).is_some()).collect();
    // Equals stand in an order of their own for each request: several routers, each of which knows only its own load,
    // would else all begin with the same workers.
    let first = die as usize % workers.len().max(1);
    workers.rotate_left(first);
    // Cached: looking a load up takes a lock.
    workers.sort_by_cached_key(|member| loads.under_way(&member.id));
    workers.into_iter().take(REWARD_WORKERS_MAX).map(|member| member.as_reward_worker()).collect()
}

/// The less loaded of two random ones: as good as the least loaded of all, without every router choosing the same.
fn choose_base(
    (snapshot, scope): (&Snapshot, &Scope),
    model: &str,
    loads: &dyn Loads,
    dice: [u32; 2],
    avoid: &BTreeSet<MemberId>,
) -> Result<std::sync::Arc<Member>, Refusal> {
    let served: BTreeSet<String> = scope.base_models(snapshot).map(|served| served.name.clone()).collect();
    if served.is_empty() {
        return Err(Refusal::unavailable("no_base_worker", "no base worker is registered yet"));
    }
    let model = match (model, served.len()) {
        ("", 1) => served.first().expect("it has one").clone(),
        ("", _) => {
            return Err(Refusal::invalid(
                "model",
                format!("is empty, and several are served: {}", list(&served)),
            ));
        }
        (asked, _) => asked.to_owned(),
    };
    if !served.contains(&model) {
        return Err(Refusal::not_found("model", unknown(&model, &served)));
    }
    let candidates: Vec<_> = snapshot
        .with_role(Role::Base)
        .filter(|member| member.base_model.as_ref().is_some_and(|served| served.name == model))
        .filter(|member| !avoid.contains(&member.id))
        .collect();
    if candidates.is_empty() {
        return Err(Refusal::unavailable(
            "base_lost",
            format!("no base worker of {model} could take the request"),
        ));
    }
    let drawn = dice.map(|die| candidates[die as usize % candidates.len()]);
    let [first, second] = drawn;
    let better = if loads.under_way(&second.id) < loads.under_way(&first.id) { second } else { first };
    Ok(std::sync::Arc::clone(better))
}

fn serving<'a>(member: &'a Member, reward: &str) -> Option<&'a RewardModel> {
    member.reward_models.iter().find(|served| served.name == reward)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uniarm_proto::{BaseModel, Code, Generation, Input, Objective, OnRewardLoss, Sampling};

    use super::*;

    struct Idle;

    impl Loads for Idle {
        fn under_way(&self, _: &MemberId) -> usize {
            0
        }
    }

    struct Busy(&'static str);

    impl Loads for Busy {
        fn under_way(&self, member: &MemberId) -> usize {
            usize::from(member.0 == self.0)
        }
    }

    fn member(id: &str, role: Role) -> Member {
        Member {
            id: MemberId(id.into()),
            generation: Generation(7),
            role,
            address: format!("{id}:1"),
            tokenizer: None,
            vocabulary: 10,
            capacity: 1,
            base_model: None,
            reward_models: Vec::new(),
            group: String::new(),
            rank: 0,
            size: 1,
            adapter_faults: Vec::new(),
        }
    }

    fn base(id: &str, model: &str) -> Arc<Member> {
        let base_model =
            BaseModel { name: model.into(), context_tokens: 10, vocabulary: 10, has_chat_template: true };
        Arc::new(Member { base_model: Some(base_model), ..member(id, Role::Base) })
    }

    fn reward(id: &str, models: &[(&str, &[&str])]) -> Arc<Member> {
        let reward_models = models
            .iter()
            .map(|(name, objectives)| RewardModel {
                name: (*name).into(),
                objectives: objectives
                    .iter()
                    .map(|o| Objective { name: (*o).into(), description: String::new() })
                    .collect(),
                backbone: "b".into(),
                method: "prompted".into(),
                single_objective: objectives.len() == 1,
                ..RewardModel::default()
            })
            .collect();
        Arc::new(Member { reward_models, ..member(id, Role::Reward) })
    }

    fn request(guidance: Vec<GuidanceTerm>) -> GenerateRequest {
        GenerateRequest {
            request_id: "r".into(),
            model: String::new(),
            input: Input::Prompt("x".into()),
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

    fn term(reward: &str, preference: &[(&str, f32)]) -> GuidanceTerm {
        GuidanceTerm {
            reward: reward.into(),
            preference: preference.iter().map(|(name, weight)| ((*name).into(), *weight)).collect(),
            strength: 2.0,
        }
    }

    fn cluster() -> Snapshot {
        let members = [
            base("b1", "m"),
            base("b2", "m"),
            reward("r1", &[("ham", &["harmless"]), ("help", &["helpful"])]),
            reward("r2", &[("uni", &["positive", "concise"])]),
        ];
        Snapshot::new(members, 1)
    }

    fn placed(guidance: Vec<GuidanceTerm>) -> Result<Placement, Refusal> {
        place((&cluster(), Scope::everything()), &request(guidance), &Idle, [0, 1], &BTreeSet::new())
    }

    #[test]
    fn what_somebody_may_not_use_is_as_if_nobody_served_it() {
        let cluster = cluster();
        let only = |base: &[&str], rewards: &[&str]| {
            let set = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
            Scope::only(set(base), set(rewards))
        };
        let all = Scope::everything().reward_models(&cluster);
        let (first, second) = (&all.current()[0].name, &all.current()[1].name);
        let ask = |scope: &Scope, guidance| {
            place((&cluster, scope), &request(guidance), &Idle, [0, 1], &BTreeSet::new())
        };
        let named =
            |name: &str| vec![GuidanceTerm { reward: name.to_owned(), preference: vec![], strength: 1.0 }];
        let refusal = ask(&only(&["other"], &[]), vec![]).unwrap_err();
        assert_eq!(refusal.cause, "no_base_worker");
        let base = &Scope::everything().base_models(&cluster).next().unwrap().name;
        let scope = only(&[base.as_str()], &[first.as_str()]);
        let refusal = ask(&scope, named(second)).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("guidance[0].reward"));
        assert!(refusal.message.contains(first) && !refusal.message.ends_with(second), "{refusal}");
    }

    #[test]
    fn a_request_placed_again_keeps_its_resolved_terms_and_the_workers_that_nobody_replaces() {
        let before = placed(vec![term("", &[("harmless", 3.0), ("helpful", 1.0)])]).unwrap().placed;
        let without_rewards = Snapshot::new([base("b3", "m")], 2);
        let again = place_again(&without_rewards, &before, &Idle, [0, 0], &BTreeSet::new()).unwrap();
        assert_eq!((again.base.id.0.as_str(), &again.placed.request), ("b3", &before.request));
        assert_eq!(again.placed.placements, before.placements);
        // Another reward would serve the whole preference by itself now: that would be another answer.
        let both = reward("r3", &[("ham", &["harmless"]), ("both", &["harmless", "helpful"])]);
        let richer = Snapshot::new([base("b3", "m"), both], 3);
        let again = place_again(&richer, &before, &Idle, [0, 0], &BTreeSet::new()).unwrap();
        assert_eq!(again.placed.request, before.request);
        assert_eq!(again.placed.placements[0][0].member.0, "r3");
        assert_eq!(again.placed.placements[1], before.placements[1]);
    }

    fn versions(id: &str, versions: &[(u64, bool)]) -> Arc<Member> {
        let version = |(version, retired): &(u64, bool)| RewardModel {
            name: format!("my@{version}"),
            version: *version,
            retired: *retired,
            ..RewardModel::default()
        };
        let reward_models = versions.iter().map(version).collect();
        Arc::new(Member { reward_models, ..member(id, Role::Reward) })
    }

    /// The whole life of a stream over two versions: what it began with it keeps, wherever it goes.
    #[test]
    fn a_request_keeps_the_version_that_it_was_placed_with() {
        let mine = |snapshot: &Snapshot, reward: &str| {
            let request = request(vec![term(reward, &[])]);
            let placed = place((snapshot, Scope::everything()), &request, &Idle, [0, 0], &BTreeSet::new());
            placed.map(|placement| placement.placed)
        };
        let first = Snapshot::new([base("b1", "m"), versions("r1", &[(1, false)])], 1);
        let begun = mine(&first, "my").unwrap();
        assert_eq!(begun.request.guidance[0].reward, "my@1");
        // One worker has the next version already, the other not yet.
        let both = [versions("r1", &[(1, true), (2, false)]), versions("r2", &[(1, false)])];
        let second = Snapshot::new(both.into_iter().chain([base("b1", "m")]), 2);
        let next = mine(&second, "my").unwrap();
        assert_eq!(next.request.guidance[0].reward, "my@2");
        assert_eq!(next.placements[0].len(), 1, "who has it");
        let again = place_again(&second, &begun, &Idle, [0, 0], &BTreeSet::new()).unwrap().placed;
        assert_eq!(again.request.guidance[0].reward, "my@1");
        assert_eq!(again.placements[0].len(), 2);
        assert_eq!(mine(&second, "my@1").unwrap().placements, again.placements, "as its client repeats it");
        // Removed: nobody begins with it, and what has begun goes on.
        let removed = Snapshot::new([base("b1", "m"), versions("r1", &[(1, true), (2, true)])], 3);
        let refusal = mine(&removed, "my").unwrap_err();
        assert_eq!((refusal.code, refusal.field.as_deref()), (Code::NotFound, Some("guidance[0].reward")));
        assert_eq!(mine(&removed, "my@2").unwrap().request.guidance[0].reward, "my@2");
    }

    #[test]
    fn one_reward_that_serves_every_objective_is_preferred() {
        let placement = placed(vec![term("", &[("concise", 0.5), ("positive", 0.5)])]).unwrap();
        assert_eq!(placement.placed.request.guidance[0].reward, "uni");
        assert_eq!(placement.placed.placements[0][0].address, "r2:1");
        assert_eq!(placement.placed.generation, Generation(7));
    }

    #[test]
    fn prompted_rewards_share_a_mixed_preference_as_terms_of_their_own() {
        let placement = placed(vec![term("", &[("harmless", 3.0), ("helpful", 1.0)])]).unwrap();
        let terms = placement.placed.request.guidance;
        let split: Vec<_> = terms.iter().map(|t| (t.reward.as_str(), t.strength)).collect();
        assert_eq!(split, [("ham", 1.5), ("help", 0.5)]);
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_nearest_valid_one() {
        let refusal = placed(vec![term("", &[("harmles", 1.0)])]).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("guidance[0].preference"));
        assert!(refusal.message.contains("did you mean \"harmless\""), "{refusal}");

        let refusal = placed(vec![term("uno", &[("positive", 1.0)])]).unwrap_err();
        assert_eq!((refusal.code, refusal.field.as_deref()), (Code::NotFound, Some("guidance[0].reward")));

        let refusal = placed(vec![term("uni", &[("harmless", 1.0)])]).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("guidance[0].preference"));
    }

    /// Of equals another one stands first for each draw; the loaded one stands last for all; and nobody is named twice.
    #[test]
    fn a_term_names_few_reward_workers_in_an_order_of_each_request_s_own() {
        const WORKERS: usize = 20;
        let crowd = |count| {
            let rewards = (0..count).map(|index| reward(&format!("r{index:02}"), &[("ham", &["harmless"])]));
            Snapshot::new(rewards.chain([base("b1", "m")]), 1)
        };
        let names = |snapshot: &Snapshot, loads: &dyn Loads, draw| -> Vec<String> {
            let request = request(vec![term("ham", &[])]);
            let placement =
                place((snapshot, Scope::everything()), &request, loads, [0, draw], &BTreeSet::new()).unwrap();
            placement.placed.placements[0].iter().map(|worker| worker.member.0.clone()).collect()
        };
        let many = crowd(WORKERS);
        let firsts: BTreeSet<String> =
            (0..WORKERS as u32).map(|draw| names(&many, &Idle, draw).swap_remove(0)).collect();
        assert_eq!(firsts.len(), WORKERS, "every worker comes first for some request");
        for draw in [0, 7, u32::MAX] {
            let named = names(&many, &Busy("r03"), draw);
            assert_eq!(named.len(), REWARD_WORKERS_MAX);
            assert_eq!(named.iter().collect::<BTreeSet<_>>().len(), REWARD_WORKERS_MAX);
            assert!(!named.contains(&"r03".to_owned()), "nineteen idle workers stand before it");
            let few = names(&crowd(5), &Busy("r03"), draw);
            assert_eq!((few.len(), few[4].as_str()), (5, "r03"));
        }
    }

    #[test]
    fn the_less_loaded_of_two_base_workers_is_chosen_and_failed_ones_are_avoided() {
        let none = BTreeSet::new();
        let chosen =
            place((&cluster(), Scope::everything()), &request(vec![]), &Busy("b1"), [0, 1], &none).unwrap();
        assert_eq!(chosen.base.id.0, "b2");
        let failed = BTreeSet::from([MemberId("b2".into())]);
        let chosen =
            place((&cluster(), Scope::everything()), &request(vec![]), &Busy("b1"), [0, 1], &failed).unwrap();
        assert_eq!(chosen.base.id.0, "b1");
        let all = BTreeSet::from([MemberId("b1".into()), MemberId("b2".into())]);
        let refusal =
            place((&cluster(), Scope::everything()), &request(vec![]), &Idle, [0, 1], &all).unwrap_err();
        assert_eq!(refusal.code, Code::Unavailable);
    }
}
