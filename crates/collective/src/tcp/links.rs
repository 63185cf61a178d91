//! The connections of one rank, and the one way in which messages pass them: all at once, until each has arrived.
//!
//! The calling thread itself reads and writes whatever can go on, and sleeps when nothing can. So two ranks that send each
//! other more than the kernel holds do not wait for each other, and no thread stands between a call and its bytes.

use std::{
    io::{ErrorKind, IoSlice, IoSliceMut},
    net::{Shutdown, TcpStream},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::wait::{Interest, look, wait};
use crate::{
    CollectiveError, Operation, Wire,
    exchange::{Exchange, Fate, Incoming, Outgoing},
    frame::{FRAME_BYTES_MAX, HEADER_BYTES, Header},
};

/// The connections of one rank to all others.
pub struct Links {
    peers: Vec<Option<Peer>>,
    epoch: u64,
    timeout: Duration,
    shared: Arc<Shared>,
}

/// A connection to another rank, and what passes bytes over it.
pub(super) struct Link {
    pub(super) stream: Arc<TcpStream>,
    pub(super) wire: Box<dyn Wire>,
}

struct Peer {
    link: Link,
    /// Frames so far, each way.
    sent: u64,
    received: u64,
}

/// What an [`Aborter`](crate::Aborter) holds on to.
pub struct Shared {
    /// The first failure, which is every later one too.
    failure: Mutex<Option<CollectiveError>>,
    streams: Vec<Arc<TcpStream>>,
}

/// What can be seen of a connection without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// It said something.
    Speaks,
    /// Its end of the connection is closed.
    Gone,
}

/// How far a message has come.
struct Progress {
    rank: usize,
    header: Header,
    /// The header as bytes: to be sent, or as far as it was read.
    head: [u8; HEADER_BYTES],
    head_done: usize,
    /// Bytes before the current frame, and of it.
    before: usize,
    done: usize,
    /// Nothing of it is held up on this side.
    is_out: bool,
}

// === impl Links ===

impl Links {
    /// `links` by rank; none for the own one.
    pub(super) fn new(links: Vec<Option<Link>>, epoch: u64, timeout: Duration) -> std::io::Result<Self> {
        let mut peers = Vec::with_capacity(links.len());
        for link in links {
            let Some(link) = link else {
                peers.push(None);
                continue;
            };
            link.stream.set_nodelay(true)?;
            link.stream.set_nonblocking(true)?;
            peers.push(Some(Peer { link, sent: 0, received: 0 }));
        }
        let streams = peers.iter().flatten().map(|peer| peer.link.stream.clone()).collect();
        let shared = Arc::new(Shared { failure: Mutex::new(None), streams });
        Ok(Self { peers, epoch, timeout, shared })
    }

    /// The first of these ranks that is gone, or else has said something, while nobody exchanges anything.
    pub(crate) fn look(&self, ranks: &[usize]) -> Option<(usize, Sign)> {
        let files: Vec<_> = ranks.iter().map(|rank| self.peer(*rank).link.stream.as_raw_fd()).collect();
        let signs = look(&files);
        let seen = |sign| signs.iter().position(|seen| *seen == Some(sign)).map(|at| (ranks[at], sign));
        seen(Sign::Gone).or_else(|| seen(Sign::Speaks))
    }

