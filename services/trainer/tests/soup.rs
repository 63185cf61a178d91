//! A soup is the mean of its LoRAs: alone each of them, mixed the backbone with the mean of their updates.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

#[allow(dead_code)]
#[path = "../../../crates/model/tests/files/mod.rs"]
mod files;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;
use uniarm_model::{Adapter, Conditioned, ModelFiles, OpenOptions, reference};
use uniarm_trainer::soup::{Ingredient, Soup, cook};

use files::{SMALL, Tensors};

const TOKENS: [u32; 9] = [1, 9, 4, 30, 17, 5, 5, 22, 8];
const PROJECTIONS: [(&str, &str); 4] = [
    ("q_proj", "self_attn.q_proj"),
    ("v_proj", "self_attn.v_proj"),
    ("o_proj", "self_attn.o_proj"),
    ("up_proj", "mlp.up_proj"),
];

/// A LoRA as it was made: rank, scale, and A and B of its modules.
struct Made {
    rank: usize,
    scale: f32,
    matrices: Vec<(&'static str, Vec<f32>, Vec<f32>)>,
}

struct Scene {
    folder: TempDir,
    backbone: Tensors,
    loras: Vec<Made>,
}

fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    std::iter::repeat_with(next).map(|x| 0.3 * x).take(count).collect()
}

/// The files of a backbone, all in f32.
fn write_backbone(at: &Path, tensors: &Tensors) -> ModelFiles {
    std::fs::create_dir_all(at).unwrap();
    std::fs::write(at.join("config.json"), SMALL.config_json().to_string()).unwrap();
    let tensor = |(shape, values): &(Vec<usize>, Vec<f32>)| {
        Tensor::from_slice(values, shape.as_slice(), &Device::Cpu).unwrap()
    };
    let tensors: HashMap<_, _> = tensors.iter().map(|(name, data)| (name.clone(), tensor(data))).collect();
    candle_core::safetensors::save(&tensors, at.join("model.safetensors")).unwrap();
    uniarm_model::open(at.to_str().unwrap(), &OpenOptions::default()).unwrap()
}

impl Scene {
    /// Three LoRAs of different ranks and scales, which adapt different layers.
    fn new() -> Self {
        let mut scene =
            Self { folder: TempDir::new().unwrap(), backbone: SMALL.tensors(), loras: Vec::new() };
        let files = write_backbone(&scene.path("backbone"), &scene.backbone);
        let fingerprint: String = files.fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
        let whose = json!({ "backbone_fingerprint": fingerprint, "backbone_vocabulary": 32 });
        scene.lora("first", 4, &json!({ "lora_alpha": 6 }), 1.5, &["q_proj", "v_proj"]);
        scene.lora("second", 4, &json!({ "lora_alpha": 4, "use_rslora": true }), 2.0, &["q_proj", "o_proj"]);
        scene.lora("third", 2, &whose, 4.0, &["v_proj", "up_proj"]);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn lora(&mut self, name: &str, rank: usize, extra: &Value, scale: f32, targets: &[&str]) {
        let mut json = json!({ "peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": targets });
        json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (mut made, mut tensors) = (Made { rank, scale, matrices: Vec::new() }, HashMap::new());
        for (index, (short, module)) in PROJECTIONS.into_iter().enumerate() {
            if !targets.contains(&short) {
                continue;
            }
            let (shape, _) = &self.backbone[&format!("model.layers.0.{module}.weight")];
            let (outputs, inputs) = (shape[0], shape[1]);
            let seed = (name.len() + 31 * index) as u32;
            let (a, b) = (numbers(seed, rank * inputs), numbers(seed + 7, outputs * rank));
            let stem = format!("base_model.model.model.layers.0.{module}");
            let tensor = |values: &[f32], shape| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
            tensors.insert(format!("{stem}.lora_A.weight"), tensor(&a, (rank, inputs)));
            tensors.insert(format!("{stem}.lora_B.weight"), tensor(&b, (outputs, rank)));
            made.matrices.push((module, a, b));
        }
        let folder = self.path(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("adapter_config.json"), json.to_string()).unwrap();
        candle_core::safetensors::save(&tensors, folder.join("adapter_model.safetensors")).unwrap();
        self.loras.push(made);
    }

    fn ingredients(&self) -> Vec<Ingredient> {
        ["first", "second", "third"]
            .map(|name| Ingredient { objective: format!("{name} wish"), folder: self.path(name) })
            .to_vec()
    }

    fn conditioned(&self, folder: &str, preference: &[f32]) -> Conditioned {
        let files = self.files();
        let adapter = Adapter::load(&self.path(folder), &files.config, &files.fingerprint).unwrap();
        Arc::new(adapter).condition(preference).unwrap()
    }

    fn files(&self) -> ModelFiles {
        uniarm_model::open(self.path("backbone").to_str().unwrap(), &OpenOptions::default()).unwrap()
    }

    /// The backbone plus Σ p_i s_i B_i A_i, written out.
    fn mixed_backbone(&self, preference: &[f32]) -> ModelFiles {
        let mut tensors = self.backbone.clone();
        for (made, weight) in self.loras.iter().zip(preference) {
            for (module, a, b) in &made.matrices {
                let (shape, values) = tensors.get_mut(&format!("model.layers.0.{module}.weight")).unwrap();
                let inputs = shape[1];
                for (at, value) in values.iter_mut().enumerate() {
                    let (row, column) = (at / inputs, at % inputs);
                    let product: f32 =
                        (0..made.rank).map(|j| b[row * made.rank + j] * a[j * inputs + column]).sum();
                    *value += weight * made.scale * product;
                }
            }
        }
        let name = format!("mixed {preference:?}");
        write_backbone(&self.path(&name), &tensors)
    }
}

fn logits(files: &ModelFiles, adapter: Option<&Conditioned>) -> Vec<f32> {
    reference::logits(files, &TOKENS, adapter).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, relative to the largest logit.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    a.iter().zip(b).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs())) / largest
}

