//! Messages between ranks over NCCL: a header before each, a deadline for all, and a name for whoever is missing.

use std::{
    ffi::{c_int, c_void},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    communicator::{Communicator, Trouble},
    device::Device,
    library::{NcclId, REMOTE_ERROR, library},
};
use crate::{
    Aborter, CollectiveError, Group, OnDevice, Operation, Parcel,
    exchange::{Exchange, Fate, Incoming, Outgoing},
    frame::{HEADER_BYTES, Header},
    ranks::ONE_HOP_BYTES_MAX,
    tcp::{self, Sign},
};

/// Bytes of a message that travel with its header: a sum that takes one hop takes one launch.
const INLINE_BYTES: usize = ONE_HOP_BYTES_MAX;
const FIRST_BYTES: usize = HEADER_BYTES + INLINE_BYTES;

/// A transfer of a few KB is done within this: so long its thread only steps aside for others.
const EAGER: Duration = Duration::from_micros(500);
/// Later it sleeps so long between two looks.
const NAP: Duration = Duration::from_micros(50);
/// Between two looks at the connections to the other ranks.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// A rank that leaves after the last call closes its connections, maybe before this one has seen that the call is done.
const LEAVING: Duration = Duration::from_millis(100);
/// After the timeout, ranks that are in a call tell each other so within this: they look every millisecond.
const ANSWER_WAIT: Duration = Duration::from_millis(250);

/// One rank's ways to all others over NCCL.
pub struct Links {
    rank: usize,
    epoch: u64,
    timeout: Duration,
    device: Device,
    shared: Arc<Shared>,
    /// Messages so far, to and from each rank.
    sent: Vec<u64>,
    received: Vec<u64>,
    /// Connections over which the ranks met, and over which they see that one is gone.
    control: Option<tcp::Links>,
    /// Workspaces: first messages, on their way out and in.
    outbox: Vec<u8>,
    inbox: Vec<u8>,
}

/// What an [`Aborter`](crate::Aborter) holds on to.
pub struct Shared {
    communicator: Communicator,
    control: Option<Aborter>,
}

/// What a rank waits for, and how long.
struct Call {
    operation: Operation,
    /// Ranks that take part.
    peers: Vec<usize>,
    deadline: Instant,
}

// === impl Links ===

impl Links {
    /// Joins all ranks that share `id`.
    pub(super) fn new(
        id: &NcclId,
        rank: usize,
        group: &Group,
        device: usize,
        control: Option<tcp::Links>,
    ) -> Result<Self, CollectiveError> {
        let library = library()?;
        let device = Device::open(device)?;
        let communicator = Communicator::new(library);
        let shared = Shared { communicator, control: control.as_ref().map(Exchange::aborter) };
        let mut links = Self {
            rank,
            epoch: group.epoch,
            timeout: group.timeout,
            device,
            shared: Arc::new(shared),
            sent: vec![0; group.size],
            received: vec![0; group.size],
            control,
            outbox: Vec::new(),
            inbox: Vec::new(),
        };
        links.join(id).map_err(|error| links.rendezvous_error(&error))?;
        Ok(links)
    }

    fn join(&mut self, id: &NcclId) -> Result<(), CollectiveError> {
        let size = self.sent.len();
        // For errors only: NCCL's own connecting is no call.
        let call = self.call(Operation::Barrier, self.others());
        self.device.bind()?;
        let begun = self.shared.communicator.begin(id, self.rank, size);
        let begun = begun.map_err(|trouble| self.explain(&call, trouble));
        let joined = begun.and_then(|()| self.settle(&call));
        joined.map_err(|error| self.shared.fail(error))
    }

    fn rendezvous_error(&self, error: &CollectiveError) -> CollectiveError {
        if let CollectiveError::Device { .. } = error {
            return error.clone();
        }
        let reason = format!("not all ranks are there within {:?} ({error})", self.timeout);
        CollectiveError::Rendezvous { rank: self.rank, address: "NCCL's id".to_owned(), reason }
    }

