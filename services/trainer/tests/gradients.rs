//! Gradients of every adapter: against values recorded in float64, against finite differences, and each fast operation
//! against its plain form.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

#[allow(dead_code)]
#[path = "../../../crates/model/tests/files/mod.rs"]
mod files;

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::Value;
use tempfile::TempDir;
use uniarm_model::{Adapter, ModelFiles, OpenOptions, Weights, reference};
use uniarm_trainer::loss::{Labels, Loss, Scalarisation};
use uniarm_trainer::network::{
    AdapterConfig, Conditioning, Form, Head, LlamaNetwork, Method, Network, NetworkOptions, Objective,
    Sample, TokenPair,
};

/// Relative, of the norm of a tensor's gradient [the recording's own].
const GRADIENT_TOLERANCE: f64 = 1e-3;
/// Relative, of log-probabilities and losses.
const LOSS_TOLERANCE: f64 = 1e-4;

/// A model of one layer with random weights, some tokens' worth of pairs, and preferences of two objectives.
struct Bench {
    _folder: TempDir,
    files: ModelFiles,
    pairs: Vec<TokenPair>,
    preferences: Vec<Vec<f32>>,
}

fn open(folder: &Path) -> ModelFiles {
    uniarm_model::open(folder.to_str().unwrap(), &OpenOptions::default()).unwrap()
}

fn adapter(method: Method) -> AdapterConfig {
    let objective = |name: &str| Objective { name: name.to_owned(), description: format!("{name} answers") };
    let count = if method == Method::Lora { 1 } else { 2 };
    AdapterConfig {
        method,
        rank: if method == Method::Lora { 8 } else { 4 },
        mixed_rank: 4,
        alpha: if method == Method::Lora { 16.0 } else { 8.0 },
        targets: ["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec(),
        conditioning: Conditioning::Onehot,
        head: Head::Linear,
        head_units: 0,
        dropout: 0.0,
        objectives: ["first", "second"].map(objective)[..count].to_vec(),
    }
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

impl Bench {
    fn new(shape: files::Shape) -> Self {
        let folder = TempDir::new().unwrap();
        files::folder(folder.path(), shape, &shape.tensors(), 1);
        let labels =
            |signs: [f64; 2], margins: [f64; 2]| Labels { signs: signs.to_vec(), margins: margins.to_vec() };
        let pair = |prompt: &[u32], a: &[u32], b: &[u32], labels| TokenPair {
            prompt: prompt.to_vec(),
            answers: [a.to_vec(), b.to_vec()],
            labels,
        };
        let pairs = vec![
            pair(&[1, 9, 4], &[5, 6, 2], &[7, 2], labels([1.0, -1.0], [0.7, -0.2])),
            pair(&[3], &[8], &[11, 12, 13, 14, 2], labels([-1.0, -1.0], [-0.3, -1.0])),
            pair(&[1, 2, 3, 4, 5, 6, 7], &[8, 9, 10, 11], &[8, 9, 3, 2], labels([1.0, 1.0], [0.1, 0.4])),
        ];
        let preferences = vec![vec![0.3, 0.7], vec![1.0, 0.0], vec![0.5, 0.5]];
        let files = open(folder.path());
        Self { _folder: folder, files, pairs, preferences }
    }

    fn samples(&self) -> Vec<Sample<'_>> {
        let both = self.pairs.iter().zip(&self.preferences).zip(40..);
        both.map(|((pair, preference), draw)| Sample { pair, preference, draw }).collect()
    }

    /// A network in which no tensor is zero any more, so that every gradient is at work.
    fn network(&self, config: &AdapterConfig, options: NetworkOptions) -> LlamaNetwork {
        let mut network = LlamaNetwork::open(&self.files, config, options).unwrap();
        let mut state = 5_u32;
        let parameters = network.parameters().into_iter().map(|value| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            value + 0.1 * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        });
        let parameters: Vec<f32> = parameters.collect();
        network.set_parameters(&parameters).unwrap();
        network
    }

    fn gradient(&self, network: &mut LlamaNetwork) -> (Vec<f32>, f64) {
        let mut gradient = vec![0.0; network.parameter_count()];
        let losses = network.add_gradient(&self.samples(), &loss(), &mut gradient).unwrap();
        (gradient, losses.iter().map(|loss| loss.total).sum())
    }
}

