//! A worker of several processes: what each holds, what is refused, and what the loss of one costs.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use tonic::{Request, transport::Channel};
use uniarm_cluster::testing::EtcdServer;
use uniarm_proto::{
    Event, GenerateRequest, Transcript,
    pb::{self, inference_client::InferenceClient},
};

use crate::harness::{
    PROMPTED, Running, ask_all, borrowed, demo_model, free_address, knows_its_workers, machine, ranks,
    repository, request, worker,
};

/// A record of a process that was killed stays for so long.
const LEASE: [&str; 2] = ["--lease-ttl", "2"];

/// From the start of the processes that ended to a group that serves. The goal is 5 s, on a machine that does nothing
/// else.
const BACK_WITHIN: Duration = Duration::from_secs(10);

/// A rank without its part of the weights: the tokenizer, the runtime, and the first huge page of the cache in each of 30
/// layers.
const APART_FROM_WEIGHTS_MIB: f64 = 96.0;

fn long_requests() -> Vec<GenerateRequest> {
    let prompts = ["Tell me about the sea.", "List the planets.", "Write a story about a cloud.", "Hi!"];
    let long = |(index, prompt): (usize, &&str)| {
        let weight = index as f32 / 3.0;
        let mut long = request(prompt, &[("positive", weight), ("concise", 1.0 - weight)]);
        long.sampling.temperature = [0.0, 1.0][index % 2];
        long.sampling.seed = Some(50 + index as u64);
        long.sampling.max_tokens = 96;
        long.sampling.ignore_eos = true;
        long
    };
    prompts.iter().enumerate().map(long).collect()
}

/// Asks all at once, and does something once each has `tokens` events of its answer.
async fn ask_while(
    inference: &InferenceClient<Channel>,
    requests: &[GenerateRequest],
    tokens: usize,
    disturb: impl FnOnce() + Send + 'static,
) -> Vec<Transcript> {
    let (begun, mut begins) = mpsc::channel(requests.len());
    let tasks: Vec<_> = requests
        .iter()
        .cloned()
        .map(|request| {
            let (mut inference, begun) = (inference.clone(), begun.clone());
            tokio::spawn(async move {
                let request = Request::new(pb::GenerateRequest::from(request));
                let mut events = inference.generate(request).await.unwrap().into_inner();
                let (mut transcript, mut received) = (Transcript::default(), 0);
                while let Some(response) = events.message().await.unwrap() {
                    let event = response.event.expect("an event");
                    received += usize::from(matches!(event, Event::Tokens(_)));
                    transcript.apply(&event).expect("in order");
                    if received == tokens {
                        let _ = begun.try_send(());
                        received += 1;
                    }
                }
                assert!(transcript.summary.is_some(), "the stream ended early");
                transcript
            })
        })
        .collect();
    for _ in requests {
        begins.recv().await.unwrap();
    }
    tokio::task::spawn_blocking(disturb).await.unwrap();
    let mut transcripts = Vec::new();
    for task in tasks {
        transcripts.push(task.await.unwrap());
    }
    transcripts
}

fn seen(transcripts: &[Transcript]) -> Vec<Vec<(Vec<u32>, String)>> {
    let answers = |transcript: &Transcript| {
        transcript.choices.iter().map(|choice| (choice.tokens.clone(), choice.text.clone())).collect()
    };
    transcripts.iter().map(answers).collect()
}

