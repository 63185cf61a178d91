//! Files that are no preference pairs, nearly.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use uniarm_fuzz::{JSON, fuzz, scratch};
use uniarm_trainer::pairs::{self, OnBadLine};

const LINES: &str = r#"{"prompt": "Hi", "response_a": "Hello.", "response_b": "What?", "preferred": {"kind": "a", "short": "b"}}
{"messages": [{"role": "user", "content": "Hi"}], "response_a": "x", "response_b": "y", "scores": {"kind": {"a": 1, "b": -2.5}}, "finished": {"a": true, "b": false}}
"#;

#[test]
fn pairs_of_strangers() {
    let folder = tempfile::tempdir_in(scratch()).unwrap();
    let file = folder.path().join("pairs.jsonl");
    fuzz("pairs", &[LINES.into()], JSON, |bytes| {
        std::fs::write(&file, bytes).unwrap();
        match pairs::read(
            std::slice::from_ref(&file),
            &["kind".to_owned()],
            &["kind".to_owned()],
            OnBadLine::Skip,
        ) {
            Ok(found) => found.bad.summary(),
            Err(error) => error.to_string(),
        }
    });
}
