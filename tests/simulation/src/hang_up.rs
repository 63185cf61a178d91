//! Clients that hang up: how long their requests go on.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use uniarm_proto::GenerateRequest;

use crate::{
    Pool,
    cluster::{Cluster, Shape},
    runtime,
};

/// All clients hang up in the middle of their answers.
const HANG_UP_AFTER: Duration = Duration::from_millis(60);

/// Answers of so many tokens are not over by then.
const TOKENS_LEAST: usize = 24;

/// When it is looked: the clock has this resolution.
const POLL: Duration = Duration::from_millis(1);
const POLLS: usize = 1000;

/// What was under way when all clients hung up, and how much longer it was.
#[derive(Debug, Default)]
pub struct HungUp {
    pub sequences: usize,
    pub sessions: usize,
    pub base: Duration,
    pub reward: Duration,
}

// === impl Pool ===

impl Pool {
    /// Clients of long guided answers hang up together.
    pub fn hang_up(&self) -> HungUp {
        runtime().block_on(async {
            let cluster = Cluster::start(Shape::UNDISTURBED, 0).await;
            let client = cluster.client("client");
            // Connections are there when the others come.
            client.complete(self.long_guided().next().unwrap(), None).await.unwrap();
            let asked = self.long_guided().map(|request| client.complete(request, None));
            assert!(timeout(HANG_UP_AFTER, join_all(asked)).await.is_err(), "answers were over too early");
            let sequences = || cluster.gauge("base-0", "uniarm_base_sequences_running").unwrap();
            let sessions = || cluster.gauge("reward-0", "uniarm_reward_sessions").unwrap();
            let mut hung_up = HungUp { sequences: sequences(), sessions: sessions(), ..HungUp::default() };
            let began = Instant::now();
            for _ in 0..POLLS {
                if sequences() > 0 {
                    hung_up.base = began.elapsed() + POLL;
                }
                if sessions() > 0 {
                    hung_up.reward = began.elapsed() + POLL;
                }
                sleep(POLL).await;
            }
            hung_up
        })
    }

    fn long_guided(&self) -> impl Iterator<Item = GenerateRequest> {
        let both = self.requests.iter().zip(&self.undisturbed);
        let long = both.filter(|(request, answer)| {
            !request.guidance.is_empty() && answer.choices[0].tokens.len() >= TOKENS_LEAST
        });
        long.map(|(request, _)| request.clone())
    }
}
