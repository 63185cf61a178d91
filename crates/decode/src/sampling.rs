//! How a request reshapes the guided distribution: temperature, filters, and penalties on what was said
//! already.
//!
//! The order of things, for the guided logit c of a token (see [`crate::guidance`]):
//!
//! 1. penalties act on c ([`History::penalise`]); what is not a number becomes −∞;
//! 2. temperature 0 takes the largest c. Otherwise l = c / T, and
//! 3. filters keep the tokens that pass *all* of top-k, top-p and min-p, each measured on the whole of
//!    softmax(l). They are intersected, so there is no order of filters to remember; other systems
//!    renormalise between them;
//! 4. the largest l + G among the survivors is the token.

use std::collections::BTreeMap;

use crate::elementary::ln;

/// Sampling settings; the default is neutral: temperature 1, everything else off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Fewer than so many tokens rank above a survivor; 0 is off.
    pub top_k: u32,
    /// The tokens that rank above a survivor have together less than this probability; 1 is off.
    pub top_p: f32,
    /// A survivor is at least this probable, relative to the most probable token; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies other logits of tokens of prompt and answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens of the answer.
    pub presence_penalty: f32,
    /// Subtracted once for each occurrence in the answer.
    pub frequency_penalty: f32,
}

/// A setting outside its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} must be {range}, not {value}")]
pub struct SamplingError {
    pub field: &'static str,
    pub range: &'static str,
    pub value: f32,
}

/// How often each token occurred in the prompt and in the answer so far.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Ordered, not hashed: the standard hasher draws a random seed.
    counts: BTreeMap<u32, Occurrences>,
    answer: Vec<u32>,
}

/// The filters of a request as its comparisons need them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filters {
    /// Survivors have fewer tokens above them.
    pub(crate) tokens: Option<usize>,
    /// Survivors have less than this share of the mass above them, in [`MASS_ONE`]ths.
    pub(crate) mass: Option<u64>,
    /// ln of the smallest probability relative to the largest.
    log_ratio: f32,
}

/// The unit of [`Filters::mass`].
const MASS_ONE: u64 = 1 << 32;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Occurrences {
    prompt: u32,
    answer: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

impl Sampling {
    /// Within the ranges of the contract, in which every step above is defined and monotone.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |field, value: f32, low: f32, high: f32, range| {
            if value >= low && value <= high { Ok(()) } else { Err(SamplingError { field, range, value }) }
        };
        check("temperature", self.temperature, 0.0, 100.0, "in [0, 100]")?;
        check("top_p", self.top_p, f32::MIN_POSITIVE, 1.0, "in (0, 1]")?;
        check("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")?;
        check("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "in [0.01, 100]")?;
        check("presence_penalty", self.presence_penalty, -100.0, 100.0, "in [-100, 100]")?;
        check("frequency_penalty", self.frequency_penalty, -100.0, 100.0, "in [-100, 100]")
    }

    /// No noise, and no filters: they cannot change which logit is the largest. A temperature that nobody
    /// validated, infinite or not a number, counts as 0.
    pub fn is_greedy(&self) -> bool {
        !self.temperature.is_normal() || self.temperature < 0.0
    }

    /// Whether top-k, top-p or min-p cuts anything.
    pub fn has_filters(&self) -> bool {
        self.filters().is_some()
    }

    pub(crate) fn filters(&self) -> Option<Filters> {
        let filters = Filters {
            tokens: (self.top_k > 0).then_some(self.top_k as usize),
            mass: (self.top_p < 1.0).then(|| ((f64::from(self.top_p) * MASS_ONE as f64) as u64).max(1)),
            log_ratio: if self.min_p > 0.0 { ln(self.min_p.min(1.0)) } else { f32::NEG_INFINITY },
        };
        let on = filters.tokens.is_some() || filters.mass.is_some() || self.min_p > 0.0;
        on.then_some(filters)
    }

    /// What guided logits are divided by before noise and filters.
    pub fn divisor(&self) -> f32 {
        if self.is_greedy() { 1.0 } else { self.temperature }
    }

    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether the best token is found without the order of all: nothing is filtered, and a logit after penalties is never
    /// larger than before, rounding included.
    pub fn suits_lists(&self) -> bool {
        let filtered = !self.is_greedy() && self.has_filters();
        !filtered
            && self.repetition_penalty >= 1.0
            && self.presence_penalty >= 0.0
            && self.frequency_penalty >= 0.0
    }
}

