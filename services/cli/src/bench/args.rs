//! The command line of `uniarm bench`.

use std::{ops::RangeInclusive, path::PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use uniarm_base::DraftWindow;

use crate::args::{DraftRowsArg, EngineArgs, ExchangeArgs, ExchangeMode, draft_window};
use crate::{bounds, client::KeyArgs, simulate::args::ROUNDS};

/// Rows of a step, repeats, requests at once: beyond, a measurement is a mistake.
const COUNT_MAX: usize = 256;

/// Tokens of a vocabulary: four times what the largest models have.
const VOCABULARY_MAX: u64 = 1 << 20;

/// Streams of one router: beyond, ports and file handles of one machine end.
const STREAMS_MAX: usize = 20_000;

#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub command: BenchCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Decode steps by batch, guidance, exchange and draft window; base and reward worker in one process
    Step(BenchStepArgs),
    /// A small reward model that runs ahead of a large base model, on random weights, beside the same base unguided
    Draft(BenchDraftArgs),
    /// Prefill and decode of one unguided answer by length of its context
    Context(BenchContextArgs),
    /// Reward rows on their way: bytes and microseconds, over gRPC and in process, lists and whole rows
    Exchange(BenchExchangeArgs),
    /// Choosing a token and making lists: microseconds of a row by vocabulary
    Choose(BenchChooseArgs),
    /// A cluster under open-loop load: latencies, goodput, refusals
    Load(BenchLoadArgs),
    /// The router alone, before a worker that is a clock: what it adds to a token, over gRPC and HTTP
    Front(BenchFrontArgs),
    /// `uniarm simulate` held to this machine: calibrations and loads in turns, what was simulated over what was measured
    Simulation(BenchSimulationArgs),
}

#[derive(Debug, Clone, Args)]
pub struct BenchStepArgs {
    /// A GGUF file, a Hugging Face folder, or hf://org/name [default: the demo model]
    #[arg(long)]
    pub model: Option<String>,
    /// Rows of a step, comma-separated
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32], value_parser = count)]
    pub batch: Vec<usize>,
    /// What the rows ask for, comma-separated
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Rows::ALL)]
    pub rows: Vec<Rows>,
    /// How reward logits travel, comma-separated
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [ExchangeMode::Certified])]
    pub exchange: Vec<ExchangeMode>,
    /// Tokens that drafts run ahead, comma-separated: `auto`, or numbers; 0 is without drafts
    #[arg(long, value_delimiter = ',', default_values = ["auto", "0"], value_parser = draft_window, value_name = "auto|N")]
    pub draft_window: Vec<DraftWindow>,
    /// Whether base and reward worker have engines of their own or share one pass, comma-separated
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Roles::Separate])]
    pub roles: Vec<Roles>,
    /// What drafts are made from
    #[arg(long, value_enum, default_value = "auto")]
    pub draft_rows: DraftRowsArg,
    /// Length of the lists (K) to begin with
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub list_length: u32,
    /// 0 is greedy
    #[arg(long, default_value_t = 1.0, value_parser = bounds::number)]
    pub temperature: f32,
    /// Tokens of each answer
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u32).range(4..=4096))]
    pub tokens: u32,
    /// Measurements of each case; the median is shown, with the range
    #[arg(long, default_value_t = 3, value_parser = count)]
    pub repeats: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Put the answers' tokens into it, with what was asked
    #[arg(long, requires = "json")]
    pub answers: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// What the rows of a batch ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rows {
    Unguided,
    /// Each by a system text and a strength of its own
    Prompted,
    /// An adapter under one preference
    One,
    /// The same adapter, another preference for each row
    Mixed,
}

/// How base and reward worker compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Roles {
    /// Each on its own threads
    Separate,
    /// In one pass over one copy of the weights, on the threads of both
    Fused,
}

