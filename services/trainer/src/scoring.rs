//! Objectives of a configuration, and what their oracles think of many answers.

use std::path::Path;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::oracle::{self, Answer};

/// Answers that an oracle sees at once: enough for a batch of a classifier, and a bar that moves.
const SCORED_AT_ONCE: usize = 32;

/// Oracles whose argument is a path.
const FILE_ORACLES: [&str; 2] = ["classifier:", "ngram:"];

/// A table `[[objectives]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ObjectiveConfig {
    /// What the answers, the pairs and the report call it.
    pub name: String,
    /// As `uniarm oracle` takes it: `vader`, `brevity`, `classifier:FOLDER`, …
    pub oracle: String,
}

/// Scores of every answer: for each one a number for each objective, in the order of the configuration.
///
/// # Errors
/// An oracle that cannot be opened or fails, or a score that is not a finite number; `origin` names its answer.
pub fn score_all(
    objectives: &[ObjectiveConfig],
    folder: &Path,
    answers: &[Answer<'_>],
    origin: impl Fn(usize) -> String,
    progress: bool,
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut scores = vec![Vec::with_capacity(objectives.len()); answers.len()];
    for objective in objectives {
        let context = || format!("objective {:?}, oracle {:?}", objective.name, objective.oracle);
        let mut oracle = oracle::open(&objective.resolved(folder)).with_context(context)?;
        let bar = bar(progress, &objective.name, answers.len());
        for (chunk, part) in answers.chunks(SCORED_AT_ONCE).enumerate() {
            let start = chunk * SCORED_AT_ONCE;
            for (offset, score) in oracle.score(part).with_context(context)?.into_iter().enumerate() {
                let index = start + offset;
                if !score.is_finite() {
                    bail!("{}: scored {} with {score}, wants a finite number", context(), origin(index));
                }
                scores[index].push(score);
            }
            bar.inc(part.len() as u64);
        }
        bar.finish_and_clear();
    }
    Ok(scores)
}

/// # Errors
/// Where two objectives have one name, or there are fewer than `least`.
pub fn check(objectives: &[ObjectiveConfig], least: usize) -> anyhow::Result<()> {
    if objectives.len() < least {
        bail!("objectives: has {}, wants at least {least}", objectives.len());
    }
    for (index, objective) in objectives.iter().enumerate() {
        if objectives[..index].iter().any(|other| other.name == objective.name) {
            bail!("objectives[{index}].name: {:?} stands there twice", objective.name);
        }
    }
    Ok(())
}

// === impl ObjectiveConfig ===

impl ObjectiveConfig {
    /// The oracle with its path relative to the configuration's folder.
    fn resolved(&self, folder: &Path) -> String {
        for kind in FILE_ORACLES {
            if let Some(path) = self.oracle.strip_prefix(kind) {
                return format!("{kind}{}", folder.join(path).display());
            }
        }
        self.oracle.clone()
    }
}

fn bar(progress: bool, name: &str, answers: usize) -> ProgressBar {
    let bar = if progress { ProgressBar::new(answers as u64) } else { ProgressBar::hidden() };
    let template = "{bar:30} {pos}/{len} answers scored for {msg}, {eta} left";
    bar.with_style(ProgressStyle::with_template(template).expect("it is a template"))
        .with_message(name.to_owned())
}
