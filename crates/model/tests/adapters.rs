//! Adapters that load, and adapters that are refused with a sentence.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use uniarm_fuzz::{JSON, fuzz, scratch};
use uniarm_model::{Adapter, AdapterFiles, Architecture, Config, Method, Rope, RopeScaling};

const FINGERPRINT: [u8; 32] = [0xab; 32];

/// A backbone of two layers with 32 inputs, 32 queries, 16 keys.
fn config() -> Config {
    Config {
        architecture: Architecture::Llama,
        vocabulary: 100,
        hidden: 32,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        intermediate: 48,
        context_tokens: 64,
        rms_norm_epsilon: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tied_embeddings: true,
        qkv_bias: false,
        bos: None,
        eos: vec![2],
    }
}

/// An adapter folder in the making: its JSON, and its tensors by name.
struct Folder {
    json: Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Folder {
    /// MoSLoRA of rank 4 with mlp heads on q and v, one-hot over two objectives.
    fn moslora() -> Self {
        let json = json!({
            "peft_type": "MOSLORA", "r": 4, "lora_alpha": 8, "conditioning": "onehot", "head": "mlp",
            "target_modules": ["q_proj", "v_proj"],
            "objectives": [{"name": "kind", "description": "kind: to others"}, {"name": "short"}],
            "backbone_fingerprint": "ab".repeat(32), "backbone_vocabulary": 100,
        });
        let mut folder = Self { json, tensors: BTreeMap::new() };
        for layer in 0..2 {
            for (target, outputs) in [("q", 32), ("v", 16)] {
                let stem = format!("base_model.model.model.layers.{layer}.self_attn.{target}_proj.moslora_");
                folder.put(&format!("{stem}A.weight"), &[4, 32]);
                folder.put(&format!("{stem}B.weight"), &[outputs, 4]);
                for head in ["gamma", "beta"] {
                    folder.put(&format!("{stem}{head}.0.weight"), &[6, 2]);
                    folder.put(&format!("{stem}{head}.0.bias"), &[6]);
                    folder.put(&format!("{stem}{head}.2.weight"), &[4, 6]);
                    folder.put(&format!("{stem}{head}.2.bias"), &[4]);
                }
            }
        }
        folder
    }

    /// LoRA as PEFT saves it, on the first layer's mlp.
    fn lora() -> Self {
        let json = json!({
            "peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["down_proj", "up_proj"],
            "layers_to_transform": [0], "task_type": "CAUSAL_LM", "rank_pattern": {}, "modules_to_save": null,
            "use_rslora": false, "init_lora_weights": true, "lora_dropout": 0.05,
        });
        let mut folder = Self { json, tensors: BTreeMap::new() };
        for (target, outputs, inputs) in [("down", 32, 48), ("up", 48, 32)] {
            let stem = format!("base_model.model.model.layers.0.mlp.{target}_proj.lora_");
            folder.put(&format!("{stem}A.weight"), &[8, inputs]);
            folder.put(&format!("{stem}B.weight"), &[outputs, 8]);
        }
        folder
    }

    fn put(&mut self, name: &str, shape: &[usize]) {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect();
        self.tensors.insert(
            name.to_owned(),
            Tensor::from_vec(values, shape, &Device::Cpu).expect("the shape's count"),
        );
    }

    /// The name of a tensor that ends so.
    fn name(&self, end: &str) -> String {
        self.tensors.keys().find(|name| name.ends_with(end)).expect("a tensor of this name").clone()
    }

    fn write(&self, folder: &Path) {
        std::fs::write(folder.join("adapter_config.json"), self.json.to_string()).expect("a writable folder");
        let tensors: std::collections::HashMap<_, _> = self.tensors.clone().into_iter().collect();
        candle_core::safetensors::save(&tensors, folder.join("adapter_model.safetensors"))
            .expect("a writable folder");
    }

    fn load(&self) -> Result<Adapter, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        self.write(folder.path());
        Adapter::load(folder.path(), &config(), &FINGERPRINT).map_err(|error| error.to_string())
    }
}

#[test]
fn sound_adapters_load_and_are_conditioned_on_their_simplex_only() {
    let adapter = Arc::new(Folder::moslora().load().expect("a sound adapter"));
    assert_eq!(adapter.method(), Method::MosLora);
    let names: Vec<&str> = adapter.objectives().iter().map(|objective| objective.name.as_str()).collect();
    assert_eq!(names, ["kind", "short"]);

    let key = |p: &[f32]| adapter.condition(p).map(|conditioned| conditioned.key());
    assert_eq!(key(&[0.3, 0.7]).ok(), key(&[0.3, 0.7]).ok());
    assert_eq!(key(&[0.0, 1.0]).ok(), key(&[-0.0, 1.0]).ok());
    assert_ne!(key(&[0.3, 0.7]).ok(), key(&[0.7, 0.3]).ok());
    for wrong in [&[1.0][..], &[0.5, 0.5, 0.0], &[], &[1.5, -0.5], &[f32::NAN, 1.0], &[0.2, 0.2], &[0.0, 0.0]]
    {
        let error = key(wrong).expect_err("not a preference of two objectives");
        assert!(error.to_string().starts_with("preference: "), "{error}");
    }

    let lora = Arc::new(Folder::lora().load().expect("a sound adapter"));
    assert_eq!((lora.method(), lora.objectives().len()), (Method::Lora, 0));
    assert!(lora.condition(&[]).is_ok() && lora.condition(&[1.0]).is_err());
}

