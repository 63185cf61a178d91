//! How `decode` ranks tokens, for models that hand over lists of the likeliest ones in place of rows.

use uniarm_decode::{Listed, Noise, NoisyRanking, TopList, top_of_slice};
use uniarm_model::{Candidate, Likeliest, NoiseAt};

/// The [`Ranking`](uniarm_model::Ranking) by which a row's list is [`uniarm_decode::noisy_top_list`] or
/// [`uniarm_decode::top_list`].
pub fn rank(wanted: &Likeliest, slice: (&[f32], u32), out: &mut Vec<Candidate>) {
    let noise = wanted.noise.map(|at| (Noise::new(at.seed, at.choice), at.position));
    let noise = noise.as_ref().map(|(noise, position)| (noise, *position));
    let listed = top_of_slice(slice, wanted.count, wanted.scale, noise);
    out.extend(listed.map(|Listed { rank, id, logit }| Candidate { rank, id, logit }));
}

/// What a list says to whoever chooses; an empty one bounds nothing.
pub(crate) fn top_list_of(wanted: &Likeliest, list: &[Candidate]) -> TopList {
    let (ids, values) = list.iter().map(|token| (token.id, token.logit)).unzip();
    let floor = list.last().map(|last| last.rank);
    let made = match (wanted, floor) {
        (Likeliest { noise: Some(NoiseAt { .. }), scale, .. }, Some(floor)) => {
            TopList::noisy(ids, values, NoisyRanking { scale: *scale, floor })
        }
        _ => TopList::new(ids, values),
    };
    made.expect(
        "ranks merge what each of them ranked: each token once, in order, and every place a finite number",
    )
}

#[cfg(test)]
mod tests {
    use uniarm_decode::{noisy_top_list, top_list};
    use uniarm_model::Lists;

    use super::*;

    /// A row with ties, of logits as a language model has them.
    fn row(case: u32, vocabulary: usize) -> Vec<f32> {
        let mut row = vec![0.0; vocabulary];
        Noise::new(9, 0).fill(case, &mut row);
        row.iter_mut()
            .for_each(|z| *z = if case.is_multiple_of(3) { (*z * 4.0).round() / 4.0 } else { 1.5 * *z });
        row
    }

    #[test]
    fn the_best_of_all_slices_are_the_list_of_the_row() {
        let mut lists = Lists::default();
        for case in 0..600 {
            let draw = |salt, below: usize| (Noise::new(salt, 1).at(case, 0).abs() * 1e4) as usize % below;
            let vocabulary = 1 + draw(0, [40, 700, 5000][case as usize % 3]);
            let row = row(case, vocabulary);
            let at = NoiseAt { seed: u64::from(case) << 20, choice: case % 4, position: 3 * case };
            let wanted = Likeliest {
                count: 1 + draw(1, 200),
                scale: [1.0, 0.5 + draw(2, 50) as f32 / 10.0][case as usize % 2],
                noise: (case % 4 > 0).then_some(at),
            };
            let size = 1 + draw(3, vocabulary.min(9));
            let mut candidates = Vec::new();
            for rank_of in 0..size {
                let (from, to) = (vocabulary * rank_of / size, vocabulary * (rank_of + 1) / size);
                rank(&wanted, (&row[from..to], from as u32), &mut candidates);
            }
            lists.clear();
            lists.push(&wanted, vocabulary, candidates.into_iter());
            let found = top_list_of(&wanted, lists.iter().next().expect("the list that was pushed"));
            let expected = match wanted.noise {
                None => top_list(&row, wanted.count),
                Some(at) => {
                    let noise = Noise::new(at.seed, at.choice);
                    noisy_top_list(&row, wanted.count, wanted.scale, &noise, at.position)
                }
            };
            assert_eq!(found, expected, "case {case}: {wanted:?} of {vocabulary} tokens in {size} slices");
        }
    }

    #[test]
    fn a_row_with_too_few_numbers_has_no_list() {
        let row = [1.0, f32::NAN, f32::NEG_INFINITY, 2.0];
        for noise in [None, Some(NoiseAt { seed: 1, choice: 0, position: 0 })] {
            for (count, expected) in [(2, 2), (3, 0), (9, 0)] {
                let (wanted, mut lists, mut candidates) =
                    (Likeliest { count, scale: 1.0, noise }, Lists::default(), Vec::new());
                rank(&wanted, (&row, 0), &mut candidates);
                lists.push(&wanted, row.len(), candidates.into_iter());
                let list = top_list_of(&wanted, lists.iter().next().expect("one"));
                assert_eq!(list.ids().len(), expected, "{wanted:?}");
                assert_eq!(list.bound() == f32::INFINITY, expected == 0);
            }
        }
    }
}
