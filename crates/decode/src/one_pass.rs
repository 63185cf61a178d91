//! Choosing without filters in one pass over the rows, with no intermediate row.
//!
//! **Whole rows** are combined a piece at a time, and each piece is searched while it is in the first cache. What might
//! beat the best so far is judged by itself, penalties included: they must not raise a logit, so that nobody is missed.
//!
//! **Lists** leave a token that they do not name with an upper score of
//!
//! ```text
//! z_base/T + Σ strength/T · bound + G        bound = ρ, or (φ − G)/scale + slack where a list is ranked with the noise
//!          = z_base/T + constant + slope · G
//! ```
//!
//! A list ranked with the noise has scale = strength/T, so that G cancels: what a token needs to reach a bar is a base
//! logit of at least some number, and no noise is computed at all. With plain lists the slope is one, and the cheap
//! bound of G stands for G ([`scan::collect_reaching`]). Both only nominate: whoever is not ruled out here is judged by
//! the rounded operations that define its upper score.
//!
//! **Nobody is ruled out wrongly**, although that line is about real numbers. Let A be the sum of the magnitudes on its
//! right but for z_base/T, with 24 for |G| + 1. The rounded score passes through at most six roundings for each of up to
//! [`TERMS_MAX`] terms, and two more, each of a number of magnitude at most |z_base|/T + A: together 98 · 2⁻²⁴ of that,
//! plus the bounds' own slack of 2⁻²⁰ · A. This is less than half of [`ROUNDING`] · (|z_base|/T + A), by which the bar is
//! lowered; the rest covers the roundings of the comparison itself. Since the upper score never falls with z_base, it
//! suffices that this holds near the threshold, where |z_base| ≤ M = 2|T(bar − constant)| + 8T·A. [`Ceiling::new`]
//! declines numbers so large or so small that an intermediate result could overflow, or lose more than this to underflow.

use crate::choose::Position;
use crate::guidance::{CHUNK, Term, TermLogits, combine_chunk};
use crate::noise::{NOISE_MAX, NOISE_MIN};
use crate::sampling::Sampling;
use crate::scan::{self, Draw, Rank};

/// Each term adds six roundings; requests have fewer terms by far.
const TERMS_MAX: usize = 16;
/// Of a magnitude: 256 roundings to nearest.
const ROUNDING: f64 = 1.0 / 65_536.0;
/// Bounds |G| + 1.
const NOISE_SPAN: f64 = 24.0;
/// Below, the noise changes so little that its extreme stands for it.
const SLOPE_MIN: f64 = 1.0 / 1024.0;

/// Upper scores of tokens that no list names, as a function of their base logits and their noise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ceiling {
    temperature: f64,
    constant: f64,
    slope: f64,
    /// A.
    magnitude: f64,
}

widest! {
    /// The token of the largest guided logit, from whole rows; penalties must not raise any.
    pub(crate) fn greedy(position: &Position<'_>) -> u32 {
        let mut guided = [0.0; CHUNK];
        let mut best = Rank::NONE;
        for (chunk, first) in position.base.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let guided = &mut guided[..chunk.len()];
            combine_chunk(position.base, position.terms, &[], 1.0, first, guided);
            best = scan::raise(guided, first as u32, best, |rank| position.upper_score(rank.id).0);
        }
        best.id
    }
}

widest! {
    /// The token of the largest guided logit over temperature plus noise, from whole rows; penalties must not raise any.
    pub(crate) fn sampled(position: &Position<'_>) -> u32 {
        let Position { base, terms, sampling, .. } = *position;
        // What the base model thinks most probable sets a bar that most tokens cannot reach, whatever their noise.
        let (mut best, _) = position.upper_score(scan::raise(base, 0, Rank::NONE, |rank| rank).id);
        let mut guided = [0.0; CHUNK];
        for (chunk, first) in base.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let guided = &mut guided[..chunk.len()];
            // Only what may win is divided by the temperature.
            combine_chunk(base, terms, &[], 1.0, first, guided);
            let (tokens, divisor) = ((&*guided, first as u32), sampling.divisor());
            best = scan::raise_noisy(tokens, divisor, position.draw(), best, |rank| position.upper_score(rank.id).0);
        }
        best.id
    }
}

// === impl Ceiling ===

