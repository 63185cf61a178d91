//! `uniarm train`: from pairs to an adapter, in a folder that says how it came to be.
//!
//! The weights after step n are a function of configuration, pairs, model and number of workers: every draw is one of
//! (seed, step, place), every sum has a fixed order. So a run that is killed anywhere, and continued, ends with the bytes
//! of one that was not.

pub mod checkpoint;
pub mod config;
mod curve;
pub mod data;
mod draws;
pub mod evaluation;
pub mod events;
mod folder;
mod looping;
mod optimizer;
pub mod ranks;

use std::path::Path;

use uniarm_model::{Config, ModelFiles};
use uniarm_proto::digits::hexadecimal;

pub use looping::Job;

use crate::network::{LlamaNetwork, NetworkOptions};
use config::{Switch, TrainConfig};
use data::Data;
use events::{Ended, Event};
use ranks::Ranks;

/// Activations of one pass, above which they are computed twice rather than kept: half of a small machine's memory.
const ACTIVATION_BYTES_MAX: usize = 4 << 30;
/// Vectors of the hidden size that a layer's graph keeps for each token: norms, projections, attention, residuals, and
/// their gradients.
const HIDDEN_KEPT: usize = 12;
/// The same, of the feed-forward size.
const INTERMEDIATE_KEPT: usize = 4;

/// Trains an adapter over `model`, in the folder `out`; `watch` hears what happens.
///
/// # Errors
/// A sentence that names the field, the line or the file, and what to do next.
pub fn train(
    config: &TrainConfig,
    model: &ModelFiles,
    out: &Path,
    resume: bool,
    ranks: Ranks,
    watch: &mut dyn FnMut(&Event),
) -> anyhow::Result<Ended> {
    config.check()?;
    let data = Data::read(config, model)?;
    let (device, form) = config.device.open()?;
    let options = NetworkOptions {
        device,
        form,
        checkpoint_activations: checkpoints_activations(config, &model.config),
        seed: config.seed,
        ..NetworkOptions::default()
    };
    let network = LlamaNetwork::open(model, &config.adapter()?, options)?;
    let job = Job {
        config,
        data,
        network: Box::new(network),
        model: hexadecimal(&model.fingerprint),
        out,
        resume,
        ranks,
    };
    job.run(watch)
}

/// A function of configuration and model alone, so that every worker and every continuation decides alike.
fn checkpoints_activations(config: &TrainConfig, model: &Config) -> bool {
    let numbers = HIDDEN_KEPT * model.hidden + INTERMEDIATE_KEPT * model.intermediate;
    let tokens = config.pass_tokens.max(config.max_tokens);
    match config.checkpoint_activations {
        Switch::On => true,
        Switch::Off => false,
        Switch::Auto => tokens * model.layers * numbers * size_of::<f32>() > ACTIVATION_BYTES_MAX,
    }
}
