//! Lists in place of rows, between the ranks of the last stage and rank 0: each rank lists its own slice of the vocabulary, and
//! the best of all slices are the list of the row.
//!
//! All ranks know what is wanted, so that messages have lengths that nobody has to say. A list travels as the number of its
//! tokens and room for as many as were wanted: place, id and logit of each, as words of 32 bits.

use std::ops::Range;

use crate::error::ModelError;
use crate::forward::Row;
use crate::kernels::buffer::Buffer;
use crate::likeliest::{Candidate, Likeliest, Lists, Ranking};

/// Rows behind lists that a rank keeps, the latest ones: a token is decided when the rewards have spoken, some steps later.
const KEPT: usize = 256;

/// Words of a token of a list.
const TOKEN_WORDS: usize = 3;

#[derive(Default)]
pub(super) struct Listing {
    ranking: Option<Ranking>,
    /// Of each wanted position of the step, whether a list of it is, and which.
    wanted: Vec<Option<Likeliest>>,
    /// The number of the step's first list, of all lists since the group began.
    first: u64,
    /// Of the last stage, this rank's logits behind lists, each at its number modulo [`KEPT`]: (KEPT, own columns)
    kept: Buffer,
    /// Workspace: a list of this rank.
    candidates: Vec<Candidate>,
    /// This rank's lists.
    pub own: Vec<u32>,
    /// At rank 0: the lists of all ranks, one rank after the other.
    pub all: Vec<u32>,
}

// === impl Listing ===

impl Listing {
    pub fn new(ranking: Option<Ranking>) -> Self {
        Self { ranking, ..Self::default() }
    }

    /// Notes what a step wants of each position. `wanted` has an entry for each row, or none at all.
    pub fn begin(&mut self, rows: &[Row<'_>], wanted: &[Option<Likeliest>]) {
        self.first += self.lists() as u64;
        self.wanted.clear();
        for (index, row) in rows.iter().enumerate() {
            let list = wanted.get(index).copied().flatten();
            self.wanted.extend((0..row.wanted()).map(|offset| list.map(|list| list.later(offset))));
        }
    }

    pub fn positions(&self) -> usize {
        self.wanted.len()
    }

    pub fn lists(&self) -> usize {
        self.wanted.iter().flatten().count()
    }

    /// Words of the lists of a rank that has so many tokens of the vocabulary.
    pub fn words(&self, tokens: usize) -> usize {
        self.wanted.iter().flatten().map(|list| 1 + TOKEN_WORDS * list.count.min(tokens)).sum()
    }

    /// The positions whose whole rows are wanted.
    pub fn whole(&self) -> Vec<usize> {
        (0..).zip(&self.wanted).filter(|(_, list)| list.is_none()).map(|(position, _)| position).collect()
    }

    /// The number of the step's first list.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Whether the row behind the list of this number is kept.
    pub fn keeps(&self, number: u64) -> bool {
        let end = self.first + self.lists() as u64;
        (end.saturating_sub(KEPT as u64)..end).contains(&number)
    }

    /// This rank's part of a row that is kept.
    pub fn kept(&self, number: u64, columns: usize) -> &[f32] {
        &self.kept[slot(number) * columns..][..columns]
    }

    /// Makes this rank's lists out of its logits, (positions, slice.len()).
    ///
    /// # Errors
    /// [`ModelError::Invalid`] if this rank was given no ranking.
    pub fn make(&mut self, scores: &[f32], slice: Range<usize>) -> Result<(), ModelError> {
        let Self { ranking, wanted, first, kept, candidates, own, .. } = self;
        let Some(ranking) = ranking else {
            let reason = "rank 0 wants lists, and this rank was not told how to make them".to_owned();
            return Err(ModelError::Invalid { field: "ranking", reason });
        };
        own.clear();
        kept.reserve(KEPT * slice.len());
        let listed = wanted.iter().zip(scores.chunks_exact(slice.len()));
        let listed = listed.filter_map(|(wanted, row)| Some((wanted.as_ref()?, row)));
        for ((wanted, row), number) in listed.zip(*first..) {
            kept[slot(number) * slice.len()..][..slice.len()].copy_from_slice(row);
            candidates.clear();
            ranking(wanted, (row, slice.start as u32), candidates);
            candidates.truncate(wanted.count.min(slice.len()));
            let end = own.len() + 1 + TOKEN_WORDS * wanted.count.min(slice.len());
            own.push(candidates.len() as u32);
            let words = |token: &Candidate| [token.rank.to_bits(), token.id, token.logit.to_bits()];
            own.extend(candidates.iter().flat_map(words));
            own.resize(end, 0);
        }
        Ok(())
    }

    /// At rank 0: the lists of whole rows, from those of all ranks, which have so many tokens each.
    pub fn merge(&self, tokens: impl Iterator<Item = usize> + Clone, lists: &mut Lists) {
        let vocabulary: usize = tokens.clone().sum();
        let mut start = 0;
        let mut ranks: Vec<(usize, &[u32])> = tokens
            .map(|tokens| {
                let words = self.words(tokens);
                start += words;
                (tokens, &self.all[start - words..start])
            })
            .collect();
        for wanted in self.wanted.iter().flatten() {
            let slices = ranks.iter_mut().flat_map(|(tokens, words)| {
                let room = TOKEN_WORDS * wanted.count.min(*tokens);
                let list = words.split_off(..1 + room).expect("as many words as are wanted");
                let listed = list[1..].as_chunks::<TOKEN_WORDS>().0.iter().take(list[0] as usize);
                listed.map(|&[rank, id, logit]| Candidate {
                    rank: f32::from_bits(rank),
                    id,
                    logit: f32::from_bits(logit),
                })
            });
            lists.push(wanted, vocabulary, slices);
        }
    }
}

/// Where a row is kept.
fn slot(number: u64) -> usize {
    (number % KEPT as u64) as usize
}
