//! The workers that are measured: one copy of the weights, and for each setting a base and a reward engine over it.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicUsize, Ordering},
};
use std::time::Instant;

use anyhow::Context as _;
use futures_util::future::try_join_all;
use tempfile::TempDir;
use uniarm_base::BaseHandle;
use uniarm_engine::fused::fuse;
use uniarm_model::{Forward, Llama};
use uniarm_proto::{
    Event, GenerateRequest, Generation, GuidanceTerm, Input, MemberId, OnRewardLoss, Placed, Priority,
    Progress, RewardWorker, Sampling, pb,
};
use uniarm_runtime::Metrics;

use super::{
    args::Roles,
    breakdown::{Breakdown, Snapshot},
    floor::Work,
    prompts::ADAPTER,
    synthetic,
};
use crate::{
    args::{EngineArgs, ExchangeArgs, RewardModelArgs},
    device::Model,
    local::LocalScorer,
    worker::{self, DEMO_PROMPTED, Loaded, Threads},
};

/// A loaded model.
pub struct Rig {
    pub model: String,
    pub work: Work,
    pub threads: usize,
    source: String,
    engine: EngineArgs,
    loaded: Loaded,
    adapter: TempDir,
}

/// A base engine with the reward engine that it asks.
pub struct Pair {
    base: BaseHandle,
    metrics: Metrics,
}

/// A batch that ran to its end.
pub struct Run {
    /// Tokens per second while all of its rows ran.
    pub rate: f64,
    /// Of all tokens, those that came in that time: where it is small, the rate is of little.
    pub window_share: f64,
    /// Seconds from the request to the first token of the row that had it last.
    pub first_token: f64,
    /// Of the time while all rows ran.
    pub breakdown: Option<Breakdown>,
    pub answers: Vec<Answered>,
}

/// One row's answer.
#[derive(Default)]
pub struct Answered {
    pub tokens: Vec<u32>,
    pub times: Vec<Instant>,
    pub exchange: pb::ExchangeUse,
    pub speculation: pb::Speculation,
}

/// Looks at the engines when the last row has begun and when the first has ended.
struct Lookout {
    waiting: AtomicUsize,
    begin: OnceLock<Snapshot>,
    end: OnceLock<Snapshot>,
}

// === impl Rig ===

impl Rig {
    pub async fn load(model: Option<String>, engine: &EngineArgs) -> anyhow::Result<Self> {
        let source = match model {
            Some(model) => model,
            None => worker::demo_model().await?,
        };
        let loaded = worker::load_weights(source.clone(), engine).await?;
        let adapter = tempfile::tempdir()?;
        synthetic::write_adapter(&loaded.files.config, adapter.path())?;
        Ok(Self {
            model: loaded.files.name.clone(),
            work: Work::of(&loaded.llama),
            threads: worker::threads(engine, Threads::Half),
            source,
            engine: engine.clone(),
            loaded,
            adapter,
        })
    }

    /// Engines with caches of their own: what one setting has learnt or cached is no help to another.
    pub fn pair(&self, exchange: &ExchangeArgs, roles: Roles) -> anyhow::Result<Pair> {
        let prompted = DEMO_PROMPTED.iter().map(|(name, text)| format!("{name}={text}"));
        let models = RewardModelArgs {
            adapter: vec![format!("{ADAPTER}={}", self.adapter.path().display())],
            system: None,
            prompted: prompted.collect(),
        };
        let metrics = Metrics::new();
        let (base, reward) = self.forwards(roles)?;
        let files = worker::open(&self.source)?;
        let reward = Model::without_lanes(files, reward);
        let (reward, _) = worker::start_reward(reward, &models, &self.engine, &metrics)?;
        let scorer = Arc::new(LocalScorer::new(reward));
        let files = worker::open(&self.source)?;
        let (base, _) = worker::start_base(files, base, None, (&self.engine, exchange), scorer, &metrics)?;
        Ok(Pair { base, metrics })
    }

    /// The model by itself, as a base worker of its own threads has it.
    pub fn base_model(&self) -> anyhow::Result<Llama> {
        worker::share(&self.loaded, &self.engine, Threads::Half)
    }

