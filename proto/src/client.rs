//! Client constructors: one way to dial, with the limits and socket options that the services expect.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::{
    limits::{REQUEST_MESSAGE_BYTES_MAX, WORKER_MESSAGE_BYTES_MAX},
    pb::{
        base_client::BaseClient, inference_client::InferenceClient, membership_client::MembershipClient,
        reward_client::RewardClient,
    },
};

/// A peer that does not answer the dial within this is treated as away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A silent peer is asked for a sign of life after the interval, and is lost when it gives none within the timeout: a
/// process that hangs costs its streams at most the sum. Shorter would lose peers whose machine is merely busy.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// HTTP/2 window of worker streams: a few dense rows in flight.
const WORKER_WINDOW_BYTES: u32 = 8 << 20;

/// Where to dial: `host:port`, or a whole URI.
///
/// # Errors
/// When the address is not a URI.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    Ok(Endpoint::from_shared(uri)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WORKER_WINDOW_BYTES)
        .initial_connection_window_size(WORKER_WINDOW_BYTES))
}

pub fn inference(channel: Channel) -> InferenceClient<Channel> {
    InferenceClient::new(channel)
        .max_encoding_message_size(REQUEST_MESSAGE_BYTES_MAX)
        .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
}

pub fn base(channel: Channel) -> BaseClient<Channel> {
    BaseClient::new(channel)
        .max_encoding_message_size(WORKER_MESSAGE_BYTES_MAX)
        .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
}

pub fn reward(channel: Channel) -> RewardClient<Channel> {
    RewardClient::new(channel)
        .max_encoding_message_size(WORKER_MESSAGE_BYTES_MAX)
        .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
}

pub fn membership(channel: Channel) -> MembershipClient<Channel> {
    MembershipClient::new(channel)
}
