//! What a step computes, token by token: checked and laid out once per step, before any arithmetic.

use std::ops::Range;

use crate::config::Config;
use crate::error::ModelError;
use crate::forward::{Limits, Row};

/// The tokens of all rows of a step. Rows with one adapter stand together, those without any first, so that
/// an adapter's matrices meet all of their rows at once; the order shows nowhere else.
pub struct Plan {
    pub tokens: Vec<Token>,
    /// Rows in the step's order: (index in the caller's order, its tokens).
    pub rows: Vec<(usize, Range<usize>)>,
    /// Tokens with an adapter, cut where the adapter changes.
    pub spans: Vec<Range<usize>>,
    /// Tokens whose logits are wanted, in the caller's order.
    pub wanted: Vec<usize>,
    /// Per cache slot, the step that wrote it last.
    written: Vec<u64>,
    step: u64,
}

/// One position to compute.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    pub id: u32,
    /// Index in the caller's rows.
    pub row: usize,
    pub position: usize,
    /// Cache slot.
    pub slot: usize,
}

impl Plan {
    /// For a cache of `slots` positions.
    pub fn new(slots: usize) -> Self {
        Self {
            tokens: Vec::new(),
            rows: Vec::new(),
            spans: Vec::new(),
            wanted: Vec::new(),
            written: vec![0; slots],
            step: 0,
        }
    }

    /// Checks rows and lays them out; returns how many logits are wanted.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] names the first row that breaks the contract of [`Row`], has an adapter of another
    /// backbone, or would write a slot of the cache that another token of the step writes.
    pub fn prepare(
        &mut self,
        rows: &[Row<'_>],
        limits: &Limits,
        config: &Config,
    ) -> Result<usize, ModelError> {
        let wanted = limits.check(rows)?;
        check_adapters(rows, config)?;
        self.lay_out(rows, limits.block_tokens)?;
        Ok(wanted)
    }

    /// Lays out checked rows.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] if two tokens of the step would write one slot of the cache.
    pub fn lay_out(&mut self, rows: &[Row<'_>], block_tokens: usize) -> Result<(), ModelError> {
        self.step += 1;
        self.tokens.clear();
        self.rows.clear();
        self.spans.clear();
        self.wanted.clear();
        self.rows.extend((0..rows.len()).map(|row| (row, 0..0)));
        self.rows.sort_by_key(|(row, _)| identity(&rows[*row]));

        for (index, range) in &mut self.rows {
            let row = &rows[*index];
            let first = self.tokens.len();
            for (offset, id) in row.tokens.iter().enumerate() {
                let position = row.start + offset;
                let slot = row.slot(position, block_tokens);
                if std::mem::replace(&mut self.written[slot], self.step) == self.step {
                    let reason = format!("row {index}: position {position} is written twice in this step");
                    return Err(ModelError::Invalid { field: "blocks", reason });
                }
                self.tokens.push(Token { id: *id, row: *index, position, slot });
            }
            *range = first..self.tokens.len();
            if row.adapter.is_some() {
                match self.spans.last_mut() {
                    Some(span) if identity(&rows[self.tokens[span.start].row]) == identity(row) => {
                        span.end = range.end;
                    }
                    _ => self.spans.push(range.clone()),
                }
            }
        }
        self.collect_wanted(rows);
        Ok(())
    }

    fn collect_wanted(&mut self, rows: &[Row<'_>]) {
        // Rows are few; a search per row saves an inverse table.
        for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.wanted() > 0) {
            let (_, range) =
                self.rows.iter().find(|(other, _)| *other == index).expect("every row is laid out");
            self.wanted.extend(range.start + row.logits_from..range.end);
        }
    }
}

fn check_adapters(rows: &[Row<'_>], config: &Config) -> Result<(), ModelError> {
    match rows.iter().position(|row| row.adapter.is_some_and(|adapter| !adapter.adapter().fits(config))) {
        None => Ok(()),
        Some(index) => {
            let reason = format!("row {index}: the adapter was loaded for another backbone");
            Err(ModelError::Invalid { field: "adapter", reason })
        }
    }
}

/// Orders rows by adapter, those without one first. It decides which rows are neighbours, and no number depends on
/// that; but all ranks of a sharded model have one order, as they would not by address.
fn identity(row: &Row<'_>) -> Option<[u8; 32]> {
    row.adapter.map(|conditioned| conditioned.adapter().fingerprint())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::adapter::{Adapter, Conditioned, Objective};

    #[test]
    fn rows_of_one_adapter_stand_together_and_logits_keep_the_caller_s_order() {
        let objective = |name: &str| Objective { name: name.to_owned(), description: String::new() };
        let adapters: Vec<Conditioned> = ["kind", "short"]
            .map(|name| {
                Arc::new(Adapter::scripted(vec![objective(name)])).condition(&[1.0]).expect("all of it")
            })
            .into();
        let tokens = [1, 2, 3];
        let row = |blocks, adapter| Row { tokens: &tokens, start: 0, blocks, logits_from: 2, adapter };
        let rows = [
            row(&[0], Some(&adapters[0])),
            row(&[1], None),
            row(&[2], Some(&adapters[1])),
            row(&[3], Some(&adapters[0])),
        ];
        let mut plan = Plan::new(64);
        plan.lay_out(&rows, 16).expect("disjoint rows");
        assert_eq!(plan.rows[0], (1, 0..3));
        let mut lengths: Vec<usize> = plan.spans.iter().map(Range::len).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, [3, 6]);
        let order: Vec<usize> = plan.wanted.iter().map(|token| plan.tokens[*token].row).collect();
        assert_eq!(order, [0, 1, 2, 3]);
    }

    #[test]
    fn two_rows_that_write_one_slot_are_refused() {
        let row = Row { tokens: &[1, 2], start: 0, blocks: &[2], logits_from: 2, adapter: None };
        let mut plan = Plan::new(64);
        assert!(matches!(plan.lay_out(&[row, row], 16), Err(ModelError::Invalid { field: "blocks", .. })));
        plan.lay_out(&[row], 16).expect("the next step may write it");
    }
}
