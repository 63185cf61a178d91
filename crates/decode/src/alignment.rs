//! Keeps the sequences that one reward worker scores in step with each other.
//!
//! Sequences whose prompts took different times to read fall into groups that alternate: the base worker computes one
//! while the reward worker computes the other, each group's token takes two steps, and no step is full. Such a split
//! never heals by itself, because each pool always has something to do. So now and then the group that could go on
//! waits once for the other, and from then on both are one. Measured at 8 + 8 rows, which are nearly bound by
//! arithmetic: 421 split, 457 together (tokens/s); fewer rows gain more.

use std::{collections::HashMap, hash::Hash, time::Duration};

use crate::drafting::StepCost;

/// Steps between two waits: a wait in vain costs less than a step and a half, that is one in forty.
const REST_STEPS: u32 = 64;

/// Steps of a reward worker that are worth waiting for: one is under way, and another may come first.
const PATIENCE_STEPS: f64 = 1.5;
const PATIENCE_LONGEST_SECONDS: f64 = 1.0;

/// Sequences of one reward worker whose base rows are here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Group {
    /// Their reward rows are here too.
    pub ready: usize,
    /// Their reward rows are not.
    pub waiting: usize,
}

/// Who waits for whom, by reward worker.
#[derive(Debug)]
pub struct Alignment<K> {
    waits: HashMap<K, Wait>,
}

#[derive(Debug, Default)]
struct Wait {
    until: Option<Duration>,
    rest: u32,
}

/// How long to wait for rows that a reward worker with so many sessions is computing.
pub fn patience(cost: &StepCost, sessions: f64) -> Duration {
    Duration::from_secs_f64((PATIENCE_STEPS * cost.seconds(sessions)).min(PATIENCE_LONGEST_SECONDS))
}

// === impl Alignment ===

impl<K> Default for Alignment<K> {
    fn default() -> Self {
        Self { waits: HashMap::new() }
    }
}

impl<K: Copy + Eq + Hash> Alignment<K> {
    /// Whether those of the group that are ready should wait for the others; `patience`: for so long at most.
    pub fn holds(&mut self, worker: K, group: Group, now: Duration, patience: Duration) -> bool {
        let wait = self.waits.entry(worker).or_default();
        if group.ready == 0 || group.waiting == 0 {
            wait.until = None;
            return false;
        }
        if wait.until.is_none() && wait.rest == 0 {
            wait.until = Some(now + patience);
            wait.rest = REST_STEPS;
        }
        let holds = wait.until.is_some_and(|until| now < until);
        if !holds {
            wait.until = None;
        }
        holds
    }

    /// A step has been made.
    pub fn stepped(&mut self) {
        self.waits.values_mut().for_each(|wait| wait.rest = wait.rest.saturating_sub(1));
    }

    pub fn forget(&mut self, worker: K) {
        self.waits.remove(&worker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_waits_once_and_then_rests() {
        let (mut alignment, link, patience) = (Alignment::default(), 1, Duration::from_millis(30));
        let split = Group { ready: 1, waiting: 1 };
        let mut holds = |after, group| alignment.holds(link, group, Duration::from_millis(after), patience);
        assert!(!holds(0, Group { ready: 2, waiting: 0 }), "nobody to wait for");
        assert!(holds(1, split) && holds(30, split));
        assert!(!holds(32, split), "the others did not come");
        assert!(!holds(33, split), "it rests");
        (0..REST_STEPS).for_each(|_| alignment.stepped());
        assert!(alignment.holds(link, split, Duration::from_millis(40), patience));
        let whole = Group { ready: 2, waiting: 0 };
        assert!(!alignment.holds(link, whole, Duration::from_millis(41), patience), "they came");
    }
}
