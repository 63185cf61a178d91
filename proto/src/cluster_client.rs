//! A client that no lost router stops: what has begun goes on at another one, or at the same after a while, with the
//! tokens so far, and its reader sees one stream.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, timeout_at};
use tonic::{
    Request, Status, Streaming,
    transport::{Channel, Error},
};

use crate::{
    Dice, Event, Fault, GenerateRequest, Progress, Refusal, Transcript,
    client::{self, ApiKey, Dialer},
    limits::TIMEOUT_MAX,
    pb::{self, inference_client::InferenceClient},
};

/// A router whose connection broke is not asked first for so long.
const LEFT_ALONE: Duration = Duration::from_secs(2);

/// A stream that has begun and finds no router for so long ends.
const RECOVERY_LONGEST: Duration = Duration::from_secs(60);

/// Wait after all routers have been tried; it doubles with each round.
const WAIT_FIRST: Duration = Duration::from_millis(50);
const WAIT_LONGEST: Duration = Duration::from_secs(2);

/// The routers of a cluster. Clones share its connections.
#[derive(Clone)]
pub struct ClusterClient {
    routers: Arc<[Router]>,
    turn: Arc<AtomicUsize>,
    patience: Duration,
    dice: Dice,
    key: Option<ApiKey>,
}

/// The events of one request.
pub struct Answers {
    client: ClusterClient,
    request: pb::GenerateRequest,
    progress: Progress,
    events: Option<Streaming<pb::GenerateResponse>>,
    router: usize,
    deadline: Option<Instant>,
    repeats: Repeats,
    has_started: bool,
    is_over: bool,
}

struct Router {
    inference: InferenceClient<Channel>,
    lost_at: Mutex<Option<Instant>>,
}

/// When a request is sent again. Pure: time and dice are arguments.
#[derive(Debug)]
struct Repeats {
    routers: u32,
    /// How long a request insists that no router has taken.
    patience: Duration,
    has_begun: bool,
    /// Since the last new event.
    losses: u32,
    lost_at: Option<Instant>,
}

// === impl ClusterClient ===

impl ClusterClient {
    /// Of routers at these addresses; connects when it is used.
    ///
    /// # Errors
    /// When an address is not a URI.
    pub fn new(endpoints: &[impl AsRef<str>]) -> Result<Self, Error> {
        Self::over(&Dialer::default(), Dice::default(), endpoints)
    }

    /// The same over another network.
    ///
    /// # Errors
    /// When an address is not a URI.
    pub fn over(dialer: &Dialer, dice: Dice, endpoints: &[impl AsRef<str>]) -> Result<Self, Error> {
        let router = |endpoint: &_| {
            let endpoint: &str = AsRef::as_ref(endpoint);
            let inference = client::inference(dialer.channel(endpoint)?);
            Ok(Router { inference, lost_at: Mutex::default() })
        };
        let routers = endpoints.iter().map(router).collect::<Result<_, _>>()?;
        Ok(Self { routers, turn: Arc::default(), patience: Duration::ZERO, dice, key: None })
    }

    /// How long a request that has not begun is sent again while nobody takes it. By default each router is asked once.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// The key that routers know the client by.
    #[must_use]
    pub fn with_key(self, key: Option<ApiKey>) -> Self {
        Self { key, ..self }
    }

