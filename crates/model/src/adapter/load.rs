//! Reads an adapter folder and holds it to the backbone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use memmap2::Mmap;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::projection::{Projection, matches, names, projections, short};
use super::{
    Adapter, AdapterContents, Backbone, Group, GroupAdapter, Head, LayerAdapter, Method, Modulation,
    Objective, Part,
};
use crate::config::Config;
use crate::error::ModelError;
use crate::kernels::panels::{Format, Numbers, Panels};
use crate::weights::{Weights, read_file, read_only};

pub(super) const CONFIG_FILE: &str = "adapter_config.json";
pub(super) const TENSOR_FILE: &str = "adapter_model.safetensors";

/// What PEFT puts in front of a backbone's tensor names.
const PREFIX: &str = "base_model.model.";
const OBJECTIVES_TENSOR: &str = "moslora_objectives";

/// A rank above this is no low-rank adapter, but a corrupt file about to become an allocation.
const RANK_MAX: usize = 1024;
const OBJECTIVES_MAX: usize = 64;
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Rank 1024 on every layer of a model of 8 billion parameters, in f32, is below it.
pub(crate) const TENSOR_BYTES_MAX: u64 = 16 << 30;

/// The folder's JSON, checked.
pub(super) struct Description {
    pub(super) method: Method,
    /// Rank; of PBLoRA r1.
    pub(super) rank: usize,
    /// Of PBLoRA.
    r2: usize,
    pub(super) scale: f32,
    text: bool,
    mlp: bool,
    pub(super) objectives: Vec<Objective>,
    /// Number of objectives where the JSON says it.
    objective_count: Option<usize>,
    targets: Vec<String>,
    layers: Option<Vec<usize>>,
}

/// A folder being read.
struct Loader<'a> {
    description: Description,
    weights: Weights,
    file: PathBuf,
    config: &'a Config,
    used: BTreeSet<String>,
    state_floats: usize,
}

/// `digest`: what the files must be known by, where somebody knows it.
pub(super) fn load(
    folder: &Path,
    config: &Config,
    fingerprint: &[u8; 32],
    digest: Option<&[u8; 32]>,
) -> Result<Adapter, ModelError> {
    let (text, tensors) = read(folder, digest)?;
    adapter(folder, (&text, tensors), (config, fingerprint))
}

pub(super) fn load_to_share(
    folder: &Path,
    config: &Config,
    fingerprint: &[u8; 32],
    digest: &[u8; 32],
) -> Result<Adapter, ModelError> {
    let (text, tensors) = read(folder, Some(digest))?;
    let copy = tensors.to_vec();
    let mut adapter = adapter(folder, (&text, tensors), (config, fingerprint))?;
    adapter.contents = Mutex::new(Some(AdapterContents { text, tensors: copy }));
    Ok(adapter)
}

pub(super) fn of_contents(
    contents: AdapterContents,
    config: &Config,
    fingerprint: &[u8; 32],
) -> Result<Adapter, ModelError> {
    let folder = Path::new("the adapter of rank 0");
    let AdapterContents { text, tensors } = contents;
    let tensors = read_only(&tensors).map_err(|error| ModelError::io(folder, error))?;
    adapter(folder, (&text, tensors), (config, fingerprint))
}

/// Both files are read once, and what was read is what is checked: they may change at any moment.
fn read(folder: &Path, digest: Option<&[u8; 32]>) -> Result<(String, Mmap), ModelError> {
    let text = read_config(&folder.join(CONFIG_FILE))?;
    let tensors = read_file(&folder.join(TENSOR_FILE), TENSOR_BYTES_MAX)?;
    if let Some(digest) = digest {
        check_digest(folder, &Sha256::new().chain_update(&text).chain_update(&tensors).finalize(), digest)?;
    }
    Ok((text, tensors))
}

/// `folder` is for errors.
fn adapter(
    folder: &Path,
    (text, tensors): (&str, Mmap),
    (config, fingerprint): (&Config, &[u8; 32]),
) -> Result<Adapter, ModelError> {
    let config_file = folder.join(CONFIG_FILE);
    let file = folder.join(TENSOR_FILE);
    let json: Value = serde_json::from_str(text)
        .map_err(|error| ModelError::malformed(&config_file, format!("not JSON: {error}")))?;
    let fields = Fields { json: &json, file: &config_file };
    fields.check_backbone(config, fingerprint)?;
    let description = fields.description()?;

    let weights = Weights::from_memory(&file, tensors)?;
    let mut loader = Loader { description, weights, file, config, used: BTreeSet::new(), state_floats: 0 };
    loader.adapter(text)
}

