//! How long a step takes: from a data sheet, or from measurements of this machine.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uniarm_decode::StepPlan;

use crate::architecture::Architecture;
use crate::hardware::Accelerator;
use crate::observed::{RATIOS, Slowdown};

/// What a step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens that pass the layers.
    pub tokens: usize,
    /// Tokens that pass the output projection.
    pub wanted: usize,
    /// Positions that the rows read from the cache, each row's once.
    pub context: usize,
    /// Pairs of a token and a position that it attends to.
    pub attended: usize,
}

/// Time as a function of work.
#[derive(Clone, Debug, PartialEq)]
pub enum Cost {
    Roofline(Roofline),
    Measured(Box<Measured>),
    Slowed(Box<Slowed>),
}

/// Another cost, and by how much real steps were seen to take longer.
#[derive(Clone, Debug, PartialEq)]
pub struct Slowed {
    pub cost: Cost,
    pub slowdown: Slowdown,
}

/// The greater of bytes over bandwidth and operations over peak, and an overhead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    pub accelerator: Accelerator,
    pub model: Architecture,
}

/// Steps of one model on one machine, measured by `uniarm simulate --calibrate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Of the model, the machine and the threads, for people.
    pub what: String,
    /// Tokens that the cache of one worker holds.
    pub kv_tokens: usize,
    pub vocabulary: usize,
    /// Alone on the machine.
    pub alone: StepTimes,
    /// While another worker steps on the same machine.
    pub crowded: StepTimes,
    /// Seconds by which a base worker chooses one token without and with guidance, bookkeeping included.
    pub choose_unguided: f64,
    pub choose_guided: f64,
    /// Seconds by which a reward worker makes one list, and one draft.
    pub list: f64,
    pub draft: f64,
    #[serde(default)]
    pub swings: Swings,
}

/// What single steps took, over the times of their kinds, in the order in which they were taken: what disturbs a machine disturbs
/// several steps in a row. Empty where nobody looked: then every step takes its time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Swings {
    /// Of steps without prompts.
    pub decode: Vec<f64>,
    /// Of prompts.
    pub prompts: Vec<f64>,
}

