//! gRPC transport as every role uses it: one server with health and reflection, one way to connect to it.

mod channel;
mod connection;
mod server;

use std::time::Duration;

pub use channel::channel;
pub use server::{GrpcOptions, GrpcServer};

/// Longest message that a service accepts, in bytes: a dense row of f32 logits over a vocabulary of
/// 256,000 is 1 MB, and one message carries the rows of a whole step. Set it on the generated
/// services and clients (`max_decoding_message_size`); tonic's own default is 4 MiB.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Bytes under way on one stream before the receiver must have read some. HTTP/2's default of
/// 64 KiB would split a dense row of 196 KB into several round trips.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;

/// The same for all streams of one connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// A peer that vanished without closing its connection is noticed after the interval and the
/// timeout: 15 s. Most losses show at once, as a reset.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
