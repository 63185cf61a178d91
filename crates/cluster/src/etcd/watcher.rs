//! The snapshot, kept up to date: a list, then changes from there on, then a list again when they cannot be had.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;

use etcd_client::{EventType, GetOptions, ResponseHeader, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::watch;
use tokio::time::Instant;
use uniarm_proto::{AdapterRecord, Member};

use super::session::Session;
use crate::adapters::{self, Adapters};
use crate::backoff::Backoff;
use crate::snapshot::Snapshot;
use crate::{StoreError, record};

/// A kind of record that is watched, and what its readers see of all of them.
pub(super) trait Watched: Sized + Send + Sync + 'static {
    type Snapshot: Send + Sync + 'static;

    /// In log lines.
    const WHAT: &'static str;

    fn decode(bytes: &[u8]) -> Result<Self, StoreError>;

    fn snapshot(records: impl Iterator<Item = Arc<Self>>, revision: u64) -> Self::Snapshot;
}

pub(super) struct Watcher<T: Watched> {
    session: Arc<Session>,
    /// Begins the keys of all records.
    prefix: String,
    publish: watch::Sender<Arc<T::Snapshot>>,
    table: Table<T>,
    backoff: Backoff,
    /// Since the last success, so that an outage is logged once at each end.
    away: bool,
}

/// The records by key, as of a revision of etcd.
struct Table<T> {
    records: BTreeMap<Vec<u8>, Arc<T>>,
    /// 0: nothing was listed yet.
    revision: i64,
    /// Records that only the lost data of a former etcd vouches for; they go at the deadline.
    unconfirmed: BTreeSet<Vec<u8>>,
    deadline: Option<Instant>,
}

/// What to do after the watch has said or lost something.
enum Step {
    List,
    Follow,
}

// === impl Member ===

impl Watched for Member {
    type Snapshot = Snapshot;

    const WHAT: &'static str = "members";

    fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        record::decode(bytes)
    }

    fn snapshot(records: impl Iterator<Item = Arc<Self>>, revision: u64) -> Snapshot {
        Snapshot::new(records, revision)
    }
}

// === impl AdapterRecord ===

impl Watched for AdapterRecord {
    type Snapshot = Adapters;

    const WHAT: &'static str = "adapters";

    fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        adapters::decode(bytes)
    }

    fn snapshot(records: impl Iterator<Item = Arc<Self>>, revision: u64) -> Adapters {
        Adapters::new(records, revision)
    }
}

// === impl Watcher ===

impl<T: Watched> Watcher<T> {
    pub(super) fn new(
        session: Arc<Session>,
        prefix: String,
        publish: watch::Sender<Arc<T::Snapshot>>,
    ) -> Self {
        let table =
            Table { records: BTreeMap::new(), revision: 0, unconfirmed: BTreeSet::new(), deadline: None };
        Self { session, prefix, publish, table, backoff: Backoff::new(), away: false }
    }

    /// Publishes snapshots for ever. While etcd is away the last one stays.
    pub(super) async fn run(mut self) -> Infallible {
        let mut step = Step::List;
        loop {
            let done = match step {
                Step::List => self.list().await,
                Step::Follow => self.follow().await,
            };
            step = match done {
                Ok(next) => next,
                Err(error) => {
                    self.report_away(&error);
                    tokio::time::sleep(self.backoff.next()).await;
                    // Watching on from the last revision loses nothing; before the first list there is none.
                    if self.table.revision == 0 { Step::List } else { Step::Follow }
                }
            };
        }
    }

    async fn list(&mut self) -> Result<Step, StoreError> {
        let key = self.prefix.clone();
        let options = GetOptions::new().with_prefix();
        let answer = self.session.request(|mut client| async move { client.get(key, Some(options)).await });
        let answer = answer.await?;
        let listed = answer.kvs().iter().map(|kv| (kv.key(), kv.value()));
        self.table.replace(listed, revision(answer.header()), Instant::now() + self.session.lease_ttl);
        self.publish();
        Ok(Step::Follow)
    }

