//! The operators' HTTP server: /metrics, /healthz and /readyz, on a thread that no engine can starve.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio_util::sync::CancellationToken;

use crate::RuntimeError;
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::readiness::{Readiness, ReadyState};

const THREAD_NAME: &str = "uniarm-admin";

pub struct AdminOptions {
    /// host:port; port 0 takes any free one.
    pub address: String,
    pub metrics: Metrics,
    /// The roles of this process by name. The process is ready when all of them are.
    pub roles: Vec<(&'static str, Readiness)>,
}

/// A running admin server. Dropping it stops it.
pub struct Admin {
    local_addr: SocketAddr,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct Pages {
    metrics: Metrics,
    roles: Vec<(&'static str, Readiness)>,
}

impl Admin {
    /// Binds at once, so that a taken port is an error of the caller, then serves on its own thread.
    pub fn start(options: AdminOptions) -> Result<Self, RuntimeError> {
        let AdminOptions { address, metrics, roles } = options;
        let bind_error = |source| RuntimeError::Bind { address: address.clone(), source };
        let listener = TcpListener::bind(&address).map_err(bind_error)?;
        listener.set_nonblocking(true).map_err(bind_error)?;
        let local_addr = listener.local_addr().map_err(bind_error)?;
        let thread_error = |source| RuntimeError::Thread { name: THREAD_NAME, source };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(thread_error)?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name(THREAD_NAME.to_owned())
            .spawn(move || runtime.block_on(serve(listener, Pages { metrics, roles }, stopped)))
            .map_err(thread_error)?;
        Ok(Self { local_addr, stop, thread: Some(thread) })
    }

    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // The server is dropped with its connections, so the thread ends within microseconds.
            let _ = thread.join();
        }
    }
}

impl Pages {
    /// 200 and one line for each role, or 503 as soon as one role is not ready.
    fn readiness(&self) -> (StatusCode, String) {
        let mut status = StatusCode::OK;
        let mut page = String::new();
        for (role, readiness) in &self.roles {
            let line = match readiness.state() {
                ReadyState::Ready => writeln!(page, "{role}: ready"),
                ReadyState::NotReady(reason) => {
                    status = StatusCode::SERVICE_UNAVAILABLE;
                    writeln!(page, "{role}: {reason}")
                }
            };
            line.expect("writing to a string cannot fail");
        }
        (status, page)
    }
}

async fn serve(listener: TcpListener, pages: Pages, stop: CancellationToken) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(|State(pages): State<Pages>| async move { pages.readiness() }))
        .with_state(pages);
    let listener =
        tokio::net::TcpListener::from_std(listener).expect("the listener was made non-blocking above");
    tokio::select! {
        served = async { axum::serve(listener, router).await } => {
            tracing::error!(?served, "the admin server ended by itself");
        }
        () = stop.cancelled() => {}
    }
}

async fn metrics(State(pages): State<Pages>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], pages.metrics.encode())
}
