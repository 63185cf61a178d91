//! Equals who call each other: ranks of one group, each with a certificate of the same role, over connections that threads use.
//!
//! A TLS session is one state machine for both directions, so no two threads can each have a half of it. None have to: whoever uses
//! it reads and writes in turns, over a connection that need not block, and what the connection does not take at once is
//! held here until the next [`io::Write::flush`].

use std::{
    io::{self, ErrorKind, IoSlice, Read, Write},
    net::{Shutdown, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection, client::Resumption,
    pki_types::ServerName, server::NoServerSessionStorage,
};

use crate::{Identity, RoleName, TlsError, client, files::Rotating, server};

/// What is spoken over these connections: no gRPC client comes in here by mistake, and no rank there.
const PROTOCOL: &[u8] = b"uniarm-group";

/// Bytes that one call of the system brings, at most: some records of 16 KiB.
const INBOX_BYTES: usize = 64 << 10;

/// Bytes that are encrypted and not sent: four records of the protocol.
const OUTBOX_BYTES: usize = 64 << 10;

/// Both sides of such connections. Clones share the files.
#[derive(Clone, Debug)]
pub struct PeerTls {
    role: RoleName,
    dialling: Rotating<Arc<ClientConfig>>,
    accepting: Rotating<Arc<ServerConfig>>,
}

/// One end of a connection.
pub struct PeerStream {
    stream: Arc<TcpStream>,
    session: Connection,
    /// Bytes that came and are not decrypted.
    inbox: Box<[u8]>,
    inbox_start: usize,
    inbox_end: usize,
}

// === impl PeerTls ===

impl PeerTls {
    /// Of a process among others of its role.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn mutual(identity: &Identity, role: RoleName) -> Result<Self, TlsError> {
        let paths = vec![identity.certificate.clone(), identity.key.clone(), identity.authority.clone()];
        let own = identity.clone();
        let dialling = Rotating::new(paths.clone(), move || {
            let mut config = client::mutual(&own, &[role], PROTOCOL)?;
            config.resumption = Resumption::disabled();
            Ok(Arc::new(config))
        })?;
        let own = identity.clone();
        let accepting = Rotating::new(paths, move || {
            let mut config = server::mutual(&own, &[role], PROTOCOL)?;
            // A group meets once.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok(Arc::new(config))
        })?;
        Ok(Self { role, dialling, accepting })
    }

    /// Ends the handshake with one who was called; the connection blocks until then.
    ///
    /// # Errors
    /// `InvalidData`, when it is not who it should be; others, when it is not there or silent until the deadline.
    pub fn dial(&self, stream: Arc<TcpStream>, deadline: Instant) -> io::Result<PeerStream> {
        let name = ServerName::try_from(self.role.dns()).expect("our names are DNS names");
        let session = ClientConnection::new(self.dialling.current(), name).map_err(wrong)?;
        PeerStream::new(stream, session.into()).shake(deadline)
    }

    /// The same with one who called.
    ///
    /// # Errors
    /// As [`PeerTls::dial`].
    pub fn accept(&self, stream: Arc<TcpStream>, deadline: Instant) -> io::Result<PeerStream> {
        let session = ServerConnection::new(self.accepting.current()).map_err(wrong)?;
        PeerStream::new(stream, session.into()).shake(deadline)
    }
}

// === impl PeerStream ===

impl PeerStream {
    fn new(stream: Arc<TcpStream>, mut session: Connection) -> Self {
        session.set_buffer_limit(Some(OUTBOX_BYTES));
        let inbox = vec![0; INBOX_BYTES].into_boxed_slice();
        Self { stream, session, inbox, inbox_start: 0, inbox_end: 0 }
    }

    fn shake(mut self, deadline: Instant) -> io::Result<Self> {
        let shaken = self.try_shake(deadline);
        if let Err(error) = shaken {
            if error.kind() == ErrorKind::InvalidData {
                self.part(deadline);
            }
            return Err(match error.kind() {
                ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
                _ => error,
            });
        }
        self.wait_for_at_most(None)?;
        Ok(self)
    }

    fn try_shake(&mut self, deadline: Instant) -> io::Result<()> {
        while self.session.is_handshaking() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.wait_for_at_most(Some(left))?;
            self.flush()?;
            if self.session.is_handshaking() && self.session.wants_read() && !self.fetch()? {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        self.flush()
    }

    /// Lets the other side read why: a connection that is closed with bytes unread takes back what it has said.
    fn part(&mut self, deadline: Instant) {
        let _ = self.stream.shutdown(Shutdown::Write);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let waits = !left.is_zero() && self.wait_for_at_most(Some(left)).is_ok();
            if !waits || !matches!((&*self.stream).read(&mut self.inbox), Ok(1..)) {
                return;
            }
        }
    }

    fn wait_for_at_most(&self, wait: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(wait)?;
        self.stream.set_write_timeout(wait)
    }

    /// Decrypts more of what has come; false: the other side has closed the connection.
    fn fetch(&mut self) -> io::Result<bool> {
        if self.inbox_start == self.inbox_end {
            self.inbox_start = 0;
            self.inbox_end = 0;
            self.inbox_end = (&*self.stream).read(&mut self.inbox)?;
            if self.inbox_end == 0 {
                return Ok(false);
            }
        }
        let mut held = &self.inbox[self.inbox_start..self.inbox_end];
        self.session.read_tls(&mut held)?;
        self.inbox_start = self.inbox_end - held.len();
        let taken = self.session.process_new_packets();
        // An answer of the protocol's own, or why it ends here. What the connection does not take goes out with the next bytes.
        let pushed = self.push();
        taken.map_err(wrong)?;
        pushed.map(|()| true)
    }

    /// Hands over what the connection takes now.
    fn push(&mut self) -> io::Result<()> {
        match self.flush() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            pushed => pushed,
        }
    }
}

impl Read for PeerStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                done => return done,
            }
            if !self.fetch()? {
                return Ok(0);
            }
        }
    }
}

impl Write for PeerStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if parts.iter().all(|part| part.is_empty()) {
            return Ok(0);
        }
        let mut taken = self.session.writer().write_vectored(parts)?;
        if taken == 0 {
            // Full of what was not sent: once some of that is, there is room.
            self.push()?;
            taken = self.session.writer().write_vectored(parts)?;
        }
        self.push()?;
        if taken == 0 { Err(ErrorKind::WouldBlock.into()) } else { Ok(taken) }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            if self.session.write_tls(&mut &*self.stream)? == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }
}

fn wrong(error: rustls::Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}
