//! Small models and adapters of random numbers, so that a checkout without any model tests the forward pass.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;
use uniarm_model::{Adapter, Conditioned, ModelFiles};

use super::files::{WIDE, mixed_gguf};
use super::open;

const LAYERS: usize = 2;
const HIDDEN: usize = 64;
const QUERIES: usize = 64;
const KEYS: usize = 32;
const INTERMEDIATE: usize = 80;

/// Not a multiple of the 16 lanes of a vector.
const VOCABULARY: usize = 90;

/// Linear layers: name, outputs, inputs.
const LINEAR: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", QUERIES, HIDDEN),
    ("self_attn.k_proj", KEYS, HIDDEN),
    ("self_attn.v_proj", KEYS, HIDDEN),
    ("self_attn.o_proj", HIDDEN, QUERIES),
    ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
    ("mlp.up_proj", INTERMEDIATE, HIDDEN),
    ("mlp.down_proj", HIDDEN, INTERMEDIATE),
];

/// Tensors in the making, of numbers that follow from their names.
#[derive(Default)]
struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    /// `center` plus or minus up to `width`.
    fn put(&mut self, name: &str, shape: &[usize], (center, width): (f32, f32)) {
        let mut state =
            name.bytes().fold(17u32, |state, byte| state.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            center + width * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| number()).collect();
        self.0.insert(
            name.to_owned(),
            Tensor::from_vec(values, shape, &Device::Cpu).expect("the shape's count"),
        );
    }

    fn save(&self, folder: &Path, file: &str, (name, config): (&str, &Value)) {
        std::fs::create_dir_all(folder).expect("a writable folder");
        std::fs::write(folder.join(name), config.to_string()).expect("a writable folder");
        candle_core::safetensors::save(&self.0, folder.join(file)).expect("a writable folder");
    }
}

/// A tied Llama, or an untied Qwen2 with its biases, and adapters that reach every linear layer.
pub fn scene(model_type: &str) -> (ModelFiles, Vec<Conditioned>, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let qwen2 = model_type == "qwen2";
    model(folder.path(), model_type, qwen2);
    let files = open(folder.path().to_str().expect("UTF-8"));
    let (lora, moslora) = (folder.path().join("lora"), folder.path().join("moslora"));
    lora_everywhere(&lora, LAYERS, &LINEAR);
    moslora_with_mlp_heads(&moslora);
    let load = |folder: &Path| {
        Arc::new(Adapter::load(folder, &files.config, &files.fingerprint).expect("a sound adapter"))
    };
    let (lora, moslora) = (load(&lora), load(&moslora));
    let adapters = [lora.condition(&[]), moslora.condition(&[0.3, 0.7]), moslora.condition(&[1.0, 0.0])];
    (files, adapters.map(|adapter| adapter.expect("a preference on the simplex")).into(), folder)
}

/// A Llama of one layer, every matrix of another quantised format and some side by side, with a LoRA.
pub fn quantised_scene() -> (ModelFiles, Vec<Conditioned>, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kind = |name: &str| match name.rsplit('.').nth(1) {
        Some("q_proj") => GgmlDType::Q4K,
        Some("k_proj") => GgmlDType::Q5_0,
        Some("v_proj" | "lm_head") => GgmlDType::Q6K,
        Some("o_proj") => GgmlDType::Q4_0,
        Some("down_proj") => GgmlDType::Q5K,
        Some("embed_tokens") => GgmlDType::Q8_0,
        _ => GgmlDType::Q4_1,
    };
    let path = folder.path().join("model.gguf");
    let bytes = mixed_gguf(WIDE, &WIDE.tensors(), kind).bytes();
    std::fs::write(&path, bytes).expect("a writable folder");
    let files = open(path.to_str().expect("UTF-8"));
    let (hidden, keys) = (WIDE.hidden, WIDE.kv_heads * WIDE.head_dim());
    let linear = LINEAR.map(|(name, outputs, _)| (name, if outputs == KEYS { keys } else { hidden }, hidden));
    lora_everywhere(&folder.path().join("lora"), 1, &linear);
    let lora = Adapter::load(&folder.path().join("lora"), &files.config, &files.fingerprint);
    let lora = Arc::new(lora.expect("a sound adapter")).condition(&[]).expect("no objectives");
    (files, vec![lora], folder)
}

fn model(folder: &Path, model_type: &str, qwen2: bool) {
    let mut tensors = Tensors::default();
    tensors.put("model.embed_tokens.weight", &[VOCABULARY, HIDDEN], (0.0, 1.0));
    tensors.put("model.norm.weight", &[HIDDEN], (1.0, 0.2));
    if qwen2 {
        tensors.put("lm_head.weight", &[VOCABULARY, HIDDEN], (0.0, 0.3));
    }
    for layer in 0..LAYERS {
        let stem = format!("model.layers.{layer}.");
        tensors.put(&format!("{stem}input_layernorm.weight"), &[HIDDEN], (1.0, 0.2));
        tensors.put(&format!("{stem}post_attention_layernorm.weight"), &[HIDDEN], (1.0, 0.2));
        for (index, (name, outputs, inputs)) in LINEAR.into_iter().enumerate() {
            tensors.put(&format!("{stem}{name}.weight"), &[outputs, inputs], (0.0, 0.2));
            if qwen2 && index < 3 {
                tensors.put(&format!("{stem}{name}.bias"), &[outputs], (0.0, 0.5));
            }
        }
    }
    let config = json!({
        "model_type": model_type, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": !qwen2, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    });
    tensors.save(folder, "model.safetensors", ("config.json", &config));
}

fn lora_everywhere(folder: &Path, layers: usize, linear: &[(&str, usize, usize)]) {
    let mut tensors = Tensors::default();
    for layer in 0..layers {
        for &(name, outputs, inputs) in linear {
            let stem = format!("base_model.model.model.layers.{layer}.{name}.lora_");
            tensors.put(&format!("{stem}A.weight"), &[3, inputs], (0.0, 0.2));
            tensors.put(&format!("{stem}B.weight"), &[outputs, 3], (0.0, 0.2));
        }
    }
    let config = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": "all-linear"});
    tensors.save(folder, "adapter_model.safetensors", ("adapter_config.json", &config));
}

fn moslora_with_mlp_heads(folder: &Path) {
    let mut tensors = Tensors::default();
    for layer in 0..LAYERS {
        for (name, outputs, inputs) in [LINEAR[0], LINEAR[2], LINEAR[6]] {
            let stem = format!("base_model.model.model.layers.{layer}.{name}.moslora_");
            tensors.put(&format!("{stem}A.weight"), &[4, inputs], (0.0, 0.2));
            tensors.put(&format!("{stem}B.weight"), &[outputs, 4], (0.0, 0.2));
            for head in ["gamma", "beta"] {
                tensors.put(&format!("{stem}{head}.0.weight"), &[5, 2], (0.0, 1.0));
                tensors.put(&format!("{stem}{head}.0.bias"), &[5], (0.0, 0.5));
                tensors.put(&format!("{stem}{head}.2.weight"), &[4, 5], (0.0, 1.0));
                tensors.put(&format!("{stem}{head}.2.bias"), &[4], (0.0, 0.5));
            }
        }
    }
    let config = json!({
        "peft_type": "MOSLORA", "r": 4, "lora_alpha": 8, "conditioning": "onehot", "head": "mlp",
        "target_modules": ["q_proj", "v_proj", "down_proj"], "objectives": [{"name": "kind"}, {"name": "short"}],
    });
    tensors.save(folder, "adapter_model.safetensors", ("adapter_config.json", &config));
}
