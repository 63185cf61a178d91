//! Transfers between the devices of ranks, without a way over the host.

use std::ffi::c_void;

use crate::CollectiveError;

/// A stretch of this rank's device memory, on its way to another rank or from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parcel {
    pub peer: usize,
    pub address: u64,
    /// At least one.
    pub bytes: usize,
}

/// What a group can do besides whose ranks have a device each, and a way between these. Nothing of it has a header: the ranks
/// know from elsewhere that all of them transfer the same. A failure is one of the group, which is over then.
pub trait OnDevice {
    /// Puts transfers behind what is on `stream`, all as one, and returns when they are on it: whatever the stream gets next
    /// finds what was received. At most one parcel each way for each peer.
    ///
    /// # Errors
    /// As all calls of a group.
    ///
    /// # Safety
    /// The stream is one of this rank's device, in its primary context. What is sent and received is memory of that device, of
    /// so many bytes, which stays until [`OnDevice::drain`] has returned well, or whatever happened, until the stream is idle.
    /// Ranks that are threads of one process have it from outside of memory pools: NCCL lets them read each other's.
    unsafe fn transfer(
        &mut self,
        stream: *mut c_void,
        outgoing: &[Parcel],
        incoming: &[Parcel],
    ) -> Result<(), CollectiveError>;

    /// Returns when all that is on `stream` is done. Waiting for it in any other way would have no end where a peer is lost.
    ///
    /// # Errors
    /// As all calls of a group: also when the stream is not done within the group's timeout.
    ///
    /// # Safety
    /// The stream is one of this rank's device, in its primary context.
    unsafe fn drain(&mut self, stream: *mut c_void) -> Result<(), CollectiveError>;
}
