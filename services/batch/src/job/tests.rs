//! Whole jobs over a cluster that is a function of the request, as the real one is.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::future::BoxFuture;
use uniarm_proto::{Event, GenerateRequest, Input, Priority, Refusal, pb};

use super::*;

const LINES: usize = 40;

/// Answers with the prompt and the seed. Refuses now and then, never answers a line that says so, and is gone after
/// `life` answers.
pub(crate) struct Function {
    asked: AtomicUsize,
    life: usize,
}

impl Function {
    pub(crate) fn living(life: usize) -> Self {
        Self { asked: AtomicUsize::new(0), life }
    }
}

impl Cluster for Function {
    fn answer(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Transcript, Status>> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            let Input::Chat(messages) = &request.input else { unreachable!("lines here are chats") };
            let prompt = &messages[0].content;
            // Answers do not arrive in the order of the questions.
            tokio::time::sleep(Duration::from_millis(request.sampling.seed.unwrap() % 7)).await;
            let refusal = match number {
                number if number >= self.life => Some(Refusal::unavailable("gone", "gone")),
                number if number % 5 == 2 => {
                    Some(Refusal::exhausted("base_queue_full", "full", Duration::from_millis(1)))
                }
                _ if prompt == "bad" => Some(Refusal::invalid("input.chat", "cannot be answered")),
                _ => None,
            };
            if let Some(refusal) = refusal {
                return Err(refusal.into());
            }
            let mut transcript = Transcript::default();
            let text = format!("{prompt} {:?} {:?}", request.sampling.seed, request.guidance);
            let tokens = pb::Tokens { ids: vec![1, 2], text, ..Default::default() };
            transcript.apply(&Event::Tokens(tokens)).unwrap();
            let reason = pb::FinishReason::Stop as i32;
            transcript.apply(&Event::Finished(pb::Finished { reason, ..Default::default() })).unwrap();
            Ok(transcript)
        })
    }
}

fn options(folder: &Path, output: &str) -> JobOptions {
    let input = Input::Chat(Vec::new());
    let defaults = GenerateRequest { priority: Priority::Low, ..GenerateRequest::new(input) };
    let fan_out = vec![vec![("a".to_owned(), 1.0)], vec![("a".to_owned(), 0.5), ("b".to_owned(), 0.5)]];
    let output = folder.join(output);
    JobOptions {
        source: Source::open(&[folder.join("in-*.jsonl").display().to_string()], &output).unwrap(),
        output,
        order: Order::Input,
        plan: Plan { defaults, is_raw: false, fan_out, seed: 9, only: None },
        keep_going: false,
        part: Part::default(),
        drive: DriveOptions { in_flight_max: 6, patience: Duration::from_millis(600), attempts_max: 3 },
        ends: Default::default(),
    }
}

