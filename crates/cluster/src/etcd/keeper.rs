//! One registration: acquires a lease, keeps it alive, and acquires another when it is lost.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp, TxnOpResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use uniarm_proto::{Generation, Member};

use super::session::Session;
use crate::backoff::Backoff;
use crate::store::RegistrationState;
use crate::{StoreError, record};

/// Renewals in the time of one lease: two may be lost before the lease is.
pub(super) const RENEWALS_PER_TTL: u32 = 3;

pub(super) struct Keeper {
    pub(super) session: Arc<Session>,
    pub(super) key: String,
    pub(super) records: watch::Receiver<Arc<Member>>,
    pub(super) state: watch::Sender<RegistrationState>,
    /// The registration was left or dropped, or the store was closed.
    pub(super) leave: CancellationToken,
    /// Tells the registration that the keeper has ended.
    pub(super) _left: DropGuard,
    /// Tells the store's thread that a keeper is still at work.
    pub(super) _working: mpsc::Sender<Infallible>,
}

/// Why a lease is no longer held.
enum Ended {
    Leaving,
    /// The lease, or the record under it, is gone.
    Lost,
}

/// Grants a lease and puts the record of `member` under it, if its id is free or its own.
pub(super) async fn acquire(session: &Session, key: &str, member: &Member) -> Result<i64, StoreError> {
    let ttl_s = i64::try_from(session.lease_ttl.as_secs())
        .map_err(|_| StoreError::Refused("the lease's time does not fit".to_owned()))?;
    let grant = session.request(|mut client| async move { client.lease_grant(ttl_s, None).await }).await?;
    let lease = grant.id();
    let claimed = claim(session, key, member, lease).await;
    if claimed.is_err() {
        revoke(session, lease).await;
    }
    claimed.map(|()| lease)
}

/// Creates the record. Where one exists, takes over its own, which it left under an earlier lease or
/// wrote in a try whose answer was lost, and refuses a stranger's.
async fn claim(session: &Session, key: &str, member: &Member, lease: i64) -> Result<(), StoreError> {
    let put = || TxnOp::put(key, record::encode(member), Some(PutOptions::new().with_lease(lease)));
    let create = Txn::new()
        .when([Compare::create_revision(key, CompareOp::Equal, 0)])
        .and_then([put()])
        .or_else([TxnOp::get(key, None)]);
    let answer = session.request(|mut client| async move { client.txn(create).await }).await?;
    if answer.succeeded() {
        return Ok(());
    }
    let changed = || StoreError::Unavailable("the record changed meanwhile".to_owned());
    let (generation, mod_revision) = match answer.op_responses().first() {
        Some(TxnOpResponse::Get(found)) => {
            let existing = found.kvs().first().ok_or_else(changed)?;
            let holder = record::decode(existing.value()).map_or(Generation(0), |holder| holder.generation);
            (holder, existing.mod_revision())
        }
        _ => return Err(changed()),
    };
    if generation != member.generation {
        return Err(StoreError::AlreadyRegistered { id: member.id.clone(), generation });
    }
    let replace =
        Txn::new().when([Compare::mod_revision(key, CompareOp::Equal, mod_revision)]).and_then([put()]);
    let answer = session.request(|mut client| async move { client.txn(replace).await }).await?;
    if answer.succeeded() { Ok(()) } else { Err(changed()) }
}

/// Ends the lease and with it the record. One that cannot be revoked ends by itself.
async fn revoke(session: &Session, lease: i64) {
    if let Err(error) = session.request(|mut client| async move { client.lease_revoke(lease).await }).await {
        tracing::warn!(lease, %error, "the lease was not revoked and will run out");
    }
}

impl Keeper {
    pub(super) async fn run(mut self, mut lease: i64) {
        loop {
            match self.hold(lease).await {
                Ended::Leaving => {
                    revoke(&self.session, lease).await;
                    self.state.send_replace(RegistrationState::Lost);
                    return;
                }
                Ended::Lost => {
                    tracing::warn!(key = self.key, "the lease was lost; registering again");
                    self.state.send_replace(RegistrationState::Lost);
                }
            }
            lease = match self.acquire_again().await {
                Some(lease) => lease,
                None => return,
            };
            tracing::info!(key = self.key, "registered again");
            self.state.send_replace(RegistrationState::Held);
        }
    }

