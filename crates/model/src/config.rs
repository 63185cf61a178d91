//! The dimensions and constants of a model, read from `config.json` or from GGUF metadata and checked once.

use std::path::Path;

use serde_json::Value;

use crate::error::ModelError;
use crate::gguf::{Gguf, Value as Metadata};

/// No published model of these families comes near: a larger number means a corrupt file, and would
/// otherwise become an allocation.
const DIMENSION_MAX: usize = 1 << 24;
const LAYERS_MAX: usize = 1 << 10;

/// The forward passes this crate knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1/2/3, Alpaca, Tulu-2, Mistral, TinyLlama, SmolLM2.
    Llama,
    /// Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections.
    Qwen2,
}

/// Everything about a model but its weights. All counts are in elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    /// Rows of the embedding; can exceed the tokenizer's tokens (padding for alignment).
    pub vocabulary: usize,
    pub hidden: usize,
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    /// Positions the model may see: what it was trained for, or the sliding window where that is shorter,
    /// since within the window sliding attention is full attention.
    pub context_tokens: usize,
    pub rms_norm_epsilon: f32,
    pub rope: Rope,
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
    /// `q_proj`, `k_proj` and `v_proj` have biases.
    pub qkv_bias: bool,
    pub bos: Option<u32>,
    /// Tokens that end an answer, ascending.
    pub eos: Vec<u32>,
}

/// Rotary position embedding (arXiv 2104.09864) and its stretching to longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f32,
    pub scaling: RopeScaling,
}

#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions are divided by `factor` (arXiv 2306.15595).
    Linear {
        factor: f32,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: usize,
    },
    /// One divisor for each of the `head_dim / 2` frequencies: how a GGUF stores the outcome of `Llama3`.
    Divisors(Vec<f32>),
}

impl Config {
    /// Reads a Hugging Face `config.json`; `file` is named in errors.
    pub fn from_json(json: &Value, file: &Path) -> Result<Self, ModelError> {
        let fields = Fields { json, file };
        let architecture = match fields.text("model_type").unwrap_or("llama") {
            "llama" | "mistral" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            other => return Err(ModelError::unsupported(file, format!("model_type '{other}'"))),
        };
        fields.refuse_variants()?;

        let hidden = fields.count("hidden_size")?;
        let heads = fields.count("num_attention_heads")?;
        let context = fields.count("max_position_embeddings")?;
        let config = Self {
            architecture,
            vocabulary: fields.count("vocab_size")?,
            hidden,
            layers: fields.count("num_hidden_layers")?,
            heads,
            kv_heads: fields.count_or("num_key_value_heads", heads)?,
            head_dim: fields.count_or("head_dim", hidden / heads.max(1))?,
            intermediate: fields.count("intermediate_size")?,
            context_tokens: fields.sliding_window(architecture).map_or(context, |window| window.min(context)),
            rms_norm_epsilon: fields.float("rms_norm_eps")?.unwrap_or(1e-6),
            rope: fields.rope(context)?,
            tied_embeddings: fields.flag("tie_word_embeddings"),
            qkv_bias: architecture == Architecture::Qwen2,
            bos: fields.token_ids("bos_token_id").first().copied(),
            eos: fields.token_ids("eos_token_id"),
        };
        config.check(file)
    }

    /// Reads the metadata of a GGUF; biases and tied embeddings show in its tensors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`], [`ModelError::Unsupported`].
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let (architecture, prefix) = match gguf.text("general.architecture") {
            Some("llama") => (Architecture::Llama, "llama"),
            Some("qwen2") => (Architecture::Qwen2, "qwen2"),
            Some(other) => {
                return Err(ModelError::unsupported(gguf.path(), format!("architecture '{other}'")));
            }
            None => return Err(ModelError::malformed(gguf.path(), "'general.architecture' is missing")),
        };
        let fields = Keys { gguf, prefix };
        let hidden = fields.count("embedding_length")?;
        let heads = fields.count("attention.head_count")?;
        let head_dim = fields.count_or("attention.key_length", hidden / heads.max(1))?;
        fields.refuse_variants(head_dim)?;

