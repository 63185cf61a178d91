//! One request over its attempts: placed, sent to a base worker, and placed again with its tokens so far when that one
//! is lost. The client sees one stream.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, stream::unfold};
use parking_lot::Mutex;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use uniarm_cluster::{Snapshot, SnapshotReceiver};
use uniarm_proto::{
    Dice, Event, Fault, GenerateRequest, Generation, Member, MemberId, Placed, Progress, Refusal,
    client::{self, Dialer},
    pb,
};
use uniarm_runtime::{drain::DrainRate, trace};

use crate::{
    audit::{Journal, Record, Trail},
    circuit::Circuits,
    load::{LoadGuard, LoadTable},
    metrics::RouterMetrics,
    place::{Placement, place, place_again},
    recovery::{Next, Recovery, RetryBudget},
    stall::Watched,
    tenants::{Caller, Ticket},
};

/// A worker ends a request at its deadline by itself; one that hangs gets so much longer.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);

/// Connections to base workers, one for each life of a member.
#[derive(Clone, Default)]
pub(crate) struct Channels {
    dialer: Dialer,
    /// In an order: connections that are given up together close in the same order in every run.
    open: Arc<Mutex<BTreeMap<(MemberId, Generation), Channel>>>,
}

/// What relaying needs of the router.
#[derive(Clone)]
pub(crate) struct Relay {
    pub(crate) members: SnapshotReceiver,
    pub(crate) channels: Channels,
    pub(crate) loads: LoadTable,
    pub(crate) circuits: Arc<Mutex<Circuits>>,
    pub(crate) budget: Arc<Mutex<RetryBudget>>,
    pub(crate) dice: Dice,
    pub(crate) drain: Arc<Mutex<DrainMeter>>,
    pub(crate) metrics: RouterMetrics,
    /// Streams whose client has not read for so long are ended.
    pub(crate) client_patience: Duration,
    /// This router is leaving: streams end, and their clients go on at another one.
    pub(crate) hand_over: CancellationToken,
}

/// How fast requests end here.
pub(crate) struct DrainMeter {
    began: Instant,
    under_way: usize,
    rate: DrainRate,
}

/// What a client asked for, and how far it has come elsewhere.
pub(crate) struct Asked {
    pub(crate) caller: Caller,
    pub(crate) request: GenerateRequest,
    pub(crate) progress: Progress,
    pub(crate) deadline: Option<Instant>,
    /// Where a record of it is kept.
    pub(crate) journal: Option<Journal>,
    /// Its place at this router, and in what its tenant may have.
    pub(crate) permit: OwnedSemaphorePermit,
    pub(crate) ticket: Ticket,
}

/// A request under way. Dropping it cancels the request on its worker.
struct Relayed {
    relay: Relay,
    caller: Caller,
    request: GenerateRequest,
    /// As it was placed last: its guidance is resolved once, or its tokens could change with the cluster.
    placed: Option<Placed>,
    progress: Progress,
    deadline: Option<Instant>,
    recovery: Recovery,
    attempt: Option<Attempt>,
    /// Since when it has no worker.
    lost_at: Option<Instant>,
    has_started: bool,
    is_over: bool,
    /// What its end is counted as, once a worker has taken it.
    outcome: Option<(&'static str, Code)>,
    /// Its client has stopped reading.
    is_stalled: Arc<AtomicBool>,
    /// Of a request of which a record is kept.
    trail: Option<(Journal, Trail)>,
    ticket: Ticket,
    _permit: OwnedSemaphorePermit,
}

/// A base worker that has taken the request.
struct Attempt {
    base: Arc<Member>,
    events: Streaming<pb::GenerateResponse>,
    _load: LoadGuard,
}

// === impl Channels ===

impl Channels {
    pub(crate) fn over(dialer: Dialer) -> Self {
        Self { dialer, open: Arc::default() }
    }

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
        let channel = self.dialer.channel(&member.address).map_err(|error| {
            Refusal::internal(format!("the address {:?} of {} is wrong: {error}", member.address, member.id))
        })?;
        open.insert(key, channel.clone());
        Ok(channel)
    }
}

// === impl Relay ===

