//! What jobs do, in numbers: for the metrics of whoever runs them.

use crate::job::Progress;

/// Of the jobs under way, and of what this process has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub jobs: u64,
    /// Requests of these jobs without an answer or an error.
    pub left: u64,
    pub answered: u64,
    pub failed: u64,
}

// === impl Tally ===

impl Tally {
    /// Of a process that runs this one job.
    #[must_use]
    pub fn of(progress: &Progress) -> Self {
        Self {
            jobs: 1,
            left: progress.requests.saturating_sub(progress.done),
            answered: progress.answered_here,
            failed: progress.failed_here,
        }
    }
}
