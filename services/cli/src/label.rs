//! `uniarm label`: prompts become preference pairs.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use uniarm_trainer::label::{self, LabelConfig, LabelSummary};

use crate::job::{self, JobArgs, JobCluster};

#[derive(Debug, Clone, Args)]
pub struct LabelArgs {
    /// What to ask, in which styles, and who scores (TOML; experiments/exact/label.toml is an example)
    pub config: PathBuf,
    /// Folder for pairs.jsonl, answers.jsonl, summary.json and the journal; the same folder goes on where it stopped
    #[arg(long)]
    pub out: PathBuf,
    #[command(flatten)]
    pub job: JobArgs,
}

pub async fn run(args: LabelArgs) -> anyhow::Result<()> {
    let config = LabelConfig::read(&args.config)?;
    let folder = args.config.parent().context("a file has a folder")?;
    let models = job::resolve(&config.models, folder).await?;
    let identities = models.identities()?;
    let cluster = JobCluster::open(&args.job, &models).await?;
    let labelled = label::run(&config, folder, &args.out, &identities, &cluster, &args.job.options()).await;
    cluster.close().await?;
    let summary = labelled?;
    if args.job.json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        print(&config, &summary);
        println!("{} is ready for `uniarm train`", args.out.join("pairs.jsonl").display());
    }
    Ok(())
}

fn print(config: &LabelConfig, summary: &LabelSummary) {
    println!(
        "{} answers to {} prompts; {} cut off, {} dropped",
        summary.answers, summary.prompts, summary.unfinished, summary.dropped_answers
    );
    let names: Vec<&str> = config.objectives.iter().map(|objective| objective.name.as_str()).collect();
    println!("{:<24} {:>8}  {}", "style", "tokens", names.join("  "));
    for style in &summary.styles {
        let scores: Vec<String> = style.scores.iter().map(|score| format!("{score:.3}")).collect();
        println!("{:<24} {:>8.1}  {}", style.name, style.tokens, scores.join("  "));
    }
    let (pairing, left_out) = (&summary.pairing, &summary.pairing.left_out);
    println!(
        "{} pairs, {:.0} % in conflict, correlation {:.2}; left out: {} repeated answers, {} pairs with a tie, {} of two cut-off answers",
        pairing.pairs,
        100.0 * pairing.conflicting_share,
        pairing.correlation,
        left_out.repeated_answers,
        left_out.tied_pairs,
        left_out.cut_off_pairs
    );
}
