//! A model of two small layers with a byte-level tokenizer, pairs, a configuration, and the binary over them.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;

const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 48;
const HEADS: usize = 4;
const KEY_HEADS: usize = 2;
const LAYERS: usize = 2;
/// Bytes, and the two marks of a turn.
const VOCABULARY: usize = 258;
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const CONFIG: &str = r#"
model = "model"
pairs = ["pairs.jsonl"]
steps = 30
batch = 4
pass_tokens = 200
held_out_share = 0.2
evaluate_every = 5
checkpoint_every = 3

[[objectives]]
name = "short"
description = "few words"

[[objectives]]
name = "nice"
description = "kind words"

[optimizer]
learning_rate = 0.02
warm_up_steps = 3

[adapter]
method = "moslora"
rank = 4
alpha = 8
dropout = 0.1
"#;

pub struct Scene(tempfile::TempDir);

// === impl Scene ===

impl Scene {
    pub fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(scene.path("model")).unwrap();
        write_model(&scene.path("model"));
        std::fs::write(scene.path("config.toml"), CONFIG).unwrap();
        for index in 0..32 {
            let answer = |kind: usize| "good word ".repeat(1 + (index * 3 + kind * 5) % 7) + "end";
            let nice = (index * 7 % 5) as f32 - 1.9;
            let line = json!({
                "prompt": format!("question {index}"),
                "response_a": answer(0),
                "response_b": answer(1) + "!",
                "scores": {
                    "short": { "a": -(answer(0).len() as f32), "b": -(answer(1).len() as f32) },
                    "nice": { "a": nice, "b": 0.0 },
                },
            });
            scene.add_pair(&line.to_string());
        }
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn add_pair(&self, line: &str) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(self.path("pairs.jsonl"));
        writeln!(file.unwrap(), "{line}").unwrap();
    }

    fn command(&self, program: &str, run: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(program);
        if program == "sh" {
            command.args(["-c", "trap '' XFSZ; ulimit -f \"$0\"; exec \"$@\"", flags[0]]);
            command.arg(env!("CARGO_BIN_EXE_uniarm")).args(&flags[1..]);
        }
        command.args(["train", "--threads", "1"]).arg(self.path("config.toml"));
        command.arg("--out").arg(self.path(run));
        if program != "sh" {
            command.args(flags);
        }
        command
    }

    pub fn start(&self, run: &str, flags: &[&str]) -> Child {
        let mut command = self.command(env!("CARGO_BIN_EXE_uniarm"), run, flags);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// The run folder, once the run has ended well.
    pub fn finish(&self, run: &str, flags: &[&str]) -> PathBuf {
        let output = self.command(env!("CARGO_BIN_EXE_uniarm"), run, flags).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.path(run)
    }

    /// What the run says on its way down.
    pub fn fail(&self, run: &str, flags: &[&str]) -> String {
        failure(&mut self.command(env!("CARGO_BIN_EXE_uniarm"), run, flags))
    }

    /// The same, where no file may have more than so many bytes; in the blocks of 512 that POSIX prescribes.
    pub fn fail_with_limit(&self, run: &str, bytes: u64) -> String {
        let blocks = (bytes / 512).to_string();
        let mut command = self.command("sh", run, &[&blocks]);
        failure(command.arg("--resume"))
    }
}

fn failure(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "it did not fail");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn lines(file: &Path) -> usize {
    std::fs::read(file).map_or(0, |bytes| bytes.iter().filter(|byte| **byte == b'\n').count())
}

pub fn checkpoints(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> =
        names.filter(|name| name.starts_with("checkpoint-") && !name.ends_with(".new")).collect();
    names.sort();
    names
}

/// All numbers of a run's adapter.
pub fn weights(folder: &Path) -> Vec<f32> {
    let bytes = std::fs::read(folder.join("adapter/adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: BTreeMap<_, _> = file.tensors().into_iter().collect();
    let numbers = tensors.values().flat_map(|tensor| tensor.data().chunks_exact(4));
    numbers.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn write_model(folder: &Path) {
    let write = |name: &str, value: serde_json::Value| {
        std::fs::write(folder.join(name), value.to_string()).unwrap();
    };
    write(
        "config.json",
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu",
            "eos_token_id": 257,
        }),
    );
    write("tokenizer_config.json", json!({ "eos_token": "<|im_end|>", "chat_template": TEMPLATE }));
    let added = |(id, content): (usize, &str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let vocabulary: BTreeMap<String, usize> = byte_characters()
        .into_iter()
        .enumerate()
        .map(|(id, character)| (character.to_string(), id))
        .collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    write(
        "tokenizer.json",
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [added((256, "<|im_start|>")), added((257, "<|im_end|>"))],
            "pre_tokenizer": byte_level, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": vocabulary, "merges": [],
            },
        }),
    );
    write_weights(&folder.join("model.safetensors"));
}

/// One printable character for each byte, as GPT-2 spells them.
fn byte_characters() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 256..;
    let code = |byte: u32| if printable(byte) { byte } else { others.next().unwrap() };
    (0..256).map(code).map(|code| char::from_u32(code).unwrap()).collect()
}

fn write_weights(file: &Path) {
    let keys = HIDDEN / HEADS * KEY_HEADS;
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN])];
    shapes.push(("model.norm.weight".to_owned(), vec![HIDDEN]));
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![keys, HIDDEN]),
            ("self_attn.v_proj", vec![keys, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut state = 1_u32;
    let mut number = |centre: f32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (centre + 0.4 * ((state >> 8) as f32 / 8_388_608.0 - 1.0)).to_le_bytes()
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let centre = if shape.len() == 1 { 1.0 } else { 0.0 };
            let bytes = (0..shape.iter().product()).flat_map(|_| number(centre)).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}
