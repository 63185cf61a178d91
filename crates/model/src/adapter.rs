//! Adapters of a frozen backbone: MoSLoRA, PBLoRA and LoRA, and their state under one preference.
//!
//! With x the input of a linear layer, an adapter adds s · B · m(A · x), where A and B are shared by all
//! rows and m depends on the preference p alone [method: UniARM, PARM, GenARM]:
//!
//! - MoSLoRA: m(z) = γ(p) ⊙ z + β(p), γ(p) = 1 + head_γ(v(p)), β(p) = head_β(v(p));
//! - PBLoRA: m(z) = (W1 · z[..r1], reshape(pᵀ · W2) · z[r1..]);
//! - LoRA: m(z) = z.
//!
//! So a preference is a few floats per layer ([`Conditioned`]), computed once for a session, and rows of
//! one batch may each have their own.

mod apply;
mod factors;
mod files;
mod load;
mod plain;
mod projection;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::division::Linear;
use crate::error::ModelError;
use crate::kernels::panels::Panels;

pub use factors::{Factors, Mixing, StackedFactors};
pub(crate) use files::AdapterContents;
pub use files::AdapterFiles;
pub(crate) use load::{CONFIG_BYTES_MAX, TENSOR_BYTES_MAX};
pub use plain::PlainLora;

/// Two preferences closer than this to the simplex are taken as on it.
const SIMPLEX_TOLERANCE: f32 = 1e-3;

/// How an adapter depends on the preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    MosLora,
    PbLora,
    Lora,
}

/// One dimension of a preference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objective {
    pub name: String,
    /// What the objective asks for, in words; may be empty.
    pub description: String,
}

/// An adapter's weights, ready to be applied.
pub struct Adapter {
    method: Method,
    objectives: Vec<Objective>,
    fingerprint: [u8; 32],
    backbone: Backbone,
    /// Text conditioning: an embedding of each objective, (objectives, width). Empty for one-hot.
    embeddings: Vec<Vec<f32>>,
    layers: Vec<LayerAdapter>,
    /// Floats of a [`Conditioned`].
    state_floats: usize,
    /// For the other ranks of a group, until they have it.
    contents: Mutex<Option<AdapterContents>>,
}

/// An adapter under one preference: what a row of a batch carries. A clone is two reference counts.
#[derive(Clone)]
pub struct Conditioned {
    adapter: Arc<Adapter>,
    /// Per adapted linear layer, at [`Part::state`]: s·γ and s·β, or s·M row by row, or s.
    state: Arc<[f32]>,
    /// What it was computed from.
    preference: Arc<[f32]>,
    key: u64,
}

/// Linear layers that share their input, and are multiplied as one weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Qkv,
    Output,
    GateUp,
    Down,
}

/// Dimensions an adapter was checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Backbone {
    layers: usize,
    hidden: usize,
    queries: usize,
    keys: usize,
    intermediate: usize,
}

/// One layer's groups, by [`Group`] as index.
#[derive(Default)]
struct LayerAdapter {
    groups: [Option<GroupAdapter>; 4],
}

struct GroupAdapter {
    /// A of all parts, stacked: (ranks of all parts, inputs).
    a: Panels,
    parts: Vec<Part>,
}

/// The adapter of one linear layer.
struct Part {
    linear: Linear,
    /// Name within a layer, as "self_attn.q_proj".
    name: &'static str,
    /// Its first rank among those of the group.
    first_rank: usize,
    /// (outputs, rank)
    b: Panels,
    scale: f32,
    modulation: Modulation,
    /// Where its floats begin in a [`Conditioned`].
    state: usize,
}

/// A linear layer's adapter under one preference as plain matrices: it adds B · (mix · A · x + shift).
pub(crate) struct LowRank {
    /// (rank, inputs)
    pub a: Tensor,
    /// (rank, rank), with the scale
    pub mix: Tensor,
    /// (rank), with the scale
    pub shift: Tensor,
    /// (outputs, rank)
    pub b: Tensor,
}

