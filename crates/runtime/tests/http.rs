//! Connections of a front door: silent ones are closed, busy ones are not, and a shutdown waits for calls.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::{Router, routing::get};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use uniarm_runtime::Shutdown;
use uniarm_runtime::http::HttpServer;

const HEAD_TIMEOUT: Duration = Duration::from_millis(500);

/// Until a limit has surely been enforced, on a machine that is busy with something else.
const LONGEST: Duration = Duration::from_secs(30);

const REQUEST: &[u8] = b"GET /quick HTTP/1.1\r\nHost: here\r\n\r\n";

async fn start() -> (SocketAddr, Shutdown, tokio::task::JoinHandle<()>) {
    let slow = || async {
        sleep(3 * HEAD_TIMEOUT).await;
        "at last"
    };
    let routes = Router::new().route("/quick", get(|| async { "quick" })).route("/slow", get(slow));
    let server = HttpServer::bind("127.0.0.1:0", LONGEST).await.unwrap();
    let server = server.with_routes(routes).with_head_timeout(HEAD_TIMEOUT);
    let (address, shutdown) = (server.local_addr(), Shutdown::new());
    (address, shutdown.clone(), tokio::spawn(server.serve(shutdown)))
}

/// What the server sends until it closes the connection.
async fn until_closed(stream: &mut TcpStream) -> String {
    let mut said = Vec::new();
    // A reset is an end too.
    let _ = timeout(LONGEST, stream.read_to_end(&mut said)).await.expect("it is closed in time");
    String::from_utf8(said).unwrap()
}

#[tokio::test]
async fn a_connection_that_sends_no_whole_head_is_closed() {
    let (address, _shutdown, _serving) = start().await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(until_closed(&mut silent).await, "");

    let mut dawdler = TcpStream::connect(address).await.unwrap();
    let began = Instant::now();
    // A byte now and then does not buy time.
    for byte in REQUEST.iter().cycle() {
        if dawdler.write_all(&[*byte]).await.is_err() || *byte == b'\r' {
            break;
        }
        sleep(HEAD_TIMEOUT / 10).await;
        assert!(began.elapsed() < LONGEST, "it may dawdle for ever");
    }
    assert!(!until_closed(&mut dawdler).await.contains("quick"));
}

#[tokio::test]
async fn a_connection_that_is_kept_for_nothing_is_closed_and_one_that_waits_for_its_answer_is_not() {
    let (address, _shutdown, _serving) = start().await;
    let mut kept = TcpStream::connect(address).await.unwrap();
    kept.write_all(REQUEST).await.unwrap();
    let said = until_closed(&mut kept).await;
    assert!(said.starts_with("HTTP/1.1 200") && said.ends_with("quick"), "{said}");

    let mut waiting = TcpStream::connect(address).await.unwrap();
    waiting.write_all(b"GET /slow HTTP/1.1\r\nHost: here\r\n\r\n").await.unwrap();
    let said = until_closed(&mut waiting).await;
    assert!(said.ends_with("at last"), "{said}");
}

#[tokio::test]
async fn a_shutdown_waits_for_calls_and_not_for_idle_connections() {
    let (address, shutdown, serving) = start().await;
    let _idle = TcpStream::connect(address).await.unwrap();
    let mut calling = TcpStream::connect(address).await.unwrap();
    calling.write_all(b"GET /slow HTTP/1.1\r\nHost: here\r\n\r\n").await.unwrap();
    // It has the request before it is told to stop.
    sleep(HEAD_TIMEOUT).await;
    shutdown.begin();
    assert!(until_closed(&mut calling).await.ends_with("at last"));
    timeout(LONGEST / 2, serving).await.expect("idle connections are closed").unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}
