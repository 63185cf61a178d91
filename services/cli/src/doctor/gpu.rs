//! GPUs, and the libraries without which nothing computes on them (docs/gpu.md).

use std::time::{Duration, Instant};

use uniarm_collective::{CollectiveError, Group, Nccl, Payload};
use uniarm_cuda::{Architecture, CudaLlama, CudaOptions, Gpu, Rates, WeightFormat, check_kernels, gpus};
use uniarm_model::{Forward, Llama, LlamaOptions, ModelFiles, Row};

use super::{Finding, State};
use crate::worker;

const AREA: &str = "gpu";

/// What the kernels are compiled for where there is no device to ask.
const ARCHITECTURE: (u32, u32) = (9, 0);

/// A rank that is alone is there at once.
const NCCL_TIMEOUT: Duration = Duration::from_secs(30);
const NCCL_BYTES: usize = 64 << 20;

/// Tokens of the prompt that both compute, and what their logits may differ by, of the largest: weights are rounded to 16 bits.
const PROMPT: usize = 64;
const ERROR_MAX: f32 = 2e-2;

pub(super) fn look() -> Vec<Finding> {
    let found = gpus();
    let mut findings =
        match &found {
            Err(error) => {
                let missing = Finding::new(AREA, "driver", State::Missing, error.to_string());
                vec![missing.advised("nothing to do, unless a worker is to have --device cuda")]
            }
            Ok(gpus) if gpus.is_empty() => {
                let missing = Finding::new(AREA, "driver", State::Missing, "it sees no device");
                vec![missing.advised(
                    "is CUDA_VISIBLE_DEVICES empty, or the container without one (docker: --gpus all)?",
                )]
            }
            Ok(gpus) => gpus.iter().enumerate().map(|(number, gpu)| device(number, gpu)).collect(),
        };
    let gpus = found.unwrap_or_default();
    let kernels = kernels(gpus.first());
    let compile = kernels.state == State::Ok;
    findings.push(kernels);
    if compile {
        findings.extend(gpus.iter().enumerate().flat_map(|(number, gpu)| rates(number, gpu)));
    }
    findings.push(nccl(!gpus.is_empty()));
    findings
}

fn device(number: usize, gpu: &Gpu) -> Finding {
    let Gpu { name, bytes, capability: (major, minor), bandwidth } = gpu;
    let rate = bandwidth.map_or(String::new(), |rate| format!(", {:.0} GB/s", rate / 1e9));
    let memory = *bytes as f64 / f64::from(1 << 30);
    Finding::ok(
        AREA,
        format!("cuda:{number}"),
        format!("{name}, {memory:.0} GiB{rate}, version {major}.{minor}"),
    )
}

/// What a device does, beside what its driver says of it.
fn rates(number: usize, gpu: &Gpu) -> Vec<Finding> {
    let what = |kind: &str| format!("cuda:{number} {kind}");
    let rates = match Rates::measure(number) {
        Ok(rates) => rates,
        Err(error) => return vec![Finding::new(AREA, what("rates"), State::Poor, error.to_string())],
    };
    let gigabytes = |rate: f64| format!("{} GB/s", figures(rate / 1e9));
    let share = |rate: f64| format!(" ({:.0} % of what its memory gives)", 100.0 * rates.weights / rate);
    let products = format!(
        "weights of bf16 at {}{} for one row; {} TFLOP/s for {}",
        gigabytes(rates.weights),
        gpu.bandwidth.map_or(String::new(), share),
        figures(rates.operations / 1e12),
        Rates::ROWS
    );
    let copies = format!(
        "locked pages to the device at {}, back at {}; within the device at {}",
        gigabytes(rates.to_device),
        gigabytes(rates.from_device),
        gigabytes(rates.within_device)
    );
    vec![Finding::ok(AREA, what("products"), products), Finding::ok(AREA, what("copies"), copies)]
}

/// Three figures of a rate, or all of what stands before the point.
fn figures(rate: f64) -> String {
    let decimals = (2.0 - rate.log10().floor()).max(0.0) as usize;
    format!("{rate:.decimals$}")
}

