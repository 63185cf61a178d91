//! Clients in other languages: our Python package, OpenAI's, Python's grpcio from our .proto files, grpcurl by reflection.

use std::process::Command;

use uniarm_proto::{ClusterClient, Sampling, Transcript};

use crate::harness::{Cluster, PROMPTED, Running, knows_its_workers, machine, repository, request};

#[test]
fn python_grpcurl_and_openai_stream_an_answer() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().display().to_string();
    let cluster = Cluster::up(&[&PROMPTED[..], &["--batch-dir", &folder]].concat());
    let script = repository().join("tests/clients/run.sh");
    let endpoint = format!("http://{}", cluster.router.address);
    let http = format!("http://{}", cluster.http);
    let output = Command::new("sh").arg(script).arg(endpoint).arg(http).output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    a_shell_fills_in_what_is_served(&cluster);
}

/// Asks as the script for bash does.
fn a_shell_fills_in_what_is_served(cluster: &Cluster) {
    let filled_in = |flag: &str, begun: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_uniarm"))
            .args(["--", "uniarm", "generate", flag, begun])
            .env("UNIARM_ENDPOINT", format!("http://{}", cluster.router.address))
            .envs([("UNIARM_COMPLETE", "bash"), ("_CLAP_COMPLETE_INDEX", "3"), ("_CLAP_IFS", "\n")])
            .envs([("_CLAP_COMPLETE_COMP_TYPE", "9"), ("_CLAP_COMPLETE_SPACE", "false")])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(filled_in("--preference", "conc"), "concise=");
    assert_eq!(filled_in("--preference", "concise=0.3,"), "concise=0.3,positive=");
    assert_eq!(filled_in("--reward", "posi"), "positive");
}

/// Ids and text of an answer, as the Python client prints them.
fn plain(transcript: &Transcript) -> serde_json::Value {
    let choice = &transcript.choices[0];
    serde_json::json!({ "ids": choice.tokens, "text": choice.text })
}

#[tokio::test]
async fn the_python_client_gets_the_bytes_of_the_rust_client_though_its_router_dies() {
    let _machine = machine();
    let cluster = Cluster::three_processes(&[], &PROMPTED);
    let peers = ["--base-peer", &cluster.base().address, "--reward-peer", &cluster.reward().address];
    let other = Running::start("router", &peers);
    cluster.client().await;
    knows_its_workers(&other.address).await;
    let client = ClusterClient::new(&[&other.address]).unwrap();
    let guided = request("Describe the sea.", &[("positive", 0.5), ("concise", 0.5)]);
    let mut long = request("Tell me a story.", &[("positive", 1.0)]);
    let sampling =
        Sampling { temperature: 1.0, seed: Some(11), max_tokens: 96, ignore_eos: true, ..long.sampling };
    long.sampling = sampling;
    let mut expected = Vec::new();
    for request in [guided, long] {
        expected.push(plain(&client.complete(request, None).await.unwrap()));
    }

    let router = &cluster.router;
    let script = repository().join("tests/clients/package.sh");
    let output = Command::new("sh")
        .arg(script)
        .args([&router.address, &other.address, &router.id().to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    if said.contains("skipped:") {
        return println!("{said}");
    }
    let answers: serde_json::Value = serde_json::from_str(&said).unwrap();
    for name in ["guided", "batch", "asynchronous"] {
        assert_eq!(answers[name], expected[0], "{name}");
    }
    assert_eq!(answers["killed"], expected[1]);
}
