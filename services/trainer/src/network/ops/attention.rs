//! Causal attention over packed samples, with the rotary embedding of queries and keys.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, D, Device, Layout, Result, Shape, Tensor, bail};
use candle_nn::ops::softmax;
use rayon::prelude::*;

use super::product::{Into, Matrix, Threads, multiply};
use super::{Form, numbers};
use crate::network::batch::{Packed, Span};

/// Everything about one batch that all layers share.
pub struct Attention {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    spans: Vec<Span>,
    /// Of each row's angles, (rows, head_dim / 2).
    cosines: Vec<f32>,
    sines: Vec<f32>,
    device: Device,
}

/// (rows, heads · head_dim), and keys and values of (rows, kv_heads · head_dim) → (rows, heads · head_dim)
pub fn attention(shared: &Arc<Attention>, q: &Tensor, k: &Tensor, v: &Tensor, form: Form) -> Result<Tensor> {
    match form {
        Form::Plain => shared.plain(q, k, v),
        Form::Fast => q.apply_op3(k, v, Fast { shared: shared.clone(), saved: OnceLock::new() }),
    }
}

struct Fast {
    shared: Arc<Attention>,
    saved: OnceLock<Saved>,
}

/// What the gradient needs of the forward pass.
struct Saved {
    /// Rotated.
    q: Vec<f32>,
    /// Rotated.
    k: Vec<f32>,
    /// Attention of each span and head, (queries, keys) each.
    weights: Vec<f32>,
}

/// One group of heads of one span, and where its attention lies in [`Saved::weights`].
struct Task {
    span: Span,
    kv_head: usize,
    offset: usize,
}

/// Gradients of one task, rows of the span by width of the group.
struct TaskGradient {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Forward,
    Back,
}

// === impl Attention ===

impl Attention {
    /// `frequencies` are the angles of one position, head_dim / 2 of them.
    pub fn new(
        packed: &Packed,
        (heads, kv_heads, head_dim): (usize, usize, usize),
        frequencies: &[f64],
        device: &Device,
    ) -> Self {
        let angles = packed.positions.iter().flat_map(|position| {
            frequencies.iter().map(move |frequency| (f64::from(*position) * frequency).sin_cos())
        });
        let (sines, cosines) = angles.map(|(sine, cosine)| (sine as f32, cosine as f32)).unzip();
        Self {
            heads,
            kv_heads,
            head_dim,
            spans: packed.spans.clone(),
            cosines,
            sines,
            device: device.clone(),
        }
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn plain(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let mut outputs = Vec::with_capacity(self.spans.len());
        for span in &self.spans {
            let rows = span.rows();
            let part = |x: &Tensor, heads: usize| {
                let x = x.narrow(0, span.first_row, rows)?.reshape((rows, heads, self.head_dim))?;
                x.transpose(0, 1)?.contiguous()
            };
            let q = self.rotate(&part(q, self.heads)?, span)?;
            let k = self.repeat(&self.rotate(&part(k, self.kv_heads)?, span)?)?;
            let v = self.repeat(&part(v, self.kv_heads)?)?;
            let hidden = |at: usize| if span.sees(at / rows, at % rows) { 0.0 } else { f32::NEG_INFINITY };
            let mask =
                Tensor::from_iter((0..rows * rows).map(hidden), &self.device)?.reshape((rows, rows))?;
            let scores = (q.matmul(&k.t()?)? * f64::from(self.scale()))?.broadcast_add(&mask)?;
            let mixed = softmax(&scores, D::Minus1)?.matmul(&v)?; // (heads, rows, head_dim)
            outputs.push(mixed.transpose(0, 1)?.contiguous()?.reshape((rows, self.heads * self.head_dim))?);
        }
        Tensor::cat(&outputs, 0)
    }

    /// x · cos + (−second half, first half) · sin, of (heads, rows, head_dim)
    fn rotate(&self, x: &Tensor, span: &Span) -> Result<Tensor> {
        let half = self.head_dim / 2;
        let range = span.first_row * half..(span.first_row + span.rows()) * half;
        let angles = |values: &[f32]| {
            let values = Tensor::from_slice(&values[range.clone()], (span.rows(), half), &self.device)?;
            Tensor::cat(&[&values, &values], 1)
        };
        let (low, high) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let turned = Tensor::cat(&[high.neg()?, low], D::Minus1)?;
        x.broadcast_mul(&angles(&self.cosines)?)? + turned.broadcast_mul(&angles(&self.sines)?)?
    }

    /// Each key-value head once for each query head of its group.
    fn repeat(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, rows, head_dim) = x.dims3()?;
        let x = x.unsqueeze(1)?.broadcast_as((heads, self.group(), rows, head_dim))?;
        x.contiguous()?.reshape((heads * self.group(), rows, head_dim))
    }