    /// # Errors
    /// What the last router said.
    pub async fn list_models(&self) -> Result<pb::ListModelsResponse, Status> {
        let mut last = Status::unavailable("no router is named");
        for _ in 0..self.routers.len() {
            let router = self.choose(None);
            let mut inference = self.routers[router].inference.clone();
            match inference.list_models(self.signed(pb::ListModelsRequest {})).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) if Fault::of(&status) == Fault::Connection => {
                    self.leave_alone(router);
                    let reason = status.message();
                    last = Status::unavailable(format!(
                        "no router answers: {reason}. Is that its gRPC port, and does it want https://?"
                    ));
                }
                Err(status) => return Err(status),
            }
        }
        Err(last)
    }

    /// Begins when the first event is asked for. `timeout` counts from now, over all repeats.
    pub fn generate(&self, request: GenerateRequest, timeout: Option<Duration>) -> Answers {
        self.go_on(request, Progress::default(), timeout)
    }

    /// The same for a request whose answers have come so far: only what follows is sent.
    pub fn go_on(&self, request: GenerateRequest, progress: Progress, timeout: Option<Duration>) -> Answers {
        Answers {
            client: self.clone(),
            request: request.into(),
            progress,
            events: None,
            router: self.choose(None),
            deadline: timeout.map(|timeout| Instant::now() + timeout.min(TIMEOUT_MAX)),
            repeats: Repeats::new(self.routers.len() as u32, self.patience),
            has_started: false,
            is_over: false,
        }
    }

    /// Runs a request to its end.
    ///
    /// # Errors
    /// What ended it.
    pub async fn complete(
        &self,
        request: GenerateRequest,
        timeout: Option<Duration>,
    ) -> Result<Transcript, Status> {
        let mut answers = self.generate(request, timeout);
        let mut transcript = Transcript::default();
        while let Some(event) = answers.next().await {
            transcript.apply(&event?).map_err(|error| Status::internal(error.to_string()))?;
        }
        Ok(transcript)
    }

    fn signed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(key) = &self.key {
            key.sign(request.metadata_mut());
        }
        request
    }

    /// The next router in turn, rather not `lost`, and none that broke a moment ago, if there is another.
    fn choose(&self, lost: Option<usize>) -> usize {
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let count = self.routers.len().max(1);
        let is_well = |router: &usize| Some(*router) != lost && !self.routers[*router].is_left_alone();
        let in_turn = (0..count).map(|step| (first + step) % count);
        in_turn
            .clone()
            .find(is_well)
            .or_else(|| in_turn.clone().find(|router| Some(*router) != lost))
            .unwrap_or(0)
    }

    fn leave_alone(&self, router: usize) {
        *self.routers[router].lost_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

// === impl Answers ===

impl Answers {
    /// The next event, each once and in order; none after the summary.
    pub async fn next(&mut self) -> Option<Result<Event, Status>> {
        while !self.is_over {
            let ended = match self.receive_in_time().await {
                Ok(event) => match self.take(event) {
                    Ok(Some(event)) => return Some(Ok(event)),
                    Ok(None) => continue,
                    Err(status) => status,
                },
                Err(status) => status,
            };
            self.events = None;
            if let Err(status) = self.after_loss(ended).await {
                self.is_over = true;
                return Some(Err(status));
            }
        }
        None
    }

    /// How often it went on elsewhere since its last new event.
    pub fn losses(&self) -> u32 {
        self.repeats.losses
    }

    /// What is here by the deadline is handed out, and nothing is waited for afterwards: a router that vanishes tells nobody.
    async fn receive_in_time(&mut self) -> Result<Event, Status> {
        match self.deadline {
            None => self.receive().await,
            Some(deadline) => timeout_at(deadline, self.receive()).await.unwrap_or_else(|_| Err(late())),
        }
    }

    async fn receive(&mut self) -> Result<Event, Status> {
        loop {
            let events = match &mut self.events {
                Some(events) => events,
                None => {
                    let mut request = self.request.clone();
                    request.resume = self.progress.clone().into();
                    let mut request = self.client.signed(request);
                    if let Some(deadline) = self.deadline {
                        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
                    }
                    let mut inference = self.client.routers[self.router].inference.clone();
                    self.events.insert(inference.generate(request).await?.into_inner())
                }
            };
            match events.message().await? {
                Some(response) => {
                    if let Some(event) = response.event {
                        return Ok(event);
                    }
                }
                None => return Err(Status::unavailable("the stream ended before the answer did")),
            }
        }
    }

    /// Books an event; `None`: it was here before.
    fn take(&mut self, event: Event) -> Result<Option<Event>, Status> {
        let is_new = self.progress.record(&event).map_err(|error| Status::internal(error.to_string()))?;
        match &event {
            Event::Started(started) => {
                self.repeats.has_begun = true;
                // What the router drew belongs to the request from now on.
                self.request.request_id.clone_from(&started.request_id);
                self.request.sampling.get_or_insert_default().seed = Some(started.seed);
                self.request.guidance.clone_from(&started.guidance);
                self.request.model.clone_from(&started.model);
                return Ok((!std::mem::replace(&mut self.has_started, true)).then_some(event));
            }
            Event::Summary(_) => self.is_over = true,
            Event::Tokens(_) | Event::Finished(_) => {}
        }
        if is_new {
            self.repeats.on_progress();
        }
        Ok(is_new.then_some(event))
    }

    /// Chooses who is asked next, and waits as long as it should; or says that this was the end.
    async fn after_loss(&mut self, ended: Status) -> Result<(), Status> {
        let fault = Fault::of(&ended);
        let now = Instant::now();
        // The transport keeps deadlines too, and calls it a cancellation.
        let may_be_late = fault != Fault::Request || ended.code() == tonic::Code::Cancelled;
        if may_be_late && self.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(late());
        }
        if fault == Fault::Connection {
            self.client.leave_alone(self.router);
        }
        let wait = self.repeats.on_loss(fault, now, self.client.dice.roll()).ok_or(ended)?;
        self.router = self.client.choose(Some(self.router));
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(now));
        tokio::time::sleep(wait.min(left.unwrap_or(Duration::MAX))).await;
        Ok(())
    }
}

