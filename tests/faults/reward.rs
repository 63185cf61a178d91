//! The only reward worker is lost, and comes back: an answer that waits for it is the one that it would have been.

use std::time::Duration;

use uniarm_proto::{ClusterClient, Event};

use crate::{
    harness::{PROMPTED, Running, demo_model, free_address, machine},
    load::mixed_requests,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_waits_for_its_reward_and_goes_on_as_if_nothing_had_happened() {
    let _machine = machine();
    let address = free_address();
    let base = Running::start("base", &["--model", demo_model(), "--draft-window", "4"]);
    let reward_flags = [&["--model", demo_model(), "--listen", &address], &PROMPTED[..]].concat();
    let mut reward = Running::start("reward", &reward_flags);
    let peers = ["--base-peer", &base.address, "--reward-peer", &address];
    let router = Running::start("router", &peers);
    let cluster = ClusterClient::new(&[&router.address]).unwrap().with_patience(Duration::from_secs(20));
    // Two terms, one of which steers away.
    let request = mixed_requests(4, 32).remove(3);
    assert_eq!(request.guidance.len(), 2);
    let undisturbed = cluster.complete(request.clone(), None).await.unwrap();

    let mut answers = cluster.generate(request, None);
    let mut transcript = uniarm_proto::Transcript::default();
    let mut tokens = 0;
    while let Some(event) = answers.next().await {
        let event = event.unwrap();
        transcript.apply(&event).unwrap();
        tokens += usize::from(matches!(event, Event::Tokens(_)));
        if tokens == 6 {
            reward.kill();
            tokio::task::block_in_place(|| reward.restart());
        }
    }
    assert_eq!(transcript.choices, undisturbed.choices);
    assert!(base.metric("uniarm_base_reward_losses_total") >= 2.0, "both sessions were lost");
}