/// m(z) before a preference is known.
enum Modulation {
    None,
    Affine {
        gamma: Head,
        beta: Head,
    },
    /// (r1, r1) and (objectives, r2 · r2)
    Mix {
        w1: Vec<f32>,
        r1: usize,
        w2: Vec<f32>,
        r2: usize,
    },
}

/// The map from v(p), (width), to (rank).
enum Head {
    /// (rank, width)
    Linear(Vec<f32>),
    /// second · silu(first · v + bias) + bias; first (inner, width), second (rank, inner)
    Mlp { first: Vec<f32>, first_bias: Vec<f32>, second: Vec<f32>, second_bias: Vec<f32> },
}

impl Adapter {
    /// Reads `adapter_config.json` and `adapter_model.safetensors` of a folder (docs/adapter-format.md) for the
    /// backbone with this configuration and fingerprint.
    ///
    /// # Errors
    /// [`ModelError::Adapter`], [`ModelError::Malformed`], [`ModelError::Shape`] and [`ModelError::MissingTensor`]
    /// name the file and the tensor: another backbone, an unknown method, a missing, surplus, misshapen or
    /// non-finite tensor.
    pub fn load(folder: &Path, config: &Config, backbone_fingerprint: &[u8; 32]) -> Result<Self, ModelError> {
        load::load(folder, config, backbone_fingerprint, None)
    }

    /// The same of files that are known by their digest ([`AdapterFiles`]): those with another one are refused.
    ///
    /// # Errors
    /// As of `load`; [`ModelError::Adapter`] for another digest.
    pub fn load_known(
        folder: &Path,
        config: &Config,
        backbone_fingerprint: &[u8; 32],
        digest: &[u8; 32],
    ) -> Result<Self, ModelError> {
        load::load(folder, config, backbone_fingerprint, Some(digest))
    }

    /// As `load_known`, with a copy of the files: rank 0 of a group hands it to the other ranks, once.
    ///
    /// # Errors
    /// As of `load_known`.
    pub fn load_to_share(
        folder: &Path,
        config: &Config,
        backbone_fingerprint: &[u8; 32],
        digest: &[u8; 32],
    ) -> Result<Self, ModelError> {
        load::load_to_share(folder, config, backbone_fingerprint, digest)
    }

    /// The adapter that another process has read.
    pub(crate) fn of_contents(
        contents: AdapterContents,
        config: &Config,
        backbone_fingerprint: &[u8; 32],
    ) -> Result<Self, ModelError> {
        load::of_contents(contents, config, backbone_fingerprint)
    }

    /// Its files, where nobody has taken them yet.
    pub(crate) fn take_contents(&self) -> Option<AdapterContents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// An adapter without weights, to be conditioned in tests over a
    /// [`ScriptedForward`](crate::ScriptedForward): it has objectives and keys, and no layers.
    pub fn scripted(objectives: Vec<Objective>) -> Self {
        let mut hash = Sha256::new();
        for objective in &objectives {
            hash.update(&objective.name);
            hash.update([0]);
        }
        Self {
            method: Method::MosLora,
            objectives,
            fingerprint: hash.finalize().into(),
            backbone: Backbone { layers: 0, hidden: 0, queries: 0, keys: 0, intermediate: 0 },
            embeddings: Vec::new(),
            layers: Vec::new(),
            state_floats: 0,
            contents: Mutex::new(None),
        }
    }

    pub fn method(&self) -> Method {
        self.method
    }

    /// The dimensions of a preference, in order. Empty for a plain LoRA, which has none.
    pub fn objectives(&self) -> &[Objective] {
        &self.objectives
    }

