//! The hub against a server of our own that speaks as much of its protocol as we use, and can misbehave.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A repository `org/name`, served on a port of this machine.
#[derive(Clone)]
struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    /// Files described by SHA-256 and served from another host, as the hub does with weights.
    large: Vec<String>,
    /// Connections that end after so many bytes of a large file, one after the other.
    cuts: Vec<usize>,
    ignores_ranges: bool,
    damages: bool,
    sha: Option<String>,
    /// Answers every question with this.
    status: Option<u16>,
    /// `METHOD path range authorization`, in order.
    log: Vec<String>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { port: listener.local_addr().unwrap().port(), state: Arc::default() };
        let accepting = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let server = accepting.clone();
                std::thread::spawn(move || server.answer(&stream.unwrap()));
            }
        });
        server
    }

    /// A repository of two shards, small files, and weights in a format that is not ours.
    fn with_model() -> Self {
        let server = Self::start();
        let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        server.put("config.json", b"{}", false);
        server.put("tokenizer.json", b"{\"version\": \"1.0\"}", false);
        server.put("model.safetensors.index.json", index.as_bytes(), false);
        server.put("model-1.safetensors", &noise(300_000, 1), true);
        server.put("model-2.safetensors", &noise(100_000, 2), true);
        server.put("pytorch_model.bin", b"not wanted", true);
        server.put("README.md", b"not wanted", false);
        server
    }

    fn put(&self, name: &str, bytes: &[u8], large: bool) {
        let mut state = self.state.lock().unwrap();
        state.files.insert(name.to_owned(), bytes.to_vec());
        if large {
            state.large.push(name.to_owned());
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// Requests so far that contain a word.
    fn requests(&self, word: &str) -> Vec<String> {
        let state = self.state.lock().unwrap();
        state.log.iter().filter(|request| request.contains(word)).cloned().collect()
    }

    fn hub(&self, cache: &Path) -> Hub {
        let token = Some("secret".to_owned());
        let client =
            Client::new(&format!("http://127.0.0.1:{}", self.port), token, Duration::from_millis(1), false);
        Hub { client, cache: cache.to_owned(), offline: false }
    }

    fn answer(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
                break;
            }
            lines.push(line.trim().to_lowercase());
        }
        let Some(request) = lines.first() else { return };
        let header = |name: &str| lines.iter().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        let mut words = request.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let range = header("range").unwrap_or("-");
        let authorization = header("authorization").unwrap_or("-");
        let start = range.strip_prefix("bytes=").and_then(|range| range.trim_end_matches('-').parse().ok());

        let mut state = self.state.lock().unwrap();
        state.log.push(format!("{method} {path} {range} {authorization}"));
        let (head, body) = state.respond(&method, &path, start.unwrap_or(0), self.port);
        let keep = if path.starts_with("/cdn/") && !state.cuts.is_empty() {
            state.cuts.remove(0)
        } else {
            body.len()
        };
        drop(state);
        let mut stream = stream;
        // A client that has enough may hang up.
        let _ = stream.write_all(format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes());
        let _ = stream.write_all(&body[..keep.min(body.len())]);
    }
}

impl State {
    /// Status line with headers, and body.
    fn respond(&self, method: &str, path: &str, start: usize, port: u16) -> (String, Vec<u8>) {
        if let Some(status) = self.status {
            return (format!("{status} Refused\r\nContent-Length: 0"), Vec::new());
        }
        if path.starts_with("/api/") {
            let sha = self.sha.as_deref().unwrap_or(COMMIT);
            let files: Vec<_> =
                self.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
            let body = serde_json::json!({ "sha": sha, "siblings": files }).to_string().into_bytes();
            return (format!("200 OK\r\nContent-Length: {}", body.len()), body);
        }
        let name = path.rsplit('/').next().unwrap().to_owned();
        let Some(bytes) = self.files.get(&name) else {
            return ("404 Not Found\r\nContent-Length: 0".to_owned(), Vec::new());
        };
        let sha256: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        if self.large.contains(&name) && !path.starts_with("/cdn/") {
            let size = bytes.len();
            return (
                format!(
                    "302 Found\r\nContent-Length: 0\r\nX-Linked-ETag: \"{sha256}\"\r\nX-Linked-Size: {size}\r\n\
                     Location: http://localhost:{port}/cdn/{name}"
                ),
                Vec::new(),
            );
        }
        let mut body = bytes.clone();
        if self.damages {
            body[0] ^= 1;
        }
        let size = body.len();
        let etag = &sha256[..40];
        if method == "head" {
            return (format!("200 OK\r\nETag: \"{etag}\"\r\nContent-Length: {size}"), Vec::new());
        }
        if self.ignores_ranges || start == 0 {
            return (format!("200 OK\r\nContent-Length: {size}"), body);
        }
        let (rest, last) = (size - start, size - 1);
        let head =
            format!("206 Partial\r\nContent-Length: {rest}\r\nContent-Range: bytes {start}-{last}/{size}");
        (head, body.split_off(start))
    }
}

fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

fn address(text: &str) -> Address {
    Address::parse(text).unwrap()
}

fn read(path: PathBuf) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[test]
fn addresses_name_revision_and_file_and_nothing_else() {
    let plain = address("HuggingFaceTB/SmolLM2-135M-Instruct");
    assert_eq!(
        (plain.repository.as_str(), plain.revision.as_str()),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "main")
    );
    let full = address("org/name@v1.0/q4/model.Q4_K_M.gguf");
    assert_eq!((full.revision.as_str(), full.file.as_deref()), ("v1.0", Some("q4/model.Q4_K_M.gguf")));
    assert_eq!(full.name(), "model.Q4_K_M");
    for wrong in
        ["", "name", "org/", "../name", "org/..", "org/name@../x", "org/name/../../x.gguf", "org/name/x.bin"]
    {
        assert!(Address::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_repository_is_fetched_once_and_only_what_is_needed() {
    let server = Server::with_model();
    let cache = tempfile::tempdir().unwrap();
    let folder = server.hub(cache.path()).fetch(&address("org/name")).unwrap();

    assert_eq!(folder, cache.path().join("models--org--name/snapshots").join(COMMIT));
    assert_eq!(read(folder.join("model-1.safetensors")), noise(300_000, 1));
    assert_eq!(read(folder.join("model-2.safetensors")), noise(100_000, 2));
    assert_eq!(read(folder.join("config.json")), b"{}");
    assert!(fs::symlink_metadata(folder.join("config.json")).unwrap().is_symlink());
    assert_eq!(weight_files(&folder).unwrap().len(), 2);
    assert!(server.requests("pytorch").is_empty() && server.requests("readme").is_empty());

    let before = server.requests("").len();
    assert_eq!(server.hub(cache.path()).fetch(&address("org/name")).unwrap(), folder);
    assert_eq!(server.requests("").len(), before + 1, "a second fetch asks only where the branch is");
    let commit = address(&format!("org/name@{COMMIT}"));
    assert_eq!(server.hub(cache.path()).fetch(&commit).unwrap(), folder);
    assert_eq!(server.requests("").len(), before + 1, "a commit never changes");
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let server = Server::with_model();
    let cache = tempfile::tempdir().unwrap();
    server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    assert!(server.requests("/cdn/").iter().all(|request| request.ends_with(" -")));
    assert!(server.requests("/resolve/").iter().all(|request| request.ends_with(" bearer secret")));
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let server = Server::with_model();
    server.change(|state| state.cuts = vec![70_000, 0, 120_000]);
    let cache = tempfile::tempdir().unwrap();
    let folder = server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    assert_eq!(read(folder.join("model-1.safetensors")), noise(300_000, 1));
    let ranges: Vec<String> = server
        .requests("get /cdn/model-1")
        .iter()
        .map(|request| request.split(' ').nth(2).unwrap().to_owned())
        .collect();
    assert_eq!(ranges, ["bytes=0-", "bytes=70000-", "bytes=70000-", "bytes=190000-"]);
}

#[test]
fn a_killed_process_leaves_a_part_that_the_next_one_completes() {
    let server = Server::with_model();
    let cache = tempfile::tempdir().unwrap();
    let bytes = noise(300_000, 1);
    let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let blobs = cache.path().join("models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{sha256}.part")), &bytes[..200_000]).unwrap();

    let folder = server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    assert_eq!(read(folder.join("model-1.safetensors")), bytes);
    assert_eq!(server.requests("get /cdn/model-1.safetensors bytes=200000-").len(), 1);
}

#[test]
fn a_server_that_knows_no_ranges_starts_again() {
    let server = Server::with_model();
    server.change(|state| (state.ignores_ranges, state.cuts) = (true, vec![70_000]));
    let cache = tempfile::tempdir().unwrap();
    let folder = server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    assert_eq!(read(folder.join("model-1.safetensors")), noise(300_000, 1));
}

