//! log π of given tokens: the output projection, the softmax and the choice of one entry, without keeping logits.
//!
//! d log π(v | h)/dh = E_v − Σ_u π(u | h) · E_u, of which the fast form computes the sum while it still has the logits:
//! a row of the gradient is then that vector times the row's slope, and 49,152 logits for each row are never stored.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::product::{Into, Matrix, Threads, multiply};
use super::{Form, frozen_linear, numbers};

/// Rows whose logits exist at the same time: 25 MB at a vocabulary of 49,152, and enough for the product's speed.
const ROWS: usize = 128;

/// For each row of `x` (rows, hidden), the log-probability of its target, (rows), under softmax(x · headᵀ).
pub fn log_probabilities(x: &Tensor, head: &Tensor, targets: &[u32], form: Form) -> Result<Tensor> {
    match form {
        Form::Plain => {
            let logits = frozen_linear(x, head)?;
            let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
            let sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
            let targets = Tensor::new(targets, x.device())?.unsqueeze(1)?;
            (shifted.gather(&targets, 1)? - sum)?.squeeze(1)
        }
        Form::Fast => {
            let op = Chosen {
                head: head.clone(),
                targets: targets.to_vec(),
                saved: OnceLock::new(),
                track: x.track_op(),
            };
            x.apply_op1(op)
        }
    }
}

struct Chosen {
    /// (vocabulary, hidden)
    head: Tensor,
    targets: Vec<u32>,
    /// The gradient of each row at slope one.
    saved: OnceLock<Vec<f32>>,
    /// Whether a gradient will be asked for.
    track: bool,
}

// === impl Chosen ===

impl Chosen {
    /// Log-probabilities of one piece of rows; with `unit`, the gradient at slope one too.
    fn piece(&self, x: &[f32], head: &[f32], targets: &[u32], unit: Option<&mut [f32]>) -> Vec<f32> {
        let (rows, hidden) = (targets.len(), x.len() / targets.len());
        let vocabulary = head.len() / hidden;
        let mut logits = vec![0.0; rows * vocabulary];
        let head = Matrix::new(head, vocabulary, hidden);
        let into = (&mut logits[..], vocabulary);
        multiply(Matrix::new(x, rows, hidden), head.transposed(), 1.0, into, Into::Overwrite, Threads::All);
        let chosen = logits.par_chunks_mut(vocabulary).zip(targets).map(|(row, target)| {
            let target = *target as usize;
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let own = row[target] - top;
            let mut sum = 0.0;
            for value in row.iter_mut() {
                *value = (*value - top).exp();
                sum += f64::from(*value);
            }
            // What remains of the row is the gradient by logits: 1 at the target, less the probabilities.
            let scale = -(1.0 / sum) as f32;
            row.iter_mut().for_each(|value| *value *= scale);
            row[target] += 1.0;
            (f64::from(own) - sum.ln()) as f32
        });
        let chosen = chosen.collect();
        if let Some(unit) = unit {
            let logits = Matrix::new(&logits, rows, vocabulary);
            multiply(logits, head, 1.0, (unit, hidden), Into::Overwrite, Threads::All);
        }
        chosen
    }
}

impl CustomOp1 for Chosen {
    fn name(&self) -> &'static str {
        "log_probabilities"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = numbers(storage, layout)?;
        let (rows, hidden) = layout.shape().dims2()?;
        if rows != self.targets.len() {
            bail!("{rows} rows for {} targets", self.targets.len());
        }
        let (head, head_layout) = self.head.storage_and_layout();
        let candle_core::Storage::Cpu(head) = &*head else {
            bail!("the output projection is on another device")
        };
        let head = numbers(head, head_layout)?;
        let mut unit = vec![0.0; if self.track { x.len() } else { 0 }];
        let mut chosen = Vec::with_capacity(rows);
        for first in (0..rows).step_by(ROWS) {
            let piece = first..rows.min(first + ROWS);
            let numbers = piece.start * hidden..piece.end * hidden;
            let unit = if self.track { Some(&mut unit[numbers.clone()]) } else { None };
            chosen.extend(self.piece(&x[numbers], head, &self.targets[piece], unit));
        }
        let _ = self.saved.set(unit);
        Ok((CpuStorage::F32(chosen), rows.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let Some(unit) = self.saved.get() else {
            bail!("the gradient of log-probabilities that were not computed")
        };
        let unit = Tensor::from_slice(unit, x.shape(), &Device::Cpu)?;
        unit.broadcast_mul(&gradient.unsqueeze(1)?).map(Some)
    }
}
