//! What a reward worker serves: reward models by name, all on one backbone.

use std::{path::Path, sync::Arc};

use uniarm_model::{Adapter, ChatTemplate, Config, Method, ModelError, Tokenizer};
use uniarm_proto::{Generation, Member, MemberId, Objective, RewardModel, Role, TokenizerFingerprint};

/// The language model under all reward models of a worker.
pub struct Backbone {
    pub name: String,
    /// Identity of its weights: an adapter may name the backbone that it was trained on.
    pub fingerprint: [u8; 32],
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub context_tokens: usize,
    /// Logits of one row.
    pub vocabulary: usize,
}

/// Reward models by name; immutable once the worker runs.
pub struct RewardCatalogue {
    pub backbone: Backbone,
    served: Vec<Served>,
}

/// One reward model: the backbone under an adapter, under a system text, or as it is.
pub(crate) struct Served {
    pub(crate) record: RewardModel,
    pub(crate) adapter: Option<Arc<Adapter>>,
    pub(crate) system: Option<String>,
    /// Index of the adapter among those of this worker, from 1: part of the prefix cache's key. 0: no adapter.
    pub(crate) adapter_number: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    #[error("two reward models are named {0:?}")]
    Duplicate(String),
    #[error(transparent)]
    Model(#[from] ModelError),
}

// === impl RewardCatalogue ===

impl RewardCatalogue {
    pub fn new(backbone: Backbone) -> Self {
        Self { backbone, served: Vec::new() }
    }

    /// The backbone as it is: an autoregressive reward model without a preference.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_plain(&mut self, name: &str) -> Result<(), CatalogueError> {
        self.add(name, "plain", Vec::new(), None, None)
    }

    /// The backbone under a system text: a *prompted* reward model, whose one objective has its name.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_prompted(&mut self, name: &str, system: &str) -> Result<(), CatalogueError> {
        let objective = Objective { name: name.to_owned(), description: system.to_owned() };
        self.add(name, "prompted", vec![objective], None, Some(system.to_owned()))
    }

    /// An adapter folder on the backbone.
    ///
    /// # Errors
    /// When the folder does not hold an adapter of this backbone, or the name is taken.
    pub fn add_adapter(&mut self, name: &str, folder: &Path, config: &Config) -> Result<(), CatalogueError> {
        let adapter = Arc::new(Adapter::load(folder, config, &self.backbone.fingerprint)?);
        let method = match adapter.method() {
            Method::MosLora => "moslora",
            Method::PbLora => "pblora",
            Method::Lora => "lora",
        };
        let objectives = adapter
            .objectives()
            .iter()
            .map(|o| Objective { name: o.name.clone(), description: o.description.clone() })
            .collect();
        self.add(name, method, objectives, Some(adapter), None)
    }

    /// As clients and the store see them.
    pub fn records(&self) -> Vec<RewardModel> {
        self.served.iter().map(|served| served.record.clone()).collect()
    }

    /// What the store says of this worker; id, generation and address are its process's to fill in.
    pub fn member(&self) -> Member {
        Member {
            id: MemberId(String::new()),
            generation: Generation(0),
            role: Role::Reward,
            address: String::new(),
            tokenizer: Some(self.tokenizer_fingerprint()),
            vocabulary: self.backbone.vocabulary as u32,
            capacity: 0,
            base_model: None,
            reward_models: self.records(),
            group: String::new(),
            rank: 0,
            size: 1,
        }
    }

    pub fn tokenizer_fingerprint(&self) -> TokenizerFingerprint {
        let own = self.backbone.tokenizer.fingerprint();
        TokenizerFingerprint { core: own.core, core_tokens: own.core_tokens, full: own.full }
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Served> {
        self.served.iter().find(|served| served.record.name == name)
    }

    fn add(
        &mut self,
        name: &str,
        method: &str,
        objectives: Vec<Objective>,
        adapter: Option<Arc<Adapter>>,
        system: Option<String>,
    ) -> Result<(), CatalogueError> {
        if self.find(name).is_some() {
            return Err(CatalogueError::Duplicate(name.to_owned()));
        }
        let record = RewardModel {
            name: name.to_owned(),
            single_objective: objectives.len() == 1,
            objectives,
            backbone: self.backbone.name.clone(),
            method: method.to_owned(),
        };
        let adapter_number = if adapter.is_some() { 1 + self.served.len() as u64 } else { 0 };
        self.served.push(Served { record, adapter, system, adapter_number });
        Ok(())
    }
}
