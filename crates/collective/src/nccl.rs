//! Ranks that are processes (or threads) with a GPU each: NCCL moves the bytes, and the sums are those of [`crate::Local`],
//! bit for bit.
//!
//! **Why none of NCCL's own sums.** Its all-reduce adds in whatever order ring or tree give it, which changes with the
//! number of ranks, the length and the machine. So NCCL only carries (grouped sends and receives, which also take parts
//! of unequal lengths), and the sum is taken on the host, in the order of ranks, by the same code as over TCP. The trait
//! speaks of numbers in host memory, so each exchange copies from the host to the device and back; for a device's own
//! kernels that is a detour, and what a call saves over TCP is the network, not the copies.
//!
//! **Between devices** ([`OnDevice`](crate::OnDevice)) there is no such detour: transfers are put on the caller's own
//! stream, and are on it when the call returns, so that kernels which are launched next find what was received. Nothing
//! has a header there. The caller waits for its stream by [`OnDevice::drain`](crate::OnDevice::drain), which asks whether it
//! is done, as all calls here do: the driver's own wait has no end where a peer is gone.
//!
//! **What NCCL does not tell.** Two ranks that call different things, or of different lengths, wait for each other for ever,
//! or read what is none of theirs. So the first message between each two ranks has a fixed length: the header that messages
//! over TCP have, and the first 16 KiB of the numbers. A call that needs no more is one launch, as it would be without
//! headers; a longer one is two, of which the second is made only when the headers agree. A barrier moves 16 KiB to each
//! rank, too, which costs a link between GPUs about a microsecond and spares it a case of its own.
//!
//! **How a call ends.** The communicator is non-blocking: each call is polled, and its asynchronous error, until it is done,
//! somebody aborts, or the group's timeout is over; after any failure the communicator is aborted, once. NCCL often does
//! not notice that a peer is gone (over NVLink or shared memory never), and cannot say which one is late. A group made by
//! [`Nccl::connect`] keeps the connections over which its ranks met: a closed one is a lost peer, and when a call
//! has taken the whole timeout its ranks ask each other over them who is there, a quarter of a second more, so that the error
//! names the one that does not answer. A group made by [`Nccl::join`] has no such connections: then silence ends by the
//! timeout alone, and errors name the first rank that was waited for.
//!
//! One thread at a time calls a rank; an [`Aborter`](crate::Aborter) may be used from any. All of a communicator's functions are called
//! under one lock, so an abort never meets a call of NCCL's half-way. A rank leaves a group after a call that all ranks
//! take part in, such as a barrier.
//!
//! **libnccl is loaded by hand** (`nccl/library.rs`), not by cudarc: cudarc does not look for `libnccl.so.2`, which is
//! what a machine has that only runs NCCL; it panics where a library or a function is missing; and its feature `nccl` would have
//! whatever links CUDA directly (candle's feature `cuda`) link libnccl, too. Devices and memory are cudarc's.

mod communicator;
mod device;
mod library;
mod links;

use std::time::{Duration, Instant};

pub use self::library::NcclId;
use self::links::Links;
use crate::{
    Bare, Collective as _, CollectiveError, Group, Operation, Ranks, Tcp, Wires,
    arguments::check_rank,
    exchange::{Exchange as _, Incoming, Outgoing},
};

/// One rank of a group over NCCL.
pub type Nccl = Ranks<Links>;

// === impl Nccl ===

impl Nccl {
    /// What rank 0 gives to all others, so that they find each other; for one group.
    ///
    /// # Errors
    /// [`CollectiveError::Device`]: libnccl is not there, or finds no network interface.
    pub fn unique_id() -> Result<NcclId, CollectiveError> {
        library::library()?.unique_id()
    }

    /// The version of libnccl, as it says it itself: 22809 is 2.28.9.
    ///
    /// # Errors
    /// [`CollectiveError::Device`]: libnccl is not there.
    pub fn version() -> Result<u32, CollectiveError> {
        library::library()?.version()
    }

    /// One rank of the group that shares `id`, on the device of this number. Returns when all ranks are there.
    ///
    /// # Errors
    /// [`CollectiveError::Device`]: a library or the device is not there; [`CollectiveError::Rendezvous`]: not all ranks
    /// came within the group's timeout, or NCCL cannot connect them.
    pub fn join(id: &NcclId, rank: usize, group: Group, device: usize) -> Result<Self, CollectiveError> {
        check_rank(&group, rank)?;
        Ok(Self::new(Links::new(id, rank, &group, device, None)?, rank, group))
    }

    /// The same, of ranks that meet over TCP as those of [`Tcp::connect`] do, and watch each other over the
    /// connections that they keep.
    ///
    /// # Errors
    /// As [`Nccl::join`] and [`Tcp::connect`].
    pub fn connect(address: &str, rank: usize, group: Group, device: usize) -> Result<Self, CollectiveError> {
        Self::connect_over(&Bare, address, rank, group, device)
    }

    /// The same, over wires of the caller's. They carry the id, and what ranks ask each other; NCCL's own connections are
    /// plain.
    ///
    /// # Errors
    /// As [`Nccl::connect`].
    pub fn connect_over(
        wires: &dyn Wires,
        address: &str,
        rank: usize,
        group: Group,
        device: usize,
    ) -> Result<Self, CollectiveError> {
        // Who cannot take part says so before the others count on it.
        library::library()?;
        Self::over(Tcp::connect_over(wires, address, rank, group)?, device)
    }

    /// The same, of ranks that have met already. All of them come here, after any calls of theirs over TCP.
    ///
    /// # Errors
    /// As [`Nccl::join`], and as all calls of the group over TCP.
    pub fn over(mut control: Tcp, device: usize) -> Result<Self, CollectiveError> {
        let id = share_id(&mut control)?;
        let Tcp { rank, group, links: control, .. } = control;
        Ok(Self::new(Links::new(&id, rank, &group, device, Some(control))?, rank, group))
    }

    /// Sends itself so many bytes through device and NCCL, and says how long that took: a round that one GPU
    /// can make alone.
    ///
    /// # Errors
    /// As all calls.
    pub fn round_to_itself(&mut self, bytes: usize) -> Result<Duration, CollectiveError> {
        let own = self.rank();
        let sent: Vec<u8> = (0..bytes).map(|index| (index % 251) as u8).collect();
        let mut received = vec![0; bytes];
        let began = Instant::now();
        self.links.exchange(
            Operation::Send,
            &[Outgoing { to: own, bytes: &sent }],
            &mut [Incoming { from: own, bytes: &mut received }],
        )?;
        let took = began.elapsed();
        if received != sent {
            let reason = format!("{bytes} bytes came back from device and NCCL as others");
            return Err(CollectiveError::Device { reason });
        }
        Ok(took)
    }
}

/// Rank 0's id, to all ranks. As one number for each byte, which every payload carries exactly. All ranks hear from
/// each other here, so nothing of the wires' own (tickets of TLS) is left to be read later.
fn share_id(control: &mut Tcp) -> Result<NcclId, CollectiveError> {
    let mut counts = vec![0; control.size()];
    counts[0] = library::ID_BYTES;
    let own: Vec<f32> = match control.rank() {
        0 => Nccl::unique_id()?.to_bytes().iter().map(|byte| f32::from(*byte)).collect(),
        _ => Vec::new(),
    };
    let mut all = [0.0; library::ID_BYTES];
    control.all_gather_parts(&own, &counts, &mut all)?;
    Ok(NcclId::from_bytes(all.map(|number| number as u8)))
}