        let embedding = gguf.stored("token_embd.weight");
        let vocabulary = embedding.and_then(|tensor| tensor.shape.first().copied()).unwrap_or(0);
        let context = fields.count("context_length")?;
        let config = Self {
            architecture,
            vocabulary,
            hidden,
            layers: fields.count("block_count")?,
            heads,
            kv_heads: fields.count_or("attention.head_count_kv", heads)?,
            head_dim,
            intermediate: fields.count("feed_forward_length")?,
            context_tokens: fields.count_or("attention.sliding_window", context)?.min(context),
            rms_norm_epsilon: fields.float("attention.layer_norm_rms_epsilon").unwrap_or(1e-5),
            rope: fields.rope()?,
            tied_embeddings: !gguf.contains("output.weight"),
            qkv_bias: gguf.contains("blk.0.attn_q.bias"),
            bos: gguf.token_id("tokenizer.ggml.bos_token_id"),
            eos: ["eos", "eot", "eom"]
                .iter()
                .filter_map(|kind| gguf.token_id(&format!("tokenizer.ggml.{kind}_token_id")))
                .collect(),
        };
        config.check(gguf.path())
    }

    /// Returns the configuration if a model of these dimensions can exist.
    pub(crate) fn check(mut self, file: &Path) -> Result<Self, ModelError> {
        let dimensions = [
            ("vocabulary", self.vocabulary),
            ("hidden size", self.hidden),
            ("attention heads", self.heads),
            ("key-value heads", self.kv_heads),
            ("head dimension", self.head_dim),
            ("intermediate size", self.intermediate),
            ("context", self.context_tokens),
        ];
        for (what, size) in dimensions {
            if size == 0 || size > DIMENSION_MAX {
                return Err(ModelError::malformed(
                    file,
                    format!("{what} {size} is not in 1..={DIMENSION_MAX}"),
                ));
            }
        }
        if self.layers == 0 || self.layers > LAYERS_MAX {
            let reason = format!("{} layers are not in 1..={LAYERS_MAX}", self.layers);
            return Err(ModelError::malformed(file, reason));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let reason = format!("{} attention heads over {} key-value heads", self.heads, self.kv_heads);
            return Err(ModelError::malformed(file, reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::malformed(file, format!("odd head dimension {}", self.head_dim)));
        }
        if !(self.rms_norm_epsilon > 0.0 && self.rms_norm_epsilon < 1.0) {
            let reason = format!("rms norm epsilon {} is not in (0, 1)", self.rms_norm_epsilon);
            return Err(ModelError::malformed(file, reason));
        }
        self.rope.check(self.head_dim, file)?;
        self.eos.sort_unstable();
        self.eos.dedup();
        Ok(self)
    }
}

impl Rope {
    /// Angle per position of each rotated pair: (head_dim / 2), the first the fastest.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|pair| {
                let plain = f64::from(self.theta).powf(-2.0 * pair as f64 / head_dim as f64);
                self.scaling.apply(pair, plain)
            })
            .collect()
    }

    fn check(&self, head_dim: usize, file: &Path) -> Result<(), ModelError> {
        let fail = |reason: String| Err(ModelError::malformed(file, reason));
        let sound = |x: f32| x.is_finite() && x > 0.0;
        if !sound(self.theta) {
            return fail(format!("rope theta {}", self.theta));
        }
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } if sound(*factor) => Ok(()),
            RopeScaling::Linear { factor } => fail(format!("rope scaling factor {factor}")),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let ordered = sound(*low_freq_factor) && low_freq_factor < high_freq_factor;
                if sound(*factor) && ordered && high_freq_factor.is_finite() && *original_context > 0 {
                    return Ok(());
                }
                fail(format!(
                    "llama3 rope scaling with factor {factor}, low_freq_factor {low_freq_factor}, \
                     high_freq_factor {high_freq_factor}, original context {original_context}"
                ))
            }
            RopeScaling::Divisors(divisors) if divisors.len() != head_dim / 2 => {
                fail(format!("{} rope divisors for head dimension {head_dim}", divisors.len()))
            }
            RopeScaling::Divisors(divisors) if divisors.iter().all(|x| sound(*x)) => Ok(()),
            RopeScaling::Divisors(_) => fail("a rope divisor is not positive".to_owned()),
        }
    }
}

