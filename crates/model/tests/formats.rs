//! One made-up model in every file and number format: the same weights come out, and damage is a sentence.

#![allow(clippy::unwrap_used)] // clippy knows tests, but not their helpers

mod files;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use files::{SMALL, Shape, Tensors, WIDE, folder, gguf, mixed_gguf};
use uniarm_model::{Llama, LlamaOptions, Message, ModelError, ModelFiles, OpenOptions, open};

fn open_at(path: &Path) -> Result<ModelFiles, ModelError> {
    open(path.to_str().unwrap(), &OpenOptions::default())
}

fn open_bytes(bytes: &[u8]) -> Result<ModelFiles, ModelError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    open_at(&path)
}

fn refusal(opened: Result<ModelFiles, ModelError>) -> String {
    opened.err().expect("this is refused").to_string()
}

/// The largest difference between what comes out of the files and what went in.
fn largest_error(files: &ModelFiles, tensors: &Tensors) -> f32 {
    let mut largest = 0.0_f32;
    for (name, (shape, expected)) in tensors {
        let found =
            files.weights.tensor(name, shape).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let errors = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs());
        largest = errors.fold(largest, f32::max);
    }
    largest
}

#[test]
fn every_number_format_of_a_gguf_gives_back_the_weights() {
    let tensors = WIDE.tensors();
    // Half a step of each format for values in [-1, 1), a little more where scales are quantised too.
    for (kind, tolerance) in [
        (GgmlDType::F32, 0.0),
        (GgmlDType::F16, 0.000_25),
        (GgmlDType::BF16, 0.002),
        (GgmlDType::Q8_0, 0.0045),
        (GgmlDType::Q6K, 0.04),
        (GgmlDType::Q5_0, 0.07),
        (GgmlDType::Q5K, 0.06),
        (GgmlDType::Q4_0, 0.13),
        (GgmlDType::Q4_1, 0.07),
        (GgmlDType::Q4K, 0.11),
    ] {
        let files = open_bytes(&gguf(WIDE, &tensors, kind).bytes()).unwrap();
        let error = largest_error(&files, &tensors);
        assert!(error <= tolerance, "{kind:?}: {error}");
    }
}

#[test]
fn the_cache_has_half_precision_unless_a_projection_to_it_is_f32() {
    let tensors = WIDE.tensors();
    let numbers = 2 * WIDE.kv_heads * WIDE.head_dim();
    let is_value = |name: &str| name.ends_with(".v_proj.weight");
    for (kind, value, bytes) in [
        (GgmlDType::F32, GgmlDType::F32, 4),
        (GgmlDType::Q4_1, GgmlDType::F32, 4),
        (GgmlDType::Q4_1, GgmlDType::Q8_0, 2),
        (GgmlDType::BF16, GgmlDType::BF16, 2),
    ] {
        let kinds = |name: &str| if is_value(name) { value } else { kind };
        let files = open_bytes(&mixed_gguf(WIDE, &tensors, kinds).bytes()).unwrap();
        let of_token = Llama::kv_token_bytes(&files).unwrap();
        assert_eq!(of_token, bytes * numbers * files.config.layers, "{kind:?} and {value:?}");
        let options = LlamaOptions { threads: 1, kv_blocks: 1, block_tokens: 16, ..LlamaOptions::default() };
        let model = Llama::load(&files, &options).unwrap();
        assert_eq!(model.block_bytes(), 16 * of_token, "what is said is what is held");
    }
}

#[test]
fn a_qwen2_gguf_has_biases_and_is_not_permuted() {
    let shape = Shape { biases: true, ..SMALL };
    let tensors = shape.tensors();
    let files = open_bytes(&gguf(shape, &tensors, GgmlDType::F32).bytes()).unwrap();
    assert!(files.config.qkv_bias);
    assert_eq!(largest_error(&files, &tensors), 0.0);
}

