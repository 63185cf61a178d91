//! The HTTP server of a front door: bound early, and with an end that does not wait for ever.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::serve::ListenerExt as _;
use tokio::net::TcpListener;
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::{RuntimeError, Shutdown, trace};

/// A bound server that serves nothing yet.
pub struct HttpServer {
    listener: TcpListener,
    local_addr: SocketAddr,
    drain: Duration,
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
        let listener = TcpListener::bind(address).await.map_err(bind_error)?;
        let local_addr = listener.local_addr().map_err(bind_error)?;
        Ok(Self { listener, local_addr, drain, routes: Router::new() })
    }

    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    #[must_use]
    pub fn with_routes(self, routes: Router) -> Self {
        Self { routes, ..self }
    }

    /// Serves until the shutdown begins, then lets running calls end for as long as the drain. What is left ends with
    /// the process: unlike a gRPC connection, one of HTTP/1.1 carries one call, and there is nobody to tell.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, shutdown: Shutdown) -> Result<(), RuntimeError> {
        let Self { listener, local_addr, drain, routes } = self;
        let listener = listener.tap_io(|connection| {
            // Tokens are small and each one counts; where it cannot be set, they come a little later.
            let _ = connection.set_nodelay(true);
        });
        let server = axum::serve(listener, routes.layer(from_fn(traced)))
            .with_graceful_shutdown(shutdown.token().cancelled_owned());
        let drained = async {
            shutdown.begun().await;
            tokio::time::sleep(drain).await;
        };
        tokio::select! {
            served = server => served.map_err(|source| RuntimeError::ServeHttp { address: local_addr, source }),
            () = drained => {
                tracing::warn!(%local_addr, drain_s = drain.as_secs_f32(), "leaving calls that outlived the drain");
                Ok(())
            }
        }
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
