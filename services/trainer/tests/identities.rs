//! What the method promises of an adapter (method §2): under one preference it is a plain model with an output bias, and
//! with linear heads that model is the mean, weighted by the preference, of the models of the objectives alone.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

#[allow(dead_code)]
#[path = "../../../crates/model/tests/files/mod.rs"]
mod files;

use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use uniarm_model::{Adapter, ModelFiles, OpenOptions, Weights, reference};
use uniarm_trainer::network::{
    AdapterConfig, Conditioning, Head, LlamaNetwork, Method, Network as _, NetworkOptions, Objective,
};

/// Has the biases that a merged adapter needs.
const SHAPE: files::Shape = files::Shape { biases: true, ..files::SMALL };
const TOKENS: [u32; 6] = [1, 9, 4, 17, 30, 2];
const RANK: usize = 4;
const ALPHA: f64 = 6.0;

fn open(folder: &Path) -> ModelFiles {
    uniarm_model::open(folder.to_str().unwrap(), &OpenOptions::default()).unwrap()
}

/// An adapter of random numbers, conditioned by one-hot preferences.
fn random_adapter(files: &ModelFiles, folder: &Path, head: Head) {
    let objective = |name: &str| Objective { name: name.to_owned(), description: String::new() };
    let config = AdapterConfig {
        method: Method::Moslora,
        rank: RANK,
        mixed_rank: 0,
        alpha: ALPHA,
        targets: ["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec(),
        conditioning: Conditioning::Onehot,
        head,
        head_units: 0,
        dropout: 0.0,
        objectives: vec![objective("first"), objective("second")],
    };
    let mut network = LlamaNetwork::open(files, &config, NetworkOptions::default()).unwrap();
    let mut state = 11_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        0.4 * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    let parameters: Vec<f32> = network.parameters().iter().map(|value| value + noise()).collect();
    network.set_parameters(&parameters).unwrap();
    network.save(folder).unwrap();
}

fn logits(files: &ModelFiles, adapter: Option<(&Path, &[f32])>) -> Vec<f32> {
    let conditioned = adapter.map(|(folder, preference)| {
        let adapter = Arc::new(Adapter::load(folder, &files.config, &files.fingerprint).unwrap());
        adapter.condition(preference).unwrap()
    });
    let logits = reference::logits(files, &TOKENS, conditioned.as_ref()).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// The backbone's tensors with the adapter merged: Σ p_i (W0 + s·B·diag(γ(e_i))·A), and biases b + Σ p_i s·B·β(e_i).
fn merged(adapter: &Path, preference: &[f32]) -> files::Tensors {
    let weights = Weights::from_safetensors(adapter, &[adapter.join("adapter_model.safetensors")]).unwrap();
    let mut tensors = SHAPE.tensors();
    let keys = SHAPE.kv_heads * SHAPE.head_dim();
    for (name, outputs) in [("q", SHAPE.hidden), ("k", keys), ("v", keys)] {
        let stem = format!("base_model.model.model.layers.0.self_attn.{name}_proj.moslora_");
        let tensor = |part: &str, shape: &[usize]| {
            weights.tensor(&format!("{stem}{part}.weight"), shape).unwrap().to_vec2::<f32>().unwrap()
        };
        let (a, b) = (tensor("A", &[RANK, SHAPE.hidden]), tensor("B", &[outputs, RANK]));
        let (gamma, beta) = (tensor("gamma", &[RANK, 2]), tensor("beta", &[RANK, 2]));
        let scale = (ALPHA / RANK as f64) as f32;
        for (objective, weight) in preference.iter().enumerate() {
            let weight_name = format!("model.layers.0.self_attn.{name}_proj.weight");
            let (_, matrix) = tensors.get_mut(&weight_name).unwrap();
            for (row, outputs) in matrix.chunks_exact_mut(SHAPE.hidden).enumerate() {
                for (column, value) in outputs.iter_mut().enumerate() {
                    let ranks = (0..RANK).map(|r| b[row][r] * (1.0 + gamma[r][objective]) * a[r][column]);
                    *value += weight * scale * ranks.sum::<f32>();
                }
            }
            let (_, bias) = tensors.get_mut(&format!("model.layers.0.self_attn.{name}_proj.bias")).unwrap();
            for (row, value) in bias.iter_mut().enumerate() {
                *value += weight * scale * (0..RANK).map(|r| b[row][r] * beta[r][objective]).sum::<f32>();
            }
        }
    }
    tensors
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_preference_is_a_plain_model_and_the_mean_of_its_objectives() {
    let (backbone, adapter) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    // One shard of tensors in turn as f32, f16 and bf16: the made-up values are exact in all.
    files::folder(backbone.path(), SHAPE, &SHAPE.tensors(), 1);
    let files = open(backbone.path());
    random_adapter(&files, adapter.path(), Head::Linear);
    for preference in [[1.0, 0.0], [0.0, 1.0], [0.3, 0.7]] {
        let served = logits(&files, Some((adapter.path(), &preference)));
        let folder = TempDir::new().unwrap();
        let tensors = merged(adapter.path(), &preference);
        let as_f32 = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let encoded: Vec<_> = tensors
            .iter()
            .map(|(name, (shape, values))| (name.clone(), shape.clone(), as_f32(values)))
            .collect();
        let views = encoded.iter().map(|(name, shape, bytes)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            (name.clone(), view.unwrap())
        });
        std::fs::write(folder.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap())
            .unwrap();
        std::fs::write(folder.path().join("config.json"), SHAPE.config_json().to_string()).unwrap();
        let plain = logits(&open(folder.path()), None);
        let size = plain.iter().fold(0.0_f32, |size, x| size.max(x.abs()));
        let off = distance(&served, &plain) / size;
        assert!(off < 1e-4, "{preference:?}: {off}");
        assert!(distance(&served, &logits(&files, None)) / size > 1e-2, "the adapter does nothing");
    }
}
