//! Adapters and models of the right shapes with pseudo-random numbers: timing needs no training.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context as _;
use safetensors::{Dtype, serialize, tensor::TensorView};
use uniarm_model::Config;

/// Rank and objectives as a real adapter has them.
const RANK: usize = 8;
const OBJECTIVES: [&str; 2] = ["first", "second"];

/// Small against the backbone's own weights, so that logits stay in their range.
const SCALE: f32 = 0.02;

/// Dimensions of a Llama whose heads have [`HEAD_DIM`] columns.
pub struct Shape {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub intermediate: usize,
}

const HEAD_DIM: usize = 64;

/// Writes a MoSLoRA adapter for q, k and v of every layer into `folder`.
pub fn write_adapter(config: &Config, folder: &Path) -> anyhow::Result<()> {
    let objectives: Vec<_> =
        OBJECTIVES.iter().map(|name| serde_json::json!({ "name": name, "description": name })).collect();
    let json = serde_json::json!({
        "peft_type": "MOSLORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "conditioning": "onehot",
        "head": "linear",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "objectives": objectives,
    });
    std::fs::write(folder.join("adapter_config.json"), json.to_string())?;

    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for layer in 0..config.layers {
        let widths = [("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)];
        for (name, heads) in widths {
            let prefix = format!("base_model.model.model.layers.{layer}.self_attn.{name}_proj.moslora_");
            let shapes = [
                ("A.weight", vec![RANK, config.hidden]),
                ("B.weight", vec![heads * config.head_dim, RANK]),
                ("gamma.weight", vec![RANK, OBJECTIVES.len()]),
                ("beta.weight", vec![RANK, OBJECTIVES.len()]),
            ];
            for (suffix, shape) in shapes {
                let count = shape.iter().product();
                let bytes = (0..count).flat_map(|_| draw(&mut state).to_le_bytes()).collect();
                tensors.insert(format!("{prefix}{suffix}"), (shape, bytes));
            }
        }
    }
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let file = serialize(views, None).context("the adapter cannot be written")?;
    std::fs::write(folder.join("adapter_model.safetensors"), file)?;
    Ok(())
}

/// Writes a Llama of random f32 weights as a Hugging Face folder, without a tokenizer.
pub fn write_model(shape: &Shape, vocabulary: usize, folder: &Path) -> anyhow::Result<()> {
    let Shape { hidden, layers, heads, kv_heads, intermediate } = *shape;
    std::fs::create_dir_all(folder)?;
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": HEAD_DIM, "intermediate_size": intermediate,
        "vocab_size": vocabulary, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..layers {
        let linear = [
            ("self_attn.q_proj", heads * HEAD_DIM, hidden),
            ("self_attn.k_proj", kv_heads * HEAD_DIM, hidden),
            ("self_attn.v_proj", kv_heads * HEAD_DIM, hidden),
            ("self_attn.o_proj", hidden, heads * HEAD_DIM),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ];
        let name = |module: &str| format!("model.layers.{layer}.{module}.weight");
        shapes.extend(linear.map(|(module, outputs, inputs)| (name(module), vec![outputs, inputs])));
        shapes.extend(["input_layernorm", "post_attention_layernorm"].map(|norm| (name(norm), vec![hidden])));
    }
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let bytes = (0..count).flat_map(|_| draw(&mut state).to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    Ok(())
}

pub const FIRST: &str = OBJECTIVES[0];
pub const SECOND: &str = OBJECTIVES[1];

/// xorshift64*, to ± `SCALE`.
fn draw(state: &mut u64) -> f32 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    let high = (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u64 << 24) as f32;
    (2.0 * high - 1.0) * SCALE
}
