//! Pairs laid end to end as rows of one forward pass: each prompt once, then both answers.
//!
//! ```text
//! sample 0: prompt | answer a | answer b     sample 1: prompt | answer a | answer b     …
//! ```
//!
//! Rows of an answer see the prompt and the answer up to themselves, never the other answer, and both answers begin
//! at the position where the prompt ends. An answer's last token is never an input: nothing is predicted from it.

use std::ops::Range;

use super::Sample;

/// One pass over several samples.
#[derive(Debug, PartialEq)]
pub struct Packed {
    /// One for each row.
    pub tokens: Vec<u32>,
    /// Rotary position of each row.
    pub positions: Vec<u32>,
    pub spans: Vec<Span>,
    /// Row that predicts, and what: each answer's tokens in order, a before b, sample by sample.
    pub predictions: Vec<(u32, u32)>,
}

/// Rows of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub first_row: usize,
    pub prompt: usize,
    /// Input rows of answers a and b: one fewer than their tokens.
    pub answers: [usize; 2],
}

// === impl Packed ===

impl Packed {
    pub fn of(samples: &[Sample<'_>]) -> Self {
        let mut packed =
            Self { tokens: Vec::new(), positions: Vec::new(), spans: Vec::new(), predictions: Vec::new() };
        for sample in samples {
            let prompt = &sample.pair.prompt;
            let first_row = packed.tokens.len();
            packed.lay(prompt, 0);
            let last_of_prompt = packed.tokens.len() - 1;
            for answer in &sample.pair.answers {
                let inputs = &answer[..answer.len() - 1];
                let first_input = packed.tokens.len();
                packed.lay(inputs, prompt.len());
                let rows = std::iter::once(last_of_prompt).chain(first_input..first_input + inputs.len());
                packed.predictions.extend(rows.zip(answer).map(|(row, token)| (row as u32, *token)));
            }
            let answers = [0, 1].map(|side: usize| sample.pair.answers[side].len() - 1);
            packed.spans.push(Span { first_row, prompt: prompt.len(), answers });
        }
        packed
    }

    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// For each row, the index of its sample.
    pub fn owners(&self) -> Vec<u32> {
        (0..).zip(&self.spans).flat_map(|(index, span)| std::iter::repeat_n(index, span.rows())).collect()
    }

    fn lay(&mut self, tokens: &[u32], position: usize) {
        self.tokens.extend(tokens);
        self.positions.extend((position as u32..).take(tokens.len()));
    }
}

// === impl Span ===

impl Span {
    pub fn rows(&self) -> usize {
        self.prompt + self.answers[0] + self.answers[1]
    }

    pub fn range(&self) -> Range<usize> {
        self.first_row..self.first_row + self.rows()
    }

    /// Whether row `query` of the sample sees its row `key`.
    pub fn sees(&self, query: usize, key: usize) -> bool {
        let second = self.prompt + self.answers[0];
        key <= query && (query < second || key < self.prompt || key >= second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{loss::Labels, network::TokenPair};

    #[test]
    fn answers_share_the_prompt_and_do_not_see_each_other() {
        let labels = Labels { signs: vec![], margins: vec![] };
        let pair = TokenPair { prompt: vec![1, 2], answers: [vec![3, 4], vec![5, 6, 7]], labels };
        let packed = Packed::of(&[Sample { pair: &pair, preference: &[], draw: 0 }]);
        assert_eq!(packed.tokens, [1, 2, 3, 5, 6]);
        assert_eq!(packed.positions, [0, 1, 2, 2, 3]);
        assert_eq!(packed.predictions, [(1, 3), (2, 4), (1, 5), (3, 6), (4, 7)]);
        let span = packed.spans[0];
        let seen: Vec<Vec<usize>> = (0..5).map(|q| (0..5).filter(|k| span.sees(q, *k)).collect()).collect();
        assert_eq!(seen, [vec![0], vec![0, 1], vec![0, 1, 2], vec![0, 1, 3], vec![0, 1, 3, 4]]);
    }
}
