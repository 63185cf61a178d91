//! What the ranks of a sharded model hand each other within a step: columns of activations, rows of embeddings, logits;
//! and one stage to the next.
//!
//! A model that is not sharded is a rank without others: what it computes goes where it belongs, and nothing is copied.

use std::ops::Range;

use uniarm_collective::{Collective, CollectiveError};

use super::listing::Lister;
use super::matrix::Matrix;
use crate::config::Config;
use crate::division::{Columns, Division, Part};
use crate::error::ModelError;
use crate::forward::Row;
use crate::kernels::buffer::Buffer;
use crate::likeliest::{Likeliest, Lists, Ranking};
use crate::listing::Listing;

/// The way from one rank to the others.
#[derive(Default)]
pub(super) struct Exchange {
    /// None: there are no others.
    peers: Option<Peers>,
}

struct Peers {
    group: Box<dyn Collective>,
    part: Part,
    /// Of the layers of a stage, by place.
    divisions: Vec<Division>,
    /// What this rank computed: (rows, own columns)
    own: Buffer,
    /// The parts of all ranks of the stage, one after the other.
    parts: Buffer,
    counts: Vec<usize>,
    /// Of the last stage, this rank's logits of the step: (wanted, own columns)
    scores: Buffer,
    /// Those of them that are handed over, where not all are.
    chosen: Buffer,
    listing: Listing,
    lister: Lister,
}

impl Exchange {
    /// `ranking`: how lists are made, if they may be wanted.
    pub fn with(
        group: Box<dyn Collective>,
        (part, ranking): (Part, Option<Ranking>),
        config: &Config,
    ) -> Result<Self, ModelError> {
        let divisions = Division::of_stage(config, part)?;
        let [own, parts, scores, chosen] = [(); 4].map(|()| Buffer::new());
        let (counts, listing, lister) = (Vec::new(), Listing::default(), Lister::new(ranking));
        Ok(Self {
            peers: Some(Peers {
                group,
                part,
                divisions,
                own,
                parts,
                counts,
                scores,
                chosen,
                listing,
                lister,
            }),
        })
    }

    pub fn group(&mut self) -> Option<&mut dyn Collective> {
        match &mut self.peers {
            Some(peers) => Some(&mut *peers.group),
            None => None,
        }
    }

    /// The others of this rank's stage, if there are any.
    fn fellows(&mut self) -> Option<&mut Peers> {
        self.peers.as_mut().filter(|peers| peers.divisions.len() > 1)
    }

    /// Where this rank's columns of `rows` rows go, until they are gathered into `whole`: (rows, all columns).
    pub fn target(&mut self, columns: Columns, rows: usize, (whole, width): (&mut Buffer, usize)) -> Matrix {
        match self.fellows() {
            None => Matrix::new(whole, width),
            Some(peers) => peers.target(columns, rows),
        }
    }

    /// `whole`, (rows, all columns), becomes what all ranks of the stage have in their targets.
    pub fn gather(
        &mut self,
        columns: Columns,
        rows: usize,
        whole: &mut [f32],
    ) -> Result<(), CollectiveError> {
        match self.fellows() {
            None => Ok(()),
            Some(peers) => peers.gather(columns, rows, whole),
        }
    }