fn kernels(gpu: Option<&Gpu>) -> Finding {
    let (major, minor) = gpu.map_or(ARCHITECTURE, |gpu| gpu.capability);
    let began = Instant::now();
    match check_kernels(Architecture::Real(major, minor)) {
        Ok(()) => {
            let seconds = began.elapsed().as_secs_f64();
            Finding::ok(AREA, "kernels", format!("compile for version {major}.{minor} in {seconds:.1} s"))
        }
        // Without a device nobody misses the compiler.
        Err(error) => {
            let state = if gpu.is_some() { State::Poor } else { State::Missing };
            Finding::new(AREA, "kernels", state, error.to_string())
        }
    }
}

/// The library, and a round of a rank to itself.
fn nccl(has_device: bool) -> Finding {
    let version = match Nccl::version() {
        Ok(version) => format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
        Err(error) => return Finding::new(AREA, "NCCL", State::Missing, error.to_string()),
    };
    if !has_device {
        return Finding::ok(AREA, "NCCL", version);
    }
    match round() {
        Ok(rate) => {
            Finding::ok(AREA, "NCCL", format!("{version}; to itself and back at {:.1} GB/s", rate / 1e9))
        }
        Err(error) => Finding::new(AREA, "NCCL", State::Poor, format!("{version}: {error}"))
            .advised("NCCL_DEBUG=INFO shows what it tries"),
    }
}

/// Bytes per second through device and NCCL.
fn round() -> Result<f64, CollectiveError> {
    let group = Group { size: 1, epoch: 0, payload: Payload::F32, timeout: NCCL_TIMEOUT };
    let mut alone = Nccl::join(&Nccl::unique_id()?, 0, group, 0)?;
    alone.round_to_itself(NCCL_BYTES)?;
    Ok(NCCL_BYTES as f64 / alone.round_to_itself(NCCL_BYTES)?.as_secs_f64())
}

/// The model on the first GPU beside the CPU; nothing where there is none.
pub(super) fn compare(files: &ModelFiles) -> Option<Finding> {
    if gpus().map_or(true, |gpus| gpus.is_empty()) {
        return None;
    }
    let what = format!("{} on cuda:0", files.name);
    let (kv_blocks, block_tokens) = (PROMPT / worker::BLOCK_TOKENS, worker::BLOCK_TOKENS);
    let compared = || {
        let options =
            CudaOptions { device: 0, kv_blocks, block_tokens, weights: WeightFormat::Bf16, graphs: true };
        let gpu = logits(&mut CudaLlama::load(files, &options)?)?;
        let options = LlamaOptions { kv_blocks, block_tokens, ..LlamaOptions::default() };
        let cpu = logits(&mut Llama::load_widened(files, &options)?)?;
        let largest = cpu.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
        let error = gpu.iter().zip(&cpu).map(|(gpu, cpu)| (gpu - cpu).abs()).fold(0.0, f32::max);
        Ok::<_, uniarm_model::ModelError>(error / largest)
    };
    Some(match compared() {
        Ok(error) if error <= ERROR_MAX => Finding::ok(AREA, what, format!("logits {error:.1e} from the CPU's")),
        Ok(error) => Finding::new(AREA, what, State::Failed, format!("logits {error:.1e} from the CPU's"))
            .advised(format!("up to {ERROR_MAX} is rounding; this is a defect, please report it with the device and the driver")),
        Err(error) => Finding::new(AREA, what, State::Failed, error.to_string()),
    })
}

fn logits(model: &mut dyn Forward) -> Result<Vec<f32>, uniarm_model::ModelError> {
    let vocabulary = model.vocabulary() as u32;
    let tokens: Vec<u32> = (0..PROMPT as u32).map(|index| index * 7919 % vocabulary).collect();
    let blocks: Vec<u32> = (0..model.blocks() as u32).collect();
    let row = Row { tokens: &tokens, start: 0, blocks: &blocks, logits_from: PROMPT - 4, adapter: None };
    let mut logits = Vec::new();
    model.forward(&[row], &mut logits)?;
    Ok(logits)
}
