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
}
