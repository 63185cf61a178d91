//! `uniarm bench simulation`: what `uniarm simulate` says of a load on this machine, over what that load was.
//!
//! The three commands are run as anyone would run them, as processes. A load lies between two calibrations, since a machine
//! that others share is not the same a minute later; what is compared is the mean of both simulations. And a third simulation
//! takes steps as other loads had them, of the same workers: those before and after it, which are other requests at another
//! minute; or, where there are several rates, those at the other rates, so that nothing of its own rate is known.

use std::{path::Path, process::Stdio};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tokio::process;

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
    seconds: f64,
    loads: Vec<Load>,
}

/// The loads of one kind.
#[derive(Serialize)]
struct Load {
    #[serde(flatten)]
    kind: Kind,
    repeats: Vec<Repeat>,
}

#[derive(Clone, Copy, PartialEq, Serialize)]
struct Kind {
    requests_per_second: f64,
    guided_share: f64,
}

/// One load, and what is simulated of it.
#[derive(Serialize)]
struct Repeat {
    measured: Figures,
    /// With the calibration before it, and the one after it.
    calibrated: [Figures; 2],
    /// With the steps of other loads, and the calibration after it. `None` where there is no other load.
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
        let BenchSimulationArgs { repeats, seconds, .. } = *self.args;
        let kinds = self.kinds();
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
        let progress = ProgressBar::new((1 + repeats * (1 + kinds.len())) as u64).with_style(style);
        let mut measured = vec![Vec::new(); kinds.len()];
        progress.set_message("a calibration");
        self.calibrate(0).await?;
        for repeat in 1..=repeats {
            for (&kind, measured) in kinds.iter().zip(&mut measured) {
                progress.inc(1);
                progress.set_message(format!("a load, {}", kind.name()));
                measured.push(self.load(kind, repeat).await?);
            }
            progress.inc(1);
            progress.set_message("a calibration");
            self.calibrate(repeat).await?;
        }
        progress.set_message("simulations");
        let mut loads = Vec::new();
        for (kind, measured) in kinds.into_iter().zip(measured) {
            let mut repeats = Vec::new();
            for (repeat, measured) in (1..).zip(measured) {
                repeats.push(self.repeat(kind, repeat, measured).await?);
            }
            loads.push(Load { kind, repeats });
        }
        progress.finish_and_clear();
        Ok(Report { seconds, loads })
    }

    /// The loads of a repeat, in their order.
    fn kinds(&self) -> Vec<Kind> {
        let BenchSimulationArgs { rate, guided, .. } = self.args;
        let of_rate = |&requests_per_second| {
            guided.iter().map(move |&guided_share| Kind { requests_per_second, guided_share })
        };
        rate.iter().flat_map(of_rate).collect()
    }

    /// The loads whose steps stand for those of one, as kind and repeat: of a load at the only rate those before and after it, else
    /// those at the other rates, of its own repeat too.
    fn others(&self, kind: Kind, number: usize) -> Vec<(Kind, usize)> {
        let kinds = self.kinds().into_iter().filter(|other| other.guided_share == kind.guided_share);
        let is_single = self.args.rate.len() == 1;
        let of_kind = |other: Kind| {
            (1..=self.args.repeats)
                .filter(move |&repeat| match is_single {
                    true => repeat.abs_diff(number) == 1,
                    false => repeat.abs_diff(number) <= 1 && other != kind,
                })
                .map(move |repeat| (other, repeat))
        };
        kinds.flat_map(of_kind).collect()
    }

    /// Simulates a load that was measured.
    async fn repeat(&self, kind: Kind, number: usize, measured: Figures) -> anyhow::Result<Repeat> {
        let trace = self.trace(kind, number);
        let calibrated =
            [self.simulate(&trace, number - 1, &[]).await?, self.simulate(&trace, number, &[]).await?];
        let others = self.others(kind, number);
        let steps: Vec<_> = others.into_iter().map(|(kind, repeat)| self.steps(kind, repeat)).collect();
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
    async fn load(&self, kind: Kind, seed: usize) -> anyhow::Result<Figures> {
        let BenchSimulationArgs { seconds, threads, .. } = self.args;
        let [rate, seconds, share] =
            [&kind.requests_per_second, seconds, &kind.guided_share].map(f64::to_string);
        let (trace, steps) = (self.trace(kind, seed), self.steps(kind, seed));
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

    fn trace(&self, kind: Kind, seed: usize) -> String {
        self.file(format!("trace-{}-{seed}.jsonl", kind.label()))
    }

    fn steps(&self, kind: Kind, seed: usize) -> String {
        self.file(format!("steps-{}-{seed}.json", kind.label()))
    }

    fn file(&self, name: String) -> String {
        self.folder.join(name).display().to_string()
    }
}

/// Runs this program, and gives what it printed.
async fn uniarm(flags: &[&str]) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("this program's own path")?;
    let mut command = process::Command::new(program);
    command.args(flags).stdin(Stdio::null()).kill_on_drop(true);
    let line = || format!("uniarm {}", flags.join(" "));
    let output = command.output().await.with_context(|| format!("cannot start {}", line()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{}: {}", line(), errors.trim());
    String::from_utf8(output.stdout).context("its output is no text")
}

// === impl Kind ===

impl Kind {
    fn name(self) -> String {
        format!("{}/s, {:.0} % guided", self.requests_per_second, 100.0 * self.guided_share)
    }

    /// Of a file.
    fn label(self) -> String {
        format!("{}-{}", self.requests_per_second, self.guided_share)
    }
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
            "{} s of arrivals, lock-step; simulated over measured, by steps as calibrations before and after the load have\n\
             them (calibrated) and as other loads had them (observed): those before and after it; of several rates,\n\
             those at the others\n",
            self.seconds
        );
        for load in &self.loads {
            println!("{}", load.kind.name());
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
    use clap::Parser as _;

    use super::*;
    use crate::{
        args::{Cli, Command},
        bench::args::{BenchArgs, BenchCommand},
    };

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
        let kind = Kind { requests_per_second: 1.0, guided_share: 1.0 };
        let load = Load { kind, repeats: vec![repeat] };
        assert!((load.ratios(1, 1)[0] - 1.1).abs() < 1e-9);
    }

    #[test]
    fn steps_are_of_the_loads_beside_one_or_of_those_at_other_rates() {
        let others = |flags: &str, requests_per_second, number| {
            let line = format!("uniarm bench simulation --guided 0,1 {flags}");
            let Command::Bench(BenchArgs { command: BenchCommand::Simulation(args) }) =
                Cli::parse_from(line.split(' ')).command
            else {
                panic!("another command")
            };
            let kind = Kind { requests_per_second, guided_share: 1.0 };
            let commands = Commands { args: &args, model: String::new(), folder: Path::new("") };
            let others = commands.others(kind, number).into_iter();
            others
                .map(|(other, repeat)| {
                    assert_eq!(other.guided_share, 1.0);
                    (other.requests_per_second, repeat)
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(others("--rate 3 --repeats 1", 3.0, 1), []);
        assert_eq!(others("--rate 3 --repeats 3", 3.0, 2), [(3.0, 1), (3.0, 3)]);
        assert_eq!(others("--rate 2,3 --repeats 1", 3.0, 1), [(2.0, 1)]);
        assert_eq!(others("--rate 1,2,3 --repeats 2", 2.0, 2), [(1.0, 1), (1.0, 2), (3.0, 1), (3.0, 2)]);
    }
}
