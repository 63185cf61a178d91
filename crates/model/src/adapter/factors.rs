//! An adapter's weights as plain numbers, for devices that apply them in kernels of their own.

use super::{Adapter, Conditioned, Modulation};
use crate::division::Linear;
use crate::kernels::panels::Panels;

/// The adapters of linear layers that share their input.
pub struct StackedFactors {
    pub layer: usize,
    /// A of all parts, stacked: (ranks of all parts, inputs).
    pub a: Vec<f32>,
    pub parts: Vec<Factors>,
}

/// The adapter of one linear layer: it adds B · m(A · x), where m is a function of the preference's state.
pub struct Factors {
    pub linear: Linear,
    /// Its first rank among those of the stack.
    pub first_rank: usize,
    pub rank: usize,
    /// (outputs, rank)
    pub b: Vec<f32>,
    pub mixing: Mixing,
    /// Where its floats begin in [`Conditioned::state`].
    pub state: usize,
}

/// What m(z) does with a part's floats of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixing {
    /// s · z: one float.
    Scale,
    /// γ ⊙ z + β: rank floats of each.
    Affine,
    /// M · z: (rank, rank).
    Matrix,
}

impl Adapter {
    /// All that is adapted, layer by layer.
    pub fn factors(&self) -> Vec<StackedFactors> {
        let layers = self.layers.iter().enumerate();
        let groups = layers
            .flat_map(|(layer, adapter)| adapter.groups.iter().flatten().map(move |group| (layer, group)));
        let stacked = groups.map(|(layer, group)| {
            let parts = group.parts.iter().map(|part| Factors {
                linear: part.linear,
                first_rank: part.first_rank,
                rank: part.rank(),
                b: numbers(&part.b),
                mixing: match part.modulation {
                    Modulation::None => Mixing::Scale,
                    Modulation::Affine { .. } => Mixing::Affine,
                    Modulation::Mix { .. } => Mixing::Matrix,
                },
                state: part.state,
            });
            StackedFactors { layer, a: numbers(&group.a), parts: parts.collect() }
        });
        stacked.collect()
    }
}

impl Conditioned {
    /// What the preference is to the kernels: the floats of all parts, see [`Mixing`].
    pub fn state(&self) -> &[f32] {
        &self.state
    }
}

/// (outputs, inputs), row-major.
fn numbers(panels: &Panels) -> Vec<f32> {
    let mut values = vec![0.0; panels.outputs() * panels.inputs()];
    for (output, row) in values.chunks_exact_mut(panels.inputs()).enumerate() {
        panels.row(output, row);
    }
    values
}
