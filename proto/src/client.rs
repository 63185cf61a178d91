//! Client constructors: one way to dial, with the limits and socket options that the services expect.

use std::{
    future::Future,
    io,
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tonic::{
    codegen::{Service, http::Uri},
    metadata::{Ascii, MetadataMap, MetadataValue},
    transport::{Channel, Endpoint, Error},
};

use uniarm_tls::ClientTls;

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

const HTTP: &str = "http";
const HTTPS: &str = "https";

/// HTTP/2 window of worker streams: a few dense rows in flight.
const WORKER_WINDOW_BYTES: u32 = 8 << 20;

/// How channels come about: over TCP, over TLS, or over a network that a test puts in its place.
#[derive(Clone, Default)]
pub struct Dialer {
    /// For addresses without a scheme, and for `http://`.
    network: Option<Network>,
    /// For `https://`.
    doors: Option<Network>,
}

/// A connection of such a network.
pub trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

pub type Dialling = Pin<Box<dyn Future<Output = io::Result<Box<dyn Wire>>> + Send>>;

#[derive(Clone)]
struct Network {
    dial: Arc<dyn Fn(&str) -> Dialling + Send + Sync>,
}

/// What a client shows at the door. It prints as nothing that could be used.
#[derive(Debug, Clone)]
pub struct ApiKey(MetadataValue<Ascii>);

/// An address as it is dialled, `http://host:port` or `https://host:port`: a scheme that is neither would otherwise carry keys in
/// plain text, and what stands behind the port would be nobody's.
///
/// # Errors
/// What is wrong with it.
pub fn address(text: &str) -> Result<String, String> {
    let (scheme, host) = text.split_once("://").unwrap_or((HTTP, text));
    let scheme = scheme.to_ascii_lowercase();
    let host = host.trim_end_matches('/');
    if scheme != HTTP && scheme != HTTPS {
        return Err(format!("has the scheme {scheme:?}, wants http:// or https://"));
    }
    if host.is_empty() || host.contains(['/', '?', '#', '@']) || host.contains(char::is_whitespace) {
        return Err("wants a host and a port alone, as http://127.0.0.1:7000".to_owned());
    }
    Ok(format!("{scheme}://{host}"))
}

/// Where to dial: `host:port`, or an [`address`].
///
/// # Errors
/// When the address is none.
pub fn endpoint(text: &str) -> Result<Endpoint, Error> {
    // What is no address is no URI either, with its blanks.
    let uri = address(text).unwrap_or_else(|reason| format!("{text}: {reason}"));
    Ok(Endpoint::from_shared(uri)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WORKER_WINDOW_BYTES)
        .initial_connection_window_size(WORKER_WINDOW_BYTES))
}

// === impl ApiKey ===

impl ApiKey {
    /// Puts it where routers look for it.
    pub fn sign(&self, metadata: &mut MetadataMap) {
        metadata.insert("authorization", self.0.clone());
    }
}

impl FromStr for ApiKey {
    type Err = &'static str;

    fn from_str(key: &str) -> Result<Self, Self::Err> {
        let value = format!("Bearer {}", key.trim()).parse();
        let mut value: MetadataValue<Ascii> = value.map_err(|_| "wants visible ASCII characters")?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

// === impl Dialer ===

impl Dialer {
    /// `dial` gets `host:port`.
    pub fn over(dial: impl Fn(&str) -> Dialling + Send + Sync + 'static) -> Self {
        Self { network: Some(Network { dial: Arc::new(dial) }), doors: None }
    }

    /// Between the processes of a cluster that know each other by certificates.
    #[must_use]
    pub fn mutual(tls: ClientTls) -> Self {
        Self { network: Some(Network::tls(tls)), doors: None }
    }

    /// Of a client: `https://` addresses are front doors that show who they are.
    #[must_use]
    pub fn of_front_doors(tls: ClientTls) -> Self {
        Self { network: None, doors: Some(Network::tls(tls)) }
    }

    /// A channel that connects when it is used, and again whenever it has to.
    ///
    /// # Errors
    /// When the address is not a URI.
    pub fn channel(&self, address: &str) -> Result<Channel, Error> {
        let (endpoint, network) = self.way(address)?;
        Ok(match network {
            None => endpoint.connect_lazy(),
            Some(network) => endpoint.connect_with_connector_lazy(network),
        })
    }

    /// A channel that is connected.
    ///
    /// # Errors
    /// When the address is not a URI, or nobody answers there.
    pub async fn connect(&self, address: &str) -> Result<Channel, Error> {
        let (endpoint, network) = self.way(address)?;
        match network {
            None => endpoint.connect().await,
            Some(network) => endpoint.connect_with_connector(network).await,
        }
    }

    fn way(&self, text: &str) -> Result<(Endpoint, Option<Network>), Error> {
        let address = address(text).unwrap_or_default();
        let Some((HTTPS, host)) = address.split_once("://") else {
            return Ok((endpoint(text)?, self.network.clone()));
        };
        let doors =
            self.doors.clone().or_else(|| ClientTls::of_front_doors(None, None).ok().map(Network::tls));
        // Of TLS the endpoint knows nothing: the connection that it gets has it.
        Ok((endpoint(&with_port(host))?, doors))
    }
}

/// `host:port` of what follows `https://`, whose port is 443 where it says none.
fn with_port(host: &str) -> String {
    let has_port =
        host.rsplit_once(':').is_some_and(|(_, port)| port.bytes().all(|digit| digit.is_ascii_digit()));
    if has_port { host.to_owned() } else { format!("{host}:443") }
}

// === impl Network ===

impl Network {
    fn tls(tls: ClientTls) -> Self {
        let dial = move |address: &str| -> Dialling {
            let (tls, address) = (tls.clone(), address.to_owned());
            Box::pin(async move {
                let stream = TcpStream::connect(&address).await?;
                stream.set_nodelay(true)?;
                let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
                Ok(Box::new(tls.connect(host, stream).await?) as Box<dyn Wire>)
            })
        };
        Self { dial: Arc::new(dial) }
    }
}

impl Service<Uri> for Network {
    type Response = TokioIo<Box<dyn Wire>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, address: Uri) -> Self::Future {
        let wire = (self.dial)(address.authority().map_or("", |authority| authority.as_str()));
        Box::pin(async move { Ok(TokioIo::new(wire.await?)) })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_known_scheme_and_nothing_behind_the_port() {
        assert_eq!(address("127.0.0.1:7000").as_deref(), Ok("http://127.0.0.1:7000"));
        assert_eq!(address("HTTPS://router.example/").as_deref(), Ok("https://router.example"));
        assert_eq!(address("http://[::1]:7000").as_deref(), Ok("http://[::1]:7000"));
        for (wrong, reason) in [
            ("htps://127.0.0.1:7000", "\"htps\""),
            ("ftp://127.0.0.1:7000", "\"ftp\""),
            ("http://me:key@127.0.0.1:7000", "alone"),
            ("http://127.0.0.1:7000/v1", "alone"),
            ("127.0.0.1:7000?x", "alone"),
            ("http://", "alone"),
            ("", "alone"),
        ] {
            let said = address(wrong).unwrap_err();
            assert!(said.contains(reason), "{wrong}: {said}");
            assert!(endpoint(wrong).is_err(), "{wrong}");
            assert!(Dialer::default().channel(wrong).is_err(), "{wrong}");
        }
    }
}
