//! The front door: a request is made valid or its bad field is named, takes a permit, and is relayed.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt as _};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, metadata::MetadataMap};
use uniarm_cluster::SnapshotReceiver;
use uniarm_proto::{
    Dice, GenerateRequest, Priority, Progress, Refusal, Transcript,
    client::Dialer,
    deadline,
    limits::REQUEST_MESSAGE_BYTES_MAX,
    pb::{
        self,
        inference_server::{Inference, InferenceServer},
    },
    refusal::TENANT_SHARE,
};
use uniarm_runtime::Metrics;

use crate::{
    audit::Journal,
    load::LoadTable,
    metrics::RouterMetrics,
    place::Scope,
    relay::{Asked, Channels, DrainMeter, Relay},
    tenants::{Caller, Tenants},
};

/// Limits of a router, and what it reaches the cluster through.
#[derive(Clone)]
pub struct RouterOptions {
    /// Requests that it relays at once.
    pub requests_max: usize,
    /// Who may ask.
    pub tenants: Tenants,
    /// Where records are kept of requests that want one; `None`: such requests are refused.
    pub audit: Option<Journal>,
    pub dialer: Dialer,
    /// A client that has not read for so long loses its stream, and may come again for the rest.
    pub client_patience: Duration,
    /// Of ids, seeds, turns and waits.
    pub dice: Dice,
}

/// How long a client may leave its stream unread: a person who looks into a debugger may be longer, and goes on then.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// Serves `Inference` over the members of one cluster.
#[derive(Clone)]
pub struct RouterService {
    pub(crate) relay: Relay,
    permits: Arc<Semaphore>,
    options: Arc<RouterOptions>,
    is_draining: Arc<AtomicBool>,
}

// === impl RouterOptions ===

impl Default for RouterOptions {
    fn default() -> Self {
        Self {
            requests_max: 4096,
            tenants: Tenants::default(),
            audit: None,
            dialer: Dialer::default(),
            client_patience: CLIENT_PATIENCE,
            dice: Dice::default(),
        }
    }
}

// === impl RouterService ===

impl RouterService {
    pub fn new(members: SnapshotReceiver, options: RouterOptions, metrics: &Metrics) -> Self {
        let relay = Relay {
            members,
            channels: Channels::over(options.dialer.clone()),
            loads: LoadTable::default(),
            circuits: Arc::default(),
            budget: Arc::default(),
            dice: options.dice.clone(),
            drain: Arc::new(Mutex::new(DrainMeter::new())),
            metrics: RouterMetrics::new(metrics),
            client_patience: options.client_patience,
            hand_over: CancellationToken::new(),
        };
        let permits = Arc::new(Semaphore::new(options.requests_max));
        Self { relay, permits, options: Arc::new(options), is_draining: Arc::default() }
    }

    pub fn inference_server(&self) -> InferenceServer<Self> {
        InferenceServer::new(self.clone()).max_decoding_message_size(REQUEST_MESSAGE_BYTES_MAX)
    }

    /// Requests that hold a place, from the first look at them to their last event.
    pub fn places_taken(&self) -> usize {
        self.options.requests_max - self.permits.available_permits()
    }

    /// From here on new requests are refused, so that their clients ask another router.
    pub fn begin_drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Ends the streams that still run; a `ClusterClient` goes on at another router.
    pub fn hand_over(&self) {
        self.relay.hand_over.cancel();
    }

    /// No new requests are taken.
    pub(crate) fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// Who sends a request with this header, or metadata, `authorization`.
    pub(crate) fn identify(&self, authorization: Option<&str>) -> Result<Caller, Refusal> {
        self.options.tenants.identify(authorization).inspect_err(|refusal| {
            tracing::warn!(reason = refusal.message, "somebody was refused at the door");
            self.relay.metrics.ended("", "refused", refusal.code.to_tonic());
        })
    }

    pub(crate) fn tenants(&self) -> &Tenants {
        &self.options.tenants
    }

    /// The one way in, whichever protocol a request came by.
    pub(crate) async fn answer(
        &self,
        caller: &Caller,
        wire: pb::GenerateRequest,
        timeout: Option<Duration>,
    ) -> Result<GenerateStream, Status> {
        let admitted = self.admit(caller, wire, timeout).await;
        if let Err(status) = &admitted {
            self.relay.metrics.ended(caller.name(), "refused", status.code());
        }
        admitted
    }

    /// The same, to its end.
    pub(crate) async fn complete(
        &self,
        caller: &Caller,
        wire: pb::GenerateRequest,
        timeout: Option<Duration>,
    ) -> Result<Transcript, Status> {
        let mut events = self.answer(caller, wire, timeout).await?;
        let mut transcript = Transcript::default();
        while let Some(response) = events.next().await {
            let Some(event) = response?.event else { continue };
            transcript.apply(&event).map_err(|error| Status::internal(error.to_string()))?;
        }
        Ok(transcript)
    }

