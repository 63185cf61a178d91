//! What steps took on real workers under load, and by how much that is more than a cost model says.
//!
//! A machine that serves does not take the times of one that repeats the same step: weights are read from memory after a pause and not
//! from the last-level cache, and others use both. Every worker writes its last steps down (`/debug/steps?format=json`); what they took,
//! over what the model says of the same work, corrects the model. Each ratio is kept, in the order of the steps: what disturbs a machine
//! disturbs several steps in a row, and makes the latencies beyond the median.

use std::ops::RangeInclusive;

use serde::Deserialize;
use uniarm_proto::Role;

use crate::cost::{Cost, Swings, Work};

/// Fewer steps of a kind say nothing of it.
const STEPS_MIN: usize = 16;

/// More tokens or blocks than this, or a ratio beyond these, is no observation, and times made of it could be too long for a clock.
const COUNT_MAX: usize = 1 << 24;
pub(crate) const RATIOS: RangeInclusive<f64> = 1e-3..=1e3;

/// From where one worker goes through the ratios to where the next one does: they are not disturbed at the same time.
const WORKERS_APART: usize = 61;

/// The last steps of one process.
#[derive(Clone, Debug, Deserialize)]
pub struct Record {
    engines: Vec<Engine>,
}

/// By how much steps take longer than a cost model says, one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Slowdown {
    /// What most steps without and with prompts take, over what the model says.
    medians: [f64; 2],
    /// Single steps, over that.
    pub(crate) swings: Swings,
    /// Steps that say so.
    pub steps: usize,
}

/// Of one kind of steps.
#[derive(Clone)]
struct Ratios {
    median: f64,
    /// Over the median.
    swings: Vec<f64>,
}

#[derive(Clone, Debug, Deserialize)]
struct Engine {
    engine: String,
    steps: Vec<Step>,
}

/// The part of a step's record that is needed here.
#[derive(Clone, Debug, Deserialize)]
struct Step {
    /// Milliseconds since it ended.
    age_ms: f64,
    prefill_tokens: usize,
    decode_rows: usize,
    draft_rows: usize,
    forward_us: u64,
    blocks_used: usize,
}

// === impl Record ===

impl Record {
    /// Reads what `/debug/steps` answered as JSON.
    ///
    /// # Errors
    /// When it is something else.
    pub fn read(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    /// Compares the steps of a role, in all of the records, with a cost model; `None` where there are too few. Workers whose
    /// steps stand in one record share a machine: while one computes, the other is crowded.
    pub fn compare(records: &[Self], role: Role, cost: &Cost, block_tokens: usize) -> Option<Slowdown> {
        let (mut decode, mut prompts) = (Vec::new(), Vec::new());
        for record in records {
            let [own, others] = [true, false].map(|own| record.steps_of(role, own));
            for step in own.iter().filter(|step| step.is_possible()) {
                let work = step.work(block_tokens);
                let [alone, crowded] = [false, true].map(|crowded| cost.step(&work, crowded).as_secs_f64());
                let share = step.share_beside(&others);
                let expected = alone + (crowded - alone) * share;
                let ratio = step.forward_us as f64 / 1e6 / expected;
                if RATIOS.contains(&ratio) {
                    if step.prefill_tokens == 0 { &mut decode } else { &mut prompts }.push(ratio);
                }
            }
        }
        let steps = decode.len() + prompts.len();
        // A kind that was hardly seen is as slow as the other.
        let (decode, prompts) = (Ratios::of(&decode), Ratios::of(&prompts));
        let either = decode.clone().or_else(|| prompts.clone())?;
        let decode = decode.unwrap_or_else(|| either.clone());
        let prompts = prompts.unwrap_or(either);
        let medians = [decode.median, prompts.median];
        Some(Slowdown { medians, swings: Swings { decode: decode.swings, prompts: prompts.swings }, steps })
    }

    /// Those of a role, or those of all others.
    fn steps_of(&self, role: Role, own: bool) -> Vec<&Step> {
        let engines = self.engines.iter().filter(|engine| (engine.engine == role.name()) == own);
        engines.flat_map(|engine| &engine.steps).collect()
    }
}

// === impl Step ===

impl Step {
    /// Whether it computed something, and no more than anyone could.
    fn is_possible(&self) -> bool {
        let Self { prefill_tokens, decode_rows, draft_rows, blocks_used, .. } = *self;
        let counts = [prefill_tokens, decode_rows, draft_rows, blocks_used];
        counts.iter().all(|count| *count <= COUNT_MAX) && prefill_tokens + decode_rows + draft_rows > 0
    }

    fn work(&self, block_tokens: usize) -> Work {
        let rows = self.decode_rows + self.draft_rows;
        // The cache is what all sequences have there, and each of them has its turn in almost every step.
        let context = self.blocks_used * block_tokens;
        Work { tokens: self.prefill_tokens + rows, wanted: rows, context, attended: context }
    }

    /// When its forward began and ended, milliseconds ago.
    fn forward(&self) -> (f64, f64) {
        (self.age_ms + self.forward_us as f64 / 1e3, self.age_ms)
    }

