//! x + down(silu(gate(n)) · up(n)), n = rms_norm(x): the gated feed-forward block with its residual, all frozen.
//!
//! Two thirds of a layer's arithmetic, and the widest of its activations; the fast form keeps gate and up alone for the
//! gradient, and adds in place.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::product::{Into, Matrix, Threads, multiply};
use super::{Form, frozen_linear, norm, numbers, rms_norm};

/// Numbers that one thread takes at a time.
const PIECE: usize = 16_384;

/// The frozen weights of a block.
pub struct Mlp {
    pub norm: Tensor,
    pub epsilon: f32,
    /// (inner, hidden)
    pub gate: Tensor,
    /// (inner, hidden)
    pub up: Tensor,
    /// (hidden, inner)
    pub down: Tensor,
    /// The same on the CPU, for the fast form.
    flat: OnceLock<Arc<Flat>>,
}

struct Flat {
    norm: Vec<f32>,
    epsilon: f32,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

pub fn mlp(x: &Tensor, weights: &Mlp, form: Form) -> Result<Tensor> {
    match form {
        Form::Plain => {
            let normed = rms_norm(x, &weights.norm, weights.epsilon, form)?;
            let gate = frozen_linear(&normed, &weights.gate)?.silu()?;
            let up = frozen_linear(&normed, &weights.up)?;
            x + frozen_linear(&(gate * up)?, &weights.down)?
        }
        Form::Fast => x.apply_op1(Block { weights: weights.flat()?, saved: OnceLock::new() }),
    }
}

struct Block {
    weights: Arc<Flat>,
    /// gate and up of the forward pass.
    saved: OnceLock<(Vec<f32>, Vec<f32>)>,
}

// === impl Mlp ===

impl Mlp {
    pub fn new(norm: Tensor, epsilon: f32, [gate, up, down]: [Tensor; 3]) -> Self {
        Self { norm, epsilon, gate, up, down, flat: OnceLock::new() }
    }

    fn flat(&self) -> Result<Arc<Flat>> {
        if let Some(flat) = self.flat.get() {
            return Ok(flat.clone());
        }
        let matrix = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let flat = Flat {
            norm: self.norm.to_vec1()?,
            epsilon: self.epsilon,
            gate: matrix(&self.gate)?,
            up: matrix(&self.up)?,
            down: matrix(&self.down)?,
        };
        Ok(self.flat.get_or_init(|| Arc::new(flat)).clone())
    }
}

// === impl Flat ===

impl Flat {
    fn hidden(&self) -> usize {
        self.norm.len()
    }

    fn inner(&self) -> usize {
        self.gate.len() / self.norm.len()
    }

    fn gate_and_up(&self, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (hidden, inner, rows) = (self.hidden(), self.inner(), x.len() / self.hidden());
        let normed = norm::forward(x, &self.norm, self.epsilon);
        let project = |weight: &[f32]| {
            let mut y = vec![0.0; rows * inner];
            let weight = Matrix::new(weight, inner, hidden).transposed();
            let normed = Matrix::new(&normed, rows, hidden);
            multiply(normed, weight, 1.0, (&mut y, inner), Into::Overwrite, Threads::All);
            y
        };
        (project(&self.gate), project(&self.up))
    }

    /// The block's output, from gate and up.
    fn forward(&self, x: &[f32], gate: &[f32], up: &[f32]) -> Vec<f32> {
        let (hidden, inner, rows) = (self.hidden(), self.inner(), x.len() / self.hidden());
        let mut product = vec![0.0; gate.len()];
        product.par_chunks_mut(PIECE).zip(gate.par_chunks(PIECE)).zip(up.par_chunks(PIECE)).for_each(
            |((product, gate), up)| {
                for i in 0..product.len() {
                    product[i] = gate[i] * sigmoid(gate[i]) * up[i];
                }
            },
        );
        let mut y = x.to_vec();
        let weight = Matrix::new(&self.down, hidden, inner).transposed();
        multiply(Matrix::new(&product, rows, inner), weight, 1.0, (&mut y, hidden), Into::Add, Threads::All);
        y
    }

    /// dL/dx from dL/dy.
    fn backward(&self, x: &[f32], (gate, up): &(Vec<f32>, Vec<f32>), slopes: &[f32]) -> Vec<f32> {
        let (hidden, inner, rows) = (self.hidden(), self.inner(), x.len() / self.hidden());
        let mut down = vec![0.0; rows * inner]; // dL/d(silu(gate) · up)
        let weight = Matrix::new(&self.down, hidden, inner);
        multiply(
            Matrix::new(slopes, rows, hidden),
            weight,
            1.0,
            (&mut down, inner),
            Into::Overwrite,
            Threads::All,
        );
        let mut up_slopes = vec![0.0; rows * inner];
        let pieces = down.par_chunks_mut(PIECE).zip(up_slopes.par_chunks_mut(PIECE));
        pieces.zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE))).for_each(
            |((down, up_slopes), (gate, up))| {
                for i in 0..down.len() {
                    let share = sigmoid(gate[i]);
                    up_slopes[i] = down[i] * gate[i] * share;
                    // d silu(g)/dg = σ(g)(1 + g(1 − σ(g)))
                    down[i] *= up[i] * share * (1.0 + gate[i] * (1.0 - share));
                }
            },
        );
        let mut normed = vec![0.0; x.len()];
        let matrix = |values| Matrix::new(values, rows, inner);
        let (gate, up) = (Matrix::new(&self.gate, inner, hidden), Matrix::new(&self.up, inner, hidden));
        multiply(matrix(&down), gate, 1.0, (&mut normed, hidden), Into::Overwrite, Threads::All);
        multiply(matrix(&up_slopes), up, 1.0, (&mut normed, hidden), Into::Add, Threads::All);
        let mut into = slopes.to_vec();
        norm::add_backward(x, &normed, &self.norm, self.epsilon, &mut into);
        into
    }
}

// === impl Block ===

impl CustomOp1 for Block {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = numbers(storage, layout)?;
        let (gate, up) = self.weights.gate_and_up(x);
        let y = self.weights.forward(x, &gate, &up);
        // The operation of one call is applied once.
        let _ = self.saved.set((gate, up));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let Some(saved) = self.saved.get() else { bail!("the gradient of a block that has not run") };
        let (values, slopes) =
            (x.flatten_all()?.to_vec1::<f32>()?, gradient.flatten_all()?.to_vec1::<f32>()?);
        Tensor::from_vec(self.weights.backward(&values, saved, &slopes), x.shape(), &Device::Cpu).map(Some)
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
