//! The snapshot, kept up to date: a list, then changes from there on, then a list again when they cannot be had.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;

use etcd_client::{EventType, GetOptions, ResponseHeader, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::watch;
use tokio::time::Instant;
use uniarm_proto::Member;

use super::keys::Keys;
use super::session::Session;
use crate::backoff::Backoff;
use crate::snapshot::Snapshot;
use crate::{StoreError, record};

pub(super) struct Watcher {
    session: Arc<Session>,
    keys: Keys,
    publish: watch::Sender<Arc<Snapshot>>,
    table: Table,
    backoff: Backoff,
    /// Since the last success, so that an outage is logged once at each end.
    away: bool,
}

/// The members by key, as of a revision of etcd.
#[derive(Default)]
struct Table {
    members: BTreeMap<Vec<u8>, Arc<Member>>,
    /// 0: nothing was listed yet.
    revision: i64,
    /// Members that only the lost data of a former etcd vouches for; they go at the deadline.
    unconfirmed: BTreeSet<Vec<u8>>,
    deadline: Option<Instant>,
}

/// What to do after the watch has said or lost something.
enum Step {
    List,
    Follow,
}

// === impl Watcher ===

impl Watcher {
    pub(super) fn new(session: Arc<Session>, keys: Keys, publish: watch::Sender<Arc<Snapshot>>) -> Self {
        Self { session, keys, publish, table: Table::default(), backoff: Backoff::new(), away: false }
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
        let key = self.keys.members();
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
        let key = self.keys.members();
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
                "the watch was refused; listing the members again"
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
        let members = self.table.members.values().cloned();
        self.publish.send_replace(Arc::new(Snapshot::new(members, revision)));
    }

    fn report_away(&mut self, error: &StoreError) {
        if self.away {
            tracing::debug!(%error, "still cannot watch the members");
        } else {
            tracing::warn!(%error, "cannot watch the members; going on with the last snapshot");
            self.away = true;
        }
    }

    fn report_back(&mut self) {
        self.backoff.reset();
        if std::mem::take(&mut self.away) {
            tracing::info!("watching the members again");
        }
    }
}

// === impl Table ===

impl Table {
    /// Takes a full list as of `revision`. An etcd that lost its data lists nobody, though everybody is
    /// alive and will register again: who is missing from it stays until `deadline`. From an etcd
    /// that kept its data, who is missing has left or died.
    fn replace<'a>(
        &mut self,
        listed: impl Iterator<Item = (&'a [u8], &'a [u8])>,
        revision: i64,
        deadline: Instant,
    ) {
        let former = std::mem::take(&mut self.members);
        for (key, value) in listed {
            self.put(key, value);
        }
        if revision < self.revision {
            for (key, member) in former {
                if !self.members.contains_key(&key) {
                    self.unconfirmed.insert(key.clone());
                    self.members.insert(key, member);
                }
            }
            tracing::warn!(unconfirmed = self.unconfirmed.len(), "the store lost its data");
            self.deadline = (!self.unconfirmed.is_empty()).then_some(deadline);
        }
        self.revision = revision;
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.remove(key);
        match record::decode(value) {
            Ok(member) => {
                self.members.insert(key.to_vec(), Arc::new(member));
            }
            Err(error) => {
                tracing::warn!(key = %String::from_utf8_lossy(key), %error, "ignoring a record");
            }
        }
    }

    fn remove(&mut self, key: &[u8]) {
        self.members.remove(key);
        self.unconfirmed.remove(key);
    }

    fn drop_unconfirmed(&mut self) {
        for key in std::mem::take(&mut self.unconfirmed) {
            self.members.remove(&key);
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
