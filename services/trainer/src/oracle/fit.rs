//! `uniarm oracle fit`: pairs become an n-gram model, and an honest figure of how good it is.
//!
//! P(a preferred) = σ(w · (x_a − x_b)), x of length one. Minimised: −Σ ln P + l2/2 · |w|², convex, from w = 0, by
//! L-BFGS with sums in a fixed order: equal pairs give equal bytes.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    Oracle,
    minimise::minimise,
    ngram::{Counts, Ngram, counts, unit_vector},
    relabel::{opening_hash, score_pairs},
};
use crate::pairs::{Pair, Side};

/// Pairs below which no accuracy means anything.
const PAIRS_MIN: usize = 20;
/// Answers in which a feature must occur: what stands in one only says which pair it is from.
const ANSWERS_MIN: usize = 2;

/// Settings of a fit.
#[derive(Clone, Debug, PartialEq)]
pub struct FitOptions {
    pub objective: String,
    /// Strength of the penalty on squared weights.
    pub l2: f64,
    /// Parts for held-out accuracy; a conversation is in one part only.
    pub folds: usize,
}

/// How good a model is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FitReport {
    pub objective: String,
    pub pairs: usize,
    /// Pairs that the objective does not judge, or judges equal.
    pub left_out: usize,
    pub features: usize,
    /// Share of held-out pairs whose preferred answer scores higher; each was held out once.
    pub held_out_accuracy: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// Of the final model, on the pairs it was fitted to.
    pub fitted_accuracy: f64,
    /// Share of pairs whose preferred answer is the longer one, in words; what a model has to beat. Ties count half.
    pub longer_preferred: f64,
}

/// How an oracle agrees with labels.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Agreement {
    pub pairs: usize,
    pub left_out: usize,
    /// Share of pairs whose preferred answer scores higher; ties count half.
    pub accuracy: f64,
    pub standard_error: f64,
    pub longer_preferred: f64,
}

/// Counts of the preferred answer, and of the other one.
type Sample = [Counts; 2];

/// Fits a model to all pairs; its accuracy is that of models fitted to parts of them.
///
/// # Errors
/// Where too few pairs are labelled, or the options make no sense.
pub fn fit(
    pairs: &[Pair],
    options: &FitOptions,
    mut progress: impl FnMut(usize),
) -> anyhow::Result<(Ngram, FitReport)> {
    anyhow::ensure!(
        options.l2.is_finite() && options.l2 > 0.0,
        "l2: {}, wants a positive number",
        options.l2
    );
    anyhow::ensure!(options.folds >= 2, "folds: {}, wants at least 2", options.folds);
    let judged = judged(pairs, &options.objective);
    anyhow::ensure!(
        judged.len() >= PAIRS_MIN.max(options.folds),
        "{} pairs say which answer objective \"{}\" prefers; wants at least {}",
        judged.len(),
        options.objective,
        PAIRS_MIN.max(options.folds)
    );
    let samples: Vec<Sample> = judged.iter().map(|(pair, side)| sample(pair, *side)).collect();
    let folds: Vec<u64> = judged.iter().map(|(pair, _)| opening_hash(pair) % options.folds as u64).collect();
    let mut right = 0.0;
    for fold in 0..options.folds as u64 {
        let kept = (0..samples.len()).filter(|index| folds[*index] != fold).map(|index| &samples[index]);
        let model = fit_samples(&kept.collect::<Vec<_>>(), options, BTreeMap::new());
        right += judged
            .iter()
            .zip(&folds)
            .filter(|(_, f)| **f == fold)
            .map(|((pair, side), _)| correct(&model, pair, *side))
            .sum::<f64>();
        progress(fold as usize + 1);
    }
    let count = judged.len() as f64;
    let accuracy = right / count;
    let notes = BTreeMap::from([
        ("pairs".to_owned(), judged.len().to_string()),
        ("l2".to_owned(), options.l2.to_string()),
        ("folds".to_owned(), options.folds.to_string()),
        ("held_out_accuracy".to_owned(), format!("{accuracy:.4}")),
    ]);
    let model = fit_samples(&samples.iter().collect::<Vec<_>>(), options, notes);
    progress(options.folds + 1);
    let fitted = judged.iter().map(|(pair, side)| correct(&model, pair, *side)).sum::<f64>();
    let report = FitReport {
        objective: options.objective.clone(),
        pairs: judged.len(),
        left_out: pairs.len() - judged.len(),
        features: model.features(),
        held_out_accuracy: accuracy,
        standard_error: standard_error(accuracy, judged.len()),
        fitted_accuracy: fitted / count,
        longer_preferred: longer_preferred(&judged),
    };
    Ok((model, report))
}

