//! `uniarm bench step`: tokens per second by batch and guidance, with the floor beside it.

use std::{sync::Arc, time::Instant};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use uniarm_base::BaseHandle;
use uniarm_proto::{
    Event, Exchange, GenerateRequest, Generation, GuidanceTerm, Input, MemberId, OnRewardLoss, Placed,
    Priority, RewardWorker, Sampling,
};
use uniarm_runtime::Metrics;

use super::{
    floor::{Machine, Work},
    synthetic,
};
use crate::{
    args::{BenchStepArgs, ExchangeMode, RewardModelArgs},
    local::LocalScorer,
    worker,
};

/// Tokens of each prompt.
const PROMPT_TOKENS: usize = 32;

/// Characters of the longest bar.
const BAR: usize = 24;

/// Names of the served reward models.
const ADAPTER: &str = "adapter";
const PROMPTED: &str = "prompted";

/// What the rows of a batch ask for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guidance {
    None,
    Prompted,
    OnePreference,
    MixedPreferences,
}

struct Case {
    guidance: Guidance,
    batch: usize,
    /// Tokens per second of each repeat, in their order.
    rates: Vec<f64>,
    floor: f64,
    certified: f64,
    bytes_per_token: f64,
}

/// One answer's arrivals.
struct Arrivals {
    times: Vec<Instant>,
    bytes: u64,
    certified: u32,
    guided: u32,
}

// === impl Guidance ===

impl Guidance {
    const ALL: [Self; 4] = [Self::None, Self::Prompted, Self::OnePreference, Self::MixedPreferences];

    fn name(self) -> &'static str {
        match self {
            Self::None => "unguided",
            Self::Prompted => "guided, prompted",
            Self::OnePreference => "guided, one preference",
            Self::MixedPreferences => "guided, mixed preferences",
        }
    }

    fn term(self, row: usize, batch: usize) -> Option<GuidanceTerm> {
        let preference = |weight: f32| {
            vec![(synthetic::FIRST.to_owned(), weight), (synthetic::SECOND.to_owned(), 1.0 - weight)]
        };
        let (reward, preference) = match self {
            Self::None => return None,
            Self::Prompted => (PROMPTED, Vec::new()),
            Self::OnePreference => (ADAPTER, preference(0.5)),
            Self::MixedPreferences => (ADAPTER, preference((row as f32 + 0.5) / batch as f32)),
        };
        Some(GuidanceTerm { reward: reward.to_owned(), preference, strength: 1.0 })
    }
}

pub async fn run(args: BenchStepArgs) -> anyhow::Result<()> {
    let source = match &args.model {
        Some(model) => model.clone(),
        None => worker::demo_model().await?,
    };
    let loaded = worker::load(source.clone(), &args.engine, worker::Threads::Half).await?;
    let threads = worker::threads(&args.engine, worker::Threads::Half);
    eprintln!("measuring the machine ({threads} thread(s) for each worker)");
    let machine = tokio::task::spawn_blocking(move || Machine::measure(threads)).await?;
    let weight_bytes = loaded.llama.weight_bytes() as f64;
    let work = Work { weight_bytes, token_operations: loaded.llama.operations() };

    let folder = tempfile::tempdir()?;
    synthetic::write_adapter(&loaded.files.config, folder.path())?;
    let models = RewardModelArgs {
        adapter: vec![format!("{ADAPTER}={}", folder.path().display())],
        system: None,
        prompted: vec![format!("{PROMPTED}={}", worker::DEMO_PROMPTED[2].1)],
    };
    let reward_files = worker::open(&source)?;
    let reward_llama = worker::share(&loaded, &args.engine)?;
    let metrics = Metrics::new();
    let (reward, _) =
        worker::start_reward(reward_files, Box::new(reward_llama), &models, &args.engine, &metrics)?;
    let model = loaded.files.name.clone();
    let scorer = Arc::new(LocalScorer::new(reward));
    let flags = (&args.engine, &args.exchange);
    let (base, _) = worker::start_base(loaded.files, Box::new(loaded.llama), None, flags, scorer, &metrics)?;

    let mut cases = Vec::new();
    let count = args.batch.len() * Guidance::ALL.len();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
    let progress = ProgressBar::new((count * args.repeats) as u64).with_style(style);
    for &batch in &args.batch {
        let mut measured: Vec<Vec<(f64, Vec<Arrivals>)>> = Guidance::ALL.map(|_| Vec::new()).into();
        // Interleaved, so that what disturbs the machine disturbs all alike.
        for repeat in 0..args.repeats {
            let mut turn: Vec<_> = Guidance::ALL.into_iter().zip(&mut measured).collect();
            if repeat % 2 == 1 {
                turn.reverse();
            }
            for (guidance, runs) in turn {
                progress.set_message(format!("batch {batch}, {}", guidance.name()));
                runs.push(measure(&base, guidance, batch, repeat, &args).await?);
                progress.inc(1);
            }
        }
        for (guidance, runs) in Guidance::ALL.into_iter().zip(measured) {
            let floor = machine.tokens_per_second(work, batch, guidance != Guidance::None);
            cases.push(case(guidance, batch, &runs, floor));
        }
    }
    progress.finish_and_clear();
    if args.json {
        println!("{}", as_json(&model, &machine, work, &cases));
    } else {
        print_table(&model, &machine, work, &cases);
    }
    Ok(())
}

