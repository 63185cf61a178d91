//! A whole cluster in virtual time, under thousands of schedules of faults: every stream is what it would have been.
//!
//! Real: `ClusterClient`, the router, base and reward workers with their engines, gRPC and HTTP/2 as tonic and hyper speak
//! them with their timeouts and signs of life, the memory store. Modelled: the wire (`network`), who accepts connections
//! (`server`), what a process sees of the store (`watchers`) and the life of its record (`cluster`), the model's
//! arithmetic and the time that it takes (`model`).
//!
//! One thread, one clock that jumps to the next timer, and all randomness from the seed: a schedule that fails prints
//! and can be run again (`tests/schedules.rs`). Nothing here may ask what tokio draws from a generator of its own that
//! cannot be seeded: `select!` is `biased`, a `watch` channel has one waiting receiver, and the servers are `server`'s.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

mod cluster;
mod hang_up;
mod model;
mod network;
mod overload;
mod repeats;
mod requests;
mod schedule;
mod server;
mod silence;
mod watchers;

use std::{sync::Arc, time::Duration};

use cluster::{Cluster, Shape};
pub use hang_up::HungUp;
pub use overload::Overload;
use requests::Client;
pub use schedule::Schedule;
use tokio::{
    runtime::{Builder, Runtime},
    time::{Instant, sleep, timeout},
};
use tonic::Status;
use uniarm_proto::{
    GenerateRequest, OnRewardLoss, Transcript,
    refusal::{DEADLINE_UNMEETABLE, REWARD_LOST, cause_of},
};

/// How long a request insists on being taken, and longer than any fault of a schedule together with what it takes to
/// notice it.
const PATIENCE: Duration = Duration::from_secs(60);

/// No request takes longer than this in virtual time, or it hangs.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// A client knows its own deadline: it ends what nobody else does.
const DEADLINE_GRACE: Duration = Duration::from_millis(50);

/// Events that a client may have when its deadline passes, and rests after each of them.
const EVENTS_MAX: u32 = 256;

/// Within this after the last answer everything has been given back: servers notice lost peers by then.
const QUIET_WITHIN: Duration = Duration::from_secs(30);
const QUIET_POLL: Duration = Duration::from_millis(600);

/// What one schedule did.
pub struct Outcome {
    /// Equal for two runs of one seed.
    pub trace: u64,
    /// Sentences; none: all is well.
    pub failures: Vec<String>,
}

/// Requests, and how an undisturbed cluster answers them.
pub struct Pool {
    requests: Vec<GenerateRequest>,
    undisturbed: Vec<Transcript>,
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

// === impl Pool ===

impl Pool {
    #[allow(clippy::new_without_default)] // it takes a while
    pub fn new() -> Self {
        let requests = requests::pool();
        let undisturbed = runtime().block_on(async {
            let cluster = Cluster::start(Shape::UNDISTURBED, 0).await;
            let client = cluster.client("client");
            let mut answers = Vec::new();
            for request in &requests {
                answers.push(client.complete(request.clone(), None).await.unwrap());
            }
            answers
        });
        Self { requests, undisturbed }
    }

    /// Runs a schedule to its end, and says what should not have been.
    pub fn run(&self, schedule: &Schedule) -> Outcome {
        let runtime = runtime();
        let (trace, mut failures) = runtime.block_on(self.live(schedule));
        // Everything is gone: what still waits for something would wait for ever.
        runtime.block_on(async { sleep(QUIET_WITHIN).await });
        let left = runtime.metrics().num_alive_tasks();
        if left > 0 {
            failures.push(format!("{left} tasks are left when all processes have ended"));
        }
        Outcome { trace, failures }
    }

    async fn live(&self, schedule: &Schedule) -> (u64, Vec<String>) {
        let cluster = Arc::new(Cluster::start(schedule.shape, schedule.seed).await);
        let faults: Vec<_> = schedule
            .faults
            .iter()
            .cloned()
            .map(|(at, fault)| {
                let cluster = Arc::clone(&cluster);
                tokio::spawn(async move {
                    sleep(at).await;
                    fault.strike(&cluster).await;
                })
            })
            .collect();
        let clients = schedule
            .clients
            .iter()
            .enumerate()
            .map(|(index, client)| self.ask(&cluster, format!("client-{index}"), client));
        let answered = futures_util::future::join_all(clients).await;
        let mut failures: Vec<String> = answered.into_iter().filter_map(Result::err).collect();
        for fault in faults {
            fault.await.unwrap();
        }
        failures.extend(quiet(&cluster).await);
        let trace = cluster.network.trace();
        Arc::into_inner(cluster).unwrap().shut_down().await;
        (trace, failures)
    }

