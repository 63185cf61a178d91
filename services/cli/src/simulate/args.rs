//! The flags of `uniarm simulate`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::{
    args::{COUNT_MAX, EngineArgs, ExchangeArgs},
    bench::args::count,
    bounds,
};

/// Requests of a simulation: their arrivals alone take gigabytes.
const REQUESTS_MAX: u64 = 10_000_000;

/// Workers of a pool: beyond, no list of them is the answer to anything.
const WORKERS_MAX: u64 = 100_000;

/// Rounds of a calibration: a minute for the demo model.
pub const ROUNDS: usize = 5;

/// Deviations of a logarithm; conversations have about 1.
const SPREAD_MAX: f64 = 10.0;

#[derive(Debug, Clone, Args)]
pub struct SimulateArgs {
    #[command(flatten)]
    pub traffic: TrafficArgs,
    #[command(flatten)]
    pub pools: PoolArgs,
    #[command(flatten)]
    pub autoscale: AutoscaleArgs,
    #[command(flatten)]
    pub targets: TargetArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub exchange: ExchangeArgs,
    /// Share of tokens that a list certifies; the others need a second round trip
    #[arg(long, default_value_t = 0.99, value_parser = bounds::share)]
    pub certified: f64,
    /// Chances of the simulation
    #[arg(long, default_value_t = 1, value_parser = bounds::seed)]
    pub seed: u64,
    /// Write the curve to this SVG file
    #[arg(long)]
    pub plot: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Measure this machine's steps with a real model, write them to this file for --machine, and stop
    #[arg(long, value_name = "FILE")]
    pub calibrate: Option<PathBuf>,
    /// Rounds of that, in each of which every kind of step has its turn, alone and beside another worker's
    #[arg(long, default_value_t = ROUNDS, requires = "calibrate", value_parser = count)]
    pub rounds: usize,
    /// The model to measure: a GGUF file, a Hugging Face folder, or hf://org/name [default: the demo model]
    #[arg(long, requires = "calibrate")]
    pub model: Option<String>,
}

