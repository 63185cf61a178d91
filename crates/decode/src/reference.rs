//! The definition of a token, written as plainly as it can be: what [`crate::choose`] must equal.

use crate::elementary::weight;
use crate::guidance::{combine_one, numeric};
use crate::scan::Rank;
use crate::{Position, TermLogits};

/// The token of a position, from whole rows.
///
/// # Panics
/// If a term is a list, the base row is empty, or a dense row is shorter.
pub fn choose_dense(position: &Position<'_>) -> u32 {
    let Position { base, terms, sampling, history, noise, position, .. } = *position;
    assert!(
        terms.iter().all(|term| matches!(term.logits, TermLogits::Dense(_))),
        "the reference wants whole rows"
    );

    let mut ranking: Vec<Rank> = (0..base.len() as u32)
        .map(|id| {
            let (c, _) = combine_one(base, terms, id, 0.0);
            let c = numeric(history.penalise(sampling, id, c));
            Rank { value: c / sampling.divisor(), id }
        })
        .collect();
    ranking.sort_by(Rank::order);
    let max = ranking[0].value;
    if sampling.is_greedy() {
        return ranking[0].id;
    }

    if let Some(filters) = sampling.filters() {
        let total: u64 = ranking.iter().map(|token| weight(token.value, max)).sum();
        let mut above = 0;
        let mut survivors = Vec::new();
        for (tokens_above, &token) in ranking.iter().enumerate() {
            let survives = filters.tokens.is_none_or(|tokens| tokens_above < tokens)
                && filters.within_mass(above, total - above)
                && token.value >= filters.floor(max);
            if survives {
                survivors.push(token);
            }
            above += weight(token.value, max);
        }
        ranking = survivors;
    }

    let score = |token: Rank| Rank { value: token.value + noise.at(position, token.id), id: token.id };
    let best =
        ranking.into_iter().map(score).reduce(|best, token| if token.above(best) { token } else { best });
    best.expect("the most probable token survives every filter").id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{History, Noise, Sampling};

    #[test]
    fn filters_keep_the_tokens_that_their_definitions_name() {
        // Probabilities 1/2, 1/4, 1/8, 1/16, 1/16, in another order; equal ones rank by id.
        let base = [0.25_f32, 0.0625, 0.5, 0.0625, 0.125].map(f32::ln);
        let plain = Sampling::default();
        let kept = |sampling: Sampling| {
            let history = History::default();
            let chosen = |seed| {
                let noise = Noise::new(seed, 0);
                let terms = &[];
                choose_dense(&Position {
                    base: &base,
                    terms,
                    sampling: &sampling,
                    history: &history,
                    noise: &noise,
                    position: 0,
                })
            };
            (0..500).map(chosen).collect::<std::collections::BTreeSet<u32>>().into_iter().collect::<Vec<_>>()
        };
        assert_eq!(kept(plain), [0, 1, 2, 3, 4]);
        assert_eq!(kept(Sampling { top_k: 4, ..plain }), [0, 1, 2, 4]);
        // 3/4 rank above token 4, 7/8 above token 1, 15/16 above token 3.
        assert_eq!(kept(Sampling { top_p: 0.74, ..plain }), [0, 2]);
        assert_eq!(kept(Sampling { top_p: 0.76, ..plain }), [0, 2, 4]);
        assert_eq!(kept(Sampling { top_p: 0.93, ..plain }), [0, 1, 2, 4]);
        // Token 4 is a quarter as probable as token 2.
        assert_eq!(kept(Sampling { min_p: 0.24, ..plain }), [0, 2, 4]);
        assert_eq!(kept(Sampling { min_p: 0.26, ..plain }), [0, 2]);
        // Intersected, each measured on the whole distribution: top-p does not renormalise what top-k left.
        assert_eq!(kept(Sampling { top_k: 3, top_p: 0.76, min_p: 0.1, ..plain }), [0, 2, 4]);
        assert_eq!(kept(Sampling { top_k: 2, top_p: 0.76, ..plain }), [0, 2]);
    }

    #[test]
    fn a_chosen_token_follows_the_guided_distribution() {
        const SAMPLES: u32 = 20_000;
        // softmax((z + 2 r) / T) is proportional to 1, 2, 4.
        let (base, reward, temperature) = ([0.5_f32, 1.0, 0.0], [0.0_f32, 0.0, 0.75], 0.5_f32);
        let ln_2 = std::f32::consts::LN_2;
        let scale = |row: [f32; 3]| row.map(|z| z * ln_2);
        let (base, reward) = (scale(base), scale(reward));
        let history = History::default();
        let noise = Noise::new(5, 0);
        let sampling = Sampling { temperature, ..Sampling::default() };
        let terms = [crate::Term { strength: 2.0, logits: TermLogits::Dense(&reward) }];
        let mut counts = [0_f64; 3];
        for position in 0..SAMPLES {
            let position = Position {
                base: &base,
                terms: &terms,
                sampling: &sampling,
                history: &history,
                noise: &noise,
                position,
            };
            counts[choose_dense(&position) as usize] += 1.0;
        }
        for (count, share) in counts.into_iter().zip([1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0]) {
            let deviation = (f64::from(SAMPLES) * share * (1.0 - share)).sqrt();
            assert!((count - f64::from(SAMPLES) * share).abs() < 4.0 * deviation, "{counts:?}");
        }
    }
}