/// How often `oracle` scores the preferred answer higher.
///
/// # Errors
/// The oracle's; and where no pair is labelled.
pub fn agreement(
    pairs: &[Pair],
    objective: &str,
    oracle: &mut dyn Oracle,
    progress: impl FnMut(usize),
) -> anyhow::Result<Agreement> {
    let judged = judged(pairs, objective);
    anyhow::ensure!(!judged.is_empty(), "no pair says which answer objective \"{objective}\" prefers");
    let scores = score_pairs(oracle, judged.iter().map(|(pair, _)| *pair), progress)?;
    let right: f64 = judged
        .iter()
        .zip(scores)
        .map(|((_, side), scores)| verdict(scores[*side as usize], scores[1 - *side as usize]))
        .sum();
    let accuracy = right / judged.len() as f64;
    Ok(Agreement {
        pairs: judged.len(),
        left_out: pairs.len() - judged.len(),
        accuracy,
        standard_error: standard_error(accuracy, judged.len()),
        longer_preferred: longer_preferred(&judged),
    })
}

/// Pairs of which an objective prefers one side.
fn judged<'a>(pairs: &'a [Pair], objective: &str) -> Vec<(&'a Pair, Side)> {
    let side = |pair: &'a Pair| {
        let sign = pair.judgements.get(objective)?.sign();
        (sign != 0.0).then_some((pair, if sign > 0.0 { Side::A } else { Side::B }))
    };
    pairs.iter().filter_map(side).collect()
}

fn sample(pair: &Pair, side: Side) -> Sample {
    [counts(&pair.responses[side as usize]), counts(&pair.responses[1 - side as usize])]
}

fn fit_samples(samples: &[&Sample], options: &FitOptions, notes: BTreeMap<String, String>) -> Ngram {
    let mut answers_with: BTreeMap<u32, usize> = BTreeMap::new();
    for (bucket, _) in samples.iter().flat_map(|sample| sample.iter().flatten()) {
        *answers_with.entry(*bucket).or_default() += 1;
    }
    answers_with.retain(|_, answers| *answers >= ANSWERS_MIN);
    let buckets: Vec<u32> = answers_with.keys().copied().collect();
    let answers = 2.0 * samples.len() as f64;
    let rarity: Vec<f32> = answers_with
        .values()
        .map(|with| (1.0 + ((1.0 + answers) / (1.0 + *with as f64)).ln()) as f32)
        .collect();
    let differences: Vec<Vec<(usize, f64)>> =
        samples.iter().map(|sample| difference(sample, &buckets, &rarity)).collect();
    let weights = minimise(buckets.len(), |weights, slope| loss(&differences, options.l2, weights, slope));
    let features = buckets.into_iter().zip(rarity).zip(weights);
    Ngram::new(
        &options.objective,
        features.map(|((bucket, rarity), weight)| (bucket, rarity, weight as f32)),
        notes,
    )
}

/// x of the preferred answer less x of the other.
fn difference(sample: &Sample, buckets: &[u32], rarity: &[f32]) -> Vec<(usize, f64)> {
    let index = |bucket| buckets.binary_search(&bucket).ok();
    let mut sum: BTreeMap<usize, f64> = BTreeMap::new();
    for (counts, sign) in sample.iter().zip([1.0, -1.0]) {
        for (place, value) in unit_vector(counts, index, rarity) {
            *sum.entry(place).or_default() += sign * value;
        }
    }
    sum.into_iter().collect()
}

/// −Σ ln σ(w · x) + l2/2 |w|², and its slope.
fn loss(differences: &[Vec<(usize, f64)>], l2: f64, weights: &[f64], slope: &mut [f64]) -> f64 {
    slope.iter_mut().zip(weights).for_each(|(slope, weight)| *slope = l2 * weight);
    let mut total = 0.5 * l2 * weights.iter().map(|weight| weight * weight).sum::<f64>();
    for difference in differences {
        let margin: f64 = difference.iter().map(|(place, value)| weights[*place] * value).sum();
        total += (-margin).max(0.0) + (-margin.abs()).exp().ln_1p();
        let pull = -1.0 / (1.0 + margin.exp());
        difference.iter().for_each(|(place, value)| slope[*place] += pull * value);
    }
    total
}

