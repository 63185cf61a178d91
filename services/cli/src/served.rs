//! What a process serves: how it gets onto a server, and what it does when the process is told to leave.

use std::time::Duration;

use tokio::task::JoinSet;
use uniarm_base::{BaseHandle, server::BaseService};
use uniarm_proto::Member;
use uniarm_reward::{RewardHandle, server::RewardService};
use uniarm_router::RouterService;
use uniarm_runtime::{RuntimeError, grpc::GrpcServer};

/// The last part of a drain: streams that still run end, and are taken over elsewhere, before connections are cut.
pub const HAND_OVER: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub enum Served {
    Router(RouterService),
    Base(BaseHandle),
    Reward(RewardHandle),
}

// === impl Served ===

impl Served {
    pub fn add_to(&self, server: GrpcServer, member: Member) -> GrpcServer {
        match self {
            Self::Router(service) => {
                server.add_service(service.inference_server()).add_service(service.status_server())
            }
            Self::Base(handle) => {
                let service = BaseService::new(handle.clone(), member);
                server.add_service(service.base_server()).add_service(service.membership_server())
            }
            Self::Reward(handle) => {
                let service = RewardService::new(handle.clone(), member);
                server.add_service(service.reward_server()).add_service(service.membership_server())
            }
        }
    }

    /// New work is refused from here on, in a way that sends it elsewhere. A reward worker says so to its base workers,
    /// which move their sessions.
    pub fn begin_drain(&self) {
        match self {
            Self::Router(service) => service.begin_drain(),
            Self::Base(handle) => handle.begin_drain(),
            Self::Reward(handle) => handle.begin_drain(),
        }
    }

    /// What still runs goes on elsewhere. Sessions that no other reward worker could take end with their stream.
    pub fn hand_over(&self) {
        match self {
            Self::Router(service) => service.hand_over(),
            Self::Base(handle) => handle.hand_over(),
            Self::Reward(_) => {}
        }
    }
}

/// Waits until all servers have ended. What still runs near the end of the drain is handed over.
pub async fn drain(
    mut servers: JoinSet<Result<(), RuntimeError>>,
    all: &[Served],
    drain: Duration,
) -> anyhow::Result<()> {
    let hand_over = tokio::time::sleep(drain.saturating_sub(HAND_OVER.min(drain / 2)));
    tokio::pin!(hand_over);
    let mut is_handed_over = false;
    loop {
        tokio::select! {
            ended = servers.join_next() => match ended {
                Some(ended) => ended??,
                None => return Ok(()),
            },
            () = &mut hand_over, if !is_handed_over => {
                is_handed_over = true;
                all.iter().for_each(Served::hand_over);
            }
        }
    }
}
