//! Bad input: a typed error that names the field, and a service that goes on serving.

use std::process::Command;

use tonic::Code;
use tonic_types::StatusExt as _;
use uniarm_proto::{
    GenerateRequest, GuidanceTerm, Input,
    pb::{self, inference_client::InferenceClient},
};

use crate::harness::{Cluster, PROMPTED, ask, demo_model, machine, request, shared};

fn guided(change: impl FnOnce(&mut pb::GenerateRequest)) -> pb::GenerateRequest {
    let mut wire = pb::GenerateRequest::from(request("Hello", &[("positive", 1.0)]));
    change(&mut wire);
    wire
}

fn sampling(change: impl FnOnce(&mut pb::Sampling)) -> pb::GenerateRequest {
    guided(|wire| change(wire.sampling.as_mut().unwrap()))
}

fn weights(weights: &[(&str, f32)]) -> pb::GenerateRequest {
    guided(|wire| {
        let weight = |(name, weight): &(&str, f32)| pb::ObjectiveWeight {
            objective: (*name).to_owned(),
            weight: *weight,
        };
        wire.guidance[0].preference = weights.iter().map(weight).collect();
    })
}

fn with_input(input: Input) -> pb::GenerateRequest {
    guided(|wire| wire.input = Some(input.into()))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_field_is_named_and_the_service_goes_on() {
    let _machine = machine();
    let mut cluster = Cluster::up(&PROMPTED);
    let mut inference = cluster.client().await;
    let good = request("Hello", &[("positive", 0.5), ("concise", 0.5)]);
    let before = ask(&mut inference, good.clone()).await.unwrap();

    let cases: Vec<(&str, pb::GenerateRequest, &str)> = vec![
        ("an unknown objective", weights(&[("positiv", 1.0)]), "guidance[0].preference"),
        ("a negative weight", weights(&[("positive", -1.0)]), "guidance[0].preference"),
        ("all weights zero", weights(&[("positive", 0.0), ("concise", 0.0)]), "guidance[0].preference"),
        ("a weight that is no number", weights(&[("positive", f32::NAN)]), "guidance[0].preference"),
        ("an infinite weight", weights(&[("positive", f32::INFINITY)]), "guidance[0].preference"),
        (
            "a reward that nobody serves",
            guided(|r| r.guidance[0].reward = "nobody".into()),
            "guidance[0].reward",
        ),
        ("a model that nobody serves", guided(|r| r.model = "nobody".into()), "model"),
        (
            "an infinite strength",
            guided(|r| r.guidance[0].strength = Some(f32::INFINITY)),
            "guidance[0].strength",
        ),
        (
            "no base model and no guidance",
            guided(|r| (r.base_strength, r.guidance) = (Some(0.0), Vec::new())),
            "base_strength",
        ),
        ("no input", guided(|r| r.input = None), "input"),
        ("an empty prompt", with_input(Input::Prompt(String::new())), "input.prompt"),
        ("a prompt over the context", with_input(Input::Prompt("word ".repeat(20_000))), "input"),
        ("a prompt over the limit", with_input(Input::Prompt("x".repeat(2 << 20))), "input.prompt"),
        ("token ids outside the vocabulary", with_input(Input::Tokens(vec![1, u32::MAX])), "input"),
        ("max_tokens 0", sampling(|s| s.max_tokens = Some(0)), "sampling.max_tokens"),
        ("an absurd temperature", sampling(|s| s.temperature = Some(1e30)), "sampling.temperature"),
        (
            "a temperature that is no number",
            sampling(|s| s.temperature = Some(f32::NAN)),
            "sampling.temperature",
        ),
        ("top_p 0", sampling(|s| s.top_p = Some(0.0)), "sampling.top_p"),
        ("min_p 2", sampling(|s| s.min_p = 2.0), "sampling.min_p"),
        ("a stop token outside", sampling(|s| s.stop_token_ids = vec![1 << 30]), "sampling.stop_token_ids"),
        ("a stop list of many entries", sampling(|s| s.stop = vec!["x".into(); 500_000]), "sampling.stop"),
        ("an endless stop string", sampling(|s| s.stop = vec!["x".repeat(1 << 20)]), "sampling.stop[0]"),
        ("a thousand answers", sampling(|s| s.n = Some(1000)), "sampling.n"),
        ("a hundred alternatives", sampling(|s| s.logprobs = Some(100)), "sampling.logprobs"),
        ("an unknown policy", guided(|r| r.on_reward_loss = 99), "on_reward_loss"),
    ];
    for (what, wire, field) in cases {
        let status = ask(&mut inference, wire).await.expect_err(what);
        assert!(matches!(status.code(), Code::InvalidArgument | Code::NotFound), "{what}: {status}");
        let details = status.get_error_details();
        let violation =
            &details.bad_request().unwrap_or_else(|| panic!("{what}: {status}")).field_violations[0];
        assert_eq!(violation.field, field, "{what}: {status}");
        assert!(!violation.description.is_empty());
    }

    // A message over the limit, from a client that does not keep it: refused before it is read.
    let huge = sampling(|s| s.stop = vec!["x".into(); 2_000_000]);
    let mut careless = InferenceClient::new(cluster.channel().await);
    let status = ask(&mut careless, huge).await.expect_err("a message over the limit");
    assert_eq!(status.code(), Code::OutOfRange, "{status}");

    let mut inference = cluster.client().await;
    let after = ask(&mut inference, good).await.unwrap();
    assert_eq!(before.choices, after.choices);
    assert!(cluster.router.is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_request_that_cannot_be_done_in_time() {
    let _machine = machine();
    let cluster = Cluster::up(&PROMPTED);
    let mut inference = cluster.client().await;
    let mut long = request("Tell me a very long story.", &[("positive", 1.0)]);
    long.sampling.max_tokens = 4000;
    long.sampling.ignore_eos = true;
    let mut wire = tonic::Request::new(pb::GenerateRequest::from(long));
    wire.set_timeout(std::time::Duration::from_millis(600));
    let status = match inference.generate(wire).await {
        Err(status) => status,
        Ok(events) => {
            let mut events = events.into_inner();
            loop {
                match events.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("the deadline did nothing"),
                    Err(status) => break status,
                }
            }
        }
    };
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
}

/// Starts a role that must refuse to start, and returns what it says.
fn refused_start(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_uniarm")).args(args).output().unwrap();
    assert!(!output.status.success(), "{args:?} started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("panicked"), "{args:?}: {said}");
    said
}

#[test]
fn files_that_are_not_what_they_claim_to_be_are_refused_with_a_sentence() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(demo_model()).unwrap();

    let truncated = folder.path().join("truncated.gguf");
    std::fs::write(&truncated, &whole[..whole.len() / 2]).unwrap();
    let said = refused_start(&["base", "--model", truncated.to_str().unwrap()]);
    assert!(said.contains("truncated.gguf"), "{said}");

    let header_only = folder.path().join("header.gguf");
    std::fs::write(&header_only, &whole[..4096]).unwrap();
    refused_start(&["base", "--model", header_only.to_str().unwrap()]);

    let mut corrupt = whole[..1 << 20].to_vec();
    corrupt[8..24].fill(0xff); // tensor and key counts
    let corrupted = folder.path().join("corrupt.gguf");
    std::fs::write(&corrupted, corrupt).unwrap();
    refused_start(&["base", "--model", corrupted.to_str().unwrap()]);

    refused_start(&["base", "--model", "/no/such/file.gguf"]);
    refused_start(&["reward", "--model", demo_model(), "--adapter", "/no/such/folder"]);

    if let Some(adapter) = shared("golden/adapter-moslora") {
        let copy = folder.path().join("adapter");
        std::fs::create_dir(&copy).unwrap();
        std::fs::copy(adapter.join("adapter_config.json"), copy.join("adapter_config.json")).unwrap();
        let weights = std::fs::read(adapter.join("adapter_model.safetensors")).unwrap();
        std::fs::write(copy.join("adapter_model.safetensors"), &weights[..weights.len() / 3]).unwrap();
        let said = refused_start(&["reward", "--model", demo_model(), "--adapter", copy.to_str().unwrap()]);
        assert!(said.contains("adapter"), "{said}");
    }
    if let Some(wrong) = shared("golden/tiny-llama/adapter-moslora-text") {
        let said = refused_start(&["reward", "--model", demo_model(), "--adapter", wrong.to_str().unwrap()]);
        assert!(said.contains("layer") || said.contains("shape") || said.contains("64"), "{said}");
    }
}

#[test]
fn a_request_type_that_cannot_be_built_wrong_stays_whole() {
    // Domain type → wire → domain type, with everything set.
    let mut request = request("x", &[("a", 1.0)]);
    request.guidance.push(GuidanceTerm { reward: "r".into(), preference: Vec::new(), strength: -2.0 });
    request.sampling.logprobs = Some(3);
    let again = GenerateRequest::try_from(pb::GenerateRequest::from(request.clone())).unwrap();
    assert_eq!(again, request);
}
