//! What a training run is: one TOML file. Every field but three has a default; a field that is not known is refused.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    loss::{Loss, Scalarisation},
    network::{AdapterConfig, DeviceName, Objective},
    pairs::{OnBadLine, tokens::Ties},
};

/// Most workers: beyond, adding up gradients costs more than a smaller slice saves.
const WORKERS_MAX: usize = 64;
/// Fields that say where things are. A run that moved is the same run: data and model have fingerprints.
const WHEREABOUTS: [&str; 5] = ["model", "pairs", "held_out", "out", "workers"];

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The frozen model under the adapter: a GGUF file, a Hugging Face folder or `hf://org/name`.
    pub model: String,
    /// Files of pairs (docs/pairs-format.md), relative to this file.
    pub pairs: Vec<PathBuf>,
    /// Run folder, relative to this file. Absent: `runs/NAME` in the working folder, NAME that of this file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,
    /// Of everything that is drawn: order, preferences, dropout, initial weights, what is held out.
    #[serde(default)]
    pub seed: u64,
    /// Which of the objectives a plain `lora` is trained for; of no use to the other methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<String>,
    /// Files of pairs that are evaluated and not trained on. Absent: `held_out_share` of `pairs`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<PathBuf>,
    /// Share of the pairs that is held out, whole conversations at a time, from 0 to 0.5. With 0 nothing is
    /// evaluated, and the last weights count as the best.
    #[serde(default = "tenth")]
    pub held_out_share: f64,
    /// Most pairs that are held out, or read from `held_out`: an evaluation runs each of them at every corner and at
    /// the centre.
    #[serde(default = "some_pairs")]
    pub held_out_max: usize,
    /// Text that takes the place of the conversations' own system messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Tokens of a prompt, at most; a longer pair is a bad line.
    #[serde(default = "prompt_tokens")]
    pub max_prompt_tokens: usize,
    /// Tokens of a prompt with the longer of its answers, at most; a longer pair is a bad line.
    #[serde(default = "all_tokens")]
    pub max_tokens: usize,
    /// `fail` or `skip`.
    #[serde(default)]
    pub on_bad_line: OnBadLine,
    /// Equal scores: `neutral` or `refuse`.
    #[serde(default)]
    pub ties: Ties,
    /// Pairs of one step, over all workers.
    #[serde(default = "batch")]
    pub batch: usize,
    /// Tokens of one pass of the network, at most; a batch is made of as many passes as it takes. This bounds memory.
    #[serde(default = "pass_tokens")]
    pub pass_tokens: usize,
    /// Times that every pair is seen. Not beside `steps`; 2 where neither is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Steps of the optimizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Steps between evaluations of the held-out pairs.
    #[serde(default = "evaluate_every")]
    pub evaluate_every: u64,
    /// Evaluations without a better loss after which training stops; 0: never.
    #[serde(default)]
    pub patience: u64,
    /// Steps between checkpoints.
    #[serde(default = "checkpoint_every")]
    pub checkpoint_every: u64,
    /// Whether each sample of a batch has a preference of its own, or all have the same.
    #[serde(default)]
    pub preference: PreferencePer,
    /// Parameter of the symmetric Dirichlet distribution that preferences are drawn from.
    #[serde(default = "half")]
    pub concentration: f64,
    /// Whether a pass keeps only the input of each layer, and computes the rest again for the gradient.
    #[serde(default)]
    pub checkpoint_activations: Switch,
    /// Processes among which each batch is divided.
    #[serde(default = "one")]
    pub workers: usize,
    /// `cpu`, `cuda` or `cuda:N`. It decides how sums are rounded, and is part of what a run is.
    #[serde(default, skip_serializing_if = "DeviceName::is_cpu")]
    #[schemars(with = "String")]
    pub device: DeviceName,
    /// Dimensions of the preference, in order.
    pub objectives: Vec<ObjectiveConfig>,
    /// The table `[loss]`.
    #[serde(default)]
    pub loss: LossConfig,
    /// The table `[optimizer]`.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// `method` = `moslora`, `pblora` or `lora`, `rank`, `alpha`, and whatever else `network::AdapterConfig` has but
    /// the objectives.
    #[schemars(with = "AdapterConfig")]
    pub adapter: toml::Table,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ObjectiveConfig {
    /// As the pairs name it.
    pub name: String,
    /// What it asks for, in words; conditioning by text embeds them.
    #[serde(default)]
    pub description: String,
    /// β_i of the loss.
    #[serde(default = "beta")]
    pub beta: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PreferencePer {
    #[default]
    PerSample,
    PerBatch,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Switch {
    /// On where the activations of a pass would take more than some gigabytes.
    #[default]
    Auto,
    On,
    Off,
}

/// See [`crate::loss`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// `"linear"` or `{ tchebycheff = { mu = 0.1 } }`.
    pub scalarisation: Scalarisation,
    /// λ, the weight of the loss of the mixed margin.
    pub global_weight: f64,
    /// β_g, the scale of the mixed margin.
    pub global_beta: f64,
    /// α, the weight of the likelihood of preferred answers.
    pub likelihood_weight: f64,
}

/// AdamW under a cosine schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The highest, after the warm-up.
    pub learning_rate: f64,
    /// Where the cosine ends, as a share of `learning_rate`.
    pub floor: f64,
    /// Steps in which the rate rises from nothing.
    pub warm_up_steps: u64,
    /// How much of the means of gradients and of their squares stays from step to step.
    pub betas: [f64; 2],
    /// Added to the root of the mean square, so that nothing is divided by zero.
    pub epsilon: f64,
    /// Share of the weights that a step at the rate 1 takes away.
    pub weight_decay: f64,
    /// Longest gradient; 0: any.
    pub clip_norm: f64,
}

