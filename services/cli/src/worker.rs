//! From flags to running engines: models are opened, tested and shared.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use uniarm_base::{BaseEngine, BaseHandle, BaseOptions, BaseSettings, Scorer};
use uniarm_engine::{ExecutorOptions, fused::fuse};
use uniarm_model::{Forward, Llama, LlamaOptions, ModelFiles, OpenOptions, Row};
use uniarm_proto::{Exchange, Member};
use uniarm_reward::{Backbone, RewardCatalogue, RewardEngine, RewardHandle, RewardOptions};
use uniarm_runtime::Metrics;

use crate::{
    args::{EngineArgs, ExchangeArgs, ExchangeMode, RewardModelArgs},
    device::Model,
    memory,
};

/// Tokens of one cache block: the unit of the attention kernel's sums.
pub const BLOCK_TOKENS: usize = 16;

/// Name of a reward model that no flag names.
const DEFAULT_REWARD: &str = "reward";

/// Prints the path of the demo model, fetching it if needed.
const FETCH_DEMO_MODEL: &str = include_str!("../../../scripts/fetch-demo-model.sh");

/// Reward models that any chat model can be by a system text: for models that no adapter was trained for.
pub const DEMO_PROMPTED: [(&str, &str); 4] = [
    ("helpful", "You are a helpful expert. Give concrete, useful and complete advice."),
    ("harmless", "You are a careful assistant. Be gentle and safe, and never suggest anything risky."),
    (
        "positive",
        "You are an extremely cheerful, positive and encouraging AI assistant. Answer in very simple words.",
    ),
    ("concise", "Answer in one short sentence. Be as brief as possible."),
];

/// A model that is open and in memory.
pub struct Loaded {
    pub files: ModelFiles,
    pub llama: Llama,
}

/// How much of the machine a model takes, where no flag says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// Base and reward workers often share a machine, and always work at the same time.
    Half,
    /// Both roles in one: all cores, and a cache for each role.
    All,
}

/// Both roles of one process.
pub struct Pair {
    pub base_files: ModelFiles,
    pub base: Box<dyn Forward>,
    pub reward_files: ModelFiles,
    pub reward: Box<dyn Forward>,
}

// === impl Threads ===

impl Threads {
    pub fn of(fused: bool) -> Self {
        if fused { Self::All } else { Self::Half }
    }
}

// === models ===

/// Opens and loads a model; it takes seconds, and shows a progress bar while it fetches.
pub async fn load(source: String, engine: &EngineArgs, share: Threads) -> anyhow::Result<Loaded> {
    let options = llama_options(engine, share);
    let loading = tokio::task::spawn_blocking(move || {
        let files = open(&source)?;
        memory::check_cache(&files, options.kv_blocks * BLOCK_TOKENS)?;
        let mut llama =
            Llama::load(&files, &options).with_context(|| format!("cannot load the model {source}"))?;
        self_test(&mut llama).with_context(|| format!("the model {source} fails its self-test"))?;
        anyhow::Ok(Loaded { files, llama })
    });
    loading.await.context("loading the model panicked")?
}

/// The same with next to no cache: for models that [`share`] the weights.
pub async fn load_weights(source: String, engine: &EngineArgs) -> anyhow::Result<Loaded> {
    load(source, &EngineArgs { kv_tokens: BLOCK_TOKENS, ..engine.clone() }, Threads::Half).await
}

/// Reads a model's files without its weights: the second role of a process has a tokenizer and template of its own.
pub fn open(source: &str) -> anyhow::Result<ModelFiles> {
    uniarm_model::open(source, &OpenOptions { progress: true, ..OpenOptions::default() })
        .with_context(|| format!("cannot open the model {source}"))
}

/// The same weights with a cache of their own.
pub fn share(loaded: &Loaded, engine: &EngineArgs, share: Threads) -> anyhow::Result<Llama> {
    let options = llama_options(engine, share);
    memory::check_cache(&loaded.files, options.kv_blocks * BLOCK_TOKENS)?;
    Ok(loaded.llama.share(&options)?)
}

/// One forward: a model that cannot compute must not be announced.
pub fn self_test(model: &mut dyn Forward) -> anyhow::Result<()> {
    let mut logits = Vec::new();
    let row = Row { tokens: &[0], start: 0, blocks: &[0], logits_from: 0, adapter: None };
    model.forward(&[row], &mut logits)?;
    if logits.iter().any(|logit| !logit.is_finite()) {
        bail!("its logits are not finite");
    }
    Ok(())
}

/// The models of both roles of one process.
pub async fn pair(
    loaded: Loaded,
    (base_source, reward_source): (&str, String),
    engine: &EngineArgs,
    fused: bool,
) -> anyhow::Result<Pair> {
    let (base, reward): (Box<dyn Forward>, Box<dyn Forward>);
    let reward_files;
    if fused {
        reward_files = open(&reward_source)?;
        let [first, second] = fuse(Box::new(loaded.llama));
        (base, reward) = (Box::new(first), Box::new(second));
    } else if reward_source == base_source {
        reward_files = open(&reward_source)?;
        reward = Box::new(share(&loaded, engine, Threads::Half)?);
        base = Box::new(loaded.llama);
    } else {
        let other = load(reward_source, engine, Threads::Half).await?;
        reward_files = other.files;
        (base, reward) = (Box::new(loaded.llama), Box::new(other.llama));
    }
    Ok(Pair { base_files: loaded.files, base, reward_files, reward })
}

