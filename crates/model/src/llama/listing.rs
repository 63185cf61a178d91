//! Lists in place of rows, made on the CPU, and the rows behind the latest of them.

use std::ops::Range;

use crate::error::ModelError;
use crate::kernels::buffer::Buffer;
use crate::likeliest::{Candidate, Ranking};
use crate::listing::Listing;

/// Of the last stage: what makes a rank's lists.
#[derive(Default)]
pub(super) struct Lister {
    ranking: Option<Ranking>,
    /// This rank's logits behind lists, each in its [`Listing::slot`]: (KEPT, own columns)
    kept: Buffer,
    /// Workspace: a list of this rank.
    candidates: Vec<Candidate>,
    /// This rank's lists, as [`Listing::write`] has them.
    pub own: Vec<u32>,
}

// === impl Lister ===

impl Lister {
    pub fn new(ranking: Option<Ranking>) -> Self {
        Self { ranking, ..Self::default() }
    }

    /// This rank's part of a row that is kept.
    pub fn kept(&self, number: u64, columns: usize) -> &[f32] {
        &self.kept[Listing::slot(number) * columns..][..columns]
    }

    /// Makes this rank's lists out of its logits, (positions, slice.len()).
    ///
    /// # Errors
    /// [`ModelError::Invalid`] if this rank was given no ranking.
    pub fn make(&mut self, listing: &Listing, scores: &[f32], slice: Range<usize>) -> Result<(), ModelError> {
        let Self { ranking, kept, candidates, own } = self;
        let Some(ranking) = ranking else {
            let reason = "rank 0 wants lists, and this rank was not told how to make them".to_owned();
            return Err(ModelError::Invalid { field: "ranking", reason });
        };
        own.clear();
        kept.reserve(Listing::KEPT * slice.len());
        for (position, (number, wanted)) in listing.listed().zip(listing.numbered()) {
            let row = &scores[position * slice.len()..][..slice.len()];
            kept[Listing::slot(number) * slice.len()..][..slice.len()].copy_from_slice(row);
            candidates.clear();
            ranking(wanted, (row, slice.start as u32), candidates);
            Listing::write(wanted, slice.len(), candidates, own);
        }
        Ok(())
    }
}
