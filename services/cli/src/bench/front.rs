//! `uniarm bench front`: what the router adds to a token, and how many streams one core of it holds.
//!
//! The engine is a clock: a worker in this process says tokens at fixed times, and each token's text is the moment at which
//! it was sent. Whoever receives it knows how long it was on its way: straight from the worker, through a router's gRPC
//! front door, or through its HTTP front door. The router is a process of its own, on a core of its own where there are
//! two.

mod clock;
mod ways;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use self::{clock::Clock, ways::Caller};
use super::{
    args::{BenchFrontArgs, Way},
    cores::{self, Cores},
    statistics::Percentiles,
};
use crate::part::{Part, free_address};

/// Above all streams that may be asked for.
const REQUESTS_MAX: &str = "100000";

/// Tokens of each stream that are not counted: those at whose time streams are still being opened.
const WARM_UP: usize = 2;

/// One stream, as its client saw it.
pub struct Heard {
    /// From the request to the first token, which the worker says at once.
    pub first: Duration,
    /// For each token, the time that it was on its way.
    pub under_way: Vec<Duration>,
}

#[derive(Serialize)]
struct Report {
    tokens: usize,
    interval_ms: f64,
    /// Whether the router has a core that nothing else here runs on.
    core_of_its_own: bool,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    way: &'static str,
    streams: usize,
    failed: usize,
    /// The first failure in words.
    failure: Option<String>,
    tokens_per_second: f64,
    first_token_ms: Option<Percentiles>,
    token_ms: Option<Percentiles>,
    /// What the same percentile has more than straight from the worker.
    added_ms: Option<Percentiles>,
    router: Option<RouterUse>,
}

/// Of the router's process, while the streams ran.
#[derive(Clone, Copy, Serialize)]
struct RouterUse {
    /// 1 is one core that never rests.
    cores: f64,
    microseconds_per_token: f64,
    resident_mib: f64,
}

pub async fn run(args: BenchFrontArgs) -> anyhow::Result<()> {
    let cores = Cores::part()?;
    let clock = Clock::start(Duration::from_secs_f64(args.interval_ms / 1e3)).await?;
    let http = free_address()?;
    let flags = ["--base-peer", &clock.address, "--http-listen", &http, "--requests-max", REQUESTS_MAX];
    let router = Part::start_on("router", &flags.map(str::to_owned), cores.router()).await?;
    let caller = Caller::new(&clock, &router.address, &http, args.tokens)?;
    caller.wait_for_worker().await?;
    let mut report = Report {
        tokens: args.tokens,
        interval_ms: args.interval_ms,
        core_of_its_own: cores.router().is_some(),
        cases: Vec::new(),
    };
    for &streams in &args.streams {
        let mut straight = None;
        for &way in &args.ways {
            let mut case = measure(&args, &caller, way, streams, &router).await?;
            match way {
                Way::Direct => straight = case.token_ms,
                Way::Grpc | Way::Http => case.added_ms = straight.zip(case.token_ms).map(added),
            }
            report.cases.push(case);
        }
    }
    router.stop().await?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

async fn measure(
    args: &BenchFrontArgs,
    caller: &Caller<'_>,
    way: Way,
    streams: usize,
    router: &Part,
) -> anyhow::Result<Case> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
    let progress = ProgressBar::new(streams as u64).with_style(style);
    progress.set_message(format!("streams, {}", way.name()));
    // Evenly over an interval: real streams are not in step.
    let interval = Duration::from_secs_f64(args.interval_ms / 1e3);
    let begin = Instant::now();
    let before = cores::used(router.id());
    let mut running: FuturesUnordered<_> = (0..streams)
        .map(|index| async move {
            tokio::time::sleep(interval.mul_f64(index as f64 / streams as f64)).await;
            caller.listen(way, index).await
        })
        .collect();
    let (mut heard, mut failures) = (Vec::new(), Vec::new());
    while let Some(ended) = running.next().await {
        progress.inc(1);
        match ended {
            Ok(stream) => heard.push(stream),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    drop(running);
    progress.finish_and_clear();
    let seconds = begin.elapsed().as_secs_f64();
    let tokens: usize = heard.iter().map(|stream| stream.under_way.len()).sum();
    let used = before.zip(cores::used(router.id())).map(|(before, after)| RouterUse {
        cores: (after.cpu - before.cpu).as_secs_f64() / seconds,
        microseconds_per_token: 1e6 * (after.cpu - before.cpu).as_secs_f64() / tokens.max(1) as f64,
        resident_mib: after.resident_bytes as f64 / f64::from(1 << 20),
    });
    let ms = |duration: &Duration| 1e3 * duration.as_secs_f64();
    let under_way = heard.iter().flat_map(|stream| stream.under_way.iter().skip(WARM_UP)).map(ms).collect();
    Ok(Case {
        way: way.name(),
        streams,
        failed: failures.len(),
        failure: failures.into_iter().next(),
        tokens_per_second: tokens as f64 / seconds,
        first_token_ms: Percentiles::of(heard.iter().map(|stream| ms(&stream.first)).collect()),
        token_ms: Percentiles::of(under_way),
        added_ms: None,
        router: used.filter(|_| way != Way::Direct),
    })
}

fn added((straight, through): (Percentiles, Percentiles)) -> Percentiles {
    Percentiles {
        p50: through.p50 - straight.p50,
        p90: through.p90 - straight.p90,
        p99: through.p99 - straight.p99,
    }
}

// === impl Report ===

impl Report {
    fn print(&self) {
        println!(
            "streams of {} tokens, one each {} ms from a worker that is a clock; the router {}\n",
            self.tokens,
            self.interval_ms,
            if self.core_of_its_own {
                "has a core of its own"
            } else {
                "shares its core with worker and clients"
            }
        );
        println!(
            "{:>7} {:>8} {:>9} {:>26} {:>26} {:>26} {:>13} {:>9} {:>12}",
            "way",
            "streams",
            "tokens/s",
            "first token, ms 50/90/99",
            "under way, ms 50/90/99",
            "added, ms 50/90/99",
            "router cores",
            "µs/token",
            "resident MiB"
        );
        for case in &self.cases {
            println!(
                "{:>7} {:>8} {:>9.0} {:>26} {:>26} {:>26} {:>13} {:>9} {:>12}",
                case.way,
                case.streams,
                case.tokens_per_second,
                cell(case.first_token_ms),
                cell(case.token_ms),
                cell(case.added_ms),
                number(case.router.map(|used| used.cores), 2),
                number(case.router.map(|used| used.microseconds_per_token), 1),
                number(case.router.map(|used| used.resident_mib), 0),
            );
            if let Some(why) = &case.failure {
                println!("        {} of them failed: {why}", case.failed);
            }
        }
    }
}

fn cell(percentiles: Option<Percentiles>) -> String {
    percentiles.map_or("–".to_owned(), |p| format!("{:.2} / {:.2} / {:.2}", p.p50, p.p90, p.p99))
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}