    /// SHA-256 over configuration and weights.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The adapter under a preference: one weight per objective, on the simplex; empty for a plain LoRA.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] for a preference of another length, with a negative or non-finite weight,
    /// or whose sum is not 1.
    pub fn condition(self: &Arc<Self>, preference: &[f32]) -> Result<Conditioned, ModelError> {
        self.check_preference(preference)?;
        let conditioning = self.mixed_embedding(preference);
        let mut state = Vec::with_capacity(self.state_floats);
        for layer in &self.layers {
            for part in layer.groups.iter().flatten().flat_map(|group| &group.parts) {
                debug_assert_eq!(state.len(), part.state);
                part.condition(&conditioning, preference, &mut state);
            }
        }
        let (state, key) = (state.into(), self.key(preference));
        Ok(Conditioned { adapter: self.clone(), state, preference: preference.into(), key })
    }

    fn check_preference(&self, preference: &[f32]) -> Result<(), ModelError> {
        let invalid = |reason| Err(ModelError::Invalid { field: "preference", reason });
        if preference.len() != self.objectives.len() {
            let (found, expected) = (preference.len(), self.objectives.len());
            return invalid(format!("{found} weights for {expected} objectives"));
        }
        if let Some(weight) = preference.iter().find(|weight| !weight.is_finite() || **weight < 0.0) {
            return invalid(format!("weight {weight} is not a number of at least 0"));
        }
        let sum: f32 = preference.iter().sum();
        if !preference.is_empty() && (sum - 1.0).abs() > SIMPLEX_TOLERANCE {
            return invalid(format!("the weights add up to {sum}, not 1"));
        }
        Ok(())
    }

    /// v(p): Σ p_i o_i, or p itself.
    fn mixed_embedding(&self, preference: &[f32]) -> Vec<f64> {
        if self.embeddings.is_empty() {
            return preference.iter().map(|weight| f64::from(*weight)).collect();
        }
        let mut mixed = vec![0.0; self.embeddings[0].len()];
        for (weight, embedding) in preference.iter().zip(&self.embeddings) {
            for (sum, x) in mixed.iter_mut().zip(embedding) {
                *sum += f64::from(*weight) * f64::from(*x);
            }
        }
        mixed
    }

    pub(crate) fn key(&self, preference: &[f32]) -> u64 {
        let mut hash = Sha256::new();
        hash.update(self.fingerprint);
        for weight in preference {
            // -0 + 0 = +0: one key for both zeros.
            hash.update((weight + 0.0).to_bits().to_le_bytes());
        }
        let digest = hash.finalize();
        u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
    }

    /// Whether `config` has the dimensions this adapter was loaded for.
    pub(crate) fn fits(&self, config: &Config) -> bool {
        self.backbone == Backbone::of(config)
    }

    /// Whether any part of the group is adapted in this layer.
    pub(crate) fn has(&self, layer: usize, group: Group) -> bool {
        self.layers[layer].groups[group as usize].is_some()
    }
}

impl Conditioned {
    /// The adapter's weights, which all rows share.
    pub fn adapter(&self) -> &Arc<Adapter> {
        &self.adapter
    }

    /// The weights of the adapter's objectives.
    pub(crate) fn preference(&self) -> &[f32] {
        &self.preference
    }

    /// Identifies (adapter, preference): sequences with equal keys may share cache blocks.
    pub fn key(&self) -> u64 {
        self.key
    }
}

