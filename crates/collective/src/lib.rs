//! Sums, gathers and messages between the ranks of a group, each a thread or a process of its own.
//!
//! A call is synchronous and ends: with the result, or with an error within the group's timeout, or as soon as a peer is
//! lost or somebody aborts. After an error nothing can be said of what the others hold, so the group is over: each later
//! call returns the same error, and whoever wants to go on forms a group of a later epoch.
//!
//! **Sums are taken in the order of ranks**, ((x₀ + x₁) + x₂) + …, in f32, whatever carries them: every rank has the same
//! bits, and [`Tcp`] and [`Nccl`] the bits of [`Local`]. A ring, which starts each chunk's sum at another rank, would not.
//!
//! With [`Payload::Bf16`] every number is rounded to bf16 before it travels and every sum after it, for its owner too: half
//! the bytes, and still the same bits on all ranks.

mod arguments;
mod error;
mod exchange;
mod faulty;
mod frame;
mod local;
mod nccl;
mod on_device;
mod pairs;
mod payload;
mod ranks;
mod tcp;
mod wire;

use std::{ops::Range, sync::Arc, time::Duration};

pub use error::{CollectiveError, Operation};
pub use faulty::{Fault, Faulty, Rates, Schedule};
pub use local::Local;
pub use nccl::{Nccl, NcclId};
pub use on_device::{OnDevice, Parcel};
pub use payload::Payload;
pub use ranks::Ranks;
pub use tcp::Tcp;
pub use wire::{Bare, Wire, Wires};

/// Ranks of one group. Over TCP each holds a connection to each other one, and looks at all of them while it waits.
pub const RANKS_MAX: usize = 64;

/// What the ranks of a group agree on before the first call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub size: usize,
    /// Which life of the group this is: messages and members of another one are refused.
    pub epoch: u64,
    pub payload: Payload,
    /// Any call that takes longer fails. Longer than the slowest rank may compute between two calls.
    pub timeout: Duration,
}

/// One rank's part in a group. All ranks make the same calls in the same order, with the same lengths; `send` and `recv`
/// in pairs. What a buffer holds after an error is undefined.
pub trait Collective: Send {
    fn rank(&self) -> usize;

    fn size(&self) -> usize;

    fn epoch(&self) -> u64;

    /// What ends a call of this rank from another thread.
    fn aborter(&self) -> Aborter;

    /// Every rank's `values` become the sum over all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`], as for all calls: a peer that is lost, late, or calls something else.
    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// `all` becomes the values of rank 0, those of rank 1, …; as many times the length of `own` as there are ranks.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        let counts = vec![own.len(); self.size()];
        self.all_gather_parts(own, &counts, all)
    }

    /// As [`Collective::all_gather`], where rank r brings `counts[r]` numbers; all ranks name the same counts.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_gather_parts(
        &mut self,
        own: &[f32],
        counts: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.all_gather_among(0..self.size(), own, counts, all)
    }

    /// As [`Collective::all_gather_parts`] among the ranks of `members` alone, of which this is one, with a count for each
    /// of them. The other ranks do not hear of it, and may be at any other call.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_gather_among(
        &mut self,
        members: Range<usize>,
        own: &[f32],
        counts: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError>;

    /// `own` becomes this rank's part of the sum over all ranks: `values` are the parts for rank 0, rank 1, …
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn reduce_scatter_sum(&mut self, values: &[f32], own: &mut [f32]) -> Result<(), CollectiveError>;

    /// Every rank's `values` become those of `root`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// To one rank, which receives as many. May return before it does, or wait until it does.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn send(&mut self, to: usize, values: &[f32]) -> Result<(), CollectiveError>;

    /// From one rank, which sends as many.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn recv(&mut self, from: usize, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Ways between the devices of ranks, where the group has any.
    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        None
    }
}

/// Ends the calls of one rank, now and later, from any thread. Its peers see it as lost.
#[derive(Clone)]
pub struct Aborter(Arc<dyn Fn(&str) + Send + Sync>);

// === impl Aborter ===

impl Aborter {
    pub fn abort(&self, reason: &str) {
        (self.0)(reason);
    }
}
