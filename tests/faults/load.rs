//! Requests of every kind, asked together, and compared with their undisturbed run.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use uniarm_proto::{ClusterClient, Event, GenerateRequest, GuidanceTerm, Transcript};

use crate::harness::request;

/// What a request may take on a busy machine, faults included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// A request that nobody takes insists for so long: both workers of a pool may be away at a time.
const PATIENCE: Duration = Duration::from_secs(60);

const PROMPTS: [&str; 6] = [
    "Tell me about the sea.",
    "List the planets and one fact about each.",
    "Wie heißt du? 你好 🙂 Answer with many emoji 🌊🐟.",
    "def fibonacci(n):",
    "My friend is sad. What can I say to cheer her up?",
    "Explain to a child why the sky is blue.",
];

/// How the requests of one run went.
#[derive(Default)]
pub struct Run {
    pub transcripts: Vec<Transcript>,
    /// Longest silence of each stream after its first event.
    pub gaps: Vec<Duration>,
}

/// Tokens that the clients of a run have received.
#[derive(Clone, Default)]
pub struct Received(Arc<AtomicUsize>);

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

/// Asks all of them, `together` at a time.
pub async fn ask_all(
    cluster: &ClusterClient,
    requests: &[GenerateRequest],
    together: usize,
    received: &Received,
) -> Run {
    let cluster = cluster.clone().with_patience(PATIENCE);
    let turns = Arc::new(tokio::sync::Semaphore::new(together));
    let mut tasks = JoinSet::new();
    for (index, request) in requests.iter().cloned().enumerate() {
        let (cluster, turns, received) = (cluster.clone(), Arc::clone(&turns), received.clone());
        tasks.spawn(async move {
            let _turn = turns.acquire_owned().await.unwrap();
            (index, ask(&cluster, request, &received).await)
        });
    }
    let mut answered = tasks.join_all().await;
    answered.sort_by_key(|(index, _)| *index);
    let (transcripts, gaps) = answered.into_iter().map(|(_, answer)| answer).unzip();
    Run { transcripts, gaps }
}

async fn ask(
    cluster: &ClusterClient,
    request: GenerateRequest,
    received: &Received,
) -> (Transcript, Duration) {
    let id = request.request_id.clone();
    let mut answers = cluster.generate(request, Some(REQUEST_TIMEOUT));
    let mut transcript = Transcript::default();
    let (mut last, mut gap) = (None, Duration::ZERO);
    while let Some(event) = answers.next().await {
        let event = event.unwrap_or_else(|status| panic!("{id}: {status}"));
        let now = Instant::now();
        gap = gap.max(last.map_or(Duration::ZERO, |last| now - last));
        last = Some(now);
        if let Event::Tokens(tokens) = &event {
            received.0.fetch_add(tokens.ids.len(), Ordering::Relaxed);
        }
        transcript.apply(&event).unwrap_or_else(|error| panic!("{id}: {error}"));
    }
    assert!(transcript.summary.is_some(), "{id} ended early");
    (transcript, gap)
}

// === impl Received ===

impl Received {
    pub async fn at_least(&self, tokens: usize) {
        while self.0.load(Ordering::Relaxed) < tokens {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

// === impl Run ===

impl Run {
    pub fn tokens(&self) -> usize {
        self.transcripts.iter().flat_map(|t| &t.choices).map(|choice| choice.tokens.len()).sum()
    }

    /// Tokens, text, details, marks and ends are those of `undisturbed`, and so is what the summary counts.
    pub fn assert_equals(&self, undisturbed: &Self, requests: &[GenerateRequest]) {
        let pairs = self.transcripts.iter().zip(&undisturbed.transcripts);
        for ((got, expected), request) in pairs.zip(requests) {
            assert_eq!(got.choices, expected.choices, "{request:?}");
            let counted = |transcript: &Transcript| {
                let usage = transcript.summary.unwrap().usage.unwrap();
                (usage.prompt_tokens, usage.completion_tokens, usage.unguided_tokens)
            };
            assert_eq!(counted(got), counted(expected), "{request:?}");
        }
    }
}
