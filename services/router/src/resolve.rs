//! Which reward model a guidance term means. Pure.
//!
//! Reward models of the store's catalogue are served as NAME@VERSION. A request that says NAME gets the newest version that
//! is not retired, once: what it was answered with first, it is answered with to its end, wherever that is.

use std::collections::BTreeSet;

use uniarm_proto::{GuidanceTerm, Refusal, RewardModel};

/// Names of served things that a refusal lists; more would hide the sentence.
const NAMES_LISTED_MAX: usize = 12;

/// The reward models that somebody may use.
#[derive(Debug)]
pub struct Rewards<'a> {
    /// Each once, whoever serves it, with those that new requests do not get by their names.
    all: Vec<&'a RewardModel>,
    /// What names mean: of each, what is served by that very name, or the newest version that somebody has not retired.
    current: Vec<&'a RewardModel>,
}

// === impl Rewards ===

impl<'a> Rewards<'a> {
    /// Of all that workers serve, in the order of the workers.
    pub(crate) fn of(served: impl Iterator<Item = &'a RewardModel>) -> Self {
        let (mut all, mut current): (Vec<&RewardModel>, Vec<&RewardModel>) = (Vec::new(), Vec::new());
        let mut seen = BTreeSet::new();
        for reward in served {
            if seen.insert(reward.name.as_str()) {
                all.push(reward);
            }
            if reward.retired {
                continue;
            }
            match current.iter_mut().find(|known| known.bare_name() == reward.bare_name()) {
                // A name that was there before anybody put a version of it goes on to mean what it meant.
                Some(known)
                    if known.version > 0 && (reward.version == 0 || reward.version > known.version) =>
                {
                    *known = reward;
                }
                Some(_) => {}
                None => current.push(reward),
            }
        }
        Self { all, current }
    }

    /// What names mean now, each once.
    #[must_use]
    pub fn current(&self) -> &[&'a RewardModel] {
        &self.current
    }

    /// By its bare name, or, retired or not, as NAME@VERSION.
    fn named(&self, name: &str) -> Option<&'a RewardModel> {
        let bare = self.current.iter().find(|reward| reward.bare_name() == name);
        bare.or_else(|| self.all.iter().find(|reward| reward.name == name)).copied()
    }

    fn names(&self) -> BTreeSet<String> {
        self.current.iter().map(|reward| reward.bare_name().to_owned()).collect()
    }
}

/// Gives every term a reward model. A preference over several prompted models becomes a term for each of them.
pub(crate) fn resolve_guidance(
    rewards: &Rewards<'_>,
    asked: Vec<GuidanceTerm>,
) -> Result<Vec<GuidanceTerm>, Refusal> {
    if rewards.all.is_empty() && !asked.is_empty() {
        return Err(Refusal::unavailable("no_reward_worker", "no reward worker is registered yet"));
    }
    let mut resolved = Vec::with_capacity(asked.len());
    for (index, term) in asked.into_iter().enumerate() {
        resolve_term(rewards, index, term, &mut resolved)?;
    }
    Ok(resolved)
}

