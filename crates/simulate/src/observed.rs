//! What steps took on real workers under load, and by how much that is more than a cost model says.
//!
//! A machine that serves is slower than one that repeats the same step: weights are read from memory after a pause and not from the
//! last-level cache, and others use both. Every worker writes its last steps down (`/debug/steps?format=json`); what they took,
//! over what the model says of the same work, corrects the model.

use serde::Deserialize;

use crate::cost::{Cost, Work};

/// Fewer steps of a kind say nothing of it.
const STEPS_MIN: usize = 16;

/// The last steps of one process.
#[derive(Clone, Debug, Deserialize)]
pub struct Observed {
    engines: Vec<Engine>,
}

/// Which engine's steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Base,
    Reward,
}

/// By how much steps take longer than a cost model says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slowdown {
    /// Of steps without prompts, which are bound by memory.
    pub decode: f64,
    /// Of steps with prompts.
    pub prompts: f64,
    /// Steps that say so.
    pub steps: usize,
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

// === impl Role ===

impl Role {
    /// As records name the engine.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Reward => "reward",
        }
    }
}

// === impl Observed ===

impl Observed {
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
            for step in own.iter().filter(|step| step.forward_us > 0 && step.work(block_tokens).tokens > 0) {
                let work = step.work(block_tokens);
                let [alone, crowded] = [false, true].map(|crowded| cost.step(&work, crowded).as_secs_f64());
                let share = step.share_beside(&others);
                let expected = alone + (crowded - alone) * share;
                let ratios = if step.prefill_tokens == 0 { &mut decode } else { &mut prompts };
                ratios.push(step.forward_us as f64 / 1e6 / expected);
            }
        }
        let steps = decode.len() + prompts.len();
        let [decode, prompts] =
            [decode, prompts].map(|ratios| (ratios.len() >= STEPS_MIN).then(|| median(ratios)));
        Some(Slowdown { decode: decode.or(prompts)?, prompts: prompts.or(decode)?, steps })
    }

    /// Those of a role, or those of all others.
    fn steps_of(&self, role: Role, own: bool) -> Vec<&Step> {
        let engines = self.engines.iter().filter(|engine| (engine.engine == role.name()) == own);
        engines.flat_map(|engine| &engine.steps).collect()
    }
}

// === impl Step ===

impl Step {
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Measured, StepTimes};

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
        }))
    }

    fn record(engines: &[(&str, Vec<String>)]) -> Observed {
        let engines: Vec<_> = engines
            .iter()
            .map(|(name, steps)| format!(r#"{{"engine": "{name}", "steps": [{}]}}"#, steps.join(",")))
            .collect();
        Observed::read(&format!(r#"{{"engines": [{}]}}"#, engines.join(","))).unwrap()
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
        let found = Observed::compare(std::slice::from_ref(&alone), Role::Base, &cost(), 16).unwrap();
        let expected = Slowdown { decode: 1.5, prompts: 1.25, steps: 40 };
        assert!(
            (found.decode - expected.decode).abs() < 1e-9 && (found.prompts - expected.prompts).abs() < 1e-9
        );
        assert_eq!(found.steps, expected.steps);
        assert_eq!(Observed::compare(&[alone], Role::Reward, &cost(), 16), None);

        // A reward worker that computes half of the time in which 4 rows do: 8 and 12 ms make 10.
        let reward = (0..20).map(|n| step(100 * n, 1, 0, 6_000)).collect();
        let both = record(&[("base", base), ("reward", reward)]);
        let found = Observed::compare(&[both], Role::Base, &cost(), 16).unwrap();
        assert!((found.decode - 1.2).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn a_corrected_model_takes_as_long_as_what_was_observed() {
        let base = (0..20).map(|n| step(100 * n, 4, 0, 12_000)).collect();
        let records = [record(&[("base", base)])];
        let found = Observed::compare(&records, Role::Base, &cost(), 16).unwrap();
        assert_eq!(found.prompts, found.decode, "no prompt was seen");
        let corrected = cost().slowed(&found);
        let found = Observed::compare(&records, Role::Base, &corrected, 16).unwrap();
        assert!((found.decode - 1.0).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn a_few_steps_say_nothing() {
        let base = (0..STEPS_MIN - 1).map(|n| step(100 * n, 4, 0, 12_000)).collect();
        assert_eq!(Observed::compare(&[record(&[("base", base)])], Role::Base, &cost(), 16), None);
        assert!(Observed::read("{}").is_err());
    }
}
