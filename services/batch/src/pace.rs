//! How many requests are in flight: one more for each round of answers, fewer when they begin to queue, half as many
//! after a refusal.
//!
//! The sign of a full pool is the time that answers waited in its queue, as a share of their whole time. Latency itself
//! says little, because it is a matter of the answer's length; refusals come when the queue is full already, and
//! everybody else's requests wait behind it.

use std::time::Instant;

use uniarm_proto::pb::Timing;

/// Enough rows for the first step to be worth its weights.
const LIMIT_FIRST: f64 = 16.0;

/// Share of its time that an answer may wait while its pool has room: prompts that arrive together wait for each other.
const QUEUED_SHARE: f64 = 0.1;

/// Waits shorter than a step or two are not a queue.
const QUEUED_MS: f64 = 200.0;

#[derive(Debug)]
pub struct Pace {
    limit: f64,
    limit_max: f64,
    halved: Option<Instant>,
}

// === impl Pace ===

impl Pace {
    pub fn new(limit_max: usize) -> Self {
        let limit_max = limit_max.max(1) as f64;
        Self { limit: LIMIT_FIRST.min(limit_max), limit_max, halved: None }
    }

    pub fn limit(&self) -> usize {
        self.limit as usize
    }

    pub fn answered(&mut self, timing: &Timing) {
        let is_queued = timing.queue_ms > QUEUED_MS && timing.queue_ms > QUEUED_SHARE * timing.total_ms;
        let step = 1.0 / self.limit;
        self.limit = if is_queued { self.limit - step } else { self.limit + step }.clamp(1.0, self.limit_max);
    }

    /// A whole round is refused together, and is one sign: only a request begun after the last halving is another one.
    pub fn refused(&mut self, begun: Instant) {
        if self.halved.is_none_or(|halved| begun > halved) {
            self.limit = (self.limit / 2.0).max(1.0);
            self.halved = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_round_halves_once_and_answers_win_it_back() {
        let mut pace = Pace::new(20);
        let begun = Instant::now();
        for _ in 0..16 {
            pace.refused(begun);
        }
        assert_eq!(pace.limit(), 8);
        pace.refused(Instant::now() + std::time::Duration::from_secs(1));
        assert_eq!(pace.limit(), 4);
        for _ in 0..1000 {
            pace.answered(&Timing::default());
        }
        assert_eq!(pace.limit(), 20);
    }

    #[test]
    fn answers_that_queued_bring_the_limit_down_to_where_they_do_not() {
        let mut pace = Pace::new(256);
        // A pool of 40 rows; who is beyond waits his turn.
        for _ in 0..20_000 {
            let queue_ms = if pace.limit() > 40 { 500.0 } else { 0.0 };
            pace.answered(&Timing { queue_ms, total_ms: 2000.0, ..Timing::default() });
        }
        assert!((38..=41).contains(&pace.limit()), "{}", pace.limit());
    }
}
