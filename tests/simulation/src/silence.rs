//! A reward worker that falls silent in the middle of an answer.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    Pool,
    cluster::{Cluster, Shape},
    runtime,
};

/// By then the answer has begun, and it has not ended.
const SILENT_AFTER: Duration = Duration::from_millis(40);

/// Shorter than it takes to notice that a peer is lost.
const SILENT_FOR: Duration = Duration::from_secs(2);

/// How a long answer fared whose reward worker said nothing for a while.
#[derive(Debug)]
pub struct Silence {
    pub took: Duration,
    /// Sessions opened at another worker, and those of them that answered first.
    pub hedges: usize,
    pub won: usize,
}

// === impl Pool ===

impl Pool {
    /// Asks for a long answer, and holds up its reward worker's stream in the middle of it.
    pub fn silence(&self, hedge_after: Option<Duration>) -> Silence {
        runtime().block_on(async {
            let shape = Shape { rewards: 2, hedge_after, ..Shape::UNDISTURBED };
            let cluster = Cluster::start(shape, 0).await;
            let client = cluster.client("client");
            let length = |index: &usize| match self.requests[*index].guidance.len() {
                1 => self.undisturbed[*index].choices[0].tokens.len(),
                _ => 0,
            };
            let longest = (0..self.requests.len()).max_by_key(length).unwrap();
            let request = self.requests[longest].clone();
            // Connections are there.
            client.complete(request.clone(), None).await.unwrap();
            let began = Instant::now();
            let asked = async {
                let answer = client.complete(request, None).await.unwrap();
                (answer, began.elapsed())
            };
            let silence = async {
                sleep(SILENT_AFTER).await;
                let sessions = |reward: &&str| cluster.gauge(reward, "uniarm_reward_sessions").unwrap() > 0;
                let busy = ["reward-0", "reward-1"].iter().find(|reward| sessions(reward)).unwrap();
                let links = [("base-0", *busy), (*busy, "base-0")];
                links.iter().for_each(|(from, to)| cluster.network.block(from, to));
                sleep(SILENT_FOR).await;
                links.iter().for_each(|(from, to)| cluster.network.heal(from, to));
            };
            let ((answer, took), ()) = tokio::join!(asked, silence);
            assert_eq!(answer.choices, self.undisturbed[longest].choices);
            let count = |metric| cluster.gauge("base-0", metric).unwrap();
            let hedges = count("uniarm_base_reward_hedges_total");
            Silence { took, hedges, won: count("uniarm_base_reward_hedges_won_total") }
        })
    }
}
