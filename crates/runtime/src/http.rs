//! The HTTP server of a front door: bound early, closed to connections that say nothing, and with an end that does not
//! wait for ever.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use uniarm_tls::ServerTls;

use crate::wire::{self, Wire};
use crate::{RuntimeError, Shutdown, trace};

/// A connection has sent the whole head of its next request within this, counted from when it was opened or its last
/// answer ended, or it is closed: one that sends a byte now and then, or nothing at all, holds memory for nothing.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the system gives no connection, it is asked again after this long: mostly too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// A bound server that serves nothing yet.
pub struct HttpServer {
    listener: TcpListener,
    local_addr: SocketAddr,
    drain: Duration,
    head_timeout: Duration,
    tls: Option<ServerTls>,
    routes: Router,
}

// === impl HttpServer ===

impl HttpServer {
    /// Binds `address` (host:port; port 0 takes any free one). `drain`: how long running calls may go on after the
    /// shutdown has begun.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn bind(address: &str, drain: Duration) -> Result<Self, RuntimeError> {
        let bind_error = |source| RuntimeError::Bind { address: address.to_owned(), source };
        let listener = wire::listen(address).await.map_err(bind_error)?;
        let local_addr = listener.local_addr().map_err(bind_error)?;
        Ok(Self { listener, local_addr, drain, head_timeout: HEAD_TIMEOUT, tls: None, routes: Router::new() })
    }

    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where it is reached, on this machine.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.local_addr)
    }

    #[must_use]
    pub fn with_routes(self, routes: Router) -> Self {
        Self { routes, ..self }
    }

    /// How it shows who it is; without it, over plain TCP.
    #[must_use]
    pub fn with_tls(self, tls: Option<ServerTls>) -> Self {
        Self { tls, ..self }
    }

    /// How long a connection may take for the head of its next request.
    #[must_use]
    pub fn with_head_timeout(self, head_timeout: Duration) -> Self {
        Self { head_timeout, ..self }
    }

    /// Serves until the shutdown begins, then lets running calls end for as long as the drain. What is left ends with
    /// the process: unlike a gRPC connection, one of HTTP/1.1 carries one call, and there is nobody to tell.
    pub async fn serve(self, shutdown: Shutdown) {
        let Self { listener, local_addr, drain, head_timeout, tls, routes } = self;
        let routes = routes.layer(from_fn(traced));
        let mut connections = take(&listener, tls, routes, head_timeout, &shutdown).await;
        drop(listener);
        let ended = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(drain, ended).await.is_err() {
            tracing::warn!(%local_addr, drain_s = drain.as_secs_f32(), "leaving calls that outlived the drain");
        }
    }
}

/// Takes connections until the shutdown begins, and returns those that are open then. Dropping these ends them.
pub(crate) async fn take(
    listener: &TcpListener,
    tls: Option<ServerTls>,
    routes: Router,
    head_timeout: Duration,
    shutdown: &Shutdown,
) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.begun() => return connections,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (tls, routes, shutdown) = (tls.clone(), routes.clone(), shutdown.clone());
                    connections.spawn(async move {
                        match Wire::accept(stream, tls.as_ref()).await {
                            Ok(wire) => connection(wire, routes, head_timeout, shutdown).await,
                            Err(error) => tracing::debug!(%error, "no TLS handshake"),
                        }
                    });
                }
                Err(error) => {
                    let local_addr = listener.local_addr().map_or_else(|_| String::new(), |own| own.to_string());
                    tracing::warn!(local_addr, %error, "no connection can be taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// Serves one connection to its end, or to the end of its call once the shutdown has begun.
async fn connection(wire: Wire, routes: Router, head_timeout: Duration, shutdown: Shutdown) {
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .serve_connection(TokioIo::new(wire), TowerToHyperService::new(routes));
    tokio::pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = shutdown.begun() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        // Clients that hang up, and those that were closed for their silence.
        tracing::debug!(%error, "a connection ended early");
    }
}

/// The span of one call, a child of the caller's span.
async fn traced(request: Request, next: Next) -> Response {
    let name = format!("{} {}", request.method(), request.uri().path());
    let span = tracing::info_span!("call", otel.name = name, otel.kind = "server");
    trace::extract_headers(request.headers(), &span);
    // Only for traces: log lines carry the span's fields, and the name says the same.
    span.set_attribute("http.request.method", request.method().to_string());
    span.set_attribute("url.path", request.uri().path().to_owned());
    next.run(request).instrument(span).await
}
