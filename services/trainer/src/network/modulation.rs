//! What an adapter adds to a linear layer, for rows that each have their own preference [method §2].

use anyhow::Context as _;
use candle_core::{Device, Tensor, Var};
use candle_nn::ops::silu;
use uniarm_decode::noise::philox4x32_10;

use super::Sample;
use super::adapter::{AdapterConfig, Conditioning, Head, Method};
use super::batch::{Packed, Span};

/// Streams of dropout do not meet those of initial values.
const DROPOUT_STREAM: u32 = 0x4452_4f50;

/// Preferences of one pass, and which row has which.
pub struct Rows<'a> {
    /// Index of each row's sample.
    owners: Tensor,
    spans: &'a [Span],
    /// v(p) of each sample, (samples, width); absent for a plain LoRA.
    mixed: Option<Tensor>,
    /// p of each sample, (samples, objectives); absent for a plain LoRA.
    preferences: Option<Tensor>,
    /// Of each sample; empty where nothing is left out.
    draws: Vec<u64>,
    dropout: f64,
    device: Device,
}

/// The variables of one adapted linear layer, from the first.
pub struct Modulated<'a> {
    pub adapter: &'a AdapterConfig,
    pub variables: &'a [Var],
}

// === impl Rows ===

impl<'a> Rows<'a> {
    /// `embeddings` are those of the objectives, each of `width` numbers; empty for one-hot conditioning.
    pub fn new(
        adapter: &AdapterConfig,
        (packed, samples): (&'a Packed, &[Sample<'_>]),
        (embeddings, width): (&[f32], usize),
        training: bool,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let objectives = adapter.objectives.len();
        let mut rows = Self {
            owners: Tensor::new(packed.owners(), device)?,
            spans: &packed.spans,
            mixed: None,
            preferences: None,
            draws: Vec::new(),
            dropout: adapter.dropout,
            device: device.clone(),
        };
        if training && adapter.dropout > 0.0 {
            rows.draws = samples.iter().map(|sample| sample.draw).collect();
        }
        if adapter.method != Method::Lora {
            let flat: Vec<f32> = samples.iter().flat_map(|sample| sample.preference).copied().collect();
            let preferences = Tensor::from_vec(flat, (samples.len(), objectives), device)
                .context("a sample's preference has another number of weights than there are objectives")?;
            if adapter.method == Method::Moslora {
                rows.mixed = Some(match adapter.conditioning {
                    Conditioning::Onehot => preferences.clone(),
                    Conditioning::Text => {
                        preferences.matmul(&Tensor::from_slice(embeddings, (objectives, width), device)?)?
                    }
                });
            }
            rows.preferences = Some(preferences);
        }
        Ok(rows)
    }

    /// Inputs of adapters, of which training leaves some out [code: PEFT drops the input of A].
    ///
    /// `site` tells the inputs of one layer apart. The mask is a function of each sample's draw, so it does not depend
    /// on which samples share a pass.
    pub fn drop(&self, x: &Tensor, layer: usize, site: u32) -> anyhow::Result<Tensor> {
        if self.draws.is_empty() {
            return Ok(x.clone());
        }
        let width = x.dim(1)?;
        let keep = (1.0 - self.dropout) as f32;
        let threshold = (f64::from(u32::MAX) * self.dropout) as u32;
        let mut mask = Vec::with_capacity(x.elem_count());
        for (span, draw) in self.spans.iter().zip(&self.draws) {
            let key = [*draw as u32, (*draw >> 32) as u32];
            let count = span.rows() * width;
            let words = (0..count.div_ceil(4) as u32)
                .flat_map(|block| philox4x32_10([block, layer as u32, site, DROPOUT_STREAM], key));
            mask.extend(words.take(count).map(|word| if word < threshold { 0.0 } else { 1.0 / keep }));
        }
        Ok((x * Tensor::from_vec(mask, x.shape(), &self.device)?)?)
    }

    /// (samples, …) → (rows, …)
    fn spread(&self, values: &Tensor) -> anyhow::Result<Tensor> {
        Ok(values.index_select(&self.owners, 0)?)
    }
}

// === impl Modulated ===

impl Modulated<'_> {
    /// s · B · m(A · x), (rows, outputs)
    pub fn delta(&self, x: &Tensor, rows: &Rows<'_>) -> anyhow::Result<Tensor> {
        let [a, b] = [&self.variables[0], &self.variables[1]];
        let z = x.matmul(&a.t()?)?; // (rows, rank)
        let z = match self.adapter.method {
            Method::Lora => z,
            Method::Moslora => {
                let mixed = rows.mixed.as_ref().context("v(p)")?;
                let (gamma, beta) = self.heads(mixed)?;
                let gamma = (gamma + 1.0)?;
                ((z * rows.spread(&gamma)?)? + rows.spread(&beta)?)?
            }
            Method::Pblora => self.mix(&z, rows)?,
        };
        // The scale goes to the thin side.
        Ok((z * self.adapter.scale())?.matmul(&b.t()?)?)
    }

    /// Outputs of both heads for each sample, (samples, rank).
    fn heads(&self, mixed: &Tensor) -> anyhow::Result<(Tensor, Tensor)> {
        let parts = &self.variables[2..];
        match self.adapter.head {
            Head::Linear => Ok((mixed.matmul(&parts[0].t()?)?, mixed.matmul(&parts[1].t()?)?)),
            Head::Mlp => {
                let head = |parts: &[Var]| -> anyhow::Result<Tensor> {
                    let inner = silu(&mixed.matmul(&parts[0].t()?)?.broadcast_add(&parts[1])?)?;
                    Ok(inner.matmul(&parts[2].t()?)?.broadcast_add(&parts[3])?)
                };
                Ok((head(&parts[..4])?, head(&parts[4..8])?))
            }
        }
    }

    /// (W1 · z[..r1], reshape(pᵀ · W2) · z[r1..])
    fn mix(&self, z: &Tensor, rows: &Rows<'_>) -> anyhow::Result<Tensor> {
        let [w1, w2] = [&self.variables[2], &self.variables[3]];
        let (r1, r2) = (self.adapter.rank, self.adapter.mixed_rank);
        let shared = z.narrow(1, 0, r1)?.contiguous()?.matmul(&w1.t()?)?;
        let matrices = rows.preferences.as_ref().context("p")?.matmul(w2)?; // (samples, r2 · r2)
        let mut mixed = Vec::with_capacity(rows.spans.len());
        for (sample, span) in rows.spans.iter().enumerate() {
            let matrix = matrices.narrow(0, sample, 1)?.reshape((r2, r2))?;
            let own = z.narrow(0, span.first_row, span.rows())?.narrow(1, r1, r2)?.contiguous()?;
            mixed.push(own.matmul(&matrix.t()?)?);
        }
        Ok(Tensor::cat(&[shared, Tensor::cat(&mixed, 0)?], 1)?)
    }
}
