//! A gRPC server: bound early, with health and reflection, and an end that does not wait for ever.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::response::IntoResponse;
use futures_util::{Stream, StreamExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, HealthService};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use uniarm_tls::ServerTls;

use super::connection::Connection;
use crate::readiness::{Readiness, ReadyState};
use crate::wire::{self, Wire};
use crate::{RuntimeError, Shutdown, trace};

/// Bytes under way on one stream before the service must have read some. HTTP/2's default of 64 KiB
/// would split a dense row of 196 KB into several round trips.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;

/// The same for all streams of one connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// A client that vanished without closing its connection is noticed, and its work freed, after the
/// interval and the timeout. Most losses show at once, as a reset.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Handshakes under way at once; further clients wait for their turn.
const HANDSHAKES_MAX: usize = 256;

/// Calls to these services are not worth a span: they are asked every few seconds.
const UNTRACED_PREFIX: &str = "/grpc.";

#[derive(Debug, Clone)]
pub struct GrpcOptions {
    /// Calls under way on one connection; a client's further calls wait in the client.
    pub streams_max: u32,
    /// A client that has not begun to speak HTTP/2 by then is none, and is dropped.
    pub preface_timeout: Duration,
    /// How long running calls may go on after the shutdown has begun; then they are cut.
    pub drain: Duration,
    /// How it shows who it is and who may come in; without it, anybody may.
    pub tls: Option<ServerTls>,
}

/// A bound server that serves nothing yet. Its port is taken from the first line on, so a process
/// can publish its address before its services exist.
pub struct GrpcServer {
    listener: TcpListener,
    local_addr: SocketAddr,
    options: GrpcOptions,
    routes: Routes,
    services: Vec<&'static str>,
    descriptors: Vec<&'static [u8]>,
    readiness: Readiness,
}

impl Default for GrpcOptions {
    fn default() -> Self {
        Self {
            streams_max: 1024,
            preface_timeout: Duration::from_secs(10),
            drain: Duration::from_secs(30),
            tls: None,
        }
    }
}

impl GrpcServer {
    /// Binds `address` (host:port; port 0 takes any free one). `readiness` is what health answers.
    pub async fn bind(
        address: &str,
        options: GrpcOptions,
        readiness: Readiness,
    ) -> Result<Self, RuntimeError> {
        let bind_error = |source| RuntimeError::Bind { address: address.to_owned(), source };
        let listener = wire::listen(address).await.map_err(bind_error)?;
        let local_addr = listener.local_addr().map_err(bind_error)?;
        Ok(Self {
            listener,
            local_addr,
            options,
            routes: Routes::default(),
            services: Vec::new(),
            descriptors: vec![tonic_health::pb::FILE_DESCRIPTOR_SET],
            readiness,
        })
    }

    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where it is reached, on this machine.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.local_addr)
    }

    /// Adds a generated service. Its message limits are its own (`max_decoding_message_size`).
    #[must_use]
    pub fn add_service<S>(mut self, service: S) -> Self
    where
        S: Service<http::Request<tonic::body::Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: IntoResponse,
        S::Future: Send + 'static,
    {
        self.services.push(S::NAME);
        self.routes = self.routes.add_service(service);
        self
    }

    /// Lets clients ask by reflection for the added services; `descriptors` is an encoded `FileDescriptorSet`.
    #[must_use]
    pub fn add_descriptors(mut self, descriptors: &'static [u8]) -> Self {
        self.descriptors.push(descriptors);
        self
    }

    /// Serves until the shutdown begins, then lets running calls end for `GrpcOptions::drain` and
    /// cuts what is left. When it returns, no connection is open. From the start of the drain,
    /// health answers NOT_SERVING.
    pub async fn serve(self, shutdown: Shutdown) -> Result<(), RuntimeError> {
        let Self { listener, local_addr, options, routes, services, descriptors, readiness } = self;
        let reporter = HealthReporter::new();
        let reflection = reflection_builder(&descriptors, &services);
        let reflection_v1alpha = reflection_builder(&descriptors, &services).build_v1alpha()?;
        let routes = routes
            .add_service(health_server(&reporter))
            .add_service(reflection.build_v1()?)
            .add_service(reflection_v1alpha)
            .prepare();
        let cut = CancellationToken::new();
        let connections = connections(listener, &options, cut.clone());
        let draining = shutdown.token();
        let server = Server::builder()
            .trace_fn(call_span)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(options.streams_max)
            .add_routes(routes)
            .serve_with_incoming_shutdown(connections, draining.clone().cancelled_owned());
        let cut_after_drain = async {
            draining.cancelled().await;
            tokio::time::sleep(options.drain).await;
            tracing::warn!(%local_addr, drain_s = options.drain.as_secs_f32(), "cutting calls that outlived the drain");
            cut.cancel();
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            served = server => served.map_err(|source| RuntimeError::Serve { address: local_addr, source }),
            never = cut_after_drain => match never {},
            never = report_health(reporter, services, readiness, &shutdown) => match never {},
        }
    }
}