fn loss() -> Loss {
    Loss {
        scalarisation: Scalarisation::Linear,
        betas: vec![0.1, 0.2],
        global_beta: 0.15,
        global_weight: 0.5,
        likelihood_weight: 0.6,
    }
}

/// All shapes of adapters: methods, conditionings, heads, and targets outside the attention.
fn variants() -> Vec<(&'static str, AdapterConfig)> {
    let everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let moslora = adapter(Method::Moslora);
    vec![
        ("moslora text", AdapterConfig { conditioning: Conditioning::Text, ..moslora.clone() }),
        ("moslora mlp", AdapterConfig { head: Head::Mlp, ..moslora.clone() }),
        (
            "moslora everywhere",
            AdapterConfig { targets: everywhere.map(str::to_owned).to_vec(), ..moslora.clone() },
        ),
        ("moslora dropout", AdapterConfig { dropout: 0.2, ..moslora.clone() }),
        ("moslora onehot", moslora),
        ("pblora", adapter(Method::Pblora)),
        ("lora", adapter(Method::Lora)),
    ]
}

/// Text conditioning embeds descriptions; the made-up model has no tokenizer.
fn options(config: &AdapterConfig, hidden: usize) -> NetworkOptions {
    let text = config.method == Method::Moslora && config.conditioning == Conditioning::Text;
    let embeddings =
        (0..2 * hidden).map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) / (hidden as f32).sqrt()).collect();
    NetworkOptions { objective_embeddings: text.then_some(embeddings), ..NetworkOptions::default() }
}

#[test]
fn every_form_gives_the_same_gradient() {
    for shape in [files::SMALL, files::Shape { biases: true, ..files::SMALL }] {
        let bench = Bench::new(shape);
        for (name, config) in variants() {
            let options = options(&config, shape.hidden);
            let (fast, total) = bench.gradient(&mut bench.network(&config, options.clone()));
            let plain = NetworkOptions { form: Form::Plain, ..options.clone() };
            let (plain, plain_total) = bench.gradient(&mut bench.network(&config, plain));
            assert!((total - plain_total).abs() < 1e-4 * total, "{name}: {total} {plain_total}");
            let off = distance(&fast, &plain) / norm(&plain);
            assert!(off < 1e-4, "{name}: {off}");
            let checkpointed = NetworkOptions { checkpoint_activations: true, ..options };
            let (checkpointed, again) = bench.gradient(&mut bench.network(&config, checkpointed));
            assert_eq!(total, again, "{name}");
            assert_eq!(fast, checkpointed, "{name}: the same operations, in the same order");
        }
    }
}

#[test]
fn gradients_are_what_finite_differences_say() {
    let bench = Bench::new(files::SMALL);
    for (name, config) in variants() {
        let mut network = bench.network(&config, options(&config, files::SMALL.hidden));
        let (gradient, _) = bench.gradient(&mut network);
        let parameters = network.parameters();
        for parameter in network.layout().to_vec() {
            // Along the gradient of one tensor, the loss rises by its norm.
            let range = parameter.range();
            let length = norm(&gradient[range.clone()]);
            assert!(length > 0.0, "{name}: {} has no gradient", parameter.name);
            let mut at = |step: f64| {
                let mut moved = parameters.clone();
                for i in range.clone() {
                    moved[i] += (step / length * f64::from(gradient[i])) as f32;
                }
                network.set_parameters(&moved).unwrap();
                bench.gradient(&mut network).1
            };
            let step = 2e-3;
            let measured = (at(step) - at(-step)) / (2.0 * step);
            let off = (measured - length).abs() / length;
            assert!(off < 0.03, "{name}, {}: measured {measured}, computed {length}", parameter.name);
        }
    }
}