impl RopeScaling {
    /// The scaled angle per position of one pair.
    fn apply(&self, pair: usize, frequency: f64) -> f64 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / f64::from(factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
                let turns = original_context as f64 * frequency / (2.0 * std::f64::consts::PI);
                // 0 below `low` turns over the original context, 1 above `high`.
                let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                keep * frequency + (1.0 - keep) * frequency / f64::from(factor)
            }
            Self::Divisors(ref divisors) => frequency / f64::from(divisors[pair]),
        }
    }
}

/// The architecture's own keys of a GGUF.
struct Keys<'a> {
    gguf: &'a Gguf,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn count(&self, name: &str) -> Result<usize, ModelError> {
        let key = self.key(name);
        let reason = || ModelError::malformed(self.gguf.path(), format!("'{key}' is missing or not a count"));
        self.gguf.count(&key).ok_or_else(reason)
    }

    fn count_or(&self, name: &str, default: usize) -> Result<usize, ModelError> {
        if self.gguf.get(&self.key(name)).is_none() { Ok(default) } else { self.count(name) }
    }

    fn float(&self, name: &str) -> Option<f32> {
        self.gguf.float(&self.key(name))
    }

    /// Variants of the architecture that would run, and answer nonsense.
    fn refuse_variants(&self, head_dim: usize) -> Result<(), ModelError> {
        if let Some(parts @ 2..) = self.gguf.count("split.count") {
            let feature =
                format!("one of {parts} parts of a GGUF (join them with `llama-gguf-split --merge`)");
            return Err(ModelError::unsupported(self.gguf.path(), feature));
        }
        if self.count_or("expert_count", 0)? > 0 {
            return Err(ModelError::unsupported(self.gguf.path(), "a mixture of experts"));
        }
        let rotated = self.count_or("rope.dimension_count", head_dim)?;
        if rotated != head_dim {
            let feature = format!("rotating {rotated} of {head_dim} dimensions");
            return Err(ModelError::unsupported(self.gguf.path(), feature));
        }
        Ok(())
    }

    fn rope(&self) -> Result<Rope, ModelError> {
        let theta = self.float("rope.freq_base").unwrap_or(10_000.0);
        Ok(Rope { theta, scaling: self.rope_scaling()? })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, ModelError> {
        let file = self.gguf.path();
        if let Some(table) = self.gguf.stored("rope_freqs.weight") {
            let rows = table.shape.first().copied().unwrap_or(0);
            let divisors = table.decode(0..rows).map_err(|reason| ModelError::malformed(file, reason))?;
            return Ok(RopeScaling::Divisors(divisors));
        }
        // Files older than `rope.scaling.type` name a linear factor alone.
        let kind = match self.gguf.get(&self.key("rope.scaling.type")) {
            Some(Metadata::Text(kind)) => kind.as_str(),
            _ if self.float("rope.scale_linear").is_some() => "linear",
            _ => "none",
        };
        let factor = self.float("rope.scaling.factor").or_else(|| self.float("rope.scale_linear"));
        match (kind, factor) {
            ("none", _) | ("linear", Some(1.0)) => Ok(RopeScaling::None),
            ("linear", Some(factor)) => Ok(RopeScaling::Linear { factor }),
            ("linear", None) => Err(ModelError::malformed(file, "linear rope scaling without a factor")),
            (other, _) => Err(ModelError::unsupported(file, format!("rope scaling '{other}'"))),
        }
    }
}

