//! Which models answer: a table of a configuration, flags of a cluster, and what their weights are known by.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uniarm_proto::GenerateRequest;

use super::{Key, hexadecimal};

/// The files of an adapter that decide what it does.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The table `[models]`. Folders are relative to the configuration's own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// A GGUF file, a Hugging Face folder, or `hf://org/name`; without it the demo model.
    pub base: Option<String>,
    /// Backbone of the reward models; without it the base model.
    pub reward: Option<String>,
    /// Adapter folders by the name that methods use.
    pub adapters: BTreeMap<String, PathBuf>,
    /// System texts of prompted reward models by name.
    pub prompted: BTreeMap<String, String>,
}

/// What the weights of a cluster are known by. Journals of a job are good for these weights only.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Identities {
    base: String,
    rewards: BTreeMap<String, String>,
}

// === impl ModelsConfig ===

impl ModelsConfig {
    /// The same table with its paths made usable from anywhere, and `demo_model` where it names no base model.
    pub fn resolved(&self, folder: &Path, demo_model: Option<String>) -> Self {
        let local = |source: &String| match folder.join(source) {
            path if !source.contains("://") && path.exists() => path.display().to_string(),
            _ => source.clone(),
        };
        Self {
            base: self.base.as_ref().map(local).or(demo_model),
            reward: self.reward.as_ref().map(local),
            adapters: self.adapters.iter().map(|(name, path)| (name.clone(), folder.join(path))).collect(),
            prompted: self.prompted.clone(),
        }
    }

    /// Flags of `uniarm up` that serve these models; of a resolved table.
    pub fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        let mut push = |flag: &str, value: String| flags.extend([flag.to_owned(), value]);
        if let Some(base) = &self.base {
            push("--base", base.clone());
        }
        if let Some(reward) = &self.reward {
            push("--reward", reward.clone());
        }
        for (name, folder) in &self.adapters {
            push("--adapter", format!("{name}={}", folder.display()));
        }
        for (name, text) in &self.prompted {
            push("--prompted", format!("{name}={text}"));
        }
        flags
    }

    /// Opens the models' files far enough to know their weights; of a resolved table.
    ///
    /// # Errors
    /// Names the model or adapter that cannot be read.
    pub fn identities(&self) -> anyhow::Result<Identities> {
        let base = fingerprint(self.base.as_deref().context("a resolved table names a base model")?)?;
        let backbone = self.reward.as_deref().map_or_else(|| Ok(base.clone()), fingerprint)?;
        let mut rewards = BTreeMap::new();
        for (name, folder) in &self.adapters {
            rewards.insert(name.clone(), format!("{backbone}+{}", adapter_digest(folder)?));
        }
        for (name, text) in &self.prompted {
            rewards.insert(name.clone(), format!("{backbone}+text:{text}"));
        }
        Ok(Identities { base, rewards })
    }
}

fn fingerprint(source: &str) -> anyhow::Result<String> {
    let options = uniarm_model::OpenOptions { progress: true, ..Default::default() };
    let files =
        uniarm_model::open(source, &options).with_context(|| format!("cannot open the model {source}"))?;
    Ok(hexadecimal(&files.fingerprint))
}

fn adapter_digest(folder: &Path) -> anyhow::Result<String> {
    let mut digest = Sha256::new();
    for name in ADAPTER_FILES {
        let file = folder.join(name);
        let bytes = std::fs::read(&file).with_context(|| {
            format!(
                "models.adapters: cannot read {}; train the adapter, or correct the folder",
                file.display()
            )
        })?;
        digest.update((bytes.len() as u64).to_le_bytes());
        digest.update(bytes);
    }
    Ok(hexadecimal(&digest.finalize()))
}

// === impl Identities ===

impl Identities {
    /// Depends on the models that this request uses: a new adapter leaves the answers of all others valid.
    pub fn key(&self, request: &GenerateRequest) -> Key {
        let mut models = self.base.clone();
        for term in &request.guidance {
            models.push('|');
            models.push_str(self.rewards.get(&term.reward).map_or(term.reward.as_str(), String::as_str));
        }
        Key::new(request, &models)
    }
}
