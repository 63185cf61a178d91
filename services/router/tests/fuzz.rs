//! Files of tenants that somebody wrote in a hurry, and records that somebody has had his hands on.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use sha2::{Digest as _, Sha256};
use uniarm_fuzz::{JSON, fuzz, scratch};
use uniarm_proto::{GenerateRequest, Input, digits::hexadecimal};
use uniarm_router::{
    audit::{Answer, Link, Record},
    tenants::Tenants,
};

const FILE: &str = r#"[[tenants]]
name = "a"
keys = ["sha256:0000000000000000000000000000000000000000000000000000000000000001"]
base_models = ["m"]
requests_max = 64
requests_per_minute = 600
tokens_per_minute = 100000
priority = "normal"
guidance_min = 1.0
[tenants.floors]
harmless = 0.5
"#;

#[test]
fn tenants_of_strangers() {
    let folder = tempfile::tempdir_in(scratch()).unwrap();
    let path = folder.path().join("tenants.toml");
    fuzz(
        "tenants",
        &[FILE.into()],
        &["[[tenants]]", "nan", "inf", "-1", "\"\"", "= ", "\n", "sha256:"],
        |bytes| {
            std::fs::write(&path, bytes).unwrap();
            let opened = Tenants::open(&path);
            if let Ok(tenants) = &opened {
                assert!(tenants.identify(Some("Bearer x")).is_err());
            }
            opened.err().map_or_else(String::new, |error| error.to_string())
        },
    );
}

/// A record under a hash that is right, and so one that is read.
fn line(record: &[u8]) -> String {
    let zeros = [0_u8; 32];
    let hash = Sha256::digest([&zeros[..], record].concat());
    let [before, own] = [&zeros[..], &hash].map(hexadecimal);
    let record = String::from_utf8_lossy(record);
    format!("{{\"previous\":\"{before}\",\"hash\":\"{own}\",\"record\":{record}}}")
}

#[test]
fn records_of_strangers() {
    let answer = Answer { ids: vec![1, 2], base_logprobs: vec![Some(-0.5), None], ..Answer::default() };
    let request = GenerateRequest::new(Input::Prompt("a".into())).into();
    let record = Record { request, answers: vec![answer], ..Record::default() };
    let record = serde_json::to_vec(&record).unwrap();
    let read = |line: &str| Link::read(line, None).err().map_or_else(String::new, |error| error.to_string());
    assert_eq!(read(&line(&record)), "");
    fuzz("records", std::slice::from_ref(&record), JSON, |bytes| read(&line(bytes)));
    fuzz("lines of records", &[line(&record).into()], JSON, |bytes| read(&String::from_utf8_lossy(bytes)));
}
