//! `uniarm oracle`: judges are fitted, asked and compared, and label pairs.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use uniarm_trainer::{
    oracle::{
        self, Answer, Oracle,
        answers::{self, OwnedAnswer},
        fit::{self, Agreement, FitOptions, FitReport},
        relabel::{self, Part},
    },
    pairs::{self, OnBadLine, Pair},
};

#[derive(Debug, Clone, Subcommand)]
pub enum OracleCommand {
    /// Fit an n-gram model to pairs, and say how good it is on pairs that it has not seen
    Fit(FitArgs),
    /// Score answers with one or more oracles, and show how these relate
    Score(ScoreArgs),
    /// Count how often an oracle prefers the answer that labels prefer
    Agree(AgreeArgs),
    /// Add an oracle's scores to pairs, as the opinion of another objective
    Label(LabelArgs),
    /// Divide pairs so that no prompt is in two parts
    Split(SplitArgs),
}

#[derive(Debug, Clone, Args)]
pub struct FitArgs {
    /// Pairs (docs/pairs-format.md); repeatable
    #[arg(long, required = true, num_args = 1..)]
    pub pairs: Vec<PathBuf>,
    /// The objective whose labels are learnt
    #[arg(long)]
    pub objective: String,
    /// File of the model
    #[arg(long)]
    pub output: PathBuf,
    /// Penalty on squared weights
    #[arg(long, default_value_t = 3.0)]
    pub l2: f64,
    /// Parts for held-out accuracy
    #[arg(long, default_value_t = 5)]
    pub folds: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct ScoreArgs {
    /// vader, brevity, readability, profanity, ngram:FILE, classifier:FOLDER[#LABEL], command:PROGRAM ARGUMENTS; repeatable
    #[arg(long, required = true)]
    pub oracle: Vec<String>,
    /// JSON lines: {"prompt" or "messages", "response", "id"?}
    #[arg(long)]
    pub input: PathBuf,
    /// Print one JSON line for each answer
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct AgreeArgs {
    /// As for `oracle score`
    #[arg(long)]
    pub oracle: String,
    /// Pairs (docs/pairs-format.md); repeatable
    #[arg(long, required = true, num_args = 1..)]
    pub pairs: Vec<PathBuf>,
    /// The objective whose labels count
    #[arg(long)]
    pub objective: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct LabelArgs {
    /// As for `oracle score`
    #[arg(long)]
    pub oracle: String,
    /// Pairs (docs/pairs-format.md); repeatable
    #[arg(long, required = true, num_args = 1..)]
    pub pairs: Vec<PathBuf>,
    /// The objective that the scores stand for
    #[arg(long)]
    pub objective: String,
    /// File of the labelled pairs
    #[arg(long)]
    pub output: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct SplitArgs {
    /// Pairs (docs/pairs-format.md); repeatable
    #[arg(long, required = true, num_args = 1..)]
    pub pairs: Vec<PathBuf>,
    /// Names and shares of the parts, as fit=0.4,train=0.5,eval=0.1
    #[arg(long, value_delimiter = ',', value_parser = part, required = true)]
    pub parts: Vec<Part>,
    /// Folder for one file for each part
    #[arg(long)]
    pub output: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(command: &OracleCommand) -> anyhow::Result<()> {
    match command {
        OracleCommand::Fit(args) => fit(args),
        OracleCommand::Score(args) => score(args),
        OracleCommand::Agree(args) => agree(args),
        OracleCommand::Label(args) => label(args),
        OracleCommand::Split(args) => split(args),
    }
}

// === commands ===

fn fit(args: &FitArgs) -> anyhow::Result<()> {
    let pairs = read_pairs(&args.pairs)?;
    let options = FitOptions { objective: args.objective.clone(), l2: args.l2, folds: args.folds };
    let bar = bar("fits", args.folds + 1);
    let (model, report) = fit::fit(&pairs, &options, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    relabel::write_model(&model, &args.output)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print_fit(&report, &args.output);
    }
    Ok(())
}

fn score(args: &ScoreArgs) -> anyhow::Result<()> {
    let lines = answers::read(&args.input)?;
    let answers: Vec<Answer<'_>> = lines.iter().map(OwnedAnswer::as_answer).collect();
    let mut columns = Vec::new();
    for spec in &args.oracle {
        let mut oracle = oracle::open(spec)?;
        let bar = bar(&format!("answers scored by {}", oracle.name()), answers.len());
        columns.push(oracle::score_in_parts(&mut *oracle, &answers, |done| bar.set_position(done as u64))?);
        bar.finish_and_clear();
    }
    if args.json {
        for (index, line) in lines.iter().enumerate() {
            let scores: serde_json::Map<_, _> = args
                .oracle
                .iter()
                .zip(&columns)
                .map(|(spec, column)| (spec.clone(), json!(column[index])))
                .collect();
            println!("{}", json!({ "id": line.id, "scores": scores }));
        }
    } else {
        print_scores(&args.oracle, &columns);
    }
    Ok(())
}

fn agree(args: &AgreeArgs) -> anyhow::Result<()> {
    let pairs = read_pairs(&args.pairs)?;
    let mut oracle = oracle::open(&args.oracle)?;
    let bar = scoring_bar(&*oracle, &pairs);
    let agreement =
        fit::agreement(&pairs, &args.objective, &mut *oracle, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    if args.json {
        println!("{}", serde_json::to_string(&agreement)?);
    } else {
        print_agreement(&args.oracle, &args.objective, &agreement);
    }
    Ok(())
}

fn label(args: &LabelArgs) -> anyhow::Result<()> {
    let mut pairs = read_pairs(&args.pairs)?;
    let mut oracle = oracle::open(&args.oracle)?;
    let bar = scoring_bar(&*oracle, &pairs);
    let labelled =
        relabel::label(&mut pairs, &args.objective, &mut *oracle, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    relabel::write_pairs(&pairs, &args.output)?;
    if args.json {
        println!("{}", serde_json::to_string(&labelled)?);
    } else {
        println!("{} pairs in {}, {} of them ties", labelled.pairs, args.output.display(), labelled.ties);
    }
    Ok(())
}

fn split(args: &SplitArgs) -> anyhow::Result<()> {
    let pairs = read_pairs(&args.pairs)?;
    let files = relabel::split(&pairs, &args.parts, &args.output)?;
    if args.json {
        println!("{}", json!({ "parts": files }));
    } else {
        for part in files {
            println!("{:>8} pairs in {}", part.pairs, part.file.display());
        }
    }
    Ok(())
}

fn read_pairs(files: &[PathBuf]) -> anyhow::Result<Vec<Pair>> {
    Ok(pairs::read(files, &[], &[], OnBadLine::Fail)?.pairs)
}

fn part(text: &str) -> anyhow::Result<Part> {
    let (name, share) = text.split_once('=').context("wants NAME=SHARE")?;
    Ok(Part { name: name.to_owned(), share: share.parse().context("wants a number after =")? })
}

// === printing ===

fn scoring_bar(oracle: &dyn Oracle, pairs: &[Pair]) -> ProgressBar {
    bar(&format!("answers scored by {}", oracle.name()), 2 * pairs.len())
}

fn bar(what: &str, length: usize) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left").expect("it is a template");
    ProgressBar::new(length as u64).with_style(style).with_message(what.to_owned())
}

fn print_fit(report: &FitReport, file: &Path) {
    let FitReport { objective, pairs, left_out, features, .. } = report;
    println!("{objective}: {pairs} pairs, {left_out} without a label left out; {features} features");
    println!(
        "  held out {:.3} ± {:.3} of pairs in the right order; fitted {:.3}",
        report.held_out_accuracy, report.standard_error, report.fitted_accuracy
    );
    println!("  the longer answer is preferred in {:.3}", report.longer_preferred);
    println!("  written to {}; use it as ngram:{}", file.display(), file.display());
}

fn print_agreement(spec: &str, objective: &str, agreement: &Agreement) {
    println!(
        "{spec} agrees with {objective} in {:.3} ± {:.3} of {} pairs ({} without a label left out)",
        agreement.accuracy, agreement.standard_error, agreement.pairs, agreement.left_out
    );
    println!("  the longer answer is preferred in {:.3}", agreement.longer_preferred);
}

fn print_scores(specs: &[String], columns: &[Vec<f64>]) {
    println!("{:<32} {:>9} {:>9} {:>9} {:>9}", "oracle", "mean", "deviation", "least", "most");
    for (spec, scores) in specs.iter().zip(columns) {
        let (mean, deviation) = moments(scores);
        let least = scores.iter().copied().fold(f64::INFINITY, f64::min);
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        println!("{spec:<32} {mean:>9.4} {deviation:>9.4} {least:>9.4} {most:>9.4}");
    }
    for second in 1..specs.len() {
        for first in 0..second {
            let r = correlation(&columns[first], &columns[second]);
            let r = r.map_or("not defined, for one of them is constant".to_owned(), |r| format!("{r:.3}"));
            println!("correlation of {} and {}: {r}", specs[first], specs[second]);
        }
    }
}

fn moments(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
    (mean, variance.sqrt())
}

/// Pearson's; none where one side is constant.
fn correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let ((mean_a, deviation_a), (mean_b, deviation_b)) = (moments(a), moments(b));
    let covariance = a.iter().zip(b).map(|(x, y)| (x - mean_a) * (y - mean_b)).sum::<f64>() / a.len() as f64;
    (deviation_a > 0.0 && deviation_b > 0.0).then(|| covariance / (deviation_a * deviation_b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlation_is_one_with_itself_minus_one_with_its_mirror_and_none_with_a_constant() {
        let (a, mirrored) = ([1.0, 2.0, 4.0], [-1.0, -2.0, -4.0]);
        assert!((correlation(&a, &a).unwrap() - 1.0).abs() < 1e-12);
        assert!((correlation(&a, &mirrored).unwrap() + 1.0).abs() < 1e-12);
        assert_eq!(correlation(&a, &[2.0; 3]), None);
    }

    #[test]
    fn part_is_a_name_and_a_share() {
        assert_eq!(part("fit=0.4").unwrap(), Part { name: "fit".to_owned(), share: 0.4 });
        assert!(part("fit").is_err() && part("fit=x").is_err());
    }
}
