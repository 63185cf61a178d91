//! What the base model has computed for the next tokens of an answer: whole rows, or lists of the likeliest tokens.

use std::collections::VecDeque;

use tokio::time::Instant;
use uniarm_decode::TopList;
use uniarm_engine::{Logits, LogitsRow};

/// An answer of which one list in so many decided nothing gets rows: to ask for a row afterwards costs a round trip more.
const FAILED_SHARE: u32 = 4;

/// The base model's logits for the next token and, if drafts are right, those after it.
#[derive(Default)]
pub(super) struct BaseRows {
    rows: VecDeque<BaseRow>,
    /// Tokens for which a list was looked at, and those of which it decided nothing.
    looked_at: u32,
    failed: u32,
    /// The next token needs the whole row.
    is_row_wanted: bool,
}

pub(super) struct BaseRow {
    pub logits: BaseLogits,
    pub since: Instant,
}

pub(super) enum BaseLogits {
    Row(LogitsRow),
    /// With its number, by which the row behind it is found.
    List(TopList, u64),
}

// === impl BaseRows ===

impl BaseRows {
    pub fn push(&mut self, logits: Logits) {
        let logits = match logits {
            Logits::List(list, number) => BaseLogits::List(list, number),
            Logits::Row(row) => BaseLogits::Row(row),
        };
        self.rows.push_back(BaseRow { logits, since: Instant::now() });
    }

    /// Another step is computed.
    pub fn keep(&mut self) {
        for row in &mut self.rows {
            if let BaseLogits::Row(row) = &mut row.logits {
                row.keep();
            }
        }
    }

    /// Of the next token.
    pub fn next(&self) -> Option<&BaseRow> {
        self.rows.front()
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The next token is chosen.
    pub fn spend(&mut self) {
        let row = self.rows.pop_front();
        self.looked_at +=
            u32::from(row.as_ref().is_some_and(|row| matches!(row.logits, BaseLogits::List(..))));
        self.is_row_wanted = false;
    }

    /// They followed a draft that was wrong.
    pub fn clear(&mut self) {
        self.rows.clear();
    }

    /// The list of the next token decides nothing, and here is its row.
    pub fn replace_next(&mut self, row: LogitsRow) {
        if let Some(next) = self.rows.front_mut() {
            next.logits = BaseLogits::Row(row);
            self.looked_at += 1;
            self.failed += 1;
        }
    }

    /// The list of the next token decides nothing, and its row is gone: what there is makes way for whole rows.
    pub fn want_row(&mut self) {
        self.clear();
        self.is_row_wanted = true;
        self.looked_at += 1;
        self.failed += 1;
    }

    /// Whether lists are worth trying for the next token.
    pub fn suit_lists(&self) -> bool {
        !self.is_row_wanted && self.failed * FAILED_SHARE <= self.looked_at + FAILED_SHARE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> Logits {
        Logits::List(TopList::default(), 0)
    }

    fn row() -> LogitsRow {
        vec![0.0].into()
    }

    #[test]
    fn an_answer_whose_lists_fail_too_often_gets_rows() {
        let mut rows = BaseRows::default();
        let mut repeated = 0;
        for token in 0..100 {
            rows.push(if rows.suit_lists() { list() } else { Logits::Row(row()) });
            // Every list fails.
            if matches!(rows.next().map(|row| &row.logits), Some(BaseLogits::List(..))) {
                repeated += 1;
                rows.want_row();
                assert!(!rows.suit_lists() && rows.next().is_none(), "token {token}");
                rows.push(Logits::Row(row()));
            }
            rows.spend();
        }
        assert_eq!(repeated, 2);
    }

    #[test]
    fn a_failure_now_and_then_changes_only_its_own_token() {
        let mut rows = BaseRows::default();
        for token in 0..1000 {
            assert!(rows.suit_lists(), "token {token}");
            rows.push(list());
            match token % 20 {
                6 => rows.replace_next(row()),
                19 => {
                    rows.want_row();
                    rows.push(Logits::Row(row()));
                }
                _ => {}
            }
            rows.spend();
        }
    }
}
