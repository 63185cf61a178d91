//! `uniarm simulate`: how many base and reward workers a load needs, on machines that are not here.

pub mod args;
mod calibrate;
mod day;
mod plot;
mod table;

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use serde_json::json;
use uniarm_base::{BaseOptions, DraftRows, DraftWindow, PaceOptions};
use uniarm_decode::{
    SchedulerOptions,
    drafting::{DraftMode, Pace},
};
use uniarm_proto::Role;
use uniarm_router::RouterOptions;
use uniarm_simulate::{
    Arrival, DraftPolicy, Drafting, Exchange, Pool, Report, Setup, Targets,
    architecture::{ARCHITECTURES, architecture},
    arrivals::{Length, Pattern, Traffic},
    cost::{Cost, Measured, Roofline, Slowed},
    hardware::{ACCELERATORS, LINKS, Link, accelerator, named_link},
    observed::Record,
    search::{Found, Question, smallest_pools},
    simulate, trace,
};

use self::args::{PatternName, PoolArgs, SimulateArgs, TrafficArgs};
use crate::{args::ExchangeMode, worker};

/// Base workers for which one router is enough: its permits, over the sequences that each of them runs.
const BASES_OF_A_ROUTER: usize = 16;

/// Loads of a plot, as multiples of the traffic.
const PLOT_LOADS: [f64; 6] = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5];

/// Tokens of a made-up prompt or answer, at most: the context of most models.
const LENGTH_MAX: usize = 8192;

/// One simulation, at a multiple of the load.
struct Point {
    load: f64,
    /// Mean arrivals per second.
    rate: f64,
    report: Report,
}

pub async fn run(args: SimulateArgs) -> anyhow::Result<()> {
    if let Some(file) = &args.calibrate {
        return calibrate::run(args.model.clone(), &args.engine, args.rounds, file).await;
    }
    // The simulation is arithmetic on one thread, and nothing else of this process has anything to do.
    tokio::task::block_in_place(|| answer(&args))
}

fn answer(args: &SimulateArgs) -> anyhow::Result<()> {
    let arrivals = arrivals(&args.traffic, args.seed)?;
    check_span(&args.traffic, &arrivals)?;
    if let Some(file) = &args.traffic.write_trace {
        let written = std::fs::write(file, trace::write(&arrivals));
        written.with_context(|| format!("cannot write {}", file.display()))?;
    }
    let targets = Targets {
        first_token: Duration::from_secs_f64(args.targets.ttft_p99 / 1e3),
        inter_token: Duration::from_secs_f64(args.targets.inter_token_p99 / 1e3),
        goodput: args.targets.goodput,
    };
    let mut setup = setup(args, &arrivals)?;
    if let Some(file) = &args.autoscale.autoscale {
        return day::run(args, file.as_deref(), &setup, &arrivals, &targets);
    }
    let mut pairs = Vec::new();
    if args.pools.base.is_none() || args.pools.reward.is_none() {
        pairs = match search(args, &setup, &arrivals, &targets) {
            Found::Pairs(pairs) => pairs,
            Found::Never(best) => {
                table::print_setup(&setup, &targets);
                table::print_points(&[point(1.0, &arrivals, *best)], &targets);
                bail!("no pools of up to {} workers meet the targets", args.pools.workers_max);
            }
        };
        let cheapest = table::cheapest(&pairs);
        (setup.base.workers, setup.reward.workers) = (cheapest.base_workers, cheapest.reward_workers);
    }
    let points = curve(args, &setup, &arrivals, &targets, &pairs);
    if let Some(file) = &args.plot {
        let written = std::fs::write(file, plot::svg(&setup, &targets, &points, &pairs));
        written.with_context(|| format!("cannot write {}", file.display()))?;
    }
    if args.json {
        println!("{}", as_json(&setup, &pairs, &points));
    } else {
        table::print_setup(&setup, &targets);
        table::print_pairs(&pairs);
        table::print_points(&points, &targets);
    }
    Ok(())
}

fn arrivals(traffic: &TrafficArgs, seed: u64) -> anyhow::Result<Vec<Arrival>> {
    if let Some(file) = &traffic.trace {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        return trace::read(&text).with_context(|| format!("{} is no trace", file.display()));
    }
    let pattern = match traffic.pattern {
        PatternName::Poisson => Pattern::Poisson,
        PatternName::Bursts => Pattern::Bursts { period_seconds: traffic.period, factor: traffic.peak },
        PatternName::Day => Pattern::Day { day_seconds: traffic.period, factor: traffic.peak },
    };
    let length = |tokens: usize| Length { mean: tokens as f64, spread: traffic.spread, max: LENGTH_MAX };
    let traffic = Traffic {
        pattern,
        rate: traffic.rate,
        requests: traffic.requests,
        prompt: length(traffic.prompt_tokens),
        answer: length(traffic.answer_tokens),
        shared_tokens: traffic.shared_tokens,
        guided_share: traffic.guided,
        preferences: traffic.preferences,
    };
    Ok(traffic.arrivals(seed))
}

