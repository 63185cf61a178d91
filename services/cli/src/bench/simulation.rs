//! `uniarm bench simulation`: what `uniarm simulate` says of a load on this machine, over what that load was.
//!
//! The three commands are run as anyone would run them, as processes. A load lies between two calibrations, since a machine
//! that others share is not the same a minute later; what is compared is the mean of both simulations.

use std::{path::Path, process::Stdio};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{
    args::BenchSimulationArgs,
    statistics::{Percentiles, Spread, interval_of_median},
};
use crate::worker;

/// What is compared, in the order of [`Figures::values`].
const FIGURES: [&str; 5] =
    ["tokens/s", "first token, p50", "first token, p90", "next token, p50", "next token, p90"];

#[derive(Serialize)]
struct Report {
    requests_per_second: f64,
    seconds: f64,
    loads: Vec<Load>,
}

/// The loads of one kind.
#[derive(Serialize)]
struct Load {
    guided_share: f64,
    repeats: Vec<Repeat>,
}

/// One load, and what the calibrations before and after it say of it.
#[derive(Serialize)]
struct Repeat {
    measured: Figures,
    simulated: [Figures; 2],
}

/// A load as it was measured, or simulated; times in seconds.
#[derive(Clone, Copy, Serialize)]
struct Figures {
    tokens_per_second: f64,
    first_token: [f64; 2],
    next_token: [f64; 2],
}

/// Of the JSON that `uniarm bench load` prints, what is needed here.
#[derive(Deserialize)]
struct Measured {
    rates: Vec<MeasuredRate>,
}

#[derive(Deserialize)]
struct MeasuredRate {
    refused: usize,
    failed: usize,
    tokens_per_second: f64,
    first_token_ms: Option<Percentiles>,
    next_token_ms: Option<Percentiles>,
}

/// The same of `uniarm simulate`.
#[derive(Deserialize)]
struct Simulated {
    curve: Vec<SimulatedPoint>,
}

#[derive(Deserialize)]
struct SimulatedPoint {
    report: SimulatedReport,
}

#[derive(Deserialize)]
struct SimulatedReport {
    tokens_per_second: f64,
    first_token: Quantiles,
    inter_token: Quantiles,
}

#[derive(Deserialize)]
struct Quantiles {
    p50: f64,
    p90: f64,
}

/// The commands, with what they share.
struct Commands<'a> {
    args: &'a BenchSimulationArgs,
    model: String,
    folder: &'a Path,
}

pub async fn run(args: BenchSimulationArgs) -> anyhow::Result<()> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => worker::demo_model().await?,
    };
    let folder = tempfile::tempdir().context("a folder for machines and traces")?;
    let report = Commands { args: &args, model, folder: folder.path() }.compare().await?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

// === impl Commands ===

impl Commands<'_> {
    async fn compare(&self) -> anyhow::Result<Report> {
        let BenchSimulationArgs { guided, repeats, rate, seconds, .. } = self.args;
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
        let progress = ProgressBar::new((1 + repeats * (1 + guided.len())) as u64).with_style(style);
        let mut loads: Vec<_> = guided.iter().map(|&guided| Load::new(guided)).collect();
        progress.set_message("a calibration");
        self.calibrate(0).await?;
        for repeat in 1..=*repeats {
            let mut measured = Vec::new();
            for load in &loads {
                progress.inc(1);
                progress.set_message(format!("a load, {:.0} % guided", 100.0 * load.guided_share));
                measured.push(self.load(load.guided_share, repeat).await?);
            }
            progress.inc(1);
            progress.set_message("a calibration");
            self.calibrate(repeat).await?;
            for (load, measured) in loads.iter_mut().zip(measured) {
                let simulated = [
                    self.simulate(repeat - 1, load.guided_share, repeat).await?,
                    self.simulate(repeat, load.guided_share, repeat).await?,
                ];
                load.repeats.push(Repeat { measured, simulated });
            }
        }
        progress.finish_and_clear();
        Ok(Report { requests_per_second: *rate, seconds: *seconds, loads })
    }

    /// Writes a machine file: the `number`th of this run.
    async fn calibrate(&self, number: usize) -> anyhow::Result<()> {
        let rounds = self.args.rounds.to_string();
        let file = self.file(format!("machine-{number}.json"));
        let mut flags = vec!["simulate", "--calibrate", &file, "--rounds", &rounds, "--model", &self.model];
        let threads = self.args.threads.map(|threads| threads.to_string());
        flags.extend(threads.iter().flat_map(|threads| ["--threads", threads]));
        uniarm(&flags).await.map(drop)
    }

    /// Measures a load, and writes its trace.
    async fn load(&self, guided: f64, seed: usize) -> anyhow::Result<Figures> {
        let BenchSimulationArgs { rate, seconds, threads, .. } = self.args;
        let [rate, seconds, share] = [rate, seconds, &guided].map(f64::to_string);
        let (seed, trace) = (seed.to_string(), self.trace(guided, seed));
        let mut flags = vec!["bench", "load", "--json", "--draft-window", "0", "--model", &self.model];
        flags.extend(["--rate", &rate, "--seconds", &seconds, "--guided", &share, "--seed", &seed]);
        flags.extend(["--write-trace", &trace]);
        let threads = threads.map(|threads| threads.to_string());
        flags.extend(threads.iter().flat_map(|threads| ["--threads", threads]));
        let measured: Measured =
            serde_json::from_str(&uniarm(&flags).await?).context("what bench load printed")?;
        let rate = measured.rates.first().context("bench load measured nothing")?;
        let lost = rate.refused + rate.failed;
        anyhow::ensure!(
            lost == 0,
            "{lost} requests were refused or failed: this machine wants a lower --rate"
        );
        let seconds = |times: Option<Percentiles>| {
            let times = times.context("no request came: the load wants a higher --rate or more --seconds")?;
            anyhow::Ok([times.p50 / 1e3, times.p90 / 1e3])
        };
        Ok(Figures {
            tokens_per_second: rate.tokens_per_second,
            first_token: seconds(rate.first_token_ms)?,
            next_token: seconds(rate.next_token_ms)?,
        })
    }

    /// Simulates that load on a calibrated machine.
    async fn simulate(&self, machine: usize, guided: f64, seed: usize) -> anyhow::Result<Figures> {
        let (machine, trace) = (self.file(format!("machine-{machine}.json")), self.trace(guided, seed));
        let system_tokens = self.args.system_tokens.to_string();
        let mut flags = vec!["simulate", "--json", "--machine", &machine, "--trace", &trace];
        flags.extend(["--base", "1", "--reward", "1", "--colocated", "--draft-window", "0"]);
        flags.extend(["--link", "process", "--front-link", "loopback", "--system-tokens", &system_tokens]);
        let simulated: Simulated =
            serde_json::from_str(&uniarm(&flags).await?).context("what simulate printed")?;
        let SimulatedReport { tokens_per_second, first_token, inter_token } =
            simulated.curve.into_iter().next().context("simulate said nothing")?.report;
        let [first_token, next_token] = [first_token, inter_token].map(|times| [times.p50, times.p90]);
        Ok(Figures { tokens_per_second, first_token, next_token })
    }

    fn trace(&self, guided: f64, seed: usize) -> String {
        self.file(format!("trace-{guided}-{seed}.jsonl"))
    }

    fn file(&self, name: String) -> String {
        self.folder.join(name).display().to_string()
    }
}

