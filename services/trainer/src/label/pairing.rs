//! Which two answers to a prompt become a pair: a stated rule over their scores.
//!
//! All pairs of different answers are candidates. One that an objective cannot tell apart is left out and counted: it
//! has no label. Where `per_prompt` limits them, the pairs with the largest margin stay, the sum over objectives of
//! |difference of scores| in standard deviations of that difference, ties in the order of the plan.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::cluster_job;

/// The table `[pairs]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PairingConfig {
    /// Pairs of each prompt at most; all of them without it.
    pub per_prompt: Option<usize>,
    /// Which pairs stay where there are more than `per_prompt`.
    pub prefer: Prefer,
    /// Leaves out, of the pairs that were chosen, those of two answers that were cut off: their length is that of the limit, so that an objective which
    /// looks at length labels them at random.
    pub drop_cut_off_pairs: bool,
}

/// Which pairs stay where there are more than `per_prompt`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prefer {
    /// Those with the largest margin.
    #[default]
    Margin,
    /// Any: a draw that the seed decides.
    Draw,
}

/// An answer that can be one half of a pair.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    pub prompt: usize,
    pub response: &'a str,
    pub finished: bool,
    /// One for each objective.
    pub scores: &'a [f64],
}

#[derive(Debug, Clone, PartialEq)]
pub struct Paired {
    /// Indices of candidates, a and b.
    pub pairs: Vec<[usize; 2]>,
    pub summary: PairingSummary,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairingSummary {
    pub pairs: usize,
    #[serde(flatten)]
    pub left_out: LeftOut,
    /// Share of pairs whose objectives disagree; the front lives on them.
    pub conflicting_share: f64,
    /// Correlation of the first two objectives' differences over the pairs; 0 where there is only one objective.
    pub correlation: f64,
}

/// What made no pair.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LeftOut {
    /// Answers that repeat another one to the same prompt.
    pub repeated_answers: usize,
    /// Pairs that some objective scores alike.
    pub tied_pairs: usize,
    /// Pairs of two answers that were cut off, under `drop_cut_off_pairs`.
    pub cut_off_pairs: usize,
}

/// Pairs within each prompt, in the order of the prompts.
pub fn pair(candidates: &[Candidate<'_>], config: &PairingConfig, seed: u64) -> Paired {
    let mut by_prompt: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut seen = HashSet::new();
    let mut left_out = LeftOut::default();
    for (index, candidate) in candidates.iter().enumerate() {
        match seen.insert((candidate.prompt, candidate.response)) {
            true => by_prompt.entry(candidate.prompt).or_default().push(index),
            false => left_out.repeated_answers += 1,
        }
    }
    let cut_off = |[a, b]: &[usize; 2]| !candidates[*a].finished && !candidates[*b].finished;
    let mut possible = BTreeMap::new();
    for (prompt, answers) in by_prompt {
        let all = combinations(&answers);
        let (ties, told): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|pair| differences(candidates, *pair).any(|d| d == 0.0));
        left_out.tied_pairs += ties.len();
        possible.insert(prompt, told);
    }
    let scales = scales(candidates, possible.values().flatten());
    let mut pairs = Vec::new();
    for mut own in possible.into_values() {
        if let Some(most) = config.per_prompt {
            own = choose(own, most, |pair| match config.prefer {
                Prefer::Margin => -margin(candidates, pair, &scales),
                Prefer::Draw => draw(candidates, pair, seed, "draw") as f64,
            });
        }
        if config.drop_cut_off_pairs {
            let before = own.len();
            own.retain(|pair| !cut_off(pair));
            left_out.cut_off_pairs += before - own.len();
        }
        // Positions must not tell which answer is which.
        let side = |[a, b]: [usize; 2]| match draw(candidates, [a, b], seed, "side") % 2 {
            0 => [a, b],
            _ => [b, a],
        };
        pairs.extend(own.into_iter().map(side));
    }
    let summary = summary(candidates, &pairs, left_out);
    Paired { pairs, summary }
}

fn combinations(answers: &[usize]) -> Vec<[usize; 2]> {
    let mut all = Vec::new();
    for (place, a) in answers.iter().enumerate() {
        all.extend(answers[place + 1..].iter().map(|b| [*a, *b]));
    }
    all
}

/// The `most` pairs of the smallest rank, in their first order.
fn choose(pairs: Vec<[usize; 2]>, most: usize, rank: impl Fn([usize; 2]) -> f64) -> Vec<[usize; 2]> {
    let mut ranked: Vec<(f64, [usize; 2])> = pairs.into_iter().map(|pair| (rank(pair), pair)).collect();
    ranked.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
    let mut kept: Vec<[usize; 2]> = ranked.into_iter().take(most).map(|(_, pair)| pair).collect();
    kept.sort_unstable();
    kept
}

