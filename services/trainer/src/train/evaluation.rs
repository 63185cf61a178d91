//! Held-out pairs under *fixed* preferences: the corners of the simplex and its centre.
//!
//! Random preferences would make two evaluations differ by what was drawn, and early stopping follow the noise.

use std::{collections::BTreeMap, ops::Range};

use serde::Serialize;

use super::{config::TrainConfig, ranks::Ranks};
use crate::{
    loss::Loss,
    network::{Network, Sample, TokenPair},
};

/// What an evaluation found. Equal for all ranks, to the bit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    pub step: u64,
    /// Mean over pairs and preferences.
    pub loss: f64,
    /// By objective i: share of pairs whose answers the network puts in the order of s_i, at p = e_i.
    pub accuracy: BTreeMap<String, f64>,
    /// Share of pairs put in the order of the mixed margin, at equal weights.
    pub centre_accuracy: f64,
    /// Whether the loss is the lowest so far.
    pub better: bool,
}

/// Sums over pairs, in one row, so that ranks can add them up.
struct Sums(Vec<f64>);

/// Evaluates this rank's share of the pairs, and adds up with the others.
///
/// # Errors
/// Where the network or a peer fails.
pub fn evaluate(
    config: &TrainConfig,
    loss: &Loss,
    pairs: &[TokenPair],
    network: &mut dyn Network,
    ranks: &mut Ranks,
) -> anyhow::Result<Evaluation> {
    let names: Vec<String> = config.trained().into_iter().map(|objective| objective.name).collect();
    let points = points(names.len());
    let mut sums = Sums::new(points.len());
    let own = &pairs[ranks.share(pairs.len())];
    let samples: Vec<(usize, Sample<'_>)> = own
        .iter()
        .flat_map(|pair| points.iter().enumerate().map(move |(point, p)| (point, pair, p)))
        .map(|(point, pair, preference)| (point, Sample { pair, preference, draw: 0 }))
        .collect();
    let plain: Vec<Sample<'_>> = samples.iter().map(|(_, sample)| *sample).collect();
    for pass in passes(&plain, config.pass_tokens) {
        let found = network.log_probabilities(&plain[pass.clone()])?;
        for ((point, sample), both) in samples[pass].iter().zip(found) {
            sums.add(*point, sample, loss, both);
        }
    }
    ranks.sum(&mut sums.0)?;
    Ok(sums.read(names))
}

/// Corners in order, then the centre. With one objective they are the same point.
fn points(objectives: usize) -> Vec<Vec<f32>> {
    let corner = |i: usize| (0..objectives).map(|j| if i == j { 1.0 } else { 0.0 }).collect();
    let mut points: Vec<Vec<f32>> = (0..objectives).map(corner).collect();
    points.push(vec![1.0 / objectives as f32; objectives]);
    points
}

/// Ranges of samples that make one pass each: as many as fit `pass_tokens`, and at least one.
pub fn passes(samples: &[Sample<'_>], pass_tokens: usize) -> Vec<Range<usize>> {
    let mut passes: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (index, sample) in samples.iter().enumerate() {
        let tokens = tokens(sample.pair);
        match passes.last_mut() {
            Some(pass) if filled + tokens <= pass_tokens => {
                pass.end = index + 1;
                filled += tokens;
            }
            _ => {
                passes.push(index..index + 1);
                filled = tokens;
            }
        }
    }
    passes
}

/// Tokens that the network reads for a pair: the prompt once.
pub fn tokens(pair: &TokenPair) -> usize {
    pair.prompt.len() + pair.answers[0].len() + pair.answers[1].len()
}

// === impl Sums ===

impl Sums {
    /// Loss and number of samples, then hits and pairs of each point.
    fn new(points: usize) -> Self {
        Self(vec![0.0; 2 + 2 * points])
    }

    /// `both` are log π of answers a and b.
    fn add(&mut self, point: usize, sample: &Sample<'_>, loss: &Loss, both: [f64; 2]) {
        let (labels, difference) = (&sample.pair.labels, both[0] - both[1]);
        self.0[0] += loss.of(sample.preference, labels, sample.pair.likelihoods(both)).total;
        self.0[1] += 1.0;
        let mixed = sample.preference.iter().zip(&labels.margins).map(|(p, margin)| f64::from(*p) * margin);
        let wanted = labels.signs.get(point).copied().unwrap_or_else(|| mixed.sum());
        // Where the labels are tied there is nothing to get right.
        if wanted != 0.0 {
            self.0[2 + 2 * point] += f64::from(u8::from(wanted * difference > 0.0));
            self.0[3 + 2 * point] += 1.0;
        }
    }

    fn read(&self, names: Vec<String>) -> Evaluation {
        let share = |at: usize| self.0[at] / self.0[at + 1].max(1.0);
        let centre_accuracy = share(2 + 2 * names.len());
        let accuracy = names.into_iter().enumerate().map(|(i, name)| (name, share(2 + 2 * i))).collect();
        Evaluation { step: 0, loss: share(0), accuracy, centre_accuracy, better: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::Labels;

    #[test]
    fn passes_stay_under_the_budget_and_lose_nobody() {
        let pair = |tokens: usize| TokenPair {
            prompt: vec![0; tokens - 2],
            answers: [vec![0], vec![0]],
            labels: Labels { signs: vec![], margins: vec![] },
        };
        let pairs = [4, 5, 3, 20, 3, 3].map(pair);
        let sample = |pair| Sample { pair, preference: &[], draw: 0 };
        let samples: Vec<Sample<'_>> = pairs.iter().map(sample).collect();
        assert_eq!(passes(&samples, 9), [0..2, 2..3, 3..4, 4..6]);
        assert_eq!(passes(&samples, 1).len(), 6);
        assert!(passes(&[], 9).is_empty());
    }

    #[test]
    fn corners_come_before_the_centre() {
        assert_eq!(points(2), [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]);
        assert_eq!(points(1), [[1.0], [1.0]]);
    }
}
