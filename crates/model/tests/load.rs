//! Models as they come: the demo GGUF and the golden Hugging Face folder, against recorded values.

#![allow(clippy::unwrap_used)] // clippy knows tests, but not their helpers

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use uniarm_model::{Architecture, Message, ModelFiles, OpenOptions, open};

fn repository() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().and_then(Path::parent).expect("crates/model lies two levels down")
}

/// A folder of golden values, or a word on why not.
fn golden(path: &str) -> Option<PathBuf> {
    let shared =
        std::env::var_os("UNIARM_SHARED").map_or_else(|| repository().join("../shared"), PathBuf::from);
    let path = shared.join("golden").join(path);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// The demo model, fetched if need be, or a word on why not.
fn demo_model() -> Option<ModelFiles> {
    let output = Command::new(repository().join("scripts/fetch-demo-model.sh")).output().expect("a shell");
    if !output.status.success() {
        println!("skipped: no demo model: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    let path = String::from_utf8(output.stdout).expect("a path");
    Some(open(path.trim_end(), &OpenOptions::default()).expect("the demo model opens"))
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

#[test]
fn tokenizer_and_template_of_the_gguf_give_the_golden_prompts() {
    let (Some(golden), Some(files)) = (golden("smollm2.json"), demo_model()) else { return };
    let golden = json(&golden);
    let tokenizer = files.tokenizer.unwrap();
    let template = files.template.unwrap();
    let system = golden["system_reward"].as_str().unwrap();
    let system = system.trim_start_matches("<|im_start|>system\n").trim_end_matches("<|im_end|>\n");

    for case in golden["cases"].as_array().unwrap() {
        let question = message("user", case["question"].as_str().unwrap());
        let base = template.render(std::slice::from_ref(&question), true).unwrap();
        assert_eq!(base, case["prompt_base"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&base, false).unwrap(), ids(&case["ids_base"]));

        let reward = template.render(&[message("system", system), question], true).unwrap();
        assert_eq!(tokenizer.encode(&reward, false).unwrap(), ids(&case["ids_reward"]));

        for answer in ["greedy_base", "greedy_guided_prompted_w1"] {
            let tokens = ids(&case[answer]["tokens"]);
            let text: Vec<u8> = tokens.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
            assert_eq!(String::from_utf8(text).unwrap(), case[answer]["text"].as_str().unwrap());
        }
    }
    assert_eq!(tokenizer.eos(), [2]);
    assert_eq!(files.config.eos, [2]);
}

#[test]
fn the_demo_model_is_what_its_header_says() {
    let Some(files) = demo_model() else { return };
    let config = &files.config;
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.layers, config.hidden, config.intermediate), (30, 576, 1536));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.vocabulary, config.context_tokens), (49_152, 8192));
    assert!(config.tied_embeddings && !config.qkv_bias);
    assert_eq!(files.tokenizer.unwrap().vocabulary(), 49_152);

    let name = "model.layers.3.self_attn.q_proj.weight";
    let whole = files.weights.tensor(name, &[576, 576]).unwrap();
    let part = files.weights.rows(name, &[576, 576], 70..200).unwrap();
    let expected = whole.narrow(0, 70, 130).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(part.to_vec2::<f32>().unwrap(), expected);
}

#[test]
fn a_hugging_face_folder_opens_without_a_tokenizer() {
    let Some(folder) = golden("tiny-llama") else { return };
    let files = open(folder.to_str().unwrap(), &OpenOptions::default()).unwrap();
    assert_eq!(files.name, "tiny-llama");
    assert!(files.tokenizer.is_none() && files.template.is_none());
    assert_eq!((files.config.layers, files.config.hidden, files.config.head_dim), (2, 64, 16));
    assert_eq!(files.config.eos, [2]);
    let norm = files.weights.tensor("model.norm.weight", &[64]).unwrap();
    assert!(norm.to_vec1::<f32>().unwrap().iter().all(|x| x.is_finite()));
}
