//! The loop over a network whose gradient is known exactly: resumed, divided among ranks, and stopped early.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{path::Path, time::Duration};

use uniarm_collective::{Collective as _, Group, Local, Payload};
use uniarm_trainer::{
    loss::{Labels, Loss, LossValue},
    network::{Network, Parameter, Sample, TokenPair},
    train::{
        Job,
        config::TrainConfig,
        data::Data,
        events::{Ended, Event},
        ranks::Ranks,
    },
};

const TOKENS: usize = 12;

/// log π(answer) = Σ log softmax(θ)[token], whatever the prompt: its gradient is counts less expected counts.
struct Unigram {
    layout: Vec<Parameter>,
    parameters: Vec<f32>,
}

// === impl Unigram ===

impl Unigram {
    fn new() -> Self {
        let layout = vec![Parameter { name: "theta".into(), shape: vec![TOKENS], offset: 0 }];
        Self { layout, parameters: vec![0.0; TOKENS] }
    }

    fn probabilities(&self) -> Vec<f64> {
        let weights: Vec<f64> = self.parameters.iter().map(|theta| f64::from(*theta).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    }
}

impl Network for Unigram {
    fn layout(&self) -> &[Parameter] {
        &self.layout
    }

    fn parameter_count(&self) -> usize {
        TOKENS
    }

    fn parameters(&self) -> Vec<f32> {
        self.parameters.clone()
    }

    fn set_parameters(&mut self, parameters: &[f32]) -> anyhow::Result<()> {
        self.parameters = parameters.to_vec();
        Ok(())
    }

