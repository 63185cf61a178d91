//! Weights from files into panels.

use std::path::Path;

use rayon::prelude::*;

use super::{Layer, LlamaWeights};
use crate::config::Config;
use crate::error::ModelError;
use crate::kernels::panels::{Format, Panels};
use crate::kernels::simd::LANES;
use crate::quantised;
use crate::source::ModelFiles;
use crate::weights::Weights;

/// Matrices out of the files, as they are stored or widened.
#[derive(Clone, Copy)]
struct Matrices<'a> {
    weights: &'a Weights,
    /// All as f32.
    widened: bool,
}

impl LlamaWeights {
    pub fn load(files: &ModelFiles, widened: bool) -> Result<Self, ModelError> {
        let ModelFiles { config, weights, fingerprint, .. } = files;
        check(config, weights.path())?;
        let Config { vocabulary, hidden, .. } = *config;
        let matrices = Matrices { weights, widened };
        let table = |name: &str| matrices.panels(&[(name.to_owned(), vocabulary)], hidden);
        let embedding = table("model.embed_tokens.weight")?;
        let (embedding, head) = match config.tied_embeddings {
            true => (None, embedding),
            false => (Some(embedding), table("lm_head.weight")?),
        };
        // Layers are packed in parallel: packing is bound by memory latency.
        let layers: Result<Vec<Layer>, ModelError> =
            (0..config.layers).into_par_iter().map(|layer| Layer::load(matrices, config, layer)).collect();
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
        self.embedding.as_ref().unwrap_or(&self.head).row(token as usize, row);
    }
}

impl Layer {
    fn load(matrices: Matrices<'_>, config: &Config, layer: usize) -> Result<Self, ModelError> {
        let Config { hidden, intermediate, heads, kv_heads, head_dim, .. } = *config;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let vector = |suffix: &str, len: usize| read(matrices.weights, &name(suffix), &[len]);
        let projection = |parts: &[(&str, usize)], inputs: usize| {
            let parts: Vec<(String, usize)> =
                parts.iter().map(|(module, outputs)| (name(&format!("{module}.weight")), *outputs)).collect();
            matrices.panels(&parts, inputs)
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

impl Matrices<'_> {
    /// Matrices of the same inputs, by name and outputs, as one weight in a format that holds them all.
    fn panels(&self, parts: &[(String, usize)], inputs: usize) -> Result<Panels, ModelError> {
        let formats: Result<Vec<Format>, ModelError> =
            parts.iter().map(|(name, _)| self.weights.format(name)).collect();
        let format = match self.widened {
            true => Format::F32,
            false => formats?.into_iter().reduce(cover).expect("a weight has parts"),
        };
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        let mut panels = Panels::zeroed(format, outputs, inputs);
        let mut output = 0;
        for (name, outputs) in parts {
            panels.set(output, &self.weights.numbers(name, &[*outputs, inputs], format)?);
            output += outputs;
        }
        Ok(panels)
    }
}

/// The format that holds numbers of both without loss.
fn cover(one: Format, other: Format) -> Format {
    match (one, other) {
        (one, other) if one == other => one,
        (Format::Blocks(one), Format::Blocks(other)) => Format::Blocks(quantised::cover(one, other)),
        _ => Format::F32,
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
