//! The bounded way out of the engine to one client.

use std::collections::VecDeque;

use tokio::sync::mpsc::{Sender, error::TrySendError};
use uniarm_proto::{Event, Refusal};

/// Events on their way to one client. A slow client fills it, its answers sit out until it has room, and nobody else
/// notices.
pub(crate) const OUTLET_EVENTS_MAX: usize = 64;

pub(crate) struct Outlet {
    events: Sender<Result<Event, Refusal>>,
    /// Events that found no room: at most those of one token of each answer, because a parked answer goes no further.
    backlog: VecDeque<Result<Event, Refusal>>,
}

// === impl Outlet ===

impl Outlet {
    pub(crate) fn new(events: Sender<Result<Event, Refusal>>) -> Self {
        Self { events, backlog: VecDeque::new() }
    }

    /// The client hung up.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Full: its answers wait.
    pub(crate) fn is_parked(&self) -> bool {
        !self.backlog.is_empty()
    }

    pub(crate) fn send(&mut self, event: Result<Event, Refusal>) {
        self.backlog.push_back(event);
        self.flush();
    }

    /// Moves what the client has room for.
    pub(crate) fn flush(&mut self) {
        while let Some(event) = self.backlog.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.backlog.push_front(event);
                    return;
                }
                Err(TrySendError::Closed(_)) => self.backlog.clear(),
            }
        }
    }

    /// What is left over when the request ends while its client is slow: delivered by a task of its own, so that the
    /// engine can forget the request.
    pub(crate) fn finish(self, runtime: &tokio::runtime::Handle) {
        if self.backlog.is_empty() {
            return;
        }
        runtime.spawn(async move {
            for event in self.backlog {
                if self.events.send(event).await.is_err() {
                    return;
                }
            }
        });
    }
}
