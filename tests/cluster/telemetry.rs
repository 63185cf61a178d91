//! What operators see: metrics with help texts, readiness, and command lines that can be checked without starting.

use std::process::Command;

use crate::harness::{Cluster, PROMPTED, ask, http_get, machine, request};

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_what_a_request_did() {
    let _machine = machine();
    let cluster = Cluster::three_processes(&[], &PROMPTED);
    let mut inference = cluster.client().await;
    let answer = ask(&mut inference, request("Hello", &[("positive", 1.0)])).await.unwrap();
    let tokens = answer.choices[0].tokens.len() as f64;
    let (base, reward) = (cluster.base(), cluster.reward());
    assert_eq!(base.metric("uniarm_base_tokens_total"), tokens);
    assert_eq!(base.metric("uniarm_base_decided_tokens_total"), tokens);
    assert_eq!(base.metric("uniarm_base_reward_stall_seconds_count"), tokens);
    assert!(base.metric("uniarm_base_exchange_bytes_total") > 0.0);
    assert!(reward.metric("uniarm_reward_rows_total") >= tokens);
    assert_eq!(cluster.router.metric("uniarm_router_relayed_tokens_total"), tokens);
    ask(&mut inference, request("Hello", &[("sarcastic", 1.0)])).await.unwrap_err();
    let ends = http_get(&cluster.router.admin, "/metrics");
    for labels in [r#"outcome="ok",code="ok""#, r#"outcome="refused",code="invalid_argument""#] {
        let line = format!("uniarm_router_requests_total{{{labels}}} 1\n");
        assert!(ends.contains(&line), "no {line} in {ends}");
    }
    for process in [base, reward, &cluster.router] {
        assert!(http_get(&process.admin, "/readyz").starts_with("HTTP/1.1 200"));
        assert!(http_get(&process.admin, "/healthz").starts_with("HTTP/1.1 200"));
        let page = http_get(&process.admin, "/metrics");
        assert!(page.contains("# HELP uniarm_"), "{page}");
    }
}

/// The steps of an engine, as JSON.
fn steps(page: &str, engine: &str) -> Vec<serde_json::Value> {
    let (_, document) = page.split_once("\r\n\r\n").unwrap();
    let document: serde_json::Value = serde_json::from_str(document).unwrap();
    let engines = document["engines"].as_array().unwrap();
    let found = engines.iter().find(|one| one["engine"] == engine);
    found.unwrap_or_else(|| panic!("no {engine} in {document}"))["steps"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_add_up_to_what_a_request_did() {
    let _machine = machine();
    let cluster = Cluster::three_processes(&[], &PROMPTED);
    let mut inference = cluster.client().await;
    let answer = ask(&mut inference, request("Tell me of herons", &[("positive", 1.0)])).await.unwrap();
    let tokens = answer.choices[0].tokens.len() as u64;
    let path = "/debug/steps?last=512&format=json";
    let of = |admin: &str, engine| steps(&http_get(admin, path), engine);
    let (base, reward) = (of(&cluster.base().admin, "base"), of(&cluster.reward().admin, "reward"));
    let sum = |steps: &[serde_json::Value], field: &str| {
        steps.iter().map(|step| step[field].as_u64().unwrap()).sum::<u64>()
    };
    // Chosen after the last step are the last tokens: no forward follows them.
    let chosen = sum(&base, "tokens_chosen");
    assert!((1..=tokens).contains(&chosen), "{chosen} of {tokens} tokens");
    assert!(sum(&base, "prefill_tokens") > 0 && sum(&reward, "prefill_tokens") > 0);
    assert!(sum(&reward, "rows_answered") >= chosen);
    let (compared, accepted) = (sum(&base, "drafts_compared"), sum(&base, "drafts_accepted"));
    assert!(accepted <= compared && compared <= chosen, "{accepted} of {compared}");
    for step in base.iter().chain(&reward) {
        assert!(
            step["forward_us"].as_u64().unwrap() > 0
                && step["blocks_used"].as_u64() <= step["blocks"].as_u64()
        );
    }
    let numbers: Vec<_> = base.iter().map(|step| step["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=base.len() as u64).collect::<Vec<_>>());
    // What each step says it took is the time between their ends.
    for pair in base.windows(2) {
        let parts = ["wait_us", "choose_us", "commit_us", "exchange_us", "plan_us", "forward_us"];
        let took: u64 = parts.iter().map(|part| pair[1][part].as_u64().unwrap()).sum();
        let apart = pair[1]["ended_us"].as_u64().unwrap() - pair[0]["ended_us"].as_u64().unwrap();
        assert!(took.abs_diff(apart) < 100, "{took} µs of {apart}: {}", pair[1]);
    }
    let page = http_get(&cluster.base().admin, "/debug/steps");
    assert!(page.contains("<svg") && !page.contains("herons"), "{page}");
    assert!(http_get(&cluster.router.admin, path).ends_with("{\"engines\":[]}"), "a router has no engine");

    // The simulator takes it as it is saved.
    let saved = tempfile::NamedTempFile::new().unwrap();
    let simulate = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_uniarm"));
        command.args(["simulate", "--base", "1", "--reward", "1", "--requests", "20", "--observed"]);
        command.arg(saved.path()).output().unwrap()
    };
    let page = http_get(&cluster.base().admin, path);
    std::fs::write(saved.path(), page.split_once("\r\n\r\n").unwrap().1).unwrap();
    let simulated = simulate();
    assert!(simulated.status.success(), "{}", String::from_utf8_lossy(&simulated.stderr));
    std::fs::write(saved.path(), "<html>").unwrap();
    let refused = String::from_utf8(simulate().stderr).unwrap();
    assert!(refused.contains("is not what /debug/steps?last=512&format=json answers"), "{refused}");

    let up = Cluster::up(&[&["--fused"][..], &PROMPTED].concat());
    ask(&mut up.client().await, request("Hello", &[("positive", 1.0)])).await.unwrap();
    let page = http_get(&up.router.admin, path);
    assert!(!steps(&page, "base").is_empty() && !steps(&page, "reward").is_empty());
}

#[test]
fn a_configuration_can_be_checked_without_starting() {
    let check =
        |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_uniarm")).args(args).output().unwrap().status;
    assert!(check(&["router", "--store", "etcd://etcd:2379", "--check"]).success());
    assert!(check(&["base", "--model", "/not/there.gguf", "--check"]).success());
    assert!(!check(&["router", "--store", "memory", "--check"]).success(), "a router without peers");
    assert!(!check(&["base", "--check"]).success(), "a base worker without a model");
    assert!(!check(&["reward", "--model", "x", "--prompted", "no text", "--check"]).success());
    assert!(!check(&["router", "--store", "zookeeper://x", "--check"]).success());
    // Files of secrets have to be here, addresses to be some, folders to be possible; a model and adapters may be elsewhere.
    let router = ["router", "--base-peer", "127.0.0.1:1", "--check"];
    assert!(check(&router).success());
    let wrong = [
        ["--listen", "nope"],
        ["--admin", "127.0.0.1"],
        ["--http-listen", "nope"],
        ["--log-filter", "x=y=z"],
        ["--log-filter", "nope"],
        ["--otlp-endpoint", "nope"],
        ["--batches-max", "0"],
        ["--audit-dir", "/dev/null/records"],
        ["--store-ca", "/not/there.pem"],
    ];
    for flags in wrong {
        assert!(!check(&[&router[..], &flags].concat()).success(), "{flags:?}");
    }
    let user = ["--store-user", "uniarm", "--store-password-file", "/not/there"];
    assert!(!check(&[&router[..], &user].concat()).success(), "a password that is not there");
}