#[test]
fn rows_are_those_of_the_whole_tensor_in_any_range() {
    let tensors = SMALL.tensors();
    let files = open_bytes(&gguf(SMALL, &tensors, GgmlDType::Q8_0).bytes()).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let whole = files.weights.tensor(name, &[32, 32]).unwrap().to_vec2::<f32>().unwrap();
    for (start, end) in [(0, 32), (0, 1), (5, 5), (7, 9), (15, 17), (31, 32)] {
        let rows = files.weights.rows(name, &[32, 32], start..end).unwrap();
        assert_eq!(rows.to_vec2::<f32>().unwrap(), whole[start..end], "{start}..{end}");
    }
    assert!(files.weights.rows(name, &[32, 32], 30..33).is_err());
}

#[test]
fn shards_and_single_files_are_one_model_and_any_change_is_another() {
    let mut tensors = SMALL.tensors();
    let make = |tensors: &Tensors, shards: usize| {
        let directory = tempfile::tempdir().unwrap();
        folder(directory.path(), SMALL, tensors, shards);
        let files = open_at(directory.path()).unwrap();
        assert_eq!(largest_error(&files, tensors), 0.0);
        files.fingerprint
    };
    let fingerprint = make(&tensors, 1);
    assert_eq!(make(&tensors, 3), fingerprint);
    for value in &mut tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().1 {
        *value = -*value;
    }
    assert_ne!(make(&tensors, 1), fingerprint);
}

#[test]
fn the_tokenizer_of_a_gguf_round_trips() {
    let files = open_bytes(&gguf(SMALL, &SMALL.tensors(), GgmlDType::F32).bytes()).unwrap();
    let (tokenizer, template) = (files.tokenizer.unwrap(), files.template.unwrap());
    let message = Message { role: "user".to_owned(), content: "hello he</s>".to_owned() };
    let prompt = template.render(&[message], true).unwrap();
    assert_eq!(prompt, "<s>hello he</s>");
    let ids = tokenizer.encode(&prompt, false).unwrap();
    let texts: Vec<&[u8]> = ids.iter().map(|id| tokenizer.token_bytes(*id)).collect();
    assert_eq!(texts, [b"".as_slice(), b"hel", b"l", b"o", b" ", b"he", b""]);
    assert!(tokenizer.is_special(1) && tokenizer.is_special(2) && !tokenizer.is_special(3));
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), [2].as_slice()));
    assert!(tokenizer.token_bytes(u32::MAX).is_empty());
}

/// Calls `check` with every byte of the header replaced by each of `values(byte)`, one at a time. The file is
/// changed in place: writing it anew ten thousand times is what a disk is slow at.
fn with_each_header_byte(file: &Path, header: usize, values: impl Fn(u8) -> Vec<u8>, check: impl Fn()) {
    let bytes = std::fs::read(file).unwrap();
    let handle = File::options().write(true).open(file).unwrap();
    for at in 0..header {
        for value in values(bytes[at]) {
            handle.write_all_at(&[value], at as u64).unwrap();
            check();
        }
        handle.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
}

/// Calls `check` with the file cut to every length of its header and to some beyond, the longest first.
fn with_each_length(file: &Path, header: usize, check: impl Fn()) {
    let handle = File::options().write(true).open(file).unwrap();
    let length = handle.metadata().unwrap().len() as usize;
    for length in (0..header).chain((header..length - 1).step_by(499)).chain([length - 1]).rev() {
        handle.set_len(length as u64).unwrap();
        check();
    }
}

#[test]
fn a_damaged_gguf_is_an_error_and_never_a_panic() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let writer = gguf(SMALL, &SMALL.tensors(), GgmlDType::Q8_0);
    std::fs::write(&path, writer.bytes()).unwrap();
    // Counts become huge, negative or off by one.
    let values = |byte: u8| vec![0xFF, byte.wrapping_add(1)];
    with_each_header_byte(&path, writer.header_bytes(), values, || {
        if let Ok(files) = open_at(&path) {
            let name = "model.layers.0.self_attn.k_proj.weight";
            let _ = files.weights.tensor(name, &files.weights.shape(name).unwrap());
        }
    });
    assert!(open_at(&path).is_ok());
    with_each_length(&path, writer.header_bytes(), || {
        let sentence = refusal(open_at(&path));
        assert!(sentence.contains("model.gguf"), "{sentence}");
    });
}

