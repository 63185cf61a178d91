//! Who may ask, and for what: keys, limits, names and preference floors, over gRPC and HTTP alike, and whatever somebody
//! may try against them.

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tonic::{Code, Request};
use uniarm_proto::{
    GenerateRequest, GuidanceTerm, OnRewardLoss, Priority, Transcript,
    client::ApiKey,
    pb::{self, inference_client::InferenceClient},
};

use crate::{
    harness::{Cluster, PROMPTED, http_get_as, machine, request},
    http::post_as,
};

const CHAT: &str = "/v1/chat/completions";

/// The file of tenants is looked at every two seconds.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(10);

/// A key and its line of the file, as `uniarm keys new` makes them.
pub struct Key {
    pub key: String,
    hash: String,
}

pub fn new_key() -> Key {
    let made = Command::new(env!("CARGO_BIN_EXE_uniarm")).args(["keys", "new", "--json"]).output().unwrap();
    assert!(made.status.success());
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    Key { key: made["key"].as_str().unwrap().into(), hash: made["hash"].as_str().unwrap().into() }
}

pub fn tenant(name: &str, keys: &[&Key], more: &str) -> String {
    let keys: Vec<_> = keys.iter().map(|key| format!("{:?}", key.hash)).collect();
    format!("[[tenants]]\nname = \"{name}\"\nkeys = [{}]\n{more}\n", keys.join(", "))
}

fn bearer(key: &str) -> String {
    format!("Authorization: Bearer {key}\r\n")
}

/// Status, and the body as JSON.
fn get(cluster: &Cluster, path: &str, key: &str) -> (u16, Value) {
    let answer = http_get_as(&cluster.http, path, &bearer(key));
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap_or(Value::Null))
}

