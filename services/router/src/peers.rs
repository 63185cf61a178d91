//! A cluster without a store: workers at fixed addresses are asked what they are, and entered into a memory store.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use uniarm_cluster::{MemberStore, Registration};
use uniarm_proto::{
    Member,
    client::{self, Dialer},
    pb,
};
use uniarm_runtime::Shutdown;

/// How often a peer is asked.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// The same until it answers for the first time: a cluster that starts should not wait long for its own parts.
const ASK_EVERY_AT_FIRST: Duration = Duration::from_millis(100);

/// A peer that does not answer within this has not answered.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Missed answers after which a peer is taken for away.
const MISSES_MAX: u32 = 2;

/// Whether an address can be dialled at all.
///
/// # Errors
/// What is wrong with it, and what is wanted.
pub fn check(address: &str) -> Result<(), String> {
    let is_one =
        client::endpoint(address).is_ok_and(|peer| peer.uri().host().is_some_and(|host| !host.is_empty()));
    match is_one {
        true => Ok(()),
        false => Err(format!("{address:?} is no address, wants host:port, such as 10.0.0.7:7001")),
    }
}

/// Keeps the record of the worker at `address` in `store` until the shutdown begins.
pub async fn follow(address: String, dialer: Dialer, store: Arc<dyn MemberStore>, shutdown: Shutdown) {
    let channel = match dialer.channel(&address) {
        Ok(channel) => channel,
        Err(error) => {
            tracing::error!(address, %error, "a peer's address is wrong");
            return;
        }
    };
    let mut peer = Peer { address, store, held: None, misses: 0, is_reached: true };
    loop {
        peer.look(&channel).await;
        let wait = if peer.held.is_some() { ASK_EVERY } else { ASK_EVERY_AT_FIRST };
        tokio::select! {
            () = shutdown.begun() => return,
            () = sleep(wait) => {}
        }
    }
}

struct Peer {
    address: String,
    store: Arc<dyn MemberStore>,
    held: Option<(Member, Registration)>,
    misses: u32,
    /// Until somebody was told that it is not.
    is_reached: bool,
}

// === impl Peer ===

impl Peer {
    async fn look(&mut self, channel: &Channel) {
        match describe(channel).await {
            Ok(mut member) => {
                // Where we reach it, whatever it believes its address to be.
                member.address.clone_from(&self.address);
                (self.misses, self.is_reached) = (0, true);
                self.enter(member).await;
            }
            Err(reason) => {
                self.misses += 1;
                if self.misses >= MISSES_MAX
                    && let Some((member, registration)) = self.held.take()
                {
                    tracing::warn!(peer = %member.id, address = self.address, reason, "a peer went away");
                    self.is_reached = false;
                    registration.leave().await;
                }
                if self.held.is_none() && self.is_reached {
                    tracing::warn!(
                        address = self.address,
                        reason,
                        "a peer is not reached, and is asked again and again"
                    );
                    self.is_reached = false;
                }
            }
        }
    }

    async fn enter(&mut self, member: Member) {
        if self.held.as_ref().is_some_and(|(held, _)| *held == member) {
            return;
        }
        if let Some((_, registration)) = self.held.take() {
            registration.leave().await;
        }
        match self.store.register(member.clone()).await {
            Ok(registration) => {
                tracing::info!(peer = %member.id, role = %member.role, address = self.address, "a peer is there");
                self.held = Some((member, registration));
            }
            Err(error) => tracing::warn!(address = self.address, %error, "a peer cannot be entered"),
        }
    }
}

async fn describe(channel: &Channel) -> Result<Member, String> {
    let mut client = client::membership(channel.clone());
    let asked = timeout(ANSWER_TIMEOUT, client.describe(pb::DescribeRequest {})).await;
    let answer = asked.map_err(|_| "no answer in time".to_owned())?.map_err(|status| status.to_string())?;
    Member::try_from(answer.into_inner()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_dialled_is_no_address() {
        for address in ["10.0.0.7:7001", "base-0:7001", "[::1]:7001", "https://base-0:7001"] {
            check(address).unwrap();
        }
        for address in ["", " ", "base 0:7001", ":7001", "http://"] {
            assert!(
                check(address).unwrap_err().contains(&format!("{address:?} is no address")),
                "{address:?}"
            );
        }
    }
}