#[test]
fn a_sample_counts_the_same_alone_and_in_a_batch() {
    let bench = Bench::new(files::SMALL);
    for (name, config) in variants() {
        let mut network = bench.network(&config, options(&config, files::SMALL.hidden));
        let (whole, _) = bench.gradient(&mut network);
        let mut sum = vec![0.0; whole.len()];
        for sample in bench.samples() {
            network.add_gradient(&[sample], &loss(), &mut sum).unwrap();
        }
        let off = distance(&whole, &sum) / norm(&whole);
        assert!(off < 1e-5, "{name}: {off}");
    }
}

#[test]
fn a_saved_adapter_serves_what_was_trained() {
    let bench = Bench::new(files::SMALL);
    for (name, config) in variants() {
        let mut network = bench.network(&config, options(&config, files::SMALL.hidden));
        let folder = TempDir::new().unwrap();
        network.save(folder.path()).unwrap();
        let served = Adapter::load(folder.path(), &bench.files.config, &bench.files.fingerprint).unwrap();
        let served = std::sync::Arc::new(served);
        let trained = network.log_probabilities(&bench.samples()).unwrap();
        for (sample, trained) in bench.samples().iter().zip(trained) {
            let preference = if config.method == Method::Lora { &[] } else { sample.preference };
            let conditioned = served.condition(preference).unwrap();
            for (answer, trained) in sample.pair.answers.iter().zip(trained) {
                let tokens = [&sample.pair.prompt[..], answer].concat();
                let logits = reference::logits(&bench.files, &tokens, Some(&conditioned)).unwrap();
                let logits = logits.to_vec2::<f32>().unwrap();
                let rows = logits[sample.pair.prompt.len() - 1..].iter().zip(answer);
                let served: f64 = rows.map(|(row, token)| log_probability(row, *token)).sum();
                assert!((served - trained).abs() < 1e-3, "{name}: served {served}, trained {trained}");
            }
        }
    }
}

#[test]
fn an_adapter_begins_as_the_identity_for_every_preference() {
    let bench = Bench::new(files::SMALL);
    for (name, config) in variants() {
        let mut network =
            LlamaNetwork::open(&bench.files, &config, options(&config, files::SMALL.hidden)).unwrap();
        let found = network.log_probabilities(&bench.samples()).unwrap();
        for (sample, found) in bench.samples().iter().zip(found) {
            for (answer, found) in sample.pair.answers.iter().zip(found) {
                let tokens = [&sample.pair.prompt[..], answer].concat();
                let logits =
                    reference::logits(&bench.files, &tokens, None).unwrap().to_vec2::<f32>().unwrap();
                let rows = logits[sample.pair.prompt.len() - 1..].iter().zip(answer);
                let base: f64 = rows.map(|(row, token)| log_probability(row, *token)).sum();
                assert!((base - found).abs() < 1e-3, "{name}: base {base}, with the adapter {found}");
            }
        }
    }
}

fn log_probability(row: &[f32], token: u32) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
    f64::from(row[token as usize] - top) - sum.ln()
}

// === Against values recorded by an independent implementation in float64 ===

fn shared() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let folder = std::env::var_os("UNIARM_SHARED").map_or(beside, PathBuf::from).join("golden/tiny-llama");
    if !folder.is_dir() {
        println!("skipped: no recorded values (UNIARM_SHARED, or a folder 'shared' beside the repository)");
    }
    folder.is_dir().then_some(folder)
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn recorded_pairs(recorded: &Value) -> (Vec<TokenPair>, Vec<Vec<f32>>) {
    let ids = |value: &Value| numbers(value).iter().map(|id| *id as u32).collect::<Vec<u32>>();
    let sign = |label: &Value| if label == "a" { 1.0 } else { -1.0 };
    let pair = |pair: &Value| TokenPair {
        prompt: ids(&pair["prompt"]),
        answers: [ids(&pair["response_a"]), ids(&pair["response_b"])],
        labels: Labels {
            signs: pair["labels"].as_array().unwrap().iter().map(sign).collect(),
            margins: numbers(&pair["margins"]),
        },
    };
    let pairs = recorded["pairs"].as_array().unwrap();
    let preferences = pairs.iter().map(|pair| numbers(&pair["p"]).iter().map(|x| *x as f32).collect());
    (pairs.iter().map(pair).collect(), preferences.collect())
}

