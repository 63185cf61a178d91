//! What is trained: an adapter's shape, where its tensors lie in the flat vector, how they begin, and its file.

use std::collections::HashMap;
use std::path::Path;

use anyhow::bail;
use safetensors::tensor::{Dtype, TensorView};
use uniarm_decode::noise::philox4x32_10;
use uniarm_model::Config;

use super::Parameter;
use crate::whole_file;

/// Inner units of an `mlp` head for each rank, where none are named.
const MLP_UNITS_PER_RANK: usize = 4;
/// Largest rank that a reward worker loads.
const RANK_MAX: usize = 1024;
/// Bounds of the linear heads of γ and β at the start [ours]. v(p) has length one or less however wide it is, so that
/// PyTorch's 1/√width would begin text conditioning with γ(p) within 2 % of one: all preferences alike, and the signals
/// of objectives in conflict would cancel in B for many steps. These begin about as wide as one-hot heads do.
const GAMMA_BOUND: f32 = 0.5;
const BETA_BOUND: f32 = 0.1;
/// Streams of initial values do not meet those of order, preference and dropout.
const INITIAL_STREAM: u32 = 0x494e_4954;

/// Shape of an adapter (docs/adapter-format.md), and how it is trained.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// How the preference enters (docs/adapter-format.md).
    pub method: Method,
    /// Rank of MoSLoRA and LoRA; of PBLoRA's shared part (r1).
    pub rank: usize,
    /// Rank of PBLoRA's part that the preference mixes (r2); of no meaning elsewhere.
    #[serde(default)]
    pub mixed_rank: usize,
    /// Numerator of the scale s.
    pub alpha: f64,
    /// Linear layers by the end of their names.
    #[serde(default = "query_key_value")]
    pub targets: Vec<String>,
    /// MoSLoRA: what the preference is made of before it modulates.
    #[serde(default)]
    pub conditioning: Conditioning,
    /// MoSLoRA: the map from there to γ and β.
    #[serde(default)]
    pub head: Head,
    /// Inner units of an `mlp` head; 0: four for each rank.
    #[serde(default)]
    pub head_units: usize,
    /// Share of an adapter's inputs that each step of training leaves out.
    #[serde(default)]
    pub dropout: f64,
    /// Dimensions of the preference, in order. A plain LoRA has one, which it is trained for.
    #[schemars(skip)] // a file names them once, for the whole run
    pub objectives: Vec<Objective>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    Moslora,
    Pblora,
    Lora,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Conditioning {
    /// v(p) = Σ p_i o_i, o_i the embedding of the objective's description.
    #[default]
    Text,
    /// v(p) = p.
    Onehot,
}

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    #[default]
    Linear,
    Mlp,
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// As the pairs name it.
    pub name: String,
    /// What it asks for, in words; text conditioning embeds them.
    #[serde(default)]
    pub description: String,
}

/// A linear layer of the backbone that an adapter may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// As "self_attn.q_proj".
    pub name: &'static str,
    pub outputs: usize,
    pub inputs: usize,
}

/// How a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    Zero,
    /// Uniform between −bound and bound.
    Uniform {
        bound: f32,
    },
}