    /// Makes room for the logits of a step, of which `wanted` says which may come as lists (see [`Llama::compute`]); returns
    /// how many whole rows come here in the end.
    ///
    /// [`Llama::compute`]: super::Llama::compute
    pub fn begin(&mut self, rows: &[Row<'_>], wanted: &[Option<Likeliest>]) -> usize {
        match &mut self.peers {
            None => rows.iter().map(Row::wanted).sum(),
            Some(peers) => peers.begin(rows, wanted),
        }
    }

    /// Where logits of this rank go, from the step's `first` on, until they are collected.
    pub fn logits(&mut self, first: usize, whole: &mut [f32], width: usize) -> Matrix {
        match &mut self.peers {
            None => Matrix::over(&mut whole[first * width..], width),
            Some(peers) => {
                let own = peers.division().columns(Columns::Vocabulary).len();
                Matrix::over(&mut peers.scores[first * own..], own)
            }
        }
    }

    /// At the leader, `whole` becomes the logits of all ranks of the last stage, (rows, vocabulary), and `lists` what was
    /// wanted in place of rows. These hand them over when the whole step is computed: before, the leader might still be
    /// handing something to them.
    pub fn collect(
        &mut self,
        (whole, vocabulary): (&mut [f32], usize),
        lists: &mut Lists,
    ) -> Result<(), ModelError> {
        match &mut self.peers {
            Some(peers) => peers.collect((whole, vocabulary), lists),
            None => Ok(()),
        }
    }

    /// Whether the rows behind the lists of these numbers are kept.
    pub fn keeps(&self, numbers: &[u64]) -> bool {
        let of = |peers: &Peers| numbers.iter().all(|number| peers.listing.keeps(*number));
        self.peers.as_ref().is_some_and(of)
    }

    /// At the leader, `whole` becomes the rows behind lists that are kept, (numbers, vocabulary). Returns how many bytes have
    /// come from others.
    pub fn collect_kept(
        &mut self,
        numbers: &[u64],
        (whole, vocabulary): (&mut [f32], usize),
    ) -> Result<usize, CollectiveError> {
        self.peers.as_mut().map_or(Ok(0), |peers| {
            peers.choose(numbers.len(), |peers, index, own| peers.lister.kept(numbers[index], own));
            peers.collect_rows((numbers.len(), vocabulary), whole)
        })
    }

    /// Writes the embedding of each token, (hidden), from the rank that has it: `embed` writes one of this rank's.
    pub fn embed(
        &mut self,
        tokens: impl Iterator<Item = u32> + Clone,
        (residual, hidden): (&mut [f32], usize),
        embed: impl Fn(u32, &mut [f32]),
    ) -> Result<(), CollectiveError> {
        match self.fellows() {
            None => {
                tokens.zip(residual.chunks_exact_mut(hidden)).for_each(|(token, row)| embed(token, row));
                Ok(())
            }
            Some(peers) => peers.embed(tokens, (residual, hidden), embed),
        }
    }

    /// Hands `residual`, (rows, hidden), to the next stage.
    pub fn pass_on(&mut self, rows: usize, residual: &[f32]) -> Result<(), CollectiveError> {
        self.peers.as_mut().map_or(Ok(()), |peers| peers.pass_on(rows, residual))
    }

    /// `residual`, (rows, hidden), becomes that of the stage before.
    pub fn take_over(&mut self, rows: usize, residual: &mut [f32]) -> Result<(), CollectiveError> {
        self.peers.as_mut().map_or(Ok(()), |peers| peers.take_over(rows, residual))
    }
}

impl Peers {
    fn division(&self) -> &Division {
        &self.divisions[self.part.place()]
    }

    fn target(&mut self, columns: Columns, rows: usize) -> Matrix {
        let own = self.division().columns(columns).len();
        self.own.reserve(rows * own);
        Matrix::new(&mut self.own, own)
    }

    fn gather(&mut self, columns: Columns, rows: usize, whole: &mut [f32]) -> Result<(), CollectiveError> {
        let Self { group, part, divisions, own, parts, counts, .. } = self;
        counts.clear();
        counts.extend(divisions.iter().map(|division| rows * division.columns(columns).len()));
        let own = &own[..counts[part.place()]];
        if rows == 1 {
            return group.all_gather_among(part.members(), own, counts, whole);
        }
        parts.reserve(whole.len());
        let parts = &mut parts[..whole.len()];
        group.all_gather_among(part.members(), own, counts, parts)?;
        let (mut rest, width) = (&*parts, whole.len() / rows);
        for (division, count) in divisions.iter().zip(counts) {
            place(
                rest.split_off(..*count).expect("a part of each rank"),
                division.columns(columns),
                whole,
                width,
            );
        }
        Ok(())
    }

