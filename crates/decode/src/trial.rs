//! Whether drafting pays, as far as it was seen: [`plan_pace`](crate::drafting::plan_pace) only promises.
//!
//! The promise rests on what steps cost, and that is known from steps that ran beside something else: both pools may share a
//! memory, a processor or a link, and then a pool's steps take longer for what the other one does meanwhile. So a promise is
//! tried for some tokens, and kept where these came faster than in lock-step.
//!
//! A few tokens can mislead: drafts have runs of luck, and a machine has other users. The way that lost is therefore looked
//! at again soon, lock-step at once, because drafts that are slower must not be kept for long; and each time that this
//! changes nothing after twice as many tokens, up to a thousand; from there on because the load, the models' agreement and
//! the machines change.

use crate::drafting::{RANGES, range};

/// Tokens of each sequence after which a way is known.
const KNOWN_TOKENS: f64 = 16.0;

/// What is remembered of a way counts as so many tokens of each sequence at most: older ones fade.
const MEMORY_TOKENS: f64 = 64.0;

/// Tokens of each sequence after which the way that lost is looked at again, afresh: lock-step and drafting at first, and
/// either at most.
const LOCK_STEP_AGAIN_FIRST: f64 = KNOWN_TOKENS;
const DRAFTING_AGAIN_FIRST: f64 = 8.0 * KNOWN_TOKENS;
const LOOK_AGAIN_MOST: f64 = 64.0 * KNOWN_TOKENS;

/// Drafting has to be so much faster than lock-step: less is what two looks at the same way differ by.
const FASTER: f64 = 1.05;

/// Seconds of a token in lock-step and while drafting, by how many sequences step together, in ranges as those of rows.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    ranges: [Ways; RANGES],
}

#[derive(Clone, Copy, Debug, Default)]
struct Ways {
    lock_step: Gaps,
    drafting: Gaps,
    /// Once both are known.
    verdict: Option<Verdict>,
}

#[derive(Clone, Copy, Debug)]
struct Verdict {
    drafts: bool,
    /// Tokens of each sequence that go the way that won, until the other one is looked at again.
    holds: f64,
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
        self.ranges[range(sequences)].observe(is_drafting, tokens as f64 * share, seconds * share);
    }

    /// Whether an answer may draft where that promises to be worth it: it was faster, or it is time to see whether it is.
    pub fn allows(&self, sequences: usize) -> bool {
        let ways = &self.ranges[range(sequences)];
        ways.lock_step.rate().is_some() && ways.drafts().unwrap_or(true)
    }
}

// === impl Ways ===

impl Ways {
    fn observe(&mut self, is_drafting: bool, tokens: f64, seconds: f64) {
        let holds = self.verdict.map_or(LOOK_AGAIN_MOST, |verdict| verdict.holds);
        let is_winner = self.verdict.is_some_and(|verdict| verdict.drafts == is_drafting);
        let Self { lock_step, drafting, .. } = self;
        let (this, other) = if is_drafting { (drafting, lock_step) } else { (lock_step, drafting) };
        let was_known = this.rate().is_some();
        this.add(tokens, seconds);
        other.grow_old(tokens, if is_winner { holds } else { LOOK_AGAIN_MOST });
        let Some(drafts) = self.drafts() else { return };
        let holds = match self.verdict {
            Some(verdict) if verdict.drafts == drafts && was_known => holds,
            Some(verdict) if verdict.drafts == drafts => (2.0 * holds).min(LOOK_AGAIN_MOST),
            _ if drafts => LOCK_STEP_AGAIN_FIRST,
            _ => DRAFTING_AGAIN_FIRST,
        };
        self.verdict = Some(Verdict { drafts, holds });
    }

    /// Whether drafting won, once both ways are known.
    fn drafts(&self) -> Option<bool> {
        Some(self.drafting.rate()? >= FASTER * self.lock_step.rate()?)
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

    /// Forgets what is older than so many tokens that went the other way.
    fn grow_old(&mut self, tokens: f64, oldest: f64) {
        self.age += tokens;
        if self.age >= oldest {
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
        assert_eq!(drafted(&mut trial, 160, 5e-3, 6e-3), 16, "it is tried once");
        assert_eq!(drafted(&mut trial, 900, 5e-3, 6e-3), 3 * 16, "less and less often");
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
    fn a_look_that_misled_is_corrected_soon() {
        for (first, drafting, drafts) in [(8e-3, 3e-3, true), (3e-3, 6e-3, false)] {
            let mut trial = Trial::default();
            drafted(&mut trial, 16, 5e-3, drafting);
            trial.observe(true, 1, 16, 16.0 * first);
            assert_eq!(trial.allows(1), !drafts, "sixteen tokens said so");
            let tokens = drafted(&mut trial, 1_000, 5e-3, drafting);
            let expected = if drafts { 750..1_000 } else { 0..120 };
            assert!(expected.contains(&tokens), "{tokens} of 1,000 at {drafting} s, lock-step 5e-3");
        }
    }

    #[test]
    fn drafts_that_won_by_luck_are_compared_again_at_once() {
        let mut trial = Trial::default();
        drafted(&mut trial, 16, 5e-3, 5.5e-3);
        trial.observe(true, 1, 16, 16.0 * 4e-3);
        assert!(trial.allows(1), "sixteen tokens said so");
        let tokens = drafted(&mut trial, 100, 5e-3, 5.5e-3);
        assert!(tokens <= 32, "{tokens} of 100");
    }

    #[test]
    fn what_is_no_faster_is_no_reason_to_draft() {
        let mut trial = Trial::default();
        let tokens = drafted(&mut trial, 64_000, 5e-3, 4.9e-3);
        assert!(tokens < 1_500, "{tokens} of 64,000");
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
