//! The last steps of an engine: it writes each one down, and whoever is curious reads along without holding it up.
//!
//! A ring of numbers with one writer. Each place has a counter that is odd while the place is written and even after: a
//! reader that finds another counter after reading than before reads again. A lock that the writer only tries would do, too, but
//! lose the very steps during which somebody looks; here the writer never waits, allocates nothing and loses nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering, fence},
    },
    time::{Duration, Instant},
};

use serde::Serialize;

/// Steps that are kept of each engine: some seconds of a busy one, in 80 kB.
pub const STEPS_KEPT: usize = 512;

/// Numbers of a step.
const WORDS: usize = 20;

/// A reader that is overtaken so often leaves a step out: the writer has been around the whole ring meanwhile.
const READS_MAX: usize = 8;

/// One step of an engine, from the end of the forward before it to the end of its own: what was chosen, sent and waited for in
/// between is in it. Durations in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Step {
    /// From 1. Set by [`Steps::publish`].
    pub number: u64,
    /// When it ended, since the engine began. Set by [`Steps::publish`].
    pub ended_us: u64,
    /// Tokens of prompts, or of what was computed before and lost its place, without logits.
    pub prefill_tokens: u64,
    /// Rows of logits after tokens that are chosen.
    pub decode_rows: u64,
    /// Rows of logits after drafts.
    pub draft_rows: u64,
    /// Sequences that hold cache blocks.
    pub running: u64,
    /// Sequences that wait for blocks.
    pub waiting: u64,
    /// Nothing to compute: rows of others were missing, or messages were read.
    pub wait_us: u64,
    pub plan_us: u64,
    pub forward_us: u64,
    pub choose_us: u64,
    /// Of a base engine: looking after requests, and messages to reward workers. Of a reward engine: its lists.
    pub exchange_us: u64,
    /// Text, events and bookkeeping, and what follows a forward until its rows are handed out.
    pub commit_us: u64,
    /// Tokens that a reward engine went on with before they were chosen.
    pub drafts_made: u64,
    /// Drafts that a base engine compared with what it chose.
    pub drafts_compared: u64,
    pub drafts_accepted: u64,
    pub tokens_chosen: u64,
    /// Rows that a reward engine answered.
    pub rows_answered: u64,
    pub blocks_used: u64,
    pub blocks: u64,
}

/// The last steps of one engine. Clones share them; one of them writes.
#[derive(Debug, Clone)]
pub struct Steps(Arc<Ring>);

#[derive(Debug)]
struct Ring {
    engine: &'static str,
    origin: Instant,
    /// Steps that were written.
    count: AtomicU64,
    places: Box<[Place]>,
}

#[derive(Debug)]
struct Place {
    /// Twice the number of its step, and one less while that is written.
    version: AtomicU64,
    words: [AtomicU64; WORDS],
}

// === impl Step ===

impl Step {
    /// All of its time.
    #[must_use]
    pub fn total_us(&self) -> u64 {
        self.parts().iter().map(|(_, microseconds)| microseconds).sum()
    }

    /// Where its time went, in the order in which it goes.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, u64); 6] {
        [
            ("wait", self.wait_us),
            ("choose", self.choose_us),
            ("commit", self.commit_us),
            ("exchange", self.exchange_us),
            ("plan", self.plan_us),
            ("forward", self.forward_us),
        ]
    }

    fn to_words(self) -> [u64; WORDS] {
        [
            self.number,
            self.ended_us,
            self.prefill_tokens,
            self.decode_rows,
            self.draft_rows,
            self.running,
            self.waiting,
            self.wait_us,
            self.plan_us,
            self.forward_us,
            self.choose_us,
            self.exchange_us,
            self.commit_us,
            self.drafts_made,
            self.drafts_compared,
            self.drafts_accepted,
            self.tokens_chosen,
            self.rows_answered,
            self.blocks_used,
            self.blocks,
        ]
    }

    fn from_words(words: [u64; WORDS]) -> Self {
        let mut words = words.into_iter();
        let mut next = || words.next().expect("as many words as numbers");
        Self {
            number: next(),
            ended_us: next(),
            prefill_tokens: next(),
            decode_rows: next(),
            draft_rows: next(),
            running: next(),
            waiting: next(),
            wait_us: next(),
            plan_us: next(),
            forward_us: next(),
            choose_us: next(),
            exchange_us: next(),
            commit_us: next(),
            drafts_made: next(),
            drafts_compared: next(),
            drafts_accepted: next(),
            tokens_chosen: next(),
            rows_answered: next(),
            blocks_used: next(),
            blocks: next(),
        }
    }
}

