//! Bodies that are no requests, nearly.

use uniarm_fuzz::{JSON, fuzz};
use uniarm_openai::{Ask, Call, Fields};
use uniarm_proto::{GenerateRequest, pb};

const CHAT: &str = r#"{"model": "m", "messages": [{"role": "developer", "content": "Be kind."}, {"role": "user",
    "content": [{"type": "text", "text": "Hi \ud83d\ude00"}]}], "temperature": 0.5, "max_completion_tokens": 9,
    "stop": ["\n"], "seed": 3, "stream": true, "stream_options": {"include_usage": true}, "n": 2, "logprobs": true,
    "top_logprobs": 3, "guidance": [{"reward": "r", "preference": {"a": 0.7, "b": 0.3}, "strength": 2, "on_loss": "wait"}],
    "base_strength": 0.5, "timeout_ms": 1500, "priority": "high", "exchange": "dense", "tools": [], "user": "u"}"#;

const COMPLETION: &str = r#"{"prompt": ["Hi"], "max_tokens": 4, "logprobs": 2, "best_of": 1, "echo": false, "suffix": null,
    "stop_token_ids": [1, 2], "top_k": 5, "min_p": 0.1, "guidance": {"preference": {"a": 1}}}"#;

const WORDS: [&str; 8] = [
    "\"guidance\":",
    "\"messages\":",
    "\"preference\":",
    "\"stop\":",
    "\"prompt\":",
    "\"content\":",
    "1e39",
    "-0.0",
];

#[test]
fn bodies_of_strangers() {
    let words = [JSON, &WORDS].concat();
    for (name, call, seed) in [("chat", Call::Chat, CHAT), ("completion", Call::Completion, COMPLETION)] {
        fuzz(name, &[seed.into()], &words, |body| {
            let fields = match Fields::of_body(body) {
                Ok(fields) => fields,
                Err(refusal) => return refusal.message,
            };
            match Ask::read(call, fields, pb::GenerateRequest::default()) {
                Ok(ask) => GenerateRequest::try_from(ask.request)
                    .err()
                    .map_or_else(String::new, |error| error.to_string()),
                Err(refusal) => refusal.message,
            }
        });
    }
}
