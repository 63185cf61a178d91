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
            let (c, _) = combine_one(base, terms, id);
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
