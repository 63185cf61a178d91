//! What jobs do, in numbers: for the metrics of whoever runs them.

use std::sync::atomic::{AtomicU64, Ordering};

/// How requests ended that this process asked, over all of its jobs. A shared job has answers of other processes, too.
#[derive(Debug, Default)]
pub struct Ends {
    answered: AtomicU64,
    failed: AtomicU64,
}

/// The jobs under way, and what this process has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub jobs: u64,
    /// Requests of these jobs without an answer or an error.
    pub left: u64,
    pub answered: u64,
    pub failed: u64,
}

// === impl Ends ===

impl Ends {
    pub(crate) fn count(&self, failed: bool) {
        let count = if failed { &self.failed } else { &self.answered };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Beside so many jobs, with so many requests left.
    pub fn tally(&self, jobs: u64, left: u64) -> Tally {
        let [answered, failed] = [&self.answered, &self.failed].map(|count| count.load(Ordering::Relaxed));
        Tally { jobs, left, answered, failed }
    }
}