    async fn admit(
        &self,
        caller: &Caller,
        mut wire: pb::GenerateRequest,
        timeout: Option<Duration>,
    ) -> Result<GenerateStream, Status> {
        if self.is_draining() {
            return Err(Refusal::draining().into());
        }
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let progress = Progress::from_wire(std::mem::take(&mut wire.resume)).map_err(Refusal::from)?;
        let mut request = GenerateRequest::try_from(wire).map_err(Refusal::from)?;
        progress.check(&request.sampling).map_err(Refusal::from)?;
        let journal = self.journal_for(caller, &mut request)?;
        let permit = self.place(request.priority, progress.tokens() > 0)?;
        let ticket = caller.enter(&request, progress.tokens() as u64)?;
        self.check_share(caller, &request, progress.tokens() > 0)?;
        if request.request_id.is_empty() {
            request.request_id = format!("{:032x}", self.relay.dice.roll::<u128>());
        }
        request.sampling.seed.get_or_insert_with(|| self.relay.dice.roll());
        let relayed = self
            .relay
            .run(Asked { caller: caller.clone(), request, progress, deadline, journal, permit, ticket })
            .await?;
        Ok(Box::pin(relayed))
    }

    /// Where the record of a request goes, if it, or its tenant, wants one.
    fn journal_for(
        &self,
        caller: &Caller,
        request: &mut GenerateRequest,
    ) -> Result<Option<Journal>, Refusal> {
        if !request.audit && !caller.is_audited() {
            return Ok(None);
        }
        let Some(journal) = &self.options.audit else {
            let reason = "is wanted, and this router keeps no records of requests: leave it out, or ask another router";
            return Err(Refusal::invalid("audit", reason));
        };
        journal.check()?;
        request.audit = true;
        request.sampling.logprobs.get_or_insert(0);
        Ok(Some(journal.clone()))
    }

    /// A place for a request, or the reason why there is none. What has begun elsewhere may have any.
    fn place(&self, priority: Priority, has_begun: bool) -> Result<OwnedSemaphorePermit, Refusal> {
        let all = self.options.requests_max;
        let most = if has_begun { all } else { priority.places(all) };
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok();
        permit.filter(|_| self.places_taken() <= most).ok_or_else(|| {
            let message = format!("this router relays as many requests of this priority as it may: {most}");
            Refusal::exhausted("router_full", message, self.relay.drain.lock().retry_after())
        })
    }

    /// No tenant takes so many places that there is none for the next one.
    fn check_share(
        &self,
        caller: &Caller,
        request: &GenerateRequest,
        has_begun: bool,
    ) -> Result<(), Refusal> {
        let most = request.priority.places(self.options.requests_max);
        if has_begun || caller.may_take(most.saturating_sub(self.places_taken())) {
            return Ok(());
        }
        let message =
            format!("{} holds its share of this router's places, and the others are few", caller.name());
        Err(Refusal::exhausted(TENANT_SHARE, message, self.relay.drain.lock().retry_after()))
    }

    /// What this cluster serves now, of what `scope` has.
    pub(crate) fn served(&self, scope: &Scope) -> pb::ListModelsResponse {
        let snapshot = Arc::clone(&self.relay.members.borrow());
        let rewards = scope.reward_models(&snapshot);
        let mut base_models: Vec<_> = scope.base_models(&snapshot).cloned().collect();
        base_models.sort_by(|a, b| a.name.cmp(&b.name));
        base_models.dedup_by(|a, b| a.name == b.name);
        pb::ListModelsResponse {
            base_models: base_models.into_iter().map(Into::into).collect(),
            reward_models: rewards.current().iter().map(|reward| reward.as_listed().into()).collect(),
        }
    }
}

/// What a call says of who makes it.
pub(crate) fn authorization(metadata: &MetadataMap) -> Option<&str> {
    metadata.get("authorization").map(|value| value.to_str().unwrap_or(""))
}

/// Events of one request, as its worker sends them. Dropping it cancels the request.
pub(crate) type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for RouterService {
    type GenerateStream = GenerateStream;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<GenerateStream>, Status> {
        let caller = self.identify(authorization(request.metadata()))?;
        let timeout = deadline::timeout(request.metadata()).map_err(Refusal::from)?;
        self.answer(&caller, request.into_inner(), timeout).await.map(Response::new)
    }

    async fn list_models(
        &self,
        request: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        let caller = self.identify(authorization(request.metadata()))?;
        Ok(Response::new(self.served(caller.scope())))
    }
}
