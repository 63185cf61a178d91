//! How fast a process gets through its work, as its latest requests tell. Pure: time is an argument.

use std::time::Duration;

/// What happened this long ago counts a third of what happens now: long against a request, short against a change of load.
const MEMORY: Duration = Duration::from_secs(10);

/// A token's share of the mean gap between tokens.
const GAP_SHARE: f64 = 0.02;

/// What a refused client is told to wait before anything has been measured.
const RETRY_AT_FIRST: Duration = Duration::from_secs(1);

/// Sooner would be asked in vain; later, and a process that has room again would stand idle.
const RETRY_SOONEST: Duration = Duration::from_millis(50);
const RETRY_LATEST: Duration = Duration::from_secs(30);

/// Ends of requests over the time in which there were any, and the gaps between tokens of an answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct DrainRate {
    under_way: usize,
    /// When it was looked at last, since any moment before the first.
    seen_at: Duration,
    busy_seconds: f64,
    ends: f64,
    gap_seconds: Option<f64>,
}

// === impl DrainRate ===

impl DrainRate {
    pub fn on_begin(&mut self, now: Duration) {
        self.advance(now);
        self.under_way += 1;
    }

    pub fn on_end(&mut self, now: Duration) {
        self.advance(now);
        self.under_way = self.under_way.saturating_sub(1);
        self.ends += 1.0;
    }

    /// A token came so long after the one before it in the same answer.
    pub fn on_token(&mut self, gap: Duration) {
        let gap = gap.as_secs_f64();
        let mean = self.gap_seconds.get_or_insert(gap);
        *mean += GAP_SHARE * (gap - *mean);
    }

    /// How long it takes until `ahead` requests have ended, and then `tokens` have been written one after the other.
    /// What has not been measured counts nothing: nobody is refused for a guess.
    pub fn expected(&self, ahead: usize, tokens: u32) -> Duration {
        let wait = self.per_second().map_or(0.0, |rate| ahead as f64 / rate);
        let writing = self.gap_seconds.unwrap_or(0.0) * f64::from(tokens.saturating_sub(1));
        Duration::from_secs_f64((wait + writing).min(Duration::from_secs(86_400).as_secs_f64()))
    }

    /// When a refused client may come again: by then a place should be free.
    pub fn retry_after(&self) -> Duration {
        let next = self.per_second().map(|rate| Duration::from_secs_f64((1.0 / rate).min(3600.0)));
        next.unwrap_or(RETRY_AT_FIRST).clamp(RETRY_SOONEST, RETRY_LATEST)
    }

    fn per_second(&self) -> Option<f64> {
        (self.ends > 0.0 && self.busy_seconds > 0.0).then(|| self.ends / self.busy_seconds)
    }

    /// Idle time says nothing about how fast work is done: it is not counted.
    fn advance(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.seen_at).as_secs_f64();
        self.seen_at = now;
        if self.under_way > 0 {
            let kept = (-passed / MEMORY.as_secs_f64()).exp();
            self.ends *= kept;
            self.busy_seconds = self.busy_seconds * kept + passed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Ten at once, each of which takes a second, one ending every tenth of a second.
    fn loaded() -> DrainRate {
        let mut rate = DrainRate::default();
        (0..10).for_each(|_| rate.on_begin(at(0.0)));
        for step in 1..=600 {
            rate.on_end(at(f64::from(step) * 0.1));
            rate.on_begin(at(f64::from(step) * 0.1));
        }
        rate
    }

    #[test]
    fn a_wait_is_what_the_latest_ends_say() {
        let rate = loaded();
        let wait = rate.expected(20, 1).as_secs_f64();
        assert!((1.8..2.2).contains(&wait), "{wait}");
        assert!((80..120).contains(&rate.retry_after().as_millis()), "{:?}", rate.retry_after());
    }

    #[test]
    fn idle_time_changes_nothing_and_nothing_is_guessed() {
        let mut rate = loaded();
        let before = rate.expected(20, 1);
        (0..10).for_each(|_| rate.on_end(at(60.0)));
        rate.on_begin(at(4000.0));
        assert!(rate.expected(20, 1) <= before);
        assert_eq!(DrainRate::default().expected(1000, 1000), Duration::ZERO);
        assert_eq!(DrainRate::default().retry_after(), RETRY_AT_FIRST);
    }

    #[test]
    fn tokens_that_must_come_one_after_the_other_take_their_time() {
        let mut rate = DrainRate::default();
        (0..1000).for_each(|_| rate.on_token(Duration::from_millis(20)));
        let writing = rate.expected(0, 101).as_secs_f64();
        assert!((1.99..2.01).contains(&writing), "{writing}");
    }
}