pub fn llama_options(engine: &EngineArgs, share: Threads) -> LlamaOptions {
    let blocks = engine.kv_tokens.div_ceil(BLOCK_TOKENS);
    LlamaOptions {
        threads: threads(engine, share),
        kv_blocks: if share == Threads::All { 2 * blocks } else { blocks },
        block_tokens: BLOCK_TOKENS,
        kv_at_once: true,
    }
}

pub fn threads(engine: &EngineArgs, share: Threads) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    engine.threads.unwrap_or(match share {
        Threads::Half => (cores / 2).max(1),
        Threads::All => cores,
    })
}

/// Path of the demo model, fetched on the first call.
pub async fn demo_model() -> anyhow::Result<String> {
    let fetching = tokio::task::spawn_blocking(|| {
        let mut shell = Command::new("bash")
            .args(["-s"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("fetching the demo model needs bash")?;
        let mut script = shell.stdin.take().context("no standard input")?;
        script.write_all(FETCH_DEMO_MODEL.as_bytes())?;
        drop(script);
        let output = shell.wait_with_output()?;
        if !output.status.success() {
            bail!("the demo model could not be fetched; give --base (or --model) a path or hf://org/name");
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    });
    fetching.await.context("fetching the demo model panicked")?
}

// === engines ===

pub fn start_base(
    files: ModelFiles,
    model: Box<dyn Forward>,
    name: Option<String>,
    flags: (&EngineArgs, &ExchangeArgs),
    scorer: Arc<dyn Scorer>,
    metrics: &Metrics,
) -> anyhow::Result<(BaseHandle, Member)> {
    let (engine, exchange) = flags;
    let settings = BaseSettings {
        model: name.unwrap_or(files.name),
        fingerprint: files.fingerprint,
        tokenizer: files.tokenizer.context("a base model needs a tokenizer")?,
        template: files.template,
        context_tokens: uniarm_engine::context_tokens(&*model),
        vocabulary: model.vocabulary(),
        exchange: match exchange.exchange {
            ExchangeMode::Certified => Exchange::Certified,
            ExchangeMode::Dense => Exchange::Dense,
        },
        list_length: exchange.list_length,
    };
    let member = Member { capacity: engine.running_max as u32, ..settings.member() };
    let options = BaseOptions {
        executor: executor_options(engine),
        // Refused before its prompt is read, and with places kept for priorities, is what the queue would refuse.
        requests_max: engine.running_max + engine.waiting_max,
        pace: exchange.pace(),
        hedge_after: exchange.hedge_after.map(Duration::from_millis),
        ..BaseOptions::default()
    };
    let handle = BaseEngine::start(model, settings, scorer, &options, metrics)?;
    Ok((handle, member))
}

pub fn start_reward(
    model: Model,
    models: &RewardModelArgs,
    engine: &EngineArgs,
    metrics: &Metrics,
) -> anyhow::Result<(RewardHandle, Member)> {
    let Model { files, forward, lanes } = model;
    let config = files.config.clone();
    let backbone = Backbone {
        name: files.name,
        fingerprint: files.fingerprint,
        tokenizer: files.tokenizer.context("a reward model needs a tokenizer")?,
        template: files.template,
        context_tokens: uniarm_engine::context_tokens(&*forward),
        vocabulary: forward.vocabulary(),
    };
    let mut catalogue = RewardCatalogue::new(backbone);
    for adapter in &models.adapter {
        let (name, folder) = adapter_name(adapter)?;
        catalogue.add_adapter(&name, &folder, &config)?;
    }
    if let Some(system) = &models.system {
        catalogue.add_prompted(DEFAULT_REWARD, system)?;
    }
    for (name, text) in models.prompted()? {
        catalogue.add_prompted(name, text)?;
    }
    if catalogue.records().is_empty() {
        catalogue.add_plain(DEFAULT_REWARD)?;
    }
    let options = RewardOptions { executor: executor_options(engine), lanes, ..RewardOptions::default() };
    let member = Member { capacity: engine.running_max as u32, ..catalogue.member() };
    let handle = RewardEngine::start(forward, catalogue, &options, metrics)?;
    Ok((handle, member))
}

/// `NAME=FOLDER`, or the folder's own name.
pub fn adapter_name(flag: &str) -> anyhow::Result<(String, PathBuf)> {
    check_adapter_name(flag)?;
    if let Some((name, folder)) = flag.split_once('=') {
        return Ok((name.to_owned(), folder.into()));
    }
    let folder = Path::new(flag);
    let name = folder.canonicalize().with_context(|| format!("--adapter {flag}: no such folder"))?;
    let name = name.file_name().context("an adapter folder has a name")?.to_string_lossy().into_owned();
    check_adapter_name(&format!("{name}="))?;
    Ok((name, folder.to_owned()))
}

/// Refuses a name that looks like a version of the store's catalogue, before a folder is looked for.
pub fn check_adapter_name(flag: &str) -> anyhow::Result<()> {
    match flag.split_once('=') {
        Some((name, _)) if name.contains('@') => {
            bail!(
                "--adapter {name:?} has an @, which stands before versions of the store's catalogue: give it another \
                 name, as NAME=FOLDER"
            )
        }
        _ => Ok(()),
    }
}

/// What these flags make an engine with.
pub fn executor_options(engine: &EngineArgs) -> ExecutorOptions {
    ExecutorOptions {
        step_tokens: engine.step_tokens,
        running_max: engine.running_max,
        waiting_max: engine.waiting_max,
        prefix_cache: !engine.no_prefix_cache,
        ..ExecutorOptions::default()
    }
}
