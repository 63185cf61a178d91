//! Clients that mean harm: what they send is refused or dropped, and whoever means well notices nothing.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream as BlockingStream,
    time::{Duration, Instant},
};

use h2::{Reason, client::SendRequest};
use prost::{Message as _, bytes::Bytes};
use tokio::{io::AsyncReadExt as _, net::TcpStream, time::timeout};
use tonic::codegen::http;
use uniarm_proto::pb;

use crate::{
    harness::{Cluster, PROMPTED, Running, ask, machine, request},
    http::{post, post_as},
};

/// Connections of a client that says nothing, or never ends what it begins.
const SILENT: usize = 400;

/// The router drops a connection that does not begin to speak within 10 s; on a busy machine a little later.
const DROPPED_WITHIN: Duration = Duration::from_secs(30);

/// Streams that are reset as soon as they are begun, on each connection.
const RESETS: usize = 20_000;

/// Memory that a flood may leave behind: buffers that are kept for the next connection.
const GROWTH_KIB_MAX: u64 = 64 << 10;

/// What is left to do after a flood is over: handles are closed, and work that was begun is ended.
const QUIET_WITHIN: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn whoever_means_harm_harms_nobody() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let batches = folder.path().display().to_string();
    let cluster = Cluster::up(&[&PROMPTED[..], &["--batch-dir", &batches]].concat());
    let mut inference = cluster.client().await;
    let asked = request("Describe the sea.", &[("positive", 0.6), ("concise", 0.4)]);
    let undisturbed = ask(&mut inference, asked.clone()).await.unwrap();
    // Once, so that what is kept for good is there before anything is counted.
    reset_rapidly(&cluster.router.address, 100).await;
    let before = Held::of(&cluster.router);

    let silent = silent_connections(&cluster).await;
    let meanwhile = ask(&mut inference, asked.clone()).await.unwrap();
    assert_eq!(meanwhile.choices, undisturbed.choices, "beside {SILENT} silent connections");
    dropped(silent).await;

    let flood = tokio::spawn({
        let address = cluster.router.address.clone();
        async move {
            for _ in 0..4 {
                reset_rapidly(&address, RESETS).await;
            }
        }
    });
    while !flood.is_finished() {
        let meanwhile = ask(&mut inference, asked.clone()).await.unwrap();
        assert_eq!(meanwhile.choices, undisturbed.choices, "during a flood of resets");
    }
    flood.await.unwrap();

    tokio::task::block_in_place(|| {
        bombs_are_not_unpacked(&cluster);
        no_name_leads_out_of_a_folder(&cluster);
        a_head_without_an_end_is_cut(&cluster);
    });
    a_compressed_message_is_refused(&cluster.router.address).await;

    let afterwards = ask(&mut inference, asked).await.unwrap();
    assert_eq!(afterwards.choices, undisturbed.choices, "after all of it");
    is_quiet_again(&cluster.router, &before).await;
}

/// What a process holds.
#[derive(Debug)]
struct Held {
    files: usize,
    resident_kib: u64,
}

// === impl Held ===