#[test]
fn losses_and_gradients_match_the_recorded_ones() {
    let Some(folder) = shared() else { return };
    let recorded: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("expected_training.json")).unwrap())
            .unwrap();
    let (pairs, preferences) = recorded_pairs(&recorded);
    let loss = Loss {
        scalarisation: Scalarisation::Linear,
        betas: numbers(&recorded["beta"]),
        global_beta: recorded["beta_global"].as_f64().unwrap(),
        global_weight: recorded["lambda"].as_f64().unwrap(),
        likelihood_weight: 0.0,
    };
    let files = open(&folder);
    for (name, method, conditioning) in [
        ("moslora-text", Method::Moslora, Conditioning::Text),
        ("moslora-onehot", Method::Moslora, Conditioning::Onehot),
        ("pblora", Method::Pblora, Conditioning::Text),
        ("lora", Method::Lora, Conditioning::Text),
    ] {
        let expected = &recorded["methods"][name];
        let adapter_folder = folder.join(format!("adapter-{name}"));
        let weights =
            Weights::from_safetensors(&adapter_folder, &[adapter_folder.join("adapter_model.safetensors")])
                .unwrap();
        let tensor = |name: &str, shape: &[usize]| {
            weights.tensor(name, shape).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let config = AdapterConfig { conditioning, ..adapter(method) };
        let text = name == "moslora-text";
        let options = NetworkOptions {
            device: Device::Cpu,
            objective_embeddings: text.then(|| tensor("moslora_objectives", &[2, files.config.hidden])),
            ..NetworkOptions::default()
        };
        let mut network = LlamaNetwork::open(&files, &config, options).unwrap();
        let layout = network.layout().to_vec();
        let parameters: Vec<f32> = layout.iter().flat_map(|p| tensor(&p.name, &p.shape)).collect();
        network.set_parameters(&parameters).unwrap();

        let samples: Vec<Sample<'_>> = pairs
            .iter()
            .zip(&preferences)
            .map(|(pair, preference)| Sample { pair, preference, draw: 0 })
            .collect();
        let mut gradient = vec![0.0; parameters.len()];
        let losses = network.add_gradient(&samples, &loss, &mut gradient).unwrap();
        let near = |found: f64, recorded: &Value, what: &str| {
            let recorded = recorded.as_f64().unwrap();
            let off = (found - recorded).abs() / recorded.abs().max(1e-3);
            assert!(off < LOSS_TOLERANCE, "{name}: {what} is {found}, recorded {recorded}");
        };
        for ((found, sides), recorded) in losses
            .iter()
            .zip(network.log_probabilities(&samples).unwrap())
            .zip(expected["pairs"].as_array().unwrap())
        {
            near(sides[0], &recorded["logp_a"], "log π(a)");
            near(sides[1], &recorded["logp_b"], "log π(b)");
            near(found.total, &recorded["total"], "the loss of a pair");
        }
        let mean = losses.iter().map(|loss| loss.total).sum::<f64>() / losses.len() as f64;
        near(mean, &expected["loss"], "the mean loss");

        let file = adapter_folder.join("expected_gradients.safetensors");
        let expected = Weights::from_safetensors(&adapter_folder, &[file]).unwrap();
        for parameter in layout {
            let expected = expected.tensor(&parameter.name, &parameter.shape).unwrap();
            let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let found: Vec<f32> =
                gradient[parameter.range()].iter().map(|x| x / samples.len() as f32).collect();
            let off = distance(&found, &expected) / norm(&expected);
            assert!(off < GRADIENT_TOLERANCE, "{name}, {}: {off}", parameter.name);
        }
    }
}