#[test]
fn a_line_that_is_always_cut_is_given_up() {
    let server = Server::with_model();
    server.change(|state| state.cuts = vec![0; 100]);
    let cache = tempfile::tempdir().unwrap();
    let error = server.hub(cache.path()).fetch(&address("org/name")).unwrap_err().to_string();
    assert!(error.contains("model-1.safetensors"), "{error}");
}

#[test]
fn a_damaged_download_is_refused_and_not_kept() {
    let server = Server::with_model();
    server.change(|state| state.damages = true);
    server.put("config.json", b"{}", true);
    let cache = tempfile::tempdir().unwrap();
    let error = server.hub(cache.path()).fetch(&address("org/name")).unwrap_err().to_string();
    assert!(error.contains("SHA-256") && error.contains("config.json"), "{error}");
    let kept = fs::read_dir(cache.path().join("models--org--name/blobs")).unwrap().count();
    assert_eq!(kept, 0);
}

#[test]
fn offline_means_the_cache_or_a_sentence() {
    let server = Server::with_model();
    let cache = tempfile::tempdir().unwrap();
    let offline = || Hub { offline: true, ..server.hub(cache.path()) };
    let error = offline().fetch(&address("org/name")).unwrap_err().to_string();
    assert!(error.contains("offline") && server.requests("").is_empty(), "{error}");

    let folder = server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    let before = server.requests("").len();
    assert_eq!(offline().fetch(&address("org/name")).unwrap(), folder);
    assert_eq!(server.requests("").len(), before);

    // A shard that is gone makes the model incomplete, not half a model.
    fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    assert!(offline().fetch(&address("org/name")).is_err());
}

#[test]
fn a_hub_that_is_away_leaves_the_cached_model() {
    let server = Server::with_model();
    let cache = tempfile::tempdir().unwrap();
    let folder = server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    server.change(|state| state.status = Some(503));
    assert_eq!(server.hub(cache.path()).fetch(&address("org/name")).unwrap(), folder);
    assert!(server.hub(cache.path()).fetch(&address("org/other")).is_err());
}

#[test]
fn a_refusal_says_what_to_do_and_is_not_repeated() {
    for (status, word) in [(401, "HF_TOKEN"), (404, "no such model")] {
        let server = Server::start();
        server.change(|state| state.status = Some(status));
        let cache = tempfile::tempdir().unwrap();
        let error = server.hub(cache.path()).fetch(&address("org/name")).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(server.requests("").len(), 1);
    }
}

#[test]
fn two_processes_fetch_a_model_once() {
    let server = Server::with_model();
    let cache = tempfile::tempdir().unwrap();
    let fetch = || server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    let folders = std::thread::scope(|scope| {
        let threads = [scope.spawn(fetch), scope.spawn(fetch)];
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(folders[0], folders[1]);
    assert_eq!(server.requests("get /cdn/model-1").len(), 1);
}

#[test]
fn a_repository_of_gguf_files_wants_one_named() {
    let server = Server::start();
    server.put("small.gguf", b"small", true);
    let cache = tempfile::tempdir().unwrap();
    let path = server.hub(cache.path()).fetch(&address("org/name")).unwrap();
    assert_eq!(read(path), b"small");

    server.put("large.gguf", b"large", true);
    let error = server.hub(cache.path()).fetch(&address("org/name")).unwrap_err().to_string();
    assert!(error.contains("large.gguf") && error.contains("small.gguf"), "{error}");
    let path = server.hub(cache.path()).fetch(&address("org/name/large.gguf")).unwrap();
    assert_eq!(read(path), b"large");
}

#[test]
fn a_hostile_hub_cannot_lead_out_of_the_cache() {
    let server = Server::with_model();
    server.change(|state| state.sha = Some("../../../../outside".to_owned()));
    let cache = tempfile::tempdir().unwrap();
    assert!(server.hub(cache.path()).fetch(&address("org/name")).is_err());

    let server = Server::with_model();
    let index = r#"{"weight_map": {"a": "../../../outside.safetensors"}}"#;
    server.put("model.safetensors.index.json", index.as_bytes(), false);
    let error = server.hub(cache.path()).fetch(&address("org/name")).unwrap_err().to_string();
    assert!(error.contains("not a plain file name"), "{error}");
}
