//! Jobs over a cluster that is a function of the request, as the real one is.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use uniarm_proto::{Event, Refusal};

use super::*;

/// Answers with the prompt and the seed; refuses every third time, as a full cluster does; dies after `life` answers.
struct Function {
    asked: AtomicUsize,
    life: usize,
}

impl Function {
    fn living(life: usize) -> Self {
        Self { asked: AtomicUsize::new(0), life }
    }
}

impl Cluster for Function {
    fn answer(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Transcript, Status>> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            let Input::Chat(messages) = &request.input else { unreachable!("jobs ask with chats") };
            let prompt = &messages[0].content;
            if number >= self.life {
                return Err(Refusal::internal("killed").into());
            }
            if number % 3 == 2 {
                let delay = Duration::from_millis(1);
                return Err(Refusal::exhausted("base_queue_full", "full", delay).into());
            }
            // Answers do not arrive in the order of the questions.
            tokio::time::sleep(Duration::from_millis(prompt.len() as u64 % 5)).await;
            let mut transcript = Transcript::default();
            let text = format!("{prompt}\n{:?}", request.sampling.seed);
            let tokens = pb::Tokens { ids: vec![1; prompt.len()], text, ..Default::default() };
            transcript.apply(&Event::Tokens(tokens)).unwrap();
            let reason = pb::FinishReason::Stop as i32;
            transcript.apply(&Event::Finished(pb::Finished { reason, ..Default::default() })).unwrap();
            Ok(transcript)
        })
    }
}

fn questions(count: usize) -> Vec<Question> {
    let question = |index: usize| {
        // Every fourth one repeats the one before.
        let index = if index % 4 == 3 { index - 1 } else { index };
        let message = ChatMessage { role: "user".into(), content: "x".repeat(index + 1) };
        let sampling = Sampling { seed: Some(seed(1, &[&index.to_string()])), ..Sampling::default() };
        let request = chat_request(vec![message], sampling);
        Question { key: Key::new(&request, "models"), request, origin: format!("line {index}") }
    };
    (0..count).map(question).collect()
}

fn options() -> JobOptions {
    JobOptions { in_flight_max: 5, progress: false, patience: Duration::from_secs(20) }
}

#[tokio::test]
async fn a_job_killed_anywhere_and_continued_ends_with_the_same_answers() {
    let folder = tempfile::tempdir().unwrap();
    let questions = questions(24);
    let mut whole = Journal::open(&folder.path().join("whole.jsonl")).unwrap();
    let expected = run(&questions, &mut whole, &Function::living(usize::MAX), &options()).await.unwrap();
    for life in [1, 4, 9, 17] {
        let path = folder.path().join(format!("{life}.jsonl"));
        let mut journal = Journal::open(&path).unwrap();
        let error = run(&questions, &mut journal, &Function::living(life), &options()).await.unwrap_err();
        assert!(matches!(error, JobError::Refused { .. }), "{error}");
        let kept = journal.len();
        drop(journal);
        // The last line is torn, as a power cut leaves it, and a byte of the first one has changed.
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len().saturating_sub(3));
        if let Some(byte) = bytes.get_mut(40) {
            *byte ^= 1;
        }
        std::fs::write(&path, bytes).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert!(journal.len() <= kept.saturating_sub(1), "{} of {kept}", journal.len());
        let asker = Function::living(usize::MAX);
        let answers = run(&questions, &mut journal, &asker, &options()).await.unwrap();
        assert_eq!(answers, expected);
    }
}

#[tokio::test]
async fn equal_questions_are_asked_once_and_a_finished_job_asks_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let questions = questions(8);
    let asker = Function::living(usize::MAX);
    let mut journal = Journal::open(&path).unwrap();
    run(&questions, &mut journal, &asker, &options()).await.unwrap();
    assert_eq!(journal.len(), 6);
    assert!(matches!(Journal::open(&path), Err(JournalError::Busy { .. })));
    let asked = asker.asked.load(Ordering::Relaxed);
    run(&questions, &mut journal, &asker, &options()).await.unwrap();
    assert_eq!(asker.asked.load(Ordering::Relaxed), asked);
}

#[test]
fn a_key_depends_on_request_and_weights_and_on_nothing_else() {
    let questions = questions(2);
    let renamed = GenerateRequest { request_id: "other".into(), ..questions[0].request.clone() };
    assert_eq!(Key::new(&renamed, "models"), questions[0].key);
    assert_ne!(Key::new(&renamed, "retrained"), questions[0].key);
    assert_ne!(questions[0].key, questions[1].key);
}