// === impl Steps ===

impl Steps {
    #[must_use]
    pub fn new(engine: &'static str) -> Self {
        let places = (0..STEPS_KEPT).map(|_| Place::default()).collect();
        Self(Arc::new(Ring { engine, origin: Instant::now(), count: AtomicU64::new(0), places }))
    }

    #[must_use]
    pub fn engine(&self) -> &'static str {
        self.0.engine
    }

    /// Writes down the next step, which ended at `ended`. For the engine alone: of two writers one would be lost.
    pub fn publish(&self, ended: Instant, step: Step) {
        let Ring { origin, count, places, .. } = &*self.0;
        let number = count.load(Ordering::Relaxed) + 1;
        let ended_us = ended.saturating_duration_since(*origin).as_micros() as u64;
        let place = &places[(number - 1) as usize % STEPS_KEPT];
        place.write(number, Step { number, ended_us, ..step }.to_words());
        count.store(number, Ordering::Release);
    }

    /// The last `most` steps, oldest first.
    #[must_use]
    pub fn last(&self, most: usize) -> Vec<Step> {
        let Ring { count, places, .. } = &*self.0;
        let last = count.load(Ordering::Acquire);
        let first = last.saturating_sub(most.min(STEPS_KEPT) as u64) + 1;
        let read = |number: u64| places[(number - 1) as usize % STEPS_KEPT].read(number);
        (first..=last).filter_map(read).map(Step::from_words).collect()
    }

    /// How long ago a step ended.
    #[must_use]
    pub fn age(&self, step: &Step) -> Duration {
        self.0.origin.elapsed().saturating_sub(Duration::from_micros(step.ended_us))
    }
}

// === impl Place ===

impl Place {
    fn write(&self, number: u64, words: [u64; WORDS]) {
        self.version.store(2 * number - 1, Ordering::Relaxed);
        // What is written below is not seen before the odd version.
        fence(Ordering::Release);
        for (word, value) in self.words.iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
        self.version.store(2 * number, Ordering::Release);
    }

    /// `None`: another step has taken its place.
    fn read(&self, number: u64) -> Option<[u64; WORDS]> {
        for _ in 0..READS_MAX {
            let before = self.version.load(Ordering::Acquire);
            let words = std::array::from_fn(|index| self.words[index].load(Ordering::Relaxed));
            // What was read above is not read after the version below.
            fence(Ordering::Acquire);
            if before == 2 * number && self.version.load(Ordering::Relaxed) == before {
                return Some(words);
            }
            if before > 2 * number {
                return None;
            }
        }
        None
    }
}

impl Default for Place {
    fn default() -> Self {
        Self { version: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// All of whose numbers say which one it is.
    fn numbered(number: u64) -> Step {
        Step::from_words([number; WORDS])
    }

    #[test]
    fn the_ring_keeps_the_last_steps_in_their_order() {
        let steps = Steps::new("base");
        assert!(steps.last(STEPS_KEPT).is_empty());
        for number in 1..=700 {
            steps.publish(Instant::now(), numbered(number));
        }
        let numbers = |most| steps.last(most).iter().map(|step| step.number).collect::<Vec<_>>();
        assert_eq!(numbers(3), [698, 699, 700]);
        assert_eq!(numbers(10_000), (189..=700).collect::<Vec<_>>());
        assert_eq!(numbers(0), [0; 0]);
        let step = steps.last(1)[0];
        assert_eq!(Step { ended_us: 700, ..step }, numbered(700));
        assert!(steps.age(&step) < Duration::from_secs(60));
    }

    #[test]
    fn a_reader_never_sees_half_a_step() {
        let steps = Steps::new("base");
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut seen = 0;
                        while !is_over.load(Ordering::Relaxed) {
                            for step in steps.last(STEPS_KEPT) {
                                assert_eq!(Step { ended_us: step.number, ..step }, numbered(step.number));
                                seen += 1;
                            }
                        }
                        seen
                    })
                })
                .collect();
            for number in 1..=200_000 {
                steps.publish(Instant::now(), numbered(number));
            }
            is_over.store(true, Ordering::Relaxed);
            let seen: usize = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
            println!("{seen} steps were read while 200,000 were written");
        });
    }
}
