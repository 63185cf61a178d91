//! Operations of the differentiable forward pass, each with its gradient.
//!
//! candle's own rotary embedding, normalisation and attention lose gradients silently, and its product computes the
//! gradient of frozen weights too. Each operation here has a plain form, of candle's differentiable operations, for
//! any device; and most have a fast form for the CPU with a gradient written by hand. Tests hold both together.

mod attention;
mod linear;
mod log_probability;
mod mlp;
mod norm;
mod product;

pub use attention::{Attention, attention};
pub use linear::frozen_linear;
pub use log_probability::log_probabilities;
pub use mlp::{Mlp, mlp};
pub use norm::rms_norm;

use candle_core::{CpuStorage, Layout, Result, bail};

/// Which form of an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Plain,
    /// CPU only.
    Fast,
}

/// The numbers of a contiguous f32 tensor.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => Ok(&values[from..to]),
        _ => bail!("an operation of training needs contiguous f32"),
    }
}
