//! How the ranks of a group find each other: all of them call rank 0, which tells each where the others are.
//!
//! ```text
//! rank r ── Hello: epoch, rank, size, payload, port of its own ──► rank 0
//! rank r ◄── Answer: refused, or addresses of all ranks ────────── rank 0, once all are there
//! rank r ── Hello ──► ranks 1 … r − 1, at these addresses
//! ```
//!
//! Who is at the other end is a matter of the wires, which come first on each connection: bare ones believe whoever is there, and
//! their addresses belong into a network that only the cluster reaches. What comes from elsewhere, is of another epoch or
//! stays silent is turned away, and the others go on.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    links::Link,
    wait::{Interest, wait},
};
use crate::{CollectiveError, Group, Payload, Wires};

/// "UCH1"
const MAGIC: u32 = u32::from_le_bytes(*b"UCH1");
const HELLO_BYTES: usize = 24;

/// A caller says who it is within this, or is turned away: it holds up all who wait behind it.
const HELLO_WAIT: Duration = Duration::from_millis(500);
/// The same of what its wire needs before: a few messages, and some milliseconds of arithmetic on a busy machine.
const WIRE_WAIT: Duration = Duration::from_secs(2);
/// Between two tries to reach a rank 0 that does not listen yet.
const RETRY_WAIT: Duration = Duration::from_millis(20);
/// Bytes of the sentence with which rank 0 refuses.
const REFUSAL_BYTES_MAX: usize = 255;
/// One address: IPv6 (or IPv4 within it) and port.
const ADDRESS_BYTES: usize = 18;
/// What a TLS server says to one who does not speak it begins with this byte, which would be the length of a refusal.
const TLS_ALERT: u8 = 21;

/// Who is at the other end, in its own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    epoch: u64,
    rank: u16,
    size: u16,
    payload: Payload,
    /// Where it listens for higher ranks.
    port: u16,
}

/// One rank on its way into the group.
pub(super) struct Rendezvous<'a> {
    wires: &'a dyn Wires,
    group: &'a Group,
    rank: usize,
    /// Of rank 0; for errors.
    address: String,
    deadline: Instant,
    /// The last caller who was not who it should be, and why; for errors.
    stranger: Option<String>,
}

type Streams = Vec<Option<Link>>;

// === impl Rendezvous ===

impl<'a> Rendezvous<'a> {
    pub(super) fn new(wires: &'a dyn Wires, group: &'a Group, rank: usize, address: String) -> Self {
        Self { wires, group, rank, address, deadline: Instant::now() + group.timeout, stranger: None }
    }

