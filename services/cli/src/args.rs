//! The command line. Every flag of a role can also come from the environment (`UNIARM_STORE`, …).

use clap::{Args, Command as Flags, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use uniarm_base::{DraftRows, DraftWindow, PaceOptions};
use uniarm_decode::PreferenceSpec;
use uniarm_proto::{GuidanceTerm, limits::DRAFT_WINDOW_MAX};

use crate::{
    adapters::AdaptersArgs,
    batch::BatchArgs,
    bench::args::BenchArgs,
    bounds,
    chat::ChatArgs,
    client::EndpointArgs,
    complete,
    demo::DemoArgs,
    device::DeviceArgs,
    doctor::DoctorArgs,
    eval::EvalArgs,
    front::FrontArgs,
    generate::{self, Compared},
    group::GroupArgs,
    keys::KeysCommand,
    label::LabelArgs,
    manual::{CompletionsArgs, ManArgs},
    oracle::OracleCommand,
    replay::ReplayArgs,
    simulate::args::SimulateArgs,
    store::StoreArgs,
    tls::{AdminArgs, TlsArgs},
    train::TrainArgs,
};

/// Threads of one model: beyond, a number is a mistake.
pub const THREADS_MAX: u64 = 1024;

/// Tokens of a cache: its blocks have numbers of 32 bits, also where both roles share one.
const KV_TOKENS_MAX: u64 = 1 << 34;

/// Sequences, requests, tokens of a step: no machine has more of them at once.
pub const COUNT_MAX: u64 = 1 << 20;

/// Serves a frozen language model whose every token is steered by a reward model towards the preference that the
/// request asks for.
#[derive(Debug, Parser)]
#[command(name = "uniarm", version, about, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The command line of this process.
    pub fn of_process() -> Self {
        let matches = with_negatives(Self::command()).get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// Takes `--seed -1` for a value, which the flag's own bounds refuse; clap would say that there is no flag `-1`.
pub fn with_negatives(flags: Flags) -> Flags {
    flags
        .mut_args(|flag| match flag.is_positional() || !flag.get_action().takes_values() {
            true => flag,
            false => flag.allow_negative_numbers(true),
        })
        .mut_subcommands(with_negatives)
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole cluster in this process: for laptops and tests
    Up(UpArgs),
    /// Run a router: the front door
    Router(RouterArgs),
    /// Run a base worker: the language model that writes
    Base(BaseArgs),
    /// Run a reward worker: the models that steer
    Reward(RewardArgs),
    /// Ask a cluster for an answer
    Generate(Box<GenerateArgs>),
    /// Talk with a cluster
    Chat(Box<ChatArgs>),
    /// Ask a cluster for an answer to each line of a file
    Batch(Box<BatchArgs>),
    /// List what a cluster serves
    Models(ModelsArgs),
    /// Show who is in a cluster, and what they do
    Status(StatusArgs),
    /// Compute recorded requests again, and say where a record is not what was answered
    Replay(ReplayArgs),
    /// Make API keys of tenants
    Keys {
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// Say which adapters the reward workers of a cluster serve, and make adapters of adapters
    Adapters(AdaptersArgs),
    /// Judge answers: fit, ask and compare what scores them for one objective
    Oracle {
        #[command(subcommand)]
        command: OracleCommand,
    },
    /// Sample answers from a cluster and label pairs of them with oracles
    Label(LabelArgs),
    /// Sweep preferences over methods, score the answers, and report fronts, volumes and examples
    Eval(EvalArgs),
    /// Train a reward model on preference pairs
    Train(Box<TrainArgs>),
    /// Measure this machine: tokens per second beside what it can do at most
    Bench(BenchArgs),
    /// Ask how many workers a load needs, on machines that are not here
    Simulate(Box<SimulateArgs>),
    /// Start a cluster of three processes, show one prompt under several preferences, and stop
    Demo(DemoArgs),
    /// Look at this machine: what it has and does, what is missing, and what to do about it
    Doctor(DoctorArgs),
    /// Print what a shell needs to complete this command line
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for each subcommand
    Man(ManArgs),
}

/// What every long-running process has.
#[derive(Debug, Clone, Args)]
pub struct ProcessArgs {
    /// Address of the gRPC services (host:port; port 0 takes any free one)
    #[arg(long, env = "UNIARM_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: String,
    #[command(flatten)]
    pub admin: AdminArgs,
    /// Address that others reach this process at [default: the listening address]
    #[arg(long, env = "UNIARM_ADVERTISE")]
    pub advertise: Option<String>,
    /// Name of this process, stable over restarts [default: role-host-port]
    #[arg(long, env = "UNIARM_ID")]
    pub id: Option<String>,
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub log: LogArgs,
    /// Seconds that running requests get to end after SIGTERM; what then still runs goes on at another process
    #[arg(long, env = "UNIARM_DRAIN_TIMEOUT", default_value_t = 30.0, value_parser = bounds::seconds)]
    pub drain_timeout: f64,
    /// Check the configuration, print it, and exit without starting anything
    #[arg(long)]
    pub check: bool,
}

#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// Form of log lines on standard error
    #[arg(long, env = "UNIARM_LOG", value_enum, default_value = "text")]
    pub log: LogForm,
    /// What is logged, as `level` or `crate=level`, comma-separated
    #[arg(long, env = "UNIARM_LOG_FILTER", default_value = "info")]
    pub log_filter: String,
    /// OpenTelemetry collector for traces (`http://host:4317`) [default: OTEL_EXPORTER_OTLP_ENDPOINT, else none]
    #[arg(long, env = "UNIARM_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogForm {
    Text,
    Json,
}

/// How a model is run.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Threads of the model [default: half of the machine's cores; with both roles fused, all of them]
    #[arg(long, env = "UNIARM_THREADS", value_parser = bounds::within(1..=THREADS_MAX))]
    pub threads: Option<usize>,
    /// Tokens that the paged cache holds, over all sequences; its memory is taken at the start
    #[arg(long, env = "UNIARM_KV_TOKENS", default_value_t = 16384, value_parser = bounds::within(1..=KV_TOKENS_MAX))]
    pub kv_tokens: usize,
    /// Tokens of one step, over all sequences
    #[arg(long, env = "UNIARM_STEP_TOKENS", default_value_t = 512, value_parser = bounds::within(1..=COUNT_MAX))]
    pub step_tokens: usize,
    /// Sequences that run at once; on a reward worker, sessions of one step
    #[arg(long, env = "UNIARM_RUNNING_MAX", default_value_t = 256, value_parser = bounds::within(1..=COUNT_MAX))]
    pub running_max: usize,
    /// Sequences that wait for their turn; one more is refused, and with 0 every one that cannot run at once
    #[arg(long, env = "UNIARM_WAITING_MAX", default_value_t = 1024, value_parser = bounds::within(0..=COUNT_MAX))]
    pub waiting_max: usize,
    /// Compute every prompt anew
    #[arg(long, env = "UNIARM_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
}

#[derive(Debug, Clone, Args)]
pub struct RouterArgs {
    #[command(flatten)]
    pub process: ProcessArgs,
    /// A base worker at a fixed address, with `--store memory`; repeatable
    #[arg(long, env = "UNIARM_BASE_PEER", value_delimiter = ',')]
    pub base_peer: Vec<String>,
    /// A reward worker at a fixed address, with `--store memory`; repeatable
    #[arg(long, env = "UNIARM_REWARD_PEER", value_delimiter = ',')]
    pub reward_peer: Vec<String>,
    /// Requests that are relayed at once; one more is refused
    #[arg(long, env = "UNIARM_REQUESTS_MAX", default_value_t = 4096, value_parser = bounds::within(1..=COUNT_MAX))]
    pub requests_max: usize,
    /// Address of the HTTP front door (host:port): OpenAI's API at /v1, a page to try it at /; none without it
    #[arg(long, env = "UNIARM_HTTP_LISTEN")]
    pub http_listen: Option<String>,
    #[command(flatten)]
    pub front: FrontArgs,
}

#[derive(Debug, Clone, Args)]
pub struct BaseArgs {
    #[command(flatten)]
    pub process: ProcessArgs,
    /// A GGUF file, a Hugging Face folder, or hf://org/name
    #[arg(long, env = "UNIARM_MODEL")]
    pub model: String,
    /// Name that requests use [default: the file's or the repository's]
    #[arg(long, env = "UNIARM_NAME")]
    pub name: Option<String>,
    /// Be a reward worker too, over the same weights, at this address (host:port; without one any free port)
    #[arg(long, env = "UNIARM_FUSED_REWARD", value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "127.0.0.1:0")]
    pub fused_reward: Option<String>,
    #[command(flatten)]
    pub models: RewardModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub exchange: ExchangeArgs,
    /// How whole rows of reward logits come: with all else, or from GPU to GPU where the reward worker has one too (docs/gpu.md)
    #[arg(long, env = "UNIARM_DENSE_OVER", value_enum, default_value = "grpc")]
    pub dense_over: DenseOver,
    #[command(flatten)]
    pub group: GroupArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DenseOver {
    Grpc,
    Nccl,
}

/// How reward logits travel; the tokens are the same either way.
#[derive(Debug, Clone, Args)]
pub struct ExchangeArgs {
    /// Lists of the largest logits with a certificate, or whole rows
    #[arg(long, env = "UNIARM_EXCHANGE", value_enum, default_value = "certified")]
    pub exchange: ExchangeMode,
    /// Length of the lists (K) to begin with; they grow while many tokens need a query
    #[arg(long, env = "UNIARM_LIST_LENGTH", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub list_length: u32,
    /// Tokens that a reward worker may run ahead with drafts: `auto`, or a number; 0 turns drafting off
    #[arg(long, env = "UNIARM_DRAFT_WINDOW", default_value = "auto", value_parser = draft_window, value_name = "auto|N")]
    pub draft_window: DraftWindow,
    /// What drafts are made from: the reward's logits, or also those of its backbone without adapter and system text
    #[arg(long, env = "UNIARM_DRAFT_ROWS", value_enum, default_value = "auto")]
    pub draft_rows: DraftRowsArg,
    /// Milliseconds of silence of a reward worker after which another one is asked besides, and the first answer counts;
    /// longer than its steps take [default: it is waited for until its stream ends, some 4 s]
    #[arg(long, env = "UNIARM_HEDGE_AFTER", value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub hedge_after: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DraftRowsArg {
    /// Whichever is worth more
    Auto,
    Single,
    Dual,
}

impl ExchangeArgs {
    pub fn pace(&self) -> PaceOptions {
        PaceOptions {
            window: self.draft_window,
            rows: match self.draft_rows {
                DraftRowsArg::Auto => DraftRows::Auto,
                DraftRowsArg::Single => DraftRows::Single,
                DraftRowsArg::Dual => DraftRows::Dual,
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExchangeMode {
    Certified,
    Dense,
}

#[derive(Debug, Clone, Args)]
pub struct RewardArgs {
    #[command(flatten)]
    pub process: ProcessArgs,
    /// The backbone: a GGUF file, a Hugging Face folder, or hf://org/name
    #[arg(long, env = "UNIARM_MODEL")]
    pub model: String,
    #[command(flatten)]
    pub models: RewardModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub group: GroupArgs,
}

/// The reward models on one backbone. Without any of these flags the backbone itself is served, as `reward`.
#[derive(Debug, Clone, Args)]
pub struct RewardModelArgs {
    /// An adapter folder, served under its folder's name or as NAME=FOLDER; repeatable
    #[arg(long, env = "UNIARM_ADAPTER", value_name = "[NAME=]FOLDER", value_delimiter = ',')]
    pub adapter: Vec<String>,
    /// A system text that makes the backbone a prompted reward model named `reward`
    #[arg(
        long = "reward-system",
        visible_alias = "system",
        env = "UNIARM_REWARD_SYSTEM",
        value_name = "TEXT"
    )]
    pub system: Option<String>,
    /// A prompted reward model by name; repeatable
    #[arg(long, value_name = "NAME=TEXT")]
    pub prompted: Vec<String>,
}

impl RewardModelArgs {
    /// Prompted reward models by name, with their texts.
    pub fn prompted(&self) -> anyhow::Result<Vec<(&str, &str)>> {
        let is_whole = |flag: &&String| match flag.split_once('=') {
            Some((name, text)) => !name.is_empty() && !name.contains('@') && !text.is_empty(),
            None => false,
        };
        if let Some(wrong) = self.prompted.iter().find(|flag| !is_whole(flag)) {
            anyhow::bail!("--prompted wants NAME=TEXT, without an @ in NAME, not {wrong:?}");
        }
        Ok(self.prompted.iter().filter_map(|flag| flag.split_once('=')).collect())
    }

    /// Whether any flag names a reward model.
    pub fn is_some(&self) -> bool {
        !self.adapter.is_empty() || self.system.is_some() || !self.prompted.is_empty()
    }

    /// What can be said of the flags without opening a file.
    pub fn check(&self) -> anyhow::Result<()> {
        self.adapter.iter().try_for_each(|flag| crate::worker::check_adapter_name(flag))?;
        self.prompted().map(|_| ())
    }

    /// Whether the adapters are here; a model takes long to load, and would be loaded for nothing.
    pub fn check_folders(&self) -> anyhow::Result<()> {
        for flag in &self.adapter {
            let (_, folder) = crate::worker::adapter_name(flag)?;
            anyhow::ensure!(folder.is_dir(), "--adapter {flag}: there is no folder {}", folder.display());
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// The base model: a GGUF file, a Hugging Face folder, or hf://org/name [default: the demo model]
    #[arg(long)]
    pub base: Option<String>,
    /// The reward models' backbone [default: the base model]
    #[arg(long)]
    pub reward: Option<String>,
    #[command(flatten)]
    pub models: RewardModelArgs,
    /// Compute both roles in one pass over one copy of the weights; needs one model for both
    #[arg(long)]
    pub fused: bool,
    /// Address of the gRPC front door
    #[arg(long, default_value = "127.0.0.1:7000")]
    pub grpc: String,
    /// Address of the HTTP front door: OpenAI's API at /v1, a page to try it at /; `none` for none
    #[arg(long, default_value = "127.0.0.1:7080")]
    pub http_listen: String,
    #[command(flatten)]
    pub front: FrontArgs,
    #[command(flatten)]
    pub admin: AdminArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub exchange: ExchangeArgs,
    #[command(flatten)]
    pub log: LogArgs,
}

#[derive(Debug, Clone, Args)]
pub struct ModelsArgs {
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Look again each second, until interrupted
    #[arg(long)]
    pub watch: bool,
}

#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// What to answer
    #[arg(required_unless_present = "token_ids")]
    pub prompt: Option<String>,
    /// Base model [default: the only one served]
    #[arg(long, add = complete::model())]
    pub model: Option<String>,
    /// System message of the chat
    #[arg(long, conflicts_with_all = ["raw", "token_ids"])]
    pub system: Option<String>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Continue these token ids, comma-separated
    #[arg(long, value_delimiter = ',', conflicts_with = "prompt")]
    pub token_ids: Vec<u32>,
    #[command(flatten)]
    pub guidance: GuidanceArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Seconds until the answer is worth nothing
    #[arg(long, value_parser = bounds::seconds)]
    pub timeout: Option<f64>,
    /// Idempotency id
    #[arg(long)]
    pub request_id: Option<String>,
    /// Show the answer beside the unguided one, and beside that of this preference; repeatable; `unguided` adds none
    #[arg(long, value_name = "PREFERENCE", conflicts_with_all = ["json", "color"], add = complete::preference())]
    pub compare: Vec<Compared>,
    /// Have the router keep a record of it, and print the record's hash (docs/audit.md)
    #[arg(long)]
    pub audit: bool,
    /// Colour each token by what guidance did to it
    #[arg(long)]
    pub color: bool,
    /// Print one JSON object instead of streaming text
    #[arg(long, conflicts_with = "color")]
    pub json: bool,
}

/// What steers. Without any of these flags the base model answers alone.
#[derive(Debug, Clone, Args)]
pub struct GuidanceArgs {
    /// Weights of objectives, such as harmless=0.7,helpful=0.3
    #[arg(long, add = complete::preference())]
    pub preference: Option<PreferenceSpec>,
    /// Weight of the base model's own logits; 0: the reward models alone choose
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = bounds::number)]
    pub base_strength: f32,
    /// Guidance strength w: guided logits are base_strength · z_base + w · z_reward [default: 1]
    #[arg(long, allow_hyphen_values = true, value_parser = bounds::number)]
    pub strength: Option<f32>,
    /// Reward model [default: the one that serves the objectives]
    #[arg(long, add = complete::reward())]
    pub reward: Option<String>,
    /// A further guidance term: reward=NAME,strength=W,objective=weight,…; repeatable
    #[arg(long, value_name = "TERM", value_parser = generate::parse_term)]
    pub term: Vec<GuidanceTerm>,
    /// What to do with a token whose reward cannot be had
    #[arg(long, value_enum, default_value = "wait")]
    pub on_reward_loss: LossPolicy,
    /// How reward logits travel [default: the base worker's setting]
    #[arg(long, value_enum)]
    pub exchange: Option<ExchangeMode>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LossPolicy {
    Wait,
    Fail,
    Unguided,
}

#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = bounds::number)]
    pub temperature: f32,
    /// Keep the k most probable tokens; 0: all
    #[arg(long, default_value_t = 0)]
    pub top_k: u32,
    /// Keep the most probable tokens up to this mass
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = bounds::number)]
    pub top_p: f32,
    /// Keep tokens at least this probable, relative to the most probable one
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true, value_parser = bounds::number)]
    pub min_p: f32,
    /// Divide positive and multiply negative logits of tokens seen so far
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = bounds::number)]
    pub repetition_penalty: f32,
    /// Subtract from logits of tokens in the answer so far
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true, value_parser = bounds::number)]
    pub presence_penalty: f32,
    /// The same for each time they occur
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true, value_parser = bounds::number)]
    pub frequency_penalty: f32,
    /// The same seed gives the same answer [default: drawn]
    #[arg(long, value_parser = bounds::seed)]
    pub seed: Option<u64>,
    /// Length of the answer
    #[arg(long, default_value_t = 256)]
    pub max_tokens: u32,
    /// End before this text; repeatable
    #[arg(long)]
    pub stop: Vec<String>,
    /// End with this token; repeatable
    #[arg(long)]
    pub stop_token_id: Vec<u32>,
    /// Report log-probabilities, with so many alternatives; of `generate` with --json, and not of `chat`
    #[arg(long)]
    pub logprobs: Option<u32>,
    /// Number of answers
    #[arg(short = 'n', long = "n", default_value_t = 1)]
    pub n: u32,
    /// Do not end at the model's end-of-text token
    #[arg(long)]
    pub ignore_eos: bool,
}

pub fn draft_window(text: &str) -> Result<DraftWindow, String> {
    match text.parse() {
        _ if text == "auto" => Ok(DraftWindow::Auto),
        Ok(number) if number <= DRAFT_WINDOW_MAX => Ok(DraftWindow::Fixed(number)),
        _ => Err(format!("wants auto or a number up to {DRAFT_WINDOW_MAX}")),
    }
}
