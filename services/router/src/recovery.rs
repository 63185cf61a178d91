//! What to do when an attempt of a request has ended badly. Pure: what happened and dice are arguments.

use std::{collections::BTreeSet, time::Duration};

use uniarm_proto::{Fault, MemberId};

use crate::circuit::jittered;

/// Base workers that one request may try before its first event.
pub const ATTEMPTS_MAX: usize = 3;

/// A stream that was lost and found no worker for so long ends: without a deadline it would wait for ever.
pub(crate) const RECOVERY_LONGEST: Duration = Duration::from_secs(60);

/// Wait before a stream that has been lost again, without a token between, is placed once more; it doubles.
const WAIT_FIRST: Duration = Duration::from_millis(50);
const WAIT_LONGEST: Duration = Duration::from_secs(2);

/// What one request adds to the budget: retries may be a fifth of the load, so that a sick pool is not asked twice as
/// often as a healthy one.
const RETRIES_PER_REQUEST: f64 = 0.2;

/// Retries that are free after a quiet time: a router with little load may still lose a worker.
const RETRIES_SAVED_MAX: f64 = 100.0;

/// One request over its attempts.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    /// Members that failed it since its last token.
    pub(crate) failed: BTreeSet<MemberId>,
    /// Its client has received something: from here on it is not refused, only continued.
    has_begun: bool,
    /// Losses since the last token.
    losses: u32,
}

/// Retries that requests without a first event may still make, over all of them. Streams that have begun are not in
/// it: each moves once when its worker is lost, and waits longer and longer after that.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    saved: f64,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// Place it again after this time.
    Again(Duration),
    /// End it with what went wrong.
    GiveUp,
}

// === impl Recovery ===

impl Recovery {
    pub(crate) fn on_begun(&mut self) {
        self.has_begun = true;
    }

    /// A new token, or the end of an answer.
    pub(crate) fn on_progress(&mut self) {
        self.has_begun = true;
        self.losses = 0;
        self.failed.clear();
    }

    /// The attempt on `member` failed. `lost_for`: how long the stream has been without a worker.
    pub(crate) fn on_loss(
        &mut self,
        member: &MemberId,
        fault: Fault,
        lost_for: Duration,
        budget: &mut RetryBudget,
        die: u32,
    ) -> Next {
        self.losses += 1;
        self.failed.insert(member.clone());
        match fault {
            Fault::Request => Next::GiveUp,
            _ if self.has_begun => self.wait(lost_for, die),
            _ if self.losses as usize >= ATTEMPTS_MAX || !budget.take() => Next::GiveUp,
            _ => Next::Again(Duration::ZERO),
        }
    }

    /// Nobody is there to take it. Those who failed it may be well again.
    pub(crate) fn on_nobody(&mut self, lost_for: Duration, die: u32) -> Next {
        self.losses += 1;
        self.failed.clear();
        if self.has_begun { self.wait(lost_for, die) } else { Next::GiveUp }
    }

    fn wait(&self, lost_for: Duration, die: u32) -> Next {
        if lost_for >= RECOVERY_LONGEST {
            return Next::GiveUp;
        }
        let Some(doublings) = self.losses.checked_sub(2) else { return Next::Again(Duration::ZERO) };
        let wait = WAIT_FIRST.saturating_mul(1 << doublings.min(16)).min(WAIT_LONGEST);
        Next::Again(jittered(wait, die))
    }
}

// === impl RetryBudget ===

impl Default for RetryBudget {
    fn default() -> Self {
        Self { saved: RETRIES_SAVED_MAX }
    }
}

impl RetryBudget {
    pub(crate) fn on_request(&mut self) {
        self.saved = (self.saved + RETRIES_PER_REQUEST).min(RETRIES_SAVED_MAX);
    }

    fn take(&mut self) -> bool {
        let is_covered = self.saved >= 1.0;
        if is_covered {
            self.saved -= 1.0;
        }
        is_covered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lose(recovery: &mut Recovery, fault: Fault) -> Next {
        let budget = &mut RetryBudget::default();
        recovery.on_loss(&MemberId("b".into()), fault, Duration::ZERO, budget, u32::MAX)
    }

    #[test]
    fn a_request_without_an_event_tries_others_at_once_and_then_gives_up() {
        let mut recovery = Recovery::default();
        for _ in 1..ATTEMPTS_MAX {
            assert_eq!(lose(&mut recovery, Fault::Connection), Next::Again(Duration::ZERO));
        }
        assert_eq!(lose(&mut recovery, Fault::Elsewhere), Next::GiveUp);
        assert_eq!(Recovery::default().on_nobody(Duration::ZERO, 0), Next::GiveUp);
    }

    #[test]
    fn a_stream_that_has_begun_moves_at_once_then_waits_longer_and_longer() {
        let mut recovery = Recovery::default();
        recovery.on_progress();
        let waits: Vec<Next> = (0..9).map(|_| lose(&mut recovery, Fault::Connection)).collect();
        let milliseconds = [0, 50, 100, 200, 400, 800, 1600, 2000, 2000];
        assert_eq!(waits, milliseconds.map(|ms| Next::Again(Duration::from_millis(ms))));
        recovery.on_progress();
        assert!(recovery.failed.is_empty());
        assert_eq!(lose(&mut recovery, Fault::Elsewhere), Next::Again(Duration::ZERO));
        assert_eq!(recovery.on_nobody(RECOVERY_LONGEST, 0), Next::GiveUp);
    }

    #[test]
    fn a_fault_of_the_request_is_final_however_far_it_has_come() {
        let mut recovery = Recovery::default();
        recovery.on_progress();
        assert_eq!(lose(&mut recovery, Fault::Request), Next::GiveUp);
    }

    #[test]
    fn retries_of_new_requests_are_a_fifth_of_the_load_in_the_long_run() {
        let mut budget = RetryBudget::default();
        let retried = (0..10_000)
            .filter(|_| {
                budget.on_request();
                budget.take()
            })
            .count();
        assert!((2000..=2101).contains(&retried), "{retried}");
    }
}