/// Loads below 1 stretch the traffic.
fn check_span(traffic: &TrafficArgs, arrivals: &[Arrival]) -> anyhow::Result<()> {
    let load = traffic.load.iter().copied().fold(1.0, f64::min);
    let span = arrivals.last().map_or(0.0, |last| last.at / load);
    if span > trace::SECONDS_MAX {
        bail!(
            "the last request would come after {span:.0} seconds, and a simulation has up to {}: give a higher --rate or \
             --load, or fewer --requests",
            trace::SECONDS_MAX
        );
    }
    Ok(())
}

fn setup(args: &SimulateArgs, arrivals: &[Arrival]) -> anyhow::Result<Setup> {
    let pools = &args.pools;
    let tokens_max =
        arrivals.iter().map(|a| a.prompt_tokens + a.answer_tokens).max().unwrap_or(1) + pools.system_tokens;
    let [base, reward] = costs(pools)?;
    let workers = |count: Option<u32>| count.unwrap_or(1) as usize;
    let pool = |count, cost| Pool::new(workers(count), cost, scheduler_options(args), tokens_max);
    let base_workers = workers(pools.base);
    Ok(Setup {
        base: pool(pools.base, base),
        reward: pool(pools.reward, reward),
        colocated: pools.colocated,
        base_requests_max: BaseOptions::default().requests_max,
        routers: pools.routers.unwrap_or(base_workers.div_ceil(BASES_OF_A_ROUTER)),
        router_requests_max: RouterOptions::default().requests_max,
        front: link(&pools.front_link)?,
        exchange_link: link(&pools.link)?,
        exchange: Exchange {
            list_length: match args.exchange.exchange {
                ExchangeMode::Certified => args.exchange.list_length as usize,
                ExchangeMode::Dense => 0,
            },
            certified: args.certified,
        },
        system_tokens: pools.system_tokens,
        drafting: drafting(args),
        seed: args.seed,
    })
}

/// What a worker with the same flags makes its scheduler with; its cache is the machine's.
fn scheduler_options(args: &SimulateArgs) -> SchedulerOptions {
    let executor = worker::executor_options(&args.engine);
    SchedulerOptions {
        block_tokens: worker::BLOCK_TOKENS,
        step_tokens: executor.step_tokens,
        prefill_chunk: executor.prefill_chunk,
        running_max: executor.running_max,
        waiting_max: executor.waiting_max,
        prefix_cache: executor.prefix_cache,
        ..SchedulerOptions::default()
    }
}

fn costs(pools: &PoolArgs) -> anyhow::Result<[Arc<Cost>; 2]> {
    let roofline = |on: &str, model: &str| {
        let accelerator = accelerator(on)
            .with_context(|| unknown("accelerator", on, ACCELERATORS.map(|known| known.name)))?;
        let model = architecture(model)
            .with_context(|| unknown("model", model, ARCHITECTURES.map(|known| known.name)))?;
        let roofline = Roofline { accelerator, model };
        if model.weight_bytes() > accelerator.memory_bytes {
            bail!("{} does not fit into the memory of {}", model.name, accelerator.name);
        }
        anyhow::Ok(Cost::Roofline(roofline))
    };
    let measured = |file: &Path| {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        anyhow::Ok(Cost::Measured(Box::new(Measured::read(&text)?)))
    };
    let base = match (&pools.base_machine, &pools.machine) {
        (Some(file), _) | (None, Some(file)) => measured(file)?,
        (None, None) => roofline(&pools.base_on, &pools.base_model)?,
    };
    let reward = match &pools.machine {
        Some(file) => measured(file)?,
        None => roofline(&pools.reward_on, &pools.reward_model)?,
    };
    let records = pools.observed.iter().map(|file| observed(file)).collect::<anyhow::Result<Vec<_>>>()?;
    let [base, reward] = [(Role::Base, base), (Role::Reward, reward)].map(|(role, cost)| {
        let Some(slowdown) = Record::compare(&records, role, &cost, worker::BLOCK_TOKENS) else {
            if !records.is_empty() {
                eprintln!("too few {role} steps were observed, which stay as they are");
            }
            return cost;
        };
        eprintln!(
            "{role} steps as observed: {:.2} × the machine's to decode, {:.2} × with prompts ({} steps)",
            slowdown.median(false),
            slowdown.median(true),
            slowdown.steps
        );
        Cost::Slowed(Box::new(Slowed { cost, slowdown }))
    });
    Ok([Arc::new(base), Arc::new(reward)])
}