#[derive(Debug, Clone, Args)]
pub struct BenchDraftArgs {
    /// Tokens that drafts run ahead, comma-separated: `auto`, or numbers; 0 is without drafts
    #[arg(long, value_delimiter = ',', default_values = ["0", "auto", "8"], value_parser = draft_window, value_name = "auto|N")]
    pub draft_window: Vec<DraftWindow>,
    /// Share of positions at which base and reward model agree on the token
    #[arg(long, default_value_t = 0.8, value_parser = bounds::share)]
    pub agreement: f64,
    /// Tokens of each answer
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u32).range(4..=1024))]
    pub tokens: u32,
    /// Measurements of each case; the median is shown, with the range
    #[arg(long, default_value_t = 3, value_parser = count)]
    pub repeats: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Clone, Args)]
pub struct BenchContextArgs {
    /// A GGUF file, a Hugging Face folder, or hf://org/name [default: the demo model]
    #[arg(long)]
    pub model: Option<String>,
    /// Tokens of the prompt, comma-separated
    #[arg(long, value_delimiter = ',', default_values_t = [100, 512, 1000, 2000], value_parser = bounds::within(1..=crate::args::COUNT_MAX))]
    pub prompt_tokens: Vec<usize>,
    /// Steps after each length, of which the median counts
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(4..=4096))]
    pub tokens: u32,
    /// Measurements of each case; the median is shown
    #[arg(long, default_value_t = 5, value_parser = count)]
    pub repeats: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Clone, Args)]
