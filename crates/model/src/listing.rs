//! Which positions of a step come as lists, the numbers of these, and how ranks hand them over: each lists its own slice of the
//! vocabulary, and the best of all slices are the list of the row.
//!
//! All ranks know what is wanted, so that messages have lengths that nobody has to say. A list travels as the number of its
//! tokens and room for as many as were wanted: place, id and logit of each, as words of 32 bits.

use uniarm_collective::Collective;

use crate::division::Part;
use crate::error::ModelError;
use crate::forward::Row;
use crate::likeliest::{Candidate, Likeliest, Lists};

/// Words of a token of a list.
const TOKEN_WORDS: usize = 3;

/// A rank's view of the lists of its steps.
#[derive(Default)]
pub struct Listing {
    /// Of each wanted position of the step, whether a list of it is, and which.
    wanted: Vec<Option<Likeliest>>,
    /// The number of the step's first list, of all lists since the group began.
    first: u64,
    /// At rank 0: the lists of all ranks, one rank after the other.
    all: Vec<u32>,
}

// === impl Listing ===

impl Listing {
    /// Rows behind lists that a rank keeps, the latest ones: a token is decided when the rewards have spoken, some steps later.
    pub const KEPT: usize = 256;

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

    /// Of each wanted position, the list that it comes as; none: as a row.
    pub fn wanted(&self) -> &[Option<Likeliest>] {
        &self.wanted
    }

    pub fn lists(&self) -> usize {
        self.numbered().count()
    }

    /// The step's lists with their numbers, in the order of their positions.
    pub fn numbered(&self) -> impl Iterator<Item = (u64, &Likeliest)> {
        (self.first..).zip(self.wanted.iter().flatten())
    }

    /// The positions whose whole rows are wanted.
    pub fn whole(&self) -> impl Iterator<Item = usize> {
        (0..).zip(&self.wanted).filter(|(_, list)| list.is_none()).map(|(position, _)| position)
    }

    /// The positions that come as lists.
    pub fn listed(&self) -> impl Iterator<Item = usize> {
        (0..).zip(&self.wanted).filter(|(_, list)| list.is_some()).map(|(position, _)| position)
    }

    /// Whether the row behind the list of this number is kept.
    pub fn keeps(&self, number: u64) -> bool {
        let end = self.first + self.lists() as u64;
        (end.saturating_sub(Self::KEPT as u64)..end).contains(&number)
    }

    /// Where a row is kept, among [`Self::KEPT`].
    pub fn slot(number: u64) -> usize {
        (number % Self::KEPT as u64) as usize
    }

    /// Appends what a rank hands over of a list of its `tokens` tokens: the likeliest ones among them.
    pub fn write(wanted: &Likeliest, tokens: usize, list: &[Candidate], words: &mut Vec<u32>) {
        let room = wanted.count.min(tokens);
        let list = &list[..list.len().min(room)];
        let end = words.len() + 1 + TOKEN_WORDS * room;
        words.push(list.len() as u32);
        words.extend(list.iter().flat_map(|token| [token.rank.to_bits(), token.id, token.logit.to_bits()]));
        words.resize(end, 0);
    }

    /// Brings the lists of the ranks of the last stage to rank 0, where `lists` gets them. `own`: what this rank has written;
    /// `tokens`: how many tokens each of those ranks has. Without a group, this is the only rank. Returns how many bytes have
    /// come from others.
    ///
    /// # Errors
    /// [`ModelError::Group`] when another rank is lost.
    pub fn collect(
        &mut self,
        (group, part): (Option<&mut dyn Collective>, Part),
        tokens: impl Iterator<Item = usize> + Clone,
        own: &[u32],
        lists: &mut Lists,
    ) -> Result<usize, ModelError> {
        lists.first = self.first;
        let mut received = 0;
        self.all.clear();
        match group {
            Some(group) if part.rank > 0 => {
                if part.is_last_stage() {
                    group.send(0, bytemuck::cast_slice(own))?;
                }
                return Ok(0);
            }
            Some(group) => {
                for (rank, tokens) in part.last_members().zip(tokens.clone()) {
                    if rank == 0 {
                        self.all.extend_from_slice(own);
                        continue;
                    }
                    let start = self.all.len();
                    let words = self.words(tokens);
                    self.all.resize(start + words, 0);
                    group.recv(rank, bytemuck::cast_slice_mut(&mut self.all[start..]))?;
                    received += words * size_of::<u32>();
                }
            }
            None => self.all.extend_from_slice(own),
        }
        self.merge(tokens, lists);
        Ok(received)
    }

    /// Words of the lists of a rank that has so many tokens of the vocabulary.
    fn words(&self, tokens: usize) -> usize {
        self.wanted.iter().flatten().map(|list| 1 + TOKEN_WORDS * list.count.min(tokens)).sum()
    }

    /// The lists of whole rows, from those of all ranks, which have so many tokens each.
    fn merge(&self, tokens: impl Iterator<Item = usize> + Clone, lists: &mut Lists) {
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