    /// As an exchange, which may take as long as this says.
    pub(crate) fn exchange_within(
        &mut self,
        timeout: Duration,
        operation: Operation,
        outgoing: &[Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError> {
        let ordinary = std::mem::replace(&mut self.timeout, timeout);
        let end = self.exchange(operation, outgoing, incoming);
        self.timeout = ordinary;
        end
    }

    fn progress(&self, operation: Operation, rank: usize, bytes: usize, outward: bool) -> Progress {
        let peer = self.peer(rank);
        let header = Header {
            operation,
            epoch: self.epoch,
            sequence: if outward { peer.sent } else { peer.received },
            message_bytes: bytes as u64,
            frame_bytes: bytes.min(FRAME_BYTES_MAX) as u32,
        };
        let head = if outward { header.encode() } else { [0; HEADER_BYTES] };
        Progress { rank, header, head, head_done: 0, before: 0, done: 0, is_out: !outward }
    }

    /// Writes what the kernel takes; whether it took anything.
    fn write(&mut self, send: &mut Progress, bytes: &[u8]) -> Result<bool, CollectiveError> {
        let mut moved = false;
        if send.is_done() {
            return Ok(moved);
        }
        while !send.is_taken() {
            let frame = &bytes[send.before..][..send.header.frame_bytes as usize];
            let parts = [IoSlice::new(&send.head[send.head_done..]), IoSlice::new(&frame[send.done..])];
            match self.wire(send.rank).write_vectored(&parts) {
                Ok(0) => return Err(send.lost("it takes nothing")),
                Ok(count) => {
                    moved = true;
                    if send.advance(count) {
                        self.peers[send.rank].as_mut().expect("a peer").sent += 1;
                        send.next_frame(bytes.len());
                        send.head = send.header.encode();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(send.lost(&error.to_string())),
            }
        }
        match self.wire(send.rank).flush() {
            Ok(()) => send.is_out = true,
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
            Err(error) => return Err(send.lost(&error.to_string())),
        }
        Ok(moved)
    }

    /// Reads what is there; whether anything was.
    fn read(&mut self, receive: &mut Progress, bytes: &mut [u8]) -> Result<bool, CollectiveError> {
        let mut moved = false;
        while !receive.is_done() {
            let frame = &mut bytes[receive.before..][..receive.header.frame_bytes as usize];
            let mut parts = [
                IoSliceMut::new(&mut receive.head[receive.head_done..]),
                IoSliceMut::new(&mut frame[receive.done..]),
            ];
            match self.wire(receive.rank).read_vectored(&mut parts) {
                Ok(0) => return Err(receive.lost("it closed the connection")),
                Ok(count) => {
                    moved = true;
                    let in_header = receive.head_done < HEADER_BYTES;
                    let ends = receive.advance(count);
                    if in_header && receive.head_done == HEADER_BYTES {
                        receive.header.check(&receive.head, receive.rank)?;
                    }
                    if ends {
                        self.peers[receive.rank].as_mut().expect("a peer").received += 1;
                        receive.next_frame(bytes.len());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(receive.lost(&error.to_string())),
            }
        }
        Ok(moved)
    }

    /// Until some connection can go on, or time is up.
    fn sleep(&self, sends: &[Progress], receives: &[Progress], left: Duration) {
        let mut interests: Vec<Interest> = Vec::with_capacity(sends.len() + receives.len());
        for (progresses, writes) in [(sends, true), (receives, false)] {
            for progress in progresses.iter().filter(|progress| !progress.is_done()) {
                interests.push(Interest { file: self.peer(progress.rank).link.stream.as_raw_fd(), writes });
            }
        }
        wait(&interests, left);
    }

    fn peer(&self, rank: usize) -> &Peer {
        self.peers[rank].as_ref().expect("a call with itself needs no connection")
    }

    fn wire(&mut self, rank: usize) -> &mut dyn Wire {
        let peer = self.peers[rank].as_mut().expect("a call with itself needs no connection");
        &mut *peer.link.wire
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
        let deadline = Instant::now() + self.timeout;
        let mut sends: Vec<Progress> = Vec::with_capacity(outgoing.len());
        for message in outgoing {
            sends.push(self.progress(operation, message.to, message.bytes.len(), true));
        }
        let mut receives: Vec<Progress> = Vec::with_capacity(incoming.len());
        for message in incoming.iter() {
            receives.push(self.progress(operation, message.from, message.bytes.len(), false));
        }
        loop {
            let mut moved = false;
            for (send, message) in sends.iter_mut().zip(outgoing) {
                moved |= self.write(send, message.bytes)?;
            }
            for (receive, message) in receives.iter_mut().zip(incoming.iter_mut()) {
                moved |= self.read(receive, message.bytes)?;
            }
            let late = receives.iter().chain(&sends).find(|progress| !progress.is_done());
            let Some(late) = late.map(|progress| progress.rank) else { return Ok(()) };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CollectiveError::Deadline { operation, rank: late, timeout: self.timeout });
            }
            if !moved {
                self.sleep(&sends, &receives, left);
            }
        }
    }
}

// === impl Shared ===

impl Fate for Shared {
    fn failure(&self) -> Option<CollectiveError> {
        self.failure.lock().clone()
    }

    /// Lets the peers know: they read the end of the stream.
    fn fail(&self, error: CollectiveError) -> CollectiveError {
        let error = self.failure.lock().get_or_insert(error).clone();
        for stream in &self.streams {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        error
    }
}

// === impl Progress ===

impl Progress {
    fn is_done(&self) -> bool {
        self.is_taken() && self.is_out
    }

    /// All of its bytes are read, or taken from here.
    fn is_taken(&self) -> bool {
        self.before as u64 == self.header.message_bytes && self.ends()
    }

    /// The current frame is through.
    fn ends(&self) -> bool {
        self.head_done == HEADER_BYTES && self.done == self.header.frame_bytes as usize
    }

    /// Takes in `count` bytes; whether the frame ends with them.
    fn advance(&mut self, count: usize) -> bool {
        let of_head = count.min(HEADER_BYTES - self.head_done);
        self.head_done += of_head;
        self.done += count - of_head;
        self.ends()
    }

    /// On to the next frame, if there is one.
    fn next_frame(&mut self, message_bytes: usize) {
        self.before += self.done;
        self.done = 0;
        self.header.sequence += 1;
        self.header.frame_bytes = (message_bytes - self.before).min(FRAME_BYTES_MAX) as u32;
        if self.header.frame_bytes > 0 {
            self.head_done = 0;
        }
    }

    fn lost(&self, reason: &str) -> CollectiveError {
        CollectiveError::PeerLost {
            operation: self.header.operation,
            rank: self.rank,
            reason: reason.to_owned(),
        }
    }
}
