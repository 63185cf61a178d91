//! `uniarm eval`: methods × preferences × prompts × seeds, answered by one cluster in one batch, scored, and measured.
//!
//! Everything that is written is a function of the configuration and the models: a run that is killed and continued
//! ends with the same bytes. How long it took stands in `run.json` alone.

mod comparison;
mod config;
mod method;
mod outputs;
mod plan;
mod repetition;
mod results;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::json;

use crate::{
    cluster_job::{self, Cluster, Identities, JobOptions, Journal},
    metrics, prompts, report, whole_file,
};
pub use comparison::{Domination, Lead};
pub use config::{EvalConfig, EvalObjective};
pub use method::{Guidance, MethodConfig};
use plan::Plan;
pub use results::{Example, ExampleAnswer, MethodResult, PointResult, Results};

/// Runs an evaluation, or goes on with it, and writes the report into `out`.
///
/// # Errors
/// What is wrong with the configuration, a prompt, the cluster, an oracle or the disk. Answers so far are kept in
/// `out/journal.jsonl`, and the next call goes on from there.
pub async fn run(
    config: &EvalConfig,
    folder: &Path,
    out: &Path,
    identities: &Identities,
    cluster: &dyn Cluster,
    options: &JobOptions,
) -> anyhow::Result<Results> {
    let began = Instant::now();
    config.check()?;
    let prompts = prompts::read(&folder.join(&config.prompts), config.format)?;
    let grid = metrics::lattice(config.objectives.len(), config.steps);
    let mut plan = Plan::new(config, &grid, &prompts);
    let mut journal = Journal::open(&out.join("journal.jsonl"))?;
    cluster_job::say_damaged(&journal);
    let before = journal.len();
    // A second turn's question holds the first turn's answer.
    for turn in 0..plan.turns() {
        let questions = plan.questions(turn, identities);
        let answers = cluster_job::run(&questions, &mut journal, cluster, options).await?;
        plan.answered(turn, answers);
    }
    let asked = Asked { answers: journal.len() - before, seconds: began.elapsed() };
    let scores = plan.score(folder, options.progress)?;
    let results = results::measure(&plan, &scores, identities);
    outputs::write(&plan, &scores, out)?;
    report::write(&results, out)?;
    asked.record(&plan, out)?;
    Ok(results)
}

/// What this life of the run did.
struct Asked {
    answers: usize,
    seconds: Duration,
}

// === impl Asked ===

impl Asked {
    /// Writes `run.json`: the only file with times in it.
    fn record(&self, plan: &Plan<'_>, out: &Path) -> anyhow::Result<()> {
        if self.answers == 0 {
            return Ok(()); // a look at finished work took no time worth telling
        }
        let tokens = plan.tokens();
        let seconds = self.seconds.as_secs_f64();
        let run = json!({
            "answers_of_this_run": self.answers,
            "seconds_of_this_run": seconds,
            "tokens_of_the_report": tokens,
        });
        let text = serde_json::to_string_pretty(&run).context("numbers are JSON")? + "\n";
        whole_file::write(&out.join("run.json"), text.as_bytes())
    }
}
