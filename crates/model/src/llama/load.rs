//! Weights from files into panels.

use std::path::Path;

use rayon::prelude::*;

use super::{Embedding, Layer, LlamaWeights};
use crate::config::Config;
use crate::error::ModelError;
use crate::kernels::gemm::Panels;
use crate::kernels::simd::LANES;
use crate::source::ModelFiles;
use crate::weights::Weights;

impl LlamaWeights {
    pub fn load(files: &ModelFiles) -> Result<Self, ModelError> {
        let ModelFiles { config, weights, fingerprint, .. } = files;
        check(config, weights.path())?;
        let Config { vocabulary, hidden, .. } = *config;
        let embedding = read(weights, "model.embed_tokens.weight", &[vocabulary, hidden])?;
        let (embedding, head) = if config.tied_embeddings {
            (Embedding::Tied, Panels::pack(&embedding, vocabulary, hidden))
        } else {
            let head = read(weights, "lm_head.weight", &[vocabulary, hidden])?;
            (Embedding::Table(embedding), Panels::pack(&head, vocabulary, hidden))
        };
        // Layers are packed in parallel: packing is bound by memory latency.
        let layers: Result<Vec<Layer>, ModelError> =
            (0..config.layers).into_par_iter().map(|layer| Layer::load(weights, config, layer)).collect();
        Ok(Self {
            config: config.clone(),
            fingerprint: *fingerprint,
            embedding,
            layers: layers?,
            norm: read(weights, "model.norm.weight", &[hidden])?,
            head,
        })
    }

    /// Writes a token's embedding, (hidden).
    pub fn embed(&self, token: u32, row: &mut [f32]) {
        match &self.embedding {
            Embedding::Tied => self.head.row(token as usize, row),
            Embedding::Table(table) => row.copy_from_slice(&table[token as usize * row.len()..][..row.len()]),
        }
    }
}

impl Layer {
    fn load(weights: &Weights, config: &Config, layer: usize) -> Result<Self, ModelError> {
        let Config { hidden, intermediate, heads, kv_heads, head_dim, .. } = *config;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let vector = |suffix: &str, len: usize| read(weights, &name(suffix), &[len]);
        let projection = |parts: &[(&str, usize)], inputs: usize| {
            let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
            let mut panels = Panels::zeroed(outputs, inputs);
            let mut output = 0;
            for (module, outputs) in parts {
                panels.set(output, &read(weights, &name(&format!("{module}.weight")), &[*outputs, inputs])?);
                output += outputs;
            }
            Ok::<_, ModelError>(panels)
        };
        let qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
        let qkv_bias = if config.qkv_bias {
            let biases = qkv.iter().map(|(module, len)| vector(&format!("{module}.bias"), *len));
            Some(biases.collect::<Result<Vec<_>, _>>()?.concat())
        } else {
            None
        };
        let [qkv, output, gate_up, down] = Panels::adjoin([
            projection(&qkv, hidden)?,
            projection(&[("self_attn.o_proj", hidden)], queries)?,
            projection(&[("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)], hidden)?,
            projection(&[("mlp.down_proj", hidden)], intermediate)?,
        ]);
        Ok(Self {
            attention_norm: vector("input_layernorm.weight", hidden)?,
            qkv,
            qkv_bias,
            output,
            mlp_norm: vector("post_attention_layernorm.weight", hidden)?,
            gate_up,
            down,
        })
    }
}

/// Rows travel in vectors of 16: no published model of the family has other dimensions.
fn check(config: &Config, file: &Path) -> Result<(), ModelError> {
    let dimensions = [
        ("hidden size", config.hidden),
        ("head dimension", config.head_dim),
        ("intermediate size", config.intermediate),
    ];
    match dimensions.into_iter().find(|(_, size)| !size.is_multiple_of(LANES)) {
        None => Ok(()),
        Some((what, size)) => {
            Err(ModelError::unsupported(file, format!("a {what} of {size} (not a multiple of {LANES})")))
        }
    }
}

fn read(weights: &Weights, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
    Ok(weights.tensor(name, shape)?.flatten_all()?.to_vec1()?)
}
