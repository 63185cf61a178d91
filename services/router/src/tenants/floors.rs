//! Preference floors: what a tenant's requests may never weigh less. Pure.
//!
//! The tokens of a request are chosen by base_strength · z_base + Σ strength · z_reward(preference). The *share* of an
//! objective is Σ strength · its normalised weight, over Σ |strength|: it cannot be had by a negative strength, by many
//! terms, by weights of any scale, or by another objective that a request calls by its name, for names are those that
//! served reward models have. That guidance counts at all is what `guidance_min` asks: Σ |strength| over the base
//! model's own. And no token may go unguided.

use uniarm_proto::{GenerateRequest, GuidanceTerm, OnRewardLoss, Refusal};

use super::config::Rights;

/// Shares are sums of f32.
const ROUNDING: f64 = 1e-5;

/// `request` has been placed: each term names its reward model.
pub(super) fn check(rights: &Rights, request: &GenerateRequest) -> Result<(), Refusal> {
    if rights.floors.values().all(|floor| *floor == 0.0) {
        return Ok(());
    }
    let tenant = &rights.name;
    if request.on_reward_loss == OnRewardLoss::Unguided {
        let reason = format!("may not be UNGUIDED: the floors of {tenant} hold for every token");
        return Err(Refusal::denied("on_reward_loss", reason));
    }
    // Plus zero: a sum of nothing is -0.0, and would be shown so.
    let total = request.guidance.iter().map(|term| f64::from(term.strength).abs()).sum::<f64>() + 0.0;
    let wanted = f64::from(rights.guidance_min) * f64::from(request.base_strength);
    if total == 0.0 || total < wanted * (1.0 - ROUNDING) {
        let base = request.base_strength;
        let reason = format!(
            "has a strength of {total} in all, {tenant} wants {wanted} beside a base model of {base}"
        );
        return Err(Refusal::denied("guidance", reason));
    }
    for (objective, floor) in &rights.floors {
        let given: f64 = request.guidance.iter().map(|term| weight(term, objective)).sum();
        let share = given / total + 0.0;
        if share < f64::from(*floor) - ROUNDING {
            let reason =
                format!("gives {objective} {share:.3} of what steers, the floor of {tenant} is {floor}");
            return Err(Refusal::denied("guidance", reason));
        }
    }
    Ok(())
}

/// Strength times the normalised weight of an objective. A weight that is named twice counts as the sum.
fn weight(term: &GuidanceTerm, objective: &str) -> f64 {
    let sum = |weights: &mut dyn Iterator<Item = &(String, f32)>| {
        weights.map(|(_, weight)| f64::from(*weight)).sum::<f64>()
    };
    let all = sum(&mut term.preference.iter());
    let own = sum(&mut term.preference.iter().filter(|(name, _)| name == objective));
    if all > 0.0 { f64::from(term.strength) * own / all } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use uniarm_proto::Input;

    use super::*;

    fn term(strength: f32, preference: &[(&str, f32)]) -> GuidanceTerm {
        let preference = preference.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
        GuidanceTerm { reward: "r".into(), preference, strength }
    }

    fn ask(guidance: Vec<GuidanceTerm>) -> GenerateRequest {
        GenerateRequest { guidance, ..GenerateRequest::new(Input::Prompt("p".into())) }
    }

    fn rights(floor: f32) -> Rights {
        let key = "0".repeat(64);
        let file = format!(
            "[[tenants]]\nname = 't'\nkeys = ['sha256:{key}']\n[tenants.floors]\nharmless = {floor}\n"
        );
        super::super::config::parse(&file).unwrap().tenants.remove(0).rights
    }

    #[test]
    fn a_share_at_the_floor_is_enough_however_it_is_made_up() {
        let rights = rights(0.3);
        for guidance in [
            vec![term(1.0, &[("harmless", 0.3), ("helpful", 0.7)])],
            vec![term(5.0, &[("harmless", 30.0), ("helpful", 70.0)])],
            vec![term(0.3, &[("harmless", 1.0)]), term(0.7, &[("helpful", 1.0)])],
            vec![term(1.0, &[("harmless", 1.0)])],
            vec![term(1.0, &[("harmless", 1.0)]), term(-1.0, &[("rude", 1.0)])],
        ] {
            check(&rights, &ask(guidance.clone()))
                .unwrap_or_else(|refusal| panic!("{guidance:?}: {refusal}"));
        }
    }

    #[test]
    fn no_way_around_a_floor_is_open() {
        let rights = rights(0.3);
        let denied = |request: GenerateRequest| check(&rights, &request).unwrap_err();
        for guidance in [
            vec![],
            vec![term(1.0, &[("harmless", 0.29), ("helpful", 0.71)])],
            vec![term(1.0, &[("helpful", 1.0)])],
            vec![term(1.0, &[("Harmless", 1.0)])],
            vec![term(1.0, &[("harmless ", 1.0)])],
            vec![term(-1.0, &[("harmless", 1.0)])],
            vec![term(0.0, &[("harmless", 1.0)])],
            vec![term(0.001, &[("harmless", 1.0)])],
            vec![term(1.0, &[("harmless", 1.0)]), term(9.0, &[("helpful", 1.0)])],
            vec![term(1.0, &[("harmless", 1.0)]), term(-1.0, &[("harmless", 1.0)])],
            vec![term(1.0, &[])],
        ] {
            let refusal = denied(ask(guidance.clone()));
            assert_eq!(refusal.field.as_deref(), Some("guidance"), "{guidance:?}");
        }
        let guided = ask(vec![term(1.0, &[("harmless", 1.0)])]);
        let drowned = GenerateRequest { base_strength: 10.0, ..guided.clone() };
        assert_eq!(denied(drowned).field.as_deref(), Some("guidance"));
        let unguided = GenerateRequest { on_reward_loss: OnRewardLoss::Unguided, ..guided };
        assert_eq!(denied(unguided).field.as_deref(), Some("on_reward_loss"));
    }

    #[test]
    fn nothing_is_shown_as_0() {
        let shown = |guidance| check(&rights(0.3), &ask(guidance)).unwrap_err().to_string();
        let nothing = shown(vec![]);
        assert!(nothing.contains("a strength of 0 in all"), "{nothing}");
        let negative = shown(vec![term(-1.0, &[("harmless", 0.0), ("helpful", 1.0)])]);
        assert!(negative.contains("gives harmless 0.000"), "{negative}");
    }

    #[test]
    fn without_floors_everything_goes() {
        check(&rights(0.0), &ask(vec![])).unwrap();
    }
}