    /// Rank 0: takes in all others.
    pub(super) fn lead(mut self, listener: &TcpListener) -> Result<Streams, CollectiveError> {
        let mut streams: Streams = (0..self.group.size).map(|_| None).collect();
        let mut addresses = vec![SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0); self.group.size];
        while let Some(missing) = (1..self.group.size).find(|rank| streams[*rank].is_none()) {
            let (mut link, peer) = self.accept(listener, missing)?;
            let Some(hello) = Hello::read(&mut link) else { continue };
            let rank = usize::from(hello.rank);
            // A process that died while it waited here, and was started again.
            if let Some(former) = streams.get_mut(rank) {
                former.take_if(|former| is_closed(&former.stream));
            }
            if let Err(reason) = self.admit(&hello, &streams) {
                // Whether it hears why or not, it is not of this group.
                let _ = link.say(&refusal(&reason));
                continue;
            }
            addresses[rank] = SocketAddr::new(peer.ip(), hello.port);
            streams[rank] = Some(link);
        }
        let table: Vec<u8> =
            [0].into_iter().chain(addresses.iter().flat_map(|address| encode_address(*address))).collect();
        for (rank, link) in streams.iter_mut().enumerate() {
            if let Some(link) = link {
                let written = link.say(&table);
                written.map_err(|error| self.error(format!("rank {rank} is gone: {error}")))?;
            }
        }
        Ok(streams)
    }

    /// Any other rank: asks rank 0, then calls the lower ranks and takes in the higher ones.
    pub(super) fn join(mut self) -> Result<Streams, CollectiveError> {
        let leader = Arc::new(self.dial_leader()?);
        let wire = self.wires.dial(&leader, self.deadline);
        let wire = wire.map_err(|error| self.error(format!("rank 0 is none of this group's: {error}")))?;
        let mut leader = Link { stream: leader, wire };
        let own = leader.stream.local_addr().map_err(|error| self.error(error.to_string()))?.ip();
        let listener = TcpListener::bind((own, 0)).map_err(|error| self.error(error.to_string()))?;
        let port = listener.local_addr().map_err(|error| self.error(error.to_string()))?.port();
        let addresses = self.ask(&mut leader, port)?;
        let mut streams: Streams = (0..self.group.size).map(|_| None).collect();
        streams[0] = Some(leader);
        for lower in 1..self.rank {
            let unreachable = |error| self.error(format!("rank {lower} at {}: {error}", addresses[lower]));
            let stream = TcpStream::connect_timeout(&addresses[lower], self.left()?).map_err(unreachable)?;
            let stream = Arc::new(stream);
            let wire = self.wires.dial(&stream, self.deadline).map_err(unreachable)?;
            let mut link = Link { stream, wire };
            link.say(&self.hello(port).encode()).map_err(unreachable)?;
            streams[lower] = Some(link);
        }
        while let Some(missing) = (self.rank + 1..self.group.size).find(|rank| streams[*rank].is_none()) {
            let (mut link, _) = self.accept(&listener, missing)?;
            let Some(hello) = Hello::read(&mut link) else { continue };
            if usize::from(hello.rank) > self.rank && self.admit(&hello, &streams).is_ok() {
                streams[usize::from(hello.rank)] = Some(link);
            }
        }
        Ok(streams)
    }

    /// Rank 0 may start later than the others: it is called until it listens.
    fn dial_leader(&self) -> Result<TcpStream, CollectiveError> {
        loop {
            let addresses = self.address.to_socket_addrs();
            let addresses = addresses.map_err(|error| self.error(format!("is no address: {error}")))?;
            for address in addresses {
                if let Ok(stream) = TcpStream::connect_timeout(&address, self.left()?) {
                    return Ok(stream);
                }
            }
            std::thread::sleep(RETRY_WAIT.min(self.left()?));
        }
    }

    /// The addresses of all ranks.
    fn ask(&self, leader: &mut Link, port: u16) -> Result<Vec<SocketAddr>, CollectiveError> {
        let gone = |error: io::Error| match error.kind() {
            ErrorKind::InvalidData => {
                self.error(format!("rank 0 takes this one for none of the group's: {error}"))
            }
            _ => self.error(format!("rank 0 does not answer: {error}")),
        };
        leader.say(&self.hello(port).encode()).map_err(gone)?;
        leader.stream.set_read_timeout(Some(self.left()?)).map_err(gone)?;
        let mut length = [0];
        leader.wire.read_exact(&mut length).map_err(gone)?;
        if length[0] > 0 {
            let mut sentence = vec![0; usize::from(length[0])];
            match leader.wire.read_exact(&mut sentence) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof && length[0] == TLS_ALERT => {
                    return Err(self.error("rank 0 speaks TLS, and this one does not".to_owned()));
                }
                read => read.map_err(gone)?,
            }
            return Err(self.error(String::from_utf8_lossy(&sentence).into_owned()));
        }
        let mut table = vec![0; self.group.size * ADDRESS_BYTES];
        leader.wire.read_exact(&mut table).map_err(gone)?;
        Ok(table.chunks_exact(ADDRESS_BYTES).map(decode_address).collect())
    }

    /// The next caller over whose wire one can speak.
    fn accept(
        &mut self,
        listener: &TcpListener,
        missing: usize,
    ) -> Result<(Link, SocketAddr), CollectiveError> {
        listener.set_nonblocking(true).map_err(|error| self.error(error.to_string()))?;
        loop {
            match listener.accept() {
                Ok((stream, peer)) if stream.set_nonblocking(false).is_ok() => {
                    let stream = Arc::new(stream);
                    match self.wires.accept(&stream, self.deadline.min(Instant::now() + WIRE_WAIT)) {
                        Ok(wire) => return Ok((Link { stream, wire }, peer)),
                        Err(error) if error.kind() == ErrorKind::InvalidData => {
                            self.stranger = Some(format!("{} was turned away: {error}", peer.ip()));
                        }
                        // Gone, or silent.
                        Err(_) => {}
                    }
                }
                // Gone before it was taken in, or nobody yet.
                Ok(_) => {}
                Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
                Err(error) => return Err(self.error(error.to_string())),
            }
            let left = self.left().map_err(|_| {
                let stranger =
                    self.stranger.as_ref().map_or_else(String::new, |stranger| format!("; {stranger}"));
                self.error(format!("rank {missing} did not come in time{stranger}"))
            })?;
            wait(&[Interest { file: listener.as_raw_fd(), writes: false }], left);
        }
    }

    /// Whether a caller belongs here.
    fn admit(&self, hello: &Hello, streams: &Streams) -> Result<(), String> {
        let Group { size, epoch, payload, .. } = *self.group;
        if hello.epoch != epoch {
            return Err(format!("this is epoch {epoch} of the group, not {}", hello.epoch));
        }
        if usize::from(hello.size) != size || hello.payload != payload {
            return Err(format!(
                "this group has {size} ranks and sends {payload:?}, not {} and {:?}",
                hello.size, hello.payload
            ));
        }
        match streams.get(usize::from(hello.rank)) {
            Some(None) if hello.rank > 0 => Ok(()),
            _ => Err(format!("rank {} is taken, or outside 1..{size}", hello.rank)),
        }
    }

    fn hello(&self, port: u16) -> Hello {
        let Group { size, epoch, payload, .. } = *self.group;
        Hello { epoch, rank: self.rank as u16, size: size as u16, payload, port }
    }

    fn left(&self) -> Result<Duration, CollectiveError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.error("time is up".to_owned()));
        }
        Ok(left)
    }

    fn error(&self, reason: String) -> CollectiveError {
        CollectiveError::Rendezvous { rank: self.rank, address: self.address.clone(), reason }
    }
}

