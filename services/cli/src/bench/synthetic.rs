//! An adapter of the right shapes with pseudo-random numbers: timing needs no training.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context as _;
use safetensors::{Dtype, serialize, tensor::TensorView};
use uniarm_model::Config;

/// Rank and objectives as a real adapter has them.
const RANK: usize = 8;
const OBJECTIVES: [&str; 2] = ["first", "second"];

/// Small against the backbone's own weights, so that logits stay in their range.
const SCALE: f32 = 0.02;

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
