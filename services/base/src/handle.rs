//! What the rest of the process holds of a base engine: it starts one, and hands placed requests to it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use uniarm_engine::{Executor, ExecutorOptions};
use uniarm_model::{Forward, ModelError};
use uniarm_proto::{Dice, Event, Placed, Refusal, refusal::TENANT_SHARE};
use uniarm_runtime::{
    Metrics,
    crowd::{Crowd, TenantPlace},
    drain::DrainRate,
    drive::{Driver, Inbox, drive, inbox},
};

use crate::{
    accept::{Accepted, SharedSettings, decode_sampling},
    engine::{Command, Engine},
    guide::{Links, Scorer},
    metrics::BaseMetrics,
    outlet::OUTLET_EVENTS_MAX,
    pacing::{PaceOptions, Pacing},
    steps::StepMeter,
};

/// Limits of a base worker, and how it is run.
#[derive(Clone)]
pub struct BaseOptions {
    pub executor: ExecutorOptions,
    /// Requests that it holds at once, running or waiting.
    pub requests_max: usize,
    pub pace: PaceOptions,
    /// When a reward worker has been silent for so long while a base row waits for it, another one is asked besides, and
    /// the first answer counts. `None`: it is waited for until its stream ends.
    pub hedge_after: Option<Duration>,
    pub driver: Driver,
    /// Of the waits before a lost reward worker is dialled again.
    pub dice: Dice,
}

