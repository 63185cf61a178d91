//! What a reward worker serves as its store lists it: before it is ready, from then on, and in its own record.

use std::{convert::Infallible, time::Duration};

use tokio::sync::watch;
use uniarm_cluster::Registration;
use uniarm_proto::Member;
use uniarm_reward::{AdapterFollower, RewardHandle};

use crate::{process::Process, served::Served};

/// A worker that comes is of more use with what the store lists; one whose store hesitates comes without.
const LIST_PATIENCE: Duration = Duration::from_secs(10);

/// Serves what the store lists now, and goes on as that changes. Returns the record of the worker as it is then; `None`:
/// stopped meanwhile.
pub async fn follow(
    process: &Process,
    mut follower: AdapterFollower,
    handle: &RewardHandle,
    member: Member,
) -> Option<Member> {
    let mut adapters = process.store.watch_adapters();
    tokio::select! {
        () = follower.catch_up(&mut adapters, LIST_PATIENCE) => {}
        () = process.shutdown.begun() => return None,
    }
    tokio::spawn(follower.run(adapters));
    Some(handle.catalogue().describe(member))
}

/// Keeps the records of reward workers as their catalogues are.
pub async fn announce(
    registrations: &[Registration],
    members: &[(Member, String)],
    all: &[Served],
) -> Infallible {
    let rewards = registrations.iter().zip(members).zip(all).filter_map(|entry| match entry {
        ((registration, (member, _)), Served::Reward(handle)) => Some((registration, member, handle)),
        _ => None,
    });
    let announcing = rewards.map(|(registration, member, handle)| async move {
        let mut changes = handle.watch_catalogue();
        let mut last = member.clone();
        loop {
            let next = changes.borrow_and_update().describe(last.clone());
            if next != last {
                if let Err(error) = registration.update(next.clone()) {
                    tracing::error!(%error, "the store does not learn what this worker serves now");
                }
                last = next;
            }
            changed(&mut changes).await;
        }
    });
    let announcing: Vec<_> = announcing.collect();
    futures_util::future::join_all::<Vec<_>>(announcing).await;
    std::future::pending().await
}

async fn changed<T>(changes: &mut watch::Receiver<T>) {
    if changes.changed().await.is_err() {
        // Its engine is gone, and nothing changes any more.
        std::future::pending().await
    }
}