pub fn start_all(role: &str, flags: &[Vec<String>]) -> Vec<Running> {
    thread::scope(|scope| {
        let starting: Vec<_> =
            flags.iter().map(|flags| scope.spawn(move || worker(role, &borrowed(flags)))).collect();
        starting.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Kills one rank of two, waits until rank 0 has ended, and starts what ended; returns how long that start took.
fn kill_and_start_again(ranks: &mut [Running], killed: usize) -> Duration {
    ranks[killed].kill();
    let noticed = Instant::now();
    while killed > 0 && ranks[0].is_alive() {
        assert!(noticed.elapsed() < BACK_WITHIN, "rank 0 does not notice that rank {killed} is lost");
        thread::sleep(Duration::from_millis(10));
    }
    println!("rank {killed} killed; rank 0 ended {:?} later", noticed.elapsed());
    let began = Instant::now();
    thread::scope(|scope| {
        for (rank, running) in ranks.iter_mut().enumerate() {
            if rank == 0 || rank == killed {
                scope.spawn(|| running.restart());
            }
        }
    });
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_outlive_any_rank() {
    let _machine = machine();
    let Some(etcd) = EtcdServer::start() else { return };
    let address = etcd.address();
    let store = [&["--store", &address][..], &LEASE].concat();
    // They find each other through the store.
    let mut ranks = start_all("base", &ranks(2, &store));
    let _reward = worker("reward", &[&store, &PROMPTED[..]].concat());
    let router = Running::start("router", &store);
    let inference = knows_its_workers(&router.address).await;
    let requests = long_requests();
    let undisturbed = seen(&ask_all(&inference, &requests, requests.len()).await);

    for (killed, tokens) in [(1, 1), (0, 7), (1, 30)] {
        let disturb = move || {
            let took = kill_and_start_again(&mut ranks, killed);
            println!("rank {killed} killed at token {tokens}: the group was back {took:?} after the restart");
            assert!(took < BACK_WITHIN, "{took:?}");
            ranks
        };
        let (back, returned) = std::sync::mpsc::channel();
        let answered = ask_while(&inference, &requests, tokens, move || back.send(disturb()).unwrap()).await;
        assert!(seen(&answered) == undisturbed, "rank {killed} killed at token {tokens}");
        ranks = returned.recv().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_in_stages_answers_as_one_process_and_its_streams_outlive_it() {
    let _machine = machine();
    let Some(etcd) = EtcdServer::start() else { return };
    let address = etcd.address();
    let store = [&["--store", &address][..], &LEASE].concat();
    let _reward = worker("reward", &[&store, &PROMPTED[..]].concat());
    let router = Running::start("router", &store);
    let requests = long_requests();
    let whole = worker("base", &[&store[..], &["--threads", "1"]].concat());
    let inference = knows_its_workers(&router.address).await;
    let expected = seen(&ask_all(&inference, &requests, requests.len()).await);
    drop(whole);

    // Two stages of two ranks each.
    let mut ranks = start_all("base", &ranks(4, &[&store[..], &["--stages", "2"]].concat()));
    let disturb = move || {
        let took = kill_and_start_again(&mut ranks, 3);
        assert!(took < BACK_WITHIN, "{took:?}");
        ranks
    };
    let (back, returned) = std::sync::mpsc::channel();
    let answered = ask_while(&inference, &requests, 7, move || back.send(disturb()).unwrap()).await;
    assert!(seen(&answered) == expected, "a rank of the last stage killed at token 7");
    drop(returned.recv().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reward_worker_of_several_processes_steers_as_one() {
    let _machine = machine();
    let adapter = format!("shipped={}", repository().join("adapters/positive-concise").display());
    let (meeting, requests) = (free_address(), long_requests());
    // In lock-step, where its ranks hand over lists.
    let base = worker("base", &["--threads", "1", "--draft-window", "0"]);
    let steered = async |rewards: &[Running]| {
        let peers = ["--base-peer", &base.address, "--reward-peer", &rewards[0].address];
        let router = Running::start("router", &peers);
        let inference = knows_its_workers(&router.address).await;
        seen(&ask_all(&inference, &requests, requests.len()).await)
    };
    let one = steered(&[worker("reward", &["--adapter", &adapter])]).await;
    let flags = ranks(3, &["--group-address", &meeting, "--adapter", &adapter]);
    let group = start_all("reward", &flags);
    assert!(steered(&group).await == one);
    let lists = group[0].metric("uniarm_reward_positions_total{form=\"list\"}");
    assert!(lists >= 100.0, "{lists} positions came as lists");
}

/// Memory of a process that no file stands behind, in MiB.
fn own_memory(process: &Running) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

#[test]
fn each_rank_holds_its_part_of_the_weights_and_no_more() {
    let _machine = machine();
    let weights = 96_436_224.0 / f64::from(1 << 20);
    let alone = worker("base", &["--threads", "1"]);
    println!("one process: {:.0} MiB of its own, weights {weights:.0}", own_memory(&alone));
    drop(alone);
    for size in [2, 4] {
        let meeting = free_address();
        let group = start_all("base", &ranks(size, &["--group-address", &meeting]));
        let memory: Vec<f64> = group.iter().map(own_memory).collect();
        println!("{size} ranks: {memory:.0?} MiB");
        let most = weights / size as f64 * 1.1 + APART_FROM_WEIGHTS_MIB;
        assert!(memory.iter().all(|memory| *memory < most), "{memory:?} are over {most}");
    }
}

#[test]
fn a_group_that_cannot_be_is_refused_with_a_sentence() {
    let meeting = free_address();
    let refused = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_uniarm"))
            .args(["base", "--model", demo_model(), "--group-address", &meeting])
            .args(flags)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{flags:?} started");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let heads = refused(&["--group", "g0", "--rank", "0", "--size", "10"]);
    assert!(heads.contains("10 ranks share this model's 9 query heads"), "{heads}");
    let fused = refused(&["--group", "g0", "--rank", "0", "--size", "2", "--fused-reward"]);
    assert!(fused.contains("--fused-reward does not go with --group"), "{fused}");
    let seat = refused(&["--group", "g0", "--rank", "3", "--size", "2"]);
    assert!(seat.contains("--rank 3 is not in 0..2"), "{seat}");
}