impl Relay {
    /// Finds a base worker that takes the request, and returns its events: those that the client does not have yet.
    pub(crate) async fn run(
        &self,
        asked: Asked,
    ) -> Result<impl Stream<Item = Result<pb::GenerateResponse, Status>> + use<>, Status> {
        let began = Instant::now();
        self.budget.lock().on_request();
        let mut relayed = Relayed::new(self.clone(), asked);
        relayed.place(None).await?;
        relayed.outcome = Some(("cancelled", Code::Cancelled));
        self.metrics.first_event.observe(began.elapsed().as_secs_f64());
        let is_stalled = Arc::clone(&relayed.is_stalled);
        let events =
            unfold(relayed, |mut relayed| async move { Some((relayed.next_or_hand_over().await?, relayed)) });
        Ok(Watched::new(Box::pin(events), self.client_patience, move || {
            is_stalled.store(true, Ordering::Relaxed);
        }))
    }
}

// === impl DrainMeter ===

impl DrainMeter {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), under_way: 0, rate: DrainRate::default() }
    }

    pub(crate) fn retry_after(&self) -> Duration {
        self.rate.retry_after()
    }

    fn on_begin(&mut self) {
        self.rate.observe(self.began.elapsed(), 0, true);
        self.under_way += 1;
    }

    fn on_end(&mut self) {
        self.under_way -= 1;
        self.rate.observe(self.began.elapsed(), 1, self.under_way > 0);
    }
}

// === impl Relayed ===

impl Relayed {
    fn new(relay: Relay, asked: Asked) -> Self {
        relay.metrics.under_way.inc();
        relay.drain.lock().on_begin();
        let trail = |journal| (journal, Trail::new(asked.caller.name(), &asked.request, &asked.progress));
        let trail = asked.journal.map(trail);
        Self {
            trail,
            relay,
            caller: asked.caller,
            request: asked.request,
            placed: None,
            progress: asked.progress,
            deadline: asked.deadline,
            recovery: Recovery::default(),
            attempt: None,
            lost_at: None,
            has_started: false,
            is_over: false,
            outcome: None,
            is_stalled: Arc::default(),
            ticket: asked.ticket,
            _permit: asked.permit,
        }
    }

    async fn next_or_hand_over(&mut self) -> Option<Result<pb::GenerateResponse, Status>> {
        let hand_over = self.relay.hand_over.clone();
        let handed_over = tokio::select! {
            biased;
            event = self.next() => return event,
            () = hand_over.cancelled(), if !self.is_over => Refusal::draining(),
        };
        self.attempt = None;
        self.is_over = true;
        self.outcome = Some(("handed_over", Code::Unavailable));
        Some(Err(handed_over.into()))
    }

    /// The next event that is new to the client; none after the last.
    async fn next(&mut self) -> Option<Result<pb::GenerateResponse, Status>> {
        loop {
            let ended = match &mut self.attempt {
                None => return None,
                Some(attempt) => match within(self.deadline, attempt.events.message()).await {
                    Ok(Some(response)) => match self.take(response) {
                        Ok(Some(response)) => return Some(self.sealed(response).await),
                        Ok(None) => continue,
                        Err(status) => status,
                    },
                    Ok(None) if self.is_over => return None,
                    Ok(None) => Status::unavailable("the base worker's stream ended before the answer did"),
                    Err(status) => status,
                },
            };
            if let Err(status) = self.recover(ended).await {
                self.outcome = Some(("failed", status.code()));
                self.attempt = None;
                return Some(Err(status));
            }
        }
    }

    /// Books an event; `None`: the client has it already.
    fn take(&mut self, response: pb::GenerateResponse) -> Result<Option<pb::GenerateResponse>, Status> {
        let Some(event) = &response.event else { return Ok(None) };
        let is_new = self.progress.record(event).map_err(|error| Status::internal(error.to_string()))?;
        let is_shown = match event {
            Event::Started(started) => {
                self.note(|trail| trail.on_started(started));
                self.recovery.on_begun();
                !std::mem::replace(&mut self.has_started, true)
            }
            Event::Tokens(tokens) => {
                self.relay.metrics.relayed(self.caller.name(), tokens.ids.len() as u64);
                self.ticket.spend(tokens.ids.len() as u64);
                if is_new {
                    self.note(|trail| trail.on_tokens(tokens));
                }
                is_new && tokens.position >= self.request.skip
            }
            Event::Finished(finished) => {
                self.note(|trail| trail.on_finished(finished));
                is_new
            }
            Event::Summary(_) => {
                self.outcome = Some(("ok", Code::Ok));
                self.is_over = true;
                true
            }
        };
        if is_new && !matches!(event, Event::Started(_)) {
            self.on_progress();
        }
        Ok(is_shown.then_some(response))
    }