/// Runs this program, and gives what it printed.
async fn uniarm(flags: &[&str]) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("this program's own path")?;
    let mut command = Command::new(program);
    command.args(flags).stdin(Stdio::null()).kill_on_drop(true);
    let line = || format!("uniarm {}", flags.join(" "));
    let output = command.output().await.with_context(|| format!("cannot start {}", line()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{}: {}", line(), errors.trim());
    String::from_utf8(output.stdout).context("its output is no text")
}

// === impl Load ===

impl Load {
    fn new(guided_share: f64) -> Self {
        Self { guided_share, repeats: Vec::new() }
    }

    /// Simulated over measured, of each repeat.
    fn ratios(&self, figure: usize) -> Vec<f64> {
        self.repeats.iter().map(|repeat| repeat.ratio(figure)).collect()
    }
}

// === impl Repeat ===

impl Repeat {
    /// The geometric mean of both simulations, over what was measured.
    fn ratio(&self, figure: usize) -> f64 {
        let [before, after] = self.simulated.map(|simulated| simulated.values()[figure]);
        (before * after).sqrt() / self.measured.values()[figure]
    }
}

// === impl Figures ===

impl Figures {
    /// In the order of [`FIGURES`].
    fn values(&self) -> [f64; FIGURES.len()] {
        let Self { tokens_per_second, first_token: [first50, first90], next_token: [next50, next90] } = *self;
        [tokens_per_second, first50, first90, next50, next90]
    }
}

// === impl Report ===

impl Report {
    fn print(&self) {
        println!(
            "{}/s for {} s, lock-step, each load between two calibrations; simulated over measured\n",
            self.requests_per_second, self.seconds
        );
        for load in &self.loads {
            println!("{:.0} % guided", 100.0 * load.guided_share);
            println!("{:>18} {:>10} {:>7} {:>15} {:>15}", "", "measured", "ratio", "95 %", "range");
            for (figure, name) in FIGURES.iter().enumerate() {
                let ratios = load.ratios(figure);
                let interval = interval_of_median(&ratios)
                    .map_or_else(|| "–".to_owned(), |[from, to]| format!("{from:.2} – {to:.2}"));
                let measured = load.repeats.iter().map(|repeat| repeat.measured.values()[figure]).collect();
                let (measured, ratio) = (Spread::of(measured).median, Spread::of(ratios));
                let measured = match figure {
                    0 => format!("{measured:.1}"),
                    _ => format!("{:.1} ms", 1e3 * measured),
                };
                let range = format!("{:.2} – {:.2}", ratio.least, ratio.most);
                println!("{name:>18} {measured:>10} {:>7.3} {interval:>15} {range:>15}", ratio.median);
            }
            println!();
        }
        println!(
            "medians of the repeats; where that of the ratios lies with 95 % confidence, from 6 repeats on; their range"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(tokens_per_second: f64, milliseconds: [f64; 4]) -> Figures {
        let [a, b, c, d] = milliseconds.map(|value| value / 1e3);
        Figures { tokens_per_second, first_token: [a, b], next_token: [c, d] }
    }

    #[test]
    fn a_ratio_is_of_the_mean_of_both_simulations() {
        let mut load = Load::new(1.0);
        load.repeats.push(Repeat {
            measured: figures(100.0, [100.0, 200.0, 10.0, 20.0]),
            simulated: [figures(100.0, [50.0, 200.0, 10.0, 5.0]), figures(100.0, [200.0, 200.0, 14.4, 20.0])],
        });
        let ratios: Vec<_> = (0..FIGURES.len()).map(|figure| load.ratios(figure)[0]).collect();
        for (ratio, expected) in ratios.iter().zip([1.0, 1.0, 1.0, 1.2, 0.5]) {
            assert!((ratio - expected).abs() < 1e-9, "{ratios:?}");
        }
    }
}
