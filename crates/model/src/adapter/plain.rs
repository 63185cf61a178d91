//! A plain LoRA without a backbone: for tools that make other adapters of it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::load::{CONFIG_FILE, Fields, TENSOR_FILE, read_config};
use super::{Method, Objective};
use crate::error::ModelError;
use crate::weights::Weights;

/// A LoRA's folder as it is: its configuration is checked, its tensors are not held to any backbone.
pub struct PlainLora {
    pub rank: usize,
    /// s: lora_alpha / r, or as rsLoRA has it.
    pub scale: f32,
    /// What it was trained for, where its configuration says so.
    pub objectives: Vec<Objective>,
    /// Of the backbone that it was trained on, as hex digits.
    pub backbone_fingerprint: Option<String>,
    pub backbone_vocabulary: Option<u64>,
    pub weights: Weights,
    /// Of the tensors.
    pub file: PathBuf,
}

impl PlainLora {
    /// # Errors
    /// As [`Adapter::load`](crate::Adapter::load), for what needs no backbone; another method than LoRA.
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let config_file = folder.join(CONFIG_FILE);
        let json: Value = serde_json::from_str(&read_config(&config_file)?)
            .map_err(|error| ModelError::malformed(&config_file, format!("not JSON: {error}")))?;
        let fields = Fields { json: &json, file: &config_file };
        let description = fields.description()?;
        if description.method != Method::Lora {
            return fields.fail(format!("peft_type {} is not LORA", json["peft_type"]));
        }
        let file = folder.join(TENSOR_FILE);
        Ok(Self {
            rank: description.rank,
            scale: description.scale,
            objectives: description.objectives,
            backbone_fingerprint: json["backbone_fingerprint"].as_str().map(str::to_ascii_lowercase),
            backbone_vocabulary: json["backbone_vocabulary"].as_u64(),
            weights: Weights::from_safetensors(&file, std::slice::from_ref(&file))?,
            file,
        })
    }
}