    /// One client and its request: what it got is what it would have got undisturbed, as far as it came.
    async fn ask(&self, cluster: &Cluster, name: String, client: &Client) -> Result<(), String> {
        let request = &self.requests[client.asked];
        let router = cluster.client(&name).with_patience(PATIENCE);
        sleep(client.begins).await;
        let began = Instant::now();
        let mut transcript = Transcript::default();
        let ended = timeout(ANSWER_WITHIN, follow(router, request.clone(), client, &mut transcript)).await;
        let named = |what: String| format!("{name} ({}): {what}", request.request_id);
        for (number, choice) in transcript.choices.iter().enumerate() {
            requests::check_answer(request, number, choice, &self.undisturbed[client.asked])
                .map_err(named)?;
        }
        match ended {
            Err(_) => Err(named("no end".to_owned())),
            Ok(Err(status)) => check_end(request, client, began.elapsed(), &status).map_err(named),
            Ok(Ok(())) if client.hangs_up_after.is_some() => Ok(()),
            Ok(Ok(())) => check_whole(request, &transcript).map_err(named),
        }
    }
}

/// Reads a request's events into `transcript`.
async fn follow(
    router: uniarm_proto::ClusterClient,
    request: GenerateRequest,
    client: &Client,
    transcript: &mut Transcript,
) -> Result<(), Status> {
    let mut answers = router.generate(request, client.timeout);
    let mut events = 0;
    while let Some(event) = answers.next().await {
        transcript.apply(&event?).map_err(|error| Status::internal(error.to_string()))?;
        events += 1;
        if client.hangs_up_after.is_some_and(|after| events > after) {
            return Ok(());
        }
        if !client.rests.is_zero() {
            sleep(client.rests).await;
        }
    }
    Ok(())
}

fn check_whole(request: &GenerateRequest, transcript: &Transcript) -> Result<(), String> {
    let summary = transcript.summary.as_ref().ok_or("its stream ended without a summary")?;
    let usage = summary.usage.unwrap_or_default();
    let finished = transcript.choices.iter().filter(|choice| choice.finished.is_some()).count();
    if finished != request.sampling.n as usize {
        return Err(format!("{finished} of {} answers came to an end", request.sampling.n));
    }
    let tokens: usize = transcript.choices.iter().map(|choice| choice.tokens.len()).sum();
    let unguided: usize = transcript.choices.iter().map(|choice| choice.unguided.len()).sum();
    if (usage.completion_tokens as usize, usage.unguided_tokens as usize) != (tokens, unguided) {
        return Err(format!("its summary says {usage:?}, it got {tokens} tokens, {unguided} unguided"));
    }
    Ok(())
}

/// Only the request's own wishes may end it.
fn check_end(
    request: &GenerateRequest,
    client: &Client,
    took: Duration,
    status: &Status,
) -> Result<(), String> {
    let wishes_to_fail = request.on_reward_loss == OnRewardLoss::Fail;
    if wishes_to_fail && cause_of(status).as_deref() == Some(REWARD_LOST) {
        return Ok(());
    }
    if client.timeout.is_some() && cause_of(status).as_deref() == Some(DEADLINE_UNMEETABLE) {
        return Ok(());
    }
    match client.timeout {
        Some(limit) if status.code() == tonic::Code::DeadlineExceeded => {
            if took < limit || took > limit + DEADLINE_GRACE + client.rests * EVENTS_MAX {
                return Err(format!("its deadline of {limit:?} ended it after {took:?}"));
            }
            Ok(())
        }
        _ => Err(format!("ended after {took:?}: {status:?}")),
    }
}

/// Waits until nothing is held any more.
async fn quiet(cluster: &Cluster) -> Vec<String> {
    let began = Instant::now();
    loop {
        sleep(QUIET_POLL).await;
        let held = cluster.held().await;
        if held.is_empty() || began.elapsed() >= QUIET_WITHIN {
            return held;
        }
    }
}