fn write_input(folder: &Path) {
    let lines = |range: std::ops::Range<usize>| -> String {
        range.map(|index| format!("{{\"id\": \"{index}\", \"prompt\": \"question {index}\"}}\n\n")).collect()
    };
    // As some editors begin a file.
    std::fs::write(folder.join("in-0.jsonl"), format!("\u{feff}{}", lines(0..15))).unwrap();
    std::fs::write(folder.join("in-1.jsonl"), lines(15..LINES).trim_end()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_cluster_goes_away_goes_on_later_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    write_input(folder.path());
    let whole = options(folder.path(), "whole");
    let progress = run(&whole, &Function::living(usize::MAX), |_| {}).await.unwrap();
    assert_eq!((progress.done, progress.failed, progress.kept), (2 * LINES as u64, 0, 0));
    let expected = std::fs::read_to_string(&whole.output).unwrap();
    assert_eq!(expected.lines().count(), 2 * LINES);

    let lives = options(folder.path(), "lives");
    for life in [1, 13, 30] {
        let error = run(&lives, &Function::living(life), |_| {}).await.unwrap_err();
        assert!(matches!(error, JobError::Away { .. }), "{error}");
        // The last line is torn.
        let bytes = std::fs::read(&lives.output).unwrap();
        std::fs::write(&lives.output, &bytes[..]).unwrap();
        std::fs::OpenOptions::new()
            .append(true)
            .open(&lives.output)
            .unwrap()
            .set_len(bytes.len() as u64 + 3)
            .unwrap();
    }
    let progress = run(&lives, &Function::living(usize::MAX), |_| {}).await.unwrap();
    assert!(progress.kept > 20, "{progress:?}");
    assert_eq!(std::fs::read_to_string(&lives.output).unwrap(), expected);
    let asker = Function::living(0);
    run(&lives, &asker, |_| {}).await.unwrap();
    assert_eq!(asker.asked.load(Ordering::Relaxed), 0, "a finished job asks nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_one_after_the_other_are_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    write_input(folder.path());
    let whole = options(folder.path(), "whole");
    run(&whole, &Function::living(usize::MAX), |_| {}).await.unwrap();
    let mut joined = String::new();
    for index in 0..3 {
        let part = Part { index, count: 3 };
        let own = JobOptions { part, ..options(folder.path(), &format!("part-{index}")) };
        run(&own, &Function::living(usize::MAX), |_| {}).await.unwrap();
        joined += &std::fs::read_to_string(&own.output).unwrap();
    }
    assert_eq!(joined, std::fs::read_to_string(&whole.output).unwrap());
    assert_eq!("2/3".parse(), Ok(Part { index: 2, count: 3 }));
    assert!(["3/3", "0/0", "1", "-1/2", "a/b"].iter().all(|wrong| wrong.parse::<Part>().is_err()));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_lines_refuse_the_input_or_are_written_with_their_error() {
    let folder = tempfile::tempdir().unwrap();
    let input =
        "{\"prompt\": \"good\"}\n{\"prompt\": \"Hi\", \"top_pp\": 1}\nnonsense\n{\"prompt\": \"bad\"}\n";
    std::fs::write(folder.path().join("in-0.jsonl"), input).unwrap();
    let mut options = options(folder.path(), "out");
    options.plan.fan_out.clear();
    let error = run(&options, &Function::living(usize::MAX), |_| {}).await.unwrap_err().to_string();
    assert!(error.contains("in-0.jsonl:2: top_pp: is unknown; did you mean top_p?"), "{error}");
    assert!(
        error.contains("in-0.jsonl:3: is no JSON object") && error.contains("2 lines are no requests"),
        "{error}"
    );
    assert!(!options.output.exists(), "nothing was begun");
    options.keep_going = true;
    let progress = run(&options, &Function::living(usize::MAX), |_| {}).await.unwrap();
    assert_eq!((progress.done, progress.failed), (4, 3));
    let output = std::fs::read_to_string(&options.output).unwrap();
    let lines: Vec<serde_json::Value> =
        output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines[0]["text"].as_str().unwrap().starts_with("good"));
    assert_eq!(lines[1]["error"]["field"], "top_pp");
    assert_eq!((&lines[2]["id"], &lines[2]["error"]["code"]), (&"3".into(), &"invalid_argument".into()));
    assert_eq!(lines[3]["error"]["field"], "input.chat");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_or_a_flag_that_changed_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_input(folder.path());
    let mut options = options(folder.path(), "out");
    run(&options, &Function::living(20), |_| {}).await.unwrap_err();
    options.plan.seed = 10;
    let error = run(&options, &Function::living(20), |_| {}).await.unwrap_err().to_string();
    assert!(error.starts_with("what --seed says changed"), "{error}");
    options.plan.seed = 9;
    let file = folder.path().join("in-1.jsonl");
    let text = std::fs::read_to_string(&file).unwrap().replace("question 39", "question 93");
    std::fs::write(&file, text).unwrap();
    let error = run(&options, &Function::living(20), |_| {}).await.unwrap_err().to_string();
    assert!(error.starts_with("the input changed"), "{error}");
}
