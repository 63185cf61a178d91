//! What bytes pass on their way between two ranks: the bare connection, or something over it that nobody else reads.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::TcpStream,
    sync::Arc,
    time::Instant,
};

/// One end of a connection. While the group forms, the connection blocks; later it does not, and then:
///
/// - `read` is `WouldBlock` only where nothing that has come could be returned;
/// - `write` may take bytes that the connection has not, and `flush` is `WouldBlock` until it has all of them.
pub trait Wire: Read + Write + Send {}

impl<T: Read + Write + Send> Wire for T {}

/// How ranks make sure of each other before they say a word. Both may block until the deadline.
pub trait Wires: Send + Sync {
    /// To one who was called.
    ///
    /// # Errors
    /// `InvalidData`, when the other is not who it should be; others, when it is not there.
    fn dial(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>>;

    /// From one who called.
    ///
    /// # Errors
    /// As [`Wires::dial`].
    fn accept(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>>;
}

/// Whoever is there is believed, and whoever listens may read.
pub struct Bare;

struct BareWire(Arc<TcpStream>);

// === impl Bare ===

impl Wires for Bare {
    fn dial(&self, stream: &Arc<TcpStream>, _deadline: Instant) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(BareWire(Arc::clone(stream))))
    }

    fn accept(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>> {
        self.dial(stream, deadline)
    }
}

// === impl BareWire ===

impl Read for BareWire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self.0).read_vectored(buffers)
    }
}

impl Write for BareWire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self.0).write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
