//! Lines that are requests, lines that are not, and bytes that are nothing.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use proptest::prelude::*;
use uniarm_proto::{ChatMessage, Input, Priority};

use super::*;
use crate::{Source, source::Place};

fn plan() -> Plan {
    let input = Input::Chat(Vec::new());
    let defaults = GenerateRequest { priority: Priority::Low, ..GenerateRequest::new(input) };
    Plan { defaults, is_raw: false, fan_out: Vec::new(), seed: 0, only: None }
}

fn line(text: impl Into<Vec<u8>>) -> Line {
    Line { place: Place { file: "in.jsonl".into(), line: 5 }, index: 4, text: Some(text.into()) }
}

fn read_one(text: &str) -> Planned {
    plan().read(&line(text)).unwrap_or_else(|unread| panic!("{text}: {unread:?}")).remove(0)
}

fn fault(text: &str) -> String {
    plan().read(&line(text)).err().unwrap_or_else(|| panic!("{text} is taken")).refused.message
}

#[test]
fn a_short_line_and_openais_are_the_same_request() {
    let short = read_one(
        r#"{"id": "a", "prompt": "Hi", "system": "Be kind.", "temperature": 0.5, "max_tokens": 9, "stop": "\n", "seed": 3,
            "preference": {"b": 0.3, "a": 0.7}, "strength": 2, "meta": {"x": 1}}"#,
    );
    let openai = read_one(
        r#"{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {
            "messages": [{"role": "developer", "content": "Be kind."},
                         {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "temperature": 0.5, "max_completion_tokens": 9, "stop": ["\n"], "seed": 3, "stream": false, "tools": [],
            "user": "somebody", "guidance": {"preference": {"a": 0.7, "b": 0.3}, "strength": 2, "on_loss": "wait"}}}"#,
    );
    assert_eq!(short.request, openai.request);
    assert_eq!((short.label.id.as_str(), openai.label.id.as_str()), ("a", "a"));
    assert_eq!(short.label.form, Form::Short);
    let Form::OpenAi(Some(form)) = openai.label.form else { panic!("{:?}", openai.label) };
    assert_eq!((form.call, form.alternatives), (uniarm_openai::Call::Chat, None));
    let said = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    assert_eq!(short.request.input, Input::Chat(vec![said("system", "Be kind."), said("user", "Hi")]));
}