/// Either file of an adapter altered, the other as it should be.
#[test]
fn adapters_of_strangers_are_refused_with_a_sentence() {
    for (name, adapter, file) in [
        ("adapter-config", Folder::moslora(), "adapter_config.json"),
        ("adapter-tensors", Folder::lora(), "adapter_model.safetensors"),
    ] {
        let folder = tempfile::tempdir_in(scratch()).expect("a temporary folder");
        adapter.write(folder.path());
        let path = folder.path().join(file);
        let seed = std::fs::read(&path).expect("it was written");
        fuzz(name, &[seed], JSON, |bytes| {
            std::fs::write(&path, bytes).expect("a writable folder");
            match Adapter::load(folder.path(), &config(), &FINGERPRINT).map(Arc::new) {
                Ok(adapter) => {
                    adapter.condition(&[0.5, 0.5]).err().map_or_else(String::new, |error| error.to_string())
                }
                Err(error) => error.to_string(),
            }
        });
    }
}

#[test]
fn an_adapter_of_another_backbone_or_an_unsound_one_is_refused_with_a_sentence() {
    type Change = fn(&mut Folder);
    let cases: [(&str, Change); 17] = [
        ("trained on backbone cdcd", |f| f.json["backbone_fingerprint"] = "cd".repeat(32).into()),
        ("vocabulary of 99", |f| f.json["backbone_vocabulary"] = 99.into()),
        ("peft_type 'IA3'", |f| f.json["peft_type"] = "IA3".into()),
        ("'r' is missing", |f| f.json["r"] = Value::Null),
        ("'r' 0 is not in", |f| f.json["r"] = 0.into()),
        ("'lora_alpha' is missing", |f| f.json["lora_alpha"] = "8".into()),
        ("head \"deep\" is neither", |f| f.json["head"] = "deep".into()),
        ("objective 'kind' stands twice", |f| f.json["objectives"][1]["name"] = "kind".into()),
        ("'use_dora' is not supported", |f| f.json["use_dora"] = true.into()),
        ("'rank_pattern' is not supported", |f| f.json["rank_pattern"] = json!({"q_proj": 2})),
        ("target module 'c_attn'", |f| f.json["target_modules"] = json!(["c_attn"])),
        ("layer 7 of a backbone with 2", |f| f.json["layers_to_transform"] = json!([7])),
        ("k_proj.moslora_A.weight' is missing", |f| {
            f.json["target_modules"] = json!(["q_proj", "k_proj", "v_proj"])
        }),
        ("v_proj.moslora_A.weight' belongs to no target", |f| f.json["target_modules"] = json!(["q_proj"])),
        ("has shape [2, 6] instead of [4, 6]", |f| f.put(&f.name("gamma.2.weight"), &[2, 6])),
        ("has shape [6, 3] instead of [6, 2]", |f| f.put(&f.name("beta.0.weight"), &[6, 3])),
        ("has NaN at element 5", |f| {
            let mut values = vec![0.0f32; 64];
            values[5] = f32::NAN;
            let tensor = Tensor::from_vec(values, (16, 4), &Device::Cpu).expect("64 values");
            f.tensors.insert(f.name("v_proj.moslora_B.weight"), tensor);
        }),
    ];
    for (sentence, change) in cases {
        let mut folder = Folder::moslora();
        change(&mut folder);
        let error = folder.load().expect_err(sentence);
        assert!(error.contains(sentence), "'{error}' does not say '{sentence}'");
        assert!(
            error.contains("adapter_config.json") || error.contains("adapter_model.safetensors"),
            "{error}"
        );
    }
}

#[test]
fn a_truncated_or_corrupt_adapter_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Folder::moslora().write(folder.path());
    let file = folder.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).expect("the file just written");
    let load = || Adapter::load(folder.path(), &config(), &FINGERPRINT).map_err(|error| error.to_string());
    for len in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..len]).expect("a writable file");
        let error = load().expect_err("a truncated file");
        assert!(error.contains("adapter_model.safetensors"), "{error}");
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&file, huge).expect("a writable file");
    load().expect_err("a header longer than any file");

    std::fs::write(&file, &bytes).expect("a writable file");
    load().expect("the whole file");
    std::fs::write(folder.path().join("adapter_config.json"), "{\"peft_type\": ").expect("a writable file");
    assert!(load().expect_err("half a JSON").contains("not JSON"));
    std::fs::remove_file(&file).expect("the file");
    load().expect_err("no tensors");
}

#[test]
fn files_are_known_by_their_digest_and_refused_when_they_change() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Folder::moslora().write(folder.path());
    let known = AdapterFiles::read(folder.path()).expect("an adapter");
    assert_eq!(known.backbone, Some("ab".repeat(32)));
    let load = || Adapter::load_known(folder.path(), &config(), &FINGERPRINT, &known.digest);
    load().expect("the files that are known");

    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let file = folder.path().join(name);
        let bytes = std::fs::read(&file).expect("the file just written");
        let mut altered = bytes.clone();
        // A blank at the end of JSON, the last bit of the last weight.
        if name.ends_with("json") {
            altered.push(b' ')
        } else {
            altered[bytes.len() - 4] ^= 1
        }
        std::fs::write(&file, altered).expect("a writable file");
        let error = load().expect_err("other bytes").to_string();
        assert!(error.contains("they have changed"), "{error}");
        assert_ne!(AdapterFiles::digest(folder.path()).expect("an adapter"), known.digest);
        std::fs::write(&file, bytes).expect("a writable file");
    }
    std::fs::write(folder.path().join("adapter_config.json"), "{}").expect("a writable file");
    AdapterFiles::read(folder.path()).expect_err("no adapter");
}
