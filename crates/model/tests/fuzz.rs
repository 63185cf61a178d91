//! Files of strangers: models, adapters, tokenizers and templates that are not what they claim to be.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

#[allow(dead_code)] // the tests of formats use more of it
mod files;

use std::path::Path;

use candle_core::quantized::GgmlDType;
use files::{SMALL, folder, gguf};
use serde_json::{Value, json};
use uniarm_fuzz::{JSON, fuzz, scratch};
use uniarm_model::{Message, ModelError, ModelFiles, OpenOptions, open};

const TOKENIZER_CONFIG: &str = r#"{ "bos_token": "<s>", "eos_token": { "content": "</s>" }, "add_bos_token": true,
    "chat_template": "{% for m in messages %}<s>{{ m['role'] | upper }}: {{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}" }"#;

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
    let path = directory.path().join(file);
    folder(directory.path(), SMALL, &SMALL.tensors(), 1);
    std::fs::write(directory.path().join("tokenizer.json"), &tokenizers()[0]).unwrap();
    std::fs::write(directory.path().join("tokenizer_config.json"), TOKENIZER_CONFIG).unwrap();
    let seeds = match file {
        "tokenizer.json" => tokenizers().to_vec(),
        _ => vec![std::fs::read(&path).unwrap()],
    };
    let sound = used(open_at(directory.path()));
    assert!(sound.is_empty(), "without an alteration: {sound}");
    fuzz(name, &seeds, JSON, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        used(open_at(directory.path()))
    });
}

/// Of both kinds that are read: merges of bytes, as of Llama 3, and of words' pieces, as of Llama 2.
fn tokenizers() -> [Vec<u8>; 2] {
    let added = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let letters = |letters: &str, first: u32| -> serde_json::Map<String, Value> {
        letters.chars().zip(first..).map(|(letter, id)| (letter.to_string(), id.into())).collect()
    };
    let mut bytes = letters("Telm.Ġahx", 2);
    bytes.insert("Te".to_owned(), 11.into());
    let of_bytes = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<s>"), added(1, "</s>")],
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": "\\p{N}{1,3}" }, "behavior": "Isolated", "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true }] },
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } } },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": bytes, "merges": ["T e"] },
    });
    let mut pieces = letters("▁Telm.ahi", 3);
    pieces.insert("<unk>".to_owned(), 2.into());
    pieces.insert("▁T".to_owned(), 12.into());
    let of_pieces = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<s>"), added(1, "</s>"), added(2, "<unk>")],
        "normalizer": { "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" }] },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" },
            { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": pieces, "merges": ["▁ T"] },
    });
    [of_bytes, of_pieces].map(|tokenizer| tokenizer.to_string().into_bytes())
}

#[test]
fn safetensors_of_strangers() {
    fuzz_file("safetensors", "model.safetensors");
}

#[test]
fn configurations_of_strangers() {
    fuzz_file("config", "config.json");
}

#[test]
fn tokenizers_of_strangers() {
    // The library's own panics are caught and become a sentence: their messages by the thousand would hide everything else.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|place| place.file().contains("/tokenizers-")) {
            tell(panic);
        }
    }));
    fuzz_file("tokenizer", "tokenizer.json");
}

#[test]
fn templates_of_strangers() {
    fuzz_file("template", "tokenizer_config.json");
}