pub struct BenchExchangeArgs {
    /// Tokens of the vocabulary, comma-separated
    #[arg(long, value_delimiter = ',', default_values_t = [32_000, 49_152, 128_256, 151_936], value_parser = bounds::within(1..=VOCABULARY_MAX))]
    pub vocabulary: Vec<usize>,
    /// Rows of a message, comma-separated
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16], value_parser = count)]
    pub batch: Vec<usize>,
    /// Length of the lists (K)
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub list_length: u32,
    /// Round trips of each case; the median is shown
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct BenchChooseArgs {
    /// Tokens of the vocabulary, comma-separated
    #[arg(long, value_delimiter = ',', default_values_t = [32_000, 49_152, 128_256, 151_936], value_parser = bounds::within(1..=VOCABULARY_MAX))]
    pub vocabulary: Vec<usize>,
    /// Length of the lists (K)
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub list_length: u32,
    /// Positions that are measured; minimum and median are shown
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct BenchLoadArgs {
    /// The router of a running cluster [default: `uniarm up` as a process of its own]
    #[arg(long, env = "UNIARM_ENDPOINT")]
    pub endpoint: Option<String>,
    #[command(flatten)]
    pub key: KeyArgs,
    /// The model of that process [default: the demo model]
    #[arg(long, conflicts_with = "endpoint")]
    pub model: Option<String>,
    /// Requests per second, comma-separated: one measurement for each
    #[arg(long, value_delimiter = ',', default_values_t = [1.0, 2.0, 4.0], value_parser = bounds::positive)]
    pub rate: Vec<f64>,
    /// Seconds of arrivals at each rate
    #[arg(long, default_value_t = 20.0, value_parser = bounds::positive)]
    pub seconds: f64,
    /// The same seed gives the same arrivals and requests
    #[arg(long, default_value_t = 1, value_parser = bounds::seed)]
    pub seed: u64,
    /// Tokens of a prompt, drawn evenly
    #[arg(long, default_value = "32-128", value_parser = range, value_name = "LEAST-MOST")]
    pub prompt_tokens: RangeInclusive<u32>,
    /// Tokens of an answer, drawn evenly
    #[arg(long, default_value = "16-64", value_parser = range, value_name = "LEAST-MOST")]
    pub answer_tokens: RangeInclusive<u32>,
    /// Share of requests that are guided
    #[arg(long, default_value_t = 1.0, value_parser = bounds::share)]
    pub guided: f64,
    /// 0 is greedy
    #[arg(long, default_value_t = 1.0, value_parser = bounds::number)]
    pub temperature: f32,
    /// A good request has its first token within so many milliseconds
    #[arg(long, default_value_t = 1000.0, value_parser = bounds::positive)]
    pub first_token_ms: f64,
    /// … and needs at most so many for each further token, on average
    #[arg(long, default_value_t = 100.0, value_parser = bounds::positive)]
    pub next_token_ms: f64,
    /// Write the arrivals of the last rate to this file, as a trace for `uniarm simulate`
    #[arg(long, value_name = "FILE")]
    pub write_trace: Option<PathBuf>,
    /// Write the steps of the workers at the last rate to this file, as `--observed` of `uniarm simulate` reads them
    #[arg(long, value_name = "FILE", conflicts_with = "endpoint")]
    pub write_steps: Option<PathBuf>,
    /// Write the requests of the last rate to this file, as lines for `uniarm batch`
    #[arg(long, value_name = "FILE")]
    pub write_lines: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub exchange: ExchangeArgs,
}

#[derive(Debug, Clone, Args)]
pub struct BenchFrontArgs {
    /// Streams at once, comma-separated
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1000, 5000], value_parser = streams)]
    pub streams: Vec<usize>,
    /// Ways to listen, comma-separated; `direct`, which passes no router, is what the others are compared with
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Way::Direct, Way::Grpc, Way::Http])]
    pub ways: Vec<Way>,
    /// Tokens of each stream
    #[arg(long, default_value_t = 40, value_parser = count)]
    pub tokens: usize,
    /// Milliseconds between two tokens of a stream
    #[arg(long, default_value_t = 250.0, value_parser = bounds::positive)]
    pub interval_ms: f64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct BenchSimulationArgs {
    /// A GGUF file, a Hugging Face folder, or hf://org/name [default: the demo model]
    #[arg(long)]
    pub model: Option<String>,
    /// Requests per second, comma-separated: loads for each. With several, a load is simulated with the steps of those at the
    /// other rates
    #[arg(long, value_delimiter = ',', default_values_t = [3.0], value_parser = bounds::positive)]
    pub rate: Vec<f64>,
    /// Seconds of arrivals of each load
    #[arg(long, default_value_t = 12.0, value_parser = bounds::positive)]
    pub seconds: f64,
    /// Share of requests that are guided, comma-separated: a load for each
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 1.0], value_parser = bounds::share)]
    pub guided: Vec<f64>,
    /// Tokens of the reward models' system texts, as their template writes them
    #[arg(long, default_value_t = 25, value_parser = bounds::within(0..=crate::args::COUNT_MAX))]
    pub system_tokens: usize,
    /// Loads of each kind, of seeds 1, 2, …, each between two calibrations and, from two on, beside others; medians are shown
    #[arg(long, default_value_t = 6, value_parser = count)]
    pub repeats: usize,
    /// Rounds of each calibration
    #[arg(long, default_value_t = ROUNDS, value_parser = count)]
    pub rounds: usize,
    /// Threads of each worker's model [default: half of the machine's cores]
    #[arg(long, value_parser = count)]
    pub threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How a client comes to its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// From the worker itself
    Direct,
    Grpc,
    Http,
}

// === impl Way ===

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Grpc => "gRPC",
            Self::Http => "HTTP",
        }
    }
}

// === impl Rows ===

impl Rows {
    pub const ALL: [Self; 4] = [Self::Unguided, Self::Prompted, Self::One, Self::Mixed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unguided => "unguided",
            Self::Prompted => "prompted",
            Self::One => "one preference",
            Self::Mixed => "mixed preferences",
        }
    }
}

// === impl Roles ===

impl Roles {
    pub fn name(self) -> &'static str {
        match self {
            Self::Separate => "separate",
            Self::Fused => "fused",
        }
    }
}

// === parsers ===

pub fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=COUNT_MAX) => Ok(number),
        _ => Err(format!("wants a number between 1 and {COUNT_MAX}")),
    }
}

fn streams(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=STREAMS_MAX) => Ok(number),
        _ => Err(format!("wants a number between 1 and {STREAMS_MAX}")),
    }
}

fn range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (least, most) = text.split_once('-').unwrap_or((text, text));
    match (least.parse(), most.parse()) {
        (Ok(least), Ok(most)) if 1 <= least && least <= most => Ok(least..=most),
        _ => Err("wants LEAST-MOST, such as 16-64".to_owned()),
    }
}