fn resolve_term(
    rewards: &Rewards<'_>,
    index: usize,
    mut term: GuidanceTerm,
    resolved: &mut Vec<GuidanceTerm>,
) -> Result<(), Refusal> {
    let field = |name: &str| format!("guidance[{index}].{name}");
    if !term.reward.is_empty() {
        let Some(reward) = rewards.named(&term.reward) else {
            return Err(Refusal::not_found(field("reward"), unknown(&term.reward, &rewards.names())));
        };
        check_objectives(reward, &term).map_err(|reason| Refusal::invalid(field("preference"), reason))?;
        term.reward.clone_from(&reward.name);
        resolved.push(term);
        return Ok(());
    }
    if term.preference.is_empty() {
        let [only] = rewards.current[..] else {
            let names = list(&rewards.names());
            let reason = format!("is empty, and so is the preference; several are served: {names}");
            return Err(Refusal::invalid(field("reward"), reason));
        };
        term.reward.clone_from(&only.name);
        check_objectives(only, &term).map_err(|reason| Refusal::invalid(field("preference"), reason))?;
        resolved.push(term);
        return Ok(());
    }
    let serves_all = |reward: &&&RewardModel| term.preference.iter().all(|(name, _)| reward.serves(name));
    let rewards = &rewards.current;
    if let Some(reward) = rewards.iter().find(serves_all) {
        term.reward.clone_from(&reward.name);
        resolved.push(term);
        return Ok(());
    }
    let total: f32 = term.preference.iter().map(|(_, weight)| weight).sum();
    for (objective, weight) in &term.preference {
        let stands_for = |reward: &&&RewardModel| reward.single_objective && reward.serves(objective);
        let Some(reward) = rewards.iter().find(stands_for) else {
            let known = rewards.iter().flat_map(|r| r.objectives.iter().map(|o| o.name.clone())).collect();
            let reason = if rewards.iter().any(|reward| reward.serves(objective)) {
                format!("no single reward model serves all of {:?}", names_of(&term.preference))
            } else {
                format!("objective {}", unknown(objective, &known))
            };
            return Err(Refusal::invalid(field("preference"), reason));
        };
        if *weight > 0.0 {
            resolved.push(GuidanceTerm {
                reward: reward.name.clone(),
                preference: vec![(objective.clone(), 1.0)],
                strength: term.strength * weight / total,
            });
        }
    }
    Ok(())
}

fn check_objectives(reward: &RewardModel, term: &GuidanceTerm) -> Result<(), String> {
    let known: BTreeSet<String> = reward.objectives.iter().map(|o| o.name.clone()).collect();
    if let Some((objective, _)) = term.preference.iter().find(|(name, _)| !known.contains(name)) {
        if known.is_empty() {
            return Err(format!("reward {:?} has no objectives: send no preference", reward.name));
        }
        return Err(format!("objective {}", unknown(objective, &known)));
    }
    if term.preference.is_empty() && known.len() > 1 {
        return Err(format!("is missing; reward {:?} wants weights for {}", reward.name, list(&known)));
    }
    Ok(())
}

fn names_of(preference: &[(String, f32)]) -> Vec<&str> {
    preference.iter().map(|(name, _)| name.as_str()).collect()
}

pub(crate) fn unknown(asked: &str, known: &BTreeSet<String>) -> String {
    if known.is_empty() {
        return format!("{asked:?} is not served, nor is anything else");
    }
    let nearest = known.iter().min_by_key(|name| edit_distance(asked, name));
    match nearest.filter(|name| edit_distance(asked, name) <= asked.len().div_ceil(2)) {
        Some(nearest) => {
            format!("{asked:?} is not served; did you mean {nearest:?}? Served: {}", list(known))
        }
        None => format!("{asked:?} is not served. Served: {}", list(known)),
    }
}

