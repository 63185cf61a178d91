//! One request over its attempts: placed, sent to a base worker, placed again while nothing has reached the client.

use std::{
    collections::{BTreeSet, HashMap},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use uniarm_cluster::{Snapshot, SnapshotReceiver};
use uniarm_proto::{Event, GenerateRequest, Generation, Member, MemberId, Refusal, client, pb};
use uniarm_runtime::trace;

use crate::{
    load::{LoadGuard, LoadTable},
    metrics::RouterMetrics,
    place::{Placement, place},
};

/// Base workers that one request may try before its first event.
pub const ATTEMPTS_MAX: usize = 3;

/// Connections to base workers, one for each life of a member.
#[derive(Clone, Default)]
pub(crate) struct Channels {
    open: Arc<Mutex<HashMap<(MemberId, Generation), Channel>>>,
}

/// What relaying needs of the router.
#[derive(Clone)]
pub(crate) struct Relay {
    pub(crate) members: SnapshotReceiver,
    pub(crate) channels: Channels,
    pub(crate) loads: LoadTable,
    pub(crate) metrics: RouterMetrics,
}

/// The state of one request across its attempts.
struct Attempts {
    request: GenerateRequest,
    deadline: Option<Instant>,
    failed: BTreeSet<MemberId>,
    last: Option<Status>,
}

/// A base worker's events on their way to the client. Dropping it cancels the request on the worker.
pub(crate) struct Relayed {
    events: Streaming<pb::GenerateResponse>,
    metrics: RouterMetrics,
    outcome: &'static str,
    _load: LoadGuard,
    _permit: OwnedSemaphorePermit,
}

// === impl Channels ===

impl Channels {
    /// A channel to this life of the member; it connects when it is used.
    fn to(&self, member: &Member, snapshot: &Snapshot) -> Result<Channel, Refusal> {
        let mut open = self.open.lock();
        open.retain(|(id, generation), _| {
            snapshot.get(id).is_some_and(|known| known.generation == *generation)
        });
        let key = (member.id.clone(), member.generation);
        if let Some(channel) = open.get(&key) {
            return Ok(channel.clone());
        }
        let endpoint = client::endpoint(&member.address).map_err(|error| {
            Refusal::internal(format!("the address {:?} of {} is wrong: {error}", member.address, member.id))
        })?;
        let channel = endpoint.connect_lazy();
        open.insert(key, channel.clone());
        Ok(channel)
    }
}

// === impl Relay ===

impl Relay {
    /// Finds a base worker that takes the request and returns its events.
    pub(crate) async fn run(
        &self,
        request: GenerateRequest,
        deadline: Option<Instant>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Relayed, Status> {
        let began = Instant::now();
        let mut attempts = Attempts { request, deadline, failed: BTreeSet::new(), last: None };
        for _ in 0..ATTEMPTS_MAX {
            let snapshot = Arc::clone(&self.members.borrow());
            let dice = [rand::random(), rand::random()];
            let placement = match place(&snapshot, &attempts.request, &self.loads, dice, &attempts.failed) {
                Ok(placement) => placement,
                // When every worker has failed, what the last one said is the better answer.
                Err(refusal) => return Err(attempts.last.unwrap_or_else(|| refusal.into())),
            };
            self.metrics.attempts.inc();
            let load = self.loads.count(members_of(&placement));
            let base = placement.base.id.clone();
            match self.attempt(placement, &snapshot, attempts.deadline).await {
                Ok(events) => {
                    self.metrics.first_event.observe(began.elapsed().as_secs_f64());
                    self.metrics.under_way.inc();
                    return Ok(Relayed {
                        events,
                        metrics: self.metrics.clone(),
                        outcome: "cancelled",
                        _load: load,
                        _permit: permit,
                    });
                }
                Err(status) if is_elsewhere(&status) => attempts.record_failure(base, &status),
                Err(status) => return Err(own(&status)),
            }
        }
        Err(attempts.last.unwrap_or_else(|| Status::unavailable("no base worker took the request")))
    }

    async fn attempt(
        &self,
        placement: Placement,
        snapshot: &Snapshot,
        deadline: Option<Instant>,
    ) -> Result<Streaming<pb::GenerateResponse>, Status> {
        let channel = self.channels.to(&placement.base, snapshot)?;
        let mut run = Request::new(pb::RunRequest::from(placement.placed));
        if let Some(deadline) = deadline {
            run.set_timeout(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        }
        trace::inject(run.metadata_mut());
        Ok(client::base(channel).run(run).await?.into_inner())
    }
}

// === impl Attempts ===

impl Attempts {
    fn record_failure(&mut self, base: MemberId, status: &Status) {
        tracing::warn!(%base, %status, request = self.request.request_id, "a base worker did not take the request");
        self.failed.insert(base);
        self.last = Some(own(status));
    }
}

/// Where a placement counts as load: its base worker, and the best reward worker for each term.
pub fn members_of(placement: &Placement) -> Vec<MemberId> {
    let rewards = placement.placed.placements.iter().map(|workers| workers[0].member.clone());
    std::iter::once(placement.base.id.clone()).chain(rewards).collect()
}

/// Whether another worker may do better.
fn is_elsewhere(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
}

/// A worker's status as the client may see it: code, message and details, without its transport headers.
fn own(status: &Status) -> Status {
    let details = uniarm_proto::Details::copy_from_slice(status.details());
    Status::with_details(status.code(), status.message(), details)
}

// === impl Relayed ===

impl Stream for Relayed {
    type Item = Result<pb::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = std::task::ready!(self.events.poll_next_unpin(context));
        Poll::Ready(match next {
            Some(Ok(response)) => {
                match &response.event {
                    Some(Event::Tokens(tokens)) => {
                        self.metrics.tokens.inc_by(tokens.ids.len() as u64);
                    }
                    Some(Event::Summary(_)) => self.outcome = "ok",
                    _ => {}
                }
                Some(Ok(response))
            }
            Some(Err(status)) => {
                self.outcome = "failed";
                Some(Err(own(&status)))
            }
            None => None,
        })
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        self.metrics.under_way.dec();
        self.metrics.ended(self.outcome);
    }
}
