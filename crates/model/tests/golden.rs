//! Logits and continuations against values recorded by an independent implementation (numpy, PyTorch).

mod support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde_json::Value;
use support::{Sequence, demo_model, greedy, open, shared, step};
use uniarm_model::{Adapter, Conditioned, Llama, LlamaOptions, ModelFiles};

/// Tokens must agree where the recorded gap between the best and second best score exceeds this.
const MARGIN_MIN: f64 = 1e-3;

/// f32 against f64 over a random model of two layers.
const TINY_TOLERANCE: f32 = 2e-5;

fn load(files: &ModelFiles) -> Llama {
    Llama::load(
        files,
        &LlamaOptions { threads: 2, kv_blocks: 64, block_tokens: 16, ..LlamaOptions::default() },
    )
    .expect("a sound model")
}

fn adapter(folder: &Path, files: &ModelFiles) -> Arc<Adapter> {
    Arc::new(Adapter::load(folder, &files.config, &files.fingerprint).expect("a sound adapter"))
}

/// "moslora@0.3,0.7" → the adapter of that folder under that preference.
fn conditioned(name: &str, adapters: &HashMap<&str, Arc<Adapter>>) -> Conditioned {
    let (method, preference) = name.split_once('@').unwrap_or((name, ""));
    let adapter = &adapters[method];
    let preference = preference.split(',').filter_map(|weight| weight.parse().ok());
    // A plain LoRA has no preference, whatever the recording's name says.
    let preference: Vec<f32> = preference.take(adapter.objectives().len()).collect();
    adapter.condition(&preference).expect("a preference on the simplex")
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("a token id") as u32).collect()
}

/// Compares a row of logits with the recorded 20 largest, sum and norm of all.
fn assert_logits(logits: &[f32], recorded: &Value, tolerance: f64, what: &str) {
    let listed = tokens(&recorded["ids"]).into_iter().zip(recorded["logits"].as_array().expect("a list"));
    for (id, expected) in listed {
        let (found, expected) = (f64::from(logits[id as usize]), expected.as_f64().expect("a number"));
        assert!(
            (found - expected).abs() <= tolerance,
            "{what}: logit of {id} is {found}, recorded {expected}"
        );
    }
    let count = logits.len() as f64;
    let sum: f64 = logits.iter().map(|x| f64::from(*x)).sum();
    let norm: f64 = logits.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let recorded = |name: &str| recorded[name].as_f64().expect("a number");
    assert!((sum - recorded("sum")).abs() <= tolerance * count, "{what}: sum {sum}");
    assert!((norm - recorded("norm")).abs() <= tolerance * count.sqrt(), "{what}: norm {norm}");
}

fn assert_tokens(found: &[u32], recorded: &Value, what: &str) {
    let margin = recorded["min_margin"].as_f64().expect("a number");
    if margin > MARGIN_MIN {
        assert_eq!(found, tokens(&recorded["tokens"]), "{what}");
    } else {
        println!("{what}: not compared, the recorded margin is {margin}");
    }
}

#[test]
fn smollm2_and_its_adapters_answer_as_recorded() {
    let (Some(shared), Some(files)) = (shared(), demo_model()) else { return };
    let golden = shared.join("golden");
    let recorded = std::fs::read_to_string(golden.join("smollm2.json")).expect("the recording");
    let recorded: Value = serde_json::from_str(&recorded).expect("JSON");
    let tolerance = recorded["tolerance"]["logits_max_abs"].as_f64().expect("a number");
    let eos = recorded["eos"].as_u64().expect("a token id") as u32;
    let adapters: HashMap<&str, Arc<Adapter>> = ["moslora", "pblora", "lora"]
        .map(|name| (name, adapter(&golden.join(format!("adapter-{name}")), &files)))
        .into();
    let mut model = load(&files);

    for case in recorded["cases"].as_array().expect("a list") {
        let (base, reward) = (tokens(&case["ids_base"]), tokens(&case["ids_reward"]));
        let plain = |ids: &[u32]| Sequence::new(ids, 0..16, None);
        let arm = |ids: &[u32]| Sequence::new(ids, 16..32, None);

        let logits = step(&mut model, &mut [plain(&base), arm(&reward)]);
        assert_logits(&logits[0], &case["base_last"], tolerance, "base");
        assert_logits(&logits[1], &case["reward_last"], tolerance, "reward");
        let answer = greedy(&mut model, &mut [plain(&base)], eos, 48);
        assert_tokens(&answer, &case["greedy_base"], "greedy");
        let answer = greedy(&mut model, &mut [plain(&base), arm(&reward)], eos, 48);
        assert_tokens(&answer, &case["greedy_guided_prompted_w1"], "guided by a prompt");

        for (name, recorded) in case["adapters"].as_object().expect("adapters by name") {
            let conditioned = conditioned(name, &adapters);
            let arm = || Sequence::new(&base, 16..32, Some(&conditioned));
            assert_logits(&step(&mut model, &mut [arm()])[0], &recorded["last"], tolerance, name);
            if recorded["greedy_guided_w1"].is_object() {
                let answer = greedy(&mut model, &mut [plain(&base), arm()], eos, 24);
                assert_tokens(&answer, &recorded["greedy_guided_w1"], name);
            }
        }
    }
}

#[test]
fn tiny_llama_and_its_adapters_give_the_recorded_logits() {
    let Some(shared) = shared() else { return };
    let folder = shared.join("golden/tiny-llama");
    let files = open(folder.to_str().expect("UTF-8"));
    let adapters: HashMap<&str, Arc<Adapter>> = ["moslora-text", "moslora-onehot", "pblora", "lora"]
        .map(|name| (name, adapter(&folder.join(format!("adapter-{name}")), &files)))
        .into();
    let recorded: HashMap<String, Tensor> =
        candle_core::safetensors::load(folder.join("expected_logits.safetensors"), &Device::Cpu)
            .expect("tensors");
    let mut model = load(&files);
    let input: Vec<u32> = (3..23).collect();

    for (name, expected) in recorded {
        let conditioned = name.strip_prefix("logits/").map(|name| conditioned(name, &adapters));
        let sequence = Sequence::new(&input, 0..2, conditioned.as_ref());
        let mut logits = Vec::new();
        let row = uniarm_model::Row { logits_from: 0, ..sequence.row() };
        uniarm_model::Forward::forward(&mut model, &[row], &mut logits).expect("a sound row");
        let expected: Vec<f32> = expected.flatten_all().and_then(|x| x.to_vec1()).expect("f32"); // (20 · 128)
        assert_eq!(logits.len(), expected.len());
        for (index, (found, expected)) in logits.iter().zip(&expected).enumerate() {
            assert!(
                (found - expected).abs() <= TINY_TOLERANCE,
                "{name} at {index}: {found}, recorded {expected}"
            );
        }
    }
}