impl Held {
    fn of(process: &Running) -> Self {
        let folder = format!("/proc/{}", process.id());
        let status = std::fs::read_to_string(format!("{folder}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        Self {
            files: std::fs::read_dir(format!("{folder}/fd")).unwrap().count(),
            resident_kib: line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap(),
        }
    }
}

/// A third says nothing at all, a third the beginning of HTTP/2, and a third the beginning of a head.
async fn silent_connections(cluster: &Cluster) -> Vec<TcpStream> {
    let mut connections = Vec::new();
    for index in 0..SILENT {
        let (address, said): (_, &[u8]) = match index % 3 {
            0 => (&cluster.router.address, b""),
            1 => (&cluster.router.address, b"PRI * HTTP/2.0\r\n"),
            _ => (&cluster.http, b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nX-Slow: "),
        };
        let connection = TcpStream::connect(address).await.unwrap();
        connection.writable().await.unwrap();
        assert_eq!(connection.try_write(said).unwrap(), said.len());
        connections.push(connection);
    }
    connections
}

/// Those of gRPC within the time that a client has to begin; those of HTTP a little later, which is for the runtime's own test.
async fn dropped(connections: Vec<TcpStream>) {
    for (index, mut connection) in connections.into_iter().enumerate() {
        let mut said = Vec::new();
        // A reset is an end too.
        if index % 3 < 2 {
            let ended = timeout(DROPPED_WITHIN, connection.read_to_end(&mut said)).await;
            assert!(ended.is_ok(), "connection {index} is kept");
        }
    }
}

/// Begins streams and takes them back at once, with and without a whole request, until the server has had enough.
async fn reset_rapidly(address: &str, resets: usize) {
    let tcp = TcpStream::connect(address).await.unwrap();
    let (requests, connection) = h2::client::handshake(tcp).await.unwrap();
    let connection = tokio::spawn(connection);
    for index in 0..resets {
        // The server closes the connection when it is fed up: that is the end of this flood.
        let Ok(mut ready) = requests.clone().ready().await else { break };
        let Ok((_, mut body)) = ready.send_request(call(address), false) else { break };
        if index % 2 == 0 {
            let _ = body.send_data(message(0, &pb::GenerateRequest::default().encode_to_vec()), true);
        }
        body.send_reset(Reason::CANCEL);
    }
    drop(requests);
    let _ = timeout(QUIET_WITHIN, connection).await;
}

fn call(address: &str) -> http::Request<()> {
    let uri = format!("http://{address}/uniarm.v1.Inference/Generate");
    let head = http::Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
    head.body(()).unwrap()
}

/// As gRPC frames it. `compressed`: the flag.
fn message(compressed: u8, bytes: &[u8]) -> Bytes {
    [&[compressed][..], &(bytes.len() as u32).to_be_bytes(), bytes].concat().into()
}

/// Compressed messages were never agreed on, whatever they would unpack to.
async fn a_compressed_message_is_refused(address: &str) {
    let tcp = TcpStream::connect(address).await.unwrap();
    let (requests, connection) = h2::client::handshake(tcp).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut requests: SendRequest<Bytes> = requests.ready().await.unwrap();
    let mut head = call(address);
    head.headers_mut().insert("grpc-encoding", http::HeaderValue::from_static("gzip"));
    let (answer, mut body) = requests.send_request(head, false).unwrap();
    // The answer may come before the message is sent.
    let _ = body.send_data(message(1, &gzip_bomb()), true);
    let answer = answer.await.unwrap();
    let status =
        answer.headers().get("grpc-status").and_then(|status| status.to_str().ok()).map(str::to_owned);
    assert_eq!(status.as_deref(), Some("12"), "{answer:?}");
    connection.abort();
}

/// Zeros that unpack to a hundred megabytes.
fn gzip_bomb() -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let zeros = vec![0; 1 << 20];
    for _ in 0..100 {
        packed.write_all(&zeros).unwrap();
    }
    packed.finish().unwrap()
}

/// What is answered to bytes that the server may not want to read to their end.
fn answer_to(address: &str, head: &str, body: &[u8]) -> String {
    let mut stream = BlockingStream::connect(address).unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.0\r\nHost: here\r\nContent-Type: application/json\r\n{head}\r\n"
    );
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn bombs_are_not_unpacked(cluster: &Cluster) {
    let bomb = gzip_bomb();
    let head = format!("Content-Encoding: gzip\r\nContent-Length: {}\r\n", bomb.len());
    let answer = answer_to(&cluster.http, &head, &bomb);
    assert!(answer.starts_with("HTTP/1.0 415"), "{answer}");
    // One that says how long it would be.
    let answer = answer_to(&cluster.http, "Content-Length: 1000000000000\r\n", b"{");
    assert!(answer.starts_with("HTTP/1.0 413"), "{answer}");
    let nested = "[".repeat(100_000);
    let nested = post_as(&cluster.http, "/v1/chat/completions", "application/json", &nested);
    assert_eq!(nested.status, 400, "{}", nested.body);
}

fn no_name_leads_out_of_a_folder(cluster: &Cluster) {
    for name in
        ["../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "/etc/passwd", "file-../../x", ".", "%00"]
    {
        for path in [
            format!("/v1/files/{name}/content"),
            format!("/v1/files/{name}"),
            format!("/v1/batches/{name}"),
            format!("/{name}"),
        ] {
            let answer = crate::harness::http_get(&cluster.http, &path);
            let status = answer.split(' ').nth(1).unwrap_or_default();
            assert!(["400", "404", "405"].contains(&status), "{path}: {answer}");
            assert!(!answer.contains("root:"), "{path}: {answer}");
        }
        let body = serde_json::json!({ "model": name, "messages": [{ "role": "user", "content": "Hi" }] });
        assert_eq!(post(&cluster.http, "/v1/chat/completions", &body).status, 404, "{name}");
        let guided = serde_json::json!({
            "messages": [{ "role": "user", "content": "Hi" }], "guidance": { "reward": name, "preference": {} }
        });
        assert_eq!(post(&cluster.http, "/v1/chat/completions", &guided).status, 404, "{name}");
        let batch = serde_json::json!({
            "input_file_id": name, "endpoint": "/v1/chat/completions", "completion_window": "24h"
        });
        let refused = post(&cluster.http, "/v1/batches", &batch);
        assert!([400, 404].contains(&refused.status), "{name}: {}", refused.body);
    }
}

fn a_head_without_an_end_is_cut(cluster: &Cluster) {
    let mut stream = BlockingStream::connect(&cluster.http).unwrap();
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nHost: here\r\n").unwrap();
    let line = format!("X-More: {}\r\n", "x".repeat(1000));
    // The server answers or closes long before a megabyte.
    let sent = (0..1000).take_while(|_| stream.write_all(line.as_bytes()).is_ok()).count();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(sent < 1000 || answer.starts_with("HTTP/1.1 4"), "{sent} lines, {answer}");
}

async fn is_quiet_again(router: &Running, before: &Held) {
    let began = Instant::now();
    loop {
        let now = Held::of(router);
        // A connection or two of this test's own clients come and go.
        if now.files <= before.files + 4 && now.resident_kib <= before.resident_kib + GROWTH_KIB_MAX {
            return println!("before {before:?}, afterwards {now:?}");
        }
        assert!(began.elapsed() < QUIET_WITHIN + DROPPED_WITHIN, "before {before:?}, now {now:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
