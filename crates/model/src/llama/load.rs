//! Weights from files into panels.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::{Layer, LlamaWeights};
use crate::config::Config;
use crate::division::{Division, Linear, Part};
use crate::error::ModelError;
use crate::kernels::attention::KvFormat;
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
    /// What a part holds; nothing else is read.
    pub fn load(files: &ModelFiles, widened: bool, part: Part) -> Result<Self, ModelError> {
        let ModelFiles { config, weights, fingerprint, .. } = files;
        check(config, weights.path())?;
        part.check(config)?;
        let division = Division::new(config, part.place(), part.ranks())?;
        let Config { vocabulary, hidden, .. } = *config;
        let matrices = Matrices { weights, widened };
        let table = |name: &str| {
            matrices.panels(&[(name.to_owned(), vocabulary, division.vocabulary.clone())], hidden)
        };
        let [embedding, head] = part.tables(config).map(|name| name.map(table).transpose());
        let (embedding, head) = (embedding?, head?);
        // Layers are packed in parallel: packing is bound by memory latency.
        let layers: Result<Vec<Layer>, ModelError> = part
            .layers(config)
            .into_par_iter()
            .map(|layer| Layer::load(matrices, config, &division, layer))
            .collect();
        Ok(Self {
            config: config.clone(),
            part,
            division,
            fingerprint: *fingerprint,
            kv_format: if widened { KvFormat::F32 } else { kv_format(files)? },
            embedding,
            layers: layers?,
            norm: weights.floats("model.norm.weight", &[hidden], 0..hidden)?,
            head,
        })
    }

    /// Writes a token's embedding, (hidden); the token is one of this rank's, which is of the first stage.
    pub fn embed(&self, token: u32, row: &mut [f32]) {
        let table =
            self.embedding.as_ref().or(self.head.as_ref()).expect("the first stage has the embeddings");
        table.row(token as usize - self.division.vocabulary.start, row);
    }
}

impl Layer {
    fn load(
        matrices: Matrices<'_>,
        config: &Config,
        division: &Division,
        layer: usize,
    ) -> Result<Self, ModelError> {
        let Config { hidden, intermediate, heads, head_dim, .. } = *config;
        let queries = heads * head_dim;
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let vector =
            |suffix: &str, len: usize, own: Range<usize>| matrices.weights.floats(&name(suffix), &[len], own);
        let projection = |parts: &[Linear], inputs: usize| {
            let parts: Vec<(String, usize, Range<usize>)> = parts
                .iter()
                .map(|linear| {
                    let weight = name(&format!("{}.weight", linear.name()));
                    (weight, linear.outputs(config), division.outputs(*linear).rows)
                })
                .collect();
            matrices.panels(&parts, inputs)
        };
        let qkv = [Linear::Query, Linear::Key, Linear::Value];
        let qkv_bias = if config.qkv_bias {
            let biases = qkv.iter().map(|linear| {
                let rows = division.outputs(*linear).rows;
                vector(&format!("{}.bias", linear.name()), linear.outputs(config), rows)
            });
            Some(biases.collect::<Result<Vec<_>, _>>()?.concat())
        } else {
            None
        };
        let [qkv, output, gate_up, down] = Panels::adjoin([
            projection(&qkv, hidden)?,
            projection(&[Linear::Output], queries)?,
            projection(&[Linear::Gate, Linear::Up], hidden)?,
            projection(&[Linear::Down], intermediate)?,
        ]);
        Ok(Self {
            attention_norm: vector("input_layernorm.weight", hidden, 0..hidden)?,
            qkv,
            qkv_bias,
            output,
            mlp_norm: vector("post_attention_layernorm.weight", hidden, 0..hidden)?,
            gate_up,
            down,
        })
    }
}

impl Matrices<'_> {
    /// Matrices of the same inputs, by name, outputs and those of this rank, as one weight in a format that holds them all.
    fn panels(&self, parts: &[(String, usize, Range<usize>)], inputs: usize) -> Result<Panels, ModelError> {
        let formats: Result<Vec<Format>, ModelError> =
            parts.iter().map(|(name, ..)| self.weights.format(name)).collect();
        let format = match self.widened {
            true => Format::F32,
            false => formats?.into_iter().reduce(cover).expect("a weight has parts"),
        };
        let outputs = parts.iter().map(|(.., own)| own.len()).sum();
        let mut panels = Panels::zeroed(format, outputs, inputs);
        let mut output = 0;
        for (name, outputs, own) in parts {
            panels.set(output, &self.weights.numbers(name, &[*outputs, inputs], own.clone(), format)?);
            output += own.len();
        }
        Ok(panels)
    }
}

/// Keys and values beside projections that the file has in 16 bits or fewer are rounded to 16 bits, too: a long context is
/// read in half the time, and half the memory holds it. All layers are asked, so that stages agree.
pub fn kv_format(files: &ModelFiles) -> Result<KvFormat, ModelError> {
    for layer in 0..files.config.layers {
        for linear in [Linear::Key, Linear::Value] {
            let name = format!("model.layers.{layer}.{}.weight", linear.name());
            if files.weights.format(&name)? == Format::F32 {
                return Ok(KvFormat::F32);
            }
        }
    }
    Ok(KvFormat::F16)
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
