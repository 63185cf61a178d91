//! Model files made by the tests: small enough to corrupt byte by byte, whole enough to open.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};

/// Tensors by Hugging Face name, with the values that every file format must give back.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Dimensions of a made-up model of one layer.
#[derive(Clone, Copy)]
pub struct Shape {
    pub vocabulary: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub biases: bool,
}

/// Enough for the 256-element blocks of K-quants.
pub const WIDE: Shape = Shape { vocabulary: 32, hidden: 256, heads: 4, kv_heads: 2, biases: false };
/// Little enough to damage every byte.
pub const SMALL: Shape = Shape { vocabulary: 32, hidden: 32, heads: 2, kv_heads: 1, biases: false };

/// A GGUF in the making.
pub struct GgufWriter {
    metadata: Vec<u8>,
    metadata_count: u64,
    headers: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl Shape {
    pub fn head_dim(self) -> usize {
        self.hidden / self.heads
    }

    /// Pseudo-random weights in [-1, 1), no two rows alike; exact in every float format.
    pub fn tensors(self) -> Tensors {
        let (hidden, keys) = (self.hidden, self.kv_heads * self.head_dim());
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
            ("lm_head.weight".to_owned(), vec![self.vocabulary, hidden]),
        ];
        let mut layer =
            |name: &str, shape: Vec<usize>| shapes.push((format!("model.layers.0.{name}"), shape));
        layer("input_layernorm.weight", vec![hidden]);
        layer("post_attention_layernorm.weight", vec![hidden]);
        for (name, rows) in [("q", hidden), ("k", keys), ("v", keys)] {
            layer(&format!("self_attn.{name}_proj.weight"), vec![rows, hidden]);
            if self.biases {
                layer(&format!("self_attn.{name}_proj.bias"), vec![rows]);
            }
        }
        layer("self_attn.o_proj.weight", vec![hidden, hidden]);
        for name in ["gate", "up", "down"] {
            layer(&format!("mlp.{name}_proj.weight"), vec![hidden, hidden]);
        }
        let mut state = 7_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as f32 / 128.0 - 1.0
        };
        shapes
            .into_iter()
            .map(|(name, shape)| {
                let values = (0..shape.iter().product()).map(|_| next()).collect();
                (name, (shape, values))
            })
            .collect()
    }

    pub fn config_json(self) -> serde_json::Value {
        serde_json::json!({
            "model_type": if self.biases { "qwen2" } else { "llama" },
            "hidden_size": self.hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.hidden,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": false,
            "bos_token_id": 1,
            "eos_token_id": 2,
        })
    }
}

/// A GGUF of the model, its matrices in `kind`, with a byte-level tokenizer of a few tokens.
pub fn gguf(shape: Shape, tensors: &Tensors, kind: GgmlDType) -> GgufWriter {
    mixed_gguf(shape, tensors, |_| kind)
}

/// The same with a format for each matrix, by its name.
pub fn mixed_gguf(shape: Shape, tensors: &Tensors, kind: impl Fn(&str) -> GgmlDType) -> GgufWriter {
    let architecture = if shape.biases { "qwen2" } else { "llama" };
    let mut writer = GgufWriter::new(architecture, shape);
    for (name, (dimensions, values)) in tensors {
        let mut values = values.clone();
        // What llama.cpp's converter does to `llama` models, and to no others.
        let rotary = name.contains(".q_proj.") || name.contains(".k_proj.");
        if rotary && !shape.biases {
            values = interleave(&values, dimensions[0], shape.head_dim());
        }
        let kind = if dimensions.len() == 1 { GgmlDType::F32 } else { kind(name) };
        writer.tensor(&gguf_name(name), dimensions, &values, kind);
    }
    writer
}