#[test]
fn a_damaged_safetensors_file_is_an_error_and_never_a_panic() {
    let directory = tempfile::tempdir().unwrap();
    folder(directory.path(), SMALL, &SMALL.tensors(), 1);
    let file = directory.path().join("model.safetensors");
    let length = std::fs::read(&file).unwrap()[..8].try_into().unwrap();
    let header = 8 + u64::from_le_bytes(length) as usize;
    with_each_header_byte(&file, header, |_| vec![0, b'9', 0xFF], || _ = open_at(directory.path()));
    assert!(open_at(directory.path()).is_ok());
    with_each_length(&file, header, || {
        let sentence = refusal(open_at(directory.path()));
        assert!(sentence.contains("model.safetensors"), "{sentence}");
    });
}

#[test]
fn what_does_not_belong_together_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = SMALL.tensors();
        change(&mut tensors);
        folder(directory.path(), SMALL, &tensors, 1);
        refusal(open_at(directory.path()))
    };
    let up = "model.layers.0.mlp.up_proj.weight";
    let sentence = refused(&|tensors| _ = tensors.remove(up));
    assert!(sentence.contains(up) && sentence.contains("missing"), "{sentence}");
    let sentence = refused(&|tensors| tensors.get_mut(up).unwrap().0 = vec![64, 16]);
    assert!(sentence.contains("[64, 16] instead of [32, 32]"), "{sentence}");
    let sentence = refused(&|tensors| {
        let surplus = tensors[up].clone();
        tensors.insert("model.layers.0.self_attn.q_norm.weight".to_owned(), surplus);
    });
    assert!(sentence.contains("q_norm") && sentence.contains("not supported"), "{sentence}");
}

#[test]
fn a_missing_shard_is_named() {
    let directory = tempfile::tempdir().unwrap();
    folder(directory.path(), SMALL, &SMALL.tensors(), 2);
    std::fs::remove_file(directory.path().join("model-1.safetensors")).unwrap();
    let sentence = refusal(open_at(directory.path()));
    assert!(sentence.contains("model-1.safetensors"), "{sentence}");
}

#[test]
fn other_architectures_are_refused_by_name() {
    let with = |key: &str, value: u32| {
        let mut writer = gguf(SMALL, &SMALL.tensors(), GgmlDType::F32);
        writer.count(key, value);
        refusal(open_bytes(&writer.bytes()))
    };
    assert!(with("llama.expert_count", 8).contains("mixture of experts"));
    assert!(with("split.count", 3).contains("one of 3 parts"));
    assert!(with("llama.rope.dimension_count", 8).contains("rotating 8 of 16"));
    let mut writer = gguf(SMALL, &SMALL.tensors(), GgmlDType::F32);
    writer.text("llama.rope.scaling.type", "yarn");
    assert!(refusal(open_bytes(&writer.bytes())).contains("rope scaling 'yarn'"));
    let mut writer = gguf(SMALL, &SMALL.tensors(), GgmlDType::F32);
    writer.text("general.architecture", "mamba");
    assert!(refusal(open_bytes(&writer.bytes())).contains("architecture 'mamba'"));
    assert!(refusal(open_bytes(b"PK\x03\x04 not a model")).contains("not a GGUF file"));
}

#[test]
fn a_source_that_is_nothing_is_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    assert!(refusal(open_at(&directory.path().join("absent"))).contains("no such file or folder"));
    assert!(refusal(open_at(directory.path())).contains("neither config.json nor a GGUF file"));
    let offline =
        OpenOptions { cache_dir: Some(directory.path().to_owned()), offline: true, ..OpenOptions::default() };
    let sentence = refusal(open("hf://org/name", &offline));
    assert!(sentence.contains("hf://org/name") && sentence.contains("offline"), "{sentence}");
}