/// Score of a less that of b, for each objective.
fn differences<'a>(candidates: &'a [Candidate<'_>], [a, b]: [usize; 2]) -> impl Iterator<Item = f64> + 'a {
    candidates[a].scores.iter().zip(candidates[b].scores).map(|(a, b)| a - b)
}

/// Root mean squares of the differences: without a sign their mean says nothing.
fn scales<'a>(candidates: &[Candidate<'_>], pairs: impl Iterator<Item = &'a [usize; 2]>) -> Vec<f64> {
    let mut squares: Vec<f64> = Vec::new();
    let mut count = 0.0_f64;
    for pair in pairs {
        let own = differences(candidates, *pair);
        squares.resize(candidates[pair[0]].scores.len(), 0.0);
        squares.iter_mut().zip(own).for_each(|(square, difference)| *square += difference * difference);
        count += 1.0;
    }
    squares.into_iter().map(|square| (square / count).sqrt().max(f64::MIN_POSITIVE)).collect()
}

fn margin(candidates: &[Candidate<'_>], pair: [usize; 2], scales: &[f64]) -> f64 {
    differences(candidates, pair).zip(scales).map(|(difference, scale)| difference.abs() / scale).sum()
}

/// A number that two texts and the seed decide, whatever else is in the file.
fn draw(candidates: &[Candidate<'_>], [a, b]: [usize; 2], seed: u64, purpose: &str) -> u64 {
    cluster_job::seed(seed, &[purpose, candidates[a].response, candidates[b].response])
}

fn summary(candidates: &[Candidate<'_>], pairs: &[[usize; 2]], left_out: LeftOut) -> PairingSummary {
    let all: Vec<Vec<f64>> = pairs.iter().map(|pair| differences(candidates, *pair).collect()).collect();
    let conflicts = all.iter().filter(|pair| pair.iter().any(|d| *d > 0.0) && pair.iter().any(|d| *d < 0.0));
    let conflicting_share = conflicts.count() as f64 / all.len().max(1) as f64;
    let product = |i: usize, j: usize| all.iter().map(|pair| pair[i] * pair[j]).sum::<f64>();
    let correlation = match all.first() {
        Some(first) if first.len() > 1 => product(0, 1) / (product(0, 0) * product(1, 1)).sqrt(),
        _ => 0.0,
    };
    PairingSummary { pairs: pairs.len(), left_out, conflicting_share, correlation }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(scores: &[[f64; 2]], config: &PairingConfig) -> Paired {
        let texts: Vec<String> = (0..scores.len()).map(|index| format!("answer {index}")).collect();
        let candidate = |(scores, text): (&'static [f64; 2], &'static String)| Candidate {
            prompt: 0,
            response: text,
            // Answers of a negative score are taken for cut off.
            finished: scores[0] >= 0.0,
            scores,
        };
        let (scores, texts) = (Box::leak(scores.to_vec().into_boxed_slice()), Box::leak(Box::new(texts)));
        let candidates: Vec<_> = scores.iter().zip(texts.iter()).map(candidate).collect();
        pair(&candidates, config, 7)
    }

    fn sorted(paired: &Paired) -> Vec<[usize; 2]> {
        let mut pairs = paired.pairs.clone();
        pairs.iter_mut().for_each(|pair| pair.sort_unstable());
        pairs
    }

    #[test]
    fn ties_are_left_out_and_counted_and_the_largest_margins_stay() {
        let scores = [[0.0, 0.0], [0.0, 3.0], [1.0, 1.0], [5.0, -5.0]];
        let all = pairs(&scores, &PairingConfig::default());
        assert_eq!(sorted(&all), [[0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
        assert_eq!((all.summary.left_out.tied_pairs, all.summary.pairs), (1, 5));
        assert!(all.summary.correlation < 0.0 && all.summary.conflicting_share > 0.5);
        let two = PairingConfig { per_prompt: Some(2), ..PairingConfig::default() };
        assert_eq!(sorted(&pairs(&scores, &two)), [[0, 3], [1, 3]]);
    }

    #[test]
    fn two_answers_that_were_cut_off_make_no_pair_where_that_is_asked_for() {
        let scores = [[-1.0, 0.0], [-2.0, 3.0], [1.0, 1.0]];
        let config = PairingConfig { drop_cut_off_pairs: true, ..PairingConfig::default() };
        let paired = pairs(&scores, &config);
        assert_eq!(sorted(&paired), [[0, 2], [1, 2]]);
        assert_eq!(paired.summary.left_out.cut_off_pairs, 1);
        assert_eq!(pairs(&scores, &PairingConfig::default()).pairs.len(), 3);
    }

    #[test]
    fn sides_are_mixed_and_repeat() {
        let scores: Vec<[f64; 2]> = (0..12).map(|i| [f64::from(i), f64::from(-i)]).collect();
        let first = pairs(&scores, &PairingConfig::default());
        let swapped = first.pairs.iter().filter(|[a, b]| a > b).count();
        assert!((20..46).contains(&swapped), "{swapped} of {}", first.pairs.len());
        assert_eq!(first, pairs(&scores, &PairingConfig::default()));
    }
}
