//! The member store in etcd: everything that talks to it runs on one thread of its own.
//!
//! An engine that keeps every worker of the process's runtime busy must not cost the process its
//! membership, so the client, the watch and all keepalives live on a small runtime beside it.

mod catalogue;
mod keeper;
mod keys;
mod session;
mod watcher;
mod work;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uniarm_proto::{AdapterRecord, Generation, Member, MemberId};

use crate::adapters::{self, Adapters, AdaptersReceiver, NewAdapter};
use crate::address::PREFIX_DEFAULT;
use crate::backoff::Backoff;
use crate::snapshot::{Snapshot, SnapshotReceiver};
use crate::store::{Hold, MemberStore, Registration, RegistrationState};
use crate::{StoreError, record};
use keeper::Keeper;
use keys::Keys;
use session::Session;
use watcher::Watcher;
pub use work::{Claim, Claimed, Work, WorkState};

const THREAD_NAME: &str = "uniarm-etcd";

/// etcd itself grants no shorter lease: it takes two of its elections (1 s each) to move one.
const LEASE_TTL_MIN: Duration = Duration::from_secs(2);

/// Most time that a closed store spends on removing its records.
const FAREWELL: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// Begins every key. Clusters that share an etcd differ in it.
    pub prefix: String,
    /// How long a member that died stays recorded: whole seconds, at least 2.
    pub lease_ttl: Duration,
    /// One request, with the connection it may need.
    pub request_timeout: Duration,
    pub credentials: Option<Credentials>,
    /// Present: every connection is TLS.
    pub tls: Option<TlsFiles>,
}

#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

/// PEM files.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// Who signed etcd's certificate.
    pub authority: Option<PathBuf>,
    /// This client's certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in etcd's certificate, where it is not the host's.
    pub domain: Option<String>,
}

/// Clones share one connection, one watch and one thread, which ends with the last clone and the
/// last registration.
#[derive(Clone)]
pub struct EtcdStore {
    shared: Arc<Shared>,
}

struct Shared {
    session: Arc<Session>,
    keys: Keys,
    handle: Handle,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Watched once somebody asks: only reward workers do, and who manages the catalogue.
    catalogues: OnceLock<AdaptersReceiver>,
    stop: CancellationToken,
    /// Its clones tell the thread that keepers are still at work. None: the store is closed.
    working: Mutex<Option<mpsc::Sender<Infallible>>>,
    /// The thread has ended.
    ended: CancellationToken,
}

struct EtcdHold {
    record: watch::Sender<Arc<Member>>,
    leave: CancellationToken,
    left: CancellationToken,
    /// Keeps the thread that keeps the lease.
    _shared: Arc<Shared>,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            prefix: PREFIX_DEFAULT.to_owned(),
            lease_ttl: Duration::from_secs(10),
            request_timeout: Duration::from_secs(3),
            credentials: None,
            tls: None,
        }
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

fn check_options(endpoints: &[String], options: &EtcdOptions) -> Result<(), StoreError> {
    let refuse = |reason: String| StoreError::Address { address: endpoints.join(","), reason };
    if endpoints.is_empty() {
        return Err(refuse("no endpoint".to_owned()));
    }
    if options.lease_ttl < LEASE_TTL_MIN || options.lease_ttl.subsec_nanos() != 0 {
        return Err(refuse(format!("lease_ttl {:?}: want whole seconds, at least 2", options.lease_ttl)));
    }
    Ok(())
}

// === impl EtcdStore ===

impl EtcdStore {
    /// Opens the store at `endpoints` (host:port each). It does not wait for etcd, which may well start
    /// after this process: until it answers, the snapshot is empty with revision 0. Only what no
    /// waiting can mend is an error: no endpoint, an impossible option, an unreadable TLS file.
    pub fn connect(endpoints: &[String], options: &EtcdOptions) -> Result<Self, StoreError> {
        check_options(endpoints, options)?;
        let refuse = |reason: String| StoreError::Address { address: endpoints.join(","), reason };
        let keys = Keys::new(&options.prefix);
        let session = Arc::new(Session::new(endpoints.to_vec(), options)?);
        let thread_failed = |error: std::io::Error| refuse(format!("cannot start its thread: {error}"));
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(thread_failed)?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let (working, mut all_done) = mpsc::channel::<Infallible>(1);
        let (publish, snapshots) = watch::channel(Arc::new(Snapshot::default()));
        let watching = Watcher::<Member>::new(session.clone(), keys.members(), publish).run();
        let (stopped, ended) = (stop.clone(), CancellationToken::new());
        let ending = ended.clone().drop_guard();
        std::thread::Builder::new()
            .name(THREAD_NAME.to_owned())
            .spawn(move || {
                let _ending = ending;
                runtime.block_on(async {
                    tokio::select! {
                        never = watching => match never {},
                        () = stopped.cancelled() => {}
                    }
                    let _ = tokio::time::timeout(FAREWELL, all_done.recv()).await;
                });
            })
            .map_err(thread_failed)?;
        let working = Mutex::new(Some(working));
        let catalogues = OnceLock::new();
        let shared = Shared { session, keys, handle, snapshots, catalogues, stop, working, ended };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Runs `attempt` on the store's thread until it succeeds or fails for good.
    async fn insist<T, F>(
        &self,
        what: &'static str,
        attempt: impl Fn() -> F + Send + 'static,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let stop = self.shared.stop.clone();
        let insisting = async move {
            let mut backoff = Backoff::new();
            let mut waiting = false;
            loop {
                match attempt().await {
                    Err(error) if error.is_retryable() => {
                        if !std::mem::replace(&mut waiting, true) {
                            tracing::warn!(%error, "waiting for the store to {what}");
                        }
                        tokio::time::sleep(backoff.next()).await;
                    }
                    done => return done,
                }
            }
        };
        let task = self.shared.handle.spawn(async move {
            tokio::select! {
                done = insisting => done,
                () = stop.cancelled() => Err(StoreError::Closed),
            }
        });
        // The caller may give up (a timeout, a shutdown): then the attempts must end too.
        let mut task = AbortOnDrop(task);
        (&mut task.0).await.unwrap_or(Err(StoreError::Closed))
    }
}

#[async_trait]
impl MemberStore for EtcdStore {
    async fn next_generation(&self, id: &MemberId) -> Result<Generation, StoreError> {
        record::check_id(id)?;
        let session = self.shared.session.clone();
        let key = self.shared.keys.generation(id);
        self.insist("count a generation", move || {
            let (session, key) = (session.clone(), key.clone());
            async move { next_generation(&session, &key).await }
        })
        .await
    }

