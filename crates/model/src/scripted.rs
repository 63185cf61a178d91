//! A model without weights: pseudo-random logits that are a pure function of (tokens so far, adapter, seed).
//!
//! It keeps the tokens in its paged cache and reads them back from there, as a transformer reads keys and
//! values. An engine that hands over a wrong block table, forgets to recompute after a preemption, reuses a
//! block too early or shares one across different adapters gets other logits, and its test fails.

use std::{collections::VecDeque, path::Path, thread, time::Duration};

use serde_json::json;

use crate::error::ModelError;
use crate::forward::{Forward, Limits, Row};
use crate::likeliest::{Likeliest, Lists, Ranking};
use crate::tokenizer::Tokenizer;

/// What a block's slot holds before anything was written to it.
const UNWRITTEN: u64 = u64::MAX;

/// Dimensions and character of a scripted model.
#[derive(Clone, Copy, Debug)]
pub struct ScriptedOptions {
    pub vocabulary: usize,
    pub context_tokens: usize,
    pub blocks: usize,
    pub block_tokens: usize,
    /// Two scripted models with one seed are the same model.
    pub seed: u64,
    /// 0: nothing in common with models of other seeds; 1: all seeds (and adapters) give the same logits.
    /// Between, how much of a logit is shared: the scripted kin of "base and reward model mostly agree".
    pub agreement: f32,
    /// Width of the logits: they are within about ±`spread`.
    pub spread: f32,
    /// What a step takes besides, as that of a large model does.
    pub step: Duration,
    /// Lists in place of rows where they do, as a model of several processes gives them.
    pub lists: Option<ScriptedLists>,
}

/// How a scripted model makes lists.
#[derive(Clone, Copy, Debug)]
pub struct ScriptedLists {
    pub ranking: Ranking,
    /// Rows that it keeps behind its latest lists.
    pub kept: usize,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct ScriptedForward {
    options: ScriptedOptions,
    /// Per cache slot: what was written there, a mix of token and adapter. (blocks × block_tokens)
    slots: Vec<u64>,
    /// Forward calls so far.
    steps: u64,
    /// Rows behind the latest lists, and how many lists there were.
    behind: VecDeque<Vec<f32>>,
    listed: u64,
}

impl Default for ScriptedOptions {
    fn default() -> Self {
        Self {
            vocabulary: 1000,
            context_tokens: 1024,
            blocks: 256,
            block_tokens: 16,
            seed: 0,
            agreement: 0.0,
            spread: 8.0,
            step: Duration::ZERO,
            lists: None,
        }
    }
}

impl ScriptedForward {
    pub fn new(options: ScriptedOptions) -> Self {
        let slots = vec![UNWRITTEN; options.blocks * options.block_tokens];
        Self { options, slots, steps: 0, behind: VecDeque::new(), listed: 0 }
    }

    /// The words that such a model writes: t0, t1, …; t0 ends a text.
    pub fn tokenizer(vocabulary: usize) -> Tokenizer {
        let words: serde_json::Map<_, _> = (0..vocabulary).map(|id| (format!("t{id}"), id.into())).collect();
        let end = json!({
            "id": 0, "content": "t0", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false,
        });
        let file = json!({
            "version": "1.0", "added_tokens": [end], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "decoder": {
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
            },
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "t1"},
        });
        let bytes = file.to_string().into_bytes();
        let mut tokenizer =
            Tokenizer::from_bytes(&bytes, Path::new("tokenizer.json")).expect("it is written above");
        tokenizer.set_ends(None, &[0]);
        tokenizer
    }

    /// Forward calls so far: how a test counts steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn limits(&self) -> Limits {
        let ScriptedOptions { vocabulary, context_tokens, block_tokens, blocks, .. } = self.options;
        Limits { vocabulary, context_tokens, block_tokens, blocks }
    }

    /// The logits after a sequence whose slots hash to `history` (with the adapter) and `text` (without).
    fn write_logits(&self, history: u64, text: u64, logits: &mut Vec<f32>) {
        let ScriptedOptions { vocabulary, seed, agreement, spread, .. } = self.options;
        let own = mix(history ^ mix(seed));
        logits.extend((0..vocabulary as u64).map(|token| {
            let own = unit(mix(own ^ mix(token)));
            let common = unit(mix(text ^ mix(token)));
            // The cube makes a few tokens stand out, as in a language model.
            let x = agreement * common + (1.0 - agreement) * own;
            spread * x * x * x
        }));
    }
}

impl Forward for ScriptedForward {
    fn vocabulary(&self) -> usize {
        self.options.vocabulary
    }

    fn context_tokens(&self) -> usize {
        self.options.context_tokens
    }

