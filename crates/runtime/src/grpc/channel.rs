//! Client channels with the settings that the servers of this crate expect.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use super::{CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, STREAM_WINDOW_BYTES};
use crate::RuntimeError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A channel to `address`, which is host:port or http://host:port. It connects with the first call
/// and again after a loss, so this never waits. Call inside a tokio runtime.
pub fn channel(address: &str) -> Result<Channel, RuntimeError> {
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(uri)
        .map_err(|source| RuntimeError::Address { address: address.to_owned(), source })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy())
}