    fn note(&mut self, what: impl FnOnce(&mut Trail)) {
        if let Some((_, trail)) = &mut self.trail {
            what(trail);
        }
    }

    /// The last event waits until the record of the request is kept, and has its hash.
    async fn sealed(&mut self, mut response: pb::GenerateResponse) -> Result<pb::GenerateResponse, Status> {
        if let Some(Event::Summary(summary)) = &mut response.event
            && let Some((journal, record)) = self.record("ok")
        {
            match journal.append(&record).await {
                Ok(hash) => summary.audit = Bytes::copy_from_slice(&hash),
                Err(refusal) => {
                    self.outcome = Some(("failed", Code::Internal));
                    return Err(refusal.into());
                }
            }
        }
        Ok(response)
    }

    /// What is to be kept of it, once.
    fn record(&mut self, outcome: &str) -> Option<(Journal, Record)> {
        let (journal, trail) = self.trail.take()?;
        let request = self.placed.as_ref()?.request.clone();
        Some((journal, trail.end(outcome, request)))
    }

    fn on_progress(&mut self) {
        self.recovery.on_progress();
        if let Some(lost_at) = self.lost_at.take() {
            self.relay.metrics.recovery.observe(lost_at.elapsed().as_secs_f64());
        }
    }

    /// Its worker was lost: to another one, with its tokens so far.
    async fn recover(&mut self, ended: Status) -> Result<(), Status> {
        let Some(attempt) = self.attempt.take() else { return Err(ended) };
        self.lost_at.get_or_insert_with(Instant::now);
        let said = own(&ended);
        self.after_loss(&attempt.base, ended).await?;
        drop(attempt); // its load counted until here
        self.relay.metrics.migrations.inc();
        self.place(Some(said)).await
    }

    /// Finds a base worker that takes the request as far as it has come. `last`: what the worker said that it had before.
    async fn place(&mut self, mut last: Option<Status>) -> Result<(), Status> {
        loop {
            let snapshot = Arc::clone(&self.relay.members.borrow());
            let placement = match self.placement(&snapshot) {
                Ok(placement) => placement,
                Err(refusal) => {
                    let lost_for = self.lost_for();
                    match self.recovery.on_nobody(lost_for, self.relay.dice.roll()) {
                        Next::Again(wait) => self.pause(wait).await?,
                        // When every worker has failed, what the last one said is the better answer.
                        Next::GiveUp => return Err(last.unwrap_or_else(|| refusal.into())),
                    }
                    continue;
                }
            };
            self.relay.metrics.attempts.inc();
            let base = Arc::clone(&placement.base);
            match self.attempt(placement, &snapshot).await {
                Ok(attempt) => {
                    self.attempt = Some(attempt);
                    return Ok(());
                }
                Err(status) => {
                    last = Some(own(&status));
                    self.after_loss(&base, status).await?;
                }
            }
        }
    }

    fn placement(&mut self, snapshot: &Snapshot) -> Result<Placement, Refusal> {
        let sick = self.relay.circuits.lock().sick(Instant::now(), snapshot);
        let avoid = self.recovery.failed.union(&sick).cloned().collect();
        let dice = [self.relay.dice.roll(), self.relay.dice.roll()];
        let loads = &self.relay.loads;
        let mut placement = match &self.placed {
            None => {
                let placement = place((snapshot, self.caller.scope()), &self.request, loads, dice, &avoid)?;
                self.caller.check_floors(&placement.placed.request)?;
                placement
            }
            Some(placed) => place_again(snapshot, placed, loads, dice, &avoid)?,
        };
        placement.placed.progress = self.progress.clone();
        placement.placed.tenant = self.caller.number();
        self.placed = Some(placement.placed.clone());
        Ok(placement)
    }

