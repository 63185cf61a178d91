//! The promise of the product: a token is a pure function of models, request and position. 200 mixed requests give the
//! same tokens and text alone or together, from lists or whole rows, in one process or three, with a store or
//! without, with the prefix cache or without. Fifteen clusters answer them; where the first one takes long, the others are
//! asked a share of the requests, and each line says how many.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use uniarm_cluster::testing::EtcdServer;
use uniarm_proto::{GenerateRequest, GuidanceTerm, Transcript};

use crate::harness::{Cluster, PROMPTED, ask_all, machine, request};

const REQUESTS: usize = 200;

/// Among so many there are some of every kind.
const REQUESTS_LEAST: usize = 50;

/// A cluster that takes longer for all requests is too slow to do it fifteen times within a usual run.
const PATIENCE: Duration = Duration::from_secs(30);

/// Requests under way at a time: batches of every size up to it come up.
const TOGETHER: usize = 24;

const PROMPTS: [&str; 10] = [
    "Hi!",
    "What is the capital of France and what is it famous for?",
    "Give me three reasons to get up early.",
    "Write one line about the sea.",
    "Explain to a child why the sky is blue, then tell a short story about a cloud that lost its way.",
    "My friend is sad. What can I say to cheer her up without sounding false?",
    "List the planets.",
    "Wie heißt du? 你好 🙂",
    "def fibonacci(n):",
    "I have flour, two eggs, some milk, a lemon and half a jar of honey. It is Sunday, it rains, and four people are \
     coming for tea at five o'clock. What should I bake, in which order should I do things, and what could go wrong?",
];

/// What a client sees of an answer.
type Seen = Vec<(Vec<u32>, String, i32)>;

/// The answers that all others are compared with.
struct Reference {
    answers: Vec<Seen>,
    /// The first so many requests are asked again.
    asked: usize,
}

/// Different prompts, lengths, preferences, base strengths, temperatures, seeds, filters and penalties.
fn mixed_requests() -> Vec<GenerateRequest> {
    (0..REQUESTS)
        .map(|index| {
            let weight = (index % 11) as f32 / 10.0;
            let mut request =
                request(PROMPTS[index % PROMPTS.len()], &[("positive", weight), ("concise", 1.0 - weight)]);
            let sampling = &mut request.sampling;
            sampling.temperature = [0.0, 0.7, 1.0][index % 3];
            sampling.seed = Some(1000 + index as u64);
            sampling.max_tokens = 2 + (index % 9) as u32;
            sampling.top_p = if index % 4 == 1 { 0.9 } else { 1.0 };
            sampling.top_k = if index % 10 == 3 { 40 } else { 0 };
            sampling.min_p = if index % 10 == 7 { 0.05 } else { 0.0 };
            sampling.repetition_penalty = if index % 13 == 5 { 1.2 } else { 1.0 };
            sampling.presence_penalty = if index % 17 == 4 { 0.5 } else { 0.0 };
            sampling.ignore_eos = index % 2 == 0;
            request.base_strength = if index % 7 == 6 { [0.0, 0.5, 2.0][index / 7 % 3] } else { 1.0 };
            if index % 20 == 9 {
                sampling.n = 2;
            }
            if index % 25 == 8 {
                request.guidance.clear();
                request.base_strength = 1.0;
            }
            if index % 25 == 16 {
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

async fn answers(cluster: &Cluster, requests: &[GenerateRequest], together: usize) -> Vec<Seen> {
    let inference = cluster.client().await;
    let transcripts = ask_all(&inference, requests, together).await;
    transcripts.iter().map(seen).collect()
}

fn seen(transcript: &Transcript) -> Seen {
    let of = |choice: &uniarm_proto::ChoiceTranscript| {
        let reason = choice.finished.as_ref().expect("every answer ends").reason;
        (choice.tokens.clone(), choice.text.clone(), reason)
    };
    transcript.choices.iter().map(of).collect()
}

/// The answers of one process in lock-step, many requests together. Computed once. All other clusters are at their
/// default, which drafts where it is worth it.
fn reference() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        let cluster = Cluster::up(&[&PROMPTED[..], &["--draft-window", "0"]].concat());
        let began = Instant::now();
        let answers = block_on(answers(&cluster, &mixed_requests(), TOGETHER));
        assert!(answers.iter().flatten().all(|(tokens, ..)| !tokens.is_empty()));
        let share = PATIENCE.as_secs_f64() / began.elapsed().as_secs_f64();
        let asked = ((REQUESTS as f64 * share) as usize).clamp(REQUESTS_LEAST, REQUESTS);
        Reference { answers, asked }
    })
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// Compares with the reference, request by request.
fn assert_identical(cluster: &Cluster, together: usize) {
    let Reference { answers: expected, asked } = reference();
    let requests = &mixed_requests()[..*asked];
    let began = Instant::now();
    let got = block_on(answers(cluster, requests, together));
    let took = began.elapsed().as_secs_f64();
    println!("{asked} of {REQUESTS} requests, {together} together: {took:.1} s");
    assert_eq!(got.len(), *asked);
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got, expected, "request {index}: {:?}", requests[index]);
    }
}

