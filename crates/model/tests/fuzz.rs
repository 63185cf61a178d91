//! Files of strangers: models, adapters, tokenizers and templates that are not what they claim to be.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

#[allow(dead_code)] // the tests of formats use more of it
mod files;

use std::path::Path;

use candle_core::quantized::GgmlDType;
use files::{SMALL, folder, gguf};
use uniarm_fuzz::{JSON, fuzz, scratch};
use uniarm_model::{Message, ModelError, ModelFiles, OpenOptions, open};

fn open_at(path: &Path) -> Result<ModelFiles, ModelError> {
    open(path.to_str().unwrap(), &OpenOptions::default())
}

/// Everything that is done with a model before anything runs.
fn used(opened: Result<ModelFiles, ModelError>) -> String {
    let files = match opened {
        Ok(files) => files,
        Err(error) => return error.to_string(),
    };
    let mut found = String::new();
    for (name, shape) in [("model.norm.weight", vec![32]), ("lm_head.weight", vec![32, 32])] {
        found +=
            &files.weights.tensor(name, &shape).err().map_or_else(String::new, |error| error.to_string());
    }
    if let Some(tokenizer) = &files.tokenizer {
        found +=
            &tokenizer.encode("Tell me.", true).err().map_or_else(String::new, |error| error.to_string());
    }
    if let Some(template) = &files.template {
        let messages = [Message { role: "user".into(), content: "Hi".into() }];
        found += &template.render(&messages, true).err().map_or_else(String::new, |error| error.to_string());
    }
    found
}

#[test]
fn ggufs_of_strangers() {
    let directory = tempfile::tempdir_in(scratch()).unwrap();
    let path = directory.path().join("model.gguf");
    let tensors = SMALL.tensors();
    let seeds = [GgmlDType::F32, GgmlDType::Q8_0].map(|kind| gguf(SMALL, &tensors, kind).bytes());
    let words =
        ["GGUF", "general.architecture", "tokenizer.ggml.tokens", "llama.block_count", "{{ x }}", "{% for"];
    fuzz("gguf", &seeds, &words, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        used(open_at(&path))
    });
}

/// One file of a folder altered, the others as they should be.
fn fuzz_file(name: &str, file: &str) {
    let directory = tempfile::tempdir_in(scratch()).unwrap();
    folder(directory.path(), SMALL, &SMALL.tensors(), 1);
    let path = directory.path().join(file);
    let seed = std::fs::read(&path).unwrap();
    fuzz(name, &[seed], JSON, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        used(open_at(directory.path()))
    });
}

#[test]
fn safetensors_of_strangers() {
    fuzz_file("safetensors", "model.safetensors");
}

#[test]
fn configurations_of_strangers() {
    fuzz_file("config", "config.json");
}
