//! `uniarm bench simulation`: what `uniarm simulate` says of a load on this machine, over what that load was.
//!
//! The three commands are run as anyone would run them, as processes. A load lies between two calibrations, since a machine
//! that others share is not the same a minute later; what is compared is the mean of both simulations. And a third simulation
//! takes steps as the loads before and after it had them: other requests, at another minute, of the same workers.

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

/// One load, and what is simulated of it.
#[derive(Serialize)]
struct Repeat {
    measured: Figures,
    /// With the calibration before it, and the one after it.
    calibrated: [Figures; 2],
    /// With the steps of the loads before and after it, and the calibration between. `None` where there is no other load.
    observed: Option<Figures>,
}

/// Where simulated steps come from, in the order of [`Repeat::ratios`].
const SOURCES: [&str; 2] = ["calibrated", "observed"];

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
        let mut measured = vec![Vec::new(); guided.len()];
        progress.set_message("a calibration");
        self.calibrate(0).await?;
        for repeat in 1..=*repeats {
            for (&guided, measured) in guided.iter().zip(&mut measured) {
                progress.inc(1);
                progress.set_message(format!("a load, {:.0} % guided", 100.0 * guided));
                measured.push(self.load(guided, repeat).await?);
            }
            progress.inc(1);
            progress.set_message("a calibration");
            self.calibrate(repeat).await?;
        }
        progress.set_message("simulations");
        let mut loads = Vec::new();
        for (&guided_share, measured) in guided.iter().zip(measured) {
            let mut repeats = Vec::new();
            for (repeat, measured) in (1..).zip(measured) {
                repeats.push(self.repeat(guided_share, repeat, measured).await?);
            }
            loads.push(Load { guided_share, repeats });
        }
        progress.finish_and_clear();
        Ok(Report { requests_per_second: *rate, seconds: *seconds, loads })
    }

    /// Simulates a load that was measured.
    async fn repeat(&self, guided: f64, number: usize, measured: Figures) -> anyhow::Result<Repeat> {
        let trace = self.trace(guided, number);
        let calibrated =
            [self.simulate(&trace, number - 1, &[]).await?, self.simulate(&trace, number, &[]).await?];
        let neighbours = [number - 1, number + 1];
        let others = neighbours.into_iter().filter(|other| (1..=self.args.repeats).contains(other));
        let steps: Vec<_> = others.map(|other| self.steps(guided, other)).collect();
        let observed = match steps.as_slice() {
            [] => None,
            steps => Some(self.simulate(&trace, number, steps).await?),
        };
        Ok(Repeat { measured, calibrated, observed })
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

    /// Measures a load, and writes its trace and its steps.
    async fn load(&self, guided: f64, seed: usize) -> anyhow::Result<Figures> {
        let BenchSimulationArgs { rate, seconds, threads, .. } = self.args;
        let [rate, seconds, share] = [rate, seconds, &guided].map(f64::to_string);
        let (trace, steps) = (self.trace(guided, seed), self.steps(guided, seed));
        let seed = seed.to_string();
        let mut flags = vec!["bench", "load", "--json", "--draft-window", "0", "--model", &self.model];
        flags.extend(["--rate", &rate, "--seconds", &seconds, "--guided", &share, "--seed", &seed]);
        flags.extend(["--write-trace", &trace, "--write-steps", &steps]);
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

    /// Simulates a load on a calibrated machine, whose steps are as those of other loads.
    async fn simulate(&self, trace: &str, machine: usize, steps: &[String]) -> anyhow::Result<Figures> {
        let machine = self.file(format!("machine-{machine}.json"));
        let system_tokens = self.args.system_tokens.to_string();
        let mut flags = vec!["simulate", "--json", "--machine", &machine, "--trace", trace];
        flags.extend(steps.iter().flat_map(|steps| ["--observed", steps]));
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

    fn steps(&self, guided: f64, seed: usize) -> String {
        self.file(format!("steps-{guided}-{seed}.json"))
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
    /// Simulated over measured, of each repeat that has them.
    fn ratios(&self, figure: usize, source: usize) -> Vec<f64> {
        self.repeats.iter().filter_map(|repeat| repeat.ratios(figure)[source]).collect()
    }
}

// === impl Repeat ===

impl Repeat {
    /// The geometric mean of what both calibrations say, and what the other loads' steps do, over what was measured.
    fn ratios(&self, figure: usize) -> [Option<f64>; SOURCES.len()] {
        let [before, after] = self.calibrated.map(|simulated| simulated.values()[figure]);
        let observed = self.observed.map(|simulated| simulated.values()[figure]);
        [Some((before * after).sqrt()), observed]
            .map(|simulated| Some(simulated? / self.measured.values()[figure]))
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
            "{}/s for {} s, lock-step; simulated over measured, by steps as calibrations before and after the load have\n\
             them (calibrated) and as the loads before and after it had them (observed)\n",
            self.requests_per_second, self.seconds
        );
        for load in &self.loads {
            println!("{:.0} % guided", 100.0 * load.guided_share);
            print!("{:>18} {:>10}", "", "measured");
            SOURCES.iter().for_each(|source| print!("  {source:>10} {:>13} {:>13}", "95 %", "range"));
            println!();
            for (figure, name) in FIGURES.iter().enumerate() {
                let measured = load.repeats.iter().map(|repeat| repeat.measured.values()[figure]).collect();
                let measured = Spread::of(measured).median;
                let measured = match figure {
                    0 => format!("{measured:.1}"),
                    _ => format!("{:.1} ms", 1e3 * measured),
                };
                print!("{name:>18} {measured:>10}");
                for source in 0..SOURCES.len() {
                    let ratios = load.ratios(figure, source);
                    if ratios.is_empty() {
                        print!("  {:>10} {:>13} {:>13}", "–", "–", "–");
                        continue;
                    }
                    let ends = |[from, to]: [f64; 2]| format!("{from:.2} – {to:.2}");
                    let interval = interval_of_median(&ratios).map_or("–".to_owned(), ends);
                    let Spread { median, least, most } = Spread::of(ratios);
                    print!("  {median:>10.3} {interval:>13} {:>13}", ends([least, most]));
                }
                println!();
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
    fn a_ratio_is_of_the_mean_of_both_calibrations_or_of_what_other_loads_say() {
        let mut repeat = Repeat {
            measured: figures(100.0, [100.0, 200.0, 10.0, 20.0]),
            calibrated: [
                figures(100.0, [50.0, 200.0, 10.0, 5.0]),
                figures(100.0, [200.0, 200.0, 14.4, 20.0]),
            ],
            observed: None,
        };
        for (figure, expected) in [1.0, 1.0, 1.0, 1.2, 0.5].into_iter().enumerate() {
            let [calibrated, observed] = repeat.ratios(figure);
            assert!((calibrated.unwrap() - expected).abs() < 1e-9, "{figure}: {calibrated:?}");
            assert_eq!(observed, None);
        }
        repeat.observed = Some(figures(100.0, [110.0, 200.0, 10.0, 20.0]));
        let load = Load { guided_share: 1.0, repeats: vec![repeat] };
        assert!((load.ratios(1, 1)[0] - 1.1).abs() < 1e-9);
    }
}
