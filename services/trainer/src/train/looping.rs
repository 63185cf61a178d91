//! The loop: a batch, its gradient, a step, and now and then an evaluation or a checkpoint.

use std::{path::Path, time::Instant};

use anyhow::{Context as _, ensure};
use serde::Serialize;

use super::{
    checkpoint::{Best, Identity, State},
    config::{PreferencePer, TrainConfig},
    curve,
    data::Data,
    draws::Draws,
    evaluation::{evaluate, passes, tokens},
    events::{Began, Ended, Event, Step, Timing},
    folder::RunFolder,
    optimizer::{clip, learning_rate},
    ranks::Ranks,
};
use crate::{
    loss::Loss,
    network::{Network, Sample},
};

/// All that a run needs.
pub struct Job<'a> {
    pub config: &'a TrainConfig,
    pub data: Data,
    pub network: Box<dyn Network>,
    /// Fingerprint of the model under the network.
    pub model: String,
    pub out: &'a Path,
    pub resume: bool,
    pub ranks: Ranks,
}

/// A job under way.
struct Run<'a> {
    config: &'a TrainConfig,
    data: Data,
    network: Box<dyn Network>,
    ranks: Ranks,
    loss: Loss,
    draws: Draws,
    steps: u64,
    identity: Identity,
    /// Of the first rank alone.
    folder: Option<RunFolder>,
    state: State,
    /// The last epoch whose order was asked for.
    order: Option<(u64, Vec<usize>)>,
    watch: &'a mut dyn FnMut(&Event),
}

/// A line of the times.
#[derive(Serialize)]
struct TimeLine {
    step: u64,
    seconds: f64,
    tokens: u64,
}

// === impl Job ===

impl<'a> Job<'a> {
    /// # Errors
    /// Where a file, the network or another worker fails; the last checkpoint is then still good.
    pub fn run(self, watch: &'a mut dyn FnMut(&Event)) -> anyhow::Result<Ended> {
        self.begin(watch)?.complete()
    }

    fn begin(self, watch: &'a mut dyn FnMut(&Event)) -> anyhow::Result<Run<'a>> {
        let Self { config, data, mut network, model, out, resume, mut ranks } = self;
        ensure!(!data.training.is_empty(), "there are no pairs to train on");
        let identity = Identity { config: config.identity()?, data: data.fingerprint(), model };
        let mut folder = if ranks.is_first() { Some(RunFolder::open(out, resume)?) } else { None };
        let mut state = State::new(network.parameters());
        if let Some(folder) = &mut folder {
            let found = folder.checkpoints.latest(|text| watch(&Event::Note { text }))?;
            if let Some(found) = found {
                found.identity.check_same(&identity).with_context(|| found.file.display().to_string())?;
                state = found.state;
            }
            folder.cut_metrics(state.metrics_bytes)?;
            folder.describe(config, &data.bad)?;
        }
        let (shared, first) = State::from_bytes(&ranks.from_first(state.to_bytes(&identity)?)?)?;
        first.check_same(&identity).context("this worker is not told the same as the first")?;
        network.set_parameters(&shared.parameters)?;
        let steps = config.steps(data.training.len());
        watch(&Event::Began(Began {
            step: shared.step,
            steps,
            training_pairs: data.training.len(),
            held_out_pairs: data.held_out.len(),
            skipped_lines: data.bad.0.len(),
            parameters: shared.parameters.len(),
            workers: ranks.size(),
        }));
        let (loss, draws) = (config.loss(), Draws::new(config.seed));
        Ok(Run {
            config,
            data,
            network,
            ranks,
            loss,
            draws,
            steps,
            identity,
            folder,
            state: shared,
            order: None,
            watch,
        })
    }
}

// === impl Run ===

impl Run<'_> {
    fn complete(mut self) -> anyhow::Result<Ended> {
        if self.state.step == 0 {
            self.evaluate()?;
        }
        while self.state.step < self.steps && !self.is_stopped() {
            self.step()?;
            let step = self.state.step;
            let is_last = step == self.steps;
            if step.is_multiple_of(self.config.evaluate_every) || is_last {
                self.evaluate()?;
            }
            if step.is_multiple_of(self.config.checkpoint_every) || is_last || self.is_stopped() {
                self.checkpoint()?;
            }
        }
        self.finish()
    }

    fn is_stopped(&self) -> bool {
        self.config.patience > 0 && self.state.without_better >= self.config.patience
    }