/// One batch to its end: tokens per second while all of its rows ran.
async fn measure(
    base: &BaseHandle,
    guidance: Guidance,
    batch: usize,
    repeat: usize,
    args: &BenchStepArgs,
) -> anyhow::Result<(f64, Vec<Arrivals>)> {
    let rows = (0..batch).map(|row| answer(base, request(guidance, row, batch, repeat, args)));
    let arrivals = try_join_all(rows).await?;
    let begin = arrivals.iter().map(|a| a.times[0]).max().context("a batch has rows")?;
    let end = arrivals.iter().map(|a| a.times[a.times.len() - 1]).min().context("a batch has rows")?;
    let inside =
        arrivals.iter().flat_map(|a| &a.times).filter(|time| **time > begin && **time <= end).count();
    let seconds = end.saturating_duration_since(begin).as_secs_f64();
    anyhow::ensure!(seconds > 0.0, "--tokens is too small: the rows of a batch never ran together");
    Ok((inside as f64 / seconds, arrivals))
}

fn request(guidance: Guidance, row: usize, batch: usize, repeat: usize, args: &BenchStepArgs) -> Placed {
    // Prompts of their own: no row profits from another one's cache.
    let prompt = (0..PROMPT_TOKENS).map(|index| 100 + ((row * 131 + repeat * 17 + index * 7) % 5000) as u32);
    let request = GenerateRequest {
        request_id: format!("bench-{batch}-{row}"),
        model: String::new(),
        input: Input::Tokens(prompt.collect()),
        sampling: Sampling {
            temperature: 1.0,
            seed: Some(row as u64),
            max_tokens: args.tokens,
            ignore_eos: true,
            ..Sampling::default()
        },
        guidance: guidance.term(row, batch).into_iter().collect(),
        on_reward_loss: OnRewardLoss::Wait,
        priority: Priority::Normal,
        exchange: Some(match args.exchange.exchange {
            ExchangeMode::Certified => Exchange::Certified,
            ExchangeMode::Dense => Exchange::Dense,
        }),
        skip: 0,
    };
    let worker =
        RewardWorker { member: MemberId("reward".into()), generation: Generation(1), address: String::new() };
    let placements = request.guidance.iter().map(|_| vec![worker.clone()]).collect();
    Placed { request, placements, generation: Generation(1) }
}

async fn answer(base: &BaseHandle, placed: Placed) -> anyhow::Result<Arrivals> {
    let mut events = base.run(placed, None).await?;
    let mut arrivals = Arrivals { times: Vec::new(), bytes: 0, certified: 0, guided: 0 };
    while let Some(event) = events.recv().await {
        match event? {
            Event::Tokens(tokens) => arrivals.times.extend(tokens.ids.iter().map(|_| Instant::now())),
            Event::Summary(summary) => {
                let used = summary.exchange.unwrap_or_default();
                arrivals.bytes = used.bytes;
                arrivals.certified = used.certified;
                arrivals.guided = used.certified + used.queried + used.dense;
            }
            Event::Started(_) | Event::Finished(_) => {}
        }
    }
    anyhow::ensure!(arrivals.times.len() > 1, "an answer of {} tokens", arrivals.times.len());
    Ok(arrivals)
}