/// Token ids of a `config.json` or `generation_config.json` field: absent, one, or a list.
pub(crate) fn token_ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

/// A `config.json` being read.
struct Fields<'a> {
    json: &'a Value,
    file: &'a Path,
}

impl<'a> Fields<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        self.json[name].as_str()
    }

    fn flag(&self, name: &str) -> bool {
        self.json[name].as_bool().unwrap_or(false)
    }

    fn token_ids(&self, name: &str) -> Vec<u32> {
        token_ids(&self.json[name])
    }

    fn count(&self, name: &str) -> Result<usize, ModelError> {
        let count = self.json[name].as_u64().and_then(|count| usize::try_from(count).ok());
        count.ok_or_else(|| ModelError::malformed(self.file, format!("'{name}' is missing or not a count")))
    }

    fn count_or(&self, name: &str, default: usize) -> Result<usize, ModelError> {
        if self.json[name].is_null() { Ok(default) } else { self.count(name) }
    }

    fn float(&self, name: &str) -> Result<Option<f32>, ModelError> {
        float(self.json, name, self.file)
    }

    /// Variants of the architecture that would run, and answer nonsense.
    fn refuse_variants(&self) -> Result<(), ModelError> {
        if let Some(activation) = self.text("hidden_act").filter(|name| *name != "silu") {
            return Err(ModelError::unsupported(self.file, format!("activation '{activation}'")));
        }
        for bias in ["attention_bias", "mlp_bias"] {
            if self.flag(bias) {
                return Err(ModelError::unsupported(self.file, format!("'{bias}'")));
            }
        }
        if self.json["quantization_config"].is_object() {
            let feature = "a quantised safetensors model (quantization_config)";
            return Err(ModelError::unsupported(self.file, feature));
        }
        let partial = self.float("partial_rotary_factor")?.filter(|factor| *factor != 1.0);
        if let Some(factor) = partial {
            return Err(ModelError::unsupported(self.file, format!("partial_rotary_factor {factor}")));
        }
        Ok(())
    }

    /// Mistral slides whenever it names a window, Qwen2 only where `use_sliding_window` says so.
    fn sliding_window(&self, architecture: Architecture) -> Option<usize> {
        let slides = match architecture {
            Architecture::Llama => true,
            Architecture::Qwen2 => self.flag("use_sliding_window"),
        };
        let window = self.json["sliding_window"].as_u64().and_then(|window| usize::try_from(window).ok());
        window.filter(|_| slides)
    }

    /// `rope_theta` and `rope_scaling`, or their newer common home `rope_parameters`.
    fn rope(&self, context: usize) -> Result<Rope, ModelError> {
        let parameters = &self.json["rope_parameters"];
        let theta = match self.float("rope_theta")? {
            Some(theta) => theta,
            None => float(parameters, "rope_theta", self.file)?.unwrap_or(10_000.0),
        };
        let scaling =
            if self.json["rope_scaling"].is_object() { &self.json["rope_scaling"] } else { parameters };
        Ok(Rope { theta, scaling: self.rope_scaling(scaling, context)? })
    }

    fn rope_scaling(&self, scaling: &Value, context: usize) -> Result<RopeScaling, ModelError> {
        let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str()).unwrap_or("default");
        let number = |name: &str| {
            let reason =
                || ModelError::malformed(self.file, format!("rope scaling '{kind}' without '{name}'"));
            float(scaling, name, self.file)?.ok_or_else(reason)
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_context: scaling["original_max_position_embeddings"]
                    .as_u64()
                    .and_then(|context| usize::try_from(context).ok())
                    .unwrap_or(context),
            }),
            other => Err(ModelError::unsupported(self.file, format!("rope scaling '{other}'"))),
        }
    }
}

