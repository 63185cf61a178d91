//! Answers as files: our own lines, and what the judges of MT-Bench and AlpacaEval read.

use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::plan::{Cell, Plan};
use crate::{cluster_job, prompts::PromptFormat, whole_file};

/// Writes `answers.jsonl`, and under MT-Bench's or AlpacaEval's prompts a file of its own format for each method and
/// preference. `scores` of each cell: `[turn][objective]`.
pub fn write(plan: &Plan<'_>, scores: &[Vec<Vec<f64>>], out: &Path) -> anyhow::Result<()> {
    let mut lines = String::new();
    for (cell, scores) in plan.cells.iter().zip(scores) {
        for (turn, (answer, scores)) in cell.answers.iter().zip(scores).enumerate() {
            let named = plan.config.objectives.iter().zip(scores);
            let scores: serde_json::Map<_, _> =
                named.map(|(objective, score)| (objective.name.clone(), json!(score))).collect();
            let line = json!({
                "method": plan.config.methods[cell.method].name,
                "preference": plan.preference(cell),
                "seed": plan.config.seeds[cell.seed],
                "prompt_id": plan.prompts[cell.prompt].id,
                "turn": turn,
                "response": answer.text,
                "tokens": answer.tokens,
                "finish_reason": answer.finish_reason,
                "scores": scores,
            });
            lines.push_str(&format!("{line}\n"));
        }
    }
    whole_file::write(&out.join("answers.jsonl"), lines.as_bytes())?;
    match plan.config.format {
        PromptFormat::Jsonl | PromptFormat::Pairs => Ok(()),
        PromptFormat::MtBench => write_each(plan, out, "mt-bench/model_answer", "jsonl", mt_bench),
        PromptFormat::AlpacaEval => write_each(plan, out, "alpaca-eval", "json", alpaca_eval),
    }
}

/// A file for each method and preference: judges compare models, and each of these is one.
fn write_each(
    plan: &Plan<'_>,
    out: &Path,
    folder: &str,
    ending: &str,
    format: fn(&Plan<'_>, &[&Cell], &str) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let methods = 0..plan.config.methods.len();
    for indices in methods.flat_map(|method| plan.points(method).into_values()) {
        let cells: Vec<&Cell> =
            indices.iter().map(|index| &plan.cells[*index]).filter(|cell| cell.seed == 0).collect();
        let Some(first) = cells.first() else { continue };
        let model = model_id(plan, first);
        let text = format(plan, &cells, &model)?;
        whole_file::write(&out.join(folder).join(format!("{model}.{ending}")), text.as_bytes())?;
    }
    Ok(())
}

/// `UniARM-positive_0.7-concise_0.3`: a file name, and what tables call it.
fn model_id(plan: &Plan<'_>, cell: &Cell) -> String {
    let mut id = plan.config.methods[cell.method].name.clone();
    for (objective, weight) in plan.config.objectives.iter().zip(plan.preference(cell)) {
        id.push_str(&format!("-{}_{weight}", objective.name));
    }
    let plain = |character: char| match character {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' | '.' => character,
        _ => '_',
    };
    id.chars().map(plain).collect()
}

/// FastChat's `model_answer/MODEL.jsonl`. Its time is 0: the file is a function of the run.
fn mt_bench(plan: &Plan<'_>, cells: &[&Cell], model: &str) -> anyhow::Result<String> {
    let mut lines = String::new();
    for cell in cells {
        let prompt = &plan.prompts[cell.prompt];
        let turns: Vec<&str> = cell.answers.iter().map(|answer| answer.text.as_str()).collect();
        let id: u64 = prompt.id.parse().context("MT-Bench numbers its questions")?;
        let line = json!({
            "question_id": id,
            "answer_id": format!("{:016x}", cluster_job::seed(id, &[model])),
            "model_id": model,
            "choices": [{ "index": 0, "turns": turns }],
            "tstamp": 0.0,
        });
        lines.push_str(&format!("{line}\n"));
    }
    Ok(lines)
}

/// AlpacaEval's `model_outputs.json`.
fn alpaca_eval(plan: &Plan<'_>, cells: &[&Cell], model: &str) -> anyhow::Result<String> {
    let item = |cell: &&Cell| -> Value {
        let prompt = &plan.prompts[cell.prompt];
        json!({
            "dataset": prompt.dataset,
            "instruction": prompt.messages.last().map(|message| &message.content),
            "output": cell.answers.first().map(|answer| &answer.text),
            "generator": model,
        })
    };
    let items: Vec<Value> = cells.iter().map(item).collect();
    Ok(serde_json::to_string_pretty(&items).context("texts are JSON")? + "\n")
}