    /// Keeps the lease alive until the member leaves or the lease is gone. A store that does not
    /// answer is asked again: when it returns, the lease may well be as it was.
    async fn hold(&mut self, lease: i64) -> Ended {
        let mut confirmed = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            let error = match self.renew(lease, &mut confirmed, &mut backoff).await {
                Ok(ended) => return ended,
                Err(error) => error,
            };
            if confirmed.elapsed() > self.session.lease_ttl && self.is_held() {
                tracing::warn!(key = self.key, %error, "the lease may have run out; trying on");
                self.state.send_replace(RegistrationState::Lost);
            }
            if self.pause(backoff.next()).await.is_none() {
                return Ended::Leaving;
            }
        }
    }

    /// Renews over one stream; an error is the stream's.
    async fn renew(
        &mut self,
        lease: i64,
        confirmed: &mut Instant,
        backoff: &mut Backoff,
    ) -> Result<Ended, StoreError> {
        let session = self.session.clone();
        let opened = session.request(|mut client| async move {
            match client.lease_keep_alive(lease).await {
                // The client reports a lease that is gone as an error of its own, without a code.
                Err(etcd_client::Error::LeaseKeepAliveError(_)) => Ok(None),
                opened => opened.map(Some),
            }
        });
        let opened = tokio::select! {
            opened = opened => opened?,
            () = self.leave.cancelled() => return Ok(Ended::Leaving),
        };
        let Some((mut requests, mut answers)) = opened else { return Ok(Ended::Lost) };
        self.confirm(confirmed, backoff);
        let interval = self.session.lease_ttl / RENEWALS_PER_TTL;
        loop {
            tokio::select! {
                () = self.leave.cancelled() => return Ok(Ended::Leaving),
                Ok(()) = self.records.changed() => {
                    if !self.replace_record(lease).await? {
                        return Ok(Ended::Lost);
                    }
                    continue;
                }
                () = tokio::time::sleep_until(*confirmed + interval) => {}
            }
            let answer = session.request(|_| async {
                requests.keep_alive().await?;
                answers.message().await
            });
            match answer.await? {
                Some(answer) if answer.ttl() > 0 => self.confirm(confirmed, backoff),
                Some(_) => return Ok(Ended::Lost),
                None => return Err(StoreError::Unavailable("the keepalive stream ended".to_owned())),
            }
        }
    }

    fn confirm(&self, confirmed: &mut Instant, backoff: &mut Backoff) {
        *confirmed = Instant::now();
        backoff.reset();
        if !self.is_held() {
            self.state.send_replace(RegistrationState::Held);
        }
    }

    /// Puts the newest record under the lease; false if the record there is no longer this lease's.
    async fn replace_record(&mut self, lease: i64) -> Result<bool, StoreError> {
        let value = record::encode(&self.records.borrow_and_update());
        let replace = Txn::new()
            .when([Compare::lease(self.key.as_str(), CompareOp::Equal, lease)])
            .and_then([TxnOp::put(self.key.as_str(), value, Some(PutOptions::new().with_lease(lease)))]);
        let answer = self.session.request(|mut client| async move { client.txn(replace).await }).await;
        if answer.is_err() {
            // Not written: it is still the newest, for the next stream to write.
            self.records.mark_changed();
        }
        Ok(answer?.succeeded())
    }

    /// A new lease for the newest record; none if the member leaves or another life has its id.
    async fn acquire_again(&mut self) -> Option<i64> {
        let mut backoff = Backoff::new();
        loop {
            let member = self.records.borrow_and_update().clone();
            let acquired = tokio::select! {
                acquired = acquire(&self.session, &self.key, &member) => acquired,
                () = self.leave.cancelled() => return None,
            };
            match acquired {
                Ok(lease) => return Some(lease),
                Err(StoreError::AlreadyRegistered { id, generation }) => {
                    tracing::error!(%id, %generation, "another life of this member has its id");
                    self.state.send_replace(RegistrationState::Superseded { by: generation });
                    return None;
                }
                Err(error) => tracing::debug!(key = self.key, %error, "cannot register again yet"),
            }
            self.pause(backoff.next()).await?;
        }
    }

    fn is_held(&self) -> bool {
        *self.state.borrow() == RegistrationState::Held
    }

    /// Waits; none if the member leaves meanwhile.
    async fn pause(&self, wait: Duration) -> Option<()> {
        tokio::time::timeout(wait, self.leave.cancelled()).await.err().map(|_| ())
    }
}