    /// Applies changes from the table's revision on, until the stream breaks (an error) or etcd does
    /// not have the changes any more.
    async fn follow(&mut self) -> Result<Step, StoreError> {
        let mut stream = self.open().await?;
        loop {
            let message = tokio::select! {
                message = stream.message() => message?,
                () = at(self.table.deadline) => {
                    self.table.drop_unconfirmed();
                    self.publish();
                    continue;
                }
            };
            let Some(response) = message else {
                return Err(StoreError::Unavailable("the watch ended".to_owned()));
            };
            if let Some(step) = self.apply(&response) {
                return Ok(step);
            }
        }
    }

    async fn open(&self) -> Result<WatchStream, StoreError> {
        let key = self.prefix.clone();
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(self.table.revision + 1)
            // Keeps the revision recent while nothing changes, so that compaction seldom overtakes it.
            .with_progress_notify();
        self.session.request(|mut client| async move { client.watch(key, Some(options)).await }).await
    }

    fn apply(&mut self, response: &WatchResponse) -> Option<Step> {
        let revision = revision(response.header());
        if response.canceled() {
            tracing::info!(
                compacted = response.compact_revision(),
                reason = response.cancel_reason(),
                "the watch was refused; listing the {} again",
                T::WHAT
            );
            return Some(Step::List);
        }
        if response.created() {
            self.report_back();
            // The answer to a new watch tells the store's revision: one that is older than what was
            // seen before belongs to another store, such as one without its data.
            return (revision < self.table.revision).then_some(Step::List);
        }
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => self.table.put(kv.key(), kv.value()),
                EventType::Delete => self.table.remove(kv.key()),
            }
        }
        self.table.revision = self.table.revision.max(revision);
        if !response.events().is_empty() {
            self.publish();
        }
        None
    }

    fn publish(&self) {
        let revision = u64::try_from(self.table.revision).unwrap_or(0);
        let records = self.table.records.values().cloned();
        self.publish.send_replace(Arc::new(T::snapshot(records, revision)));
    }

    fn report_away(&mut self, error: &StoreError) {
        if self.away {
            tracing::debug!(%error, "still cannot watch the {}", T::WHAT);
        } else {
            tracing::warn!(%error, "cannot watch the {}; going on with the last snapshot", T::WHAT);
            self.away = true;
        }
    }

    fn report_back(&mut self) {
        self.backoff.reset();
        if std::mem::take(&mut self.away) {
            tracing::info!("watching the {} again", T::WHAT);
        }
    }
}

// === impl Table ===

impl<T: Watched> Table<T> {
    /// Takes a full list as of `revision`. An etcd that lost its data lists nobody, though everybody is
    /// alive and will register again: who is missing from it stays until `deadline`. From an etcd
    /// that kept its data, who is missing has left or died.
    fn replace<'a>(
        &mut self,
        listed: impl Iterator<Item = (&'a [u8], &'a [u8])>,
        revision: i64,
        deadline: Instant,
    ) {
        let former = std::mem::take(&mut self.records);
        for (key, value) in listed {
            self.put(key, value);
        }
        if revision < self.revision {
            for (key, record) in former {
                if !self.records.contains_key(&key) {
                    self.unconfirmed.insert(key.clone());
                    self.records.insert(key, record);
                }
            }
            tracing::warn!(unconfirmed = self.unconfirmed.len(), "the store lost its data");
            self.deadline = (!self.unconfirmed.is_empty()).then_some(deadline);
        }
        self.revision = revision;
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.remove(key);
        match T::decode(value) {
            Ok(record) => {
                self.records.insert(key.to_vec(), Arc::new(record));
            }
            Err(error) => {
                tracing::warn!(key = %String::from_utf8_lossy(key), %error, "ignoring a record");
            }
        }
    }

    fn remove(&mut self, key: &[u8]) {
        self.records.remove(key);
        self.unconfirmed.remove(key);
    }

    fn drop_unconfirmed(&mut self) {
        for key in std::mem::take(&mut self.unconfirmed) {
            self.records.remove(&key);
        }
        self.deadline = None;
    }
}

fn revision(header: Option<&ResponseHeader>) -> i64 {
    header.map_or(0, ResponseHeader::revision)
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
