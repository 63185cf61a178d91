//! What can go wrong between the ranks of a group.

use std::time::Duration;

/// The calls of a group, as messages and errors name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    AllReduce,
    AllGather,
    ReduceScatter,
    Broadcast,
    Send,
    Barrier,
}

/// A call that failed. Of one rank: its peers may see another side of the same event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// The call makes no sense; nobody heard of it, and the group goes on.
    #[error("{field} {reason}")]
    Invalid { field: &'static str, reason: String },
    #[error(
        "{operation}: rank {rank} did not come within {timeout:?}: it is stuck, or computes longer than the timeout of the group"
    )]
    Deadline { operation: Operation, rank: usize, timeout: Duration },
    #[error("{operation}: rank {rank} is gone ({reason})")]
    PeerLost { operation: Operation, rank: usize, reason: String },
    #[error("{operation}: rank {rank} {what}")]
    Mismatch { operation: Operation, rank: usize, what: String },
    #[error("aborted: {reason}")]
    Aborted { reason: String },
    /// This rank's own device, or a library that it needs.
    #[error("NCCL cannot be used: {reason}")]
    Device { reason: String },
    /// The group did not come to be.
    #[error("rank {rank} cannot join the group at {address}: {reason}")]
    Rendezvous { rank: usize, address: String, reason: String },
}

// === impl Operation ===

impl Operation {
    const ALL: [Self; 6] =
        [Self::AllReduce, Self::AllGather, Self::ReduceScatter, Self::Broadcast, Self::Send, Self::Barrier];

    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::AllReduce => "all-reduce",
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::Broadcast => "broadcast",
            Self::Send => "send and receive",
            Self::Barrier => "barrier",
        })
    }
}