// === impl Link ===

impl Link {
    /// While the connection blocks.
    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.wire.write_all(bytes)?;
        self.wire.flush()
    }
}

// === impl Hello ===

impl Hello {
    fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.rank.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.port.to_le_bytes());
        bytes[18] = self.payload.bytes_per_number() as u8;
        bytes
    }

    /// `None` for what is none, or does not come.
    fn read(link: &mut Link) -> Option<Self> {
        link.stream.set_read_timeout(Some(HELLO_WAIT)).ok()?;
        let mut bytes = [0; HELLO_BYTES];
        link.wire.read_exact(&mut bytes).ok()?;
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let hello = Self {
            epoch: u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes")),
            rank: short(4),
            size: short(6),
            payload: if bytes[18] == 2 { Payload::Bf16 } else { Payload::F32 },
            port: short(16),
        };
        (bytes == hello.encode()).then_some(hello)
    }
}

/// Whether the other end is gone.
fn is_closed(stream: &TcpStream) -> bool {
    let looked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let is_closed = match looked {
        Ok(count) => count == 0,
        Err(error) => ![ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()),
    };
    is_closed || stream.set_nonblocking(false).is_err()
}

/// Its length, which is not 0, and the sentence.
fn refusal(reason: &str) -> Vec<u8> {
    let sentence = &reason.as_bytes()[..reason.len().min(REFUSAL_BYTES_MAX)];
    [&[sentence.len() as u8][..], sentence].concat()
}

fn encode_address(address: SocketAddr) -> [u8; ADDRESS_BYTES] {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ADDRESS_BYTES];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&address.port().to_le_bytes());
    bytes
}

fn decode_address(bytes: &[u8]) -> SocketAddr {
    let octets: [u8; 16] = bytes[..16].try_into().expect("sixteen bytes");
    SocketAddr::new(Ipv6Addr::from(octets).to_canonical(), u16::from_le_bytes([bytes[16], bytes[17]]))
}
