//! How many workers a load needs: the smallest pools that meet the targets.
//!
//! Goodput does not fall with another worker (but for the luck of the dice, see the tests), so that for every number of
//! base workers there is a least number of reward workers, and it falls as the base pool grows: the pairs on that
//! staircase are the answer, and none of them is better than another before somebody puts a price on the workers.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::cost::{Cost, Work};
use crate::report::{Report, Targets};
use crate::setup::Setup;
use crate::simulation::simulate;
use crate::trace::Arrival;

/// Stairs that are worked out; between them lie as many again as nobody would tell apart.
const STAIRS_MAX: usize = 6;

/// Times as many workers as the load keeps busy are taken for plenty.
const PLENTY: f64 = 6.0;

/// Rows of the step that an estimate assumes.
const ESTIMATE_ROWS: usize = 32;

/// What is asked of a search.
pub struct Question<'a> {
    /// Everything but the sizes of the pools.
    pub setup: &'a Setup,
    pub arrivals: &'a [Arrival],
    pub targets: &'a Targets,
    /// Sizes that are considered.
    pub bases: RangeInclusive<usize>,
    pub rewards: RangeInclusive<usize>,
    /// Sees to what follows from the sizes of the pools, once these are set.
    pub sized: &'a dyn Fn(&mut Setup),
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// The smallest pools, from the fewest base workers to the fewest reward workers.
    Pairs(Vec<Report>),
    /// Not even the largest pools meet the targets: what they reach.
    Never(Box<Report>),
}

/// One search: every pair of pool sizes is simulated at most once.
struct Search<'a> {
    question: &'a Question<'a>,
    tried: BTreeMap<(usize, usize), Report>,
    tell: &'a mut dyn FnMut(&Report),
}

/// Finds the smallest pools that meet the targets; `tell` hears of every simulation.
pub fn smallest_pools(question: &Question<'_>, tell: &mut dyn FnMut(&Report)) -> Found {
    Search { question, tried: BTreeMap::new(), tell }.run()
}

// === impl Search ===

impl Search<'_> {
    fn run(&mut self) -> Found {
        let Question { setup, arrivals, .. } = *self.question;
        let (base_range, reward_range) = (self.question.bases.clone(), self.question.rewards.clone());
        let plenty = |cost: &Cost, guided_only: bool, range: &RangeInclusive<usize>| {
            let busy = busy_workers(cost, arrivals, guided_only);
            ((busy * PLENTY) as usize + 4).clamp(*range.start(), *range.end())
        };
        let bases = plenty(&setup.base.cost, false, &base_range);
        let rewards = plenty(&setup.reward.cost, true, &reward_range);
        if !self.meets(bases, rewards) {
            return Found::Never(Box::new(self.tried[&(bases, rewards)].clone()));
        }
        let base = least(*base_range.start(), bases, |base| self.meets(base, rewards));
        let reward = least(*reward_range.start(), rewards, |reward| self.meets(base, reward));
        let fewest_rewards = least(*reward_range.start(), reward, |reward| self.meets(bases, reward));
        let stair = (reward - fewest_rewards).div_ceil(STAIRS_MAX).max(1);
        let mut pairs = vec![(base, reward)];
        while let Some(&(base, reward)) = pairs.last().filter(|pair| pair.1 > fewest_rewards) {
            let reward = reward.saturating_sub(stair).max(fewest_rewards);
            let base = least(base, bases, |base| self.meets(base, reward));
            // More base workers may have made still fewer reward workers enough.
            pairs.push((base, least(fewest_rewards, reward, |reward| self.meets(base, reward))));
        }
        Found::Pairs(pairs.iter().map(|pair| self.tried[pair].clone()).collect())
    }

    fn meets(&mut self, base: usize, reward: usize) -> bool {
        if !self.tried.contains_key(&(base, reward)) {
            let mut setup = self.question.setup.clone();
            setup.base.workers = base;
            setup.reward.workers = reward;
            (self.question.sized)(&mut setup);
            let report = simulate(&setup, self.question.arrivals, self.question.targets);
            (self.tell)(&report);
            self.tried.insert((base, reward), report);
        }
        self.tried[&(base, reward)].meets(self.question.targets)
    }
}

/// The least number in `from..=to` that will do, where `to` does and whatever is larger than one that does.
fn least(from: usize, to: usize, mut will_do: impl FnMut(usize) -> bool) -> usize {
    // Small pools are simulated faster than large ones: doubling steps before halving ones.
    let (mut low, mut high, mut step) = (from, to, 1);
    while low < high && step < high - low {
        if will_do(low + step - 1) {
            high = low + step - 1;
        } else {
            low += step;
            step *= 2;
        }
    }
    while low < high {
        let middle = low + (high - low) / 2;
        match will_do(middle) {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    low
}

/// Workers that a trace keeps busy on average, at steps of a fair size.
fn busy_workers(cost: &Cost, arrivals: &[Arrival], guided_only: bool) -> f64 {
    let seconds = |rows: usize, wanted: usize| {
        let work = Work { tokens: rows, wanted, ..Work::default() };
        cost.step(&work, false).as_secs_f64() / rows as f64
    };
    let (prefill, decode) = (seconds(8 * ESTIMATE_ROWS, 1), seconds(ESTIMATE_ROWS, ESTIMATE_ROWS));
    let counted = arrivals.iter().filter(|arrival| arrival.guided || !guided_only);
    let work: f64 = counted.map(|a| prefill * a.prompt_tokens as f64 + decode * a.answer_tokens as f64).sum();
    let span = arrivals.last().map_or(0.0, |last| last.at) - arrivals.first().map_or(0.0, |first| first.at);
    // Everything at once, as from a single line of a trace, is spread over a second.
    work / span.max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_is_found_wherever_it_is() {
        for to in 1..40 {
            for answer in 1..=to {
                let mut tried = 0;
                let found = least(1, to, |number| {
                    tried += 1;
                    number >= answer
                });
                assert_eq!(found, answer);
                assert!(tried <= 12, "{tried} of {to}");
            }
        }
    }
}
