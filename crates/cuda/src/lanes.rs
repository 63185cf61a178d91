//! Lanes of rows over NCCL: groups of two ranks, of which one sends and the other receives.
//!
//! An end has a stream of its own, so that neither waits for the model's, nor the model for it. Nothing has a header: both ends
//! know the order and the lengths of rows from what announces them. A call ends when all that it began is done, by the timeout
//! at the latest (`crates/collective/src/nccl.rs`); after a failure the communicator is aborted.
//!
//! Memory is from the driver's pools: to reserve other memory may wait for whatever the device does, a transfer whose peer is late
//! among it. NCCL wants other memory of ranks that are threads of one process, which the ends of a lane are not.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use cudarc::driver::{CudaStream, result};
use uniarm_collective::{Collective as _, Group, Nccl, NcclId, Parcel, Payload};
use uniarm_model::{DeviceRow, Hangup, ModelError, RowLanes, RowReceiver, RowSender};

use crate::device::{is_idle_soon, open_stream, refused};
use crate::locked::Locked;
use crate::memory::Memory;
use crate::rows::CudaRow;

/// Ranks of a lane.
const RECEIVER: usize = 0;
const SENDER: usize = 1;

/// Rows that are received before they are copied to the host: 8 MB of a vocabulary of 128k.
const ROWS_AT_ONCE: usize = 16;

/// Lanes of one device.
#[derive(Clone, Copy, Debug)]
pub struct CudaLanes {
    device: usize,
    timeout: Duration,
}

/// What both kinds of ends are.
struct End {
    nccl: Nccl,
    stream: Arc<CudaStream>,
}

struct Receiver {
    end: End,
    memory: Option<Memory<f32>>,
    rows: Locked<f32>,
}

struct Sender {
    end: End,
}

// === impl CudaLanes ===

impl CudaLanes {
    /// Of the GPU of this number. `timeout`: an end that does not hear of the other one for so long closes the lane.
    pub fn new(device: usize, timeout: Duration) -> Self {
        Self { device, timeout }
    }

    fn join(&self, offer: &[u8], rank: usize) -> Result<End, ModelError> {
        let id = offer.try_into().map_err(|_| ModelError::Invalid {
            field: "lane.nccl_id",
            reason: format!("{} bytes are no id of NCCL's", offer.len()),
        })?;
        let stream = open_stream(self.device)?;
        let group = Group { size: 2, epoch: 0, payload: Payload::F32, timeout: self.timeout };
        let nccl = Nccl::join(&NcclId::from_bytes(id), rank, group, self.device).map_err(ModelError::Lane)?;
        Ok(End { nccl, stream })
    }
}

impl RowLanes for CudaLanes {
    fn offer(&self) -> Result<Vec<u8>, ModelError> {
        Ok(Nccl::unique_id().map_err(ModelError::Lane)?.to_bytes().to_vec())
    }

    fn receiver(&self, offer: &[u8]) -> Result<Box<dyn RowReceiver>, ModelError> {
        let end = self.join(offer, RECEIVER)?;
        Ok(Box::new(Receiver { end, memory: None, rows: Locked::new() }))
    }

    fn sender(&self, offer: &[u8]) -> Result<Box<dyn RowSender>, ModelError> {
        Ok(Box::new(Sender { end: self.join(offer, SENDER)? }))
    }
}

// === impl End ===

impl End {
    /// Passes stretches of memory to the other end or from it, each as a transfer of its own, and returns when all are done.
    ///
    /// # Safety
    /// They are memory of this device, which stays until this has returned well, or nothing is under way on the stream any more.
    unsafe fn pass(&mut self, parcels: &[Parcel]) -> Result<(), ModelError> {
        let is_receiver = self.nccl.rank() == RECEIVER;
        let stream = self.stream.cu_stream().cast();
        let lane = self.nccl.on_device().expect("NCCL has a way between devices");
        let mut transfer = |parcel: &Parcel| {
            let parcel = std::slice::from_ref(parcel);
            let (outgoing, incoming) = if is_receiver { (&[][..], parcel) } else { (parcel, &[][..]) };
            // Safety: the caller's; the stream is one of the device's primary context.
            unsafe { lane.transfer(stream, outgoing, incoming) }
        };
        let begun = parcels.iter().try_for_each(&mut transfer);
        // Safety: as above.
        begun.and_then(|()| unsafe { lane.drain(stream) }).map_err(ModelError::Lane)
    }

