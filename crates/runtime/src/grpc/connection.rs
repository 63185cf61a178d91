//! A server's connection that can be cut: tonic waits for connections at the end, however long they last.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::wire::Wire;

/// Length of what a client of HTTP/2 begins with (RFC 9113, 3.4).
const PREFACE_BYTES: usize = 24;

/// A connection whose reads fail once its token is cancelled, or when its client does not begin to speak HTTP/2 in time:
/// both make the server drop it. What comes after the beginning, keepalive looks after.
pub(super) struct Connection {
    stream: Wire,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    preface: Option<Preface>,
}

/// A beginning that is not complete.
struct Preface {
    missing: usize,
    late: Pin<Box<Sleep>>,
}

impl Connection {
    pub(super) fn new(stream: Wire, cut: &CancellationToken, preface_timeout: Duration) -> Self {
        let preface = Preface { missing: PREFACE_BYTES, late: Box::pin(sleep(preface_timeout)) };
        Self { stream, cut: Box::pin(cut.clone().cancelled_owned()), preface: Some(preface) }
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.tcp().connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // HTTP/2 always has a read pending, so the cancellation reaches an idle connection too.
        if self.cut.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Some(preface) = &mut self.preface {
            preface.missing = preface.missing.saturating_sub(buffer.filled().len() - before);
            if preface.missing == 0 {
                self.preface = None;
            } else if preface.late.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
