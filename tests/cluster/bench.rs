//! The benchmarks as a stranger runs them, small.

use std::process::Command;

use serde_json::Value;

use crate::harness::{KV_TOKENS, demo_model, machine};

/// What `uniarm bench` prints with `--json`.
fn bench(words: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_uniarm"))
        .arg("bench")
        .args(words.split(' '))
        .args(["--model", demo_model(), "--json"])
        .env("UNIARM_KV_TOKENS", KV_TOKENS)
        .output()
        .unwrap();
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The command itself fails where a draft or fused roles change a token.
#[test]
fn steps_are_measured_with_and_without_drafts_in_separate_and_fused_roles() {
    let _machine = machine();
    let report = bench("step --batch 2 --rows unguided,mixed --roles separate,fused --tokens 16 --repeats 1");
    let cases = report["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 1 + 2 * 2);
    assert_eq!(report["same_tokens"], true);
    for case in cases {
        assert!(case["tokens_per_second"]["median"].as_f64().unwrap() > 0.0, "{case}");
        let passes = case["base_passes_per_token"].as_f64().unwrap();
        assert!(passes > 0.0 && passes <= 1.0, "{case}");
        assert!(case["draft_window"] != "0" || passes == 1.0, "{case}");
    }
}

#[test]
fn a_load_starts_its_own_cluster_and_counts_every_request() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let [steps, trace] = ["steps.json", "trace.jsonl"].map(|name| folder.path().join(name));
    let load = "load --rate 8 --seconds 1 --prompt-tokens 8-16 --answer-tokens 4-8 --guided 0.5";
    let files = format!("--write-steps {} --write-trace {}", steps.display(), trace.display());
    let report = bench(&format!("{load} {files}"));
    let rate = &report["rates"][0];
    assert_eq!((&rate["refused"], &rate["failed"]), (&0.into(), &0.into()), "{rate}");
    assert!(rate["requests"].as_u64().unwrap() > 0, "{rate}");
    assert!(rate["first_token_ms"]["p50"].as_f64().unwrap() > 0.0, "{rate}");

    // Every token that was asked for was chosen in a step that is written down, but for those after the last forward, which no
    // step has followed; and what was guided had a row.
    let steps: Value = serde_json::from_str(&std::fs::read_to_string(steps).unwrap()).unwrap();
    let of = |engine: &str, what: &str| -> Vec<u64> {
        let engines = steps["engines"].as_array().unwrap();
        let engine = engines.iter().find(|found| found["engine"] == engine).unwrap();
        engine["steps"].as_array().unwrap().iter().map(|step| step[what].as_u64().unwrap()).collect()
    };
    let asked: Vec<Value> = std::fs::read_to_string(trace)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let tokens = |line: &Value| line["answer_tokens"].as_u64().unwrap();
    let guided = asked.iter().filter(|line| line["guided"] == true).map(tokens).sum::<u64>();
    let chosen = of("base", "tokens_chosen").iter().sum::<u64>();
    let most = chosen + of("base", "decode_rows").last().unwrap();
    let all = asked.iter().map(tokens).sum::<u64>();
    assert!((chosen..=most).contains(&all), "{all} tokens, {chosen} to {most} in the steps");
    let last = ["decode_rows", "draft_rows"].map(|rows| *of("reward", rows).last().unwrap());
    let rows = of("reward", "rows_answered").iter().chain(&last).sum::<u64>();
    assert!(rows >= guided, "{rows} rows of {guided} guided tokens");
}

/// Calibration, load and simulation, too short to say how good the simulation is: what it says has the order of magnitude.
#[test]
fn a_simulation_is_held_to_a_load_of_this_machine() {
    let _machine = machine();
    let report = bench("simulation --rate 4 --seconds 2 --guided 0.5 --repeats 1 --rounds 1");
    let [load] = report["loads"].as_array().unwrap().as_slice() else { panic!("{report}") };
    let [repeat] = load["repeats"].as_array().unwrap().as_slice() else { panic!("{report}") };
    let measured = &repeat["measured"];
    assert!(repeat["observed"].is_null(), "there is no other load");
    for simulated in repeat["calibrated"].as_array().unwrap() {
        for figure in ["/tokens_per_second", "/first_token/0", "/next_token/0"] {
            let [simulated, measured] =
                [simulated, measured].map(|of| of.pointer(figure).unwrap().as_f64().unwrap());
            let ratio = simulated / measured;
            assert!((0.1..10.0).contains(&ratio), "{figure}: {simulated} simulated, {measured} measured");
        }
    }
}