fn case(guidance: Guidance, batch: usize, runs: &[(f64, Vec<Arrivals>)], floor: f64) -> Case {
    let rates = runs.iter().map(|(rate, _)| *rate).collect();
    let all: Vec<&Arrivals> = runs.iter().flat_map(|(_, arrivals)| arrivals).collect();
    let guided = f64::from(all.iter().map(|a| a.guided).sum::<u32>());
    let certified = f64::from(all.iter().map(|a| a.certified).sum::<u32>());
    let bytes = all.iter().map(|a| a.bytes).sum::<u64>() as f64;
    let share = |part: f64| if guided > 0.0 { part / guided } else { 0.0 };
    Case { guidance, batch, rates, floor, certified: share(certified), bytes_per_token: share(bytes) }
}

// === impl Case ===

impl Case {
    fn median(&self) -> f64 {
        median(self.rates.clone())
    }

    fn range(&self) -> (f64, f64) {
        let least = self.rates.iter().copied().fold(f64::INFINITY, f64::min);
        (least, self.rates.iter().copied().fold(0.0, f64::max))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print_table(model: &str, machine: &Machine, work: Work, cases: &[Case]) {
    println!("{model}: {:.0} MB of weights in a step", work.weight_bytes / 1e6);
    println!(
        "machine: {} thread(s) for each worker; {:.1} GB/s alone, {:.1} GB/s for two workers; {:.0} GFLOP/s, {:.0} Gop/s in integers each",
        machine.threads,
        machine.stream / 1e9,
        machine.stream_together / 1e9,
        machine.float_arithmetic / 1e9,
        machine.integer_arithmetic / 1e9
    );
    println!(
        "floor: the greater of weights / bandwidth and operations / peak; guided steps share the memory\n"
    );
    println!(
        "{:>5}  {:26} {:>9}  {:>15} {:>8} {:>8} {:>7}",
        "batch", "rows", "tokens/s", "range", "ms/step", "floor", "of it"
    );
    let most = cases.iter().map(Case::median).fold(0.0, f64::max);
    for case in cases {
        let rate = case.median();
        let (low, high) = case.range();
        println!(
            "{:>5}  {:26} {rate:>9.1}  {:>15} {:>8.1} {:>8.1} {:>5.0} %  {}",
            case.batch,
            case.guidance.name(),
            format!("{low:.1} – {high:.1}"),
            1e3 * case.batch as f64 / rate,
            case.floor,
            100.0 * rate / case.floor,
            "█".repeat((BAR as f64 * rate / most).round() as usize)
        );
    }
    println!();
    for (batch, ratio) in mixed_over_single(cases) {
        println!("batch {batch}: mixed preferences run at {ratio:.3} of a single preference");
    }
    for case in cases.iter().filter(|case| case.guidance == Guidance::Prompted) {
        println!(
            "batch {}: prompted reward, {:.0} bytes per token, {:.1} % certified from the lists",
            case.batch,
            case.bytes_per_token,
            100.0 * case.certified
        );
    }
}

/// For each batch, the median of the ratios within each repeat: what disturbs the machine disturbs both.
fn mixed_over_single(cases: &[Case]) -> Vec<(usize, f64)> {
    let of = |guidance: Guidance| cases.iter().filter(move |case| case.guidance == guidance);
    of(Guidance::MixedPreferences)
        .zip(of(Guidance::OnePreference))
        .map(|(mixed, single)| {
            let ratios = mixed.rates.iter().zip(&single.rates).map(|(mixed, single)| mixed / single);
            (mixed.batch, median(ratios.collect()))
        })
        .collect()
}

fn as_json(model: &str, machine: &Machine, work: Work, cases: &[Case]) -> serde_json::Value {
    let one = |case: &Case| {
        json!({
            "batch": case.batch,
            "rows": case.guidance.name(),
            "tokens_per_second": case.median(),
            "range": case.range(),
            "floor_tokens_per_second": case.floor,
            "certified_share": case.certified,
            "exchange_bytes_per_token": case.bytes_per_token,
        })
    };
    let ratios = mixed_over_single(cases);
    let ratios = ratios.iter().map(|(batch, ratio)| json!({ "batch": batch, "ratio": ratio }));
    json!({
        "model": model,
        "weight_bytes": work.weight_bytes,
        "machine": {
            "threads_per_worker": machine.threads,
            "stream_bytes_per_second": machine.stream,
            "stream_bytes_per_second_together": machine.stream_together,
            "float_operations_per_second": machine.float_arithmetic,
            "integer_operations_per_second": machine.integer_arithmetic,
        },
        "cases": cases.iter().map(one).collect::<Vec<_>>(),
        "mixed_over_single": ratios.collect::<Vec<_>>(),
    })
}
