//! Guidance arithmetic: c = b · z_base + Σ strength · z_reward, from whole rows or from lists of the largest
//! logits.
//!
//! The base model's strength b is applied first, to its whole row ([`weigh_base`]). A weighed row is a row like any other:
//! everything below, and every bound on a base logit anywhere, is about it, so that z_base means b · z_base from here on.
//!
//! The sum is taken in `f32`, terms from left to right, each multiplied, rounded, added and rounded: whoever
//! computes a guided logit computes the same bits. A term of strength 0 is skipped, so that it cannot turn
//! an infinite logit into NaN. NaN in the result stands for −∞: a token that is not a number is never chosen
//! before one that is.
//!
//! **Bounds.** For a token that a list does not name, z ≤ the list's last value ρ. With strength ≥ 0,
//! replacing z by ρ bounds c from above, *rounding included*: z ↦ fl(s·z) and x ↦ fl(y + x) are monotone
//! functions rounded to nearest, which is monotone. NaN arises only as ∞ − ∞, which absorbs whatever is
//! added later and then counts as −∞; that is monotone too, as checking the three cases y = −∞, finite, ∞
//! shows. With strength < 0 nothing is bounded: the unlisted logits have no lower bound, and a very low one
//! would lift the token above all others.
//!
//! **Lists ranked with the noise.** What wins at temperature T is large in z_base/T + s·z/T + G, and G is known on
//! both sides. A list of the largest s·z/T + G holds the tokens that are lucky as well as those that are likely, so
//! that its bytes certify more tokens (measured on SmolLM2 at T = 1 and 32 entries: 93.8 instead of 91.6 % under the
//! hardest preference, 99.8 instead of 98.4 % under the mildest). With φ the least ranked value, an unlisted token has
//! fl(fl(scale·z) + G) ≤ φ, hence z ≤ (φ − G)/scale but for rounding; [`NOISY_SLACK`] covers that sixteenfold.
//! The bound then differs from token to token, and everything above holds for it unchanged. Filters look at l without
//! its noise, where such a bound is loose for unlucky tokens: requests with filters are better served by plain lists.

use std::ops::Range;

use crate::elementary::{WEIGHT_ONE, ln};
use crate::noise::Noise;
use crate::scan::{self, Draw, Rank};

/// Of |φ| + |G| + 1: more than all roundings between a logit, its rank and its bound together.
const NOISY_SLACK: f32 = 1.0 / 1_048_576.0;

/// Tokens that are combined at once: they stay in the first cache while the terms pass over them.
pub(crate) const CHUNK: usize = 1024;

/// The largest logits of a row, and what is known of the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopList {
    ids: Vec<u32>,
    values: Vec<f32>,
    /// Listed and queried logits, by id.
    known: Vec<(u32, f32)>,
    /// `None`: ranked by the logits themselves.
    ranking: Option<NoisyRanking>,
}

/// A ranking by scale · z + G.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoisyRanking {
    /// Strength over temperature; positive.
    pub scale: f32,
    /// The least ranked value in the list: every unlisted token is at most this.
    pub floor: f32,
}

/// A token of [`top_of_slice`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Listed {
    /// By which it is listed: larger ones first, ties to the lower id.
    pub rank: f32,
    pub id: u32,
    pub logit: f32,
}

/// A list that cannot be the top of a row.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ListError {
    #[error("a list of {ids} ids has {values} values")]
    Length { ids: usize, values: usize },
    #[error("value {index} of a list is not a number, or larger than the one before")]
    Order { index: usize },
    #[error("token {id} is listed twice")]
    Duplicate { id: u32 },
    #[error("a noisy ranking wants a positive scale and a floor that is a number")]
    Ranking,
}

/// What is known of a reward model's logits at one position.
#[derive(Clone, Copy, Debug)]
pub enum TermLogits<'a> {
    /// A value for each id of the vocabulary, at least.
    Dense(&'a [f32]),
    List(&'a TopList),
}

/// One reward model's part in a guided logit.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    pub strength: f32,
    pub logits: TermLogits<'a>,
}