    fn log_probabilities(&mut self, samples: &[Sample<'_>]) -> anyhow::Result<Vec<[f64; 2]>> {
        let probabilities = self.probabilities();
        let of = |answer: &Vec<u32>| answer.iter().map(|token| probabilities[*token as usize].ln()).sum();
        Ok(samples.iter().map(|sample| [0, 1].map(|side: usize| of(&sample.pair.answers[side]))).collect())
    }

    fn add_gradient(
        &mut self,
        samples: &[Sample<'_>],
        loss: &Loss,
        gradient: &mut [f32],
    ) -> anyhow::Result<Vec<LossValue>> {
        let (probabilities, sides) = (self.probabilities(), self.log_probabilities(samples)?);
        let mut values = Vec::new();
        for (sample, sums) in samples.iter().zip(sides) {
            let value = loss.of(sample.preference, &sample.pair.labels, sample.pair.likelihoods(sums));
            for side in [0, 1] {
                let answer = &sample.pair.answers[side];
                for (token, probability) in probabilities.iter().enumerate() {
                    let count = answer.iter().filter(|other| **other as usize == token).count() as f64;
                    let slope = count - answer.len() as f64 * probability;
                    gradient[token] += (value.slopes[side] * slope) as f32;
                }
            }
            values.push(value);
        }
        Ok(values)
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let bytes: Vec<u8> = self.parameters.iter().flat_map(|number| number.to_le_bytes()).collect();
        Ok(std::fs::write(folder.join("weights"), bytes)?)
    }
}

/// Objective *low* prefers answers of low tokens; *short* those of fewer tokens.
fn pairs(count: usize) -> Vec<TokenPair> {
    let answer = |index: usize, kind: usize| -> Vec<u32> {
        (0..2 + (index * 5 + kind * 3) % 6)
            .map(|i| ((index + kind * 4 + i * (kind + 1)) % TOKENS) as u32)
            .collect()
    };
    let pair = |index: usize| {
        let answers = [answer(index, 0), answer(index, 1)];
        let mean = |side: &[u32]| side.iter().sum::<u32>() as f64 / side.len() as f64;
        let margins =
            vec![mean(&answers[1]) - mean(&answers[0]), answers[1].len() as f64 - answers[0].len() as f64];
        let signs = margins.iter().map(|margin| if *margin == 0.0 { 0.0 } else { margin.signum() }).collect();
        TokenPair { prompt: vec![index as u32], answers, labels: Labels { signs, margins } }
    };
    (0..count).map(pair).collect()
}

fn config(change: &str) -> TrainConfig {
    let text = format!(
        "model = \"unigram\"\npairs = [\"none\"]\nbatch = 8\nheld_out_share = 0.2\nevaluate_every = 4\n\
         checkpoint_every = 3\n{change}\n\
         [[objectives]]\nname = \"low\"\nbeta = 0.5\n[[objectives]]\nname = \"short\"\nbeta = 0.5\n\
         [optimizer]\nlearning_rate = 0.05\nwarm_up_steps = 4\n\
         [adapter]\nmethod = \"pblora\"\nrank = 4\nmixed_rank = 4\nalpha = 8\n"
    );
    let config: TrainConfig = toml::from_str(&text).unwrap();
    config.check().unwrap();
    config
}

fn run(config: &TrainConfig, out: &Path, ranks: Ranks, mut watch: impl FnMut(&Event)) -> Ended {
    let data = Data::divided(config, pairs(60));
    let network = Box::new(Unigram::new());
    let job = Job { config, data, network, model: "unigram".into(), out, resume: true, ranks };
    job.run(&mut watch).unwrap()
}

fn weights(out: &Path) -> Vec<f32> {
    let bytes = std::fs::read(out.join("adapter/weights")).unwrap();
    bytes.chunks_exact(4).map(|number| f32::from_le_bytes(number.try_into().unwrap())).collect()
}

#[test]
fn what_can_be_learnt_is_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let mut evaluations = Vec::new();
    let ended = run(&config("steps = 150"), folder.path(), Ranks::alone(), |event| {
        if let Event::Evaluation(evaluation) = event {
            evaluations.push(evaluation.clone());
        }
    });
    let (first, last) = (&evaluations[0], evaluations.last().unwrap());
    assert!(last.loss < first.loss - 0.02, "{first:?} {last:?}");
    // It has one preference for all: what it can learn is the mixed margin.
    assert!(last.centre_accuracy > 0.8, "{last:?}");
    assert!(ended.best_loss.unwrap() <= last.loss && ended.step == 150);
}

#[test]
fn a_run_interrupted_at_every_step_ends_as_one_that_was_not() {
    let (whole, torn) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = config("steps = 20");
    run(&config, whole.path(), Ranks::alone(), |_| ());
    for stop in 1..20 {
        // A panic in the middle leaves what a kill would: no destructor of ours writes anything.
        let run = || {
            run(&config, torn.path(), Ranks::alone(), |event| {
                assert!(!matches!(event, Event::Step(step) if step.step == stop), "interrupted");
            })
        };
        let _ = std::panic::catch_unwind(run);
    }
    run(&config, torn.path(), Ranks::alone(), |_| ());
    let read = |folder: &Path| std::fs::read(folder.join("metrics.jsonl")).unwrap();
    assert_eq!(weights(whole.path()), weights(torn.path()));
    assert!(read(whole.path()) == read(torn.path()));
}

#[test]
fn three_ranks_train_what_one_does() {
    let config = config("steps = 40\nheld_out_max = 7");
    let folders = [(); 4].map(|()| tempfile::tempdir().unwrap());
    run(&config, folders[3].path(), Ranks::alone(), |_| ());
    let group = Group { size: 3, epoch: 0, payload: Payload::F32, timeout: Duration::from_secs(20) };
    std::thread::scope(|scope| {
        for member in Local::group(group).unwrap() {
            let (config, folder) = (&config, folders[member.rank()].path());
            scope.spawn(move || run(config, folder, Ranks::of(Box::new(member)), |_| ()));
        }
    });
    let (one, three) = (weights(folders[3].path()), weights(folders[0].path()));
    for (a, b) in one.iter().zip(&three) {
        assert!((a - b).abs() < 1e-4, "{one:?} {three:?}");
    }
    assert!(!folders[1].path().join("adapter").exists(), "only the first rank writes");
}

#[test]
fn training_stops_when_the_held_out_loss_no_longer_falls_and_keeps_the_best() {
    let folder = tempfile::tempdir().unwrap();
    // A rate at which every step makes it worse.
    let mut config = config("steps = 200\npatience = 2");
    config.optimizer.learning_rate = 5.0;
    config.optimizer.warm_up_steps = 0;
    let ended = run(&config, folder.path(), Ranks::alone(), |_| ());
    assert!(ended.stopped_early && ended.step < 200, "{ended:?}");
    assert_eq!(ended.step, ended.best_step + 8, "two evaluations, four steps apart");
    // Nothing is left to do, and the adapter can be had again.
    std::fs::remove_file(folder.path().join("adapter/weights")).unwrap();
    assert_eq!(run(&config, folder.path(), Ranks::alone(), |_| ()), ended);
    assert_eq!(weights(folder.path()).len(), TOKENS);
}
