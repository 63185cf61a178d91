//! What is held in a cluster: places, sequences, sessions, blocks, and what routers count.

use uniarm_proto::{
    Role,
    pb::{self, status_client::StatusClient},
};

use super::{Cluster, Life, lock};

// === impl Cluster ===

impl Cluster {
    /// What is held though nobody asks for anything; empty: nothing has leaked.
    pub async fn held(&self) -> Vec<String> {
        let mut held = Vec::new();
        for (host, node) in &self.nodes {
            let seen = |life: &Life| (node.role, life.metrics.encode(), life.served.places_taken());
            let Some((role, page, places)) = lock(&node.life).as_ref().map(seen) else {
                held.push(format!("{host} is down"));
                continue;
            };
            if places > 0 {
                held.push(format!("{host}: {places} places are taken"));
            }
            let gauge = |name: &str| gauge(&page, name);
            let expected: &[(&str, usize)] = match role {
                Role::Router => &[("uniarm_router_requests_under_way", 0)],
                Role::Base => &[
                    ("uniarm_base_sequences_running", 0),
                    ("uniarm_base_sequences_waiting", 0),
                    ("uniarm_base_requests_held", 0),
                    ("uniarm_base_kv_free_blocks", self.shape.blocks),
                ],
                Role::Reward => {
                    &[("uniarm_reward_sessions", 0), ("uniarm_reward_kv_free_blocks", self.shape.blocks)]
                }
            };
            for (name, value) in expected {
                if gauge(name) != Some(*value) {
                    held.push(format!("{host}: {name} is {:?} instead of {value}", gauge(name)));
                }
            }
        }
        held.extend(self.load_held().await);
        held
    }

    /// A number on the page of a process that runs.
    pub fn gauge(&self, host: &str, name: &str) -> Option<usize> {
        lock(&self.nodes[host].life).as_ref().and_then(|life| gauge(&life.metrics.encode(), name))
    }

    /// What routers believe to be under way.
    async fn load_held(&self) -> Vec<String> {
        let mut held = Vec::new();
        for router in (0..self.shape.routers).map(|index| format!("router-{index}")) {
            let Ok(channel) = self.network.dialer("operator").connect(&format!("{router}:1")).await else {
                held.push(format!("{router} cannot be reached"));
                continue;
            };
            let report = StatusClient::new(channel).report(pb::ReportRequest {}).await;
            match report.map(tonic::Response::into_inner) {
                Ok(report) => {
                    let busy = report.members.iter().filter(|member| member.under_way > 0).count();
                    if busy + report.leaving.len() > 0 {
                        held.push(format!("{router} counts requests on {busy} members"));
                    }
                }
                Err(status) => held.push(format!("{router} gives no report: {status}")),
            }
        }
        held
    }
}

fn gauge(page: &str, name: &str) -> Option<usize> {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    page.lines().find_map(value)
}