    /// For the base and for the reward worker.
    fn forwards(&self, roles: Roles) -> anyhow::Result<(Box<dyn Forward>, Box<dyn Forward>)> {
        let share = |engine: &EngineArgs, threads| worker::share(&self.loaded, engine, threads);
        if roles == Roles::Separate {
            let [base, reward] = [(); 2].map(|()| share(&self.engine, Threads::Half));
            return Ok((Box::new(base?), Box::new(reward?)));
        }
        let both = EngineArgs { threads: Some(2 * self.threads), ..self.engine.clone() };
        let [base, reward] = fuse(Box::new(share(&both, Threads::All)?));
        Ok((Box::new(base), Box::new(reward)))
    }
}

// === impl Pair ===

impl Pair {
    /// `metrics`: those that both engines report to.
    pub fn new(base: BaseHandle, metrics: Metrics) -> Self {
        Self { base, metrics }
    }

    /// Runs rows at the same time, each to its end.
    pub async fn run(&self, rows: Vec<Placed>) -> anyhow::Result<Run> {
        let lookout =
            Lookout { waiting: AtomicUsize::new(rows.len()), begin: OnceLock::new(), end: OnceLock::new() };
        let asked = Instant::now();
        let answers = try_join_all(rows.into_iter().map(|row| self.answer(row, &lookout))).await?;
        let begin = answers.iter().map(|a| a.times[0]).max().context("a batch has rows")?;
        let end = answers.iter().map(|a| a.times[a.times.len() - 1]).min().context("a batch has rows")?;
        let inside =
            answers.iter().flat_map(|a| &a.times).filter(|time| **time > begin && **time <= end).count();
        let seconds = end.saturating_duration_since(begin).as_secs_f64();
        anyhow::ensure!(seconds > 0.0, "--tokens is too small: the rows of a batch never ran together");
        let snapshots = lookout.begin.get().zip(lookout.end.get());
        let tokens: usize = answers.iter().map(|a| a.times.len()).sum();
        Ok(Run {
            rate: inside as f64 / seconds,
            window_share: inside as f64 / tokens as f64,
            first_token: (begin - asked).as_secs_f64(),
            breakdown: snapshots.and_then(|(begin, end)| Breakdown::between(begin, end, seconds)),
            answers,
        })
    }

    async fn answer(&self, placed: Placed, lookout: &Lookout) -> anyhow::Result<Answered> {
        let mut events = self.base.run(placed, None).await?;
        let mut answered = Answered::default();
        while let Some(event) = events.recv().await {
            match event? {
                Event::Tokens(tokens) => {
                    if answered.times.is_empty() {
                        lookout.begun(&self.metrics);
                    }
                    answered.times.extend(tokens.ids.iter().map(|_| Instant::now()));
                    answered.tokens.extend(tokens.ids);
                }
                Event::Finished(_) => lookout.ended(&self.metrics),
                Event::Summary(summary) => {
                    answered.exchange = summary.exchange.unwrap_or_default();
                    answered.speculation = summary.speculation.unwrap_or_default();
                }
                Event::Started(_) => {}
            }
        }
        anyhow::ensure!(answered.times.len() > 1, "an answer of {} tokens", answered.times.len());
        Ok(answered)
    }
}

// === impl Lookout ===

impl Lookout {
    fn begun(&self, metrics: &Metrics) {
        if self.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            let _ = self.begin.set(Snapshot::take(metrics));
        }
    }

    /// A row that ends before the last has begun leaves nothing to look at.
    fn ended(&self, metrics: &Metrics) {
        if self.begin.get().is_some() {
            self.end.get_or_init(|| Snapshot::take(metrics));
        }
    }
}

/// A request as a router would place it, on the one reward worker there is.
pub fn place(input: Input, sampling: Sampling, guidance: Vec<GuidanceTerm>) -> Placed {
    let worker =
        RewardWorker { member: MemberId("reward".into()), generation: Generation(1), address: String::new() };
    let placements = guidance.iter().map(|_| vec![worker.clone()]).collect();
    let request = GenerateRequest {
        request_id: "bench".to_owned(),
        model: String::new(),
        input,
        sampling,
        guidance,
        base_strength: 1.0,
        on_reward_loss: OnRewardLoss::Wait,
        priority: Priority::Normal,
        exchange: None,
        skip: 0,
        audit: false,
    };
    Placed { request, progress: Progress::default(), placements, generation: Generation(1), tenant: 0 }
}
