//! Three real etcd nodes that are one store: nodes are killed and started again on their data, and disks run full.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;
use uniarm_cluster::testing::etcd_binary;

use crate::harness::Host;

pub const NODES: usize = 3;

/// Three nodes elect a leader on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A node without the others answers nothing, and says so late.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What etcd's database may hold: little, so that it is soon full.
const QUOTA_BYTES: usize = 32 << 20;

/// One value of what fills it: etcd takes requests of up to 1.5 MB.
const FILLING_BYTES: usize = 1 << 20;

/// Keys of the filling; no key of ours begins so.
const FILLING: &str = "filling/";

pub struct EtcdTrio {
    binary: PathBuf,
    nodes: Vec<Node>,
}

struct Node {
    name: String,
    host: Host,
    /// host:port
    client: String,
    peer: String,
    folder: TempDir,
    child: Option<Child>,
}

// === impl EtcdTrio ===

impl EtcdTrio {
    /// A running store without data, a node on each host.
    pub fn start(hosts: [Host; NODES]) -> Self {
        let binary = etcd_binary().expect("a fleet needs etcd");
        let nodes = hosts.into_iter().enumerate().map(|(number, host)| {
            let (client, peer) = (host.free_address(), host.free_address());
            let folder = tempfile::tempdir().unwrap();
            Node { name: format!("etcd-{number}"), host, client, peer, folder, child: None }
        });
        let mut trio = Self { binary, nodes: nodes.collect() };
        (0..NODES).for_each(|node| trio.start_node(node));
        trio.wait_until_it_answers();
        trio
    }

    /// The store's address, as `--store` takes it.
    pub fn address(&self) -> String {
        let clients: Vec<&str> = self.nodes.iter().map(|node| node.client.as_str()).collect();
        format!("etcd://{}", clients.join(","))
    }

    /// Starts it on its data, and does not wait for it.
    pub fn start_node(&mut self, node: usize) {
        let peers: Vec<String> =
            self.nodes.iter().map(|node| format!("{}=http://{}", node.name, node.peer)).collect();
        let node = &mut self.nodes[node];
        assert!(node.child.is_none(), "{} is running", node.name);
        let (client, peer) = (format!("http://{}", node.client), format!("http://{}", node.peer));
        let log = std::fs::File::create(node.folder.path().join("log")).unwrap();
        let child = node
            .host
            .command(&self.binary)
            .args(["--name", &node.name, "--data-dir"])
            .arg(node.folder.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(",")])
            .args(["--quota-backend-bytes", &QUOTA_BYTES.to_string()])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        node.child = Some(child.unwrap());
    }

    pub fn kill_node(&mut self, node: usize) {
        let mut child = self.nodes[node].child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Until a majority has a leader and answers of what it has agreed on.
    pub fn wait_until_it_answers(&self) {
        let began = Instant::now();
        let read = json!({ "key": BASE64_STANDARD.encode("any") });
        while self.call("/v3/kv/range", &read).is_none_or(|answer| answer["header"].is_null()) {
            assert!(began.elapsed() < START_TIMEOUT, "etcd does not answer:\n{}", self.logs());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Writes until etcd says that its database is as large as it may be: from there on it takes no write.
    pub fn fill(&self) {
        let value = BASE64_STANDARD.encode(vec![b'x'; FILLING_BYTES]);
        for number in 0..2 * QUOTA_BYTES / FILLING_BYTES {
            let put = json!({ "key": BASE64_STANDARD.encode(format!("{FILLING}{number}")), "value": value });
            let answer = self.call("/v3/kv/put", &put).unwrap_or_default();
            if answer["error"].as_str().is_some_and(|error| error.contains("space exceeded")) {
                return;
            }
        }
        panic!("etcd takes more than its quota");
    }

    /// What an operator does: old data goes, its room is given back, and the alarm ends.
    pub fn make_room(&self) {
        let (first, last) = (BASE64_STANDARD.encode(FILLING), BASE64_STANDARD.encode("filling0"));
        let deleted = self.call("/v3/kv/deleterange", &json!({ "key": first, "range_end": last })).unwrap();
        let revision = &deleted["header"]["revision"];
        self.call("/v3/kv/compaction", &json!({ "revision": revision, "physical": true })).unwrap();
        for node in &self.nodes {
            node.call("/v3/maintenance/defragment", &json!({})).unwrap();
        }
        let alarms = self.call("/v3/maintenance/alarm", &json!({ "action": "GET" })).unwrap();
        for alarm in alarms["alarms"].as_array().into_iter().flatten() {
            let off = json!({ "action": "DEACTIVATE", "memberID": alarm["memberID"], "alarm": "NOSPACE" });
            self.call("/v3/maintenance/alarm", &off).unwrap();
        }
    }

    /// By the first node that answers.
    fn call(&self, path: &str, body: &Value) -> Option<Value> {
        self.nodes.iter().filter(|node| node.child.is_some()).find_map(|node| node.call(path, body))
    }

    fn logs(&self) -> String {
        let log = |node: &Node| std::fs::read_to_string(node.folder.path().join("log")).unwrap_or_default();
        self.nodes.iter().map(log).collect::<Vec<_>>().join("\n\n")
    }
}

// === impl Node ===

impl Node {
    /// etcd's own gateway speaks JSON: a test needs no client of its own.
    fn call(&self, path: &str, body: &Value) -> Option<Value> {
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.client).ok()?;
        stream.set_read_timeout(Some(CALL_TIMEOUT)).unwrap();
        let head = format!("POST {path} HTTP/1.0\r\nHost: {}\r\nContent-Length: {}", self.client, body.len());
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
