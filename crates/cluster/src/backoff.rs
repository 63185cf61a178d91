//! Waiting between tries: longer each time, and never in step with others.

use std::time::Duration;

use rand::Rng as _;

const FIRST: Duration = Duration::from_millis(100);

/// The store is back for everyone within this time of its return: a member that waited for it is recorded after one wait,
/// and seen by all after another. A request a second from each member is nothing to etcd.
const LONGEST: Duration = Duration::from_secs(1);

pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    /// Begins again with the shortest wait.
    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }

    /// The next wait: between half of its nominal length and all of it, so that members that lost the
    /// store at the same moment do not return to it at the same moment.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.next.mul_f64(rand::rng().random_range(0.5..1.0));
        self.next = (self.next * 2).min(LONGEST);
        wait
    }
}