#[test]
fn a_soup_is_each_lora_alone_and_the_mean_of_their_updates_in_between() {
    let scene = Scene::new();
    let soup = cook(&scene.ingredients(), &scene.path("soup")).unwrap();
    assert_eq!(soup, Soup { rank: 10, modules: 4 });
    let files = scene.files();
    let plain = logits(&files, None);
    for (index, name) in ["first", "second", "third"].into_iter().enumerate() {
        let mut alone = [0.0; 3];
        alone[index] = 1.0;
        let expected = logits(&files, Some(&scene.conditioned(name, &[])));
        let got = logits(&files, Some(&scene.conditioned("soup", &alone)));
        assert!(distance(&got, &expected) < 1e-5, "{name}: {}", distance(&got, &expected));
        assert!(distance(&plain, &expected) > 1e-2, "{name} changes nothing");
    }
    for preference in [[0.2, 0.5, 0.3], [0.5, 0.0, 0.5], [0.9, 0.05, 0.05]] {
        let expected = logits(&scene.mixed_backbone(&preference), None);
        let got = logits(&files, Some(&scene.conditioned("soup", &preference)));
        assert!(distance(&got, &expected) < 1e-4, "{preference:?}: {}", distance(&got, &expected));
    }
    let names: Vec<_> = scene.conditioned("soup", &[1.0, 0.0, 0.0]).adapter().objectives().to_vec();
    assert_eq!(names[2].name, "third wish");
}

#[test]
fn what_cannot_be_mixed_is_named() {
    let scene = Scene::new();
    let ingredients = scene.ingredients();
    let refused = |ingredients: &[Ingredient], output: &str| {
        format!("{:#}", cook(ingredients, &scene.path(output)).unwrap_err())
    };
    cook(&ingredients, &scene.path("soup")).unwrap();
    let again = refused(&ingredients, "soup");
    assert!(again.contains("adapter_config.json exists"), "{again}");
    let twice = refused(&[ingredients[0].clone(), ingredients[0].clone()], "new");
    assert!(twice.contains("\"first wish\" is empty, or stands twice"), "{twice}");
    let soup = Ingredient { objective: "all".to_owned(), folder: scene.path("soup") };
    let method = refused(&[soup], "new");
    assert!(method.contains("peft_type \"MOSLORA\" is not LORA"), "{method}");
    let elsewhere = scene.path("first").join("adapter_config.json");
    let json = json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"],
        "backbone_vocabulary": 33 });
    std::fs::write(elsewhere, json.to_string()).unwrap();
    let other = refused(&ingredients, "new");
    assert!(other.contains("a backbone of 32 tokens") && other.contains("on one of 33 tokens"), "{other}");
    assert!(!scene.path("new").exists());
}
