//! x · weight / sqrt(mean(x²) + ε), over the last dimension; the weight is frozen.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Form, numbers};

/// Rows that one thread takes at a time.
const ROWS: usize = 16;

pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32, form: Form) -> Result<Tensor> {
    match form {
        Form::Plain => {
            let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
            x.broadcast_div(&(mean + f64::from(epsilon))?.sqrt()?)?.broadcast_mul(weight)
        }
        Form::Fast => x.apply_op1(RmsNorm { weight: weight.to_vec1()?, epsilon }),
    }
}

struct RmsNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

// === impl RmsNorm ===

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = numbers(storage, layout)?;
        Ok((CpuStorage::F32(forward(x, &self.weight, self.epsilon)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (values, slopes) =
            (x.flatten_all()?.to_vec1::<f32>()?, gradient.flatten_all()?.to_vec1::<f32>()?);
        let mut into = vec![0.0; values.len()];
        add_backward(&values, &slopes, &self.weight, self.epsilon, &mut into);
        Tensor::from_vec(into, x.shape(), x.device()).map(Some)
    }
}

/// Rows of `weight.len()` numbers, normalised.
pub fn forward(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let width = weight.len();
    let mut y = vec![0.0; x.len()];
    y.par_chunks_mut(width * ROWS).zip(x.par_chunks(width * ROWS)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let scale = inverse_root(x, epsilon);
            for i in 0..width {
                y[i] = x[i] * scale * weight[i];
            }
        }
    });
    y
}

/// Adds dL/dx to `into`: with g = slope · weight and r = 1/sqrt(mean(x²) + ε), it is r·g − r³·x·mean(g·x).
pub fn add_backward(x: &[f32], slopes: &[f32], weight: &[f32], epsilon: f32, into: &mut [f32]) {
    let width = weight.len();
    let rows = into.par_chunks_mut(width * ROWS).zip(x.par_chunks(width * ROWS));
    rows.zip(slopes.par_chunks(width * ROWS)).for_each(|((into, x), slopes)| {
        let rows = into.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(slopes.chunks_exact(width));
        for ((into, x), slopes) in rows {
            let scale = inverse_root(x, epsilon);
            let dot = sum(width, |i| slopes[i] * weight[i] * x[i]);
            let pull = scale * scale * scale * dot / width as f32;
            for i in 0..width {
                into[i] += scale * slopes[i] * weight[i] - pull * x[i];
            }
        }
    });
}

fn inverse_root(x: &[f32], epsilon: f32) -> f32 {
    let mean = sum(x.len(), |i| x[i] * x[i]) / x.len() as f32;
    1.0 / (mean + epsilon).sqrt()
}

/// Sixteen sums side by side, which the compiler makes into vectors.
fn sum(count: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; 16];
    let whole = count - count % 16;
    for first in (0..whole).step_by(16) {
        for lane in 0..16 {
            lanes[lane] += term(first + lane);
        }
    }
    lanes.iter().sum::<f32>() + (whole..count).map(term).sum::<f32>()
}