fn post(cluster: &Cluster, key: &str, more: &Value) -> (u16, Value) {
    let mut body =
        json!({ "messages": [{ "role": "user", "content": "Hi!" }], "max_tokens": 4, "temperature": 0 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let head = format!("application/json\r\nAuthorization: Bearer {key}");
    let answered = post_as(&cluster.http, CHAT, &head, &body.to_string());
    (answered.status, serde_json::from_str(&answered.body).unwrap())
}

fn error(answered: &(u16, Value)) -> (u16, &str, &str) {
    let (status, body) = answered;
    let word = |name: &str| body["error"][name].as_str().unwrap_or("");
    (*status, word("code"), word("param"))
}

pub fn signed<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    key.parse::<ApiKey>().unwrap().sign(request.metadata_mut());
    request
}

pub async fn ask(
    inference: &mut InferenceClient<tonic::transport::Channel>,
    key: &str,
    request: GenerateRequest,
) -> Result<Transcript, tonic::Status> {
    let asked = signed(pb::GenerateRequest::from(request), key);
    let mut events = inference.generate(asked).await?.into_inner();
    let mut transcript = Transcript::default();
    while let Some(response) = events.message().await? {
        transcript.apply(&response.event.unwrap()).unwrap();
    }
    Ok(transcript)
}

fn write(path: &Path, text: &str) {
    // As Kubernetes does it: never half a file.
    let fresh = path.with_extension("fresh");
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(fresh, path).unwrap();
}

#[test]
fn a_tenant_gets_what_it_may_have_and_nobody_else_gets_anything() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tenants.toml");
    let [free, narrow, floored, limited, audited] = std::array::from_fn(|_| new_key());
    let tenants = [
        tenant("free", &[&free], ""),
        tenant("narrow", &[&narrow], "reward_models = [\"concise\"]\npriority = \"normal\""),
        tenant("floored", &[&floored], "[tenants.floors]\npositive = 0.5"),
        tenant("limited", &[&limited], "requests_per_minute = 2\ntokens_per_minute = 100"),
        tenant("audited", &[&audited], "audit = true"),
    ];
    write(&file, &tenants.concat());
    let kept = folder.path().join("kept").display().to_string();
    let flags = ["--tenants", file.to_str().unwrap(), "--batch-dir", &kept];
    let cluster = Cluster::up(&[&PROMPTED[..], &flags].concat());

    nobody_comes_in_without_a_key(&cluster);
    what_a_tenant_may_not_use_is_not_there_for_it(&cluster, &narrow.key);
    files_and_batches_belong_to_their_tenant(&cluster, &free.key, &narrow.key);
    a_tenant_that_has_had_its_share_is_told_when_there_is_more(&cluster, &limited.key);
    // Its records have to be kept, and this router keeps none.
    assert_eq!(error(&post(&cluster, &audited.key, &json!({}))), (400, "invalid_argument", "audit"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(floors_hold_whatever_is_tried(&cluster, &floored.key, &free.key));
    keys_change_while_streams_run(&cluster, &file, &tenants, (&free, &narrow));
}

fn nobody_comes_in_without_a_key(cluster: &Cluster) {
    let stranger = new_key().key;
    for key in ["", "x", stranger.as_str(), &"k".repeat(5000)] {
        for path in ["/v1/models", "/v1/models/concise", "/status", "/v1/files", "/v1/batches", "/v1/nothing"]
        {
            assert_eq!(error(&get(cluster, path, key)), (401, "unauthenticated", ""), "{path}");
        }
        assert_eq!(error(&post(cluster, key, &json!({}))), (401, "unauthenticated", ""));
    }
    let bare = http_get_as(&cluster.http, "/v1/models", "").to_ascii_lowercase();
    assert!(bare.contains("www-authenticate: bearer"), "{bare}");
    let basic = http_get_as(&cluster.http, "/v1/models", "Authorization: Basic dTpw\r\n");
    assert!(basic.starts_with("HTTP/1.1 401"), "{basic}");
    // The page asks for a key itself.
    for path in ["/", "/health", "/openapi.json", "/playground/main.js"] {
        assert!(http_get_as(&cluster.http, path, "").starts_with("HTTP/1.1 200"), "{path}");
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut inference = uniarm_proto::client::inference(cluster.channel().await);
        let refused = inference.list_models(pb::ListModelsRequest {}).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        let refused = ask(&mut inference, &stranger, request("Hi!", &[])).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        let mut status = pb::status_client::StatusClient::new(cluster.channel().await);
        assert_eq!(status.report(pb::ReportRequest {}).await.unwrap_err().code(), Code::Unauthenticated);
    });
}

fn what_a_tenant_may_not_use_is_not_there_for_it(cluster: &Cluster, key: &str) {
    let (status, listed) = get(cluster, "/v1/models", key);
    let rewards =
        listed["data"].as_array().unwrap().iter().filter(|model| model["uniarm"]["role"] == "reward");
    let rewards: Vec<_> = rewards.map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!((status, rewards), (200, vec!["concise"]));
    let (status, seen) = get(cluster, "/status", key);
    let seen = seen.to_string();
    assert_eq!(status, 200);
    assert!(seen.contains("\"concise\"") && !seen.contains("positive"), "{seen}");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let report = runtime.block_on(async {
        let mut status = pb::status_client::StatusClient::new(cluster.channel().await);
        status.report(signed(pb::ReportRequest {}, key)).await.unwrap().into_inner()
    });
    let seen: Vec<_> = report.members.into_iter().filter_map(|seen| seen.member).collect();
    assert!(seen.iter().all(|member| member.address.is_empty()), "{seen:?}");
    let rewards: Vec<_> =
        seen.iter().flat_map(|member| &member.reward_models).map(|reward| &reward.name).collect();
    assert_eq!(rewards, ["concise"]);
    let guided = |preference: Value| post(cluster, key, &json!({ "guidance": { "preference": preference } }));
    assert_eq!(guided(json!({ "concise": 1 })).0, 200);
    let refused = guided(json!({ "positive": 1 }));
    assert_eq!(error(&refused), (400, "invalid_argument", "guidance.preference"));
    let named = post(cluster, key, &json!({ "guidance": { "reward": "positive" } }));
    assert_eq!(error(&named), (404, "not_found", "guidance.reward"));
    assert!(!named.1["error"]["message"].as_str().unwrap().contains("Served: concise, positive"));
    let hurried = post(cluster, key, &json!({ "priority": "high" }));
    assert_eq!(error(&hurried), (403, "permission_denied", "priority"));
}

fn files_and_batches_belong_to_their_tenant(cluster: &Cluster, owner: &str, other: &str) {
    let line = json!({ "custom_id": "a", "method": "POST", "url": CHAT, "body": {
        "messages": [{ "role": "user", "content": "Hi!" }], "max_tokens": 4 } });
    let form = format!(
        "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
         --b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n{line}\n\r\n--b--\r\n"
    );
    let kind = |kind: &str, key: &str| format!("{kind}\r\nAuthorization: Bearer {key}");
    let multipart = kind("multipart/form-data; boundary=b", owner);
    let uploaded: Value =
        serde_json::from_str(&post_as(&cluster.http, "/v1/files", &multipart, &form).body).unwrap();
    assert_eq!(uploaded.get("owner"), None, "{uploaded}");
    let file = format!("/v1/files/{}", uploaded["id"].as_str().unwrap());
    assert_eq!(get(cluster, &file, owner).0, 200);
    for path in [&file, &format!("{file}/content")] {
        assert_eq!(error(&get(cluster, path, other)).0, 404);
    }
    let batch = |key: &str| {
        let body = json!({ "input_file_id": uploaded["id"], "endpoint": CHAT, "completion_window": "24h" });
        let answered =
            post_as(&cluster.http, "/v1/batches", &kind("application/json", key), &body.to_string());
        (answered.status, serde_json::from_str::<Value>(&answered.body).unwrap())
    };
    assert_eq!(error(&batch(other)), (404, "not_found", "input_file_id"));
    let (status, created) = batch(owner);
    assert_eq!(status, 200, "{created}");
    let path = format!("/v1/batches/{}", created["id"].as_str().unwrap());
    assert_eq!(get(cluster, &path, other).0, 404);
    let cancelled = post_as(&cluster.http, &format!("{path}/cancel"), &kind("application/json", other), "");
    assert_eq!(cancelled.status, 404);
    for list in ["/v1/batches", "/v1/files"] {
        assert_eq!(get(cluster, list, other).1["data"], json!([]));
        assert_eq!(get(cluster, list, owner).1["data"].as_array().unwrap().len(), 1);
    }
    let began = Instant::now();
    let ended = loop {
        let (_, batch) = get(cluster, &path, owner);
        if batch["status"] == "completed" {
            break batch;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "it stays {batch}");
        thread::sleep(Duration::from_millis(50));
    };
    let output = format!("/v1/files/{}/content", ended["output_file_id"].as_str().unwrap());
    assert_eq!((get(cluster, &output, owner).0, get(cluster, &output, other).0), (200, 404));
}

fn a_tenant_that_has_had_its_share_is_told_when_there_is_more(cluster: &Cluster, key: &str) {
    let much = post(cluster, key, &json!({ "max_tokens": 60, "n": 2 }));
    assert_eq!(error(&much), (403, "permission_denied", "max_tokens"));
    assert_eq!(post(cluster, key, &json!({})).0, 200);
    assert_eq!(post(cluster, key, &json!({ "max_tokens": 90 })).0, 200);
    assert_eq!(error(&post(cluster, key, &json!({}))), (429, "tenant_rate", ""));
    let body = json!({ "messages": [{ "role": "user", "content": "Hi!" }], "max_tokens": 4 }).to_string();
    let head = format!("application/json\r\nAuthorization: Bearer {key}");
    let refused = post_as(&cluster.http, CHAT, &head, &body);
    assert!(refused.head.contains("retry-after: "), "{}", refused.head);
}

async fn floors_hold_whatever_is_tried(cluster: &Cluster, key: &str, free: &str) {
    let mut inference = uniarm_proto::client::inference(cluster.channel().await);
    let both = |positive: f32, concise: f32| {
        let preference = [("positive", positive), ("concise", concise)];
        GenerateRequest { priority: Priority::Normal, ..request("Hi!", &preference) }
    };
    let allowed = ask(&mut inference, key, both(0.5, 0.5)).await.unwrap();
    // Who asks does not change what is written.
    let same = ask(&mut inference, free, both(0.5, 0.5)).await.unwrap();
    assert_eq!(allowed.choices[0].tokens, same.choices[0].tokens);
    assert!(ask(&mut inference, free, both(0.0, 1.0)).await.is_ok(), "the floor is another tenant's");

    let with = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = both(0.9, 0.1);
        change(&mut request);
        request
    };
    let term = |objective: &str, strength: f32| GuidanceTerm {
        reward: objective.to_owned(),
        preference: vec![(objective.to_owned(), 1.0)],
        strength,
    };
    for tried in [
        both(0.4, 0.6),
        both(0.0, 1.0),
        request("Hi!", &[]),
        with(&|request| request.guidance[0].strength = -1.0),
        with(&|request| request.guidance[0].strength = 0.0),
        with(&|request| request.guidance[0].strength = 0.01),
        with(&|request| request.base_strength = 5.0),
        with(&|request| request.guidance.push(term("positive", -1.0))),
        with(&|request| request.guidance.push(term("concise", 5.0))),
        with(&|request| request.on_reward_loss = OnRewardLoss::Unguided),
    ] {
        let said = format!("{:?} {:?} {}", tried.guidance, tried.on_reward_loss, tried.base_strength);
        let refused = ask(&mut inference, key, tried).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{said}: {refused}");
    }
    // A name that is none has no weight, and is refused as it always is.
    for name in ["Positive", "positive ", "p\u{43e}sitive"] {
        let refused = ask(&mut inference, key, request("Hi!", &[(name, 1.0)])).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{name:?}: {refused}");
    }
    // What has begun elsewhere is asked the same.
    let mut resumed = pb::GenerateRequest::from(both(0.0, 1.0));
    resumed.sampling.as_mut().unwrap().seed = Some(1);
    resumed.resume = vec![pb::AnswerSoFar { choice: 0, ids: vec![1, 2], ..Default::default() }];
    let refused = inference.generate(signed(resumed, key)).await.unwrap_err();
    assert!(matches!(refused.code(), Code::PermissionDenied | Code::InvalidArgument), "{refused}");
}