/// Times of steps in seconds; between the measured points a line is drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepTimes {
    /// (tokens, seconds) of the layers, with nothing in the cache and no logits wanted.
    pub layers: Vec<(usize, f64)>,
    /// (rows, seconds) that wanted logits add.
    pub head: Vec<(usize, f64)>,
    /// Seconds for each position that a row reads from the cache.
    pub context: f64,
    /// Seconds for each pair of a token and a position.
    pub attended: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum MeasuredError {
    #[error("the machine file is not one: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the machine file has no times in {0}")]
    Empty(&'static str),
    #[error("swings of the machine file go from {least} to {most}, and one is {0}", least = RATIOS.start(), most = RATIOS.end())]
    Swing(f64),
}

// === impl Work ===

impl Work {
    pub fn of(plan: &StepPlan) -> Self {
        let mut work = Self::default();
        for row in &plan.rows {
            let tokens = row.tokens.len();
            work.tokens += tokens;
            work.wanted += tokens - row.logits_from;
            work.context += row.start + tokens;
            work.attended += tokens * row.start + tokens * (tokens + 1) / 2;
        }
        work
    }

    /// Tokens of prompts, whose logits nobody wants.
    pub(crate) fn has_prompts(&self) -> bool {
        self.tokens > self.wanted
    }
}

// === impl Cost ===

impl Cost {
    /// Time of a step; `crowded` says whether another worker steps on the same machine meanwhile.
    pub fn step(&self, work: &Work, crowded: bool) -> Duration {
        match self {
            Self::Roofline(roofline) => roofline.step(work),
            Self::Measured(measured) if crowded => measured.crowded.step(work),
            Self::Measured(measured) => measured.alone.step(work),
            Self::Slowed(slowed) => {
                slowed.cost.step(work, crowded).mul_f64(slowed.slowdown.median(work.has_prompts()))
            }
        }
    }

    /// What the step `number` of its kind takes, over what [`Self::step`] says: steps that were seen swing, one after the other.
    pub fn swing(&self, work: &Work, number: usize) -> f64 {
        match self {
            Self::Roofline(_) => 1.0,
            Self::Measured(measured) => measured.swings.of(work.has_prompts(), number),
            Self::Slowed(slowed) => slowed.slowdown.swings.of(work.has_prompts(), number),
        }
    }

    /// Time by which a base worker's thread chooses one token. On an accelerator it is in the step's overhead.
    pub fn choose(&self, guided: bool) -> Duration {
        match self {
            Self::Roofline(_) => Duration::ZERO,
            Self::Measured(measured) if guided => Duration::from_secs_f64(measured.choose_guided),
            Self::Measured(measured) => Duration::from_secs_f64(measured.choose_unguided),
            Self::Slowed(slowed) => slowed.cost.choose(guided),
        }
    }

    /// Time by which a reward worker's thread makes one list.
    pub fn list(&self) -> Duration {
        match self {
            Self::Roofline(_) => Duration::ZERO,
            Self::Measured(measured) => Duration::from_secs_f64(measured.list),
            Self::Slowed(slowed) => slowed.cost.list(),
        }
    }

    /// Time by which a reward worker's thread makes one draft.
    pub fn draft(&self) -> Duration {
        match self {
            Self::Roofline(_) => Duration::ZERO,
            Self::Measured(measured) => Duration::from_secs_f64(measured.draft),
            Self::Slowed(slowed) => slowed.cost.draft(),
        }
    }

    /// Tokens that a worker's cache holds.
    pub fn kv_tokens(&self) -> usize {
        match self {
            Self::Roofline(roofline) => {
                let bytes = roofline.accelerator.cache_bytes(roofline.model.weight_bytes());
                (bytes / roofline.model.cache_bytes()) as usize
            }
            Self::Measured(measured) => measured.kv_tokens,
            Self::Slowed(slowed) => slowed.cost.kv_tokens(),
        }
    }

    /// Logits of a row.
    pub fn vocabulary(&self) -> usize {
        match self {
            Self::Roofline(roofline) => roofline.model.vocabulary,
            Self::Measured(measured) => measured.vocabulary,
            Self::Slowed(slowed) => slowed.cost.vocabulary(),
        }
    }

    pub fn name(&self) -> String {
        match self {
            Self::Roofline(roofline) => {
                format!("{} on {}", roofline.model.name, roofline.accelerator.name)
            }
            Self::Measured(measured) => measured.what.clone(),
            Self::Slowed(slowed) => slowed.cost.name(),
        }
    }
}

// === impl Roofline ===

impl Roofline {
    fn step(&self, work: &Work) -> Duration {
        let Self { accelerator, model } = self;
        let head = if work.wanted > 0 { model.head_parameters() } else { 0.0 };
        let number_bytes = model.weight_bytes() / (model.layer_parameters() + model.head_parameters());
        let bytes = (model.layer_parameters() + head) * number_bytes
            + (work.context + work.tokens) as f64 * model.cache_bytes();
        let operations = 2.0 * work.tokens as f64 * model.layer_parameters()
            + 2.0 * work.wanted as f64 * model.head_parameters()
            + work.attended as f64 * model.attention_operations();
        let reading = bytes / (accelerator.bytes_per_second * accelerator.bandwidth_share);
        let computing = operations / (accelerator.operations_per_second * accelerator.compute_share);
        accelerator.step_overhead + Duration::from_secs_f64(reading.max(computing))
    }
}

// === impl Measured ===

impl Measured {
    /// Reads a machine file.
    ///
    /// # Errors
    /// When it is not one.
    pub fn read(text: &str) -> Result<Self, MeasuredError> {
        let measured: Self = serde_json::from_str(text)?;
        for times in [&measured.alone, &measured.crowded] {
            if times.layers.is_empty() {
                return Err(MeasuredError::Empty("layers"));
            }
            if times.head.is_empty() {
                return Err(MeasuredError::Empty("head"));
            }
        }
        let mut swings = measured.swings.decode.iter().chain(&measured.swings.prompts);
        match swings.find(|swing| !RATIOS.contains(swing)) {
            Some(swing) => Err(MeasuredError::Swing(*swing)),
            None => Ok(measured),
        }
    }
}

// === impl Swings ===

impl Swings {
    /// Of the step `number` of its kind: those that were seen, again and again.
    fn of(&self, has_prompts: bool, number: usize) -> f64 {
        let swings = if has_prompts { &self.prompts } else { &self.decode };
        if swings.is_empty() { 1.0 } else { swings[number % swings.len()] }
    }
}

// === impl StepTimes ===

impl StepTimes {
    fn step(&self, work: &Work) -> Duration {
        let seconds = between(&self.layers, work.tokens)
            + between(&self.head, work.wanted)
            + self.context * work.context as f64
            + self.attended * work.attended as f64;
        Duration::from_secs_f64(seconds.max(0.0))
    }
}

/// The value of a curve at `at`: on the line between its neighbours, beyond the last point with the last slope, and
/// nothing at zero.
fn between(points: &[(usize, f64)], at: usize) -> f64 {
    if at == 0 {
        return 0.0;
    }
    let after = points.partition_point(|&(x, _)| x < at).min(points.len() - 1);
    let (x1, y1) = points[after];
    let Some(&(x0, y0)) = after.checked_sub(1).map(|before| &points[before]) else {
        // Below the first point a step costs as much as there: it reads the same weights.
        return if at <= x1 { y1 } else { y1 * at as f64 / x1 as f64 };
    };
    y0 + (y1 - y0) * (at as f64 - x0 as f64) / (x1 - x0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{architecture::architecture, hardware::accelerator};

    #[test]
    fn a_curve_is_drawn_through_its_points_and_beyond_them() {
        let points = [(1, 1.0), (4, 2.0), (8, 4.0)];
        for (at, value) in [(0, 0.0), (1, 1.0), (2, 4.0 / 3.0), (4, 2.0), (6, 3.0), (8, 4.0), (16, 8.0)] {
            assert!((between(&points, at) - value).abs() < 1e-12, "{at}");
        }
        assert_eq!(between(&[(2, 3.0)], 1), 3.0);
        assert_eq!(between(&[(2, 3.0)], 4), 6.0);
    }

    #[test]
    fn steps_swing_as_those_of_the_machine_did_and_a_file_without_swings_has_none() {
        let times = r#"{"layers": [[1, 0.002]], "head": [[1, 0.0]], "context": 0.0, "attended": 0.0}"#;
        let file = |swings: &str| {
            format!(
                r#"{{"what": "", "kv_tokens": 1, "vocabulary": 1, "alone": {times}, "crowded": {times}, "choose_unguided": 0.0,
                    "choose_guided": 0.0, "list": 0.0, "draft": 0.0{swings}}}"#
            )
        };
        let read = |swings: &str| Measured::read(&file(swings)).map(|read| Cost::Measured(Box::new(read)));
        let (decode, prompt) =
            (Work { tokens: 1, wanted: 1, ..Work::default() }, Work { tokens: 9, ..Work::default() });
        let still = read("").unwrap();
        assert_eq!([still.swing(&decode, 5), still.swing(&prompt, 5)], [1.0; 2]);
        let swinging = read(r#", "swings": {"decode": [1.0, 1.5], "prompts": [1.0, 1.0, 3.0]}"#).unwrap();
        assert_eq!([0, 1, 2].map(|number| swinging.swing(&decode, number)), [1.0, 1.5, 1.0]);
        assert_eq!([1, 2, 5].map(|number| swinging.swing(&prompt, number)), [1.0, 3.0, 3.0]);
        for swing in ["-1.0", "0.0", "1e4"] {
            let error = read(&format!(r#", "swings": {{"decode": [{swing}], "prompts": []}}"#)).unwrap_err();
            assert!(matches!(error, MeasuredError::Swing(_)), "{error}");
        }
    }

    #[test]
    fn a_step_reads_its_weights_or_computes_whichever_takes_longer() {
        let model = architecture("llama-3.1-8b").unwrap();
        let accelerator = accelerator("h100").unwrap();
        let cost = Cost::Roofline(Roofline { accelerator, model });
        let decode = |rows: usize| Work { tokens: rows, wanted: rows, context: 0, attended: 0 };
        // 15 GB at 2.68 TB/s are 5.6 ms; 8,192 tokens are 123 teraoperations at half of the peak.
        let reading = cost.step(&decode(1), false).as_secs_f64();
        assert!((5.5e-3..6.5e-3).contains(&reading), "{reading}");
        assert!(cost.step(&decode(64), false).as_secs_f64() < 1.05 * reading);
        let computing = cost.step(&decode(8192), false).as_secs_f64();
        assert!((0.2..0.3).contains(&computing), "{computing}");
        // The cache of a decode row costs what reading it takes.
        let long = Work { context: 1_000_000, ..decode(64) };
        let added = cost.step(&long, false).as_secs_f64() - cost.step(&decode(64), false).as_secs_f64();
        let expected = 1e6 * model.cache_bytes() / (3.35e12 * 0.8);
        assert!((added / expected - 1.0).abs() < 0.01, "{added} {expected}");
    }
}
