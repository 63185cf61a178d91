//! The end of a process: the first SIGTERM or SIGINT asks for a drain, the second ends it at once.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::RuntimeError;

/// Exit status after a second signal, as a shell reports a process that the signal itself ended.
const EXIT_SIGINT: i32 = 128 + 2;
const EXIT_SIGTERM: i32 = 128 + 15;

/// The wish to stop. Clones share it; once begun it cannot be taken back.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// A shutdown that only `begin` starts: for tests and for clusters inside one process.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A shutdown that also begins with the first SIGTERM or SIGINT. A second signal exits the
    /// process at once, so that a drain that hangs never needs SIGKILL. Call inside a tokio runtime.
    pub fn on_signals() -> Result<Self, RuntimeError> {
        let shutdown = Self::new();
        let terminate = signal(SignalKind::terminate()).map_err(RuntimeError::Signals)?;
        let interrupt = signal(SignalKind::interrupt()).map_err(RuntimeError::Signals)?;
        tokio::spawn(shutdown.clone().obey(terminate, interrupt));
        Ok(shutdown)
    }

    pub fn begin(&self) {
        self.token.cancel();
    }

    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Completes when the shutdown begins, at once if it already has.
    pub fn begun(&self) -> WaitForCancellationFuture<'_> {
        self.token.cancelled()
    }

    /// The token behind this shutdown, for code that takes `tokio_util`'s type.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    async fn obey(self, mut terminate: Signal, mut interrupt: Signal) {
        let (name, _) = next_signal(&mut terminate, &mut interrupt).await;
        tracing::info!(signal = name, "shutting down; a second signal exits at once");
        self.begin();
        let (name, status) = next_signal(&mut terminate, &mut interrupt).await;
        tracing::warn!(signal = name, "second signal: exiting without draining");
        std::process::exit(status);
    }
}

async fn next_signal(terminate: &mut Signal, interrupt: &mut Signal) -> (&'static str, i32) {
    tokio::select! {
        _ = terminate.recv() => ("SIGTERM", EXIT_SIGTERM),
        _ = interrupt.recv() => ("SIGINT", EXIT_SIGINT),
    }
}
