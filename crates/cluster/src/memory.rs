//! The member store of one process: for `uniarm up`, for static peers, and for tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::watch;
use uniarm_proto::{Generation, Member, MemberId};

use crate::snapshot::{Snapshot, SnapshotReceiver};
use crate::store::{Hold, MemberStore, Registration, RegistrationState};
use crate::{StoreError, record};

/// Clones share one set of members. A member leaves with its registration; there is no lease to
/// run out, because nobody outlives the process.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

struct Shared {
    table: Mutex<Table>,
    clock: fn() -> SystemTime,
    snapshots: watch::Sender<Arc<Snapshot>>,
}

#[derive(Default)]
struct Table {
    members: BTreeMap<MemberId, Held>,
    revision: u64,
    generation_last: u64,
    closed: bool,
}

struct Held {
    member: Arc<Member>,
    state: watch::Sender<RegistrationState>,
}

struct MemoryHold {
    shared: Arc<Shared>,
    id: MemberId,
    generation: Generation,
}

// === impl MemoryStore ===

impl MemoryStore {
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(SystemTime::now)
    }

    /// Generations follow this clock: they grow from one process to the next, and a simulation has none of the machine's.
    #[must_use]
    pub fn with_clock(clock: fn() -> SystemTime) -> Self {
        // Revision 0 is for stores that have not been read yet; this one is complete from the start.
        let table = Table { revision: 1, ..Table::default() };
        let snapshots = watch::Sender::new(Arc::new(Snapshot::new([], table.revision)));
        Self { shared: Arc::new(Shared { table: Mutex::new(table), clock, snapshots }) }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl MemberStore for MemoryStore {
    async fn next_generation(&self, id: &MemberId) -> Result<Generation, StoreError> {
        record::check_id(id)?;
        let mut table = self.shared.open_table()?;
        // One count for all ids grows for each of them.
        table.generation_last = record::generation_after(table.generation_last, (self.shared.clock)());
        Ok(Generation(table.generation_last))
    }

    async fn register(&self, member: Member) -> Result<Registration, StoreError> {
        record::check(&member)?;
        let mut table = self.shared.open_table()?;
        if let Some(held) = table.members.get(&member.id)
            && held.member.generation != member.generation
        {
            let generation = held.member.generation;
            return Err(StoreError::AlreadyRegistered { id: member.id, generation });
        }
        let (state, changes) = watch::channel(RegistrationState::Held);
        let hold =
            MemoryHold { shared: self.shared.clone(), id: member.id.clone(), generation: member.generation };
        let registration = Registration::new(&member, changes, hold);
        table.members.insert(member.id.clone(), Held { member: Arc::new(member), state });
        self.shared.publish(&mut table);
        Ok(registration)
    }

    fn watch(&self) -> SnapshotReceiver {
        self.shared.snapshots.subscribe()
    }

    async fn close(&self) {
        let mut table = self.shared.lock();
        table.closed = true;
        for held in std::mem::take(&mut table.members).into_values() {
            held.state.send_replace(RegistrationState::Lost);
        }
        self.shared.publish(&mut table);
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // No code that holds the lock leaves the table half changed.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_table(&self) -> Result<MutexGuard<'_, Table>, StoreError> {
        let table = self.lock();
        if table.closed { Err(StoreError::Closed) } else { Ok(table) }
    }

    fn publish(&self, table: &mut Table) {
        table.revision += 1;
        let members = table.members.values().map(|held| held.member.clone());
        self.snapshots.send_replace(Arc::new(Snapshot::new(members, table.revision)));
    }
}

// === impl MemoryHold ===

#[async_trait]
impl Hold for MemoryHold {
    fn update(&self, member: Member) -> Result<(), StoreError> {
        record::check(&member)?;
        let mut table = self.shared.open_table()?;
        if let Some(held) = self.own(&mut table) {
            held.member = Arc::new(member);
            self.shared.publish(&mut table);
        }
        Ok(())
    }

    async fn release(self: Box<Self>) {
        self.abandon();
    }

    fn abandon(self: Box<Self>) {
        let mut table = self.shared.lock();
        if self.own(&mut table).is_some() {
            table.members.remove(&self.id);
            self.shared.publish(&mut table);
        }
    }
}

impl MemoryHold {
    /// The record, if it is still this life's.
    fn own<'a>(&self, table: &'a mut Table) -> Option<&'a mut Held> {
        table.members.get_mut(&self.id).filter(|held| held.member.generation == self.generation)
    }
}