/// The files of a Hugging Face folder: `config.json`, and the tensors dealt out to `shards`, in turn as F32, F16
/// and BF16.
pub fn folder(at: &Path, shape: Shape, tensors: &Tensors, shards: usize) {
    std::fs::write(at.join("config.json"), shape.config_json().to_string()).unwrap();
    let mut files = vec![Vec::new(); shards];
    let mut weight_map = serde_json::Map::new();
    for (index, (name, (dimensions, values))) in tensors.iter().enumerate() {
        let file = format!("model-{}.safetensors", index % shards);
        weight_map.insert(name.clone(), file.into());
        let (kind, bytes) = encode(index, values);
        files[index % shards].push((name.clone(), kind, dimensions.clone(), bytes));
    }
    for (index, tensors) in files.iter().enumerate() {
        let name =
            if shards == 1 { "model.safetensors".to_owned() } else { format!("model-{index}.safetensors") };
        std::fs::write(at.join(name), safetensors_file(tensors)).unwrap();
    }
    if shards > 1 {
        let index = serde_json::json!({ "weight_map": weight_map });
        std::fs::write(at.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// The values in one of three formats.
fn encode(format: usize, values: &[f32]) -> (Dtype, Vec<u8>) {
    match format % 3 {
        0 => (Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        1 => (Dtype::F16, values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect()),
        _ => (Dtype::BF16, values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()),
    }
}

/// A safetensors file of tensors given by name, format, shape and little-endian bytes.
fn safetensors_file(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, kind, shape, bytes)| {
        (name.clone(), TensorView::new(*kind, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// Rows of each head in the interleaved rotary order of the original Llama release.
fn interleave(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    let row = |row: usize| &values[row * columns..(row + 1) * columns];
    let mut out = Vec::with_capacity(values.len());
    for head in 0..rows / head_dim {
        for pair in 0..head_dim / 2 {
            out.extend_from_slice(row(head * head_dim + pair));
            out.extend_from_slice(row(head * head_dim + head_dim / 2 + pair));
        }
    }
    out
}

fn gguf_name(name: &str) -> String {
    let mut name = name.to_owned();
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(from, to);
    }
    name
}

impl GgufWriter {
    fn new(architecture: &str, shape: Shape) -> Self {
        let mut writer = Self {
            metadata: Vec::new(),
            metadata_count: 0,
            headers: Vec::new(),
            tensor_count: 0,
            data: Vec::new(),
        };
        let key = |name: &str| format!("{architecture}.{name}");
        writer.text("general.architecture", architecture);
        writer.count(&key("embedding_length"), shape.hidden as u32);
        writer.count(&key("block_count"), 1);
        writer.count(&key("attention.head_count"), shape.heads as u32);
        writer.count(&key("attention.head_count_kv"), shape.kv_heads as u32);
        writer.count(&key("feed_forward_length"), shape.hidden as u32);
        writer.count(&key("context_length"), 256);
        writer.float(&key("attention.layer_norm_rms_epsilon"), 1e-5);
        writer.float(&key("rope.freq_base"), 10_000.0);
        writer.text("tokenizer.ggml.model", "gpt2");
        writer.text("tokenizer.ggml.pre", "smollm");
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "Ġ", "he", "hel"].map(str::to_owned).to_vec();
        tokens.extend(('a'..='z').map(String::from));
        writer.texts("tokenizer.ggml.tokens", &tokens);
        let kinds: Vec<i32> = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
        writer.integers("tokenizer.ggml.token_type", &kinds);
        writer.texts("tokenizer.ggml.merges", &["h e".to_owned(), "he l".to_owned()]);
        writer.count("tokenizer.ggml.bos_token_id", 1);
        writer.count("tokenizer.ggml.eos_token_id", 2);
        writer.text("tokenizer.chat_template", "{{ bos_token }}{{ messages[0]['content'] }}");
        writer
    }

    pub fn count(&mut self, key: &str, value: u32) {
        self.entry(key, 4, &value.to_le_bytes());
    }

    pub fn float(&mut self, key: &str, value: f32) {
        self.entry(key, 6, &value.to_le_bytes());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.entry(key, 8, &text(value));
    }

    pub fn texts(&mut self, key: &str, values: &[String]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| text(value)).collect();
        self.array(key, 8, values.len(), &bytes);
    }

    fn integers(&mut self, key: &str, values: &[i32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.array(key, 5, values.len(), &bytes);
    }

    fn array(&mut self, key: &str, element: u32, count: usize, bytes: &[u8]) {
        let head = [element.to_le_bytes().to_vec(), (count as u64).to_le_bytes().to_vec()].concat();
        self.entry(key, 9, &[head, bytes.to_vec()].concat());
    }

    fn entry(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.metadata_count += 1;
        self.metadata.extend(text(key));
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
    }

    /// Appends a tensor of row-major `shape`, quantised by candle.
    pub fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32], kind: GgmlDType) {
        let tensor = Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let stored = QTensor::quantize(&tensor, kind).unwrap();
        let number = match kind {
            GgmlDType::F32 => 0_u32,
            GgmlDType::F16 => 1,
            GgmlDType::Q4_0 => 2,
            GgmlDType::Q4_1 => 3,
            GgmlDType::Q5_0 => 6,
            GgmlDType::Q8_0 => 8,
            GgmlDType::Q4K => 12,
            GgmlDType::Q5K => 13,
            GgmlDType::Q6K => 14,
            GgmlDType::BF16 => 30,
            other => panic!("no test writes {other:?}"),
        };
        self.tensor_count += 1;
        self.headers.extend(text(name));
        self.headers.extend((shape.len() as u32).to_le_bytes());
        for size in shape.iter().rev() {
            self.headers.extend((*size as u64).to_le_bytes());
        }
        self.headers.extend(number.to_le_bytes());
        self.headers.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend_from_slice(&stored.data().unwrap());
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    /// Bytes before the tensor data.
    pub fn header_bytes(&self) -> usize {
        (24 + self.metadata.len() + self.headers.len()).next_multiple_of(32)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(self.tensor_count.to_le_bytes());
        bytes.extend(self.metadata_count.to_le_bytes());
        bytes.extend(&self.metadata);
        bytes.extend(&self.headers);
        bytes.resize(self.header_bytes(), 0);
        bytes.extend(&self.data);
        bytes
    }
}

fn text(value: &str) -> Vec<u8> {
    [(value.len() as u64).to_le_bytes().to_vec(), value.as_bytes().to_vec()].concat()
}
