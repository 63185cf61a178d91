//! The certified exchange: a few hundred bytes a token, almost always without a second question, and exact.

use uniarm_proto::{ChatMessage, Exchange, GenerateRequest, Input, Transcript, pb::ExchangeUse};

use crate::harness::{Cluster, PROMPTED, ask_all, machine, request, shared};

/// Bytes of a dense f32 row of SmolLM2.
const DENSE_BYTES: u64 = 4 * 49_152;

fn total(transcripts: &[Transcript]) -> (ExchangeUse, u32) {
    let mut total = ExchangeUse::default();
    for used in transcripts.iter().filter_map(|transcript| transcript.summary.as_ref()?.exchange) {
        total.bytes += used.bytes;
        total.certified += used.certified;
        total.queried += used.queried;
        total.dense += used.dense;
    }
    (total, total.certified + total.queried + total.dense)
}

fn report(what: &str, transcripts: &[Transcript]) -> (f64, f64) {
    let (used, tokens) = total(transcripts);
    let bytes = used.bytes as f64 / f64::from(tokens);
    let certified = 100.0 * f64::from(used.certified) / f64::from(tokens);
    println!(
        "{what}: {tokens} tokens, {bytes:.0} bytes/token (dense {DENSE_BYTES}), certified {certified:.2} %, \
         queried {}, dense {}",
        used.queried, used.dense
    );
    (bytes, certified)
}

fn questions(
    count: usize,
    preference: &[(&str, f32)],
    temperature: f32,
    max_tokens: u32,
) -> Vec<GenerateRequest> {
    const QUESTIONS: [&str; 6] = [
        "What is the capital of France and what is it famous for?",
        "How do I get better at chess?",
        "Tell me about the sea.",
        "Why do cats purr?",
        "What should I cook tonight?",
        "Describe a perfect morning.",
    ];
    (0..count)
        .map(|index| {
            let mut request = request(QUESTIONS[index % QUESTIONS.len()], preference);
            request.sampling.temperature = temperature;
            request.sampling.seed = Some(index as u64);
            request.sampling.max_tokens = max_tokens;
            request
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompted_reward_costs_few_bytes_and_is_certified_from_its_list() {
    let _machine = machine();
    let system = PROMPTED[1].split_once('=').unwrap().1;
    let cluster = Cluster::up(&["--reward-system", system]);
    let inference = cluster.client().await;
    let certified = questions(24, &[("reward", 1.0)], 1.0, 48);
    let dense: Vec<_> = certified
        .iter()
        .map(|request| GenerateRequest { exchange: Some(Exchange::Dense), ..request.clone() })
        .collect();
    let from_lists = ask_all(&inference, &certified, 16).await;
    let from_rows = ask_all(&inference, &dense, 16).await;
    let (bytes, share) = report("prompted reward, K = 32, T = 1", &from_lists);
    assert!(bytes <= 600.0, "{bytes} bytes per token");
    assert!(share >= 98.0, "{share} % certified");
    assert!(total(&from_rows).0.bytes >= DENSE_BYTES, "whole rows were asked for");
    for (lists, rows) in from_lists.iter().zip(&from_rows) {
        assert_eq!(lists.choices, rows.choices);
    }
}

/// A prompted reward with the base model's weights is the base model under that system text, so that both write the same.
#[tokio::test(flavor = "multi_thread")]
async fn with_base_strength_0_the_reward_model_writes_alone() {
    let _machine = machine();
    let system = PROMPTED[1].split_once('=').unwrap().1;
    let cluster = Cluster::up(&["--reward-system", system]);
    let inference = cluster.client().await;
    let mut by_reward = questions(6, &[("reward", 1.0)], 1.0, 24);
    by_reward.iter_mut().for_each(|request| request.base_strength = 0.0);
    by_reward.iter_mut().step_by(2).for_each(|request| request.sampling.logprobs = Some(2));
    let by_base = by_reward.iter().cloned().map(|mut request| {
        let Input::Chat(messages) = &mut request.input else { panic!("questions are chats") };
        messages.insert(0, ChatMessage { role: "system".into(), content: system.into() });
        request.guidance.clear();
        request.base_strength = 1.0;
        request
    });
    let by_base = ask_all(&inference, &by_base.collect::<Vec<_>>(), 6).await;
    for (reward, base) in ask_all(&inference, &by_reward, 6).await.iter().zip(&by_base) {
        let (reward, base) = (&reward.choices[0], &base.choices[0]);
        assert_eq!((&reward.tokens, &reward.text), (&base.tokens, &base.text));
        assert_eq!(reward.details.len(), base.details.len());
        for (steered, alone) in reward.details.iter().zip(&base.details) {
            assert!((steered.reward_contribution - alone.base_logprob).abs() < 1e-4);
            assert_ne!(
                steered.base_logprob, alone.base_logprob,
                "that of the base model without the system text"
            );
            let guided = |detail: &uniarm_proto::pb::TokenDetail| detail.alternatives[0].guided_logprob;
            assert!((guided(steered) - guided(alone)).abs() < 1e-4);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trained_adapter_is_certified_at_every_preference() {
    let Some(adapter) = shared("models/prototype-positive-concise") else { return };
    let _machine = machine();
    let cluster = Cluster::up(&["--adapter", adapter.to_str().unwrap()]);
    let inference = cluster.client().await;
    for tenths in 0..=10 {
        let weight = tenths as f32 / 10.0;
        let preference = [("positive", weight), ("concise", 1.0 - weight)];
        for temperature in [0.0, 1.0] {
            let lists = ask_all(&inference, &questions(12, &preference, temperature, 32), 12).await;
            let what = format!("trained adapter, positive = {weight}, T = {temperature}");
            let (bytes, share) = report(&what, &lists);
            assert!(share >= 92.0, "{what}: {share} % certified");
            assert!(bytes <= 600.0, "{what}: {bytes} bytes per token");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guided_greedy_answers_equal_the_recorded_ones() {
    let Some(golden) = shared("golden/smollm2.json") else { return };
    let _machine = machine();
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let system = golden["system_reward"].as_str().unwrap();
    let system = system.trim_start_matches("<|im_start|>system\n").trim_end().trim_end_matches("<|im_end|>");
    let cluster = Cluster::up(&["--reward-system", system]);
    let inference = cluster.client().await;
    for case in golden["cases"].as_array().unwrap() {
        for (key, preference) in
            [("greedy_base", [].as_slice()), ("greedy_guided_prompted_w1", [("reward", 1.0)].as_slice())]
        {
            let expected: Vec<u32> = case[key]["tokens"]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_u64().unwrap() as u32)
                .collect();
            let mut request = request(case["question"].as_str().unwrap(), preference);
            request.sampling.max_tokens = expected.len() as u32;
            let answers = ask_all(&inference, &[request], 1).await;
            assert_eq!(answers[0].choices[0].tokens, expected, "{key}: {}", case["question"]);
        }
    }
}
