//! The HTTP front door: the bytes of gRPC in OpenAI's terms, errors that name the field, and clients that hang up.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use uniarm_proto::{GuidanceTerm, Input, Transcript};

use crate::harness::{Cluster, PROMPTED, ask, machine, request};

/// A step of a few rows on a slow machine, and a look at the metrics.
const FREED_WITHIN: Duration = Duration::from_secs(3);

const CHAT: &str = "/v1/chat/completions";

pub struct Answered {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// The plainest client that can post. HTTP/1.0 ends a body by closing, so that a stream needs no decoding.
/// `kind`: of the body; more lines of the head may follow it.
fn open(address: &str, path: &str, kind: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

pub fn post_as(address: &str, path: &str, kind: &str, body: &str) -> Answered {
    let mut answer = String::new();
    open(address, path, kind, body).read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answered { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

pub fn post(address: &str, path: &str, body: &Value) -> Answered {
    post_as(address, path, "application/json", &body.to_string())
}

/// The chunks of a stream that ended as it should.
fn chunks(answered: &Answered) -> Vec<Value> {
    assert!(answered.head.contains("content-type: text/event-stream"), "{}", answered.head);
    let mut data: Vec<_> =
        answered.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{}", answered.body);
    data.into_iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
}

/// The texts of a stream's choices, put together; and the ids of their tokens.
fn put_together(chunks: &[Value], answers: usize) -> Vec<(String, Vec<u64>)> {
    let mut texts = vec![(String::new(), Vec::new()); answers];
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let (text, ids) = &mut texts[choice["index"].as_u64().unwrap() as usize];
        let piece = choice["delta"]["content"].as_str().or(choice["text"].as_str());
        text.push_str(piece.unwrap_or(""));
        ids.extend(ids_of(choice));
    }
    texts
}

fn ids_of(choice: &Value) -> Vec<u64> {
    let logprobs = &choice["logprobs"];
    let entries = logprobs["content"].as_array().or(logprobs["uniarm"].as_array());
    let id = |entry: &Value| entry["uniarm"]["id"].as_u64().or(entry["id"].as_u64()).unwrap();
    entries.map(|entries| entries.iter().map(id).collect()).unwrap_or_default()
}

/// One request, as gRPC, whole and as a stream: the same three times.
fn compare(address: &str, path: &str, body: &Value, wanted: &Transcript) {
    let wanted_texts: Vec<_> = wanted
        .choices
        .iter()
        .map(|choice| {
            (choice.text.clone(), choice.tokens.iter().map(|id| u64::from(*id)).collect::<Vec<_>>())
        })
        .collect();
    let usage = wanted.summary.as_ref().unwrap().usage.unwrap();

    let answered = post(address, path, body);
    assert_eq!(answered.status, 200, "{}", answered.body);
    let whole: Value = serde_json::from_str(&answered.body).unwrap();
    let choices = whole["choices"].as_array().unwrap();
    let text = |choice: &Value| {
        let text = choice["message"]["content"].as_str().or(choice["text"].as_str());
        (text.unwrap().to_owned(), ids_of(choice))
    };
    assert_eq!(choices.iter().map(text).collect::<Vec<_>>(), wanted_texts, "{body}");
    assert_eq!(whole["usage"]["completion_tokens"], usage.completion_tokens);
    assert_eq!(whole["usage"]["prompt_tokens"], usage.prompt_tokens);
    let cached = whole["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached <= u64::from(usage.prompt_tokens), "a prompt counts once, whatever the number of answers");
    assert_eq!(whole["uniarm"]["seed"], wanted.started.as_ref().unwrap().seed);

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({ "include_usage": true });
    let chunks = chunks(&post(address, path, &streamed));
    assert_eq!(put_together(&chunks, choices.len()), wanted_texts, "{streamed}");
    assert_eq!(chunks.last().unwrap()["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
    for choice in choices {
        let ends = |end: &&Value| end["index"] == choice["index"] && !end["finish_reason"].is_null();
        let all: Vec<_> = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()).collect();
        let ends: Vec<_> = all.into_iter().filter(ends).collect();
        assert_eq!(ends.len(), 1, "one end for each answer");
        assert_eq!(ends[0]["finish_reason"], choice["finish_reason"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http_has_the_bytes_of_grpc_and_names_the_field_that_is_wrong() {
    let _machine = machine();
    let mut cluster = Cluster::three_processes(&[], &PROMPTED);
    let mut inference = cluster.client().await;
    let address = cluster.http.clone();
    let messages = json!([{ "role": "user", "content": [{ "type": "text", "text": "Tell me about " }, { "type": "text", "text": "the sea." }] }]);
    let prompt = "Tell me about the sea.";

    let mut sampled = request(prompt, &[("concise", 0.3), ("positive", 0.7)]);
    sampled.sampling.temperature = 0.9;
    sampled.sampling.top_p = 0.95;
    sampled.sampling.n = 2;
    sampled.sampling.logprobs = Some(4);
    sampled.guidance[0].strength = 1.5;
    let wanted = ask(&mut inference, sampled).await.unwrap();
    let body = json!({
        "messages": messages, "temperature": 0.9, "top_p": 0.95, "n": 2, "seed": 7, "max_completion_tokens": 16,
        "logprobs": true, "top_logprobs": 3, "user": "somebody",
        "guidance": { "preference": { "positive": 0.7, "concise": 0.3 }, "strength": 1.5 },
    });
    compare(&address, CHAT, &body, &wanted);

    // Two terms, raw text, and an end at a stop string that both have to find.
    let mut raw = request(prompt, &[("positive", 1.0)]);
    raw.input = Input::Prompt("The sea is".into());
    raw.guidance.push(GuidanceTerm { reward: "concise".into(), preference: Vec::new(), strength: -0.5 });
    raw.sampling.logprobs = Some(1);
    let free = ask(&mut inference, raw.clone()).await.unwrap();
    let stop = free.choices[0].text.split_whitespace().nth(3).unwrap().to_owned();
    raw.sampling.stop = vec![stop.clone()];
    let wanted = ask(&mut inference, raw).await.unwrap();
    let body = json!({
        "prompt": "The sea is", "temperature": 0, "seed": 7, "max_tokens": 16, "stop": stop, "logprobs": 0,
        "guidance": [{ "preference": { "positive": 1 } }, { "reward": "concise", "strength": -0.5, "on_loss": "wait" }],
    });
    compare(&address, "/v1/completions", &body, &wanted);

    for (what, change, status, param) in [
        (
            "an unknown objective",
            json!({ "guidance": { "preference": { "positiv": 1 } } }),
            400,
            json!("guidance.preference"),
        ),
        (
            "an unknown reward of a list",
            json!({ "guidance": [{ "reward": "positive" }, { "reward": "nobody" }] }),
            404,
            json!("guidance[1].reward"),
        ),
        ("a model that nobody serves", json!({ "model": "nobody" }), 404, json!("model")),
        ("top_p 0", json!({ "top_p": 0 }), 400, json!("top_p")),
        ("max_tokens 0", json!({ "max_tokens": 0 }), 400, json!("max_tokens")),
        ("a thousand answers", json!({ "n": 1000 }), 400, json!("n")),
        ("thirty alternatives", json!({ "logprobs": true, "top_logprobs": 30 }), 400, json!("top_logprobs")),
        ("no messages", json!({ "messages": [] }), 400, json!("messages")),
        (
            "a prompt over the context",
            json!({ "messages": [{ "role": "user", "content": "word ".repeat(20_000) }] }),
            400,
            json!("messages"),
        ),
        (
            "a field that would change the answer",
            json!({ "logit_bias": { "1": 5 } }),
            400,
            json!("logit_bias"),
        ),
        ("a word that is misspelt", json!({ "temprature": 1 }), 400, json!("temprature")),
        (
            "an image",
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            400,
            json!("messages[0].content[0].type"),
        ),
        ("a deadline that has passed", json!({ "timeout_ms": 0, "stream": false }), 504, Value::Null),
    ] {
        let mut body = json!({ "messages": messages, "max_tokens": 4, "stream": true });
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let answered = post(&address, CHAT, &body);
        assert_eq!(answered.status, status, "{what}: {}", answered.body);
        let error: Value = serde_json::from_str(&answered.body).unwrap();
        assert_eq!(error["error"]["param"], param, "{what}: {error}");
        assert!(answered.head.contains("x-request-id: "), "{what}: {}", answered.head);
    }
    let huge = json!({ "messages": messages, "user": "x".repeat(5 << 20) }).to_string();
    assert_eq!(post_as(&address, CHAT, "application/json", &huge).status, 413);
    assert_eq!(post_as(&address, CHAT, "text/plain", "{}").status, 415, "a page of another site");
    assert_eq!(post(&address, "/v1/nothing", &json!({})).status, 404);
    assert_eq!(post(&address, "/v1/models", &json!({})).status, 405);
    assert!(cluster.router.is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_http_that_hangs_up_ends_its_request_in_the_cluster() {
    let _machine = machine();
    let cluster = Cluster::up(&PROMPTED);
    cluster.client().await;
    let endless = |stream: bool| {
        json!({
            "messages": [{ "role": "user", "content": "Count to a million." }], "max_tokens": 4000, "ignore_eos": true,
            "stream": stream, "guidance": { "preference": { "positive": 1 } },
        })
    };
    let held = || {
        (
            cluster.router.metric("uniarm_router_requests_under_way"),
            cluster.reward().metric("uniarm_reward_sessions"),
        )
    };
    for is_streamed in [true, false] {
        let began = Instant::now();
        let mut leaver = open(&cluster.http, CHAT, "application/json", &endless(is_streamed).to_string());
        if is_streamed {
            let mut some = [0; 400];
            leaver.read_exact(&mut some).unwrap();
            assert!(some.starts_with(b"HTTP/1.0 200"), "{}", String::from_utf8_lossy(&some));
        }
        while held() != (1.0, 1.0) {
            assert!(began.elapsed() < FREED_WITHIN, "the request does not begin");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(leaver);
        let left = Instant::now();
        while held() != (0.0, 0.0) {
            assert!(
                left.elapsed() < FREED_WITHIN,
                "a request goes on without its client; streamed: {is_streamed}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        println!("streamed: {is_streamed}; freed after {:?}", left.elapsed());
    }
}
