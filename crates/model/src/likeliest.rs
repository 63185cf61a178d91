//! Short lists in place of rows of logits: what the ranks of a model hand over where a few tokens are enough.
//!
//! How tokens are ranked is not this crate's business, and neither is what noise is: whoever wants lists brings a
//! [`Ranking`]. It sees slices of a row, one on each rank, and the best of all slices are the list of the row.

/// The tokens of a position that are wanted in place of its row: those with the largest scale · z + G.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likeliest {
    /// How many tokens. 0: the list is empty, and what is wanted is that the row behind it is kept.
    pub count: usize,
    /// Positive.
    pub scale: f32,
    /// Which G; `None`: tokens are ranked by z.
    pub noise: Option<NoiseAt>,
}

/// The noise of one position of one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseAt {
    pub seed: u64,
    pub choice: u32,
    pub position: u32,
}

/// A token of a list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its place: larger ones first, ties to the lower id. A finite number.
    pub rank: f32,
    pub id: u32,
    pub logit: f32,
}

/// Appends the likeliest tokens of a slice of a row, which holds the logits of the tokens from an id on; in any order, and
/// fewer than were wanted only where no others have a place.
pub type Ranking = fn(&Likeliest, (&[f32], u32), &mut Vec<Candidate>);

/// The lists that a forward hands over, in the order of the positions; reused.
#[derive(Debug, Default)]
pub struct Lists {
    candidates: Vec<Candidate>,
    /// Where each list ends.
    ends: Vec<usize>,
    /// The number of the first list, by which the row behind it is asked for; those of the others follow.
    pub first: u64,
    /// Bytes of rows and lists that came from other ranks.
    pub gathered_bytes: usize,
}

// === impl Likeliest ===

impl Likeliest {
    /// Nothing of the row, which stays where it is until it is asked for.
    pub const KEPT: Self = Self { count: 0, scale: 1.0, noise: None };

    /// The same for a later position.
    pub fn later(self, positions: usize) -> Self {
        let later = |at: NoiseAt| NoiseAt { position: at.position + positions as u32, ..at };
        Self { noise: self.noise.map(later), ..self }
    }
}

// === impl Lists ===

impl Lists {
    pub fn clear(&mut self) {
        self.candidates.clear();
        self.ends.clear();
        self.gathered_bytes = 0;
    }

    /// Appends the list of a row from those of its slices. Where it would be short of what was wanted of a row of
    /// `vocabulary` tokens, so that it says nothing of the others, it is empty.
    pub fn push(&mut self, wanted: &Likeliest, vocabulary: usize, slices: impl Iterator<Item = Candidate>) {
        let start = self.candidates.len();
        self.candidates.extend(slices);
        let list = &mut self.candidates[start..];
        // Zero has two signs and one place.
        let place = |token: &Candidate| token.rank + 0.0;
        list.sort_unstable_by(|a, b| place(b).total_cmp(&place(a)).then(a.id.cmp(&b.id)));
        let count = wanted.count.min(vocabulary);
        let kept = if list.len() < count { 0 } else { count };
        self.candidates.truncate(start + kept);
        self.ends.push(self.candidates.len());
    }

    /// Best first; each is empty or has as many tokens as were wanted.
    pub fn iter(&self) -> impl Iterator<Item = &[Candidate]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.candidates[start..*end])
    }
}