fn late() -> Status {
    Refusal::deadline("the deadline passed before the last token").into()
}

// === impl Router ===

impl Router {
    fn is_left_alone(&self) -> bool {
        let lost_at = self.lost_at.lock().unwrap_or_else(PoisonError::into_inner);
        lost_at.is_some_and(|lost_at| lost_at.elapsed() < LEFT_ALONE)
    }
}

// === impl Repeats ===

impl Repeats {
    fn new(routers: u32, patience: Duration) -> Self {
        Self { routers, patience, has_begun: false, losses: 0, lost_at: None }
    }

    fn on_progress(&mut self) {
        self.has_begun = true;
        self.losses = 0;
        self.lost_at = None;
    }

    /// The wait before the next try; `None`: there is none.
    fn on_loss(&mut self, fault: Fault, now: Instant, die: u32) -> Option<Duration> {
        if fault == Fault::Request {
            return None;
        }
        self.losses += 1;
        let lost_at = *self.lost_at.get_or_insert(now);
        let rounds = self.losses / self.routers.max(1);
        let patience = if self.has_begun { RECOVERY_LONGEST } else { self.patience };
        if rounds > 0 && now - lost_at >= patience {
            return None;
        }
        let Some(doublings) = rounds.checked_sub(1) else { return Some(Duration::ZERO) };
        let wait = WAIT_FIRST.saturating_mul(1 << doublings.min(16)).min(WAIT_LONGEST);
        // Between half of it and all: clients of one lost router do not come to the next one together.
        Some(wait.mul_f64(0.5 + 0.5 * f64::from(die) / f64::from(u32::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_patience_a_new_request_asks_each_router_once() {
        let mut repeats = Repeats::new(2, Duration::ZERO);
        let now = Instant::now();
        assert_eq!(repeats.on_loss(Fault::Connection, now, 0), Some(Duration::ZERO));
        assert_eq!(repeats.on_loss(Fault::Elsewhere, now, 0), None);
        assert_eq!(Repeats::new(2, Duration::ZERO).on_loss(Fault::Request, now, 0), None);
    }

    #[test]
    fn what_has_begun_goes_on_at_once_elsewhere_then_in_longer_and_longer_rounds() {
        let mut repeats = Repeats::new(2, Duration::ZERO);
        let now = Instant::now();
        repeats.on_progress();
        let waits: Vec<_> =
            (0..5).map(|_| repeats.on_loss(Fault::Connection, now, u32::MAX).unwrap().as_millis()).collect();
        assert_eq!(waits, [0, 50, 50, 100, 100]);
        assert_eq!(repeats.on_loss(Fault::Connection, now + RECOVERY_LONGEST, 0), None);
        repeats.on_progress();
        let later = now + 2 * RECOVERY_LONGEST;
        assert_eq!(repeats.on_loss(Fault::Connection, later, 0), Some(Duration::ZERO));
    }

    #[tokio::test]
    async fn what_is_repeated_names_the_version_that_it_began_with() {
        let client = ClusterClient::new(&["a:1", "b:1"]).unwrap();
        let mut asked = GenerateRequest::new(crate::Input::Prompt("x".into()));
        asked.guidance = vec![crate::GuidanceTerm { reward: "my".into(), preference: vec![], strength: 1.0 }];
        let mut answers = client.generate(asked, None);
        let guidance = vec![pb::GuidanceTerm { reward: "my@3".into(), ..pb::GuidanceTerm::default() }];
        let started = pb::Started { guidance, seed: 7, ..pb::Started::default() };
        answers.take(Event::Started(started)).unwrap();
        let (request, sampling) = (&answers.request, answers.request.sampling.as_ref().unwrap());
        assert_eq!((request.guidance[0].reward.as_str(), sampling.seed), ("my@3", Some(7)));
    }

    #[tokio::test]
    async fn routers_take_turns_and_one_that_broke_is_left_out() {
        let client = ClusterClient::new(&["a:1", "b:1", "c:1"]).unwrap();
        let turns: Vec<usize> = (0..4).map(|_| client.choose(None)).collect();
        assert_eq!(turns, [0, 1, 2, 0]);
        client.leave_alone(1);
        assert!((0..6).all(|_| client.choose(None) != 1));
        let alone = ClusterClient::new(&["a:1"]).unwrap();
        assert_eq!(alone.choose(Some(0)), 0, "the only one is asked again");
    }
}