fn check_digest(folder: &Path, found: &[u8], wanted: &[u8; 32]) -> Result<(), ModelError> {
    if found == wanted {
        return Ok(());
    }
    let text = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (found, wanted) = (text(found), text(wanted));
    let reason = format!("its files have the digest {found}, not {wanted}: they have changed");
    Err(ModelError::Adapter { file: folder.to_owned(), reason })
}

pub(super) fn read_config(file: &Path) -> Result<String, ModelError> {
    let bytes = std::fs::metadata(file).map_err(|error| ModelError::io(file, error))?.len();
    if bytes > CONFIG_BYTES_MAX {
        return Err(ModelError::malformed(file, format!("{bytes} bytes are too many for a configuration")));
    }
    std::fs::read_to_string(file).map_err(|error| ModelError::io(file, error))
}

/// The JSON object and its name in errors.
pub(super) struct Fields<'a> {
    pub(super) json: &'a Value,
    pub(super) file: &'a Path,
}

impl Fields<'_> {
    pub(super) fn fail<T>(&self, reason: impl Into<String>) -> Result<T, ModelError> {
        Err(ModelError::Adapter { file: self.file.to_owned(), reason: reason.into() })
    }

    fn check_backbone(&self, config: &Config, fingerprint: &[u8; 32]) -> Result<(), ModelError> {
        if let Some(expected) = self.json["backbone_fingerprint"].as_str() {
            let found: String = fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
            if !expected.eq_ignore_ascii_case(&found) {
                return self.fail(format!("it was trained on backbone {expected}, and this one is {found}"));
            }
        }
        if let Some(expected) = self.json["backbone_vocabulary"].as_u64()
            && expected != config.vocabulary as u64
        {
            let found = config.vocabulary;
            return self.fail(format!(
                "it was trained with a vocabulary of {expected}, and this backbone has {found}"
            ));
        }
        Ok(())
    }

    pub(super) fn description(&self) -> Result<Description, ModelError> {
        let method = match self.json["peft_type"].as_str() {
            Some("MOSLORA") => Method::MosLora,
            Some("PBLORA") => Method::PbLora,
            Some("LORA") => Method::Lora,
            Some(other) => return self.fail(format!("peft_type '{other}' is none of MOSLORA, PBLORA, LORA")),
            None => return self.fail("'peft_type' is missing"),
        };
        let (rank, r2) = match method {
            Method::PbLora => (self.rank("r1")?, self.rank("r2")?),
            _ => (self.rank("r")?, 0),
        };
        self.refuse_variants()?;
        let objectives = self.objectives()?;
        let objective_count = match (method, objectives.len()) {
            (Method::PbLora, 0) => Some(self.count("obj_num")?),
            (_, 0) => None,
            (_, listed) => Some(listed),
        };
        if let Some(count) = objective_count.filter(|count| !(1..=OBJECTIVES_MAX).contains(count)) {
            return self.fail(format!("{count} objectives are not in 1..={OBJECTIVES_MAX}"));
        }
        Ok(Description {
            method,
            rank,
            r2,
            scale: self.scale(if r2 > 0 { r2 } else { rank })?,
            text: self.choice("conditioning", ["text", "onehot"])? == 0,
            mlp: self.choice("head", ["linear", "mlp"])? == 1,
            objectives,
            objective_count,
            targets: self.targets()?,
            layers: self.layers()?,
        })
    }

    /// Variants of LoRA that would load, and answer nonsense.
    fn refuse_variants(&self) -> Result<(), ModelError> {
        for flag in ["use_dora", "fan_in_fan_out", "lora_bias"] {
            if self.json[flag].as_bool() == Some(true) {
                return self.fail(format!("'{flag}' is not supported"));
            }
        }
        if let Some(bias) = self.json["bias"].as_str().filter(|bias| *bias != "none") {
            return self.fail(format!("bias '{bias}' is not supported"));
        }
        for field in [
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "layer_replication",
            "trainable_token_indices",
        ] {
            let value = &self.json[field];
            let empty = value.is_null()
                || value.as_object().is_some_and(serde_json::Map::is_empty)
                || value.as_array().is_some_and(Vec::is_empty);
            if !empty {
                return self.fail(format!("'{field}' is not supported"));
            }
        }
        // These change the backbone's weights at the start of training; the adapter alone is half of it.
        let start = self.json["init_lora_weights"].as_str().unwrap_or_default();
        if ["pissa", "olora", "corda", "loftq"].iter().any(|name| start.starts_with(name)) {
            return self.fail(format!("init_lora_weights '{start}' is not supported"));
        }
        Ok(())
    }

    fn count(&self, field: &str) -> Result<usize, ModelError> {
        match self.json[field].as_u64().and_then(|count| usize::try_from(count).ok()) {
            Some(count) => Ok(count),
            None => self.fail(format!("'{field}' is missing or not a count")),
        }
    }

    fn rank(&self, field: &str) -> Result<usize, ModelError> {
        match self.count(field)? {
            rank @ 1..=RANK_MAX => Ok(rank),
            rank => self.fail(format!("'{field}' {rank} is not in 1..={RANK_MAX}")),
        }
    }

    /// lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA.
    fn scale(&self, rank: usize) -> Result<f32, ModelError> {
        let Some(alpha) = self.json["lora_alpha"].as_f64().filter(|alpha| alpha.is_finite()) else {
            return self.fail("'lora_alpha' is missing or not a number");
        };
        let stabilised = self.json["use_rslora"].as_bool() == Some(true);
        let divisor = if stabilised { (rank as f64).sqrt() } else { rank as f64 };
        Ok((alpha / divisor) as f32)
    }

    /// Index of a field's value; the first where the field is absent.
    fn choice(&self, field: &str, values: [&str; 2]) -> Result<usize, ModelError> {
        match &self.json[field] {
            Value::Null => Ok(0),
            value => match values.iter().position(|known| value.as_str() == Some(known)) {
                Some(index) => Ok(index),
                None => self.fail(format!("{field} {value} is neither '{}' nor '{}'", values[0], values[1])),
            },
        }
    }

    fn objectives(&self) -> Result<Vec<Objective>, ModelError> {
        let Some(listed) = self.json["objectives"].as_array() else { return Ok(Vec::new()) };
        let mut objectives: Vec<Objective> = Vec::new();
        for value in listed.iter().take(OBJECTIVES_MAX + 1) {
            let Some(name) = value["name"].as_str().filter(|name| !name.is_empty()) else {
                return self.fail("an objective has no 'name'");
            };
            if objectives.iter().any(|other| other.name == name) {
                return self.fail(format!("objective '{name}' stands twice"));
            }
            let description = value["description"].as_str().unwrap_or_default().to_owned();
            objectives.push(Objective { name: name.to_owned(), description });
        }
        Ok(objectives)
    }

    /// Names of adapted projections; a single string may be PEFT's "all-linear".
    fn targets(&self) -> Result<Vec<String>, ModelError> {
        let targets: Vec<String> = match &self.json["target_modules"] {
            Value::Array(names) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            Value::String(all) if all == "all-linear" => names().map(|name| short(name).to_owned()).collect(),
            Value::String(other) => {
                return self.fail(format!("target_modules '{other}' is not a list of names"));
            }
            _ => return self.fail("'target_modules' is missing"),
        };
        if targets.is_empty() {
            return self.fail("'target_modules' is empty");
        }
        match targets.iter().find(|target| !names().any(|name| matches(target, name))) {
            Some(unknown) => {
                self.fail(format!("target module '{unknown}' is no linear layer of this architecture"))
            }
            None => Ok(targets),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>, ModelError> {
        match &self.json["layers_to_transform"] {
            Value::Null => Ok(None),
            Value::Number(_) => Ok(Some(vec![self.count("layers_to_transform")?])),
            Value::Array(layers) => {
                let layers =
                    layers.iter().filter_map(Value::as_u64).filter_map(|layer| usize::try_from(layer).ok());
                Ok(Some(layers.collect()))
            }
            _ => self.fail("'layers_to_transform' is not a list of layers"),
        }
    }
}

impl Loader<'_> {
    fn fail<T>(&self, reason: impl Into<String>) -> Result<T, ModelError> {
        Err(ModelError::Adapter { file: self.file.clone(), reason: reason.into() })
    }

    fn adapter(&mut self, text: &str) -> Result<Adapter, ModelError> {
        let mut hash = Sha256::new();
        hash.update(text);
        let layers = self.config.layers;
        if let Some(layer) = self.description.layers.iter().flatten().find(|layer| **layer >= layers) {
            return self.fail(format!("layer {layer} of a backbone with {layers} layers"));
        }
        let embeddings = self.embeddings(&mut hash)?;
        let mut adapted = Vec::with_capacity(layers);
        for layer in 0..layers {
            adapted.push(self.layer(layer, &embeddings, &mut hash)?);
        }
        if let Some(surplus) = self.weights.stored_names().filter(|name| !self.used.contains(*name)).min() {
            let surplus = surplus.to_owned();
            return self.fail(format!(
                "tensor '{surplus}' belongs to no target module of a backbone with {layers} layers"
            ));
        }
        let count = self.description.objective_count.unwrap_or(0);
        let mut objectives = std::mem::take(&mut self.description.objectives);
        if self.description.method == Method::Lora {
            // One ARM per objective: what it is for may be named, but there is nothing to weigh.
            objectives.clear();
        } else if objectives.is_empty() {
            let unnamed =
                |index| Objective { name: format!("objective_{index}"), description: String::new() };
            objectives = (0..count).map(unnamed).collect();
        }
        Ok(Adapter {
            method: self.description.method,
            objectives,
            fingerprint: hash.finalize().into(),
            backbone: Backbone::of(self.config),
            embeddings,
            layers: adapted,
            state_floats: self.state_floats,
            contents: Mutex::new(None),
        })
    }

    /// The objectives' embeddings of text conditioning; also settles the number of objectives.
    fn embeddings(&mut self, hash: &mut Sha256) -> Result<Vec<Vec<f32>>, ModelError> {
        if self.description.method != Method::MosLora {
            return Ok(Vec::new());
        }
        if !self.description.text {
            return Ok(Vec::new());
        }
        let shape = self.weights.shape(OBJECTIVES_TENSOR)?;
        let [count, width] = shape[..] else {
            return self.fail(format!("tensor '{OBJECTIVES_TENSOR}' is not a matrix"));
        };
        let listed = *self.description.objective_count.get_or_insert(count);
        if listed != count || !(1..=OBJECTIVES_MAX).contains(&count) || width == 0 {
            return self
                .fail(format!("tensor '{OBJECTIVES_TENSOR}' has {count} rows for {listed} objectives"));
        }
        let values = self.tensor(OBJECTIVES_TENSOR, &shape, hash)?;
        Ok(values.chunks_exact(width).map(<[f32]>::to_vec).collect())
    }

    fn layer(
        &mut self,
        layer: usize,
        embeddings: &[Vec<f32>],
        hash: &mut Sha256,
    ) -> Result<LayerAdapter, ModelError> {
        let mut adapted = LayerAdapter::default();
        if self.description.layers.as_ref().is_some_and(|layers| !layers.contains(&layer)) {
            return Ok(adapted);
        }
        let rank = self.description.rank + self.description.r2;
        for group in [Group::Qkv, Group::Output, Group::GateUp, Group::Down] {
            let targets =
                |p: &Projection| self.description.targets.iter().any(|target| matches(target, p.name));
            let parts: Vec<Projection> =
                projections(self.config).into_iter().filter(|p| p.group == group).filter(targets).collect();
            let Some(first) = parts.first() else { continue };
            let mut a = Panels::zeroed(Format::F32, parts.len() * rank, first.inputs);
            let mut loaded = Vec::with_capacity(parts.len());
            for (index, projection) in parts.iter().enumerate() {
                loaded.push(self.part((layer, index * rank), projection, &mut a, embeddings, hash)?);
            }
            adapted.groups[group as usize] = Some(GroupAdapter { a, parts: loaded });
        }
        Ok(adapted)
    }

    fn part(
        &mut self,
        (layer, first_rank): (usize, usize),
        projection: &Projection,
        a: &mut Panels,
        embeddings: &[Vec<f32>],
        hash: &mut Sha256,
    ) -> Result<Part, ModelError> {
        let rank = self.description.rank + self.description.r2;
        let stem = format!("{PREFIX}model.layers.{layer}.{}.", projection.name);
        let (a_name, b_name) = match self.description.method {
            Method::MosLora => ("moslora_A.weight", "moslora_B.weight"),
            Method::PbLora => ("pblora_A", "pblora_B"),
            Method::Lora => ("lora_A.weight", "lora_B.weight"),
        };
        let down = self.tensor(&format!("{stem}{a_name}"), &[rank, projection.inputs], hash)?;
        a.set(first_rank, &Numbers::F32(down));
        let b = self.tensor(&format!("{stem}{b_name}"), &[projection.outputs, rank], hash)?;
        let modulation = match self.description.method {
            Method::Lora => Modulation::None,
            Method::MosLora => {
                let width = self.width(&stem, embeddings)?;
                let gamma = self.head(&format!("{stem}moslora_gamma"), width, hash)?;
                let beta = self.head(&format!("{stem}moslora_beta"), width, hash)?;
                Modulation::Affine { gamma, beta }
            }
            Method::PbLora => {
                let Description { rank: r1, r2, objective_count, .. } = self.description;
                let count = objective_count.expect("PBLoRA's description has it");
                let w1 = self.tensor(&format!("{stem}pblora_W1"), &[r1, r1], hash)?;
                let w2 = self.tensor(&format!("{stem}pblora_W2"), &[count, r2 * r2], hash)?;
                Modulation::Mix { w1, r1, w2, r2 }
            }
        };
        let part = Part {
            linear: projection.linear,
            name: projection.name,
            first_rank,
            b: Panels::pack(b, projection.outputs, rank),
            scale: self.description.scale,
            modulation,
            state: self.state_floats,
        };
        self.state_floats += part.state_floats();
        Ok(part)
    }

    /// Length of v(p). One-hot conditioning without named objectives learns it from the first head.
    fn width(&mut self, stem: &str, embeddings: &[Vec<f32>]) -> Result<usize, ModelError> {
        if let Some(embedding) = embeddings.first() {
            return Ok(embedding.len());
        }
        if let Some(count) = self.description.objective_count {
            return Ok(count);
        }
        let name = format!(
            "{stem}{}",
            if self.description.mlp { "moslora_gamma.0.weight" } else { "moslora_gamma.weight" }
        );
        let count = self.weights.shape(&name)?.get(1).copied().unwrap_or(0);
        if !(1..=OBJECTIVES_MAX).contains(&count) {
            return self.fail(format!(
                "tensor '{name}' is for {count} objectives, which are not in 1..={OBJECTIVES_MAX}"
            ));
        }
        self.description.objective_count = Some(count);
        Ok(count)
    }

    fn head(&mut self, stem: &str, width: usize, hash: &mut Sha256) -> Result<Head, ModelError> {
        let rank = self.description.rank;
        if !self.description.mlp {
            return Ok(Head::Linear(self.tensor(&format!("{stem}.weight"), &[rank, width], hash)?));
        }
        let name = format!("{stem}.0.weight");
        let inner = self.weights.shape(&name)?.first().copied().unwrap_or(0);
        Ok(Head::Mlp {
            first: self.tensor(&name, &[inner, width], hash)?,
            first_bias: self.tensor(&format!("{stem}.0.bias"), &[inner], hash)?,
            second: self.tensor(&format!("{stem}.2.weight"), &[rank, inner], hash)?,
            second_bias: self.tensor(&format!("{stem}.2.bias"), &[rank], hash)?,
        })
    }

    /// A tensor of exactly this shape, all of its numbers finite.
    fn tensor(&mut self, name: &str, shape: &[usize], hash: &mut Sha256) -> Result<Vec<f32>, ModelError> {
        let values = self.weights.tensor(name, shape)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(index) = values.iter().position(|x| !x.is_finite()) {
            return self.fail(format!("tensor '{name}' has {} at element {index}", values[index]));
        }
        hash.update(name);
        for x in &values {
            hash.update(x.to_le_bytes());
        }
        self.used.insert(name.to_owned());
        Ok(values)
    }
}
