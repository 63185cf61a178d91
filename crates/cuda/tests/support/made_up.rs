//! Small models and adapters of random numbers, all exact in 16 bits, so that either format of weights is the file's.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use uniarm_model::{Adapter, Conditioned, ModelFiles, OpenOptions, open};

/// Odd: the last warp of the product has a column too many.
pub const VOCABULARY: usize = 91;

/// Dimensions that leave warps, vectors and blocks half filled.
#[derive(Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    /// An untied Qwen2 with its biases; else a tied Llama.
    pub qwen2: bool,
    /// The model's file has bf16; else f32, of the same numbers.
    pub bf16: bool,
}

pub const LLAMA: Shape = Shape {
    layers: 2,
    hidden: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    intermediate: 80,
    qwen2: false,
    bf16: false,
};
pub const QWEN2: Shape = Shape {
    layers: 2,
    hidden: 272,
    heads: 3,
    kv_heads: 1,
    head_dim: 80,
    intermediate: 304,
    qwen2: true,
    bf16: false,
};

/// A model with a LoRA, a MoSLoRA under two preferences and a PBLoRA.
pub struct Scene {
    pub files: ModelFiles,
    pub adapters: Vec<Conditioned>,
    _folder: TempDir,
}

/// Tensors in the making, of numbers that follow from their names.
#[derive(Default)]
struct Tensors(BTreeMap<String, (Vec<usize>, Vec<u8>)>);

impl Tensors {
    /// `center` plus or minus up to `width`.
    fn put(&mut self, name: &str, shape: &[usize], (center, width): (f32, f32)) {
        let mut state =
            name.bytes().fold(17u32, |state, byte| state.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let number = center + width * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0);
            f32::from_bits(number.to_bits() & 0xffff_0000)
        };
        let bytes = (0..shape.iter().product()).flat_map(|_| number().to_le_bytes()).collect();
        self.0.insert(name.to_owned(), (shape.to_vec(), bytes));
    }

    /// The same numbers in half of the bytes.
    fn in_bf16(mut self) -> Self {
        for (_, bytes) in self.0.values_mut() {
            *bytes = bytes.chunks_exact(4).flat_map(|number| [number[2], number[3]]).collect();
        }
        self
    }

    fn save(&self, folder: &Path, file: &str, (name, config): (&str, &Value), format: Dtype) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join(name), config.to_string()).unwrap();
        let views = self
            .0
            .iter()
            .map(|(name, (shape, bytes))| (name, TensorView::new(format, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join(file)).unwrap();
    }
}

impl Shape {
    /// Linear layers: name, outputs, inputs.
    fn linear(self) -> [(&'static str, usize, usize); 7] {
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ]
    }

