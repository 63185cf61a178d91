//! The bounded way out of the engine to one client.

use std::collections::VecDeque;

use tokio::sync::mpsc::{Sender, error::TrySendError};
use uniarm_proto::{Event, Refusal};

/// Events on their way to one client. A slow client fills it, its answers sit out until it has room, and nobody else
/// notices.
pub(crate) const OUTLET_EVENTS_MAX: usize = 64;

pub(crate) struct Outlet {
    events: Sender<Result<Event, Refusal>>,
    /// Events that wait for the next flush, or found no room at the last one: at most those of the tokens that one turn decides,
    /// because a parked answer goes no further.
    backlog: VecDeque<Result<Event, Refusal>>,
    is_parked: bool,
}

// === impl Outlet ===

impl Outlet {
    pub(crate) fn new(events: Sender<Result<Event, Refusal>>) -> Self {
        Self { events, backlog: VecDeque::new(), is_parked: false }
    }

    /// The client hung up.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Full: its answers wait.
    pub(crate) fn is_parked(&self) -> bool {
        self.is_parked
    }

    /// Takes an event along to the next flush.
    pub(crate) fn push(&mut self, event: Result<Event, Refusal>) {
        self.backlog.push_back(event);
    }

    /// Moves what the client has room for. Each event may wake a sleeping core, which costs more than all else that is done for
    /// it: what belongs together goes together, and the first one's wake is the last.
    pub(crate) fn flush(&mut self) {
        self.is_parked = false;
        while let Some(event) = self.backlog.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.backlog.push_front(event);
                    self.is_parked = true;
                    return;
                }
                Err(TrySendError::Closed(_)) => self.backlog.clear(),
            }
        }
    }

    /// What is left over when the request ends while its client is slow: delivered by a task of its own, so that the
    /// engine can forget the request.
    pub(crate) fn finish(mut self, runtime: &tokio::runtime::Handle) {
        self.flush();
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

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn event(message: &str) -> Result<Event, Refusal> {
        Err(Refusal::internal(message))
    }

    fn heard(receiver: &mut mpsc::Receiver<Result<Event, Refusal>>) -> Vec<String> {
        std::iter::from_fn(|| receiver.try_recv().ok())
            .map(|event| event.expect_err("only such are sent").message)
            .collect()
    }

    #[test]
    fn it_is_parked_from_a_flush_without_room_to_one_with_room_and_loses_nothing() {
        let (events, mut receiver) = mpsc::channel(2);
        let mut outlet = Outlet::new(events);
        for message in ["a", "b", "c", "d", "e"] {
            outlet.push(event(message));
        }
        assert!(!outlet.is_parked() && heard(&mut receiver).is_empty(), "they wait for the flush");
        outlet.flush();
        assert!(outlet.is_parked());
        assert_eq!(heard(&mut receiver), ["a", "b"]);
        outlet.flush();
        assert!(outlet.is_parked());
        assert_eq!(heard(&mut receiver), ["c", "d"]);
        outlet.flush();
        assert!(!outlet.is_parked());
        assert_eq!(heard(&mut receiver), ["e"]);

        drop(receiver);
        outlet.push(event("f"));
        outlet.flush();
        assert!(outlet.is_closed() && !outlet.is_parked(), "nobody waits for one who hung up");
    }

    #[tokio::test]
    async fn what_is_left_at_the_end_is_delivered_by_itself() {
        let (events, mut receiver) = mpsc::channel(1);
        let mut outlet = Outlet::new(events);
        outlet.push(event("a"));
        outlet.push(event("b"));
        outlet.finish(&tokio::runtime::Handle::current());
        let mut messages = Vec::new();
        while let Some(event) = receiver.recv().await {
            messages.push(event.expect_err("only such are sent").message);
        }
        assert_eq!(messages, ["a", "b"]);
    }
}