    async fn attempt(&self, placement: Placement, snapshot: &Snapshot) -> Result<Attempt, Status> {
        let load = self.relay.loads.count(members_of(&placement));
        let Placement { base, placed } = placement;
        let channel = self.relay.channels.to(&base, snapshot)?;
        let mut run = Request::new(pb::RunRequest::from(placed));
        if let Some(deadline) = self.deadline {
            run.set_timeout(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        }
        trace::inject(run.metadata_mut());
        self.relay.circuits.lock().on_sent(&base, Instant::now());
        let mut client = client::base(channel);
        let events = within(self.deadline, client.run(run)).await?.into_inner();
        self.relay.circuits.lock().on_answer(&base);
        Ok(Attempt { base, events, _load: load })
    }

    /// Waits as long as the loss of a worker asks for, or says that this was the end.
    async fn after_loss(&mut self, base: &Member, status: Status) -> Result<(), Status> {
        let fault = Fault::of(&status);
        let now = Instant::now();
        if fault != Fault::Request && self.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(late());
        }
        if fault == Fault::Connection {
            self.relay.circuits.lock().on_loss(base, now, self.relay.dice.roll());
        }
        let lost_for = self.lost_for();
        let next = {
            let mut budget = self.relay.budget.lock();
            self.recovery.on_loss(&base.id, fault, lost_for, &mut budget, self.relay.dice.roll())
        };
        match next {
            Next::Again(wait) => {
                let (request, tokens) = (&self.request.request_id, self.progress.tokens());
                let reason = status.message();
                if fault == Fault::Connection {
                    tracing::warn!(base = %base.id, reason, request, tokens, "a base worker was lost to a request");
                } else {
                    // Full or leaving: under overload there is one of these for each request.
                    tracing::debug!(base = %base.id, reason, request, tokens, "a base worker cannot take a request");
                }
                self.pause(wait).await
            }
            Next::GiveUp => Err(own(&status)),
        }
    }

    fn lost_for(&self) -> Duration {
        self.lost_at.map_or(Duration::ZERO, |lost_at| lost_at.elapsed())
    }

    async fn pause(&self, wait: Duration) -> Result<(), Status> {
        if self.deadline.is_some_and(|deadline| Instant::now() + wait >= deadline) {
            let reason = "nobody could take it, and it would pass before the next try";
            return Err(Refusal::unmeetable(format!("the deadline cannot be met: {reason}")).into());
        }
        sleep(wait).await;
        Ok(())
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        self.relay.metrics.under_way.dec();
        self.relay.drain.lock().on_end();
        let is_stalled = self.is_stalled.load(Ordering::Relaxed);
        let stalled = is_stalled.then_some(("stalled", Code::Unavailable));
        if let Some((outcome, code)) = stalled.or(self.outcome) {
            if let Some((journal, record)) = self.record(outcome) {
                journal.leave(&record);
            }
            self.relay.metrics.ended(self.caller.name(), outcome, code);
        }
    }
}

/// Where a placement counts as load: its base worker, and the best reward worker for each term.
pub fn members_of(placement: &Placement) -> Vec<MemberId> {
    let rewards = placement.placed.placements.iter().map(|workers| workers[0].member.clone());
    std::iter::once(placement.base.id.clone()).chain(rewards).collect()
}

/// What a worker answers by the deadline; one that hangs is not waited for.
async fn within<T>(
    deadline: Option<Instant>,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let Some(deadline) = deadline else { return answer.await };
    let answered = timeout_at(deadline + DEADLINE_GRACE, answer).await.map_err(|_| late())?;
    // The transport keeps deadlines too, and calls it a cancellation; nobody has cancelled anything.
    answered.map_err(|status| match status.code() {
        Code::Cancelled if deadline <= Instant::now() => late(),
        _ => status,
    })
}

fn late() -> Status {
    Refusal::deadline("the deadline passed before the last token").into()
}

/// A worker's status as the client may see it: code, message and details, without its transport headers. A broken
/// connection is this router's own finding: its client may try again, which `Unknown` would not tell it.
fn own(status: &Status) -> Status {
    if Fault::of(status) == Fault::Connection {
        let reason =
            format!("the base worker was lost, and no other could take the request: {}", status.message());
        return Refusal::unavailable("base_lost", reason).into();
    }
    let details = uniarm_proto::Details::copy_from_slice(status.details());
    Status::with_details(status.code(), status.message(), details)
}
