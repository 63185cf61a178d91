//! Serving gRPC as tonic's own server does, except for what that leaves to chance or to the machine's clock: the order in
//! which it looks at what is ready at the same moment, and the date in its answers.

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::{Pin, pin},
    time::Duration,
};

use hyper::{Request, Response, body::Incoming, service::Service as HyperService};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, codegen::Service as _, metadata::MetadataMap, service::Routes};
use uniarm_proto::deadline;

use crate::network::Socket;

/// As the servers' of real processes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// What tonic tells a client whose request has no answer when its time is over.
const TIME_OVER: &str = "Timeout expired";

/// One connection's way to the services.
struct Shell {
    routes: Routes,
}

/// Serves until it is told to leave or nobody can connect any more, and then until all connections have ended.
pub async fn serve(
    routes: Routes,
    mut connections: mpsc::UnboundedReceiver<io::Result<Socket>>,
    leaving: CancellationToken,
) {
    let (routes, mut open, ending) = (routes.prepare(), JoinSet::new(), CancellationToken::new());
    loop {
        let connection = tokio::select! {
            biased;
            () = leaving.cancelled() => break,
            connection = connections.recv() => connection,
        };
        let Some(Ok(socket)) = connection else { break };
        open.spawn(serve_connection(socket, Shell { routes: routes.clone() }, ending.clone()));
    }
    drop(connections);
    ending.cancel();
    open.join_all().await;
}

async fn serve_connection(socket: Socket, shell: Shell, ending: CancellationToken) {
    let mut builder = Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(Some(KEEPALIVE_INTERVAL))
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(socket), shell));
    let mut is_told = false;
    loop {
        tokio::select! {
            biased;
            // Its errors are those of the wire, and its streams have heard of them.
            _ = &mut connection => return,
            () = ending.cancelled(), if !is_told => {
                connection.as_mut().graceful_shutdown();
                is_told = true;
            }
        }
    }
}

// === impl Shell ===

impl HyperService<Request<Incoming>> for Shell {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let mut routes = self.routes.clone();
        let metadata = MetadataMap::from_headers(request.headers().clone());
        let limit = deadline::timeout(&metadata).ok().flatten();
        let answer = routes.call(request.map(Body::new));
        Box::pin(async move {
            let Some(limit) = limit else { return answer.await };
            let over = || Status::cancelled(TIME_OVER).into_http();
            timeout(limit, answer).await.unwrap_or_else(|_| Ok(over()))
        })
    }
}
