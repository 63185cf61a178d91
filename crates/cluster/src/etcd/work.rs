//! Work that several processes share: pieces under leases, each finished once.
//!
//! A piece is taken by creating its key under this process's lease, and finished in one transaction that holds only while
//! that very key is there: its revision is the fence. A process that was stopped for longer than its lease, and goes on,
//! finds that its finish is refused, whoever has the piece by then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::keeper::RENEWALS_PER_TTL;
use super::session::Session;
use super::{EtcdOptions, check_options};
use crate::StoreError;
use crate::backoff::Backoff;

/// Bytes of a job's name, which is part of keys.
const NAME_BYTES_MAX: usize = 128;

/// One shared job, as one of its processes sees it. Dropped, it leaves its pieces to the others when its lease ends;
/// `leave` gives them up at once.
pub struct Work {
    session: Arc<Session>,
    /// Begins the keys of this job, and ends with a slash.
    prefix: String,
    patience: Duration,
    lease: Mutex<Option<Lease>>,
}

struct Lease {
    id: i64,
    keeping: JoinHandle<()>,
}

/// A piece that is this process's, until its lease ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    piece: String,
    /// Of the key that holds the piece: the fence.
    revision: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    Mine(Claim),
    /// Another process works on it.
    Others,
    /// What its finisher recorded.
    Finished(Vec<u8>),
}

/// A job at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkState {
    /// Finished pieces, with what was recorded of each.
    pub finished: BTreeMap<String, Vec<u8>>,
    /// Pieces that some process works on.
    pub claimed: BTreeSet<String>,
}

// === impl Claim ===

impl Claim {
    /// Greater than that of every earlier claim of the same piece.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.revision
    }
}

// === impl Work ===

impl Work {
    /// The job `name` in the etcd at `endpoints`. Nothing is asked yet. `patience`: how long an etcd that does not answer
    /// is waited for.
    ///
    /// # Errors
    /// What no waiting can mend: a name that is no name, no endpoint, an unreadable TLS file.
    pub fn new(
        endpoints: &[String],
        options: &EtcdOptions,
        name: &str,
        patience: Duration,
    ) -> Result<Self, StoreError> {
        check_options(endpoints, options)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(plain) {
            return Err(StoreError::Refused(format!(
                "the job name {name:?}: want 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes and underscores"
            )));
        }
        Ok(Self {
            session: Arc::new(Session::new(endpoints.to_vec(), options)?),
            prefix: format!("{}/work/{name}/", options.prefix.trim_end_matches('/')),
            patience,
            lease: Mutex::new(None),
        })
    }

