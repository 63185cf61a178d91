//! The operators' HTTP server: /metrics, /healthz, /readyz and /debug/steps, on a thread that no engine can starve.

mod steps;

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use uniarm_tls::ServerTls;

use crate::http::{HEAD_TIMEOUT, take};
use crate::metrics::{Exposition, Metrics};
use crate::readiness::{Readiness, ReadyState};
use crate::{RuntimeError, Shutdown};

const THREAD_NAME: &str = "uniarm-admin";

pub struct AdminOptions {
    /// host:port; port 0 takes any free one.
    pub address: String,
    pub metrics: Metrics,
    /// The roles of this process by name. The process is ready when all of them are.
    pub roles: Vec<(&'static str, Readiness)>,
    /// How it shows who it is, and whom it lets in; without it, plain HTTP for everybody.
    pub tls: Option<ServerTls>,
}

/// A running admin server. Dropping it stops it.
pub struct Admin {
    local_addr: SocketAddr,
    stop: Shutdown,
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
        let AdminOptions { address, metrics, roles, tls } = options;
        let bind_error = |source| RuntimeError::Bind { address: address.clone(), source };
        let listener = TcpListener::bind(&address).map_err(bind_error)?;
        listener.set_nonblocking(true).map_err(bind_error)?;
        let local_addr = listener.local_addr().map_err(bind_error)?;
        let thread_error = |source| RuntimeError::Thread { name: THREAD_NAME, source };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(thread_error)?;
        let stop = Shutdown::new();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name(THREAD_NAME.to_owned())
            .spawn(move || runtime.block_on(serve(listener, tls, Pages { metrics, roles }, stopped)))
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
        self.stop.begin();
        if let Some(thread) = self.thread.take() {
            // The server is dropped with its connections, so the thread ends within microseconds.
            let _ = thread.join();
        }
    }
}

impl Pages {
    /// What else there is.
    fn links(&self) -> String {
        let mut page = String::from("<!doctype html><title>uniarm</title><h1>uniarm, for operators</h1><ul>");
        let always = [
            ("/metrics", "metrics, as Prometheus reads them"),
            ("/healthz", "whether the process is alive"),
            ("/readyz", "whether its roles are ready"),
        ];
        let of_engines = [("/debug/steps", "the last steps of its engines")];
        let has_engines = !self.metrics.engines().is_empty();
        for (path, what) in always.into_iter().chain(of_engines.into_iter().filter(|_| has_engines)) {
            write!(page, "<li><a href=\"{path}\">{path}</a>: {what}")
                .expect("writing to a string cannot fail");
        }
        page
    }

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

async fn serve(listener: TcpListener, tls: Option<ServerTls>, pages: Pages, stop: Shutdown) {
    let routes = Router::new()
        .route("/", get(|State(pages): State<Pages>| async move { Html(pages.links()) }))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(|State(pages): State<Pages>| async move { pages.readiness() }))
        .route("/debug/steps", get(steps::page))
        .with_state(pages);
    let listener =
        tokio::net::TcpListener::from_std(listener).expect("the listener was made non-blocking above");
    // Open connections end with the process's wish for them: nobody waits for an operator's.
    drop(take(&listener, tls, routes, HEAD_TIMEOUT, &stop).await);
}

async fn metrics(State(pages): State<Pages>, headers: HeaderMap) -> impl IntoResponse {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let exposition = Exposition::accepted(accept);
    ([(header::CONTENT_TYPE, exposition.content_type())], exposition.write(pages.metrics.encode()))
}
