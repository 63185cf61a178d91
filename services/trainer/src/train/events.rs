//! What a run tells whoever watches it.

use serde::Serialize;

use super::evaluation::Evaluation;

/// In the order in which they come.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Began(Began),
    /// Something that a person should know, and that is no error.
    Note {
        text: String,
    },
    Evaluation(Evaluation),
    Step(Step),
    Checkpoint {
        step: u64,
        file: String,
    },
    Ended(Ended),
}

#[derive(Clone, Debug, Serialize)]
pub struct Began {
    /// Steps done before, by a run that this one continues.
    pub step: u64,
    pub steps: u64,
    pub training_pairs: usize,
    pub held_out_pairs: usize,
    /// Lines that were left out.
    pub skipped_lines: usize,
    pub parameters: usize,
    pub workers: usize,
}

/// One step. All but the last two are a function of the configuration, and stand in the metrics.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Steps done, with this one.
    pub step: u64,
    /// Mean over the batch, before the step.
    pub loss: f64,
    /// By objective, mean of ℓ_i.
    pub objectives: Vec<f64>,
    pub gradient_norm: f64,
    pub learning_rate: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timing: Option<Timing>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Timing {
    pub seconds: f64,
    /// Tokens that the networks of all workers read.
    pub tokens: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ended {
    pub step: u64,
    /// Whether the held-out loss no longer fell.
    pub stopped_early: bool,
    /// Step of the weights in the adapter folder, and their held-out loss.
    pub best_step: u64,
    pub best_loss: Option<f64>,
}
