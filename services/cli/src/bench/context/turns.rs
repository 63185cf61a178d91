//! Decode steps after contexts of several lengths, in turns.
//!
//! A last-level cache that holds the weights between two steps makes a short context cheaper than memory is, and a longer one
//! that displaces them pays for them besides what it reads. In turns each step finds what the others have left, whatever its own
//! length, and their difference is what the longer one reads.

use std::time::Instant;

use uniarm_model::{Forward, Llama, ModelError, Row};

use crate::bench::statistics::Spread;

/// Tokens of a prompt that are computed at once.
const CHUNK: usize = 256;

/// One sequence for each length, in one cache.
pub struct Turns {
    model: Llama,
    sequences: Vec<Sequence>,
    logits: Vec<f32>,
}

struct Sequence {
    prompt: Vec<u32>,
    /// Of the prompt and the tokens that follow it.
    blocks: Vec<u32>,
}

// === impl Turns ===

impl Turns {
    /// Computes the prompts, which takes as long as reading them; each has room for so many tokens after it.
    ///
    /// # Errors
    /// Where the cache has too few blocks, or the model too short a context.
    pub fn new(model: Llama, lengths: &[usize], tokens: usize) -> anyhow::Result<Self> {
        let mut free = 0..model.blocks() as u32;
        let mut sequences = Vec::new();
        for &length in lengths {
            anyhow::ensure!(
                length + tokens <= model.context_tokens(),
                "--prompt-tokens {length} and {tokens} steps after it are over the model's context of {} tokens",
                model.context_tokens()
            );
            let needed = (length + tokens).div_ceil(model.block_tokens());
            let blocks: Vec<u32> = free.by_ref().take(needed).collect();
            anyhow::ensure!(
                blocks.len() == needed,
                "--kv-tokens is too small: contexts of {} tokens lie in the cache together, with {tokens} more for each",
                lengths.iter().sum::<usize>()
            );
            sequences.push(Sequence { prompt: prompt(length, 0), blocks });
        }
        let mut turns = Self { model, sequences, logits: Vec::new() };
        for Sequence { prompt, blocks } in &turns.sequences {
            for (tokens, start) in prompt.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
                let row = Row { tokens, start, blocks, logits_from: tokens.len(), adapter: None };
                turns.model.forward(&[row], &mut turns.logits)?;
            }
        }
        Ok(turns)
    }

    /// Milliseconds of a step after each length, the median of `steps`.
    ///
    /// # Errors
    /// When a forward fails.
    pub fn measure(&mut self, steps: usize) -> Result<Vec<f64>, ModelError> {
        let mut measured = vec![Vec::with_capacity(steps); self.sequences.len()];
        for step in 0..steps {
            for (Sequence { prompt, blocks }, measured) in self.sequences.iter().zip(&mut measured) {
                let row = Row {
                    tokens: &prompt[step % prompt.len()..][..1],
                    start: prompt.len() + step,
                    blocks,
                    logits_from: 0,
                    adapter: None,
                };
                let began = Instant::now();
                self.model.forward(&[row], &mut self.logits)?;
                measured.push(1e3 * began.elapsed().as_secs_f64());
            }
        }
        Ok(measured.into_iter().map(|steps| Spread::of(steps).median).collect())
    }
}

/// Tokens that nobody has written; other ones for each repeat, so that none profits from a cache of prefixes.
pub fn prompt(length: usize, repeat: usize) -> Vec<u32> {
    (0..length).map(|index| 100 + ((repeat * 131 + length * 17 + index * 7) % 5000) as u32).collect()
}
