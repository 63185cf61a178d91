//! Batches as a stranger runs them: one command, killed again and again, given again.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use crate::harness::{Cluster, PROMPTED, machine};

const LINES: usize = 24;

/// Kills of one job.
const KILLS: u64 = 4;

fn batch(cluster: &Cluster, folder: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uniarm"));
    command.arg("batch").args(flags).current_dir(folder);
    command.args(["--endpoint", &format!("http://{}", cluster.router.address), "--max-tokens", "12"]);
    command
}

fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn json_lines(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A third of the lines each as short lines, lines with their own guidance, and OpenAI's.
fn mixed_lines() -> String {
    let line = |index: usize| match index % 3 {
        0 => format!("{{\"id\": {index}, \"prompt\": \"Name a thing that weighs {index} pounds.\"}}\n"),
        1 => format!(
            "{{\"id\": {index}, \"prompt\": \"Tell me about {index}.\", \"preference\": {{\"positive\": 0.6, \"concise\": 0.4}}}}\n"
        ),
        _ => format!(
            "{{\"custom_id\": \"r{index}\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\": {{\
             \"messages\": [{{\"role\": \"user\", \"content\": \"Say {index}.\"}}], \"max_tokens\": {}, \"logprobs\": true, \
             \"guidance\": {{\"preference\": {{\"concise\": 1}}, \"strength\": 0.5}}}}}}\n",
            4 + index
        ),
    };
    (0..LINES).map(line).collect()
}

#[test]
fn batches_are_exact_resumable_and_say_what_is_wrong() {
    let _machine = machine();
    let cluster = Cluster::up(&PROMPTED);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("in.jsonl"), mixed_lines()).unwrap();
    killed_again_and_again_it_writes_the_bytes_of_an_undisturbed_job(&cluster, folder);
    openais_lines_are_answered_in_openais_shape(&read(folder, "whole.jsonl"));
    a_grid_asks_each_line_under_each_preference(&cluster, folder);
    wrong_lines_are_named_before_anything_is_asked(&cluster, folder);
}

fn killed_again_and_again_it_writes_the_bytes_of_an_undisturbed_job(cluster: &Cluster, folder: &Path) {
    done(batch(cluster, folder, &["in.jsonl", "--output", "whole.jsonl"]));
    let whole = read(folder, "whole.jsonl");
    assert_eq!(whole.lines().count(), LINES);
    let seed = u64::from(std::process::id());
    println!("kills by seed {seed}");
    let flags = ["in.jsonl", "--output", "killed.jsonl", "--in-flight", "3"];
    let written =
        || std::fs::read_to_string(folder.join("killed.jsonl")).map_or(0, |text| text.lines().count());
    let mut kept: Vec<usize> = Vec::new();
    for kill in 0..KILLS {
        let mut job = batch(cluster, folder, &flags).stdout(Stdio::null()).spawn().unwrap();
        // However slow the machine is, something is written before each kill.
        while written() <= kept.last().copied().unwrap_or(0) && job.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(uniarm_batch::seed(seed, &[&kill.to_string()]) % 100));
        job.kill().unwrap();
        job.wait().unwrap();
        kept.push(written());
    }
    println!("lines after each kill: {kept:?}");
    assert!(kept[0] < LINES, "no kill met a running job");
    // A power cut may tear the last line too; not of a job that has ended, which says so only once its lines are safe.
    if kept[kept.len() - 1] < LINES {
        let torn = std::fs::read(folder.join("killed.jsonl")).unwrap();
        std::fs::write(folder.join("killed.jsonl"), &torn[..torn.len().saturating_sub(5)]).unwrap();
    }
    let events = done(batch(cluster, folder, &[&flags[..], &["--json"]].concat()));
    let events = json_lines(&String::from_utf8(events.stdout).unwrap());
    let end = events.last().unwrap();
    assert_eq!((&end["event"], &end["done"], &end["failed"]), (&"end".into(), &LINES.into(), &0.into()));
    assert!(
        read(folder, "killed.jsonl") == whole,
        "it differs from the undisturbed one after kills at {kept:?}"
    );
    std::fs::write(folder.join("in.jsonl"), mixed_lines().replace("Say 5.", "Say 6.")).unwrap();
    let refused = batch(cluster, folder, &flags).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the input changed"), "{refused:?}");
}

fn openais_lines_are_answered_in_openais_shape(output: &str) {
    let lines = json_lines(output);
    let line = &lines[5];
    assert_eq!((&line["custom_id"], &line["error"]), (&"r5".into(), &serde_json::Value::Null));
    let body = &line["response"]["body"];
    assert_eq!((&line["response"]["status_code"], &body["object"]), (&200.into(), &"chat.completion".into()));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().unwrap()));
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    let said: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(!text.is_empty() && said.starts_with(text), "{said:?} and {text:?}");
    assert_eq!(body["usage"]["completion_tokens"], tokens.len());
}

fn a_grid_asks_each_line_under_each_preference(cluster: &Cluster, folder: &Path) {
    std::fs::write(
        folder.join("two.jsonl"),
        "{\"prompt\": \"Describe the sea.\"}\n{\"prompt\": \"Describe a forest.\"}\n",
    )
    .unwrap();
    let flags = ["two.jsonl", "--output", "grid.jsonl.gz", "--preferences", "grid:0.5", "--as-finished"];
    done(batch(cluster, folder, &flags));
    let compressed = std::fs::File::open(folder.join("grid.jsonl.gz")).unwrap();
    let output = Command::new("gzip").arg("-dc").stdin(compressed).output().unwrap();
    let lines = json_lines(&String::from_utf8(output.stdout).unwrap());
    let mut asked: Vec<(String, String)> = lines
        .iter()
        .map(|line| (line["id"].as_str().unwrap().to_owned(), line["preference"]["concise"].to_string()))
        .collect();
    asked.sort_unstable();
    let expected =
        ["1", "2"].map(|id| ["0.0", "0.5", "1.0"].map(|weight| (id.to_owned(), weight.to_owned())));
    assert_eq!(asked, expected.concat());
}

fn wrong_lines_are_named_before_anything_is_asked(cluster: &Cluster, folder: &Path) {
    let lines = "{\"prompt\": \"Hi\", \"max_tokens\": \"many\"}\n{\"prompt\": \"Hi\", \"preference\": {\"concize\": 1}}\n";
    std::fs::write(folder.join("wrong.jsonl"), lines).unwrap();
    let refused = batch(cluster, folder, &["wrong.jsonl", "--output", "wrong.out"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success()
            && said.contains("wrong.jsonl:1: max_tokens: is a string, wants a whole number"),
        "{said}"
    );
    assert!(!folder.join("wrong.out").exists());
    // What only the cluster can know fails its own line.
    let flags = ["wrong.jsonl", "--output", "wrong.out", "--keep-going"];
    let failed = batch(cluster, folder, &flags).output().unwrap();
    assert!(String::from_utf8_lossy(&failed.stderr).contains("2 of 2 requests have no answer"), "{failed:?}");
    let errors = json_lines(&read(folder, "wrong.out"));
    assert_eq!((&errors[0]["error"]["field"], &errors[1]["id"]), (&"max_tokens".into(), &"2".into()));
    assert!(errors[1]["error"]["message"].as_str().unwrap().contains("concise"), "{}", errors[1]);
}
