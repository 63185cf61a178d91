//! How many questions are in flight: one more for each round of answers, half as many after a refusal.

use std::time::Instant;

/// Enough rows for the first step to be worth its weights.
const LIMIT_FIRST: f64 = 16.0;

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

    pub fn answered(&mut self) {
        self.limit = (self.limit + 1.0 / self.limit).min(self.limit_max);
    }

    /// A whole round is refused together, and is one sign: only a question begun after the last halving is another one.
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
            pace.answered();
        }
        assert_eq!(pace.limit(), 20);
    }
}
