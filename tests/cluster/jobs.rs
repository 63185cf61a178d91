//! Jobs as a stranger runs them: one command, killed in the middle, given again.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::harness::{demo_model, machine};

const EVALUATION: &str = r#"
title = "Test"
prompts = "questions.jsonl"
format = "mt-bench"
seeds = [7]
temperature = 1.0
max_tokens = 8
steps = 4
resamples = 50

[[objectives]]
name = "positive"
oracle = "vader"
reference = -1.0
ideal = 1.0

[[objectives]]
name = "concise"
oracle = "brevity"
reference = -5.0
ideal = 0.0

[models.prompted]
cheerful = "You are an extremely cheerful AI assistant."
short = "Answer in one short sentence."

[[methods]]
name = "separate"
guidance = "separate"
rewards = { positive = "cheerful", concise = "short" }

[[methods]]
name = "sharpened"
guidance = "sharpened"
"#;

const QUESTIONS: &str = r#"{"question_id": 81, "category": "writing", "turns": ["Describe the sea.", "Again, please."]}
{"question_id": 82, "category": "writing", "turns": ["Describe a forest.", "Again, please."]}
"#;

/// Everything of a report but the journal, whose order is that of the answers, and the file of times.
fn report(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            let own = report(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes));
            files.extend(own);
        } else if name != "journal.jsonl" && name != "run.json" {
            files.insert(name, std::fs::read(&path).unwrap());
        }
    }
    files
}

fn evaluation(folder: &Path, out: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uniarm"));
    command.arg("eval").arg(folder.join("eval.toml")).arg("--out").arg(folder.join(out));
    command.args(["--in-flight", "2", "--json"]).env("UNIARM_DEMO_MODEL", demo_model());
    command.env_remove("UNIARM_ENDPOINT").stdout(Stdio::null());
    command
}

/// Kills of one evaluation.
const KILLS: usize = 10;

#[test]
fn an_evaluation_that_is_killed_at_ten_points_writes_the_bytes_of_an_undisturbed_one() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("eval.toml"), EVALUATION).unwrap();
    std::fs::write(folder.path().join("questions.jsonl"), QUESTIONS).unwrap();
    assert!(evaluation(folder.path(), "whole").status().unwrap().success());
    let whole = report(&folder.path().join("whole"));
    for expected in ["report.html", "report.json", "front.png", "mt-bench/model_answer/sharpened.jsonl"] {
        assert!(whole.contains_key(expected), "{expected} is missing in {:?}", whole.keys());
    }

    let answered = |out: &str| {
        std::fs::read(folder.path().join(out).join("journal.jsonl")).map_or(0, |text| lines(&text))
    };
    let all = answered("whole");
    let seed = u64::from(std::process::id());
    println!("kills by seed {seed}, {all} lines of journal");
    let mut kept = Vec::new();
    for kill in 0..KILLS {
        let mut life = evaluation(folder.path(), "killed").spawn().unwrap();
        let target = (1 + kill) * all / (KILLS + 2);
        while answered("killed") < target && life.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(2));
        }
        thread::sleep(Duration::from_millis(uniarm_batch::seed(seed, &[&kill.to_string()]) % 40));
        life.kill().unwrap();
        life.wait().unwrap();
        kept.push(answered("killed"));
    }
    assert!(kept[0] < all, "it was killed too late to tell anything");
    assert!(evaluation(folder.path(), "killed").status().unwrap().success());
    let continued = report(&folder.path().join("killed"));
    assert_eq!(continued.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>());
    for (name, bytes) in &whole {
        assert!(continued[name] == *bytes, "{name} differs after kills at {kept:?}");
    }
}

/// Whole ones.
fn lines(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}