impl Ceiling {
    /// `None` where the argument above does not hold: a whole row among the terms, bounds that are infinite or out of all
    /// proportion. Penalties must not raise a logit.
    pub(crate) fn new(terms: &[Term<'_>], sampling: &Sampling) -> Option<Self> {
        const MODERATE: f64 = (1_u64 << 20) as f64;
        const LARGE: f64 = (1_u128 << 64) as f64;
        let temperature = f64::from(sampling.divisor());
        let slope = if sampling.is_greedy() { 0.0 } else { 1.0 };
        let mut ceiling = Self { temperature, constant: 0.0, slope, magnitude: NOISE_SPAN };
        let mut bounds = 0.0_f64;
        for term in terms.iter().filter(|term| term.strength != 0.0) {
            let TermLogits::List(list) = term.logits else { return None };
            let share = f64::from(term.strength) / temperature;
            bounds = bounds.max(share);
            match list.ranking() {
                None => ceiling.add(share, f64::from(list.bound()), 0.0),
                Some(ranking) => {
                    let share = share / f64::from(ranking.scale);
                    bounds =
                        bounds.max((f64::from(ranking.floor.abs()) + NOISE_SPAN) / f64::from(ranking.scale));
                    ceiling.add(share, f64::from(ranking.floor), NOISE_SPAN);
                    ceiling.slope -= share;
                }
            }
        }
        let moderate = (1.0 / MODERATE..=MODERATE).contains(&temperature)
            && bounds <= LARGE
            && ceiling.magnitude <= LARGE
            && terms.len() <= TERMS_MAX;
        moderate.then_some(ceiling)
    }

    fn add(&mut self, share: f64, bound: f64, span: f64) {
        self.constant += share * bound;
        self.magnitude += share * (bound.abs() + span);
    }

    /// Whether a token that no list names may reach `bar`, a number, where the base model's logits are a list too, and with
    /// that a term: z_base is zero in everything above.
    pub(crate) fn reaches(&self, bar: f32) -> bool {
        // Two lists that are ranked with the noise count it twice: then who has the least of it is bounded worst.
        let most = [NOISE_MIN, NOISE_MAX].map(|noise| self.slope * f64::from(noise));
        self.temperature * most[0].max(most[1]) >= self.needed(bar)
    }

    /// What z_base + T · slope · G is at least of a token that may reach `bar`, a number.
    fn needed(&self, bar: f32) -> f64 {
        let least = self.temperature * (f64::from(bar) - self.constant); // at G = 0
        least - ROUNDING * (2.0 * least.abs() + 9.0 * self.temperature * self.magnitude) // M + T · A
    }

    /// Appends all ids that may reach `bar`, a number, if no list names them; and perhaps some more.
    pub(crate) fn nominate(&self, base: &[f32], draw: Draw<'_>, bar: f32, out: &mut Vec<u32>) {
        let (needed, per_noise) = (self.needed(bar), self.temperature * self.slope);
        if self.slope > SLOPE_MIN {
            let (scale, bar) = (1.0 / per_noise, needed / per_noise);
            scan::collect_reaching(base, draw, scale as f32, bar as f32, out);
        } else {
            let luckiest = f64::from(if self.slope > 0.0 { NOISE_MAX } else { NOISE_MIN });
            scan::collect_from(base, (needed - per_noise * luckiest) as f32, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{History, Noise, NoisyRanking, TopList};

    /// The bar is the token's own upper score: the hardest case for every rounding on the way to it.
    #[test]
    fn a_token_is_nominated_where_the_bar_is_its_own_upper_score() {
        let noise = Noise::new(3, 0);
        let history = History::default();
        let mut ceilings = 0;
        for case in 0..2000_u32 {
            let draw = |salt: u32| Noise::new(u64::from(salt), 1).at(case, 0);
            // From everyday numbers to such that hardly two digits of the noise survive.
            let size = [1.0, 1.0, 1e-3, 1e3, 1e6, 1e-12][case as usize % 6];
            let base: Vec<f32> = (0..200).map(|id| size * Noise::new(2, 0).at(case, id)).collect();
            let temperature = [0.0, 1.0, 0.7, 0.01 + draw(0).abs()][case as usize / 6 % 4];
            let sampling = Sampling { temperature, ..Sampling::default() };
            let strengths = [1.0, 0.01 + draw(1).abs(), 1e-3];
            let lists = strengths.map(|strength| {
                let scale =
                    strength / sampling.divisor() * [1.0, 1.0, 0.5 + draw(2).abs()][case as usize / 24 % 3];
                let floor = size * draw(3);
                match case / 72 % 3 {
                    0 => TopList::new(vec![0], vec![floor]),
                    _ => TopList::noisy(vec![0], vec![floor], NoisyRanking { scale, floor }),
                }
                .unwrap()
            });
            let terms: Vec<Term<'_>> = strengths
                .into_iter()
                .zip(&lists)
                .map(|(strength, list)| Term { strength, logits: TermLogits::List(list) })
                .take(1 + case as usize % 3)
                .collect();
            let (base, terms, sampling, history, noise) = (&base, &terms, &sampling, &history, &noise);
            let position = Position { base, terms, sampling, history, noise, position: case };
            let Some(ceiling) = Ceiling::new(terms, sampling) else { continue };
            ceilings += 1;
            for id in 1..base.len() as u32 {
                let (bar, _) = position.upper_score(id);
                let mut nominated = Vec::new();
                ceiling.nominate(base, position.draw(), bar.value, &mut nominated);
                assert!(nominated.contains(&id), "token {id} of case {case}: {ceiling:?}");
            }
        }
        assert!(ceilings > 1900);
    }

    #[test]
    fn what_is_out_of_proportion_has_no_ceiling() {
        let list = |value| TopList::new(vec![0], vec![value]).unwrap();
        let ceiling = |strength, list: &TopList, sampling: Sampling| {
            Ceiling::new(&[Term { strength, logits: TermLogits::List(list) }], &sampling)
        };
        let plain = Sampling::default();
        assert!(ceiling(1.0, &list(3.0), plain).is_some());
        assert!(ceiling(1.0, &TopList::default(), plain).is_none());
        assert!(ceiling(f32::NAN, &list(3.0), plain).is_none());
        assert!(ceiling(1.0, &list(f32::MIN), plain).is_none());
        assert!(ceiling(1.0, &list(3.0), Sampling { temperature: 1e-30, ..plain }).is_none());
        assert!(ceiling(0.0, &TopList::default(), plain).is_some(), "a term that is off bounds nothing");
    }
}
