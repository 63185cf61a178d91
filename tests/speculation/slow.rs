//! A model whose steps take their time, as those of a large one do.

use std::{thread, time::Duration};

use uniarm_model::{Forward, ModelError, Row, ScriptedForward};

pub struct Slow {
    pub model: ScriptedForward,
    /// What a step takes besides.
    pub step: Duration,
}

impl Forward for Slow {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    fn context_tokens(&self) -> usize {
        self.model.context_tokens()
    }

    fn block_tokens(&self) -> usize {
        self.model.block_tokens()
    }

    fn blocks(&self) -> usize {
        self.model.blocks()
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        thread::sleep(self.step);
        self.model.forward(rows, logits)
    }
}