/// Starts engines.
pub struct BaseEngine;

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the model cannot compute: {0}")]
    Model(#[from] ModelError),
    #[error("the operating system gives no thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// What the rest of the process holds of an engine.
#[derive(Clone)]
pub struct BaseHandle {
    settings: SharedSettings,
    inbox: Inbox<Command>,
    permits: Arc<Semaphore>,
    crowd: Crowd,
    requests_max: usize,
    is_draining: Arc<AtomicBool>,
    retry_after: RetryAfter,
    _stop: Arc<StopOnDrop>,
}

/// What a refused client is told to wait, as the engine sees it.
#[derive(Clone)]
pub(crate) struct RetryAfter {
    milliseconds: Arc<AtomicU64>,
}

/// Stops the engine with the last handle: the inbox alone cannot tell, because the streams hold it too.
struct StopOnDrop(Inbox<Command>);

// === impl BaseOptions ===

impl Default for BaseOptions {
    fn default() -> Self {
        Self {
            executor: ExecutorOptions::default(),
            requests_max: 1024,
            pace: PaceOptions::default(),
            hedge_after: None,
            driver: Driver::default(),
            dice: Dice::default(),
        }
    }
}

// === impl BaseEngine ===

impl BaseEngine {
    /// Starts the engine's thread; the streams to reward workers live on the current tokio runtime. It ends when the
    /// last handle is gone.
    ///
    /// # Errors
    /// When the model cannot compute, or the operating system gives no thread.
    pub fn start(
        forward: Box<dyn Forward>,
        settings: crate::BaseSettings,
        scorer: Arc<dyn Scorer>,
        options: &BaseOptions,
        metrics: &Metrics,
    ) -> Result<BaseHandle, StartError> {
        let (inbox, commands) = inbox();
        let settings = Arc::new(settings);
        let runtime = tokio::runtime::Handle::current();
        let pace = if forward.is_shared() { options.pace.fused() } else { options.pace };
        let executor = Executor::new(forward, &options.executor)?;
        let links = Links::new(scorer, options.dice.clone(), runtime.clone(), inbox.clone());
        let guide = (links, Pacing::new(pace), options.hedge_after);
        let retry_after = RetryAfter::default();
        let (shared, own) = (Arc::clone(&settings), (BaseMetrics::new(metrics), StepMeter::new(metrics)));
        let engine = Engine::new(shared, executor, guide, runtime, retry_after.clone(), own);
        drive(options.driver, "base-engine", engine, commands)?;
        let _stop = Arc::new(StopOnDrop(inbox.clone()));
        Ok(BaseHandle {
            settings,
            inbox,
            permits: Arc::new(Semaphore::new(options.requests_max)),
            crowd: Crowd::default(),
            requests_max: options.requests_max,
            is_draining: Arc::default(),
            retry_after,
            _stop,
        })
    }
}

// === impl BaseHandle ===

impl BaseHandle {
    /// Takes a placed request in; its events come out of the receiver, and dropping that cancels the request.
    ///
    /// # Errors
    /// When the request cannot be read by this model, or there is no room for it.
    pub async fn run(
        &self,
        placed: Placed,
        deadline: Option<Instant>,
    ) -> Result<mpsc::Receiver<Result<Event, Refusal>>, Refusal> {
        let accepted_at = Instant::now();
        let (permit, place) = self.admit(&placed)?;
        self.settings.check(&placed)?;
        let seed = placed.request.sampling.seed;
        let seed = seed.ok_or_else(|| Refusal::invalid("sampling.seed", "must be drawn by the router"))?;
        let input = placed.request.input.clone();
        let prompt = if input.is_tokens() {
            self.settings.read(&input)?
        } else {
            let settings = Arc::clone(&self.settings);
            let prompt = tokio::task::spawn_blocking(move || settings.read(&input)).await;
            prompt.map_err(|_| Refusal::internal("reading the prompt panicked"))??
        };
        let (events, receiver) = mpsc::channel(OUTLET_EVENTS_MAX);
        let accepted = Accepted {
            prompt,
            seed,
            sampling: decode_sampling(&placed.request.sampling),
            list_length: self.settings.list_length_for(&placed),
            accepted_at,
            deadline,
            events,
            permit,
            place,
            span: tracing::Span::current(),
            placed,
        };
        let sent = self.inbox.send(Command::Start(Box::new(accepted)));
        sent.map_err(|_| Refusal::unavailable("engine_stopped", "the base engine stopped"))?;
        Ok(receiver)
    }

    /// Requests that hold a place, from the first look at them to their last event.
    pub fn places_taken(&self) -> usize {
        self.requests_max - self.permits.available_permits()
    }

    /// From here on new requests are refused, so that their routers place them elsewhere.
    pub fn begin_drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Ends the requests that still run; their routers place them elsewhere, with their tokens so far.
    pub fn hand_over(&self) {
        let _ = self.inbox.send(Command::HandOver);
    }

    /// A place for a request, or the reason why there is none. What has begun elsewhere may have any: its client has
    /// waited already.
    fn admit(&self, placed: &Placed) -> Result<(OwnedSemaphorePermit, TenantPlace), Refusal> {
        if self.is_draining.load(Ordering::Relaxed) {
            return Err(Refusal::draining());
        }
        let has_begun = placed.progress.tokens() > 0;
        let most =
            if has_begun { self.requests_max } else { placed.request.priority.places(self.requests_max) };
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok();
        let permit = permit.filter(|_| self.places_taken() <= most).ok_or_else(|| {
            let message =
                format!("this base worker holds as many requests of this priority as it may: {most}");
            Refusal::exhausted("base_queue_full", message, self.retry_after.get())
        })?;
        let place = self.crowd.enter(placed.tenant, most - self.places_taken(), has_begun);
        let place = place.ok_or_else(|| {
            let message = "its tenant holds its share of this base worker's places, and the others are few";
            Refusal::exhausted(TENANT_SHARE, message, self.retry_after.get())
        })?;
        Ok((permit, place))
    }
}

// === impl RetryAfter ===

impl RetryAfter {
    pub(crate) fn set(&self, wait: Duration) {
        self.milliseconds.store(wait.as_millis() as u64, Ordering::Relaxed);
    }

    fn get(&self) -> Duration {
        Duration::from_millis(self.milliseconds.load(Ordering::Relaxed))
    }
}

impl Default for RetryAfter {
    fn default() -> Self {
        let retry_after = Self { milliseconds: Arc::default() };
        retry_after.set(DrainRate::default().retry_after());
        retry_after
    }
}

// === impl StopOnDrop ===

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        let _ = self.0.send(Command::Stop);
    }
}