    async fn register(&self, member: Member) -> Result<Registration, StoreError> {
        record::check(&member)?;
        let member = Arc::new(member);
        let key = self.shared.keys.member(&member.id);
        let lease = self
            .insist("register", {
                let (session, key, member) = (self.shared.session.clone(), key.clone(), member.clone());
                move || {
                    let (session, key, member) = (session.clone(), key.clone(), member.clone());
                    async move { keeper::acquire(&session, &key, &member).await }
                }
            })
            .await?;
        let working = self.shared.working().clone().ok_or(StoreError::Closed)?;
        let (record, records) = watch::channel(member.clone());
        let (state, changes) = watch::channel(RegistrationState::Held);
        let (leave, left) = (self.shared.stop.child_token(), CancellationToken::new());
        let keeper = Keeper {
            session: self.shared.session.clone(),
            key,
            records,
            state,
            leave: leave.clone(),
            _left: left.clone().drop_guard(),
            _working: working,
        };
        self.shared.handle.spawn(keeper.run(lease));
        let hold = EtcdHold { record, leave, left, _shared: self.shared.clone() };
        Ok(Registration::new(&member, changes, hold))
    }

    fn watch(&self) -> SnapshotReceiver {
        self.shared.snapshots.clone()
    }

    async fn put_adapter(&self, adapter: NewAdapter) -> Result<AdapterRecord, StoreError> {
        adapters::check(&adapter, 0)?;
        let (session, keys) = (self.shared.session.clone(), self.shared.keys.clone());
        let adapter = Arc::new(adapter);
        self.insist("put an adapter", move || {
            let (session, keys, adapter) = (session.clone(), keys.clone(), adapter.clone());
            async move { catalogue::put(&session, &keys, &adapter).await }
        })
        .await
    }

    async fn remove_adapter(&self, name: &str) -> Result<AdapterRecord, StoreError> {
        let (session, keys) = (self.shared.session.clone(), self.shared.keys.clone());
        let name: Arc<str> = name.into();
        self.insist("remove an adapter", move || {
            let (session, keys, name) = (session.clone(), keys.clone(), name.clone());
            async move { catalogue::remove(&session, &keys, &name).await }
        })
        .await
    }

    fn watch_adapters(&self) -> AdaptersReceiver {
        let watching = || {
            let (publish, catalogues) = watch::channel(Arc::new(Adapters::default()));
            let (session, prefix) = (self.shared.session.clone(), self.shared.keys.adapters());
            let watcher = Watcher::<AdapterRecord>::new(session, prefix, publish);
            // It ends with the store's thread.
            self.shared.handle.spawn(watcher.run());
            catalogues
        };
        self.shared.catalogues.get_or_init(watching).clone()
    }

    async fn close(&self) {
        self.shared.stop.cancel();
        self.shared.working().take();
        self.shared.ended.cancelled().await;
    }
}

// === impl Shared ===

impl Shared {
    fn working(&self) -> MutexGuard<'_, Option<mpsc::Sender<Infallible>>> {
        self.working.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

// === impl EtcdHold ===

#[async_trait]
impl Hold for EtcdHold {
    fn update(&self, member: Member) -> Result<(), StoreError> {
        record::check(&member)?;
        self.record.send_replace(Arc::new(member));
        Ok(())
    }

    async fn release(self: Box<Self>) {
        self.leave.cancel();
        self.left.cancelled().await;
    }

    fn abandon(self: Box<Self>) {
        self.leave.cancel();
    }
}

/// A task that ends with its owner.
struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn next_generation(session: &Session, key: &str) -> Result<Generation, StoreError> {
    let found = session.request(|mut client| async move { client.get(key, None).await }).await?;
    let (last, mod_revision) = match found.kvs().first() {
        Some(kv) => {
            (kv.value_str().ok().and_then(|digits| digits.parse().ok()).unwrap_or(0), kv.mod_revision())
        }
        None => (0, 0),
    };
    let next = record::generation_after(last, SystemTime::now());
    let count = Txn::new()
        .when([Compare::mod_revision(key, CompareOp::Equal, mod_revision)])
        .and_then([TxnOp::put(key, next.to_string(), None)]);
    let counted = session.request(|mut client| async move { client.txn(count).await }).await?;
    if counted.succeeded() {
        Ok(Generation(next))
    } else {
        Err(StoreError::Unavailable("another process counted at the same moment".to_owned()))
    }
}