/// The `k` largest logits of a row, ties to the lower id; NaN counts as −∞.
pub fn top_list(row: &[f32], k: usize) -> TopList {
    let mut ranks = Vec::new();
    scan::top(row, k, &mut ranks);
    let mut known: Vec<(u32, f32)> = ranks.iter().map(|rank| (rank.id, rank.value)).collect();
    known.sort_unstable_by_key(|&(id, _)| id);
    TopList {
        ids: ranks.iter().map(|rank| rank.id).collect(),
        values: ranks.iter().map(|rank| rank.value).collect(),
        ranking: None,
        known,
    }
}

/// The `k` tokens of a row with the largest G + scale · z, with their logits; where that ranks nothing (fewer than `k`
/// numbers, or a scale that is not positive), the plain list.
pub fn noisy_top_list(row: &[f32], k: usize, scale: f32, noise: &Noise, position: u32) -> TopList {
    let mut ranks = Vec::new();
    if scale > 0.0 && scale.is_finite() {
        scan::top_noisy((row, 0), Draw { noise, position }, scale, k, &mut ranks);
    }
    let floor = ranks.last().map_or(f32::NEG_INFINITY, |rank| rank.value);
    if ranks.len() < k.min(row.len()) || !floor.is_finite() {
        return top_list(row, k);
    }
    let ids: Vec<u32> = ranks.iter().map(|rank| rank.id).collect();
    let values = ids.iter().map(|&id| row[id as usize]).collect();
    let ranking = NoisyRanking { scale, floor };
    TopList::noisy(ids, values, ranking).expect("a finite floor has numbers above it, each once")
}

/// The `k` tokens of a slice of a row that stand first in a ranking, best first: by G + scale · z where there is a
/// `noise` (of a position), else by z. The slice holds the logits of the tokens from `first` on. Tokens whose place is no
/// finite number are left out, so that there may be fewer. The best `k` of all slices' lists are the list of the row.
pub fn top_of_slice(
    (slice, first): (&[f32], u32),
    k: usize,
    scale: f32,
    noise: Option<(&Noise, u32)>,
) -> impl Iterator<Item = Listed> {
    let mut ranks = Vec::new();
    match noise {
        None => {
            scan::top(slice, k, &mut ranks);
            ranks.iter_mut().for_each(|rank| rank.id += first);
        }
        Some((noise, position)) => {
            let draw = Draw { noise, position };
            // The generator's words come in fours: up to three tokens before the first four go one by one.
            let odd = (first.next_multiple_of(4) - first) as usize;
            let (before, rest) = slice.split_at(odd.min(slice.len()));
            scan::top_noisy((rest, first + before.len() as u32), draw, scale, k, &mut ranks);
            let one_by_one =
                before.iter().zip(first..).map(|(z, id)| Rank { value: draw.of(id) + scale * z, id });
            ranks.extend(one_by_one.filter(|rank| !rank.value.is_nan()));
            ranks.sort_unstable_by(Rank::order);
            ranks.truncate(k);
        }
    }
    let listed =
        move |rank: Rank| Listed { rank: rank.value, id: rank.id, logit: slice[(rank.id - first) as usize] };
    ranks.into_iter().filter(|rank| rank.value.is_finite()).map(listed)
}

/// The base model's row as the sum takes it: times `strength`, in `weighed`; or itself, where that is 1. Strength 0 makes
/// zeros of all logits, so that it cannot turn an infinite one into NaN.
pub fn weigh_base<'a>(base: &'a [f32], strength: f32, weighed: &'a mut Vec<f32>) -> &'a [f32] {
    if strength == 1.0 {
        return base;
    }
    weighed.clear();
    if strength == 0.0 {
        weighed.resize(base.len(), 0.0);
    } else {
        weighed.extend(base.iter().map(|z| strength * z));
    }
    weighed
}

/// ln Σ exp(row): turns logits into log-probabilities. −∞ for a row without a finite logit, ∞ if one is
/// infinite.
pub fn log_sum_exp(row: &[f32]) -> f32 {
    let max = scan::max(row);
    if max.is_infinite() {
        return max;
    }
    let total = scan::total_weight(row, max) as f64 / WEIGHT_ONE as f64;
    max + ln(total as f32)
}

