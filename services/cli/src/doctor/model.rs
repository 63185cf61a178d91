//! A model on this machine: whether it loads and computes, and how near decoding comes to what memory allows.

use std::time::Instant;

use uniarm_model::{Forward as _, Llama, LlamaOptions, Row};

use super::{Finding, State, gpu};
use crate::{bench::floor::Machine, worker};

const AREA: &str = "model";

/// Decoded before time is taken, and then.
const WARM_STEPS: usize = 4;
const STEPS: usize = 32;

/// Less of what reading the weights allows is a machine in use, or one whose kernels need work.
const SHARE_MIN: f64 = 0.4;

pub(super) fn look(source: &str, machine: Machine) -> Vec<Finding> {
    match try_out(source, machine) {
        Ok(findings) => findings,
        Err(error) => {
            let failed = Finding::new(AREA, source, State::Failed, format!("{error:#}"));
            vec![failed.advised(
                "--model takes a folder with config.json and safetensors, a .gguf file, or hf://org/name",
            )]
        }
    }
}

fn try_out(source: &str, machine: Machine) -> anyhow::Result<Vec<Finding>> {
    let began = Instant::now();
    let files = worker::open(source)?;
    let block_tokens = worker::BLOCK_TOKENS;
    let kv_blocks = (WARM_STEPS + STEPS).div_ceil(block_tokens);
    let mut llama = Llama::load(
        &files,
        &LlamaOptions {
            threads: machine.threads_per_worker,
            kv_blocks,
            block_tokens,
            ..LlamaOptions::default()
        },
    )?;
    worker::self_test(&mut llama)?;
    let config = &files.config;
    let loaded = format!(
        "loaded in {:.1} s: {:.0} MB of weights, {} layers, context of {} tokens",
        began.elapsed().as_secs_f64(),
        llama.weight_bytes() as f64 / 1e6,
        config.layers,
        config.context_tokens
    );
    let talks = match (&files.tokenizer, &files.template) {
        (None, _) => Finding::new(AREA, "tokenizer", State::Poor, "none in its files")
            .advised("a worker needs tokenizer.json beside the weights, or a .gguf file that has it"),
        (Some(_), None) => {
            Finding::new(AREA, "chat template", State::Missing, "none: it answers prompts, not messages")
        }
        (Some(_), Some(_)) => Finding::ok(AREA, "chat template", "there"),
    };
    let mut findings =
        vec![Finding::ok(AREA, files.name.clone(), loaded), talks, decoding(&mut llama, machine)?];
    drop(llama);
    findings.extend(gpu::compare(&files));
    Ok(findings)
}

fn decoding(llama: &mut Llama, machine: Machine) -> anyhow::Result<Finding> {
    let blocks: Vec<u32> = (0..llama.blocks() as u32).collect();
    let mut logits = Vec::new();
    let mut began = Instant::now();
    for step in 0..WARM_STEPS + STEPS {
        if step == WARM_STEPS {
            began = Instant::now();
        }
        let row = Row { tokens: &[1], start: step, blocks: &blocks, logits_from: 0, adapter: None };
        llama.forward(&[row], &mut logits)?;
    }
    let per_second = STEPS as f64 / began.elapsed().as_secs_f64();
    let share = per_second * llama.weight_bytes() as f64 / machine.stream_bytes_per_second;
    let threads = machine.threads_per_worker;
    let beside = match share {
        ..=1.0 => format!("{:.0} % of what reading the weights from memory allows", 100.0 * share),
        _ => "more than reading the weights from memory allows: a cache holds some of them".to_owned(),
    };
    let detail = format!("{per_second:.0} tokens/s on {threads} thread(s), {beside}");
    if share >= SHARE_MIN {
        return Ok(Finding::ok(AREA, "decoding", detail));
    }
    Ok(Finding::new(AREA, "decoding", State::Poor, detail)
        .advised("is something else running? `uniarm bench step` shows where the time goes"))
}