    /// Turns every head of every row by the angle of its position.
    fn turn(&self, x: &mut [f32], heads: usize, turn: Turn) {
        let half = self.head_dim / 2;
        let rows = x.par_chunks_mut(heads * self.head_dim);
        rows.zip(self.cosines.par_chunks(half).zip(self.sines.par_chunks(half))).for_each(
            |(row, (cosines, sines))| {
                for head in row.chunks_exact_mut(self.head_dim) {
                    let (low, high) = head.split_at_mut(half);
                    for i in 0..half {
                        let sine = if turn == Turn::Forward { sines[i] } else { -sines[i] };
                        (low[i], high[i]) =
                            (low[i] * cosines[i] - high[i] * sine, high[i] * cosines[i] + low[i] * sine);
                    }
                }
            },
        );
    }

    fn tasks(&self) -> Vec<Task> {
        let mut offset = 0;
        let mut tasks = Vec::with_capacity(self.spans.len() * self.kv_heads);
        for span in &self.spans {
            for kv_head in 0..self.kv_heads {
                tasks.push(Task { span: *span, kv_head, offset });
                offset += self.group() * span.rows() * span.rows();
            }
        }
        tasks
    }

    /// One head's rows out of those of all heads.
    fn part<'a>(&self, x: &'a [f32], span: &Span, heads: usize, head: usize) -> Matrix<'a> {
        let stride = heads * self.head_dim;
        let first = span.first_row * stride + head * self.head_dim;
        Matrix::part(&x[first..], span.rows(), self.head_dim, stride)
    }

    /// Attention and output of one task: (group · rows · rows), and (rows, group · head_dim).
    fn forward(&self, task: &Task, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let Task { span, kv_head, .. } = task;
        let (rows, group, width) = (span.rows(), self.group(), self.head_dim);
        let mut weights = vec![0.0; group * rows * rows];
        let mut output = vec![0.0; rows * group * width];
        let keys = self.part(k, span, self.kv_heads, *kv_head);
        let values = self.part(v, span, self.kv_heads, *kv_head);
        for (member, weights) in weights.chunks_exact_mut(rows * rows).enumerate() {
            let queries = self.part(q, span, self.heads, kv_head * group + member);
            let into = (&mut *weights, rows);
            multiply(queries, keys.transposed(), self.scale(), into, Into::Overwrite, Threads::One);
            for (query, row) in weights.chunks_exact_mut(rows).enumerate() {
                soften(span, query, row);
            }
            let into = (&mut output[member * width..], group * width);
            multiply(Matrix::new(weights, rows, rows), values, 1.0, into, Into::Overwrite, Threads::One);
        }
        (weights, output)
    }

    fn backward(&self, task: &Task, saved: &Saved, v: &[f32], slopes: &[f32]) -> TaskGradient {
        let Task { span, kv_head, offset } = task;
        let (rows, group, width) = (span.rows(), self.group(), self.head_dim);
        let mut gradient = TaskGradient {
            q: vec![0.0; rows * group * width],
            k: vec![0.0; rows * width],
            v: vec![0.0; rows * width],
        };
        let keys = self.part(&saved.k, span, self.kv_heads, *kv_head);
        let values = self.part(v, span, self.kv_heads, *kv_head);
        let mut scores = vec![0.0; rows * rows];
        for member in 0..group {
            let head = kv_head * group + member;
            let weights = &saved.weights[offset + member * rows * rows..][..rows * rows];
            let slopes = self.part(slopes, span, self.heads, head);
            let attention = Matrix::new(weights, rows, rows);
            multiply(attention.transposed(), slopes, 1.0, (&mut gradient.v, width), Into::Add, Threads::One);
            multiply(slopes, values.transposed(), 1.0, (&mut scores, rows), Into::Overwrite, Threads::One);
            for (slopes, weights) in scores.chunks_exact_mut(rows).zip(weights.chunks_exact(rows)) {
                let mean: f32 = slopes.iter().zip(weights).map(|(slope, weight)| slope * weight).sum();
                for (slope, weight) in slopes.iter_mut().zip(weights) {
                    *slope = weight * (*slope - mean);
                }
            }
            let scores = Matrix::new(&scores, rows, rows);
            let into = (&mut gradient.q[member * width..], group * width);
            multiply(scores, keys, self.scale(), into, Into::Overwrite, Threads::One);
            let queries = self.part(&saved.q, span, self.heads, head);
            multiply(
                scores.transposed(),
                queries,
                self.scale(),
                (&mut gradient.k, width),
                Into::Add,
                Threads::One,
            );
        }
        gradient
    }
}