    /// Records what the job is, unless it is recorded. Returns what is recorded, and whether it was now.
    pub async fn describe(&self, description: &[u8]) -> Result<(Vec<u8>, bool), StoreError> {
        let key = self.key("description");
        let create = Txn::new()
            .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.as_str(), description, None)])
            .or_else([TxnOp::get(key.as_str(), None)]);
        let answer = self.insist(|mut client| {
            let create = create.clone();
            async move { client.txn(create).await }
        });
        match first_value(&answer.await?, 0) {
            Some(recorded) => Ok((recorded, false)),
            None => Ok((description.to_vec(), true)),
        }
    }

    /// Takes a piece that nobody works on and nobody has finished.
    pub async fn claim(&self, piece: &str) -> Result<Claimed, StoreError> {
        let (claimed, finished) = (self.claimed(piece), self.finished(piece));
        // The lease is asked for in each attempt: a process that hung learns only after a while that it has lost its own.
        let attempt = || async {
            let lease = self.lease().await?;
            let both = [&claimed, &finished];
            let create = Txn::new()
                .when(both.map(|key| Compare::create_revision(key.as_str(), CompareOp::Equal, 0)))
                .and_then([TxnOp::put(claimed.as_str(), "", Some(PutOptions::new().with_lease(lease)))])
                .or_else([TxnOp::get(finished.as_str(), None), TxnOp::get(claimed.as_str(), None)]);
            let answer = self.session.request(|mut client| async move { client.txn(create).await }).await?;
            Ok((lease, answer))
        };
        let (lease, answer) = self.repeat(attempt).await?;
        let mine = |revision| Claimed::Mine(Claim { piece: piece.to_owned(), revision });
        if answer.succeeded() {
            let header = answer.header().ok_or_else(|| unheard("a transaction without a revision"))?;
            return Ok(mine(header.revision()));
        }
        if let Some(record) = first_value(&answer, 0) {
            return Ok(Claimed::Finished(record));
        }
        // Under this lease: an earlier try took it, and its answer was lost.
        match answer.op_responses().get(1) {
            Some(TxnOpResponse::Get(found)) => match found.kvs().first() {
                Some(own) if own.lease() == lease => Ok(mine(own.create_revision())),
                _ => Ok(Claimed::Others),
            },
            _ => Ok(Claimed::Others),
        }
    }

    /// Finishes a piece for good. False: it is no longer this claim's, and nothing was recorded.
    pub async fn finish(&self, claim: &Claim, record: &[u8]) -> Result<bool, StoreError> {
        let (claimed, finished) = (self.claimed(&claim.piece), self.finished(&claim.piece));
        let finish = Txn::new()
            .when([Compare::create_revision(claimed.as_str(), CompareOp::Equal, claim.revision)])
            .and_then([TxnOp::put(finished.as_str(), record, None), TxnOp::delete(claimed.as_str(), None)])
            .or_else([TxnOp::get(finished.as_str(), None)]);
        let answer = self.insist(|mut client| {
            let finish = finish.clone();
            async move { client.txn(finish).await }
        });
        let answer = answer.await?;
        // This very record: an earlier try finished it, and its answer was lost.
        Ok(answer.succeeded() || first_value(&answer, 0).as_deref() == Some(record))
    }

    pub async fn state(&self) -> Result<WorkState, StoreError> {
        let (finished, claimed) = (self.finished(""), self.claimed(""));
        let all = GetOptions::new().with_prefix();
        let both = Txn::new().and_then([
            TxnOp::get(finished.as_str(), Some(all.clone())),
            TxnOp::get(claimed.as_str(), Some(all.with_keys_only())),
        ]);
        let answer = self.insist(|mut client| {
            let both = both.clone();
            async move { client.txn(both).await }
        });
        let answer = answer.await?;
        let found = |index: usize| match answer.op_responses().into_iter().nth(index) {
            Some(TxnOpResponse::Get(found)) => found.kvs().to_vec(),
            _ => Vec::new(),
        };
        let piece = |record: &KeyValue, prefix: &str| {
            String::from_utf8_lossy(record.key()).trim_start_matches(prefix).to_owned()
        };
        Ok(WorkState {
            finished: found(0)
                .iter()
                .map(|record| (piece(record, &finished), record.value().to_vec()))
                .collect(),
            claimed: found(1).iter().map(|record| piece(record, &claimed)).collect(),
        })
    }

    /// Gives up what is claimed and not finished, so that others need not wait for the lease to end.
    pub async fn leave(&self) {
        let Some(lease) = self.lease.lock().await.take() else { return };
        lease.keeping.abort();
        let revoke = |mut client: Client| async move { client.lease_revoke(lease.id).await };
        if let Err(error) = self.session.request(revoke).await {
            tracing::warn!(%error, "the claims were not given up, and will run out");
        }
    }

    /// The lease of all claims; another one where it was lost.
    async fn lease(&self) -> Result<i64, StoreError> {
        let mut held = self.lease.lock().await;
        if let Some(lease) = held.as_ref().filter(|lease| !lease.keeping.is_finished()) {
            return Ok(lease.id);
        }
        let ttl_s = i64::try_from(self.session.lease_ttl.as_secs())
            .map_err(|_| StoreError::Refused("the lease's time does not fit".to_owned()))?;
        let grant = self.insist(|mut client| async move { client.lease_grant(ttl_s, None).await }).await?;
        let keeping = tokio::spawn(keep(self.session.clone(), grant.id()));
        Ok(held.insert(Lease { id: grant.id(), keeping }).id)
    }

    /// Asks until etcd answers, within this job's patience.
    async fn insist<T, F>(&self, request: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.repeat(|| self.session.request(&request)).await
    }

    async fn repeat<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let began = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            match attempt().await {
                Err(error) if error.is_retryable() && began.elapsed() < self.patience => {
                    tracing::debug!(%error, "waiting for the store");
                    tokio::time::sleep(backoff.next()).await;
                }
                done => return done,
            }
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn claimed(&self, piece: &str) -> String {
        self.key(&format!("claimed/{piece}"))
    }

    fn finished(&self, piece: &str) -> String {
        self.key(&format!("finished/{piece}"))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeping.abort();
    }
}

/// Renews a lease until it is gone.
async fn keep(session: Arc<Session>, lease: i64) {
    loop {
        tokio::time::sleep(session.lease_ttl / RENEWALS_PER_TTL).await;
        let renew = |mut client: Client| async move {
            match client.lease_keep_alive(lease).await {
                // The client reports a lease that is gone as an error of its own, without a code.
                Err(etcd_client::Error::LeaseKeepAliveError(_)) => Ok(false),
                renewed => renewed.map(|_| true),
            }
        };
        match session.request(renew).await {
            Ok(true) => {}
            Ok(false) => return tracing::warn!("the lease of the claims was lost"),
            // It may well be as it was when etcd is back.
            Err(error) => tracing::debug!(%error, "the lease of the claims was not renewed"),
        }
    }
}

/// The value that the response at `index` got, if there was one.
fn first_value(answer: &TxnResponse, index: usize) -> Option<Vec<u8>> {
    match answer.op_responses().get(index) {
        Some(TxnOpResponse::Get(found)) => found.kvs().first().map(|record| record.value().to_vec()),
        _ => None,
    }
}

fn unheard(what: &str) -> StoreError {
    StoreError::Unavailable(format!("etcd answered with {what}"))
}
