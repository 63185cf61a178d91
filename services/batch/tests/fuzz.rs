//! Files that are no lines of requests, nearly: read as a job reads them.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use uniarm_batch::{Plan, Source};
use uniarm_fuzz::{JSON, fuzz, scratch};
use uniarm_proto::{GenerateRequest, Input};

const LINES: &str = r#"{"id": "a", "prompt": "Hi", "system": "Be kind.", "temperature": 0.5, "max_tokens": 9, "seed": 3, "preference": {"b": 0.3, "a": 0.7}, "strength": 2, "meta": {"x": 1}}
{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}], "guidance": {"preference": {"a": 1}}}}

{"id": 7, "token_ids": [1, 2, 3], "guidance": [{"reward": "r", "strength": -1}], "n": 2, "logprobs": 3}
"#;

const WORDS: [&str; 7] =
    ["\"prompt\":", "\"preference\":", "\"custom_id\":", "\"body\":", "\"url\":", "\n", "\"token_ids\":"];

#[test]
fn files_of_strangers() {
    let folder = tempfile::tempdir_in(scratch()).unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let defaults = GenerateRequest::new(Input::Chat(Vec::new()));
    let plan = Plan { defaults, is_raw: false, fan_out: Vec::new(), seed: 0, only: None };
    let words = [JSON, &WORDS].concat();
    fuzz("jsonl", &[LINES.into()], &words, |bytes| {
        std::fs::write(&input, bytes).unwrap();
        let source = Source::open(&[input.display().to_string()], &output).unwrap();
        let mut found = String::new();
        let mut lines = source.lines();
        loop {
            match lines.next_line() {
                Ok(None) => return found,
                Ok(Some(line)) => {
                    found += &plan.read(&line).err().map_or_else(String::new, |bad| bad.refused.message)
                }
                Err(error) => return error.to_string(),
            }
        }
    });
}