#[test]
fn alone_equals_together() {
    let _machine = machine();
    reference();
    assert_identical(&Cluster::up(&PROMPTED), 1);
}

#[test]
fn whole_rows_equal_certified_lists() {
    let _machine = machine();
    reference();
    assert_identical(&Cluster::up(&[&PROMPTED[..], &["--exchange", "dense"]].concat()), TOGETHER);
    // Lists so short that most tokens need a query.
    assert_identical(&Cluster::up(&[&PROMPTED[..], &["--list-length", "2"]].concat()), TOGETHER);
}

#[test]
fn drafts_of_one_row_and_of_two_equal_lock_step() {
    let _machine = machine();
    reference();
    for rows in ["single", "dual"] {
        let drafting = ["--draft-window", "6", "--draft-rows", rows];
        let cluster = Cluster::up(&[&PROMPTED[..], &drafting].concat());
        assert_identical(&cluster, TOGETHER);
        let (passes, tokens) = ("uniarm_base_steps_total", "uniarm_base_drafts_total");
        assert!(cluster.base().metric(tokens) > 100.0, "nothing was drafted");
        println!("{rows}: {} passes", cluster.base().metric(passes));
    }
    // A small cache: drafts, and the second sequences that make them better, are preempted too.
    let starved =
        ["--draft-window", "6", "--draft-rows", "dual", "--kv-tokens", "960", "--step-tokens", "48"];
    assert_identical(&Cluster::up(&[&PROMPTED[..], &starved].concat()), TOGETHER);
}

#[test]
fn both_roles_in_one_pass_equal_two() {
    let _machine = machine();
    reference();
    assert_identical(&Cluster::up(&[&PROMPTED[..], &["--fused"]].concat()), TOGETHER);
    assert_identical(&Cluster::fused_processes(&PROMPTED), TOGETHER);
}

#[test]
fn three_processes_equal_one() {
    let _machine = machine();
    reference();
    assert_identical(&Cluster::three_processes(&[], &PROMPTED), TOGETHER);
}

#[test]
fn no_prefix_cache_and_a_starved_cache_equal_the_default() {
    let _machine = machine();
    reference();
    assert_identical(&Cluster::up(&[&PROMPTED[..], &["--no-prefix-cache"]].concat()), TOGETHER);
    // Room for a few sequences only: preemption and recomputation; small steps: prompts in many chunks.
    let starved = ["--kv-tokens", "640", "--step-tokens", "48", "--threads", "2"];
    assert_identical(&Cluster::up(&[&PROMPTED[..], &starved].concat()), TOGETHER);
}

#[test]
fn members_of_an_etcd_store_equal_fixed_peers() {
    let _machine = machine();
    let Some(etcd) = EtcdServer::start() else { return };
    reference();
    assert_identical(&Cluster::through_store(&etcd.address(), &[], &PROMPTED), TOGETHER);
}

#[test]
fn a_base_worker_of_several_processes_equals_one() {
    let _machine = machine();
    reference();
    // Three key-value heads: four ranks hold one of them twice.
    for size in [2, 4] {
        let cluster = Cluster::sharded(size, &PROMPTED);
        assert_identical(&cluster, TOGETHER);
        let metric = |name: &str| cluster.base().metric(name);
        let [rows, lists] =
            ["row", "list"].map(|form| metric(&format!("uniarm_base_positions_total{{form=\"{form}\"}}")));
        let [fetched, repeated] = ["fetched", "repeated"]
            .map(|way| metric(&format!("uniarm_base_undecided_lists_total{{way=\"{way}\"}}")));
        let bytes = metric("uniarm_base_gathered_bytes_total");
        println!(
            "{size} ranks: {rows} rows, {lists} lists ({fetched} rows fetched after them, {repeated} computed again), \
             {bytes} bytes gathered"
        );
        // Some of the requests have filters, and get rows.
        assert!(lists > 0.0 && fetched + repeated < lists / 2.0, "{lists} lists, {rows} rows");
    }
}
