//! What the ranks of a sharded model hand each other within a step: columns of activations, rows of embeddings, logits.
//!
//! A model that is not sharded is a rank without others: what it computes goes where it belongs, and nothing is copied.

use std::ops::Range;

use uniarm_collective::{Collective, CollectiveError};

use super::matrix::Matrix;
use crate::config::Config;
use crate::division::{Division, Linear};
use crate::error::ModelError;
use crate::kernels::buffer::Buffer;

/// The way from one rank to the others.
#[derive(Default)]
pub(super) struct Exchange {
    /// None: there are no others.
    peers: Option<Peers>,
}

struct Peers {
    group: Box<dyn Collective>,
    /// By rank.
    divisions: Vec<Division>,
    /// What this rank computed: (rows, own columns)
    part: Buffer,
    /// The parts of all ranks, one after the other.
    parts: Buffer,
    counts: Vec<usize>,
}

/// What the columns of a matrix are, and with that whose they are.
#[derive(Clone, Copy)]
pub(super) enum Columns {
    Queries,
    Hidden,
    Intermediate,
    Vocabulary,
}

impl Exchange {
    pub fn with(group: Box<dyn Collective>, config: &Config) -> Result<Self, ModelError> {
        let size = group.size();
        let divisions: Result<Vec<Division>, ModelError> =
            (0..size).map(|rank| Division::new(config, rank, size)).collect();
        let (part, parts) = (Buffer::new(), Buffer::new());
        Ok(Self { peers: Some(Peers { group, divisions: divisions?, part, parts, counts: Vec::new() }) })
    }

    pub fn group(&mut self) -> Option<&mut dyn Collective> {
        match &mut self.peers {
            Some(peers) => Some(&mut *peers.group),
            None => None,
        }
    }

    /// Whether somebody wants this rank's logits of the whole vocabulary.
    pub fn leads(&self) -> bool {
        self.peers.as_ref().is_none_or(|peers| peers.group.rank() == 0)
    }

    /// Where this rank's columns of `rows` rows go, until they are gathered into `whole`: (rows, all columns).
    pub fn target(&mut self, columns: Columns, rows: usize, (whole, width): (&mut Buffer, usize)) -> Matrix {
        match &mut self.peers {
            None => Matrix::new(whole, width),
            Some(peers) => peers.target(columns, rows),
        }
    }

    /// `whole`, (rows, all columns), becomes what all ranks have in their targets.
    pub fn gather(
        &mut self,
        columns: Columns,
        rows: usize,
        whole: &mut [f32],
    ) -> Result<(), CollectiveError> {
        match &mut self.peers {
            None => Ok(()),
            Some(peers) => peers.gather(columns, rows, whole),
        }
    }

    /// Where logits of this rank go, until they are collected.
    pub fn logits(&mut self, rows: usize, whole: &mut [f32], width: usize) -> Matrix {
        match &mut self.peers {
            None => Matrix::over(whole, width),
            Some(peers) => peers.target(Columns::Vocabulary, rows),
        }
    }

    /// As [`Exchange::gather`], at the leader alone.
    pub fn collect(
        &mut self,
        columns: Columns,
        rows: usize,
        whole: &mut [f32],
    ) -> Result<(), CollectiveError> {
        match &mut self.peers {
            None => Ok(()),
            Some(peers) => peers.collect(columns, rows, whole),
        }
    }

    /// Writes the embedding of each token, (hidden), from the rank that has it: `embed` writes one of this rank's.
    pub fn embed(
        &mut self,
        tokens: impl Iterator<Item = u32> + Clone,
        (residual, hidden): (&mut [f32], usize),
        embed: impl Fn(u32, &mut [f32]),
    ) -> Result<(), CollectiveError> {
        match &mut self.peers {
            None => {
                tokens.zip(residual.chunks_exact_mut(hidden)).for_each(|(token, row)| embed(token, row));
                Ok(())
            }
            Some(peers) => peers.embed(tokens, (residual, hidden), embed),
        }
    }
}

impl Peers {
    fn target(&mut self, columns: Columns, rows: usize) -> Matrix {
        let own = columns.of(&self.divisions[self.group.rank()]).len();
        self.part.reserve(rows * own);
        Matrix::new(&mut self.part, own)
    }

    fn gather(&mut self, columns: Columns, rows: usize, whole: &mut [f32]) -> Result<(), CollectiveError> {
        let Self { group, divisions, part, parts, counts } = self;
        counts.clear();
        counts.extend(divisions.iter().map(|division| rows * columns.of(division).len()));
        let part = &part[..counts[group.rank()]];
        if rows == 1 {
            return group.all_gather_parts(part, counts, whole);
        }
        parts.reserve(whole.len());
        let parts = &mut parts[..whole.len()];
        group.all_gather_parts(part, counts, parts)?;
        let (mut rest, width) = (&*parts, whole.len() / rows);
        for (division, count) in divisions.iter().zip(counts) {
            place(rest.split_off(..*count).expect("a part of each rank"), columns.of(division), whole, width);
        }
        Ok(())
    }

    fn collect(&mut self, columns: Columns, rows: usize, whole: &mut [f32]) -> Result<(), CollectiveError> {
        let Self { group, divisions, part, parts, .. } = self;
        let own = columns.of(&divisions[group.rank()]);
        let part = &part[..rows * own.len()];
        if group.rank() > 0 {
            return group.send(0, part);
        }
        let width = whole.len() / rows;
        place(part, own, whole, width);
        for (rank, division) in divisions.iter().enumerate().skip(1) {
            let range = columns.of(division);
            if rows == 1 {
                group.recv(rank, &mut whole[range])?;
                continue;
            }
            parts.reserve(rows * range.len());
            let part = &mut parts[..rows * range.len()];
            group.recv(rank, part)?;
            place(part, range, whole, width);
        }
        Ok(())
    }

    fn embed(
        &mut self,
        tokens: impl Iterator<Item = u32> + Clone,
        (residual, hidden): (&mut [f32], usize),
        embed: impl Fn(u32, &mut [f32]),
    ) -> Result<(), CollectiveError> {
        let Self { group, divisions, part, parts, counts } = self;
        let owner = |token: u32| {
            let has = |division: &Division| division.vocabulary.contains(&(token as usize));
            divisions.iter().position(has).expect("tokens are of the vocabulary")
        };
        counts.clear();
        counts.resize(divisions.len(), 0);
        tokens.clone().for_each(|token| counts[owner(token)] += hidden);
        let own = counts[group.rank()];
        part.reserve(own);
        let rows = part[..own].chunks_exact_mut(hidden);
        tokens
            .clone()
            .filter(|token| owner(*token) == group.rank())
            .zip(rows)
            .for_each(|(t, row)| embed(t, row));
        let count: usize = counts.iter().sum();
        parts.reserve(count);
        group.all_gather_parts(&part[..own], counts, &mut parts[..count])?;
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
}

impl Columns {
    fn of(self, division: &Division) -> Range<usize> {
        match self {
            Self::Queries => division.outputs(Linear::Query).rows,
            Self::Hidden => division.outputs(Linear::Output).rows,
            Self::Intermediate => division.outputs(Linear::Gate).rows,
            Self::Vocabulary => division.vocabulary.clone(),
        }
    }
}

/// Copies `part`, (rows, columns.len()), into these columns of `whole`, (rows, width).
fn place(part: &[f32], columns: Range<usize>, whole: &mut [f32], width: usize) {
    for (row, part) in whole.chunks_exact_mut(width).zip(part.chunks_exact(columns.len())) {
        row[columns.clone()].copy_from_slice(part);
    }
}
