//! Whether drafting pays, as far as it was seen: [`plan_pace`](crate::drafting::plan_pace) only promises.
//!
//! The promise rests on what steps cost, and that is known from steps that ran beside something else: both pools may share a
//! memory, a processor or a link, and then a pool's steps take longer for what the other one does meanwhile. So a promise is
//! tried for some tokens, and kept where these came faster than in lock-step. Each way is looked at again after a
//! thousand tokens of the other, because the load, the models' agreement and the machines change.

use crate::drafting::{RANGES, range};

/// Tokens of each sequence after which a way is known.
const KNOWN_TOKENS: f64 = 16.0;

/// What is remembered of a way counts as so many tokens of each sequence at most: older ones fade.
const MEMORY_TOKENS: f64 = 64.0;

/// Tokens of each sequence after which the other way is looked at again, afresh: one look takes a sixty-fourth of them.
const LOOK_AGAIN_TOKENS: f64 = 64.0 * KNOWN_TOKENS;

/// Seconds of a token in lock-step and while drafting, by how many sequences step together, in ranges as those of rows.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    ranges: [Ways; RANGES],
}

#[derive(Clone, Copy, Debug, Default)]
struct Ways {
    lock_step: Gaps,
    drafting: Gaps,
}

/// Time between an answer's tokens, in one way.
#[derive(Clone, Copy, Debug, Default)]
struct Gaps {
    seconds: f64,
    /// Of each sequence, that `seconds` are of.
    tokens: f64,
    /// Tokens of each sequence that went the other way since.
    age: f64,
}

// === impl Trial ===

impl Trial {
    /// An answer, one of `sequences` that step together, got so many tokens in so many seconds.
    pub fn observe(&mut self, is_drafting: bool, sequences: usize, tokens: usize, seconds: f64) {
        let share = 1.0 / sequences.max(1) as f64;
        let Ways { lock_step, drafting } = &mut self.ranges[range(sequences)];
        let (this, other) = if is_drafting { (drafting, lock_step) } else { (lock_step, drafting) };
        this.add(tokens as f64 * share, seconds * share);
        other.grow_old(tokens as f64 * share);
    }

    /// Whether an answer may draft where that promises to be worth it: it was faster, or it is time to see whether it is.
    pub fn allows(&self, sequences: usize) -> bool {
        let Ways { lock_step, drafting } = &self.ranges[range(sequences)];
        match (lock_step.rate(), drafting.rate()) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(lock_step), Some(drafting)) => drafting >= lock_step,
        }
    }
}

// === impl Gaps ===

impl Gaps {
    fn add(&mut self, tokens: f64, seconds: f64) {
        self.seconds += seconds;
        self.tokens += tokens;
        self.age = 0.0;
        if self.tokens > MEMORY_TOKENS {
            self.seconds *= MEMORY_TOKENS / self.tokens;
            self.tokens = MEMORY_TOKENS;
        }
    }

    fn grow_old(&mut self, tokens: f64) {
        self.age += tokens;
        if self.age >= LOOK_AGAIN_TOKENS {
            *self = Self::default();
        }
    }

    /// Tokens per second, once that is known.
    fn rate(&self) -> Option<f64> {
        (self.tokens >= KNOWN_TOKENS).then(|| self.tokens / self.seconds.max(f64::MIN_POSITIVE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs one answer at a time under a promise that always holds out, and counts the tokens that were drafted.
    fn drafted(trial: &mut Trial, tokens: usize, lock_step: f64, drafting: f64) -> usize {
        let windows = (0..tokens / 8).map(|_| {
            let drafts = trial.allows(1);
            trial.observe(drafts, 1, 8, 8.0 * if drafts { drafting } else { lock_step });
            if drafts { 8 } else { 0 }
        });
        windows.sum()
    }

    #[test]
    fn a_promise_that_does_not_come_true_costs_few_tokens() {
        let mut trial = Trial::default();
        assert!(!trial.allows(1), "lock-step is what it is compared with");
        assert_eq!(drafted(&mut trial, 800, 5e-3, 6e-3), 16, "it is tried once");
        let later = drafted(&mut trial, 64_000, 5e-3, 6e-3);
        assert!((500..1_500).contains(&later), "it is tried again, and {later} of 64,000 tokens are few");
    }

    #[test]
    fn a_promise_that_comes_true_is_kept() {
        let mut trial = Trial::default();
        let tokens = drafted(&mut trial, 64_000, 5e-3, 3e-3);
        assert!((62_500..64_000).contains(&tokens), "{tokens} of 64,000");
    }

    #[test]
    fn what_has_changed_is_noticed() {
        let mut trial = Trial::default();
        drafted(&mut trial, 10_000, 5e-3, 6e-3);
        let faster = drafted(&mut trial, 10_000, 5e-3, 3e-3);
        assert!(faster > 8_000, "{faster} of 10,000 once it pays");
        let slower = drafted(&mut trial, 10_000, 5e-3, 6e-3);
        assert!(slower < 1_000, "{slower} of 10,000 when it no longer does");
    }

    #[test]
    fn sequences_that_step_together_are_a_case_of_their_own() {
        let mut trial = Trial::default();
        trial.observe(false, 1, 64, 64.0 * 5e-3);
        trial.observe(true, 1, 64, 64.0 * 3e-3);
        for _ in 0..16 {
            trial.observe(false, 16, 64, 64.0 * 30e-3);
            trial.observe(true, 16, 64, 64.0 * 40e-3);
        }
        assert_eq!([1, 16, 9, 2].map(|sequences| trial.allows(sequences)), [true, false, false, false]);
    }
}