    /// Whether nothing of what was begun can still read or write; waits for a moment, as after an abort.
    fn is_idle(&self) -> bool {
        is_idle_soon(&self.stream)
    }

    fn hangup(&self) -> Hangup {
        let aborter = self.nccl.aborter();
        Hangup::new(move || {
            let aborter = aborter.clone();
            // NCCL takes its time to abort what is on a device. Without a thread, the timeout ends it.
            let _ = thread::Builder::new()
                .name("lane-hangup".into())
                .spawn(move || aborter.abort("this end hung up"));
        })
    }
}

// === impl Receiver ===

impl Receiver {
    /// A few rows, behind those that are there.
    fn receive_few(&mut self, lengths: &[usize], rows: &mut Vec<Vec<f32>>) -> Result<(), ModelError> {
        let all: usize = lengths.iter().sum();
        if self.memory.as_ref().is_none_or(|memory| memory.len() < all) {
            self.memory = None;
            let count = all.next_power_of_two();
            self.memory = Some(Memory::reserve_on(&self.end.stream, count, "rows that are received")?);
        }
        let memory = self.memory.as_ref().expect("memory that was reserved");
        let mut first = 0;
        let parcels = lengths.iter().filter(|length| **length > 0).map(|length| {
            let address = memory.at(first);
            first += length;
            Parcel { peer: SENDER, address, bytes: length * size_of::<f32>() }
        });
        let parcels: Vec<Parcel> = parcels.collect();
        // Safety: the memory is given back in the order of this very stream, behind whatever is under way.
        unsafe { self.end.pass(&parcels) }?;
        let numbers = self.rows.reserve(&self.end.stream, all)?;
        // Safety: so many numbers were received there; the pages stay at least until the stream is done, which is not behind a
        // peer any more.
        let copied = unsafe { result::memcpy_dtoh_async(numbers, memory.at(0), self.end.stream.cu_stream()) };
        copied
            .and_then(|()| self.end.stream.synchronize())
            .map_err(|error| refused("a copy of rows from the device", error))?;
        let mut numbers = &*numbers;
        for length in lengths {
            rows.push(numbers.split_off(..*length).expect("as many numbers as all rows have").to_vec());
        }
        Ok(())
    }
}

impl RowReceiver for Receiver {
    fn receive(&mut self, lengths: &[usize]) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut rows = Vec::with_capacity(lengths.len());
        for few in lengths.chunks(ROWS_AT_ONCE) {
            self.receive_few(few, &mut rows)?;
        }
        Ok(rows)
    }

    fn hangup(&self) -> Hangup {
        self.end.hangup()
    }
}

// === impl Sender ===

impl RowSender for Sender {
    fn send(&mut self, rows: Vec<(DeviceRow, usize)>) -> Result<(), ModelError> {
        let mut own: Vec<CudaRow> = Vec::with_capacity(rows.len());
        let mut parcels = Vec::with_capacity(rows.len());
        for (row, length) in rows {
            let row: CudaRow = row.downcast()?;
            if length > row.memory().len() {
                let reason = format!("{length} logits of a row of {}", row.memory().len());
                return Err(ModelError::Invalid { field: "row", reason });
            }
            if length > 0 {
                let bytes = length * size_of::<f32>();
                parcels.push(Parcel { peer: RECEIVER, address: row.memory().at(0), bytes });
            }
            own.push(row);
        }
        // Safety: the rows stay where they are until nothing is under way, and else for ever.
        let sent = unsafe { self.end.pass(&parcels) };
        if sent.is_err() && !self.end.is_idle() {
            own.into_iter().for_each(CudaRow::abandon);
        }
        sent
    }

    fn hangup(&self) -> Hangup {
        self.end.hangup()
    }
}
