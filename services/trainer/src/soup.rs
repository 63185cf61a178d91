//! Rewarded Soups as one adapter: plain LoRAs, one for each objective, whose mean the preference of a request weighs.
//!
//! The mean of their updates, Σ p_i s_i B_i A_i, *is* a MoSLoRA adapter with one-hot conditioning and linear heads:
//!
//! ```text
//! A = (A_1; A_2; …)    B = (s_1 B_1, s_2 B_2, …)    s = 1    W_β = 0
//! W_γ[j, i] = 1 − 1 if rank j is of LoRA i, else 0 − 1
//! γ_j(p) = 1 + Σ_i W_γ[j, i] p_i = 1 − Σ_i p_i + p_owner(j) = p_owner(j),    because Σ p_i = 1
//! ```
//!
//! So soups are served like any other adapter, at any preference, without another copy of the weights.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use safetensors::tensor::{Dtype, TensorView};
use uniarm_model::PlainLora;

use crate::whole_file;

/// Ranks that a reward worker loads; of all LoRAs together.
const RANK_MAX: usize = 1024;
/// Objectives that a reward worker loads.
const OBJECTIVES_MAX: usize = 64;

/// A LoRA, and the objective that it was trained for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingredient {
    pub objective: String,
    pub folder: PathBuf,
}

/// What became of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Soup {
    /// Of all LoRAs together.
    pub rank: usize,
    /// Linear layers that are adapted.
    pub modules: usize,
}

/// A tensor of the soup: row-major, f32.
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

/// The linear layers of all LoRAs: by layer, as "self_attn.q_proj" with inputs and outputs.
struct Modules {
    layers: BTreeSet<usize>,
    shapes: BTreeMap<String, (usize, usize)>,
}

struct Lora {
    objective: String,
    plain: PlainLora,
}

/// Makes one adapter of plain LoRAs, and writes it into a folder that holds none yet.
///
/// # Errors
/// Names the folder, file or tensor that is wrong: no plain LoRA, LoRAs of different backbones, an objective that stands
/// twice, too many ranks.
pub fn cook(ingredients: &[Ingredient], output: &Path) -> anyhow::Result<Soup> {
    let config = output.join("adapter_config.json");
    if config.exists() {
        bail!("{} exists; name a folder without an adapter", config.display());
    }
    let loras = read(ingredients)?;
    let rank = loras.iter().map(|lora| lora.plain.rank).sum();
    if rank > RANK_MAX {
        bail!("the LoRAs have {rank} ranks together, and a reward worker loads {RANK_MAX}");
    }
    let modules = Modules::of(&loras)?;
    let mut tensors = BTreeMap::new();
    for layer in &modules.layers {
        for (module, shape) in &modules.shapes {
            stack(&loras, (*layer, module), (rank, *shape), &mut tensors)?;
        }
    }
    std::fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;
    whole_file::write(&output.join("adapter_model.safetensors"), &serialise(&tensors)?)?;
    whole_file::write(
        &config,
        serde_json::to_string_pretty(&description(&loras, rank, &modules))?.as_bytes(),
    )?;
    Ok(Soup { rank, modules: modules.layers.len() * modules.shapes.len() })
}

fn read(ingredients: &[Ingredient]) -> anyhow::Result<Vec<Lora>> {
    if !(1..=OBJECTIVES_MAX).contains(&ingredients.len()) {
        bail!("{} LoRAs are not in 1..={OBJECTIVES_MAX}; give OBJECTIVE=FOLDER for each", ingredients.len());
    }
    let mut loras: Vec<Lora> = Vec::new();
    for Ingredient { objective, folder } in ingredients {
        if objective.is_empty() || loras.iter().any(|lora| lora.objective == *objective) {
            bail!("objective {objective:?} is empty, or stands twice");
        }
        let plain = PlainLora::read(folder)?;
        if let Some(first) = loras.first() {
            check_backbone(&first.plain, &plain)?;
        }
        loras.push(Lora { objective: objective.clone(), plain });
    }
    Ok(loras)
}

/// Both were trained on the same backbone, as far as they say.
fn check_backbone(one: &PlainLora, other: &PlainLora) -> anyhow::Result<()> {
    let differ = |a: Option<String>, b: Option<String>| match (a, b) {
        (Some(a), Some(b)) if a != b => Some((a, b)),
        _ => None,
    };
    let fingerprints = differ(one.backbone_fingerprint.clone(), other.backbone_fingerprint.clone());
    let vocabulary = |lora: &PlainLora| lora.backbone_vocabulary.map(|tokens| format!("{tokens} tokens"));
    if let Some((a, b)) = fingerprints.or_else(|| differ(vocabulary(one), vocabulary(other))) {
        bail!(
            "{} was trained on a backbone of {b}, and {} on one of {a}: updates of different weights cannot be mixed",
            other.file.display(),
            one.file.display()
        );
    }
    Ok(())
}

