//! The one call that turns tokens into logits: rows of many sequences, prefill chunks and decode rows mixed.
//!
//! Everything downstream rests on one promise of this trait: the logits of a position are a function of
//! the sequence's tokens up to it, its adapter and nothing else. Not of the other rows of the batch, the cut
//! into chunks, the blocks that happen to hold the cache, or the number of threads.

use crate::adapter::Conditioned;
use crate::error::ModelError;
use crate::lane::DeviceRow;
use crate::likeliest::{Likeliest, Lists};

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Tokens to compute, at least one.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]` in its sequence; everything before is in the cache already, or is written by
    /// an earlier row of the same step.
    pub start: usize,
    /// Block table: cache block of positions `0..block_tokens`, of the next `block_tokens`, and so on; it
    /// covers at least `0..start + tokens.len()`.
    pub blocks: &'a [u32],
    /// First index in `tokens` whose logits are wanted; `tokens.len()` means none.
    pub logits_from: usize,
    /// An adapter under a preference, or the plain backbone.
    pub adapter: Option<&'a Conditioned>,
}

/// A model with a paged cache of `blocks()` blocks, each of `block_tokens()` positions.
pub trait Forward: Send {
    /// Length of a row of logits.
    fn vocabulary(&self) -> usize;

    /// Positions a sequence may have.
    fn context_tokens(&self) -> usize;

    /// Positions in a cache block.
    fn block_tokens(&self) -> usize;

    /// Blocks in the cache.
    fn blocks(&self) -> usize;

    /// Whether another role computes with it too: the two then take turns where they do not go together.
    fn is_shared(&self) -> bool {
        false
    }

    /// Called now and then while there is nothing to compute: a model of several processes hears whether all of
    /// them are still there.
    ///
    /// # Errors
    /// [`ModelError::Group`] when one is lost.
    fn idle(&mut self) -> Result<(), ModelError> {
        Ok(())
    }

    /// Appends the rows' keys and values to the cache and writes the wanted logits to `logits`: (wanted
    /// positions, vocabulary), row-major, in the order of `rows` and of the tokens within. `logits` is
    /// resized; its memory is reused.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] names the first row that breaks the contract of [`Row`]; nothing was written
    /// then, neither to the cache nor to `logits`.
    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError>;

    /// Whether [`Forward::forward_listed`] makes lists: it does where rows would travel, which costs more.
    fn gives_lists(&self) -> bool {
        false
    }

    /// As [`Forward::forward`], but where `wanted` names a ranking for a row (it has one entry for each, and positions of
    /// noise are those of a row's first wanted token), that row's wanted positions are in `lists` and not in `logits`. A
    /// model that gives no lists has them all in `logits`.
    ///
    /// # Errors
    /// As [`Forward::forward`].
    fn forward_listed(
        &mut self,
        (rows, wanted): (&[Row<'_>], &[Option<Likeliest>]),
        (logits, lists): (&mut Vec<f32>, &mut Lists),
    ) -> Result<(), ModelError> {
        let _ = wanted;
        lists.clear();
        self.forward(rows, logits)
    }

    /// The whole rows behind lists, by their numbers ([`Lists::first`]): `logits` becomes (numbers, vocabulary). Returns how
    /// many bytes came from other processes. Nothing is lost by asking for one that is too old.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] for a number whose row is not kept any more, or never was.
    fn listed_rows(&mut self, numbers: &[u64], logits: &mut Vec<f32>) -> Result<usize, ModelError> {
        let _ = (numbers, logits);
        Err(ModelError::Invalid { field: "numbers", reason: "it gives no lists".to_owned() })
    }

    /// The same rows, as copies in the memory of the model's device: for lanes of this device
    /// ([`RowLanes`](crate::RowLanes)). They are complete when this returns.
    ///
    /// # Errors
    /// As [`Forward::listed_rows`]; [`ModelError::Invalid`] of a model whose rows are on no device, or in parts on several.
    fn detach_rows(&mut self, numbers: &[u64]) -> Result<Vec<DeviceRow>, ModelError> {
        let _ = numbers;
        Err(ModelError::Invalid {
            field: "numbers",
            reason: "its rows are on no device of its own".to_owned(),
        })
    }
}

/// What a [`Forward`] holds rows to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub vocabulary: usize,
    pub context_tokens: usize,
    pub block_tokens: usize,
    pub blocks: usize,
}

impl Row<'_> {
    /// Positions whose logits are wanted.
    pub fn wanted(&self) -> usize {
        self.tokens.len().saturating_sub(self.logits_from)
    }

    /// Cache slot of a position: block × block_tokens + offset.
    pub(crate) fn slot(&self, position: usize, block_tokens: usize) -> usize {
        self.blocks[position / block_tokens] as usize * block_tokens + position % block_tokens
    }
}

impl Limits {
    /// Checks every row but its adapter; returns the number of wanted positions.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] names the first row that breaks the contract of [`Row`].
    pub fn check(&self, rows: &[Row<'_>]) -> Result<usize, ModelError> {
        for (index, row) in rows.iter().enumerate() {
            self.check_row(row).map_err(|(field, reason)| ModelError::Invalid {
                field,
                reason: format!("row {index}: {reason}"),
            })?;
        }
        Ok(rows.iter().map(Row::wanted).sum())
    }

    fn check_row(&self, row: &Row<'_>) -> Result<(), (&'static str, String)> {
        let count = row.tokens.len();
        if count == 0 {
            return Err(("tokens", "no token to compute".to_owned()));
        }
        if let Some(token) = row.tokens.iter().find(|token| **token as usize >= self.vocabulary) {
            return Err(("tokens", format!("token {token} is not in the vocabulary of {}", self.vocabulary)));
        }
        let end = row.start.saturating_add(count);
        if end > self.context_tokens {
            return Err((
                "start",
                format!("position {} is over the context of {}", end - 1, self.context_tokens),
            ));
        }
        let needed = end.div_ceil(self.block_tokens);
        let Some(used) = row.blocks.get(..needed) else {
            return Err((
                "blocks",
                format!("{} blocks for {end} positions, which need {needed}", row.blocks.len()),
            ));
        };
        if let Some(block) = used.iter().find(|block| **block as usize >= self.blocks) {
            return Err(("blocks", format!("block {block} of a cache of {} blocks", self.blocks)));
        }
        if row.logits_from > count {
            return Err(("logits_from", format!("logits from {} of {count} tokens", row.logits_from)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocabulary: 100, context_tokens: 64, block_tokens: 16, blocks: 8 };

    fn field(row: Row<'_>) -> &'static str {
        match LIMITS.check(&[row]) {
            Err(ModelError::Invalid { field, .. }) => field,
            other => panic!("{row:?} gave {other:?}"),
        }
    }

    #[test]
    fn a_row_that_breaks_the_contract_is_refused_by_field() {
        let sound = Row { tokens: &[1, 2, 3], start: 14, blocks: &[7, 0], logits_from: 1, adapter: None };
        assert_eq!(LIMITS.check(&[sound, sound]).ok(), Some(4));
        assert_eq!(LIMITS.check(&[Row { logits_from: 3, ..sound }]).ok(), Some(0));

        assert_eq!(field(Row { tokens: &[], logits_from: 0, ..sound }), "tokens");
        assert_eq!(field(Row { tokens: &[1, 100, 3], ..sound }), "tokens");
        assert_eq!(field(Row { start: 62, blocks: &[0, 1, 2, 3, 4], ..sound }), "start");
        assert_eq!(field(Row { start: usize::MAX, ..sound }), "start");
        assert_eq!(field(Row { blocks: &[7], ..sound }), "blocks");
        assert_eq!(field(Row { blocks: &[7, 8], ..sound }), "blocks");
        assert_eq!(field(Row { logits_from: 4, ..sound }), "logits_from");
    }
}