    pub fn scene(self) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        self.save_model(folder.path());
        let files = open(folder.path().to_str().unwrap(), &OpenOptions::default()).unwrap();
        let load = |name: &str, save: &dyn Fn(Self, &Path)| {
            save(self, &folder.path().join(name));
            let adapter = Adapter::load(&folder.path().join(name), &files.config, &files.fingerprint);
            Arc::new(adapter.unwrap())
        };
        let lora = load("lora", &|shape, folder| shape.save_lora(folder));
        let moslora = load("moslora", &|shape, folder| shape.save_moslora(folder));
        let pblora = load("pblora", &|shape, folder| shape.save_pblora(folder));
        let adapters = [
            lora.condition(&[]),
            moslora.condition(&[0.3, 0.7]),
            moslora.condition(&[1.0, 0.0]),
            pblora.condition(&[0.5, 0.5]),
        ];
        Scene { files, adapters: adapters.into_iter().map(Result::unwrap).collect(), _folder: folder }
    }

    fn save_model(self, folder: &Path) {
        let mut tensors = Tensors::default();
        let hidden = self.hidden;
        tensors.put("model.embed_tokens.weight", &[VOCABULARY, hidden], (0.0, 1.0));
        tensors.put("model.norm.weight", &[hidden], (1.0, 0.2));
        if self.qwen2 {
            tensors.put("lm_head.weight", &[VOCABULARY, hidden], (0.0, 0.3));
        }
        for layer in 0..self.layers {
            let stem = format!("model.layers.{layer}.");
            tensors.put(&format!("{stem}input_layernorm.weight"), &[hidden], (1.0, 0.2));
            tensors.put(&format!("{stem}post_attention_layernorm.weight"), &[hidden], (1.0, 0.2));
            for (index, (name, outputs, inputs)) in self.linear().into_iter().enumerate() {
                tensors.put(&format!("{stem}{name}.weight"), &[outputs, inputs], (0.0, 0.15));
                if self.qwen2 && index < 3 {
                    tensors.put(&format!("{stem}{name}.bias"), &[outputs], (0.0, 0.5));
                }
            }
        }
        let config = json!({
            "model_type": if self.qwen2 { "qwen2" } else { "llama" }, "hidden_size": hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "intermediate_size": self.intermediate, "vocab_size": VOCABULARY,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": !self.qwen2, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        });
        let (tensors, format) =
            if self.bf16 { (tensors.in_bf16(), Dtype::BF16) } else { (tensors, Dtype::F32) };
        tensors.save(folder, "model.safetensors", ("config.json", &config), format);
    }

    fn save_lora(self, folder: &Path) {
        let mut tensors = Tensors::default();
        for layer in 0..self.layers {
            for (name, outputs, inputs) in self.linear() {
                let stem = format!("base_model.model.model.layers.{layer}.{name}.lora_");
                tensors.put(&format!("{stem}A.weight"), &[3, inputs], (0.0, 0.2));
                tensors.put(&format!("{stem}B.weight"), &[outputs, 3], (0.0, 0.2));
            }
        }
        let config = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": "all-linear"});
        tensors.save(folder, "adapter_model.safetensors", ("adapter_config.json", &config), Dtype::F32);
    }

    fn save_moslora(self, folder: &Path) {
        let mut tensors = Tensors::default();
        for layer in 0..self.layers {
            for (name, outputs, inputs) in [self.linear()[0], self.linear()[2], self.linear()[6]] {
                let stem = format!("base_model.model.model.layers.{layer}.{name}.moslora_");
                tensors.put(&format!("{stem}A.weight"), &[4, inputs], (0.0, 0.2));
                tensors.put(&format!("{stem}B.weight"), &[outputs, 4], (0.0, 0.2));
                tensors.put(&format!("{stem}gamma.weight"), &[4, 2], (0.0, 1.0));
                tensors.put(&format!("{stem}beta.weight"), &[4, 2], (0.0, 1.0));
            }
        }
        let config = json!({
            "peft_type": "MOSLORA", "r": 4, "lora_alpha": 8, "conditioning": "onehot", "head": "linear",
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "objectives": [{"name": "kind"}, {"name": "short"}],
        });
        tensors.save(folder, "adapter_model.safetensors", ("adapter_config.json", &config), Dtype::F32);
    }

    /// On the second of q, k and v alone, with ranks that differ from the other adapters'.
    fn save_pblora(self, folder: &Path) {
        let mut tensors = Tensors::default();
        for layer in 0..self.layers {
            for (name, outputs, inputs) in [self.linear()[1], self.linear()[5]] {
                let stem = format!("base_model.model.model.layers.{layer}.{name}.pblora_");
                tensors.put(&format!("{stem}A"), &[5, inputs], (0.0, 0.2));
                tensors.put(&format!("{stem}B"), &[outputs, 5], (0.0, 0.2));
                tensors.put(&format!("{stem}W1"), &[3, 3], (0.0, 1.0));
                tensors.put(&format!("{stem}W2"), &[2, 4], (0.0, 1.0));
            }
        }
        let config = json!({
            "peft_type": "PBLORA", "r1": 3, "r2": 2, "obj_num": 2, "lora_alpha": 4,
            "target_modules": ["k_proj", "up_proj"],
        });
        tensors.save(folder, "adapter_model.safetensors", ("adapter_config.json", &config), Dtype::F32);
    }
}
