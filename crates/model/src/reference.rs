//! The forward pass as the papers write it: one whole sequence, dense candle operations, no cache.
//!
//! Slow and obvious on purpose. The fast path is tested against it, and every operation has a gradient.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::{silu, softmax};

use crate::adapter::Conditioned;
use crate::config::Config;
use crate::error::ModelError;
use crate::source::ModelFiles;

/// Logits after every token of a sequence, (tokens, vocabulary), with an adapter or without.
///
/// # Errors
/// [`ModelError::Tensor`], or whatever reading the weights meets.
pub fn logits(
    files: &ModelFiles,
    tokens: &[u32],
    adapter: Option<&Conditioned>,
) -> Result<Tensor, ModelError> {
    let ModelFiles { config, weights, .. } = files;
    let Config { vocabulary, hidden, intermediate, heads, kv_heads, head_dim, .. } = *config;
    let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
    let (cosine, sine) = angles(config, tokens.len())?;
    let embedding = weights.tensor("model.embed_tokens.weight", &[vocabulary, hidden])?;
    let mut x = embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?; // (tokens, hidden)

    for layer in 0..config.layers {
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let linear = |x: &Tensor, module: &str, outputs: usize, inputs: usize| {
            let y =
                x.matmul(&weights.tensor(&name(&format!("{module}.weight")), &[outputs, inputs])?.t()?)?;
            match adapter {
                Some(adapter) => Ok(match adapter.delta(layer, module, x)? {
                    Some(delta) => (y + delta)?,
                    None => y,
                }),
                None => Ok::<_, ModelError>(y),
            }
        };
        let bias = |y: Tensor, module: &str, outputs: usize| match config.qkv_bias {
            true => Ok(y.broadcast_add(&weights.tensor(&name(&format!("{module}.bias")), &[outputs])?)?),
            false => Ok::<_, ModelError>(y),
        };

        let norm = weights.tensor(&name("input_layernorm.weight"), &[hidden])?;
        let normed = rms_norm(&x, &norm, config.rms_norm_epsilon)?;
        let q = bias(linear(&normed, "self_attn.q_proj", queries, hidden)?, "self_attn.q_proj", queries)?;
        let k = bias(linear(&normed, "self_attn.k_proj", keys, hidden)?, "self_attn.k_proj", keys)?;
        let v = bias(linear(&normed, "self_attn.v_proj", keys, hidden)?, "self_attn.v_proj", keys)?;
        let q = rotate(&split(&q, heads)?, &cosine, &sine)?; // (heads, tokens, head_dim)
        let k = repeat(&rotate(&split(&k, kv_heads)?, &cosine, &sine)?, heads / kv_heads)?;
        let v = repeat(&split(&v, kv_heads)?, heads / kv_heads)?;
        let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?; // (heads, tokens, tokens)
        let attention = softmax(&scores.broadcast_add(&causal_mask(tokens.len())?)?, D::Minus1)?;
        let attended = attention.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape(((), queries))?;
        x = (x + linear(&attended, "self_attn.o_proj", hidden, queries)?)?;

        let norm = weights.tensor(&name("post_attention_layernorm.weight"), &[hidden])?;
        let normed = rms_norm(&x, &norm, config.rms_norm_epsilon)?;
        let gate = silu(&linear(&normed, "mlp.gate_proj", intermediate, hidden)?)?;
        let up = linear(&normed, "mlp.up_proj", intermediate, hidden)?;
        x = (x + linear(&(gate * up)?, "mlp.down_proj", hidden, intermediate)?)?;
    }
    let x = rms_norm(&x, &weights.tensor("model.norm.weight", &[hidden])?, config.rms_norm_epsilon)?;
    let head = match config.tied_embeddings {
        true => embedding,
        false => weights.tensor("lm_head.weight", &[vocabulary, hidden])?,
    };
    Ok(x.matmul(&head.t()?)?) // (tokens, vocabulary)
}

impl Conditioned {
    /// s · m(x · Aᵀ) · Bᵀ for one linear layer, (tokens, outputs), if it is adapted.
    fn delta(&self, layer: usize, module: &str, x: &Tensor) -> Result<Option<Tensor>, ModelError> {
        let Some(low_rank) = self.low_rank(layer, module)? else { return Ok(None) };
        let z = x.matmul(&low_rank.a.t()?)?; // (tokens, rank)
        let z = z.matmul(&low_rank.mix.t()?)?.broadcast_add(&low_rank.shift)?;
        Ok(Some(z.matmul(&low_rank.b.t()?)?))
    }
}

/// x · weight / sqrt(mean(x²) + epsilon)
fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor, ModelError> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let scale = (mean + f64::from(epsilon))?.sqrt()?;
    Ok(x.broadcast_div(&scale)?.broadcast_mul(weight)?)
}

/// (tokens, heads × head_dim) → (heads, tokens, head_dim)
fn split(x: &Tensor, heads: usize) -> Result<Tensor, ModelError> {
    let (tokens, width) = x.dims2()?;
    Ok(x.reshape((tokens, heads, width / heads))?.transpose(0, 1)?.contiguous()?)
}

/// Each key-value head once per query head of its group.
fn repeat(x: &Tensor, group: usize) -> Result<Tensor, ModelError> {
    let (heads, tokens, head_dim) = x.dims3()?;
    let x = x.unsqueeze(1)?.broadcast_as((heads, group, tokens, head_dim))?;
    Ok(x.contiguous()?.reshape((heads * group, tokens, head_dim))?)
}

/// Cosines and sines, (tokens, head_dim), both halves alike.
fn angles(config: &Config, tokens: usize) -> Result<(Tensor, Tensor), ModelError> {
    let frequencies = config.rope.frequencies(config.head_dim);
    let angles: Vec<f64> = (0..tokens)
        .flat_map(|position| {
            frequencies.repeat(2).into_iter().map(move |frequency| position as f64 * frequency)
        })
        .collect();
    let angles = Tensor::from_vec(angles, (tokens, config.head_dim), &Device::Cpu)?;
    Ok((angles.cos()?.to_dtype(DType::F32)?, angles.sin()?.to_dtype(DType::F32)?))
}

/// x · cos + (−second half, first half) · sin
fn rotate(x: &Tensor, cosine: &Tensor, sine: &Tensor) -> Result<Tensor, ModelError> {
    let half = x.dim(D::Minus1)? / 2;
    let (low, high) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned = Tensor::cat(&[high.neg()?, low], D::Minus1)?;
    Ok((x.broadcast_mul(cosine)? + turned.broadcast_mul(sine)?)?)
}

/// 0 where a token may look, −∞ ahead of it: (tokens, tokens)
fn causal_mask(tokens: usize) -> Result<Tensor, ModelError> {
    let mask = (0..tokens * tokens).map(|at| if at % tokens > at / tokens { f32::NEG_INFINITY } else { 0.0 });
    Ok(Tensor::from_iter(mask, &Device::Cpu)?.reshape((tokens, tokens))?)
}
