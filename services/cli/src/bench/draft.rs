//! `uniarm bench draft`: a small reward model that runs ahead of a large base model, one answer at a time.
//!
//! Random weights of the right shapes take the time that such models take. On top of their logits a script puts a
//! token on which both agree, in as large a share of positions as asked: drafts are right that often.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use uniarm_base::DraftWindow;
use uniarm_model::{Forward, Llama, ModelError, ModelFiles, Row};
use uniarm_proto::{GuidanceTerm, Input, Sampling};
use uniarm_runtime::Metrics;

use super::{
    args::BenchDraftArgs,
    rig::{Pair, place},
    statistics::{Spread, bar},
    synthetic::{self, Shape},
};
use crate::{
    args::{DraftRowsArg, EngineArgs, ExchangeArgs, ExchangeMode, RewardModelArgs},
    device::Model,
    local::LocalScorer,
    worker::{self, Loaded, Threads},
};

/// 0.3 billion f32 weights: a step of few rows that memory decides, as that of a large model on an accelerator.
/// (Weights of 16 or 4 bits would make several rows of a pass cost arithmetic on a CPU, and drafts worth less.)
const BASE: Shape = Shape { hidden: 1024, layers: 20, heads: 16, kv_heads: 4, intermediate: 2816 };

/// Less than a tenth of it.
const REWARD: Shape = Shape { hidden: 256, layers: 6, heads: 4, kv_heads: 2, intermediate: 704 };

/// Name of the reward model.
const SMALL: &str = "small";

/// What the script adds to a logit: far more than random weights make.
const BASE_PEAK: f32 = 1000.0;
const REWARD_PEAK: f32 = 100.0;

/// Tokens of the prompt.
const PROMPT_TOKENS: u32 = 32;

/// Characters of the longest bar.
const BAR: usize = 24;

/// A model whose logits have a peak where a script wants it, a function of the tokens so far.
struct Scripted {
    model: Llama,
    vocabulary: usize,
    peak: f32,
    /// Share of positions at which the peak is on the token that all models agree on.
    agreement: f64,
    /// Per cache slot, the token that was written there.
    slots: Vec<u32>,
}

#[derive(Serialize)]
struct Report {
    agreement: f64,
    base_step_ms: f64,
    reward_step_ms: f64,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    name: String,
    tokens_per_second: Spread,
    /// Of the unguided rate of the same repeat.
    over_unguided: Spread,
    base_passes_per_token: f64,
    accepted: Option<f64>,
}

/// Engines for one window; `None`: unguided.
struct Setting {
    name: String,
    window: Option<DraftWindow>,
    pair: Pair,
}