    fn step(&mut self) -> anyhow::Result<()> {
        let (began, step) = (Instant::now(), self.state.step);
        let places = self.ranks.share(self.config.batch);
        let pairs: Vec<usize> = places.clone().map(|place| self.pair_at(step, place)).collect();
        let preferences: Vec<Vec<f32>> = places.clone().map(|place| self.preference(step, place)).collect();
        let samples: Vec<Sample<'_>> = (0..pairs.len())
            .map(|i| Sample {
                pair: &self.data.training[pairs[i]],
                preference: &preferences[i],
                draw: self.draws.dropout(step, (places.start + i) as u32),
            })
            .collect();
        let mut gradient = vec![0.0; self.state.parameters.len()];
        // Losses of the objectives, the total, and the tokens.
        let mut sums = vec![0.0; self.loss.betas.len() + 2];
        let total = sums.len() - 2;
        for pass in passes(&samples, self.config.pass_tokens) {
            let values = self.network.add_gradient(&samples[pass], &self.loss, &mut gradient)?;
            for value in values {
                sums[..total].iter_mut().zip(&value.objectives).for_each(|(sum, loss)| *sum += loss);
                sums[total] += value.total;
            }
        }
        sums[total + 1] = samples.iter().map(|sample| tokens(sample.pair)).sum::<usize>() as f64;
        self.ranks.sum_gradient(&mut gradient)?;
        self.ranks.sum(&mut sums)?;
        let mean = 1.0 / self.config.batch as f32;
        gradient.iter_mut().for_each(|g| *g *= mean);

        let rate = learning_rate(&self.config.optimizer, step, self.steps);
        let gradient_norm = clip(&mut gradient, self.config.optimizer.clip_norm);
        ensure!(
            gradient_norm.is_finite() && sums[total].is_finite(),
            "step {step}: the gradient is not finite; begin again with a lower optimizer.learning_rate"
        );
        let State { parameters, adam, .. } = &mut self.state;
        adam.step(&self.config.optimizer, step, rate, parameters, &gradient);
        self.network.set_parameters(parameters)?;
        self.state.step += 1;
        let means: Vec<f64> = sums.iter().map(|sum| sum / self.config.batch as f64).collect();
        self.tell_step(Step {
            step: self.state.step,
            loss: means[total],
            objectives: means[..total].to_vec(),
            gradient_norm,
            learning_rate: rate,
            timing: Some(Timing { seconds: began.elapsed().as_secs_f64(), tokens: sums[total + 1] as u64 }),
        })
    }

    fn tell_step(&mut self, step: Step) -> anyhow::Result<()> {
        if let (Some(folder), Some(Timing { seconds, tokens })) = (&mut self.folder, step.timing) {
            folder.add_metric(&Event::Step(Step { timing: None, ..step.clone() }))?;
            folder.add_time(&TimeLine { step: step.step, seconds, tokens })?;
        }
        (self.watch)(&Event::Step(step));
        Ok(())
    }

    /// Epochs follow each other without a gap: every pair is seen once in each.
    fn pair_at(&mut self, step: u64, place: usize) -> usize {
        let count = self.data.training.len() as u64;
        let at = step * self.config.batch as u64 + place as u64;
        let epoch = at / count;
        let order = match self.order.take() {
            Some((of, order)) if of == epoch => order,
            _ => self.draws.order(epoch, count as usize),
        };
        let pair = order[(at % count) as usize];
        self.order = Some((epoch, order));
        pair
    }

    fn preference(&self, step: u64, place: usize) -> Vec<f32> {
        let place = match self.config.preference {
            PreferencePer::PerSample => place as u32,
            PreferencePer::PerBatch => 0,
        };
        self.draws.preference(step, place, self.loss.betas.len(), self.config.concentration)
    }

    fn evaluate(&mut self) -> anyhow::Result<()> {
        if self.data.held_out.is_empty() {
            return Ok(());
        }
        let (network, ranks) = (self.network.as_mut(), &mut self.ranks);
        let mut found = evaluate(self.config, &self.loss, &self.data.held_out, network, ranks)?;
        let step = self.state.step;
        found.step = step;
        found.better = self.state.best.as_ref().is_none_or(|best| found.loss < best.loss);
        if found.better {
            let parameters = self.state.parameters.clone();
            self.state.best = Some(Best { step, loss: found.loss, parameters });
            self.state.without_better = 0;
        } else {
            self.state.without_better += 1;
        }
        if let Some(folder) = &mut self.folder {
            folder.add_metric(&Event::Evaluation(found.clone()))?;
            if found.better {
                self.network.save(&folder.adapter())?;
            }
        }
        self.draw_curve();
        (self.watch)(&Event::Evaluation(found));
        Ok(())
    }

    fn checkpoint(&mut self) -> anyhow::Result<()> {
        let Some(folder) = &mut self.folder else { return Ok(()) };
        self.state.metrics_bytes = folder.settle_metrics()?;
        let file = folder.checkpoints.write(&self.state, &self.identity)?.display().to_string();
        (self.watch)(&Event::Checkpoint { step: self.state.step, file });
        Ok(())
    }

    /// A picture is not worth a run: where it cannot be written, that is said, and training goes on.
    fn draw_curve(&mut self) {
        let Some(folder) = &self.folder else { return };
        let drawn = folder.metrics().and_then(|metrics| curve::draw(folder.path(), &metrics));
        if let Err(error) = drawn {
            (self.watch)(&Event::Note { text: format!("no curve: {error:#}") });
        }
    }

    /// The adapter is written again from what the last checkpoint holds, whatever became of the folder meanwhile.
    fn finish(mut self) -> anyhow::Result<Ended> {
        if let Some(folder) = &mut self.folder {
            if let Some(best) = &self.state.best {
                self.network.set_parameters(&best.parameters)?;
            }
            self.network.save(&folder.adapter())?;
        }
        self.draw_curve();
        let ended = Ended {
            step: self.state.step,
            stopped_early: self.state.step < self.steps,
            best_step: self.state.best.as_ref().map_or(self.state.step, |best| best.step),
            best_loss: self.state.best.as_ref().map(|best| best.loss),
        };
        (self.watch)(&Event::Ended(ended.clone()));
        Ok(ended)
    }
}
