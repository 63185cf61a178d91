//! `uniarm simulate --autoscale`: a load through pools that follow it, as a table, a picture or JSON.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use serde_json::json;
use uniarm_simulate::{
    Arrival, Autoscale, Day, Setup, Targets, Values,
    autoscale::{FleetReport, Sample},
    simulate_scaled,
};

use super::{
    args::{AutoscaleArgs, SimulateArgs},
    plot::{Panel, page},
    table,
};

/// Lines of the table: as many as a day has hours.
const LINES: usize = 24;

/// Simulates and prints. `file`: values of a release, in place of the chart's defaults.
pub fn run(
    args: &SimulateArgs,
    file: Option<&Path>,
    setup: &Setup,
    arrivals: &[Arrival],
    targets: &Targets,
) -> anyhow::Result<()> {
    let plan = plan(&args.autoscale, file)?;
    let day = simulate_scaled(setup, &plan, arrivals, targets);
    if let Some(file) = &args.plot {
        let written = std::fs::write(file, svg(setup, targets, &day));
        written.with_context(|| format!("cannot write {}", file.display()))?;
    }
    if args.json {
        let (base, reward) = (setup.base.cost.name(), setup.reward.cost.name());
        println!("{}", json!({ "base": base, "reward": reward, "values": plan.values, "day": day }));
    } else {
        table::print_setup(setup, targets);
        print(&day, targets);
    }
    Ok(())
}

fn plan(args: &AutoscaleArgs, file: Option<&Path>) -> anyhow::Result<Autoscale> {
    let values = match file {
        Some(file) => {
            let text = std::fs::read_to_string(file);
            let text = text.with_context(|| format!("cannot read {}", file.display()))?;
            Values::read(&text).with_context(|| format!("{} cannot be followed", file.display()))?
        }
        None => Values::chart(),
    };
    Ok(Autoscale { values, pod_start: Duration::from_secs_f64(args.pod_start) })
}

fn print(day: &Day, targets: &Targets) {
    println!(
        "{:>8} {:>10}  {:>10} {:>6} {:>7}  {:>10} {:>6} {:>7} {:>6}  worst 15 s: first token, gap p99",
        "seconds", "requests/s", "base pods", "places", "blocks", "reward", "places", "blocks", "stall"
    );
    for samples in day.samples.chunks(day.samples.len().div_ceil(LINES).max(1)) {
        print_line(samples);
    }
    let Day { report, base, reward, .. } = day;
    println!("\n{}", table::COLUMNS);
    let verdict = if report.meets(targets) { "meets the targets" } else { "misses the targets" };
    println!("{}  {verdict}\n", table::columns(report));
    print_fleet("base", base, report.seconds, "streams");
    print_fleet("reward", reward, report.seconds, "sessions");
    println!(
        "{} of {} requests finished, {} refused, {} expired",
        report.finished, report.requests, report.refused, report.expired
    );
}

/// Some samples as one: means of loads, the size at the end, the worst latencies.
fn print_line(samples: &[Sample]) {
    let Some(last) = samples.last() else { return };
    let mean = |of: &dyn Fn(&Sample) -> f64| samples.iter().map(of).sum::<f64>() / samples.len() as f64;
    let worst = |of: &dyn Fn(&Sample) -> f64| samples.iter().map(of).fold(0.0, f64::max) * 1e3;
    // In pods' worth as the autoscaler has them; a share of the pool is what a person can compare.
    let share = |of: &dyn Fn(&Sample) -> (f64, usize)| {
        let shared = |sample: &Sample| {
            let (worth, pods) = of(sample);
            1e2 * worth / pods.max(1) as f64
        };
        mean(&shared)
    };
    println!(
        "{:>8.0} {:>10.1}  {:>10} {:>4.0} % {:>5.0} %  {:>10} {:>4.0} % {:>5.0} % {:>4.0} %  {:>18.0} ms {:>8.1} ms",
        last.at,
        mean(&|sample| sample.requests_per_second),
        format!("{} of {}", last.base.ready, last.base.replicas),
        share(&|sample| (sample.base.places, sample.base.ready)),
        share(&|sample| (sample.base.blocks, sample.base.ready)),
        format!("{} of {}", last.reward.ready, last.reward.replicas),
        share(&|sample| (sample.reward.places, sample.reward.ready)),
        share(&|sample| (sample.reward.blocks, sample.reward.ready)),
        1e2 * mean(&|sample| sample.reward.stall),
        worst(&|sample| sample.first_token_p99),
        worst(&|sample| sample.inter_token_p99),
    );
}

fn print_fleet(name: &str, fleet: &FleetReport, seconds: f64, what: &str) {
    let FleetReport { least, most, pod_seconds, changes, turns, moved } = fleet;
    println!(
        "{name:<7} {least} to {most} pods in {changes} changes, {turns} of which turned back; {:.0} % of {most} pods for the whole time; {moved} {what} moved",
        1e2 * pod_seconds / (*most as f64 * seconds)
    );
}

/// Load, sizes and latencies over the day.
fn svg(setup: &Setup, targets: &Targets, day: &Day) -> String {
    let over_time = |title, target, of: &dyn Fn(&Sample) -> f64| Panel {
        title,
        points: day.samples.iter().map(|sample| (sample.at, of(sample))).collect(),
        behind: Vec::new(),
        target,
        across: "seconds",
        stairs: false,
        dots: false,
    };
    let pods = |title, wanted: &dyn Fn(&Sample) -> f64, ready: &dyn Fn(&Sample) -> f64| Panel {
        behind: day.samples.iter().map(|sample| (sample.at, wanted(sample))).collect(),
        stairs: true,
        ..over_time(title, None, ready)
    };
    let (first, gap) = (targets.first_token.as_secs_f64() * 1e3, targets.inter_token.as_secs_f64() * 1e3);
    let panels = [
        over_time("requests per second", None, &|sample| sample.requests_per_second),
        pods(
            "base pods that serve (grey: that are wanted)",
            &|sample| sample.base.replicas as f64,
            &|sample| sample.base.ready as f64,
        ),
        pods(
            "reward pods that serve (grey: that are wanted)",
            &|sample| sample.reward.replicas as f64,
            &|sample| sample.reward.ready as f64,
        ),
        over_time("time that tokens wait for their reward, %", None, &|sample| 1e2 * sample.reward.stall),
        over_time("first token p99 of 15 s, ms", Some(first), &|sample| sample.first_token_p99 * 1e3),
        over_time("gap p99 of 15 s, ms", Some(gap), &|sample| sample.inter_token_p99 * 1e3),
    ];
    page(&panels, &format!("{}, {}", setup.base.cost.name(), setup.reward.cost.name()))
}