fn tenth() -> f64 {
    0.1
}
fn some_pairs() -> usize {
    128
}
fn prompt_tokens() -> usize {
    512
}
fn all_tokens() -> usize {
    1024
}
fn batch() -> usize {
    32
}
fn pass_tokens() -> usize {
    2048
}
fn evaluate_every() -> u64 {
    25
}
fn checkpoint_every() -> u64 {
    25
}
fn half() -> f64 {
    0.5
}
fn one() -> usize {
    1
}
fn beta() -> f64 {
    0.01
}

// === impl TrainConfig ===

impl TrainConfig {
    /// Reads a file; paths in it become relative to the working folder, as `pairs` in the file are to the file.
    ///
    /// # Errors
    /// Names the file and the field.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let mut config: Self = toml::from_str(&text).with_context(|| file.display().to_string())?;
        let folder = file.parent().unwrap_or(Path::new(""));
        for path in config.pairs.iter_mut().chain(&mut config.held_out).chain(&mut config.out) {
            *path = folder.join(&*path);
        }
        // A model's name may be no path at all; one beside this file is meant as such.
        let beside = folder.join(&config.model);
        if beside.exists() {
            config.model = beside.display().to_string();
        }
        Ok(config)
    }

    /// # Errors
    /// Names the field, its value and what it may be.
    pub fn check(&self) -> anyhow::Result<()> {
        self.check_sizes()?;
        self.check_objectives()?;
        self.adapter()?.check()?;
        let positive = |field: &str, value: f64| {
            ensure!(value.is_finite() && value > 0.0, "{field} is {value}, not a number above 0");
            Ok(())
        };
        let share = |field: &str, value: f64, most: f64| {
            ensure!((0.0..=most).contains(&value), "{field} is {value}, not in 0..={most}");
            Ok(())
        };
        share("held_out_share", self.held_out_share, 0.5)?;
        positive("concentration", self.concentration)?;
        positive("loss.global_beta", self.loss.global_beta)?;
        share("loss.global_weight", self.loss.global_weight, 1e3)?;
        share("loss.likelihood_weight", self.loss.likelihood_weight, 1e3)?;
        if let Scalarisation::Tchebycheff { mu } = self.loss.scalarisation {
            positive("loss.scalarisation.tchebycheff.mu", mu)?;
        }
        let optimizer = &self.optimizer;
        positive("optimizer.learning_rate", optimizer.learning_rate)?;
        positive("optimizer.epsilon", optimizer.epsilon)?;
        share("optimizer.floor", optimizer.floor, 1.0)?;
        share("optimizer.weight_decay", optimizer.weight_decay, 10.0)?;
        share("optimizer.clip_norm", optimizer.clip_norm, 1e6)?;
        for beta in optimizer.betas {
            ensure!((0.0..1.0).contains(&beta), "optimizer.betas has {beta}, not in 0..1");
        }
        Ok(())
    }

    fn check_sizes(&self) -> anyhow::Result<()> {
        ensure!(!self.pairs.is_empty(), "pairs names no file");
        for (field, value) in [
            ("held_out_max", self.held_out_max),
            ("max_prompt_tokens", self.max_prompt_tokens),
            ("max_tokens", self.max_tokens),
            ("batch", self.batch),
            ("pass_tokens", self.pass_tokens),
            ("evaluate_every", self.evaluate_every as usize),
            ("checkpoint_every", self.checkpoint_every as usize),
            ("workers", self.workers),
        ] {
            ensure!(value > 0, "{field} is 0; it must be at least 1");
        }
        ensure!(self.workers <= WORKERS_MAX, "workers is {}; at most {WORKERS_MAX}", self.workers);
        let (workers, batch) = (self.workers, self.batch);
        ensure!(workers <= batch, "workers is {workers}, more than the {batch} pairs of a batch");
        match (self.epochs, self.steps) {
            (Some(_), Some(_)) => bail!("epochs stands beside steps; give one of them"),
            (Some(epochs), None) => {
                ensure!(epochs.is_finite() && epochs > 0.0, "epochs is {epochs}, not a number above 0");
            }
            (None, steps) => ensure!(steps != Some(0), "steps is 0; it must be at least 1"),
        }
        Ok(())
    }

    fn check_objectives(&self) -> anyhow::Result<()> {
        ensure!(!self.objectives.is_empty(), "objectives is empty; name at least one");
        for (index, objective) in self.objectives.iter().enumerate() {
            let (name, beta) = (&objective.name, objective.beta);
            ensure!(!name.trim().is_empty(), "objectives[{index}].name is empty");
            ensure!(
                beta.is_finite() && beta > 0.0,
                "objectives[{index}].beta is {beta}, not a number above 0"
            );
            let before = &self.objectives[..index];
            ensure!(before.iter().all(|other| other.name != *name), "objectives name '{name}' twice");
        }
        let names = self.names().join(", ");
        match (&self.objective, self.is_lora()) {
            (None, true) => bail!("objective is missing: a lora is trained for one of {names}"),
            (Some(_), false) => bail!("objective is only for method = \"lora\"; the others train {names}"),
            (Some(objective), true) if !self.names().contains(objective) => {
                bail!("objective is '{objective}', which is none of {names}")
            }
            _ => Ok(()),
        }
    }

    /// All objectives that pairs may speak of.
    pub fn names(&self) -> Vec<String> {
        self.objectives.iter().map(|objective| objective.name.clone()).collect()
    }

    /// Objectives that are trained: all, or the one of a plain LoRA.
    pub fn trained(&self) -> Vec<ObjectiveConfig> {
        let is_trained = |name: &String| self.objective.as_ref().is_none_or(|only| only == name);
        self.objectives.iter().filter(|objective| is_trained(&objective.name)).cloned().collect()
    }

    /// The adapter's shape, over the objectives that are trained.
    ///
    /// # Errors
    /// Names the field of `[adapter]`.
    pub fn adapter(&self) -> anyhow::Result<AdapterConfig> {
        ensure!(
            !self.adapter.contains_key("objectives"),
            "[adapter] names objectives; they belong to the top of the file, as [[objectives]]"
        );
        let objective = |objective: ObjectiveConfig| Objective {
            name: objective.name,
            description: objective.description,
        };
        let objectives: Vec<Objective> = self.trained().into_iter().map(objective).collect();
        let mut table = self.adapter.clone();
        table.insert("objectives".to_owned(), toml::Value::try_from(objectives)?);
        table.try_into().context("[adapter]")
    }

    pub fn loss(&self) -> Loss {
        Loss {
            scalarisation: self.loss.scalarisation,
            betas: self.trained().iter().map(|objective| objective.beta).collect(),
            global_beta: self.loss.global_beta,
            global_weight: self.loss.global_weight,
            likelihood_weight: self.loss.likelihood_weight,
        }
    }

    /// Steps of the run, for a number of training pairs.
    pub fn steps(&self, pairs: usize) -> u64 {
        match (self.steps, self.epochs) {
            (Some(steps), _) => steps,
            (None, epochs) => (epochs.unwrap_or(2.0) * pairs as f64 / self.batch as f64).ceil() as u64,
        }
    }

    /// What decides the weights, as text: equal for two runs that end equal.
    pub fn identity(&self) -> anyhow::Result<toml::Table> {
        let mut table = toml::Table::try_from(self).context("the configuration as TOML")?;
        for field in WHEREABOUTS {
            table.remove(field);
        }
        Ok(table)
    }

    fn is_lora(&self) -> bool {
        self.adapter.get("method").and_then(toml::Value::as_str) == Some("lora")
    }
}

// === impl LossConfig ===

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            scalarisation: Scalarisation::Linear,
            global_weight: 0.5,
            global_beta: 0.01,
            likelihood_weight: 0.0,
        }
    }
}

// === impl OptimizerConfig ===

impl Default for OptimizerConfig {
    /// PARM's published values [method §3].
    fn default() -> Self {
        Self {
            learning_rate: 5e-4,
            floor: 0.0,
            warm_up_steps: 20,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.05,
            clip_norm: 1.0,
        }
    }
}
