//! The member store as a role sees it: register, watch, leave; and the catalogue of adapters beside the members.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;
use uniarm_proto::{AdapterRecord, Generation, Member, MemberId};

use crate::{AdaptersReceiver, NewAdapter, SnapshotReceiver, StoreError};

/// How often an id that is taken is tried again.
const TAKEN_RETRY: Duration = Duration::from_millis(250);

/// Where members are recorded. Every implementation passes the conformance suite in `tests/`.
#[async_trait]
pub trait MemberStore: Send + Sync {
    /// A number for the next life of a member: larger than any before for this id, also over
    /// restarts of this process and of the store.
    ///
    /// Waits while the store is unavailable; bound it with a timeout where that matters.
    async fn next_generation(&self, id: &MemberId) -> Result<Generation, StoreError>;

    /// Records `member` under a lease, unless a live member has its id
    /// (`StoreError::AlreadyRegistered`). The same id and generation again is the same member.
    ///
    /// Waits while the store is unavailable; bound it with a timeout where that matters.
    async fn register(&self, member: Member) -> Result<Registration, StoreError>;

    /// The members as this store last saw them. The snapshot stays while the store is away; it
    /// changes no more once this store and its registrations are dropped.
    fn watch(&self) -> SnapshotReceiver;

    /// Puts the next version of an adapter into the catalogue, where it stays until it is removed; nobody else gets that
    /// version's number, now or later. The very folder and digest that the newest version has are no new version. Returns
    /// the record as it is then.
    ///
    /// Waits while the store is unavailable; bound it with a timeout where that matters.
    async fn put_adapter(&self, adapter: NewAdapter) -> Result<AdapterRecord, StoreError>;

    /// Takes an adapter from new requests (`UnknownAdapter`: there is none). Its record stays, so that its versions go on
    /// where they ended.
    ///
    /// Waits while the store is unavailable; bound it with a timeout where that matters.
    async fn remove_adapter(&self, name: &str) -> Result<AdapterRecord, StoreError>;

    /// The catalogue as this store last saw it; as `watch`.
    fn watch_adapters(&self) -> AdaptersReceiver;

    /// Ends all registrations made here and stops watching. Calls that come later fail with `Closed`.
    async fn close(&self);

    /// As `register`, but waits up to `patience` for the id to become free: a process that was killed
    /// and started again finds the record of its former life, until that one's lease ends.
    async fn register_within(&self, member: Member, patience: Duration) -> Result<Registration, StoreError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.register(member.clone()).await {
                Err(StoreError::AlreadyRegistered { generation, .. }) if Instant::now() < deadline => {
                    tracing::debug!(id = %member.id, %generation, "waiting for the id's former holder");
                    tokio::time::sleep(TAKEN_RETRY).await;
                }
                done => return done,
            }
        }
    }
}

/// A member's place in the store. It renews itself until `leave` or drop.
#[must_use = "dropping a registration removes the member"]
pub struct Registration {
    id: MemberId,
    generation: Generation,
    state: watch::Receiver<RegistrationState>,
    hold: Option<Box<dyn Hold>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegistrationState {
    /// Recorded, and the lease is renewed in time.
    Held,
    /// The lease ended or may have ended, so others may not see this member. It registers itself
    /// again as soon as the store answers; nothing that runs needs to stop.
    Lost,
    /// Another life of this member has taken the id: this one must end. Final.
    Superseded { by: Generation },
}

/// How one store keeps one registration.
#[async_trait]
pub(crate) trait Hold: Send + Sync {
    fn update(&self, member: Member) -> Result<(), StoreError>;

    /// Removes the record and returns when it is gone, or when the store could not be reached.
    async fn release(self: Box<Self>);

    /// As `release`, without waiting.
    fn abandon(self: Box<Self>);
}

// === impl Registration ===

impl Registration {
    pub(crate) fn new(
        member: &Member,
        state: watch::Receiver<RegistrationState>,
        hold: impl Hold + 'static,
    ) -> Self {
        Self { id: member.id.clone(), generation: member.generation, state, hold: Some(Box::new(hold)) }
    }

    #[must_use]
    pub fn id(&self) -> &MemberId {
        &self.id
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    #[must_use]
    pub fn state(&self) -> RegistrationState {
        *self.state.borrow()
    }

    /// The state and its changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<RegistrationState> {
        self.state.clone()
    }

    /// Returns when the registration is not held, at once if it already is not.
    pub async fn lost(&self) {
        // An error means that the store was closed, which loses it too.
        let _ = self.state.clone().wait_for(|state| *state != RegistrationState::Held).await;
    }

    /// Replaces the record; others see it soon, or once the store is back. Id and generation must
    /// stay as they are (`InvalidMember`).
    pub fn update(&self, member: Member) -> Result<(), StoreError> {
        if (&member.id, member.generation) != (&self.id, self.generation) {
            let reason = format!("an update of {} cannot change its id or generation", self.id);
            return Err(StoreError::InvalidMember(reason));
        }
        self.hold.as_ref().expect("only `leave` and drop take the hold").update(member)
    }

    /// Removes the member now, so that others need not wait for its lease to end. When it returns,
    /// the record is gone or the store could not be reached.
    pub async fn leave(mut self) {
        if let Some(hold) = self.hold.take() {
            hold.release().await;
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            hold.abandon();
        }
    }
}