    fn others(&self) -> Vec<usize> {
        (0..self.sent.len()).filter(|rank| *rank != self.rank).collect()
    }

    fn call(&self, operation: Operation, peers: Vec<usize>) -> Call {
        Call { operation, peers, deadline: Instant::now() + self.timeout }
    }

    /// Headers, and as much of each message as travels with them.
    fn pass_first(
        &mut self,
        call: &Call,
        outgoing: &[Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError> {
        let (mut outbox, mut inbox) = (std::mem::take(&mut self.outbox), std::mem::take(&mut self.inbox));
        outbox.resize(outgoing.len() * FIRST_BYTES, 0);
        inbox.resize(incoming.len() * FIRST_BYTES, 0);
        for (first, message) in outbox.chunks_exact_mut(FIRST_BYTES).zip(outgoing) {
            let header = self.header(call.operation, self.sent[message.to], message.bytes.len());
            first[..HEADER_BYTES].copy_from_slice(&header.encode());
            let inline = header.frame_bytes as usize;
            first[HEADER_BYTES..][..inline].copy_from_slice(&message.bytes[..inline]);
        }
        let firsts = outbox.chunks_exact(FIRST_BYTES).zip(outgoing);
        let out: Vec<_> = firsts.map(|(bytes, message)| Outgoing { to: message.to, bytes }).collect();
        let firsts = inbox.chunks_exact_mut(FIRST_BYTES).zip(incoming.iter());
        let mut inward: Vec<_> =
            firsts.map(|(bytes, message)| Incoming { from: message.from, bytes }).collect();
        self.by_device(call, &out, &mut inward)?;
        for (first, message) in inbox.chunks_exact(FIRST_BYTES).zip(incoming) {
            let header = self.header(call.operation, self.received[message.from], message.bytes.len());
            header.check(first[..HEADER_BYTES].try_into().expect("a header's bytes"), message.from)?;
            let inline = header.frame_bytes as usize;
            message.bytes[..inline].copy_from_slice(&first[HEADER_BYTES..][..inline]);
            self.received[message.from] += 1;
        }
        outgoing.iter().for_each(|message| self.sent[message.to] += 1);
        (self.outbox, self.inbox) = (outbox, inbox);
        Ok(())
    }

    fn header(&self, operation: Operation, sequence: u64, bytes: usize) -> Header {
        let frame_bytes = bytes.min(INLINE_BYTES) as u32;
        Header { operation, epoch: self.epoch, sequence, message_bytes: bytes as u64, frame_bytes }
    }

    /// To the device, to the ranks, and back to the host. Lengths are agreed on.
    fn by_device(
        &mut self,
        call: &Call,
        outgoing: &[Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError> {
        let out = places(outgoing);
        let last = out.iter().zip(outgoing).map(|(at, message)| at + message.bytes.len()).max();
        let inward: usize = incoming.iter().map(|message| message.bytes.len()).sum();
        self.device.make_room(last.unwrap_or(0), inward)?;
        let mut sends = Vec::with_capacity(outgoing.len());
        for (index, (at, message)) in out.iter().zip(outgoing).enumerate() {
            // What goes to several ranks lies on the device once.
            if !out[..index].contains(at) {
                self.device.upload(*at, message.bytes)?;
            }
            let address = self.device.outbox(*at);
            sends.push(Parcel { peer: message.to, address, bytes: message.bytes.len() });
        }
        let (mut receives, mut at) = (Vec::with_capacity(incoming.len()), 0);
        for message in incoming.iter() {
            let address = self.device.inbox(at);
            receives.push(Parcel { peer: message.from, address, bytes: message.bytes.len() });
            at += message.bytes.len();
        }
        // SAFETY: there is room for all pieces, which stay until the device is idle: nobody makes room before, and a
        // device that does not become idle is never freed.
        unsafe { self.launch(call, self.device.stream(), (&sends, &receives)) }?;
        self.wait(call, Device::is_idle)?;
        at = 0;
        for message in incoming {
            self.device.download(at, message.bytes)?;
            at += message.bytes.len();
        }
        Ok(())
    }

    /// Puts transfers on a stream.
    ///
    /// # Safety
    /// As [`Communicator::launch`].
    unsafe fn launch(
        &mut self,
        call: &Call,
        stream: *mut c_void,
        (outgoing, incoming): (&[Parcel], &[Parcel]),
    ) -> Result<(), CollectiveError> {
        // SAFETY: the caller's.
        let launched = unsafe { self.shared.communicator.launch(outgoing, incoming, stream) };
        launched.map_err(|trouble| self.explain(call, trouble))?;
        self.settle(call)
    }

    /// Until NCCL has taken over what was begun: before, the stream knows nothing of it.
    fn settle(&mut self, call: &Call) -> Result<(), CollectiveError> {
        self.wait(call, |_| Ok(true))
    }

    /// Until NCCL has nothing in hand and `done` says so too, or there is a reason to give up.
    fn wait(
        &mut self,
        call: &Call,
        done: impl Fn(&Device) -> Result<bool, CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let began = Instant::now();
        let (mut looked, mut gone): (Instant, Option<(usize, Instant)>) = (began, None);
        loop {
            let settled = self.shared.communicator.is_settled();
            if settled.map_err(|trouble| self.explain(call, trouble))? && done(&self.device)? {
                return Ok(());
            }
            let now = Instant::now();
            let mut is_over = now >= call.deadline;
            if now - looked >= LOOK_EVERY {
                looked = now;
                match self.look(call) {
                    Some((rank, Sign::Gone)) => {
                        gone.get_or_insert((rank, now));
                    }
                    // It has waited for the whole timeout, and wants to know whether this rank is there.
                    Some((_, Sign::Speaks)) => is_over = true,
                    None => {}
                }
            }
            if is_over {
                return Err(self.ask(call));
            }
            if let Some((rank, seen)) = gone
                && now - seen >= LEAVING
            {
                return Err(lost(call, rank, "it closed its connection"));
            }
            if now - began < EAGER {
                thread::yield_now();
            } else {
                thread::sleep(NAP);
            }
        }
    }

    /// Who is missing, when the time is over. The question is the same in each call, since a rank may be in the next one:
    /// it had only to receive.
    fn ask(&mut self, call: &Call) -> CollectiveError {
        let (operation, timeout) = (call.operation, self.timeout);
        let Some(control) = &mut self.control else {
            let rank = call.peers.first().copied().unwrap_or(self.rank);
            return CollectiveError::Deadline { operation, rank, timeout };
        };
        let others = || call.peers.iter().copied().filter(|rank| *rank != self.rank);
        let outgoing: Vec<_> = others().map(|to| Outgoing { to, bytes: &[] }).collect();
        let mut incoming: Vec<_> = others().map(|from| Incoming { from, bytes: &mut [] }).collect();
        match control.exchange_within(ANSWER_WAIT, Operation::Barrier, &outgoing, &mut incoming) {
            Err(CollectiveError::Deadline { rank, .. }) => {
                CollectiveError::Deadline { operation, rank, timeout }
            }
            Err(CollectiveError::PeerLost { rank, reason, .. }) => lost(call, rank, &reason),
            Err(other) => other,
            Ok(()) => CollectiveError::Device {
                reason: format!(
                    "{operation}: all ranks are there by now, and NCCL did not end it within {timeout:?}: it hangs \
                     (NCCL_DEBUG=INFO has it say where), one came late, or they call different things"
                ),
            },
        }
    }

    /// What the connections say about the ranks of a call.
    fn look(&self, call: &Call) -> Option<(usize, Sign)> {
        // A rank needs no connection to itself.
        let others: Vec<usize> = call.peers.iter().copied().filter(|rank| *rank != self.rank).collect();
        self.control.as_ref()?.look(&others)
    }

    fn explain(&self, call: &Call, trouble: Trouble) -> CollectiveError {
        let (code, sentence): (c_int, String) = match trouble {
            Trouble::Over(error) => return error,
            Trouble::Nccl { code, sentence } => (code, sentence),
        };
        if code != REMOTE_ERROR {
            return CollectiveError::Device { reason: format!("{}: {sentence}", call.operation) };
        }
        let gone = match self.look(call) {
            Some((rank, Sign::Gone)) => Some(rank),
            _ => call.peers.first().copied(),
        };
        lost(call, gone.unwrap_or(self.rank), &sentence)
    }
}

impl Exchange for Links {
    type Fate = Shared;

    fn fate(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn pass(
        &mut self,
        operation: Operation,
        outgoing: &[Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError> {
        let senders = incoming.iter().map(|message| message.from);
        let peers = peers(senders.chain(outgoing.iter().map(|message| message.to)));
        if peers.is_empty() {
            return Ok(());
        }
        let call = self.call(operation, peers);
        self.device.bind()?;
        self.pass_first(&call, outgoing, incoming)?;
        let rest: Vec<Outgoing<'_>> = outgoing
            .iter()
            .filter(|message| message.bytes.len() > INLINE_BYTES)
            .map(|message| Outgoing { to: message.to, bytes: &message.bytes[INLINE_BYTES..] })
            .collect();
        let mut room: Vec<Incoming<'_>> = incoming
            .iter_mut()
            .filter(|message| message.bytes.len() > INLINE_BYTES)
            .map(|message| Incoming { from: message.from, bytes: &mut message.bytes[INLINE_BYTES..] })
            .collect();
        if rest.is_empty() && room.is_empty() {
            return Ok(());
        }
        self.by_device(&call, &rest, &mut room)
    }

    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        Some(self)
    }
}

impl OnDevice for Links {
    unsafe fn transfer(
        &mut self,
        stream: *mut c_void,
        outgoing: &[Parcel],
        incoming: &[Parcel],
    ) -> Result<(), CollectiveError> {
        if outgoing.is_empty() && incoming.is_empty() {
            return Ok(());
        }
        let call =
            self.call(Operation::AllGather, peers(outgoing.iter().chain(incoming).map(|parcel| parcel.peer)));
        self.unless_over(|links| {
            links.device.bind()?;
            // SAFETY: the caller's.
            unsafe { links.launch(&call, stream, (outgoing, incoming)) }
        })
    }

    unsafe fn drain(&mut self, stream: *mut c_void) -> Result<(), CollectiveError> {
        // Any of them may be what the stream waits for.
        let call = self.call(Operation::AllGather, self.others());
        self.unless_over(|links| {
            links.device.bind()?;
            // SAFETY: the caller's.
            links.wait(&call, |device| unsafe { device.is_done(stream) })
        })
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        // Before the device goes, with what NCCL may still read.
        self.shared.communicator.leave();
    }
}

// === impl Shared ===

impl Fate for Shared {
    fn failure(&self) -> Option<CollectiveError> {
        self.communicator.failure()
    }

    /// Lets the peers know, where there is a way to tell them.
    fn fail(&self, error: CollectiveError) -> CollectiveError {
        let error = self.communicator.fail(error);
        if let Some(control) = &self.control {
            control.abort(&error.to_string());
        }
        error
    }
}

fn lost(call: &Call, rank: usize, reason: &str) -> CollectiveError {
    CollectiveError::PeerLost { operation: call.operation, rank, reason: reason.to_owned() }
}

/// Each of these ranks once.
fn peers(ranks: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut peers: Vec<usize> = ranks.collect();
    peers.sort_unstable();
    peers.dedup();
    peers
}

/// Where each message lies in the outbox: one behind the other, and those that are the same memory in one place.
fn places(outgoing: &[Outgoing<'_>]) -> Vec<usize> {
    let mut places = Vec::with_capacity(outgoing.len());
    let mut end = 0;
    for (index, message) in outgoing.iter().enumerate() {
        let same = outgoing[..index].iter().position(|other| std::ptr::eq(other.bytes, message.bytes));
        let place = same.map_or(end, |same| places[same]);
        places.push(place);
        end = end.max(place + message.bytes.len());
    }
    places
}
