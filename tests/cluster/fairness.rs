//! Tenants are served tokens in equal parts: whoever asks for little does not wait for another one's flood.

use std::{sync::Arc, time::Instant};

use tokio::{sync::Barrier, task::JoinSet};
use uniarm_proto::{GenerateRequest, client};

use crate::{
    harness::{Cluster, PROMPTED, machine, request},
    tenants::{ask, new_key, tenant},
};

/// Requests of the tenant that floods.
const FLOOD: usize = 24;

fn asked(seed: u64, tokens: u32) -> GenerateRequest {
    let mut asked = request("Tell me of the sea.", &[("positive", 0.7), ("concise", 0.3)]);
    asked.sampling.seed = Some(seed);
    asked.sampling.max_tokens = tokens;
    asked.sampling.ignore_eos = true;
    asked
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_little_does_not_wait_for_another_tenants_flood() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tenants.toml");
    let [flooder, other] = std::array::from_fn(|_| new_key());
    let tenants = [tenant("flooder", &[&flooder], ""), tenant("other", &[&other], "")];
    std::fs::write(&file, tenants.concat()).unwrap();
    // Two at a time, in each pool.
    let flags = ["--tenants", file.to_str().unwrap(), "--running-max", "2"];
    let cluster = Cluster::up(&[&PROMPTED[..], &flags].concat());
    let inference = client::inference(cluster.channel().await);

    let begun = Arc::new(Barrier::new(FLOOD + 1));
    let mut flood = JoinSet::new();
    for number in 0..FLOOD {
        let (mut inference, key, begun) = (inference.clone(), flooder.key.clone(), Arc::clone(&begun));
        flood.spawn(async move {
            begun.wait().await;
            ask(&mut inference, &key, asked(number as u64, 24)).await.unwrap();
            Instant::now()
        });
    }
    begun.wait().await;
    // Behind the whole flood, had the line been one of arrival.
    while cluster.base().metric("uniarm_base_sequences_waiting") < (FLOOD - 4) as f64 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let mut last = Instant::now();
    for number in 0..3 {
        ask(&mut inference.clone(), &other.key, asked(100 + number, 24)).await.unwrap();
        last = Instant::now();
    }
    let ends = flood.join_all().await;
    let before = ends.iter().filter(|end| **end < last).count();
    // Two answers of two terms each are four sessions, for two rows of a step: they go round, and nobody loses blocks for it.
    let preempted =
        |worker: &crate::harness::Running, role| worker.metric(&format!("uniarm_{role}_preemptions_total"));
    assert_eq!([preempted(cluster.base(), "base"), preempted(cluster.reward(), "reward")], [0.0, 0.0]);
    // Of two places it has one while it asks: some three of the flood end beside its three, and the four that came before.
    assert!(before <= 14, "{before} of {FLOOD} ended before three answers of the other tenant");
}