fn correct(model: &Ngram, pair: &Pair, side: Side) -> f64 {
    let score = |side: usize| model.score_of(&pair.responses[side]);
    verdict(score(side as usize), score(1 - side as usize))
}

fn verdict(preferred: f64, other: f64) -> f64 {
    match preferred.total_cmp(&other) {
        std::cmp::Ordering::Greater => 1.0,
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Less => 0.0,
    }
}

fn longer_preferred(judged: &[(&Pair, Side)]) -> f64 {
    let words = |pair: &Pair, side: usize| pair.responses[side].split_whitespace().count() as f64;
    let longer =
        |(pair, side): &(&Pair, Side)| verdict(words(pair, *side as usize), words(pair, 1 - *side as usize));
    judged.iter().map(longer).sum::<f64>() / judged.len() as f64
}

fn standard_error(share: f64, count: usize) -> f64 {
    (share * (1.0 - share) / count as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use uniarm_model::Message;

    use super::*;
    use crate::pairs::{Judgement, Place};

    /// One objective likes cats; lengths say nothing.
    fn pairs(count: usize) -> Vec<Pair> {
        let pair = |i: usize| {
            let texts = [format!("the cat sat {}", i % 7), format!("the dog sat {}", i % 5)];
            let preferred = if i.is_multiple_of(2) { Side::A } else { Side::B };
            let responses = if i.is_multiple_of(2) {
                texts
            } else {
                let [cat, dog] = texts;
                [dog, cat]
            };
            Pair {
                id: None,
                messages: vec![Message { role: "user".to_owned(), content: format!("question {i}") }],
                responses,
                finished: [true; 2],
                judgements: BTreeMap::from([(
                    "cats".to_owned(),
                    Judgement { preferred: Some(preferred), scores: None },
                )]),
                place: Place { file: "pairs.jsonl".into(), line: i + 1 },
            }
        };
        (0..count).map(pair).collect()
    }

    fn options() -> FitOptions {
        FitOptions { objective: "cats".to_owned(), l2: 1.0, folds: 5 }
    }

    #[test]
    fn what_was_preferred_is_learnt_and_the_same_pairs_give_the_same_bytes() {
        let pairs = pairs(100);
        let (mut model, report) = fit(&pairs, &options(), |_| {}).unwrap();
        assert!(model.score_of("a cat") > model.score_of("a dog"));
        assert_eq!((report.held_out_accuracy, report.longer_preferred), (1.0, 0.5));
        let again = fit(&pairs, &options(), |_| {}).unwrap().0;
        assert_eq!(again.to_bytes().unwrap(), model.to_bytes().unwrap());
        assert_eq!(agreement(&pairs, "cats", &mut model, |_| {}).unwrap().accuracy, 1.0);
        assert!(agreement(&pairs, "dogs", &mut model, |_| {}).is_err());
    }

    #[test]
    fn labels_that_mean_nothing_are_not_learnt() {
        let mut pairs = pairs(400);
        for (index, pair) in pairs.iter_mut().enumerate() {
            let side = if opening_hash(pair).is_multiple_of(3) { Side::A } else { Side::B };
            let swapped = index.is_multiple_of(2);
            let judgement = pair.judgements.get_mut("cats").unwrap();
            judgement.preferred = Some(if swapped { side } else { [Side::B, Side::A][side as usize] });
        }
        let accuracy = fit(&pairs, &options(), |_| {}).unwrap().1.held_out_accuracy;
        assert!(accuracy < 0.75, "{accuracy}");
    }

    #[test]
    fn slope_of_the_loss_is_its_derivative() {
        let differences = vec![vec![(0, 0.5), (2, -1.0)], vec![(1, 2.0), (2, 0.3)]];
        let weights = [0.4, -0.7, 1.1];
        let mut slope = [0.0; 3];
        loss(&differences, 0.3, &weights, &mut slope);
        for place in 0..3 {
            let at = |step: f64| {
                let mut moved = weights;
                moved[place] += step;
                loss(&differences, 0.3, &moved, &mut [0.0; 3])
            };
            assert!((slope[place] - (at(1e-5) - at(-1e-5)) / 2e-5).abs() < 1e-8);
        }
    }

    #[test]
    fn too_few_pairs_are_refused() {
        let error = fit(&pairs(19), &options(), |_| {}).unwrap_err().to_string();
        assert_eq!(error, "19 pairs say which answer objective \"cats\" prefers; wants at least 20");
    }
}
