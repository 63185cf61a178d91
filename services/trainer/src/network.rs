//! What training asks of a network: log-probabilities of pairs of answers, and the gradient of a loss over them.

mod adapter;
mod batch;
mod device;
mod llama;
mod modulation;
mod ops;

use std::ops::Range;

use crate::loss::{Labels, Likelihood, Loss, LossValue};

pub use adapter::{AdapterConfig, Conditioning, Head, Method, Objective};
pub use batch::Packed;
pub use device::DeviceName;
pub use llama::{LlamaNetwork, NetworkOptions};
pub use ops::Form;

pub(crate) use adapter::stem;

/// A pair as the network sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenPair {
    /// The conversation up to where the answer begins, rendered by the chat template. Never empty.
    pub prompt: Vec<u32>,
    /// Answers a and b, each with the token that ends it. Never empty.
    pub answers: [Vec<u32>; 2],
    pub labels: Labels,
}

/// A pair under a preference: one element of a batch. Each may have another preference.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    pub pair: &'a TokenPair,
    /// One weight for each objective; empty for a plain LoRA.
    pub preference: &'a [f32],
    /// What decides which features dropout leaves out: a function of run, step and place in the batch, so that a
    /// resumed run repeats it. No effect where the network has no dropout.
    pub draw: u64,
}

/// A named range of the flat vector of parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// As in the adapter's file.
    pub name: String,
    pub shape: Vec<usize>,
    /// Index of its first number.
    pub offset: usize,
}

/// A frozen backbone under a trainable adapter. All trainable numbers are one flat vector, in the order of
/// [`Network::layout`]: what an optimizer steps, a checkpoint stores and workers add up.
///
/// Equal arguments give equal bits, on the same machine with the same number of threads.
pub trait Network: Send {
    fn layout(&self) -> &[Parameter];

    /// Numbers in the flat vector.
    fn parameter_count(&self) -> usize;

    /// The vector as it is now.
    fn parameters(&self) -> Vec<f32>;

    /// Replaces the vector; of exactly `parameter_count` numbers.
    ///
    /// # Errors
    /// Where a device refuses memory.
    fn set_parameters(&mut self, parameters: &[f32]) -> anyhow::Result<()>;

    /// log π of answers a and b, each a sum over the answer's tokens, for every sample.
    ///
    /// # Errors
    /// Where a device fails.
    fn log_probabilities(&mut self, samples: &[Sample<'_>]) -> anyhow::Result<Vec<[f64; 2]>>;

    /// Losses of the samples; *adds* the gradient of their sum to `gradient` (of `parameter_count` numbers).
    ///
    /// # Errors
    /// Where a device fails. `gradient` is then undefined.
    fn add_gradient(
        &mut self,
        samples: &[Sample<'_>],
        loss: &Loss,
        gradient: &mut [f32],
    ) -> anyhow::Result<Vec<LossValue>>;

    /// Writes the adapter in the format that reward workers serve (docs/adapter-format.md) into an existing folder.
    ///
    /// # Errors
    /// Where the file system does; the folder's files are replaced whole or not at all.
    fn save(&self, folder: &std::path::Path) -> anyhow::Result<()>;
}

// === impl TokenPair ===

impl TokenPair {
    /// What the loss wants to know of sums of log-probabilities of answers a and b.
    pub fn likelihoods(&self, sums: [f64; 2]) -> [Likelihood; 2] {
        [0, 1].map(|side| Likelihood { sum: sums[side], tokens: self.answers[side].len() })
    }
}

// === impl Parameter ===

impl Parameter {
    /// Its place in the flat vector.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.shape.iter().product::<usize>()
    }
}