impl Filters {
    /// The smallest l that survives min-p.
    pub(crate) fn floor(&self, max: f32) -> f32 {
        // ∞ − ∞: off, or a maximum without a neighbour.
        let floor = max + self.log_ratio;
        if floor.is_nan() { f32::NEG_INFINITY } else { floor }
    }

    /// Whether a token survives top-p when tokens of weight `above` rank above it, and it and the others
    /// weigh `rest`.
    ///
    /// above < P · (above + rest), in whole numbers: exact, so that it is monotone in both and true for
    /// bounds of them.
    pub(crate) fn within_mass(&self, above: u64, rest: u64) -> bool {
        let Some(mass) = self.mass else { return true };
        u128::from(above) * u128::from(MASS_ONE - mass) < u128::from(mass) * u128::from(rest)
    }
}

impl History {
    pub fn new(prompt: &[u32]) -> Self {
        let mut counts = BTreeMap::<u32, Occurrences>::new();
        for &token in prompt {
            counts.entry(token).or_default().prompt += 1;
        }
        Self { counts, answer: Vec::new() }
    }

    pub fn push(&mut self, token: u32) {
        self.counts.entry(token).or_default().answer += 1;
        self.answer.push(token);
    }

    /// Takes back the last token of the answer.
    pub fn pop(&mut self) -> Option<u32> {
        let token = self.answer.pop()?;
        let occurrences = self.counts.get_mut(&token).expect("a pushed token is counted");
        occurrences.answer -= 1;
        Some(token)
    }

    /// Takes back all but the first `len` tokens of the answer.
    pub fn truncate(&mut self, len: usize) {
        while self.answer.len() > len {
            self.pop();
        }
    }

    /// The answer so far.
    pub fn answer(&self) -> &[u32] {
        &self.answer
    }

    /// Tokens that some penalty may act on, each once, in ascending order.
    pub(crate) fn occurrences(&self) -> impl Iterator<Item = (u32, Occurrences)> + '_ {
        self.counts.iter().map(|(&token, &occurrences)| (token, occurrences))
    }

    /// The guided logit `c` of a token after penalties. Monotone in `c`, rounding included.
    pub fn penalise(&self, sampling: &Sampling, token: u32, c: f32) -> f32 {
        self.counts.get(&token).map_or(c, |occurrences| occurrences.penalise(sampling, c))
    }
}

impl Occurrences {
    pub(crate) fn penalise(self, sampling: &Sampling, c: f32) -> f32 {
        let mut c = c;
        if self.prompt > 0 || self.answer > 0 {
            let penalty = sampling.repetition_penalty;
            c = if c > 0.0 { c / penalty } else { c * penalty };
        }
        if self.answer > 0 {
            c = c - sampling.presence_penalty - sampling.frequency_penalty * self.answer as f32;
        }
        c
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rolled_back_answer_leaves_no_trace_in_the_penalties() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Sampling::default()
        };
        let mut history = History::new(&[7]);
        for token in [7, 9, 9] {
            history.push(token);
        }
        assert_eq!(history.penalise(&sampling, 9, 4.0), 4.0 / 2.0 - 0.5 - 0.5);
        assert_eq!(history.penalise(&sampling, 7, -4.0), -4.0 * 2.0 - 0.5 - 0.25);
        assert_eq!(history.penalise(&sampling, 8, 4.0), 4.0);
        history.truncate(0);
        assert_eq!(history.penalise(&sampling, 9, 4.0), 4.0);
        assert_eq!(history.penalise(&sampling, 7, 4.0), 2.0);
    }

    #[test]
    fn a_setting_out_of_range_is_named() {
        let absurd = Sampling { temperature: f32::NAN, ..Sampling::default() };
        assert_eq!(absurd.validate().unwrap_err().field, "temperature");
        let absurd = Sampling { top_p: 0.0, ..Sampling::default() };
        assert_eq!(absurd.validate().unwrap_err().to_string(), "top_p must be in (0, 1], not 0");
        assert_eq!(Sampling::default().validate(), Ok(()));
    }
}
