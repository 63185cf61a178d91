//! What a simulation says, in the terminal.

use uniarm_simulate::{Report, Setup, Targets};

use super::Point;

/// Characters of the longest bar.
const BAR: usize = 20;

/// The pair with the fewest workers together: what is left when a base and a reward worker cost the same.
pub fn cheapest(pairs: &[Report]) -> &Report {
    let total = |report: &&Report| report.base_workers + report.reward_workers;
    pairs.iter().min_by_key(total).expect("a search that found pairs found at least one")
}

pub fn print_setup(setup: &Setup, targets: &Targets) {
    println!("base:    {}", setup.base.cost.name());
    println!("reward:  {}", setup.reward.cost.name());
    println!("links:   {} to the reward workers, {} in front", setup.exchange_link.name, setup.front.name);
    println!(
        "targets: first token {:.0} ms and gap {:.1} ms at the 99th percentile, both for {:.1} % of requests\n",
        targets.first_token.as_secs_f64() * 1e3,
        targets.inter_token.as_secs_f64() * 1e3,
        targets.goodput * 1e2
    );
}

pub fn print_pairs(pairs: &[Report]) {
    if pairs.is_empty() {
        return;
    }
    println!("{:>6} {:>7} {:>6}  {}", "base", "reward", "total", COLUMNS);
    let cheapest = cheapest(pairs);
    for report in pairs {
        let total = report.base_workers + report.reward_workers;
        let mark = if std::ptr::eq(report, cheapest) { "  ◄ fewest workers" } else { "" };
        println!(
            "{:>6} {:>7} {total:>6}  {}{mark}",
            report.base_workers,
            report.reward_workers,
            columns(report)
        );
    }
    println!();
}

pub fn print_points(points: &[Point], targets: &Targets) {
    let Some(first) = points.first() else { return };
    println!("{} base and {} reward workers", first.report.base_workers, first.report.reward_workers);
    println!("{:>6} {:>10}  {}", "load", "requests/s", COLUMNS);
    for Point { load, rate, report } in points {
        let bar = "█".repeat((BAR as f64 * report.goodput).round() as usize);
        let verdict = if report.meets(targets) { "meets the targets" } else { "" };
        println!("{load:>6.2} {rate:>10.1}  {}  {bar:BAR$} {verdict}", columns(report));
    }
    println!();
    for Point { load, report, .. } in points {
        println!(
            "load {load:.2}: {:.1} and {:.1} rows in a base and a reward step; {:.2} base passes and {:.0} exchange bytes per token; \
             {} of {} requests finished, {} refused, {} expired",
            report.base.rows_per_step,
            report.reward.rows_per_step,
            report.base_passes_per_token,
            report.exchange_bytes_per_token,
            report.finished,
            report.requests,
            report.refused,
            report.expired
        );
    }
}

pub const COLUMNS: &str = "tokens/s  first token p50 / p99    gap p50 / p99        busy b / r  goodput";

pub fn columns(report: &Report) -> String {
    let pair = |quantiles: &uniarm_simulate::Quantiles| {
        format!("{:>7.1} / {:>7.1} ms", quantiles.p50 * 1e3, quantiles.p99 * 1e3)
    };
    format!(
        "{:>8.0}  {}  {}  {:>3.0} / {:>3.0} %  {:>6.1} %",
        report.tokens_per_second,
        pair(&report.first_token),
        pair(&report.inter_token),
        report.base.busy * 1e2,
        report.reward.busy * 1e2,
        report.goodput * 1e2
    )
}
