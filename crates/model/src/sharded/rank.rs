//! What computes one rank's part of a sharded model, on whatever device.

use std::fmt;

use uniarm_collective::Collective;

use crate::config::Config;
use crate::division::Part;
use crate::error::ModelError;
use crate::forward::{Forward, Row};
use crate::likeliest::{Likeliest, Lists, Ranking};

/// A [`Forward`] over one rank's part of the weights. It computes once it has joined a group, and then with all of its ranks:
/// each prepares and computes the same rows.
pub trait RankForward: Forward {
    fn terms(&self) -> Terms<'_>;

    /// Of the whole model.
    fn config(&self) -> &Config;

    /// Bytes of its part of the matrices.
    fn weight_bytes(&self) -> usize;

    /// Bytes of its part of a cache block.
    fn block_bytes(&self) -> usize;

    /// Whether it can hand over lists in place of rows.
    fn makes_lists(&self) -> bool {
        false
    }

    /// Takes the way to the other ranks; the former one is gone. `ranking`: how lists are made, if they may be wanted.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] for a group over which it cannot compute; [`ModelError::Group`] when it fails meanwhile.
    fn join(&mut self, group: Box<dyn Collective>, ranking: Option<Ranking>) -> Result<(), ModelError>;

    fn leave(&mut self);

    fn group(&mut self) -> Option<&mut dyn Collective>;

    /// Checks rows and lays them out.
    ///
    /// # Errors
    /// [`ModelError::Invalid`], as of [`Forward::forward`].
    fn prepare(&mut self, rows: &[Row<'_>]) -> Result<(), ModelError>;

    /// Computes prepared rows; `wanted` as in [`Forward::forward_listed`], or empty where all logits are wanted whole. At
    /// rank 0 `logits` becomes (positions wanted whole, vocabulary), and `lists` has the others; elsewhere both become empty.
    ///
    /// # Errors
    /// [`ModelError::Group`] when another rank is lost; [`ModelError::Device`] when the device fails, which ends the group.
    fn compute(
        &mut self,
        rows: (&[Row<'_>], &[Option<Likeliest>]),
        found: (&mut Vec<f32>, &mut Lists),
    ) -> Result<(), ModelError>;

    /// Whether the rows behind the lists of these numbers are kept ([`Lists::first`]); so at all ranks, or at none.
    fn keeps(&self, numbers: &[u64]) -> bool {
        let _ = numbers;
        false
    }

    /// Hands over rows that are kept. At rank 0 `logits` becomes (numbers, vocabulary); elsewhere it becomes
    /// empty. Returns how many bytes came here.
    ///
    /// # Errors
    /// [`ModelError::Group`] when another rank is lost.
    fn hand_over(&mut self, numbers: &[u64], logits: &mut Vec<f32>) -> Result<usize, ModelError> {
        self.listed_rows(numbers, logits)
    }
}

/// What all ranks of a group have the same of, but for the rank's number.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// [`ModelFiles::fingerprint`](crate::ModelFiles::fingerprint) of the weights.
    pub fingerprint: &'a [u8; 32],
    pub part: Part,
    pub arithmetic: Arithmetic,
}

/// Where a rank computes and in what: each has other bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Arithmetic {
    Cpu,
    GpuBf16,
    GpuF32,
}

impl Arithmetic {
    /// `None` for the number of none.
    pub(super) fn from_number(number: u32) -> Option<Self> {
        [Self::Cpu, Self::GpuBf16, Self::GpuF32].into_iter().find(|one| *one as u32 == number)
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Cpu => "on a CPU",
            Self::GpuBf16 => "on a GPU with weights of bf16",
            Self::GpuF32 => "on a GPU with weights of f32",
        })
    }
}
