//! Methods as requests: who weighs what at a point of the grid.

use std::collections::BTreeMap;

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};
use uniarm_proto::{GenerateRequest, GuidanceTerm};

use super::config::EvalConfig;

/// A table `[[methods]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MethodConfig {
    /// What the report calls it.
    pub name: String,
    /// Who weighs what.
    pub guidance: Guidance,
    /// `conditioned`: the reward model that takes the preference.
    pub reward: Option<String>,
    /// `separate`: a reward model for each objective.
    #[serde(default)]
    pub rewards: BTreeMap<String, String>,
    /// w; the evaluation's own without it.
    pub strength: Option<f32>,
    /// Answers to each prompt: only the evaluation's first so many seeds; all of them without it. A method without a front is
    /// cheap and may have many, a variant few.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answers: Option<usize>,
    /// A variant of another method: it has its place in the tables, and in a picture of variants.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub variant: bool,
    /// Weight of the base model's logits. 0: reward models alone.
    #[serde(default = "one")]
    pub base_strength: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Guidance {
    /// The base model as it is.
    None,
    /// The base model at T/(1 + w): what guidance by an untrained reward model would do.
    Sharpened,
    /// One reward model under the preference: UniARM, PARM, their controls; with base strength 0 Rewarded Soups, or the
    /// reward model alone.
    Conditioned,
    /// A reward model for each objective, with strength p_i · w: GenARM; with base strength 0 MOD.
    Separate,
}

fn one() -> f32 {
    1.0
}

// === impl MethodConfig ===

impl MethodConfig {
    /// Whether its answers depend on the preference; else one point of the plane is all there is.
    pub fn has_front(&self) -> bool {
        matches!(self.guidance, Guidance::Conditioned | Guidance::Separate)
    }

    /// Answers to each prompt at each point.
    pub fn seeds(&self, config: &EvalConfig) -> usize {
        self.answers.unwrap_or(config.seeds.len())
    }

    pub(super) fn check(&self, config: &EvalConfig) -> anyhow::Result<()> {
        if let Some(answers) = self.answers {
            let seeds = config.seeds.len();
            ensure!(
                (1..=seeds).contains(&answers),
                "answers: is {answers}, wants 1 to {seeds}, as many as seeds"
            );
        }
        let adapters = &config.models;
        let known =
            |name: &String| adapters.adapters.contains_key(name) || adapters.prompted.contains_key(name);
        match self.guidance {
            Guidance::None | Guidance::Sharpened => {
                ensure!(
                    self.reward.is_none() && self.rewards.is_empty() && self.base_strength == 1.0,
                    "the base model alone takes neither reward, rewards nor base_strength"
                );
                if self.guidance == Guidance::Sharpened && config.temperature == 0.0 {
                    bail!("greedy decoding cannot be sharpened; leave this method out, or set temperature");
                }
            }
            Guidance::Conditioned => match &self.reward {
                None => bail!("reward: is missing; name one of [models.adapters]"),
                Some(name) => ensure!(known(name), "reward: {name:?} is not in [models]"),
            },
            Guidance::Separate => {
                for objective in &config.objectives {
                    match self.rewards.get(&objective.name) {
                        None => bail!("rewards: has none for objective {:?}", objective.name),
                        Some(name) => ensure!(known(name), "rewards: {name:?} is not in [models]"),
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes an unguided request this method's at one preference.
    pub(super) fn guide(&self, request: &mut GenerateRequest, config: &EvalConfig, preference: &[f32]) {
        let strength = self.strength.unwrap_or(config.strength);
        let weights = config.objectives.iter().map(|objective| objective.name.clone()).zip(preference);
        request.base_strength = self.base_strength;
        match self.guidance {
            Guidance::None => {}
            Guidance::Sharpened => request.sampling.temperature /= 1.0 + strength,
            Guidance::Conditioned => {
                let preference = weights.map(|(name, weight)| (name, *weight)).collect();
                let reward = self.reward.clone().unwrap_or_default();
                request.guidance = vec![GuidanceTerm { reward, preference, strength }];
            }
            Guidance::Separate => {
                let term = |(name, weight): (String, &f32)| GuidanceTerm {
                    reward: self.rewards[&name].clone(),
                    preference: Vec::new(),
                    strength: weight * strength,
                };
                // A term without weight would only cost a session.
                request.guidance = weights.filter(|(_, weight)| **weight > 0.0).map(term).collect();
            }
        }
    }
}
