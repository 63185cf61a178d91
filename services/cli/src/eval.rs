//! `uniarm eval`: methods and preferences become a front, with its report.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use uniarm_trainer::evaluate::{self, EvalConfig, Results};

use crate::job::{self, JobArgs, JobCluster};

#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Methods, objectives, prompts and models (TOML; experiments/exact/eval.toml is an example)
    pub config: PathBuf,
    /// Folder for the report, the answers and the journal; the same folder goes on where it stopped
    #[arg(long)]
    pub out: PathBuf,
    #[command(flatten)]
    pub job: JobArgs,
}

pub async fn run(args: EvalArgs) -> anyhow::Result<()> {
    let config = EvalConfig::read(&args.config)?;
    let folder = args.config.parent().context("a file has a folder")?;
    let models = job::resolve(&config.models, folder).await?;
    let identities = models.identities()?;
    let cluster = JobCluster::open(&args.job, &models).await?;
    let evaluated =
        evaluate::run(&config, folder, &args.out, &identities, &cluster, &args.job.options()).await;
    cluster.close().await?;
    let results = evaluated?;
    if args.job.json {
        println!("{}", as_json(&results));
    } else {
        print(&results);
        println!("the report is {}", args.out.join("report.html").display());
    }
    Ok(())
}

/// The numbers of each method; report.json has the rest.
fn as_json(results: &Results) -> serde_json::Value {
    let method = |own: &evaluate::MethodResult| {
        json!({
            "name": own.name,
            "hypervolume": own.hypervolume,
            "hypervolume_normalised": own.hypervolume_normalised,
            "mean_inner_product": own.mean_inner_product,
            "mean_inner_product_normalised": own.mean_inner_product_normalised,
            "right_steps": own.right_steps,
        })
    };
    json!({
        "answers": results.answers,
        "tokens": results.tokens,
        "methods": results.methods.iter().map(method).collect::<Vec<_>>(),
        "domination": results.domination,
    })
}

fn print(results: &Results) {
    println!("{} answers, {} tokens", results.answers, results.tokens);
    println!("{:<28} {:>26} {:>26}  right steps", "method", "hypervolume", "mean inner product");
    for method in &results.methods {
        let figure = |own: &uniarm_trainer::metrics::Interval| {
            format!("{:.3} [{:.3}, {:.3}]", own.value, own.low, own.high)
        };
        println!(
            "{:<28} {:>26} {:>26}  {:?}",
            method.name,
            figure(&method.hypervolume),
            figure(&method.mean_inner_product),
            method.right_steps
        );
    }
}