fn observed(file: &Path) -> anyhow::Result<Record> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let wanted = || format!("{} is not what /debug/steps?last=512&format=json answers", file.display());
    Record::read(&text).with_context(wanted)
}

fn unknown<const N: usize>(what: &str, name: &str, known: [&str; N]) -> String {
    format!("no {what} is named {name:?}; there are {}", known.join(", "))
}

fn link(name: &str) -> anyhow::Result<Link> {
    named_link(name).with_context(|| unknown("link", name, LINKS.map(|known| known.name)))
}

fn drafting(args: &SimulateArgs) -> Drafting {
    let PaceOptions { window, rows } = args.exchange.pace();
    let PoolArgs { acceptance, dual_acceptance, .. } = args.pools;
    let dual = dual_acceptance.filter(|_| rows != DraftRows::Single);
    let policy = match window {
        DraftWindow::Auto => DraftPolicy::Measured,
        DraftWindow::Fixed(window) => {
            let mode = if dual.is_some() { DraftMode::Dual } else { DraftMode::Single };
            DraftPolicy::Fixed(Pace::fixed(mode, window))
        }
    };
    let single = if rows == DraftRows::Dual { 0.0 } else { acceptance };
    Drafting { policy, single, dual }
}

/// The smallest pools; a size that is given is kept.
fn search(args: &SimulateArgs, setup: &Setup, arrivals: &[Arrival], targets: &Targets) -> Found {
    let mut tried = 0;
    let mut tell = |report: &Report| {
        tried += 1;
        eprint!("\r{tried} pairs simulated, the last {} + {}   ", report.base_workers, report.reward_workers);
    };
    let range = |fixed: Option<u32>| match fixed {
        Some(count) => count as usize..=count as usize,
        None => 1..=args.pools.workers_max,
    };
    let routers = args.pools.routers;
    let sized = |setup: &mut Setup| {
        setup.routers = routers.unwrap_or(setup.base.workers.div_ceil(BASES_OF_A_ROUTER));
    };
    let question = Question {
        setup,
        arrivals,
        targets,
        bases: range(args.pools.base),
        rewards: range(args.pools.reward),
        sized: &sized,
    };
    let found = smallest_pools(&question, &mut tell);
    eprintln!();
    found
}

/// The load as asked for, and others beside it for a plot.
fn curve(
    args: &SimulateArgs,
    setup: &Setup,
    arrivals: &[Arrival],
    targets: &Targets,
    pairs: &[Report],
) -> Vec<Point> {
    let asked = &args.traffic.load;
    let loads: &[f64] = match (asked.is_empty(), args.plot.is_some(), pairs.is_empty()) {
        (false, ..) => asked,
        (true, true, _) => &PLOT_LOADS,
        (true, false, true) => &[1.0],
        (true, false, false) => &[], // the pairs say it all
    };
    let simulated = |&load: &f64| {
        let scaled: Vec<_> = arrivals.iter().map(|a| Arrival { at: a.at / load, ..a.clone() }).collect();
        point(load, &scaled, simulate(setup, &scaled, targets))
    };
    loads.iter().map(simulated).collect()
}

fn point(load: f64, arrivals: &[Arrival], report: Report) -> Point {
    let span = arrivals[arrivals.len() - 1].at - arrivals[0].at;
    let rate = if span > 0.0 { (arrivals.len() - 1) as f64 / span } else { 0.0 };
    Point { load, rate, report }
}

fn as_json(setup: &Setup, pairs: &[Report], points: &[Point]) -> serde_json::Value {
    let point = |point: &Point| json!({ "load": point.load, "rate": point.rate, "report": point.report });
    json!({
        "base": setup.base.cost.name(),
        "reward": setup.reward.cost.name(),
        "pairs": pairs,
        "cheapest": (!pairs.is_empty()).then(|| {
            let cheapest = table::cheapest(pairs);
            json!({ "base_workers": cheapest.base_workers, "reward_workers": cheapest.reward_workers })
        }),
        "curve": points.iter().map(point).collect::<Vec<_>>(),
    })
}