/// Connections whose handshake, where there is one, has succeeded. Handshakes do not wait for each other: a client that
/// says nothing holds up nobody.
fn connections(
    listener: TcpListener,
    options: &GrpcOptions,
    cut: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> + use<> {
    let (tls, preface_timeout) = (options.tls.clone(), options.preface_timeout);
    let shaken = TcpIncoming::from(listener).map(move |accepted| {
        let tls = tls.clone();
        async move {
            let stream = accepted?;
            let peer = stream.peer_addr();
            Wire::accept(stream, tls.as_ref()).await.inspect_err(|error| {
                let peer = peer.map_or_else(|_| String::new(), |peer| peer.to_string());
                tracing::warn!(peer, %error, "a connection was refused");
            })
        }
    });
    shaken.buffer_unordered(HANDSHAKES_MAX).filter_map(move |wire| {
        let connection = wire.ok().map(|wire| Ok(Connection::new(wire, &cut, preface_timeout)));
        std::future::ready(connection)
    })
}

fn health_server(reporter: &HealthReporter) -> tonic_health::pb::health_server::HealthServer<HealthService> {
    tonic_health::pb::health_server::HealthServer::new(HealthService::from_health_reporter(reporter.clone()))
}

/// Advertises only what this server serves: a descriptor set describes the services of every role.
fn reflection_builder<'a>(
    descriptors: &[&'a [u8]],
    services: &[&'static str],
) -> tonic_reflection::server::Builder<'a> {
    let mut builder = tonic_reflection::server::Builder::configure();
    for set in descriptors {
        builder = builder.register_encoded_file_descriptor_set(set);
    }
    for name in services {
        builder = builder.with_service_name(*name);
    }
    builder.with_service_name("grpc.health.v1.Health")
}

/// Copies the role's readiness into gRPC health, for the server as a whole ("") and for each service.
async fn report_health(
    reporter: HealthReporter,
    services: Vec<&'static str>,
    readiness: Readiness,
    shutdown: &Shutdown,
) -> Infallible {
    let mut changes = readiness.watch();
    loop {
        let serving = *changes.borrow_and_update() == ReadyState::Ready && !shutdown.has_begun();
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in std::iter::once(&"").chain(&services) {
            reporter.set_service_status(name, status).await;
        }
        if shutdown.has_begun() {
            std::future::pending::<()>().await;
        }
        tokio::select! {
            // `readiness` is held here, so the channel stays open.
            _ = changes.changed() => {}
            () = shutdown.begun() => {}
        }
    }
}

/// The span of one call, a child of the caller's span. Handlers run inside it; what they spawn
/// must be instrumented with `Span::current()`.
fn call_span(request: &http::Request<()>) -> Span {
    let path = request.uri().path();
    if path.starts_with(UNTRACED_PREFIX) {
        return Span::none();
    }
    let path = path.trim_start_matches('/');
    let span = tracing::info_span!("call", otel.name = path, otel.kind = "server");
    trace::extract_headers(request.headers(), &span);
    let (service, method) = path.split_once('/').unwrap_or((path, ""));
    // Only for traces: log lines carry the span's fields, and the name says the same.
    span.set_attribute("rpc.system", "grpc");
    span.set_attribute("rpc.service", service.to_owned());
    span.set_attribute("rpc.method", method.to_owned());
    span
}