/// What arrives: a trace, or made-up traffic.
#[derive(Debug, Clone, Args)]
pub struct TrafficArgs {
    /// JSON lines: {"at": seconds, "prompt_tokens": n, "answer_tokens": n, "guided": bool, "preference": name, …}
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// How the rate changes
    #[arg(long, value_enum, default_value = "poisson", conflicts_with = "trace")]
    pub pattern: PatternName,
    /// Seconds from burst to burst, or of a day
    #[arg(long, default_value_t = 60.0, value_parser = bounds::positive)]
    pub period: f64,
    /// The highest rate of the pattern over its lowest
    #[arg(long, default_value_t = 4.0, value_parser = bounds::positive)]
    pub peak: f64,
    /// Mean arrivals per second
    #[arg(long, default_value_t = 10.0, value_parser = bounds::positive)]
    pub rate: f64,
    /// Requests to make
    #[arg(long, default_value_t = 2000, value_parser = bounds::within(1..=REQUESTS_MAX))]
    pub requests: usize,
    /// Mean tokens of a prompt, the shared ones left out
    #[arg(long, default_value_t = 200, value_parser = bounds::within(1..=COUNT_MAX))]
    pub prompt_tokens: usize,
    /// Mean tokens of an answer
    #[arg(long, default_value_t = 150, value_parser = bounds::within(1..=COUNT_MAX))]
    pub answer_tokens: usize,
    /// Standard deviation of the logarithm of both lengths; 0: all alike
    #[arg(long, default_value_t = 0.7, value_parser = spread)]
    pub spread: f64,
    /// Tokens that all prompts begin with
    #[arg(long, default_value_t = 0, value_parser = bounds::within(0..=COUNT_MAX))]
    pub shared_tokens: usize,
    /// Share of requests with guidance
    #[arg(long, default_value_t = 1.0, value_parser = bounds::share)]
    pub guided: f64,
    /// Different preferences
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub preferences: u32,
    /// Write the traffic as a trace to this file, and go on
    #[arg(long, value_name = "FILE")]
    pub write_trace: Option<PathBuf>,
    /// Loads to simulate, as multiples of the traffic, comma-separated [default: 1, with --plot from 0.25 to 1.5]
    #[arg(long, value_delimiter = ',', value_parser = bounds::positive)]
    pub load: Vec<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PatternName {
    Poisson,
    Bursts,
    Day,
}

/// Who serves.
#[derive(Debug, Clone, Args)]
pub struct PoolArgs {
    /// Base workers [default: the fewest that meet the targets]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=WORKERS_MAX as i64))]
    pub base: Option<u32>,
    /// Reward workers [default: the fewest that meet the targets]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=WORKERS_MAX as i64))]
    pub reward: Option<u32>,
    /// Most workers in a pool that is searched for
    #[arg(long, default_value_t = 2000, value_parser = bounds::within(1..=WORKERS_MAX))]
    pub workers_max: usize,
    /// Accelerator of a base worker: l4, a100-40g, h100 or h200
    #[arg(long, default_value = "h100", conflicts_with = "machine")]
    pub base_on: String,
    /// Accelerator of a reward worker
    #[arg(long, default_value = "l4", conflicts_with = "machine")]
    pub reward_on: String,
    /// Base model: smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b
    #[arg(long, default_value = "llama-3.1-8b", conflicts_with = "machine")]
    pub base_model: String,
    /// Backbone of the reward models
    #[arg(long, default_value = "llama-3.2-1b", conflicts_with = "machine")]
    pub reward_model: String,
    /// Steps measured by --calibrate, for both pools, in place of accelerators and models
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// The same for the base workers alone
    #[arg(long, value_name = "FILE")]
    pub base_machine: Option<PathBuf>,
    /// What workers like these wrote down under load, saved from /debug/steps?last=512&format=json; repeatable: steps take as
    /// much longer than the machine's as they did there
    #[arg(long, value_name = "FILE")]
    pub observed: Vec<PathBuf>,
    /// Base worker i and reward worker i share a machine
    #[arg(long)]
    pub colocated: bool,
    /// Routers [default: one for each 16 base workers]
    #[arg(long, value_parser = bounds::within(1..=WORKERS_MAX))]
    pub routers: Option<usize>,
    /// Network between base and reward workers: process, loopback, lan-10g, lan-100g or zones
    #[arg(long, default_value = "lan-10g")]
    pub link: String,
    /// Network between clients, routers and base workers
    #[arg(long, default_value = "lan-10g")]
    pub front_link: String,
    /// Tokens of a reward model's system text, which it reads before every prompt
    #[arg(long, default_value_t = 0, value_parser = bounds::within(0..=COUNT_MAX))]
    pub system_tokens: usize,
    /// Share of drafts that are right
    #[arg(long, default_value_t = 0.8, value_parser = bounds::share)]
    pub acceptance: f64,
    /// The same with the plain backbone as a second row; without it there is none
    #[arg(long, value_parser = bounds::share)]
    pub dual_acceptance: Option<f64>,
}

/// Pools that follow the load.
#[derive(Debug, Clone, Args)]
pub struct AutoscaleArgs {
    /// Scale both pools as the chart does: by its defaults, or by the values of a release in this file, as
    /// `helm get values --all --output json` writes them
    #[arg(
        long,
        value_name = "FILE",
        num_args = 0..=1,
        require_equals = true,
        conflicts_with_all = ["base", "reward", "colocated", "load"]
    )]
    pub autoscale: Option<Option<PathBuf>>,
    /// Seconds from the decision for a pod until it serves: a node, the image, the model
    #[arg(long, default_value_t = 90.0, value_parser = bounds::positive)]
    pub pod_start: f64,
}

/// What the cluster has to reach.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// Milliseconds to the first token, at the 99th percentile
    #[arg(long, default_value_t = 1000.0, value_parser = bounds::positive)]
    pub ttft_p99: f64,
    /// Milliseconds between tokens, at the 99th percentile
    #[arg(long, default_value_t = 100.0, value_parser = bounds::positive)]
    pub inter_token_p99: f64,
    /// Share of requests whose first token and mean gap meet these targets
    #[arg(long, default_value_t = 0.99, value_parser = bounds::share)]
    pub goodput: f64,
}

fn spread(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..=SPREAD_MAX).contains(&number) => Ok(number),
        _ => Err(format!("wants a number from 0 to {SPREAD_MAX}")),
    }
}