fn query_key_value() -> Vec<String> {
    ["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec()
}

// === impl AdapterConfig ===

impl AdapterConfig {
    /// # Errors
    /// Names the field, and what it may be.
    pub fn check(&self) -> anyhow::Result<()> {
        if !(1..=RANK_MAX).contains(&self.rank) {
            bail!("adapter.rank is {}, not in 1..={RANK_MAX}", self.rank);
        }
        if self.method == Method::Pblora && !(1..=RANK_MAX).contains(&self.mixed_rank) {
            bail!("adapter.mixed_rank is {}, not in 1..={RANK_MAX}; pblora needs it", self.mixed_rank);
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            bail!("adapter.alpha is {}, not a number above 0", self.alpha);
        }
        if !(0.0..1.0).contains(&self.dropout) {
            bail!("adapter.dropout is {}, not in 0..1", self.dropout);
        }
        if self.objectives.is_empty() {
            bail!("adapter.objectives is empty; name at least one");
        }
        if self.method == Method::Lora && self.objectives.len() != 1 {
            bail!("adapter.objectives names {}, and a plain lora is trained for one", self.objectives.len());
        }
        let silent = self.objectives.iter().find(|objective| objective.description.trim().is_empty());
        if let (Some(objective), Method::Moslora, Conditioning::Text) =
            (silent, self.method, self.conditioning)
        {
            bail!(
                "adapter.objectives: {:?} has no description, which text conditioning embeds",
                objective.name
            );
        }
        Ok(())
    }

    /// s
    pub fn scale(&self) -> f64 {
        match self.method {
            Method::Pblora => self.alpha / self.mixed_rank as f64,
            Method::Moslora | Method::Lora => self.alpha / self.rank as f64,
        }
    }

    /// Width of v(p).
    pub fn conditioning_width(&self, backbone: &Config) -> usize {
        match self.conditioning {
            Conditioning::Text => backbone.hidden,
            Conditioning::Onehot => self.objectives.len(),
        }
    }

    /// The layers that are adapted, in the order of the flat vector.
    ///
    /// # Errors
    /// For a target that no layer has.
    pub fn projections(&self, backbone: &Config) -> anyhow::Result<Vec<Projection>> {
        let all = projections(backbone);
        let known = |target: &String| all.iter().any(|projection| projection.is(target));
        if let Some(unknown) = self.targets.iter().find(|target| !known(target)) {
            bail!(
                "adapter.targets: {unknown:?} is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
            );
        }
        if self.targets.is_empty() {
            bail!("adapter.targets is empty; name at least one linear layer, such as \"q_proj\"");
        }
        Ok(all.into_iter().filter(|p| self.targets.iter().any(|target| p.is(target))).collect())
    }

    /// All tensors, in order, and the flat vector before training.
    ///
    /// # Errors
    /// As [`AdapterConfig::projections`].
    pub fn begin(&self, backbone: &Config, seed: u64) -> anyhow::Result<(Vec<Parameter>, Vec<f32>)> {
        let mut layout = Vec::new();
        let mut values = Vec::new();
        for layer in 0..backbone.layers {
            for projection in self.projections(backbone)? {
                for (suffix, shape, start) in self.tensors(projection, self.conditioning_width(backbone)) {
                    let name = format!("{}{suffix}", stem(layer, projection.name));
                    let (offset, count) = (values.len(), shape.iter().product());
                    values.extend(start.values(seed, layout.len() as u32, count));
                    layout.push(Parameter { name, shape, offset });
                }
            }
        }
        Ok((layout, values))
    }

    /// Suffix, shape and beginning of each tensor of one adapted layer.
    fn tensors(&self, projection: Projection, width: usize) -> Vec<(String, Vec<usize>, Start)> {
        let Projection { outputs, inputs, .. } = projection;
        let (rank, mixed) = (self.rank, self.mixed_rank);
        // PyTorch's own for linear layers, and Kaiming's at a = √5.
        let uniform = |fan_in: usize| Start::Uniform { bound: 1.0 / (fan_in as f32).sqrt() };
        match self.method {
            Method::Lora => vec![
                ("lora_A.weight".to_owned(), vec![rank, inputs], uniform(inputs)),
                ("lora_B.weight".to_owned(), vec![outputs, rank], Start::Zero),
            ],
            Method::Pblora => vec![
                ("pblora_A".to_owned(), vec![rank + mixed, inputs], uniform(inputs)),
                ("pblora_B".to_owned(), vec![outputs, rank + mixed], Start::Zero),
                ("pblora_W1".to_owned(), vec![rank, rank], uniform(rank)),
                ("pblora_W2".to_owned(), vec![self.objectives.len(), mixed * mixed], uniform(mixed)),
            ],
            Method::Moslora => {
                let mut tensors = vec![
                    ("moslora_A.weight".to_owned(), vec![rank, inputs], uniform(inputs)),
                    ("moslora_B.weight".to_owned(), vec![outputs, rank], Start::Zero),
                ];
                for (name, bound) in [("gamma", GAMMA_BOUND), ("beta", BETA_BOUND)] {
                    tensors.extend(self.head(name, width, bound));
                }
                tensors
            }
        }
    }

    /// The tensors of the map from v(p) to γ or β.
    fn head(&self, name: &str, width: usize, bound: f32) -> Vec<(String, Vec<usize>, Start)> {
        let (rank, units) = (self.rank, self.units());
        let tensor = |suffix: &str, shape, bound| {
            (format!("moslora_{name}.{suffix}"), shape, Start::Uniform { bound })
        };
        match self.head {
            Head::Linear => vec![tensor("weight", vec![rank, width], bound)],
            Head::Mlp => {
                let [outer, inner] = [width, units].map(|fan_in| 1.0 / (fan_in as f32).sqrt());
                vec![
                    tensor("0.weight", vec![units, width], outer),
                    tensor("0.bias", vec![units], outer),
                    tensor("2.weight", vec![rank, units], inner),
                    tensor("2.bias", vec![rank], inner),
                ]
            }
        }
    }

    fn units(&self) -> usize {
        if self.head_units == 0 { MLP_UNITS_PER_RANK * self.rank } else { self.head_units }
    }

    /// `adapter_config.json`.
    fn peft_json(&self, backbone: &Config, backbone_fingerprint: &[u8; 32]) -> serde_json::Value {
        let fingerprint: String = backbone_fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut json = serde_json::json!({
            "peft_type": match self.method {
                Method::Moslora => "MOSLORA",
                Method::Pblora => "PBLORA",
                Method::Lora => "LORA",
            },
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "objectives": self.objectives,
            "backbone_fingerprint": fingerprint,
            "backbone_vocabulary": backbone.vocabulary,
            "bias": "none",
            "task_type": "CAUSAL_LM",
        });
        match self.method {
            Method::Pblora => {
                json["r1"] = self.rank.into();
                json["r2"] = self.mixed_rank.into();
                json["obj_num"] = self.objectives.len().into();
            }
            Method::Moslora => {
                json["r"] = self.rank.into();
                json["conditioning"] = serde_json::json!(self.conditioning);
                json["head"] = serde_json::json!(self.head);
            }
            Method::Lora => json["r"] = self.rank.into(),
        }
        json
    }

    /// Writes both files of the adapter's folder, each whole or not at all.
    ///
    /// # Errors
    /// Where the file system does.
    pub fn save(
        &self,
        folder: &Path,
        backbone: (&Config, &[u8; 32]),
        layout: &[Parameter],
        values: &[f32],
        embeddings: &[f32],
    ) -> anyhow::Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let frozen: Vec<u8> = embeddings.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut views = Vec::with_capacity(layout.len() + 1);
        for parameter in layout {
            let range = parameter.range();
            let data = &bytes[4 * range.start..4 * range.end];
            views.push((parameter.name.clone(), TensorView::new(Dtype::F32, parameter.shape.clone(), data)?));
        }
        if !frozen.is_empty() {
            let rows = self.objectives.len();
            let shape = vec![rows, embeddings.len() / rows];
            views.push(("moslora_objectives".to_owned(), TensorView::new(Dtype::F32, shape, &frozen)?));
        }
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let weights = safetensors::serialize(views, Some(metadata))?;
        let json = serde_json::to_string_pretty(&self.peft_json(backbone.0, backbone.1))?;
        whole_file::write(&folder.join("adapter_model.safetensors"), &weights)?;
        whole_file::write(&folder.join("adapter_config.json"), json.as_bytes())
    }
}

