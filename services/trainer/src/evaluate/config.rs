//! An evaluation as its TOML file says it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use super::method::MethodConfig;
use crate::{
    cluster_job::ModelsConfig,
    prompts::PromptFormat,
    scoring::{self, ObjectiveConfig},
};

/// Steps of the grid between two corners; the lattice of k objectives has C(steps + k − 1, k − 1) points.
const STEPS_MAX: usize = 100;

/// Paths are relative to the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// What the report calls it.
    pub title: String,
    /// The file of prompts.
    pub prompts: PathBuf,
    /// Which kind of file that is.
    #[serde(default)]
    pub format: PromptFormat,
    /// One answer to each prompt for each of them. All methods and preferences use the same noise.
    pub seeds: Vec<u64>,
    /// Of the answers.
    pub temperature: f32,
    /// Of the answers: the share of probability that tokens are drawn from.
    #[serde(default = "one")]
    pub top_p: f32,
    /// Tokens of an answer, at most.
    pub max_tokens: u32,
    /// w, where a method has none of its own.
    #[serde(default = "one")]
    pub strength: f32,
    /// Steps of the grid from one corner to the next.
    #[serde(default = "ten")]
    pub steps: usize,
    /// Resamples of the prompts behind each interval.
    #[serde(default = "thousand")]
    pub resamples: u32,
    /// Prompts whose answers the page shows side by side.
    #[serde(default = "three")]
    pub examples: usize,
    /// The axes of the front.
    pub objectives: Vec<EvalObjective>,
    /// What is compared.
    pub methods: Vec<MethodConfig>,
    /// Which models answer.
    #[serde(default)]
    pub models: ModelsConfig,
}

/// An objective with its fixed scale: a reference taken from the compared methods would make the numbers depend on who is
/// in the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalObjective {
    /// What preferences and the report call it.
    pub name: String,
    /// As `uniarm oracle` takes it: `vader`, `brevity`, `classifier:FOLDER`, …
    pub oracle: String,
    /// Coordinate of the hypervolume's reference point; 0 of the normalised scale.
    pub reference: f64,
    /// 1 of the normalised scale.
    pub ideal: f64,
}

fn one() -> f32 {
    1.0
}

fn ten() -> usize {
    10
}

fn thousand() -> u32 {
    1000
}

fn three() -> usize {
    3
}

// === impl EvalConfig ===

impl EvalConfig {
    /// # Errors
    /// Names the file and the place, or the field that is wrong.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let config: Self = toml::from_str(&text).with_context(|| file.display().to_string())?;
        config.check().with_context(|| file.display().to_string())?;
        Ok(config)
    }

    pub(super) fn check(&self) -> anyhow::Result<()> {
        scoring::check(&self.oracles(), 2)?;
        ensure!(!self.seeds.is_empty(), "seeds: is empty; one seed gives one answer to each prompt");
        ensure!((1..=STEPS_MAX).contains(&self.steps), "steps: is {}, wants 1 to {STEPS_MAX}", self.steps);
        ensure!(self.resamples > 0, "resamples: is 0; intervals need some, a thousand is usual");
        for (index, objective) in self.objectives.iter().enumerate() {
            let (low, high) = (objective.reference, objective.ideal);
            if !(low.is_finite() && high.is_finite() && low < high) {
                bail!("objectives[{index}]: reference {low} must be below ideal {high}");
            }
        }
        ensure!(!self.methods.is_empty(), "methods: is empty");
        for (index, method) in self.methods.iter().enumerate() {
            if self.methods[..index].iter().any(|other| other.name == method.name) {
                bail!("methods[{index}].name: {:?} stands there twice", method.name);
            }
            method.check(self).with_context(|| format!("methods[{index}] {:?}", method.name))?;
        }
        Ok(())
    }

    pub fn oracles(&self) -> Vec<ObjectiveConfig> {
        let plain = |objective: &EvalObjective| ObjectiveConfig {
            name: objective.name.clone(),
            oracle: objective.oracle.clone(),
        };
        self.objectives.iter().map(plain).collect()
    }
}
