//! Requests of every kind, asked together, and compared with their undisturbed run.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use uniarm_proto::{ClusterClient, GenerateRequest, GuidanceTerm, Transcript};

use crate::harness::request;

/// What a request may take on a busy machine, faults included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// A request that nobody takes insists for so long: both workers of a pool may be away at a time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A silence that is shorter may be a full batch on a busy machine.
const SILENCE_LEAST: Duration = Duration::from_millis(400);

const PROMPTS: [&str; 6] = [
    "Tell me about the sea.",
    "List the planets and one fact about each.",
    "Wie heißt du? 你好 🙂 Answer with many emoji 🌊🐟.",
    "def fibonacci(n):",
    "My friend is sad. What can I say to cheer her up?",
    "Explain to a child why the sky is blue.",
];

/// One answered request.
pub struct Answered {
    /// Which of the requests it was.
    pub index: usize,
    pub transcript: Transcript,
    pub silences: Vec<Silence>,
}

/// A stream said nothing for a while after its first event.
#[derive(Debug, Clone, Copy)]
pub struct Silence {
    pub from: Instant,
    pub until: Instant,
}

/// Requests that hold every kind of state that has to move: penalties, several answers, stop strings, unfinished
/// characters, log-probabilities, one term and several.
pub fn mixed_requests(count: usize, tokens: u32) -> Vec<GenerateRequest> {
    (0..count)
        .map(|index| {
            let weight = (index % 5) as f32 / 4.0;
            let preference = [("positive", weight), ("concise", 1.0 - weight)];
            let mut request = request(PROMPTS[index % PROMPTS.len()], &preference);
            request.request_id = format!("load-{index}");
            let sampling = &mut request.sampling;
            sampling.seed = Some(index as u64);
            sampling.temperature = [1.0, 0.0, 0.8][index % 3];
            sampling.max_tokens = tokens;
            sampling.ignore_eos = index % 4 != 3;
            sampling.n = if index % 6 == 5 { 2 } else { 1 };
            sampling.top_p = if index % 5 == 2 { 0.9 } else { 1.0 };
            sampling.repetition_penalty = if index % 4 == 1 { 1.2 } else { 1.0 };
            sampling.presence_penalty = if index % 4 == 2 { 0.7 } else { 0.0 };
            sampling.frequency_penalty = if index % 7 == 2 { 0.3 } else { 0.0 };
            sampling.logprobs = (index % 6 == 1).then_some(2);
            if index % 3 == 1 {
                // The first is held back often, the second ends some answers.
                sampling.stop = vec!["the sea is the".into(), "!!".into()];
            }
            if index % 8 == 6 {
                request.guidance.clear();
            }
            if index % 8 == 3 {
                let preference = vec![("positive".to_owned(), 1.0)];
                request.guidance = vec![
                    GuidanceTerm { reward: "positive".into(), preference, strength: 0.8 },
                    GuidanceTerm { reward: "concise".into(), preference: Vec::new(), strength: -0.3 },
                ];
            }
            request
        })
        .collect()
}

/// Asks each of them once, `together` at a time.
pub async fn ask_all(
    cluster: &ClusterClient,
    requests: &[GenerateRequest],
    together: usize,
) -> Vec<Answered> {
    let count = requests.len();
    ask_while(cluster, requests, together, move |started| started < count).await
}

/// Asks them in turn, over and over, `together` at a time, while `go_on` says so of the number of requests so far.
pub async fn ask_while(
    cluster: &ClusterClient,
    requests: &[GenerateRequest],
    together: usize,
    go_on: impl Fn(usize) -> bool + Clone + Send + 'static,
) -> Vec<Answered> {
    let cluster = cluster.clone().with_patience(PATIENCE);
    let requests: Arc<[GenerateRequest]> = requests.into();
    let turn = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..together {
        let (cluster, requests) = (cluster.clone(), Arc::clone(&requests));
        let (turn, go_on) = (Arc::clone(&turn), go_on.clone());
        clients.spawn(async move {
            let mut answered = Vec::new();
            loop {
                let started = turn.fetch_add(1, Ordering::Relaxed);
                if !go_on(started) {
                    return answered;
                }
                let index = started % requests.len();
                let (transcript, silences) = ask(&cluster, requests[index].clone()).await;
                answered.push(Answered { index, transcript, silences });
            }
        });
    }
    let mut answered: Vec<Answered> = clients.join_all().await.into_iter().flatten().collect();
    answered.sort_by_key(|answered| answered.index);
    answered
}

async fn ask(cluster: &ClusterClient, request: GenerateRequest) -> (Transcript, Vec<Silence>) {
    let id = request.request_id.clone();
    let mut answers = cluster.generate(request, Some(REQUEST_TIMEOUT));
    let mut transcript = Transcript::default();
    let (mut last, mut silences) = (None, Vec::new());
    while let Some(event) = answers.next().await {
        let event = event.unwrap_or_else(|status| panic!("{id}: {status}"));
        let until = Instant::now();
        let from = last.replace(until).unwrap_or(until);
        if until - from > SILENCE_LEAST {
            silences.push(Silence { from, until });
        }
        // Refuses tokens that are missing, and tokens that are there twice.
        transcript.apply(&event).unwrap_or_else(|error| panic!("{id}: {error}"));
    }
    assert!(transcript.summary.is_some(), "{id} ended early");
    (transcript, silences)
}

/// Tokens, text, details, marks and ends are those of the undisturbed run, and so is what the summary counts.
pub fn assert_undisturbed(got: &[Answered], undisturbed: &[Answered], requests: &[GenerateRequest]) {
    for Answered { index, transcript, .. } in got {
        let (expected, request) = (&undisturbed[*index].transcript, &requests[*index]);
        assert_eq!(transcript.choices, expected.choices, "{request:?}");
        let counted = |transcript: &Transcript| {
            let usage = transcript.summary.as_ref().unwrap().usage.unwrap();
            (usage.prompt_tokens, usage.completion_tokens, usage.unguided_tokens)
        };
        assert_eq!(counted(transcript), counted(expected), "{request:?}");
    }
}
