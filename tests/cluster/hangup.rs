//! A client that hangs up frees what it held on both pools, and disturbs nobody.

use std::time::{Duration, Instant};

use uniarm_proto::{Event, pb};

use crate::harness::{Cluster, PROMPTED, Running, ask, machine, request};

/// A step of a few rows on a slow machine, and a look at the metrics.
const FREED_WITHIN: Duration = Duration::from_secs(2);

fn until(what: &str, condition: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < FREED_WITHIN, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    began.elapsed()
}

fn sessions(reward: &Running) -> f64 {
    reward.metric("uniarm_reward_sessions")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_frees_its_blocks_on_both_pools_and_disturbs_no_other() {
    let _machine = machine();
    let cluster =
        Cluster::three_processes(&["--no-prefix-cache"], &[&PROMPTED[..], &["--no-prefix-cache"]].concat());
    let inference = cluster.client().await;
    let mut steady = request("Tell me about the sea.", &[("positive", 0.6), ("concise", 0.4)]);
    steady.sampling.max_tokens = 60;
    steady.sampling.ignore_eos = true;
    let undisturbed = ask(&mut inference.clone(), steady.clone()).await.unwrap();
    let (base, reward) = (cluster.base(), cluster.reward());
    until("sessions stay open after their answer", || sessions(reward) == 0.0);
    let idle = [base.metric("uniarm_base_kv_free_blocks"), reward.metric("uniarm_reward_kv_free_blocks")];

    let disturbed = tokio::spawn({
        let mut inference = inference.clone();
        async move { ask(&mut inference, steady).await.unwrap() }
    });
    for seed in 0..4 {
        let mut leaver = request("Count to a million.", &[("positive", 1.0)]);
        leaver.sampling.max_tokens = 4000;
        leaver.sampling.ignore_eos = true;
        leaver.sampling.seed = Some(seed);
        let mut events =
            inference.clone().generate(pb::GenerateRequest::from(leaver)).await.unwrap().into_inner();
        let mut tokens = 0;
        while tokens < 3 {
            let event = events.message().await.unwrap().unwrap().event.unwrap();
            tokens += usize::from(matches!(event, Event::Tokens(_)));
        }
        let held = sessions(reward);
        drop(events);
        let freed = until("the session of a client that hung up stays open", || sessions(reward) < held);
        println!("freed on the reward worker after {freed:?}");
    }
    assert_eq!(disturbed.await.unwrap().choices, undisturbed.choices);
    until("blocks stay taken", || {
        base.metric("uniarm_base_kv_free_blocks") == idle[0]
            && reward.metric("uniarm_reward_kv_free_blocks") == idle[1]
            && sessions(reward) == 0.0
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reward_worker_is_handled_as_the_request_asks() {
    let _machine = machine();
    let mut cluster = Cluster::three_processes(&[], &PROMPTED);
    let inference = cluster.client().await;
    let endless = |policy| {
        let mut wire = pb::GenerateRequest::from(request("Tell me a long story.", &[("positive", 1.0)]));
        let sampling = wire.sampling.as_mut().unwrap();
        sampling.max_tokens = Some(200);
        sampling.ignore_eos = true;
        wire.on_reward_loss = policy as i32;
        wire
    };
    let mut failing = inference.clone().generate(endless(pb::OnRewardLoss::Fail)).await.unwrap().into_inner();
    let mut going_on =
        inference.clone().generate(endless(pb::OnRewardLoss::Unguided)).await.unwrap().into_inner();
    for events in [&mut failing, &mut going_on] {
        for _ in 0..4 {
            events.message().await.unwrap().unwrap();
        }
    }
    cluster.workers[1].kill();

    let status = loop {
        match failing.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if nothing had happened"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");

    let mut transcript = uniarm_proto::Transcript::default();
    transcript.choices.push(uniarm_proto::ChoiceTranscript::default());
    let mut unguided = 0;
    let mut total = 0;
    while let Some(response) = going_on.message().await.unwrap() {
        match response.event.unwrap() {
            Event::Tokens(tokens) => unguided += tokens.unguided.len(),
            Event::Summary(summary) => total = summary.usage.unwrap().unguided_tokens,
            _ => {}
        }
    }
    assert!(unguided > 0, "no token was marked");
    assert_eq!(total as usize, unguided, "the summary counts what the tokens say");
}
