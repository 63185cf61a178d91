//! Whether a role takes work, and if not why: one value that /readyz and gRPC health both show.

use std::borrow::Cow;
use std::sync::Arc;

use tokio::sync::watch;

/// The readiness of one role. Clones share one state; it begins as not ready ("starting").
#[derive(Debug, Clone)]
pub struct Readiness {
    state: Arc<watch::Sender<ReadyState>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadyState {
    Ready,
    /// The reason is shown to operators; it is a phrase such as "loading the model".
    NotReady(Cow<'static, str>),
}

impl Readiness {
    #[must_use]
    pub fn starting() -> Self {
        Self { state: Arc::new(watch::Sender::new(ReadyState::NotReady("starting".into()))) }
    }

    pub fn set_ready(&self) {
        self.set(ReadyState::Ready);
    }

    pub fn set_not_ready(&self, reason: impl Into<Cow<'static, str>>) {
        self.set(ReadyState::NotReady(reason.into()));
    }

    #[must_use]
    pub fn state(&self) -> ReadyState {
        self.state.borrow().clone()
    }

    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.state.borrow() == ReadyState::Ready
    }

    #[must_use]
    pub fn watch(&self) -> watch::Receiver<ReadyState> {
        self.state.subscribe()
    }

    fn set(&self, next: ReadyState) {
        self.state.send_if_modified(|state| {
            let changed = *state != next;
            if changed {
                *state = next;
            }
            changed
        });
    }
}
