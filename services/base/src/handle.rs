//! What the rest of the process holds of a base engine: it starts one, and hands placed requests to it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc as async_mpsc};
use uniarm_engine::{Executor, ExecutorOptions};
use uniarm_model::{Forward, ModelError};
use uniarm_proto::{Event, Placed, Refusal};
use uniarm_runtime::Metrics;

use crate::{
    accept::{Accepted, SharedSettings, decode_sampling},
    engine::{Command, Engine, RETRY_AFTER},
    guide::{Links, Scorer},
    metrics::BaseMetrics,
    outlet::OUTLET_EVENTS_MAX,
    pacing::{PaceOptions, Pacing},
};

/// Limits of a base worker.
#[derive(Debug, Clone)]
pub struct BaseOptions {
    pub executor: ExecutorOptions,
    /// Requests that it holds at once, running or waiting.
    pub requests_max: usize,
    pub pace: PaceOptions,
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
    inbox: mpsc::Sender<Command>,
    permits: Arc<Semaphore>,
    is_draining: Arc<AtomicBool>,
    _stop: Arc<StopOnDrop>,
}

/// Stops the engine with the last handle: the inbox alone cannot tell, because the streams hold it too.
struct StopOnDrop(mpsc::Sender<Command>);

// === impl BaseOptions ===

impl Default for BaseOptions {
    fn default() -> Self {
        Self { executor: ExecutorOptions::default(), requests_max: 1024, pace: PaceOptions::default() }
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
        let (inbox, commands) = mpsc::channel();
        let settings = Arc::new(settings);
        let runtime = tokio::runtime::Handle::current();
        let pace = if forward.is_shared() { options.pace.fused() } else { options.pace };
        let executor = Executor::new(forward, &options.executor)?;
        let links = Links::new(scorer, runtime.clone(), inbox.clone());
        let guide = (links, Pacing::new(pace));
        let engine = Engine::new(Arc::clone(&settings), executor, guide, runtime, BaseMetrics::new(metrics));
        thread::Builder::new().name("base-engine".into()).spawn(move || engine.run(&commands))?;
        let _stop = Arc::new(StopOnDrop(inbox.clone()));
        Ok(BaseHandle {
            settings,
            inbox,
            permits: Arc::new(Semaphore::new(options.requests_max)),
            is_draining: Arc::default(),
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
    ) -> Result<async_mpsc::Receiver<Result<Event, Refusal>>, Refusal> {
        let accepted_at = Instant::now();
        let permit = self.admit()?;
        self.settings.check(&placed)?;
        let seed = placed.request.sampling.seed;
        let seed = seed.ok_or_else(|| Refusal::invalid("sampling.seed", "must be drawn by the router"))?;
        let input = placed.request.input.clone();
        let settings = Arc::clone(&self.settings);
        let prompt = tokio::task::spawn_blocking(move || settings.read(&input)).await;
        let prompt = prompt.map_err(|_| Refusal::internal("reading the prompt panicked"))??;
        let (events, receiver) = async_mpsc::channel(OUTLET_EVENTS_MAX);
        let accepted = Accepted {
            prompt,
            seed,
            sampling: decode_sampling(&placed.request.sampling),
            list_length: self.settings.list_length_for(&placed),
            accepted_at,
            deadline,
            events,
            permit,
            span: tracing::Span::current(),
            placed,
        };
        let sent = self.inbox.send(Command::Start(Box::new(accepted)));
        sent.map_err(|_| Refusal::unavailable("engine_stopped", "the base engine stopped"))?;
        Ok(receiver)
    }

    /// From here on new requests are refused, so that their routers place them elsewhere.
    pub fn begin_drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Ends the requests that still run; their routers place them elsewhere, with their tokens so far.
    pub fn hand_over(&self) {
        let _ = self.inbox.send(Command::HandOver);
    }

    /// A place for a request, or the reason why there is none.
    fn admit(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        if self.is_draining.load(Ordering::Relaxed) {
            return Err(Refusal::draining());
        }
        Arc::clone(&self.permits).try_acquire_owned().map_err(|_| {
            Refusal::exhausted(
                "base_queue_full",
                "this base worker holds as many requests as it may",
                RETRY_AFTER,
            )
        })
    }
}

// === impl StopOnDrop ===

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        let _ = self.0.send(Command::Stop);
    }
}
