//! How fast a process gets through its work, as its latest requests tell. Pure: time is an argument.

use std::time::Duration;

/// What happened this long ago counts a third of what happens now, and after an idle time of this length nothing of it
/// counts: long against a request, short against a change of load.
const MEMORY: Duration = Duration::from_secs(10);

/// What a refused client is told to wait before anything has been measured.
const RETRY_AT_FIRST: Duration = Duration::from_secs(1);

/// Sooner would be asked in vain; later, and a process that has room again would stand idle.
const RETRY_SOONEST: Duration = Duration::from_millis(50);
const RETRY_LATEST: Duration = Duration::from_secs(30);

/// No estimate is longer.
const WAIT_LONGEST: Duration = Duration::from_secs(86_400);

/// Things that were done, over the time in which there was something to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct DrainRate {
    /// When it was looked at last, since any moment before the first.
    seen_at: Duration,
    is_busy: bool,
    busy_seconds: f64,
    done: f64,
}

/// How fast those who wait for a place get one. The tokens that they write then are no part of it: a client whose
/// answer begins in time has what its deadline is for, and may end it by itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Line {
    rate: DrainRate,
    admitted: u64,
}

// === impl DrainRate ===

impl DrainRate {
    /// So many things have been done since it was looked at last; `is_busy`: there are more to do.
    pub fn observe(&mut self, now: Duration, done: u64, is_busy: bool) {
        let passed = now.saturating_sub(self.seen_at);
        self.seen_at = now;
        if self.is_busy {
            let kept = (-passed.as_secs_f64() / MEMORY.as_secs_f64()).exp();
            self.busy_seconds = self.busy_seconds * kept + passed.as_secs_f64();
            self.done = self.done * kept + done as f64;
        } else if passed > MEMORY {
            (self.busy_seconds, self.done) = (0.0, 0.0);
        }
        self.is_busy = is_busy;
    }

    /// How long it takes until so many more are done. What has not been measured counts nothing: nobody is refused for
    /// a guess.
    pub fn wait(&self, ahead: usize) -> Duration {
        let seconds = self.per_second().map_or(0.0, |rate| ahead as f64 / rate);
        Duration::from_secs_f64(seconds.min(WAIT_LONGEST.as_secs_f64()))
    }

    /// When a refused client may come again: by then a place should be free.
    pub fn retry_after(&self) -> Duration {
        let is_known = self.per_second().is_some();
        if is_known { self.wait(1).clamp(RETRY_SOONEST, RETRY_LATEST) } else { RETRY_AT_FIRST }
    }

    fn per_second(&self) -> Option<f64> {
        (self.done > 0.0 && self.busy_seconds > 0.0).then(|| self.done / self.busy_seconds)
    }
}

// === impl Line ===

impl Line {
    /// `admitted`: places given since ever; `is_full`: somebody was left in line.
    pub fn observe(&mut self, now: Duration, admitted: u64, is_full: bool) {
        self.rate.observe(now, admitted.saturating_sub(self.admitted), is_full);
        self.admitted = admitted;
    }

    /// How long someone waits who has so many before it.
    pub fn wait(&self, ahead: usize) -> Duration {
        self.rate.wait(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// A minute in which there is always something to do, and ten things a second are done.
    fn loaded() -> DrainRate {
        let mut rate = DrainRate::default();
        (0..=600).for_each(|step| rate.observe(at(f64::from(step) * 0.1), u64::from(step > 0), true));
        rate
    }

    #[test]
    fn a_wait_is_what_the_latest_ends_say() {
        let rate = loaded();
        let wait = rate.wait(20).as_secs_f64();
        assert!((1.8..2.2).contains(&wait), "{wait}");
        assert_eq!(rate.wait(0), Duration::ZERO);
        assert!((80..120).contains(&rate.retry_after().as_millis()), "{:?}", rate.retry_after());
    }

    #[test]
    fn a_short_pause_changes_nothing_and_a_long_one_makes_everything_forgotten() {
        let mut rate = loaded();
        let before = rate.wait(20);
        rate.observe(at(60.0), 0, false);
        rate.observe(at(65.0), 0, true);
        assert_eq!(rate.wait(20), before);
        rate.observe(at(65.0), 0, false);
        rate.observe(at(4000.0), 0, true);
        assert_eq!(rate.wait(20), Duration::ZERO);
    }

    #[test]
    fn nothing_is_guessed() {
        let mut rate = DrainRate::default();
        rate.observe(at(1.0), 0, true);
        rate.observe(at(500.0), 0, true);
        assert_eq!(rate.wait(1000), Duration::ZERO, "nothing has been done yet");
        assert_eq!(rate.retry_after(), RETRY_AT_FIRST);
    }

    #[test]
    fn places_that_nobody_waited_for_say_nothing_of_how_fast_a_line_moves() {
        let mut line = Line::default();
        line.observe(at(1.0), 1000, false);
        line.observe(at(2.0), 2000, true);
        line.observe(at(4.0), 2001, true);
        assert_eq!(line.wait(3).as_secs_f64().round(), 6.0);
    }
}