    fn block_tokens(&self) -> usize {
        self.options.block_tokens
    }

    fn blocks(&self) -> usize {
        self.options.blocks
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let wanted = self.limits().check(rows)?;
        if !self.options.step.is_zero() {
            thread::sleep(self.options.step);
        }
        self.steps += 1;
        let block_tokens = self.options.block_tokens;
        for row in rows {
            for (index, token) in row.tokens.iter().enumerate() {
                self.slots[row.slot(row.start + index, block_tokens)] = entry(*token, row);
            }
        }
        logits.clear();
        logits.reserve(wanted * self.options.vocabulary);
        for row in rows {
            let (mut history, mut text) = (0, 0);
            for position in 0..row.start + row.tokens.len() {
                let slot = self.slots[row.slot(position, block_tokens)];
                history = mix(history ^ slot);
                text = mix(text ^ (slot & 0xffff_ffff));
                if position >= row.start + row.logits_from {
                    self.write_logits(history, text, logits);
                }
            }
        }
        Ok(())
    }

    fn gives_lists(&self) -> bool {
        self.options.lists.is_some()
    }

    fn forward_listed(
        &mut self,
        (rows, wanted): (&[Row<'_>], &[Option<Likeliest>]),
        (logits, lists): (&mut Vec<f32>, &mut Lists),
    ) -> Result<(), ModelError> {
        lists.clear();
        let Some(ScriptedLists { ranking, kept }) = self.options.lists else {
            return self.forward(rows, logits);
        };
        let vocabulary = self.options.vocabulary;
        let mut all = Vec::new();
        self.forward(rows, &mut all)?;
        logits.clear();
        lists.first = self.listed;
        let positions = rows.iter().zip(wanted).flat_map(|(row, wanted)| {
            (0..row.wanted()).map(move |offset| wanted.map(|list| list.later(offset)))
        });
        for (wanted, row) in positions.zip(all.chunks_exact(vocabulary)) {
            let Some(wanted) = wanted else {
                logits.extend_from_slice(row);
                continue;
            };
            let mut candidates = Vec::new();
            ranking(&wanted, (row, 0), &mut candidates);
            lists.push(&wanted, vocabulary, candidates.into_iter());
            self.behind.push_back(row.to_vec());
            self.listed += 1;
        }
        self.behind.drain(..self.behind.len().saturating_sub(kept));
        Ok(())
    }

    fn listed_rows(&mut self, numbers: &[u64], logits: &mut Vec<f32>) -> Result<usize, ModelError> {
        logits.clear();
        let first = self.listed - self.behind.len() as u64;
        for number in numbers {
            let row = number.checked_sub(first).and_then(|index| self.behind.get(index as usize));
            logits.extend_from_slice(row.ok_or_else(ModelError::row_not_kept)?);
        }
        Ok(0)
    }
}

/// What a token under an adapter leaves in the cache: the token below, the adapter above.
fn entry(token: u32, row: &Row<'_>) -> u64 {
    let adapter = row.adapter.map_or(0, |adapter| adapter.key() | 1);
    (adapter << 32) | u64::from(token)
}

/// A bijective 64-bit mix (the finaliser of SplitMix64).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The top 24 bits, exactly, in [-1, 1).
fn unit(x: u64) -> f32 {
    (x >> 40) as f32 / (1 << 23) as f32 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row<'a>(tokens: &'a [u32], start: usize, blocks: &'a [u32]) -> Row<'a> {
        Row { tokens, start, blocks, logits_from: tokens.len() - 1, adapter: None }
    }

    fn logits(model: &mut ScriptedForward, row: Row<'_>) -> Vec<f32> {
        let mut logits = Vec::new();
        model.forward(&[row], &mut logits).expect("a sound row");
        logits
    }

    #[test]
    fn logits_depend_on_the_tokens_and_not_on_chunks_or_blocks() {
        let mut model = ScriptedForward::new(ScriptedOptions::default());
        let tokens: Vec<u32> = (0..40).collect();
        let whole = logits(&mut model, row(&tokens, 0, &[0, 1, 2]));
        logits(&mut model, row(&tokens[..21], 0, &[9, 4, 6]));
        assert_eq!(whole, logits(&mut model, row(&tokens[21..], 21, &[9, 4, 6])));
    }

    #[test]
    fn a_stale_block_shows() {
        let mut model = ScriptedForward::new(ScriptedOptions::default());
        let tokens: Vec<u32> = (0..17).collect();
        let right = logits(&mut model, row(&tokens, 0, &[0, 1]));
        logits(&mut model, row(&[7], 0, &[0]));
        assert_ne!(right, logits(&mut model, row(&tokens[16..], 16, &[0, 1])));
    }
}