// === impl Projection ===

impl Projection {
    /// PEFT matches a target by the end of the module's name.
    fn is(&self, target: &str) -> bool {
        self.name == target || self.name.rsplit('.').next() == Some(target)
    }
}

// === impl Start ===

impl Start {
    /// A function of seed and place, so that every worker of a run begins alike.
    fn values(self, seed: u64, tensor: u32, count: usize) -> Vec<f32> {
        let Self::Uniform { bound } = self else { return vec![0.0; count] };
        let key = [seed as u32, (seed >> 32) as u32];
        let words = (0..count.div_ceil(4) as u32)
            .flat_map(|block| philox4x32_10([block, tensor, 0, INITIAL_STREAM], key));
        // The upper 24 bits, and a half: symmetric around zero, never the bound itself.
        let unit = |word: u32| ((word >> 8) as f32 + 0.5) / 8_388_608.0 - 1.0;
        words.take(count).map(|word| unit(word) * bound).collect()
    }
}

/// Linear layers that can be adapted, in the order of their names within a layer.
pub fn projections(config: &Config) -> Vec<Projection> {
    let (hidden, inner) = (config.hidden, config.intermediate);
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let projection = |name, outputs, inputs| Projection { name, outputs, inputs };
    vec![
        projection("self_attn.q_proj", queries, hidden),
        projection("self_attn.k_proj", keys, hidden),
        projection("self_attn.v_proj", keys, hidden),
        projection("self_attn.o_proj", hidden, queries),
        projection("mlp.gate_proj", inner, hidden),
        projection("mlp.up_proj", inner, hidden),
        projection("mlp.down_proj", hidden, inner),
    ]
}

/// Up to the dot before the name of a tensor.
pub fn stem(layer: usize, projection: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{projection}.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_fill_their_range_and_depend_on_seed_and_tensor() {
        let start = Start::Uniform { bound: 0.1 };
        let values = start.values(7, 3, 10_001);
        assert_eq!(values.len(), 10_001);
        let mean = values.iter().sum::<f32>() / 10_001.0;
        let square = values.iter().map(|x| x * x).sum::<f32>() / 10_001.0;
        assert!(values.iter().all(|x| x.abs() < 0.1) && mean.abs() < 2e-3, "{mean}");
        assert!((square - 0.01 / 3.0).abs() < 1e-4, "{square}");
        assert_eq!(values, start.values(7, 3, 10_001));
        assert_ne!(values, start.values(8, 3, 10_001));
        assert_ne!(values, start.values(7, 4, 10_001));
    }
}