impl TopList {
    /// A list that came from elsewhere: values in descending order, no id twice.
    pub fn new(ids: Vec<u32>, values: Vec<f32>) -> Result<Self, ListError> {
        if ids.len() != values.len() {
            return Err(ListError::Length { ids: ids.len(), values: values.len() });
        }
        let disorder = |index: &usize| *index > 0 && values[*index] > values[index - 1];
        if let Some(index) = (0..values.len()).find(disorder) {
            return Err(ListError::Order { index });
        }
        Self::collect(ids, values, None)
    }

    /// A list that came from elsewhere, in the order of scale · z + G: no id twice.
    pub fn noisy(ids: Vec<u32>, values: Vec<f32>, ranking: NoisyRanking) -> Result<Self, ListError> {
        if ids.len() != values.len() {
            return Err(ListError::Length { ids: ids.len(), values: values.len() });
        }
        if !(ranking.scale > 0.0 && ranking.scale.is_finite() && ranking.floor.is_finite()) {
            return Err(ListError::Ranking);
        }
        Self::collect(ids, values, Some(ranking))
    }

    fn collect(ids: Vec<u32>, values: Vec<f32>, ranking: Option<NoisyRanking>) -> Result<Self, ListError> {
        if let Some(index) = values.iter().position(|value| value.is_nan()) {
            return Err(ListError::Order { index });
        }
        let mut known: Vec<(u32, f32)> = ids.iter().copied().zip(values.iter().copied()).collect();
        known.sort_unstable_by_key(|&(id, _)| id);
        if let Some(pair) = known.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(ListError::Duplicate { id: pair[0].0 });
        }
        Ok(Self { ids, values, known, ranking })
    }

    /// Ids of the list, in its order; without queried ones.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Logits of the list, in its order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// No logit outside a list that is ranked by logits is larger. An empty list bounds nothing.
    pub fn bound(&self) -> f32 {
        self.values.last().copied().unwrap_or(f32::INFINITY)
    }

    /// How the list is ranked; `None`: by the logits themselves.
    pub fn ranking(&self) -> Option<NoisyRanking> {
        self.ranking
    }

    /// The logit of a token, where it is listed or was queried.
    pub fn get(&self, id: u32) -> Option<f32> {
        let index = self.known.binary_search_by_key(&id, |&(id, _)| id).ok()?;
        Some(self.known[index].1)
    }

    /// Adds queried logits; ids that are known already keep their value.
    pub fn add(&mut self, ids: &[u32], values: &[f32]) {
        self.known.extend(ids.iter().copied().zip(values.iter().copied()));
        // Stable, so that of two values of one id the older stays.
        self.known.sort_by_key(|&(id, _)| id);
        self.known.dedup_by_key(|&mut (id, _)| id);
    }

    /// How many logits were queried.
    pub fn queried(&self) -> usize {
        self.known.len() - self.ids.len()
    }

    /// Ids whose logits are known, ascending.
    pub(crate) fn known_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.known.iter().map(|&(id, _)| id)
    }
}

impl NoisyRanking {
    /// No unlisted token whose noise is `noise` has a larger logit.
    #[inline(always)]
    fn bound(self, noise: f32) -> f32 {
        let slack = NOISY_SLACK * (self.floor.abs() + noise.abs() + 1.0);
        (self.floor - noise + slack) / self.scale
    }
}

impl Term<'_> {
    /// Whether its bound depends on the noise.
    pub(crate) fn is_noisy(&self) -> bool {
        self.list().is_some_and(|list| list.ranking.is_some())
    }

    pub(crate) fn list(&self) -> Option<&TopList> {
        match self.logits {
            TermLogits::List(list) if self.strength != 0.0 => Some(list),
            _ => None,
        }
    }

    /// A logit, or its bound under the token's noise; and whether it is the logit itself.
    fn logit(&self, id: u32, noise: f32) -> (f32, bool) {
        match self.logits {
            TermLogits::Dense(row) => (row[id as usize], true),
            TermLogits::List(list) => match list.get(id) {
                Some(value) => (value, true),
                None => (list.ranking.map_or(list.bound(), |ranking| ranking.bound(noise)), false),
            },
        }
    }
}

/// NaN stands for −∞.
#[inline(always)]
pub(crate) fn numeric(x: f32) -> f32 {
    if x > f32::NEG_INFINITY { x } else { f32::NEG_INFINITY }
}