pub(crate) fn list(names: &BTreeSet<String>) -> String {
    let shown: Vec<&str> = names.iter().take(NAMES_LISTED_MAX).map(String::as_str).collect();
    let more = if names.len() > NAMES_LISTED_MAX { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// Levenshtein distance over bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use uniarm_proto::Objective;

    use super::*;

    /// Of each: a name, its version, whether it is retired, and its objective.
    fn models(models: &[(&str, u64, bool, &str)]) -> Vec<RewardModel> {
        let model = |(name, version, retired, objective): &(&str, u64, bool, &str)| RewardModel {
            name: if *version > 0 { format!("{name}@{version}") } else { (*name).to_owned() },
            version: *version,
            retired: *retired,
            objectives: vec![Objective { name: (*objective).to_owned(), description: String::new() }],
            single_objective: true,
            ..RewardModel::default()
        };
        models.iter().map(model).collect()
    }

    fn resolved(served: &[RewardModel], reward: &str, objective: &str) -> Result<String, Refusal> {
        let preference = if objective.is_empty() { vec![] } else { vec![(objective.to_owned(), 1.0)] };
        let term = GuidanceTerm { reward: reward.to_owned(), preference, strength: 1.0 };
        resolve_guidance(&Rewards::of(served.iter()), vec![term]).map(|mut terms| terms.swap_remove(0).reward)
    }

    #[test]
    fn a_name_means_its_newest_version_that_is_not_retired() {
        let served = models(&[
            ("my", 9, false, "kind"), // of a worker that has not heard of the tenth yet
            ("my", 10, false, "kind"),
            ("my", 11, true, "kind"),
            ("other", 3, false, "short"),
        ]);
        assert_eq!(resolved(&served, "my", "").unwrap(), "my@10");
        assert_eq!(resolved(&served, "my@9", "").unwrap(), "my@9");
        assert_eq!(resolved(&served, "my@11", "").unwrap(), "my@11");
        assert_eq!(resolved(&served, "", "kind").unwrap(), "my@10");
        assert_eq!(resolved(&served, "other", "").unwrap(), "other@3");
        let refusal = resolved(&served, "my@12", "").unwrap_err();
        assert!(refusal.message.contains("Served: my, other"), "{refusal}");
        let refusal = resolved(&served, "mi", "").unwrap_err();
        assert!(refusal.message.contains("did you mean \"my\""), "{refusal}");
    }

    #[test]
    fn old_versions_are_not_in_the_way_of_requests_that_name_none() {
        let served = models(&[("my", 1, true, "kind"), ("my", 2, false, "short")]);
        assert_eq!(resolved(&served, "", "").unwrap(), "my@2", "the only one");
        assert!(resolved(&served, "", "kind").unwrap_err().message.contains("kind"), "nobody serves it now");
        let none = models(&[("my", 1, true, "kind")]);
        assert!(resolved(&none, "my", "").unwrap_err().message.contains("nor is anything else"));
    }

    #[test]
    fn a_name_of_a_command_line_goes_on_to_mean_what_it_meant() {
        for order in [[0, 1], [1, 0]] {
            let both = models(&[("my", 0, false, "kind"), ("my", 1, false, "kind")]);
            let served = order.map(|index| both[index].clone());
            assert_eq!(resolved(&served, "my", "").unwrap(), "my");
            assert_eq!(resolved(&served, "my@1", "").unwrap(), "my@1");
        }
        // An old worker's name that looks like a version is none.
        let served = models(&[("a@b", 0, false, "kind")]);
        assert_eq!(resolved(&served, "a@b", "").unwrap(), "a@b");
    }

    #[test]
    fn a_list_of_names_lets_all_versions_in_and_one_of_versions_that_one() {
        use uniarm_cluster::Snapshot;
        use uniarm_proto::{Member, MemberId, Role};

        use crate::place::Scope;

        let reward_models =
            models(&[("my", 1, true, "kind"), ("my", 2, false, "kind"), ("x", 1, false, "kind")]);
        let worker = Member { id: MemberId("r".into()), reward_models, ..Member::new(Role::Reward) };
        let snapshot = Snapshot::new([std::sync::Arc::new(worker)], 1);
        let allowed = |names: &[&str], asked: &str| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let scope = Scope::only(None, Some(names));
            scope.reward_models(&snapshot).named(asked).map(|reward| reward.name.clone())
        };
        assert_eq!(allowed(&["my"], "my").as_deref(), Some("my@2"));
        assert_eq!(allowed(&["my"], "my@1").as_deref(), Some("my@1"));
        assert_eq!(allowed(&["my@1"], "my@1").as_deref(), Some("my@1"));
        assert_eq!(allowed(&["my@1"], "my"), None);
        assert_eq!(allowed(&["my"], "x"), None);
    }
}