/// A, B and the heads of one linear layer. A LoRA without it has ranks of zeros there.
fn stack(
    loras: &[Lora],
    (layer, module): (usize, &str),
    (rank, (inputs, outputs)): (usize, (usize, usize)),
    tensors: &mut BTreeMap<String, Matrix>,
) -> anyhow::Result<()> {
    let stem = crate::network::stem(layer, module);
    let objectives = loras.len();
    let mut a = Matrix::zeros(rank, inputs);
    let mut b = Matrix::zeros(outputs, rank);
    let mut gamma = Matrix { values: vec![-1.0; rank * objectives], ..Matrix::zeros(rank, objectives) };
    let mut first = 0;
    for (owner, Lora { plain, .. }) in loras.iter().enumerate() {
        let ranks = first..first + plain.rank;
        for j in ranks.clone() {
            gamma.values[j * objectives + owner] = 0.0;
        }
        first = ranks.end;
        let has = |suffix: &str| plain.weights.contains(&format!("{stem}{suffix}"));
        if !has("lora_A.weight") && !has("lora_B.weight") {
            continue;
        }
        let part = |suffix: &str, shape: [usize; 2]| -> anyhow::Result<Vec<f32>> {
            let tensor =
                plain.weights.tensor(&format!("{stem}{suffix}"), &shape).with_context(|| of(plain))?;
            Ok(tensor.flatten_all()?.to_vec1()?)
        };
        let down = part("lora_A.weight", [plain.rank, inputs])?;
        let up = part("lora_B.weight", [outputs, plain.rank])?;
        a.values[ranks.start * inputs..ranks.end * inputs].copy_from_slice(&down);
        for (row, up) in b.values.chunks_exact_mut(rank).zip(up.chunks_exact(plain.rank)) {
            for (to, from) in row[ranks.clone()].iter_mut().zip(up) {
                *to = plain.scale * from;
            }
        }
    }
    tensors.insert(format!("{stem}moslora_A.weight"), a);
    tensors.insert(format!("{stem}moslora_B.weight"), b);
    tensors.insert(format!("{stem}moslora_gamma.weight"), gamma);
    tensors.insert(format!("{stem}moslora_beta.weight"), Matrix::zeros(rank, objectives));
    Ok(())
}

fn of(plain: &PlainLora) -> String {
    plain.file.display().to_string()
}

fn description(loras: &[Lora], rank: usize, modules: &Modules) -> serde_json::Value {
    let objective = |lora: &Lora| {
        let described = lora.plain.objectives.first().map(|objective| objective.description.as_str());
        serde_json::json!({ "name": lora.objective, "description": described.unwrap_or_default() })
    };
    let short = |module: &String| module.rsplit('.').next().unwrap_or_default().to_owned();
    let mut json = serde_json::json!({
        "peft_type": "MOSLORA",
        "r": rank,
        // s = 1: each LoRA's own scale is in its part of B.
        "lora_alpha": rank,
        "target_modules": modules.shapes.keys().map(short).collect::<Vec<_>>(),
        "layers_to_transform": modules.layers,
        "conditioning": "onehot",
        "head": "linear",
        "objectives": loras.iter().map(objective).collect::<Vec<_>>(),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    });
    if let Some(fingerprint) = loras.iter().find_map(|lora| lora.plain.backbone_fingerprint.as_ref()) {
        json["backbone_fingerprint"] = fingerprint.as_str().into();
    }
    if let Some(vocabulary) = loras.iter().find_map(|lora| lora.plain.backbone_vocabulary) {
        json["backbone_vocabulary"] = vocabulary.into();
    }
    json
}

fn serialise(tensors: &BTreeMap<String, Matrix>) -> anyhow::Result<Vec<u8>> {
    let bytes: Vec<(&String, &Matrix, Vec<u8>)> = tensors
        .iter()
        .map(|(name, matrix)| (name, matrix, matrix.values.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let mut views = Vec::with_capacity(bytes.len());
    for (name, matrix, bytes) in &bytes {
        let shape = vec![matrix.rows, matrix.columns];
        views.push((name.as_str(), TensorView::new(Dtype::F32, shape, bytes)?));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(safetensors::serialize(views, Some(metadata))?)
}

// === impl Matrix ===

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, values: vec![0.0; rows * columns] }
    }
}

// === impl Modules ===

impl Modules {
    /// Every linear layer that some LoRA adapts; all with the shapes that the first one to name them has.
    fn of(loras: &[Lora]) -> anyhow::Result<Self> {
        let mut modules = Self { layers: BTreeSet::new(), shapes: BTreeMap::new() };
        for Lora { plain, .. } in loras {
            let mut names: Vec<&str> = plain.weights.stored_names().collect();
            names.sort_unstable();
            for name in names {
                let Some((layer, module, is_a)) = parse(name) else {
                    bail!("{}: tensor {name:?} is none of a plain LoRA's", of(plain));
                };
                modules.layers.insert(layer);
                let shape = plain.weights.shape(name)?;
                let [rows, columns] = shape[..] else {
                    bail!("{}: tensor {name:?} has shape {shape:?}, and is no matrix", of(plain));
                };
                let (inputs, outputs) = modules.shapes.entry(module.to_owned()).or_insert((0, 0));
                let (known, size) = if is_a { (inputs, columns) } else { (outputs, rows) };
                if *known != 0 && *known != size {
                    bail!("{}: tensor {name:?} has shape {shape:?}, and others {known}", of(plain));
                }
                *known = size;
            }
        }
        Ok(modules)
    }
}

/// Layer and module of a LoRA's tensor, and whether it is A.
fn parse(name: &str) -> Option<(usize, &str, bool)> {
    let (layer, rest) = name.strip_prefix("base_model.model.model.layers.")?.split_once('.')?;
    let (module, is_a) = match rest.strip_suffix(".lora_A.weight") {
        Some(module) => (module, true),
        None => (rest.strip_suffix(".lora_B.weight")?, false),
    };
    Some((layer.parse().ok()?, module, is_a))
}
