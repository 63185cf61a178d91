//! The member store of one process: for `uniarm up`, for static peers, and for tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::watch;
use uniarm_proto::{AdapterRecord, Generation, Member, MemberId};

use crate::adapters::{self, Adapters, AdaptersReceiver, NewAdapter};
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
    clock: Box<dyn Fn() -> SystemTime + Send + Sync>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    catalogues: watch::Sender<Arc<Adapters>>,
}

#[derive(Default)]
struct Table {
    members: BTreeMap<MemberId, Held>,
    adapters: BTreeMap<String, Arc<AdapterRecord>>,
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
    pub fn with_clock(clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        // Revision 0 is for stores that have not been read yet; this one is complete from the start.
        let table = Table { revision: 1, ..Table::default() };
        let snapshots = watch::Sender::new(Arc::new(Snapshot::new([], table.revision)));
        let catalogues = watch::Sender::new(Arc::new(Adapters::new([], table.revision)));
        let (table, clock) = (Mutex::new(table), Box::new(clock));
        Self { shared: Arc::new(Shared { table, clock, snapshots, catalogues }) }
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

    async fn put_adapter(&self, adapter: NewAdapter) -> Result<AdapterRecord, StoreError> {
        let mut table = self.shared.open_table()?;
        let former = table.adapters.get(&adapter.name).cloned();
        let others = table.adapters.values();
        let others = others.filter(|record| record.name != adapter.name && !record.is_removed()).count();
        adapters::check(&adapter, others)?;
        let record = adapters::put(former.as_deref(), &adapter, self.shared.now_ms());
        self.shared.settle(&mut table, former, record)
    }

    async fn remove_adapter(&self, name: &str) -> Result<AdapterRecord, StoreError> {
        let mut table = self.shared.open_table()?;
        let former = table.adapters.get(name).cloned();
        let record = adapters::remove(former.as_deref(), name, self.shared.now_ms())?;
        self.shared.settle(&mut table, former, record)
    }

    fn watch_adapters(&self) -> AdaptersReceiver {
        self.shared.catalogues.subscribe()
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

    fn now_ms(&self) -> u64 {
        record::milliseconds((self.clock)())
    }

    /// Takes in what a record has become, and tells everyone; `None`: it is as it was.
    fn settle(
        &self,
        table: &mut Table,
        former: Option<Arc<AdapterRecord>>,
        record: Option<AdapterRecord>,
    ) -> Result<AdapterRecord, StoreError> {
        let Some(record) = record else {
            return Ok(former.map(Arc::unwrap_or_clone).expect("only what is there stays as it was"));
        };
        table.revision += 1;
        table.adapters.insert(record.name.clone(), Arc::new(record.clone()));
        let catalogue = Adapters::new(table.adapters.values().cloned(), table.revision);
        self.catalogues.send_replace(Arc::new(catalogue));
        Ok(record)
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
