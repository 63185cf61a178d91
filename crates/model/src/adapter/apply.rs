//! Adds an adapter's contribution to rows of one batch, each under its own preference.

use std::cell::RefCell;

use super::{Adapter, Conditioned, Group, GroupAdapter, Modulation, Part};
use crate::division::Division;
use crate::kernels::buffer::Buffer;
use crate::kernels::gemm::{Output, Start, multiply};
use crate::kernels::rows::{Form, Rows};
use crate::kernels::simd::{Isa, LANES};

/// Workspace of one thread.
pub(crate) struct AdapterScratch {
    input: Buffer,
    /// A · x: (tokens, ranks of the group, padded to 16)
    features: Buffer,
    /// m(A · x), packed
    modulated: Buffer,
}

thread_local! {
    static SCRATCH: RefCell<AdapterScratch> =
        const { RefCell::new(AdapterScratch { input: Buffer::new(), features: Buffer::new(), modulated: Buffer::new() }) };
}

impl Adapter {
    /// Adds s · B · m(A · x) to `tokens` rows of `output`, whose columns are the group's outputs that `division` names.
    /// `input` is (tokens, inputs of the group), row-major; `conditioned` gives each token's state, all of
    /// this adapter.
    ///
    /// # Safety
    /// `output` has these rows and the group's columns, and nobody else uses them.
    pub(crate) unsafe fn add<'a>(
        &self,
        isa: Isa,
        (layer, group): (usize, Group),
        input: &[f32],
        conditioned: impl Fn(usize) -> &'a Conditioned,
        (division, output): (&Division, Output),
    ) {
        let Some(group) = &self.layers[layer].groups[group as usize] else { return };
        SCRATCH.with_borrow_mut(|scratch| unsafe {
            group.add(isa, input, &conditioned, (division, output), scratch);
        });
    }
}

impl GroupAdapter {
    unsafe fn add<'a>(
        &self,
        isa: Isa,
        input: &[f32],
        conditioned: &impl Fn(usize) -> &'a Conditioned,
        (division, output): (&Division, Output),
        scratch: &mut AdapterScratch,
    ) {
        let AdapterScratch { input: packed, features, modulated } = scratch;
        let inputs = self.a.inputs();
        let tokens = input.len() / inputs;
        let stride = self.a.count() * LANES;
        features.reserve(tokens * stride);
        let rows = Rows::pack(isa, Form::Floats, input, (tokens, inputs), packed);
        // Safety: `features` is this thread's.
        unsafe {
            let output = Output::new(features.as_mut_ptr(), stride);
            multiply(isa, &rows, &self.a, 0..self.a.count(), output, Start::Zero);
        }
        for part in &self.parts {
            let rank = part.rank();
            modulated.reserve(tokens * rank);
            for (first, count) in Form::Floats.tiles(isa, tokens) {
                for row in 0..count {
                    let z = &features[(first + row) * stride + part.first_rank..][..rank];
                    let state = &conditioned(first + row).state[part.state..][..part.state_floats()];
                    part.modulate(z, state, &mut modulated[first * rank..][..count * rank], (row, count));
                }
            }
            let rows = Rows::packed(Form::Floats, modulated, (tokens, rank));
            let own = division.outputs(part.linear);
            // Whole panels: every dimension that is divided is one of vectors.
            let panels = own.rows.start / LANES..own.rows.end.div_ceil(LANES);
            // A product's column 0 belongs to panel 0, which may lie before the first column here.
            let output = output.column(own.column.wrapping_sub(own.rows.start));
            // Safety: as promised to `Adapter::add`.
            unsafe { multiply(isa, &rows, &part.b, panels, output, Start::Output) };
        }
    }
}

impl Part {
    /// s · m(z) of one row into its column of a packed tile of `count` rows.
    fn modulate(&self, z: &[f32], state: &[f32], tile: &mut [f32], (row, count): (usize, usize)) {
        let rank = z.len();
        let column = tile.iter_mut().skip(row).step_by(count);
        match self.modulation {
            Modulation::None => {
                for (y, z) in column.zip(z) {
                    *y = state[0] * z;
                }
            }
            Modulation::Affine { .. } => {
                let (gamma, beta) = state.split_at(rank);
                for (((y, z), gamma), beta) in column.zip(z).zip(gamma).zip(beta) {
                    *y = gamma * z + beta;
                }
            }
            Modulation::Mix { .. } => {
                for (y, mix) in column.zip(state.chunks_exact(rank)) {
                    *y = mix.iter().zip(z).fold(0.0, |sum, (m, z)| sum + m * z);
                }
            }
        }
    }
}