    /// The part of its forward during which one of the others computed, too.
    fn share_beside(&self, others: &[&Self]) -> f64 {
        let (began, ended) = self.forward();
        let beside = others.iter().map(|other| {
            let (other_began, other_ended) = other.forward();
            (began.min(other_began) - ended.max(other_ended)).max(0.0)
        });
        (beside.sum::<f64>() / (began - ended)).min(1.0)
    }
}

// === impl Slowdown ===

impl Slowdown {
    /// What most steps with or without prompts take, over what the model says.
    pub fn median(&self, has_prompts: bool) -> f64 {
        self.medians[usize::from(has_prompts)]
    }

    /// Where a worker begins to count its steps.
    pub(crate) const fn first(worker: usize) -> usize {
        worker * WORKERS_APART
    }
}

// === impl Ratios ===

impl Ratios {
    fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let median = *sorted.get(sorted.len() / 2)?;
        let swings = || values.iter().map(|value| value / median).collect();
        (values.len() >= STEPS_MIN).then(|| Self { median, swings: swings() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Measured, Slowed, StepTimes};

    /// 2 ms for a row alone and 3 ms beside another worker, and as much for every further row.
    fn cost() -> Cost {
        let times = |milliseconds: f64| StepTimes {
            layers: vec![(1, milliseconds / 1e3), (256, 256.0 * milliseconds / 1e3)],
            head: vec![(1, 0.0)],
            context: 0.0,
            attended: 0.0,
        };
        Cost::Measured(Box::new(Measured {
            what: String::new(),
            kv_tokens: 1024,
            vocabulary: 100,
            alone: times(2.0),
            crowded: times(3.0),
            choose_unguided: 0.0,
            choose_guided: 0.0,
            list: 0.0,
            draft: 0.0,
            swings: Swings::default(),
        }))
    }

    fn record(engines: &[(&str, Vec<String>)]) -> Record {
        let engines: Vec<_> = engines
            .iter()
            .map(|(name, steps)| format!(r#"{{"engine": "{name}", "steps": [{}]}}"#, steps.join(",")))
            .collect();
        Record::read(&format!(r#"{{"engines": [{}]}}"#, engines.join(","))).unwrap()
    }

    /// A step that ended so long ago, of rows and tokens of prompts, and what its forward took.
    fn step(age_ms: usize, rows: usize, prefill: usize, forward_us: usize) -> String {
        format!(
            r#"{{"age_ms": {age_ms}, "prefill_tokens": {prefill}, "decode_rows": {rows}, "draft_rows": 0,
                "forward_us": {forward_us}, "blocks_used": 0, "wait_us": 3}}"#
        )
    }

    #[test]
    fn steps_are_compared_with_those_of_the_same_work_and_neighbour() {
        // Every 20 ms one of 4 rows that takes 12 ms in place of 8, and one with a prompt that takes 1.25 times its 40 ms.
        let decode = (0..20).map(|n| step(100 * n, 4, 0, 12_000));
        let prompts = (0..20).map(|n| step(100 * n + 30, 0, 20, 50_000));
        let base: Vec<_> = decode.chain(prompts).collect();
        let alone = record(&[("base", base.clone())]);
        let found = Record::compare(std::slice::from_ref(&alone), Role::Base, &cost(), 16).unwrap();
        assert!((found.median(false) - 1.5).abs() < 1e-9, "{found:?}");
        assert!((found.median(true) - 1.25).abs() < 1e-9, "{found:?}");
        assert_eq!(found.steps, 40);
        assert_eq!(Record::compare(&[alone], Role::Reward, &cost(), 16), None);

        // A reward worker that computes half of the time in which 4 rows do: 8 and 12 ms make 10.
        let reward = (0..20).map(|n| step(100 * n, 1, 0, 6_000)).collect();
        let both = record(&[("base", base), ("reward", reward)]);
        let found = Record::compare(&[both], Role::Base, &cost(), 16).unwrap();
        assert!((found.median(false) - 1.2).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn a_corrected_model_takes_as_long_as_what_was_observed() {
        // Two of three steps take 12 ms, and every third 24.
        let took = |n: usize| if n % 3 == 2 { 24_000 } else { 12_000 };
        let base = (0..21).map(|n| step(100 * n, 4, 0, took(n))).collect();
        let slowdown = Record::compare(&[record(&[("base", base)])], Role::Base, &cost(), 16).unwrap();
        assert_eq!(slowdown.median(true), slowdown.median(false), "no prompt was seen");
        let corrected = Cost::Slowed(Box::new(Slowed { cost: cost(), slowdown }));
        let work = Work { tokens: 4, wanted: 4, ..Work::default() };
        for number in 0..50 {
            let seconds = corrected.step(&work, false).as_secs_f64() * corrected.swing(&work, number);
            assert!((seconds * 1e6 - took(number % 21) as f64).abs() < 1.0, "step {number}: {seconds}");
        }
        assert_eq!(cost().swing(&work, 2), 1.0);
    }

    #[test]
    fn a_few_steps_say_nothing() {
        let base = (0..STEPS_MIN - 1).map(|n| step(100 * n, 4, 0, 12_000)).collect();
        assert_eq!(Record::compare(&[record(&[("base", base)])], Role::Base, &cost(), 16), None);
        assert!(Record::read("{}").is_err());
        // Nor do any that cannot be.
        for (rows, forward_us) in [(usize::MAX, 1), (1, usize::MAX), (1, 0), (0, 10)] {
            let base = (0..40).map(|n| step(100 * n, rows, 0, forward_us)).collect();
            assert_eq!(Record::compare(&[record(&[("base", base)])], Role::Base, &cost(), 16), None);
        }
    }
}