/// A second key beside the first, then the first away: nobody who has one of the two notices.
fn keys_change_while_streams_run(
    cluster: &Cluster,
    file: &Path,
    tenants: &[String],
    (old, kept): (&Key, &Key),
) {
    let new = new_key();
    let rest = tenants[1..].concat();
    let is_known = |key: &Key| get(cluster, "/v1/models", &key.key).0 == 200;
    let until = |reached: &dyn Fn() -> bool| {
        let began = Instant::now();
        while !reached() {
            assert!(began.elapsed() < FOLLOWED_WITHIN, "the file is not followed");
            thread::sleep(Duration::from_millis(50));
        }
    };
    assert!(is_known(old) && !is_known(&new));
    thread::scope(|scope| {
        let long = json!({ "max_tokens": 150, "ignore_eos": true });
        let running = scope.spawn(move || post(cluster, &old.key, &long));
        write(file, &(tenant("free", &[old, &new], "") + &rest));
        until(&|| is_known(&new));
        assert!(is_known(old) && is_known(kept));
        // What cannot be meant changes nothing, and is told.
        let is_unusable = || cluster.router.metric("uniarm_router_tenants_file_unusable") > 0.0;
        assert!(!is_unusable());
        write(file, "[[tenants]]\nname = 3");
        until(&is_unusable);
        assert!(is_known(old) && is_known(&new));
        write(file, &(tenant("free", &[&new], "") + &rest));
        until(&|| !is_known(old));
        until(&|| !is_unusable());
        assert!(is_known(&new) && is_known(kept));
        let (status, answer) = running.join().unwrap();
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["usage"]["completion_tokens"], 150);
    });
    let counted = |name: &str| cluster.router.metric(&format!("uniarm_router_tenant_{name}"));
    assert!(counted("requests_total") > 0.0 && counted("tokens_total") >= 150.0);
}

#[test]
fn a_file_of_tenants_that_says_nothing_clear_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tenants.toml");
    for (text, said) in [
        (None, "No such file"),
        (Some(String::new()), "tenants: is empty"),
        (
            Some("[[tenants]]\nname = \"a\"\nkeys = [\"plain\"]".to_owned()),
            "tenants[0].keys[0]: wants sha256:",
        ),
        (Some(tenant("a", &[&new_key()], "quota = 1")), "unknown field `quota`"),
    ] {
        if let Some(text) = text {
            std::fs::write(&file, text).unwrap();
        }
        let command = Command::new(env!("CARGO_BIN_EXE_uniarm"))
            .args(["router", "--check", "--base-peer", "127.0.0.1:1", "--tenants"])
            .arg(&file)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&command.stderr).into_owned();
        assert!(!command.status.success() && error.contains("--tenants") && error.contains(said), "{error}");
    }
}
