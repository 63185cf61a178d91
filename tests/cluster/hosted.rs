//! Files and batches that a router keeps: killed again and again, it goes on with them.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    harness::{Cluster, PROMPTED, Running, free_address, http_get, machine},
    http::{post, post_as},
};

const LINES: usize = 24;

/// The batch on a machine that is busy with something else.
const LONGEST: Duration = Duration::from_secs(600);

/// A site whose pages may ask.
const CORS: [&str; 2] = ["--http-cors", "https://example.org"];

/// Kills of the router.
const KILLS: u64 = 3;

fn lines() -> String {
    let line = |index: usize| {
        let body = json!({
            "messages": [{ "role": "user", "content": format!("Say {index}.") }], "max_tokens": 8 + index,
            "logprobs": index.is_multiple_of(2), "guidance": { "preference": { "concise": 1 }, "strength": 0.5 },
        });
        let url = "/v1/chat/completions";
        json!({ "custom_id": format!("r{index}"), "method": "POST", "url": url, "body": body }).to_string()
            + "\n"
    };
    (0..LINES).map(line).collect()
}

fn body_of(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn get(address: &str, path: &str) -> Value {
    serde_json::from_str(body_of(&http_get(address, path))).unwrap()
}

fn upload(address: &str, text: &str) -> String {
    let form = format!(
        "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
         --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n{text}\r\n--b--\r\n"
    );
    let answered = post_as(address, "/v1/files", "multipart/form-data; boundary=b", &form);
    assert_eq!(answered.status, 200, "{}", answered.body);
    let file: Value = serde_json::from_str(&answered.body).unwrap();
    assert_eq!(file["bytes"], text.len());
    file["id"].as_str().unwrap().to_owned()
}

/// Waits until the batch has more than so many answers, or is over.
fn after(address: &str, path: &str, answers: u64) -> Value {
    let began = Instant::now();
    loop {
        let batch = get(address, path);
        let is_over =
            !["validating", "in_progress", "finalizing"].contains(&batch["status"].as_str().unwrap());
        if is_over || batch["request_counts"]["completed"].as_u64().unwrap() > answers {
            return batch;
        }
        assert!(began.elapsed() < LONGEST, "it stays {batch}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn pages_of_the_named_site_may_ask_and_no_others(address: &str) {
    let ask = |origin: &str, head: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "{head} HTTP/1.0\r\nHost: {address}\r\nOrigin: {origin}\r\n").unwrap();
        let asked = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: x-stainless-os";
        write!(stream, "{asked}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.to_ascii_lowercase()
    };
    let allowed = ask("https://example.org", "OPTIONS /v1/chat/completions");
    assert!(allowed.starts_with("http/1.0 204"), "{allowed}");
    assert!(allowed.contains("access-control-allow-origin: https://example.org"), "{allowed}");
    assert!(allowed.contains("access-control-allow-headers: x-stainless-os"), "{allowed}");
    let listed = ask("https://example.org", "GET /v1/models");
    assert!(listed.contains("access-control-allow-origin: https://example.org"), "{listed}");
    for answer in [
        ask("https://example.com", "OPTIONS /v1/chat/completions"),
        ask("https://example.com", "GET /v1/models"),
    ] {
        assert!(!answer.contains("access-control-") && answer.contains("vary: origin"), "{answer}");
    }
    assert!(ask("https://example.com", "POST /v1/files").starts_with("http/1.0 403"));
}

#[test]
fn a_router_that_is_killed_goes_on_with_its_batch_to_the_same_bytes() {
    let _machine = machine();
    let cluster = Cluster::three_processes(&[], &PROMPTED);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let off = get(&cluster.http, "/v1/batches");
    assert!(off["error"]["message"].as_str().unwrap().contains("keeps no files"), "{off}");

    std::fs::write(folder.join("in.jsonl"), lines()).unwrap();
    let asked = Command::new(env!("CARGO_BIN_EXE_uniarm"))
        .args(["batch", "in.jsonl", "--output", "whole.jsonl", "--endpoint"])
        .arg(format!("http://{}", cluster.router.address))
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));

    let (http, kept) = (free_address(), folder.join("kept").display().to_string());
    let (base, reward) = (&cluster.base().address, &cluster.reward().address);
    let peers = ["--base-peer", base, "--reward-peer", reward];
    let mut router = Running::start(
        "router",
        &[&peers[..], &["--http-listen", &http, "--batch-dir", &kept], &CORS].concat(),
    );
    pages_of_the_named_site_may_ask_and_no_others(&http);
    let input = upload(&http, &lines());
    let asked =
        json!({ "input_file_id": input, "endpoint": "/v1/chat/completions", "completion_window": "24h" });
    let created = post(&http, "/v1/batches", &asked);
    assert_eq!(created.status, 200, "{}", created.body);
    let created: Value = serde_json::from_str(&created.body).unwrap();
    let path = format!("/v1/batches/{}", created["id"].as_str().unwrap());
    let mut answers = Vec::new();
    for kill in 0..KILLS {
        let batch = after(&http, &path, answers.last().copied().unwrap_or(0));
        answers.push(batch["request_counts"]["completed"].as_u64().unwrap());
        thread::sleep(Duration::from_millis(50 * kill));
        router.kill();
        router.restart();
    }
    println!("answers at each kill: {answers:?}");
    let batch = after(&http, &path, LINES as u64);
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({ "total": LINES, "completed": LINES, "failed": 0 }));
    let content = format!("/v1/files/{}/content", batch["output_file_id"].as_str().unwrap());
    let whole = std::fs::read_to_string(folder.join("whole.jsonl")).unwrap();
    assert!(body_of(&http_get(&http, &content)) == whole, "it differs after kills at {answers:?}");
    assert_eq!(batch["error_file_id"], Value::Null);

    // The last router counts what it has asked itself.
    let [jobs, left, answered, failed] =
        ["jobs", "requests_left", "requests_answered_total", "requests_failed_total"]
            .map(|name| router.metric(&format!("uniarm_batch_{name}")) as u64);
    assert_eq!((jobs, left, failed), (0, 0, 0));
    let kept = answers.last().copied().unwrap();
    assert!((1..=LINES as u64 - kept).contains(&answered), "{answered} after {kept} were kept");
}