fn float(json: &Value, name: &str, file: &Path) -> Result<Option<f32>, ModelError> {
    match &json[name] {
        Value::Null => Ok(None),
        value => match value.as_f64() {
            Some(number) => Ok(Some(number as f32)),
            None => Err(ModelError::malformed(file, format!("'{name}' is not a number"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(changes: &Value) -> Result<Config, ModelError> {
        let mut json = json!({
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "eos_token_id": [128_008, 128_001],
        });
        for (name, value) in changes.as_object().unwrap() {
            json[name] = value.clone();
        }
        Config::from_json(&json, Path::new("config.json"))
    }

    fn refusal(changes: &Value) -> String {
        read(changes).unwrap_err().to_string()
    }

    #[test]
    fn llama_3_1_stretches_slow_frequencies_only() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        // Expected values: the published formula, evaluated in Python.
        let expected = [
            (0, 1.0),
            (28, 0.003_211_445_994_752_591_3),
            (30, 0.001_371_893_567_761_138_1),
            (34, 0.000_178_507_812_767_996_38),
            (63, 3.068_925_988_914_511e-7),
        ];
        let older = json!({ "rope_scaling": scaling });
        let mut newer = json!({ "rope_theta": null, "rope_parameters": scaling });
        newer["rope_parameters"]["rope_theta"] = json!(500_000.0);
        for changes in [older, newer] {
            let frequencies = read(&changes).unwrap().rope.frequencies(128);
            for (pair, frequency) in expected {
                assert!((frequencies[pair] / frequency - 1.0).abs() < 1e-12, "pair {pair}");
            }
        }
    }

    #[test]
    fn a_linear_factor_and_the_divisors_of_a_gguf_divide() {
        let linear = read(&json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } })).unwrap().rope;
        let divisors = Rope { theta: 500_000.0, scaling: RopeScaling::Divisors(vec![4.0; 64]) };
        assert_eq!(linear.frequencies(128), divisors.frequencies(128));
        assert_eq!(linear.frequencies(128)[0], 0.25);
    }

    #[test]
    fn the_context_ends_where_attention_would_slide() {
        let context = |changes: &Value| read(changes).unwrap().context_tokens;
        assert_eq!(context(&json!({ "model_type": "mistral", "sliding_window": 4096 })), 4096);
        assert_eq!(context(&json!({ "model_type": "mistral", "sliding_window": null })), 131_072);
        let qwen = json!({ "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": false });
        assert_eq!(context(&qwen), 131_072);
        assert!(read(&qwen).unwrap().qkv_bias);
    }

    #[test]
    fn variants_that_would_answer_nonsense_are_refused() {
        assert!(refusal(&json!({ "model_type": "gemma2" })).contains("model_type 'gemma2'"));
        assert!(refusal(&json!({ "hidden_act": "gelu" })).contains("activation 'gelu'"));
        assert!(refusal(&json!({ "attention_bias": true })).contains("attention_bias"));
        assert!(refusal(&json!({ "quantization_config": { "bits": 4 } })).contains("quantised"));
        assert!(refusal(&json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } })).contains("'yarn'"));
    }

    #[test]
    fn impossible_dimensions_are_refused_before_they_are_allocated() {
        assert!(refusal(&json!({ "num_hidden_layers": 1_000_000_000 })).contains("layers"));
        assert!(refusal(&json!({ "vocab_size": 1_u64 << 40 })).contains("vocabulary"));
        assert!(refusal(&json!({ "num_key_value_heads": 5 })).contains("5 key-value heads"));
        assert!(refusal(&json!({ "num_key_value_heads": 0 })).contains("key-value heads 0"));
        assert!(refusal(&json!({ "hidden_size": -1 })).contains("'hidden_size'"));
        assert!(refusal(&json!({ "rms_norm_eps": 0.0 })).contains("epsilon"));
        assert_eq!(read(&json!({})).unwrap().eos, [128_001, 128_008]);
    }
}