    fn begin(&mut self, rows: &[Row<'_>], wanted: &[Option<Likeliest>]) -> usize {
        self.listing.begin(rows, wanted);
        let positions = self.listing.positions();
        if self.part.is_last_stage() {
            let own = self.division().columns(Columns::Vocabulary).len();
            self.scores.reserve(positions * own);
        }
        if self.part.rank == 0 { positions - self.listing.lists() } else { 0 }
    }

    fn collect(
        &mut self,
        (whole, vocabulary): (&mut [f32], usize),
        lists: &mut Lists,
    ) -> Result<(), ModelError> {
        let (positions, listed) = (self.listing.positions(), self.listing.lists());
        if listed > 0 && self.part.is_last_stage() {
            let slice = self.division().columns(Columns::Vocabulary);
            self.lister.make(&self.listing, &self.scores[..positions * slice.len()], slice)?;
        }
        if positions > listed {
            match listed {
                0 => std::mem::swap(&mut self.scores, &mut self.chosen),
                _ => {
                    let whole: Vec<usize> = self.listing.whole().collect();
                    self.choose(whole.len(), |peers, index, own| &peers.scores[whole[index] * own..][..own]);
                }
            }
            let received = self.collect_rows((positions - listed, vocabulary), whole)?;
            lists.gathered_bytes += received;
        }
        if listed > 0 {
            let Self { group, part, divisions, listing, lister, .. } = self;
            let tokens = divisions.iter().map(|division| division.columns(Columns::Vocabulary).len());
            let received = listing.collect((Some(&mut **group), *part), tokens, &lister.own, lists)?;
            lists.gathered_bytes += received;
        }
        Ok(())
    }

    /// Takes the rows that are handed over next, each of so many columns of this rank, from where `row` says.
    fn choose(&mut self, rows: usize, row: impl Fn(&Self, usize, usize) -> &[f32]) {
        if self.part.is_last_stage() {
            let own = self.division().columns(Columns::Vocabulary).len();
            let mut chosen = std::mem::take(&mut self.chosen);
            chosen.reserve(rows * own);
            for (index, to) in chosen.chunks_exact_mut(own).take(rows).enumerate() {
                to.copy_from_slice(row(self, index, own));
            }
            self.chosen = chosen;
        }
    }

    /// Of the rows that are chosen. Returns how many bytes have come from others.
    fn collect_rows(
        &mut self,
        (rows, width): (usize, usize),
        whole: &mut [f32],
    ) -> Result<usize, CollectiveError> {
        let Self { group, part, divisions, chosen, parts, .. } = self;
        if part.rank > 0 {
            let own = divisions[part.place()].columns(Columns::Vocabulary).len();
            return if part.is_last_stage() {
                group.send(0, &chosen[..rows * own]).map(|()| 0)
            } else {
                Ok(0)
            };
        }
        let mut received = 0;
        for (rank, division) in part.last_members().zip(divisions) {
            let range = division.columns(Columns::Vocabulary);
            if rank == 0 {
                place(&chosen[..rows * range.len()], range, whole, width);
                continue;
            }
            received += rows * range.len() * size_of::<f32>();
            if rows == 1 {
                group.recv(rank, &mut whole[range])?;
            } else {
                parts.reserve(rows * range.len());
                let part = &mut parts[..rows * range.len()];
                group.recv(rank, part)?;
                place(part, range, whole, width);
            }
        }
        Ok(received)
    }

    fn embed(
        &mut self,
        tokens: impl Iterator<Item = u32> + Clone,
        (residual, hidden): (&mut [f32], usize),
        embed: impl Fn(u32, &mut [f32]),
    ) -> Result<(), CollectiveError> {
        let Self { group, part, divisions, own, parts, counts, .. } = self;
        let owner = |token: u32| {
            let has = |division: &Division| division.vocabulary.contains(&(token as usize));
            divisions.iter().position(has).expect("tokens are of the vocabulary")
        };
        counts.clear();
        counts.resize(divisions.len(), 0);
        tokens.clone().for_each(|token| counts[owner(token)] += hidden);
        let count = counts[part.place()];
        own.reserve(count);
        let rows = own[..count].chunks_exact_mut(hidden);
        tokens
            .clone()
            .filter(|token| owner(*token) == part.place())
            .zip(rows)
            .for_each(|(t, row)| embed(t, row));
        let all: usize = counts.iter().sum();
        parts.reserve(all);
        group.all_gather_among(part.members(), &own[..count], counts, &mut parts[..all])?;
        // Counts become where each rank's next row lies.
        let mut next = 0;
        for count in counts.iter_mut() {
            next += std::mem::replace(count, next);
        }
        for (token, row) in tokens.zip(residual.chunks_exact_mut(hidden)) {
            let at = &mut counts[owner(token)];
            row.copy_from_slice(&parts[*at..][..hidden]);
            *at += hidden;
        }
        Ok(())
    }

    /// Its columns, to the rank of its place in the next stage: between stages, where links are slow, nothing travels twice.
    fn pass_on(&mut self, rows: usize, residual: &[f32]) -> Result<(), CollectiveError> {
        let next = self.part.rank + self.part.ranks();
        if self.divisions.len() == 1 {
            return self.group.send(next, residual);
        }
        let columns = self.division().columns(Columns::Hidden);
        let Self { group, own, .. } = self;
        own.reserve(rows * columns.len());
        let own = &mut own[..rows * columns.len()];
        let whole = residual.chunks_exact(residual.len() / rows);
        for (own, row) in own.chunks_exact_mut(columns.len()).zip(whole) {
            own.copy_from_slice(&row[columns.clone()]);
        }
        group.send(next, own)
    }

    fn take_over(&mut self, rows: usize, residual: &mut [f32]) -> Result<(), CollectiveError> {
        let former = self.part.rank - self.part.ranks();
        if self.divisions.len() == 1 {
            return self.group.recv(former, residual);
        }
        let own = rows * self.division().columns(Columns::Hidden).len();
        self.own.reserve(own);
        self.group.recv(former, &mut self.own[..own])?;
        self.gather(Columns::Hidden, rows, residual)
    }
}

/// Copies `part`, (rows, columns.len()), into these columns of `whole`, (rows, width).
fn place(part: &[f32], columns: Range<usize>, whole: &mut [f32], width: usize) {
    for (row, part) in whole.chunks_exact_mut(width).zip(part.chunks_exact(columns.len())) {
        row[columns.clone()].copy_from_slice(part);
    }
}