/// The guided logit of one token, or its bound; and whether it is the logit itself. `noise`: the token's G, where a list
/// is ranked with it. No base row: its logits are the first term.
pub(crate) fn combine_one(base: &[f32], terms: &[Term<'_>], id: u32, noise: f32) -> (f32, bool) {
    let mut c = if base.is_empty() { 0.0 } else { base[id as usize] };
    let mut exact = true;
    for term in terms.iter().filter(|term| term.strength != 0.0) {
        let (logit, known) = term.logit(id, noise);
        c += term.strength * logit;
        exact &= known;
    }
    (numeric(c), exact)
}

widest! {
    /// [`combine_one`] for the tokens 0..out.len() as if every list were empty but for its bound, divided by
    /// `divisor`. `noise`: G of all tokens, where a list is ranked with it; else empty.
    pub(crate) fn combine(base: &[f32], terms: &[Term<'_>], noise: &[f32], divisor: f32, out: &mut [f32]) {
        for (index, out) in out.chunks_mut(CHUNK).enumerate() {
            combine_chunk(base, terms, noise, divisor, index * CHUNK, out);
        }
    }
}

/// [`combine`] for the tokens first..first + out.len().
#[inline(always)]
pub(crate) fn combine_chunk(
    base: &[f32],
    terms: &[Term<'_>],
    noise: &[f32],
    divisor: f32,
    first: usize,
    out: &mut [f32],
) {
    let range = first..first + out.len();
    let mut terms = terms.iter().filter(|term| term.strength != 0.0);
    match terms.next() {
        None => out.copy_from_slice(&base[range.clone()]),
        // The usual one term costs no pass of its own.
        Some(Term { strength, logits: TermLogits::List(list) }) if list.ranking.is_none() => {
            let addend = strength * list.bound();
            for (c, &z_base) in out.iter_mut().zip(&base[range.clone()]) {
                *c = z_base + addend;
            }
        }
        Some(Term { strength, logits: TermLogits::Dense(row) }) => {
            for ((c, &z_base), &z) in out.iter_mut().zip(&base[range.clone()]).zip(&row[range.clone()]) {
                *c = z_base + strength * z;
            }
        }
        Some(term) => {
            out.copy_from_slice(&base[range.clone()]);
            add_term(out, term, noise, range.clone());
        }
    }
    for term in terms {
        add_term(out, term, noise, range.clone());
    }
    if divisor == 1.0 {
        for c in out.iter_mut() {
            *c = numeric(*c);
        }
    } else {
        for c in out.iter_mut() {
            *c = numeric(*c) / divisor;
        }
    }
}

#[inline(always)]
fn add_term(out: &mut [f32], term: &Term<'_>, noise: &[f32], range: Range<usize>) {
    match term.logits {
        TermLogits::Dense(row) => {
            for (c, &z) in out.iter_mut().zip(&row[range]) {
                *c += term.strength * z;
            }
        }
        TermLogits::List(TopList { ranking: Some(ranking), .. }) => {
            for (c, &noise) in out.iter_mut().zip(&noise[range]) {
                *c += term.strength * ranking.bound(noise);
            }
        }
        TermLogits::List(list) => {
            let addend = term.strength * list.bound();
            for c in out.iter_mut() {
                *c += addend;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_bounds_what_it_does_not_name_and_learns_what_is_asked() {
        let row = [0.5, 3.0, f32::NAN, 3.0, -1.0];
        let mut list = top_list(&row, 2);
        assert_eq!((list.ids(), list.values(), list.bound()), (&[1, 3][..], &[3.0, 3.0][..], 3.0));
        assert_eq!(list.get(0), None);
        list.add(&[4, 0, 3], &[-1.0, 0.5, 3.0]);
        assert_eq!((list.get(0), list.get(4), list.queried(), list.bound()), (Some(0.5), Some(-1.0), 2, 3.0));
        assert_eq!(TopList::default().bound(), f32::INFINITY);
    }

    #[test]
    fn a_list_that_cannot_be_the_top_of_a_row_is_refused() {
        assert_eq!(TopList::new(vec![1], vec![]), Err(ListError::Length { ids: 1, values: 0 }));
        assert_eq!(TopList::new(vec![1, 2], vec![1.0, 2.0]), Err(ListError::Order { index: 1 }));
        assert_eq!(TopList::new(vec![1], vec![f32::NAN]), Err(ListError::Order { index: 0 }));
        assert_eq!(TopList::new(vec![1, 1], vec![2.0, 1.0]), Err(ListError::Duplicate { id: 1 }));
        let list = top_list(&[1.0, 2.0, 0.0], 2);
        assert_eq!(TopList::new(list.ids().to_vec(), list.values().to_vec()), Ok(list));
    }

    #[test]
    fn rows_and_single_tokens_are_combined_to_the_same_bits() {
        let row = |salt: u32| -> Vec<f32> {
            (0..3000_u32).map(|i| (i.wrapping_mul(2_654_435_761) ^ salt) as f32 / 1e8 - 20.0).collect()
        };
        let (base, first, second) = (row(1), row(2), row(3));
        let list = top_list(&second, 16);
        let terms = [
            Term { strength: 0.7, logits: TermLogits::Dense(&first) },
            Term { strength: 0.0, logits: TermLogits::Dense(&[]) },
            Term { strength: 1.3, logits: TermLogits::List(&list) },
        ];
        let mut bounds = vec![0.0; base.len()];
        combine(&base, &terms, &[], 0.9, &mut bounds);
        for id in 0..base.len() as u32 {
            let (c, exact) = combine_one(&base, &terms, id, 0.0);
            assert_eq!(exact, list.ids().contains(&id));
            if exact {
                assert!(bounds[id as usize] <= c / 0.9);
            } else {
                assert_eq!(bounds[id as usize].to_bits(), (c / 0.9).to_bits());
            }
        }
    }

    /// What [`noisy_top_list`] means.
    fn noisy_top_list_plainly(row: &[f32], k: usize, scale: f32, noise: &Noise, position: u32) -> TopList {
        let rank = |(id, &z): (u32, &f32)| noise.at(position, id) + scale * z;
        let ranked: Vec<f32> = (0..).zip(row).map(rank).collect();
        let list = top_list(&ranked, k);
        let ranking = NoisyRanking { scale, floor: list.bound() };
        let values = list.ids.iter().map(|&id| row[id as usize]).collect();
        TopList::noisy(list.ids, values, ranking).unwrap_or_else(|_| top_list(row, k))
    }

    #[test]
    fn a_noisy_list_is_what_ranking_every_token_gives() {
        const INF: f32 = f32::INFINITY;
        let noise = Noise::new(9, 1);
        for (position, length) in
            [0, 1, 5, 64, 100, 1000, 3000, 20_000].into_iter().cycle().take(64).enumerate()
        {
            let position = position as u32;
            let mut row = vec![0.0; length];
            Noise::new(8, 0).fill(position, &mut row);
            // Ties in every other row; then infinities, numbers that overflow, and what is not a number.
            if position % 2 == 1 {
                row.iter_mut().for_each(|z| *z = (*z * 2.0).round() / 2.0);
            }
            let odd = [f32::NAN, -INF, f32::MIN, INF, f32::MAX];
            let stride = 1 + length / (1 + position as usize % 40);
            for (index, z) in row.iter_mut().step_by(stride).enumerate().filter(|_| position % 16 > 7) {
                *z = odd[index % (1 + position as usize % 5)];
            }
            for k in [0, 1, 3, 32, 100, length] {
                for scale in [1.0, 0.3, 40.0, 1e-20, 1e30, 0.0, -1.0, INF, f32::NAN] {
                    let fast = noisy_top_list(&row, k, scale, &noise, position);
                    let plain = noisy_top_list_plainly(&row, k, scale, &noise, position);
                    assert_eq!(fast, plain, "row {position} of {length}, k = {k}, scale = {scale}");
                }
            }
        }
    }

    #[test]
    fn log_sum_exp_is_right_and_survives_infinities() {
        let row: Vec<f32> = (0..50_000).map(|i| (i % 1000) as f32 / 50.0 - 30.0).collect();
        let exact = row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
        assert!((f64::from(log_sum_exp(&row)) - exact).abs() < 2e-6, "{} {exact}", log_sum_exp(&row));
        assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY, 1.0]), 1.0);
        assert_eq!(log_sum_exp(&[f32::INFINITY, 1.0]), f32::INFINITY);
    }
}