pub async fn run(args: BenchDraftArgs) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    eprintln!("writing random weights and loading them");
    let base = load(&folder.path().join("base"), &BASE, &args.engine).await?;
    let reward = load(&folder.path().join("reward"), &REWARD, &args.engine).await?;
    let mut settings = vec![setting("unguided", None, (&base, &reward), &args).await?];
    for &window in &args.draft_window {
        let name = match window {
            DraftWindow::Auto => "guided, window auto".to_owned(),
            DraftWindow::Fixed(0) => "guided, lock-step".to_owned(),
            DraftWindow::Fixed(tokens) => format!("guided, window {tokens}"),
        };
        settings.push(setting(&name, Some(window), (&base, &reward), &args).await?);
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
    let progress = ProgressBar::new((settings.len() * args.repeats) as u64).with_style(style);
    let mut runs: Vec<Vec<super::rig::Run>> = settings.iter().map(|_| Vec::new()).collect();
    for repeat in 0..args.repeats {
        for (setting, runs) in settings.iter().zip(&mut runs) {
            progress.set_message(setting.name.clone());
            runs.push(setting.pair.run(vec![setting.request(repeat, args.tokens)]).await?);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let unguided: Vec<f64> = runs[0].iter().map(|run| run.rate).collect();
    let report = Report {
        agreement: args.agreement,
        base_step_ms: step_ms(&base, &args.engine)?,
        reward_step_ms: step_ms(&reward, &args.engine)?,
        cases: settings.iter().zip(&runs).map(|(setting, runs)| Case::of(setting, runs, &unguided)).collect(),
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

async fn load(folder: &Path, shape: &Shape, engine: &EngineArgs) -> anyhow::Result<Loaded> {
    synthetic::write_model(shape, demo_files().await?.config.vocabulary, folder)?;
    let source = folder.to_str().context("a temporary folder has a plain name")?.to_owned();
    worker::load_weights(source, engine).await
}

/// The demo model lends its tokenizer, and nothing else.
async fn demo_files() -> anyhow::Result<ModelFiles> {
    worker::open(&worker::demo_model().await?)
}

async fn setting(
    name: &str,
    window: Option<DraftWindow>,
    (base, reward): (&Loaded, &Loaded),
    args: &BenchDraftArgs,
) -> anyhow::Result<Setting> {
    let exchange = ExchangeArgs {
        exchange: ExchangeMode::Certified,
        list_length: 32,
        draft_window: window.unwrap_or(DraftWindow::Fixed(0)),
        draft_rows: DraftRowsArg::Single,
        hedge_after: None,
    };
    let metrics = Metrics::new();
    let models = RewardModelArgs {
        adapter: Vec::new(),
        system: None,
        // A text, so that it is a reward model of its own; the script looks at the answer alone.
        prompted: vec![format!("{SMALL}=Be brief.")],
    };
    let scripted = |loaded: &Loaded, peak, agreement| {
        let model = worker::share(loaded, &args.engine, Threads::Half)?;
        anyhow::Ok(Box::new(Scripted::new(model, peak, agreement)))
    };
    let forward = scripted(reward, REWARD_PEAK, args.agreement)?;
    let model = Model::without_lanes(demo_files().await?, forward);
    let (handle, _) = worker::start_reward(model, &models, &args.engine, &metrics)?;
    let scorer = Arc::new(LocalScorer::new(handle));
    let forward = scripted(base, BASE_PEAK, 1.0)?;
    let flags = (&args.engine, &exchange);
    let (handle, _) = worker::start_base(demo_files().await?, forward, None, flags, scorer, &metrics)?;
    Ok(Setting { name: name.to_owned(), window, pair: Pair::new(handle, metrics) })
}

/// Milliseconds of a step of one row.
fn step_ms(loaded: &Loaded, engine: &EngineArgs) -> anyhow::Result<f64> {
    let model = Box::new(worker::share(loaded, engine, Threads::Half)?);
    let executor = uniarm_engine::Executor::new(model, &uniarm_engine::ExecutorOptions::default())?;
    Ok(1e3 * executor.step_cost().seconds(1.0))
}

// === impl Setting ===

impl Setting {
    fn request(&self, repeat: usize, tokens: u32) -> uniarm_proto::Placed {
        let prompt = (0..PROMPT_TOKENS).map(|index| 100 + repeat as u32 * 131 + index * 7);
        let sampling = Sampling {
            temperature: 0.0,
            seed: Some(1),
            max_tokens: tokens,
            ignore_eos: true,
            ..Sampling::default()
        };
        let term = GuidanceTerm { reward: SMALL.to_owned(), preference: Vec::new(), strength: 1.0 };
        let guidance = if self.window.is_some() { vec![term] } else { Vec::new() };
        place(Input::Tokens(prompt.collect()), sampling, guidance)
    }
}

// === impl Scripted ===

impl Scripted {
    fn new(model: Llama, peak: f32, agreement: f64) -> Self {
        let slots = vec![0; model.blocks() * model.block_tokens()];
        Self { vocabulary: model.vocabulary(), model, peak, agreement, slots }
    }

    /// The token after those that hash to `text`.
    fn next(&self, text: u64) -> usize {
        let agreed = mix(text);
        let share = (mix(agreed) >> 11) as f64 / (1u64 << 53) as f64;
        let token = if share < self.agreement { agreed } else { mix(agreed ^ 1) };
        // Ordinary tokens: special ones stand at the beginning.
        1000 + (token % (self.vocabulary as u64 - 1000)) as usize
    }
}

impl Forward for Scripted {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn context_tokens(&self) -> usize {
        self.model.context_tokens()
    }

    fn block_tokens(&self) -> usize {
        self.model.block_tokens()
    }

    fn blocks(&self) -> usize {
        self.model.blocks()
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.model.forward(rows, logits)?;
        let block_tokens = self.model.block_tokens();
        let slot = |row: &Row<'_>, position: usize| {
            row.blocks[position / block_tokens] as usize * block_tokens + position % block_tokens
        };
        let mut wanted = logits.chunks_exact_mut(self.vocabulary);
        for row in rows {
            for (index, token) in row.tokens.iter().enumerate() {
                self.slots[slot(row, row.start + index)] = *token;
            }
            for index in row.logits_from..row.tokens.len() {
                // The last tokens alone: reward and base model have read different prompts.
                let position = row.start + index;
                let last = (position.saturating_sub(3)..=position).map(|at| self.slots[slot(row, at)]);
                let text = last.fold(0, |text, token| mix(text ^ u64::from(token)));
                wanted.next().expect("a row for each wanted token")[self.next(text)] += self.peak;
            }
        }
        Ok(())
    }
}

/// The finaliser of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

// === impl Case ===

impl Case {
    fn of(setting: &Setting, runs: &[super::rig::Run], unguided: &[f64]) -> Self {
        let answers = || runs.iter().flat_map(|run| &run.answers);
        let sum = |of: fn(&super::rig::Answered) -> u32| answers().map(of).sum::<u32>();
        let tokens = answers().map(|answer| answer.tokens.len()).sum::<usize>() as f64;
        let drafted = sum(|answer| answer.speculation.drafted);
        let accepted = sum(|answer| answer.speculation.accepted);
        Self {
            name: setting.name.clone(),
            tokens_per_second: Spread::of(runs.iter().map(|run| run.rate).collect()),
            over_unguided: Spread::of(
                runs.iter().zip(unguided).map(|(run, unguided)| run.rate / unguided).collect(),
            ),
            base_passes_per_token: f64::from(sum(|answer| answer.speculation.base_passes)) / tokens,
            accepted: (drafted > 0).then(|| f64::from(accepted) / f64::from(drafted)),
        }
    }
}

// === impl Report ===

impl Report {
    fn print(&self) {
        println!(
            "random weights: a step of the base model takes {:.1} ms, one of the reward model {:.1} ms; they agree on {:.0} % of tokens\n",
            self.base_step_ms,
            self.reward_step_ms,
            100.0 * self.agreement
        );
        println!(
            "{:24} {:>9} {:>17} {:>11} {:>13} {:>13} {:>9}",
            "", "tokens/s", "range", "× unguided", "range", "base passes", "accepted"
        );
        let most = self.cases.iter().map(|case| case.tokens_per_second.median).fold(0.0, f64::max);
        for case in &self.cases {
            let (rate, ratio) = (case.tokens_per_second, case.over_unguided);
            println!(
                "{:24} {:>9.1} {:>17} {:>11.2} {:>13} {:>13.2} {:>9}  {}",
                case.name,
                rate.median,
                format!("{:.1} – {:.1}", rate.least, rate.most),
                ratio.median,
                format!("{:.2} – {:.2}", ratio.least, ratio.most),
                case.base_passes_per_token,
                case.accepted.map_or(String::new(), |share| format!("{:.0} %", 100.0 * share)),
                bar(rate.median, most, BAR)
            );
        }
    }
}