// === impl Fast ===

impl CustomOp3 for Fast {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shared = &self.shared;
        let (mut q, mut k) = (numbers(q, q_layout)?.to_vec(), numbers(k, k_layout)?.to_vec());
        let v = numbers(v, v_layout)?;
        shared.turn(&mut q, shared.heads, Turn::Forward);
        shared.turn(&mut k, shared.kv_heads, Turn::Forward);
        let tasks = shared.tasks();
        let parts: Vec<_> = tasks.par_iter().map(|task| shared.forward(task, &q, &k, v)).collect();
        let mut output = vec![0.0; q.len()];
        let mut weights = Vec::with_capacity(parts.iter().map(|(weights, _)| weights.len()).sum());
        let width = shared.group() * shared.head_dim;
        for (task, (attention, part)) in tasks.iter().zip(&parts) {
            weights.extend_from_slice(attention);
            place(part, task, width, shared.kv_heads, &mut output);
        }
        let _ = self.saved.set(Saved { q, k, weights });
        Ok((CpuStorage::F32(output), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let shared = &self.shared;
        let Some(saved) = self.saved.get() else { bail!("the gradient of attention that has not run") };
        let (values, slopes) =
            (v.flatten_all()?.to_vec1::<f32>()?, gradient.flatten_all()?.to_vec1::<f32>()?);
        let tasks = shared.tasks();
        let parts: Vec<_> =
            tasks.par_iter().map(|task| shared.backward(task, saved, &values, &slopes)).collect();
        let (mut dq, mut dk, mut dv) =
            (vec![0.0; slopes.len()], vec![0.0; values.len()], vec![0.0; values.len()]);
        let width = shared.head_dim;
        for (task, part) in tasks.iter().zip(&parts) {
            place(&part.q, task, shared.group() * width, shared.kv_heads, &mut dq);
            place(&part.k, task, width, shared.kv_heads, &mut dk);
            place(&part.v, task, width, shared.kv_heads, &mut dv);
        }
        shared.turn(&mut dq, shared.heads, Turn::Back);
        shared.turn(&mut dk, shared.kv_heads, Turn::Back);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

/// Softmax over the keys that a query sees; zero for the others.
fn soften(span: &Span, query: usize, row: &mut [f32]) {
    let mut top = f32::NEG_INFINITY;
    for (key, score) in row.iter_mut().enumerate() {
        if span.sees(query, key) {
            top = top.max(*score);
        } else {
            *score = f32::NEG_INFINITY;
        }
    }
    let mut sum = 0.0;
    for score in row.iter_mut() {
        *score = (*score - top).exp();
        sum += *score;
    }
    row.iter_mut().for_each(|score| *score /= sum);
}

/// Writes a task's (rows, width) into the columns of its group.
fn place(part: &[f32], task: &Task, width: usize, groups: usize, into: &mut [f32]) {
    let stride = width * groups;
    let rows = into[task.span.first_row * stride..].chunks_exact_mut(stride);
    for (from, row) in part.chunks_exact(width).zip(rows) {
        row[task.kv_head * width..][..width].copy_from_slice(from);
    }
}