#[test]
fn a_bad_line_is_named_with_its_field() {
    let faults = [
        (r#"{"prompt": "Hi", "temprature": 1}"#, "temprature: is unknown; did you mean temperature?"),
        (r#"{"prompt": "Hi", "temperature": "hot"}"#, "temperature: is a string, wants a number"),
        (r#"{"prompt": "Hi", "top_p": 2}"#, "top_p: is 2, wants"),
        (r#"{"prompt": "Hi", "max_tokens": 0}"#, "max_tokens: is 0"),
        (r#"{"prompt": "Hi", "preference": {"a": "much"}}"#, "preference.a: is a string, wants a number"),
        (r#"{"prompt": "Hi", "preference": {"a": -1}}"#, "guidance[0].preference: weight -1"),
        (
            r#"{"prompt": "Hi", "guidance": [{"rewards": "x"}]}"#,
            "guidance[0].rewards: is unknown; did you mean reward?",
        ),
        (
            r#"{"prompt": "Hi", "guidance": {"on_loss": "panic"}}"#,
            "guidance.on_loss: is \"panic\", wants one of: wait",
        ),
        (r#"{"messages": [{"role": "user"}]}"#, "messages[0].content: is missing"),
        (r#"{"id": []}"#, "id: wants a string or a number"),
        (r#"{}"#, "wants one of the fields prompt, messages and token_ids"),
        (r#"{"prompt": "Hi", "token_ids": [1]}"#, "wants one of the fields"),
        (r#"[1]"#, "is no JSON object"),
        (r#"{"custom_id": "a", "url": "/v1/embeddings", "body": {}}"#, "url: is \"/v1/embeddings\""),
        (
            r#"{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}}"#,
            "body.tools: is not supported",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "top_p": 2, "guidance": {"preference": {"a": 1}}}}"#,
            "body.top_p: is 2, wants",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "guidance": {"preference": {"a": -1}}}}"#,
            "body.guidance.preference: weight -1",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "stream": true}}"#,
            "body.stream: is true",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "timeout_ms": 5}}"#,
            "body.timeout_ms: is set",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": 3}]}}"#,
            "body.messages[0].content: is 3, wants a string",
        ),
    ];
    for (text, expected) in faults {
        let fault = fault(text);
        assert!(fault.contains(expected), "{text}: {fault}");
    }
    let mut long = line("");
    long.text = None;
    assert!(plan().read(&long).err().unwrap().refused.message.contains("longer than"));
}

#[test]
fn a_line_fans_out_over_preferences_with_one_seed() {
    let preference = |a: f32| vec![("a".to_owned(), a), ("b".to_owned(), 1.0 - a)];
    let plan = Plan { fan_out: vec![preference(0.0), preference(0.5)], ..plan() };
    let planned = plan.read(&line(r#"{"id": "x", "prompt": "Hi", "strength": 2}"#)).unwrap();
    let weights: Vec<_> = planned.iter().map(|one| one.request.guidance[0].preference.clone()).collect();
    assert_eq!(weights, plan.fan_out);
    assert!(planned.iter().all(|one| one.request.guidance[0].strength == 2.0));
    assert_eq!(planned[0].request.sampling.seed, planned[1].request.sampling.seed);
    let own = plan.read(&line(r#"{"prompt": "Hi", "preference": {"a": 1}}"#)).unwrap_err();
    assert!(own.refused.message.contains("--preferences"));
    assert_eq!(own.labels.len(), 2, "each of its requests has a line of output");
}

#[test]
fn seeds_are_drawn_from_ids_and_not_from_places() {
    let at = |index: u64| Line { index, ..line(r#"{"id": "x", "prompt": "Hi"}"#) };
    let seed = |line: &Line| plan().read(line).unwrap()[0].request.sampling.seed;
    assert_eq!(seed(&at(1)), seed(&at(2)));
    assert_ne!(seed(&at(1)), read_one(r#"{"id": "y", "prompt": "Hi"}"#).request.sampling.seed);
    assert_eq!(read_one(r#"{"prompt": "Hi"}"#).label.id, "5", "the number of the line");
}

/// Values that are nearly those of a request.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
        Just(Value::from("/v1/chat/completions")),
        Just(Value::from("POST")),
    ];
    let names = [
        "id",
        "meta",
        "prompt",
        "messages",
        "system",
        "raw",
        "token_ids",
        "model",
        "guidance",
        "preference",
        "reward",
        "strength",
        "on_loss",
        "on_reward_loss",
        "seed",
        "temperature",
        "top_p",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "logprobs",
        "top_logprobs",
        "n",
        "stream_options",
        "custom_id",
        "body",
        "url",
        "role",
        "content",
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(names.to_vec()), inner), 0..8).prop_map(|fields| {
                Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
            }),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000), is_gzip in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join(if is_gzip { "in.gz" } else { "in" }).display().to_string();
        std::fs::write(&name, &bytes).unwrap();
        let mut lines = Source::open(&[name], folder.path()).unwrap().lines();
        let mut count = 0;
        while let Ok(Some(line)) = lines.next_line() {
            prop_assert_eq!(line.index, count);
            count += 1;
            let _ = plan().read(&line);
        }
        let expected = bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count();
        prop_assert!(is_gzip || count == expected as u64);
    }

    #[test]
    fn whatever_is_no_request_is_refused_in_words(value in value()) {
        if let Err(unread) = plan().read(&line(value.to_string())) {
            prop_assert!(!unread.refused.message.is_empty());
            prop_assert_eq!(unread.labels.len(), 1);
        }
    }
}
