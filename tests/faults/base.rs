//! A base worker is lost, and its streams go on at another one, byte for byte.

use std::time::Duration;

use uniarm_proto::ClusterClient;

use crate::{
    harness::{PROMPTED, Running, demo_model, free_address, machine},
    load::{Received, ask_all, mixed_requests},
};

/// From the hang of a worker to the next token elsewhere: keepalive (4 s), and the work of a busy machine.
const HANG_NOTICED_WITHIN: Duration = Duration::from_secs(12);

const REQUESTS: usize = 16;
const TOKENS: u32 = 40;

fn base() -> Running {
    Running::start("base", &["--model", demo_model(), "--listen", &free_address()])
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_base_worker_that_is_killed_or_hangs_go_on_elsewhere() {
    let _machine = machine();
    let mut bases = [base(), base()];
    let reward = Running::start("reward", &[&["--model", demo_model()], &PROMPTED[..]].concat());
    let peers = ["--base-peer", &bases[0].address, "--base-peer", &bases[1].address];
    let router = Running::start("router", &[&peers[..], &["--reward-peer", &reward.address]].concat());
    let cluster = ClusterClient::new(&[&router.address]).unwrap();
    let requests = mixed_requests(REQUESTS, TOKENS);
    let undisturbed = ask_all(&cluster, &requests, REQUESTS, &Received::default()).await;
    let third = undisturbed.tokens() / 3;

    let received = Received::default();
    let disturb = async {
        received.at_least(third).await;
        bases[0].kill();
    };
    let (run, ()) = tokio::join!(ask_all(&cluster, &requests, REQUESTS, &received), disturb);
    run.assert_equals(&undisturbed, &requests);
    let moved = router.metric("uniarm_router_migrations_total");
    assert!(moved > 0.0, "nothing ran on the worker that was killed");
    println!("killed: {moved} streams moved, longest silence {:?}", run.gaps.iter().max().unwrap());

    bases[0].restart();
    let received = Received::default();
    let disturb = async {
        received.at_least(third).await;
        bases[1].signal(libc::SIGSTOP);
    };
    let (run, ()) = tokio::join!(ask_all(&cluster, &requests, REQUESTS, &received), disturb);
    bases[1].signal(libc::SIGCONT);
    run.assert_equals(&undisturbed, &requests);
    let longest = *run.gaps.iter().max().unwrap();
    let moved = router.metric("uniarm_router_migrations_total") - moved;
    assert!(moved > 0.0, "nothing ran on the worker that hung");
    println!("hung: {moved} streams moved, longest silence {longest:?}");
    assert!(longest < HANG_NOTICED_WITHIN, "{longest:?}");
}