impl Conditioned {
    /// The adapter of one linear layer ("self_attn.q_proj"), for the reference; None where there is none.
    pub(crate) fn low_rank(&self, layer: usize, name: &str) -> Result<Option<LowRank>, ModelError> {
        let groups = self.adapter.layers[layer].groups.iter().flatten();
        let mut parts = groups.flat_map(|group| group.parts.iter().map(move |part| (group, part)));
        let Some((group, part)) = parts.find(|(_, part)| part.name == name) else { return Ok(None) };
        let rank = part.rank();
        let state = &self.state[part.state..][..part.state_floats()];
        let diagonal = |value: &dyn Fn(usize) -> f32| {
            (0..rank * rank).map(|at| if at / rank == at % rank { value(at / rank) } else { 0.0 }).collect()
        };
        let (mix, shift): (Vec<f32>, Vec<f32>) = match part.modulation {
            Modulation::None => (diagonal(&|_| state[0]), vec![0.0; rank]),
            Modulation::Affine { .. } => (diagonal(&|index| state[index]), state[rank..].to_vec()),
            Modulation::Mix { .. } => (state.to_vec(), vec![0.0; rank]),
        };
        let matrix = |panels: &Panels, first: usize, rows: usize| {
            let mut values = vec![0.0; rows * panels.inputs()];
            for (index, row) in values.chunks_exact_mut(panels.inputs()).enumerate() {
                panels.row(first + index, row);
            }
            Tensor::from_vec(values, (rows, panels.inputs()), &Device::Cpu)
        };
        Ok(Some(LowRank {
            a: matrix(&group.a, part.first_rank, rank)?,
            mix: Tensor::from_vec(mix, (rank, rank), &Device::Cpu)?,
            shift: Tensor::from_vec(shift, rank, &Device::Cpu)?,
            b: matrix(&part.b, 0, part.b.outputs())?,
        }))
    }
}

impl std::fmt::Debug for Conditioned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conditioned").field("key", &self.key).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter")
            .field("method", &self.method)
            .field("objectives", &self.objectives)
            .finish_non_exhaustive()
    }
}

impl Backbone {
    fn of(config: &Config) -> Self {
        Self {
            layers: config.layers,
            hidden: config.hidden,
            queries: config.heads * config.head_dim,
            keys: config.kv_heads * config.head_dim,
            intermediate: config.intermediate,
        }
    }
}

impl Part {
    fn rank(&self) -> usize {
        self.b.inputs()
    }

    /// Floats of this part in a [`Conditioned`].
    fn state_floats(&self) -> usize {
        match self.modulation {
            Modulation::None => 1,
            Modulation::Affine { .. } => 2 * self.rank(),
            Modulation::Mix { .. } => self.rank() * self.rank(),
        }
    }

    /// Appends this part's state under a preference. Sums run in f64: this is once per session.
    fn condition(&self, conditioning: &[f64], preference: &[f32], state: &mut Vec<f32>) {
        let scale = f64::from(self.scale);
        match &self.modulation {
            Modulation::None => state.push(self.scale),
            Modulation::Affine { gamma, beta } => {
                state.extend(gamma.apply(conditioning).iter().map(|x| (scale * (1.0 + x)) as f32));
                state.extend(beta.apply(conditioning).iter().map(|x| (scale * x) as f32));
            }
            Modulation::Mix { w1, r1, w2, r2 } => {
                for row in 0..r1 + r2 {
                    for column in 0..r1 + r2 {
                        let x = if row < *r1 && column < *r1 {
                            f64::from(w1[row * r1 + column])
                        } else if row >= *r1 && column >= *r1 {
                            let at = (row - r1) * r2 + column - r1;
                            let mixed = preference.iter().enumerate();
                            mixed.map(|(i, p)| f64::from(*p) * f64::from(w2[i * r2 * r2 + at])).sum()
                        } else {
                            0.0
                        };
                        state.push((scale * x) as f32);
                    }
                }
            }
        }
    }
}

impl Head {
    fn apply(&self, v: &[f64]) -> Vec<f64> {
        match self {
            Self::Linear(weight) => linear(weight, v, &[]),
            Self::Mlp { first, first_bias, second, second_bias } => {
                let inner: Vec<f64> =
                    linear(first, v, first_bias).into_iter().map(|x| x / (1.0 + (-x).exp())).collect();
                linear(second, &inner, second_bias)
            }
        }
    }
}

/// weight · x + bias, where an empty bias is none.
fn linear(weight: &[f32], x: &[f64], bias: &[f32]) -> Vec<f64> {
    let rows = weight.chunks_exact(x.len()).enumerate();
    rows.map(|(index, row)| {
        let bias = bias.get(index).map_or(0.0, |bias| f64::from(*bias));
        row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>() + bias
    })
    .collect()
}
