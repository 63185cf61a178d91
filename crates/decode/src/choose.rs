//! The token of a position, from whole rows or from lists of the largest logits: exact, or a question.
//!
//! **What is decided.** The token that [`crate::choose_dense`] defines, never another. Where the lists do
//! not suffice, the answer is not a guess but a query for the logits that are missing, and at last for whole
//! rows.
//!
//! **What is known.** A token is *known* if every list names it (or its logit was queried); its l = c / T is
//! then computed by the same operations as in the reference, to the same bits. Every other token has an
//! *upper bound* of l: lists' bounds in place of their logits, penalties and temperature applied as usual.
//! It is a bound of the *rounded* l, because every step from a logit to l is a non-decreasing function
//! followed by rounding to nearest, and both preserve order: products with strength ≥ 0, sums
//! ([`crate::guidance`]), penalties ([`History::penalise`]: division or multiplication by a positive number,
//! subtraction), division by T > 0, and at the end the addition of G. So penalised tokens need no query of
//! their own.
//!
//! **Greedy, or without filters.** Let v* be the known token of the best score (l, or l + G), ties to the
//! lower id. Every token whose upper score does not rank above v* cannot win. If no such token remains, v*
//! is the token; else exactly those that remain are asked for.
//!
//! Both need one pass over the rows and no other row ([`crate::one_pass`]). The row of upper bounds that filters need
//! decides the same, by definition; it stands in where that pass declines, and tests compare the two.
//!
//! **With filters.** Order the tokens by l, ties to the lower id. Each filter keeps a beginning of this
//! order: top-k the first k, min-p those down to a value, top-p those with less than P of the mass above
//! them, which only grows downwards. Hence:
//!
//! - *The largest l is needed*, because min-p and weights refer to it: unknown tokens with a bound above the
//!   known maximum are asked for.
//! - *What certainly fails is out, known or not*: if a known token has k known tokens above it, or known
//!   mass above it that is too much even for the largest possible total, then it fails, and so does whatever
//!   ranks below it; in particular an unknown token whose *bound* ranks below it, so that a freak of the
//!   noise far down the tail need not be asked for.
//! - *The candidate* is the known token of the best score that is not out. It certainly survives if it does
//!   at worst: when all unknown tokens that may rank above it do, with the weights of their bounds, and all
//!   other unknown tokens weigh nothing. It certainly fails if it does at best; then it and all below it are
//!   out, and the next candidate is looked at. Otherwise the unknown tokens that may rank above it are asked
//!   for, the largest bounds first.
//! - *A candidate that survives* is the token unless an unknown one that is not out has an upper score that
//!   ranks above it; those are asked for.
//!
//! Masses are whole numbers and are compared in whole numbers: a sum has one value however it is reached,
//! weights are monotone in l, and the comparison is monotone in both masses. So the bounds above are bounds
//! of what the reference computes, with no tolerance anywhere; floating-point sums would need a guard band
//! and a fallback at its edge.
//!
//! **It ends.** A query names only unknown tokens, at least one, and its answers make them known. When it
//! and earlier ones would name more than a sixteenth of the vocabulary, whole rows are asked for, and with
//! these every token is known.
//!
//! A negative strength turns the bound around: the lowest logits would lift a token most, and nothing bounds
//! them. Such terms need whole rows.

use crate::elementary::weight;
use crate::guidance::{Term, TermLogits, combine, combine_one, numeric};
use crate::noise::Noise;
use crate::one_pass::{self, Ceiling};
use crate::sampling::{Filters, History, Sampling};
use crate::scan::{self, Draw, Rank};

/// Queries may name a sixteenth of the vocabulary: an id and a value are twice a value, and each further
/// round trip has to be worth its while.
const QUERY_SHARE: usize = 16;
/// So many tokens at most, of those that stand between a candidate and its survival, are asked for at once;
/// or as many as are known, if that is more: repeated queries of one position double what is known, so that
/// there are few.
const WIDEN_SHARE: usize = 256;
const WIDEN_MIN: usize = 16;
/// Length of the ranking by which top-p is cut short when all tokens are known: the most probable tokens usually hold
/// all survivors.
const HEAD: usize = 64;
/// Where they do not, and for top-k, which needs one more than it keeps. Longer rankings cost more than the loop over
/// candidates, which finds every cut in the end.
const HEAD_MAX: usize = 256;

/// All that the token of one position depends on.
#[derive(Clone, Copy, Debug)]
pub struct Position<'a> {
    /// The base model's logits, weighed by its strength ([`crate::guidance::weigh_base`]); at least the vocabulary. Only
    /// for [`Chooser::choose_from_lists`]: none.
    pub base: &'a [f32],
    pub terms: &'a [Term<'a>],
    pub sampling: &'a Sampling,
    pub history: &'a History,
    pub noise: &'a Noise,
    /// Index in the answer of the token to be chosen.
    pub position: u32,
}

/// What follows from what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The token that [`crate::choose_dense`] would choose from whole rows.
    Token(u32),
    /// The logits of these ids (ascending) are needed, from every list that lacks them.
    Query(Vec<u32>),
    /// Whole rows are needed in place of every list.
    Dense,
}

/// Chooses tokens; holds the workspaces, so that choosing allocates only what a query returns.
#[derive(Debug)]
pub struct Chooser {
    vocabulary: usize,
    /// Without one pass: l = c / T of every token, or an upper bound where it is not known.
    upper: Vec<f32>,
    /// Whether all tokens are known. Otherwise `known` holds those that are, in the order of l, and
    /// `is_known` marks them.
    complete: bool,
    known: Vec<Rank>,
    is_known: Vec<bool>,
    /// Ids that some list names, ascending.
    named: Vec<u32>,
    /// Ids that one pass does not rule out.
    nominated: Vec<u32>,
    /// G of every token, where a list is ranked with it; else empty.
    noise: Vec<f32>,
    /// Workspaces.
    head: Vec<Rank>,
    pub(crate) missing: Vec<u32>,
}

/// What a filter does to a token.
enum Membership {
    Survives,
    Fails,
    /// It depends on unknown logits.
    Open,
}

impl<'a> Position<'a> {
    pub(crate) fn draw(&self) -> Draw<'a> {
        Draw { noise: self.noise, position: self.position }
    }

    /// The score of a token without filters, or its bound; and whether it is the score itself.
    pub(crate) fn upper_score(&self, id: u32) -> (Rank, bool) {
        let Self { base, terms, sampling, history, .. } = *self;
        let noiseless = sampling.is_greedy() && !terms.iter().any(Term::is_noisy);
        let noise = if noiseless { 0.0 } else { self.draw().of(id) };
        let (c, exact) = combine_one(base, terms, id, noise);
        let c = if sampling.has_penalties() { numeric(history.penalise(sampling, id, c)) } else { c };
        let value = c / sampling.divisor();
        (Rank { value: if sampling.is_greedy() { value } else { value + noise }, id }, exact)
    }
}

impl Chooser {
    /// `vocabulary`: the tokens to choose from are 0..vocabulary, the part that all models share.
    pub fn new(vocabulary: usize) -> Self {
        Self {
            vocabulary,
            upper: vec![0.0; vocabulary],
            complete: true,
            known: Vec::new(),
            is_known: vec![false; vocabulary],
            named: Vec::new(),
            nominated: Vec::new(),
            noise: Vec::new(),
            head: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// The token, or what is needed to choose it; after a query is answered into the lists
    /// ([`crate::TopList::add`]), call it again. Each query names at least one id that is not known and
    /// together they name at most a sixteenth of the vocabulary, so this ends.
    ///
    /// # Panics
    /// If the vocabulary is empty, or `base` or a dense row is shorter.
    pub fn choose(&mut self, position: &Position<'_>) -> Choice {
        let negative = |term: &Term<'_>| matches!(term.logits, TermLogits::List(_)) && term.strength < 0.0;
        if position.terms.iter().any(negative) {
            return Choice::Dense; // the list's bound is no bound: see `guidance`
        }
        self.missing.clear();
        self.in_one_pass(position).unwrap_or_else(|| self.in_full(position))
    }

    /// Without filters: the same choice from one pass over the rows, where that suffices.
    fn in_one_pass(&mut self, position: &Position<'_>) -> Option<Choice> {
        let position = &Position { base: &position.base[..self.vocabulary], ..*position };
        let Position { base, terms, sampling, .. } = *position;
        if !sampling.suits_lists() {
            return None;
        }
        if terms.iter().all(|term| term.list().is_none()) {
            let choose = if sampling.is_greedy() { one_pass::greedy } else { one_pass::sampled };
            return Some(Choice::Token(choose(position)));
        }
        let ceiling = Ceiling::new(terms, sampling)?;
        let best = self.best_named(position)?;
        ceiling.nominate(base, position.draw(), best.value, &mut self.nominated);
        if self.nominated.len() > self.vocabulary / QUERY_SHARE {
            return None; // so many are judged faster by rows
        }
        self.miss(position, best);
        Some(if self.missing.is_empty() { Choice::Token(best.id) } else { self.ask(position) })
    }

    /// The best of the known tokens, if its score is a number. The others that some list names are nominated: they are
    /// bounded by what lists say of them, not of tokens that none names.
    pub(crate) fn best_named(&mut self, position: &Position<'_>) -> Option<Rank> {
        self.name(position.terms);
        let mut best: Option<Rank> = None;
        self.nominated.clear();
        for &id in &self.named {
            match position.upper_score(id) {
                (rank, true) => {
                    best = Some(best.map_or(rank, |best| if rank.above(best) { rank } else { best }))
                }
                (_, false) => self.nominated.push(id),
            }
        }
        best.filter(|best| best.value.is_finite())
    }

    /// Of those that are nominated, the unknown ones that may rank above `best` are missing.
    pub(crate) fn miss(&mut self, position: &Position<'_>, best: Rank) {
        let missing = |id: &u32| matches!(position.upper_score(*id), (rank, false) if rank.above(best));
        self.missing.clear();
        self.missing.extend(self.nominated.iter().copied().filter(missing));
    }

    /// The choice from a row of upper bounds of l: what filters need, and the reference for everything else.
    fn in_full(&mut self, position: &Position<'_>) -> Choice {
        self.learn(position);
        let token = if position.sampling.is_greedy() {
            self.greedy()
        } else if let Some(filters) = position.sampling.filters() {
            self.filtered(position, &filters)
        } else {
            self.unfiltered(position)
        };
        match token {
            Some(token) => Choice::Token(token),
            None => self.ask(position),
        }
    }

    /// Finds the ids that some list names.
    fn name(&mut self, terms: &[Term<'_>]) {
        let vocabulary = self.vocabulary as u32;
        self.named.clear();
        self.named.extend(terms.iter().filter_map(Term::list).flat_map(|list| list.known_ids()));
        self.named.retain(|&id| id < vocabulary);
        self.named.sort_unstable();
        self.named.dedup();
    }

    /// Fills `upper` and finds out which tokens are known.
    fn learn(&mut self, position: &Position<'_>) {
        let Position { base, terms, sampling, history, noise, position } = *position;
        let vocabulary = self.vocabulary as u32;
        self.noise.clear();
        if terms.iter().any(Term::is_noisy) {
            self.noise.resize(self.vocabulary, 0.0);
            noise.fill(position, &mut self.noise);
        }
        combine(base, terms, &self.noise, sampling.divisor(), &mut self.upper);
        for known in self.known.drain(..) {
            self.is_known[known.id as usize] = false;
        }
        self.name(terms);
        self.complete = !terms.iter().any(|term| term.list().is_some());
        let divisor = sampling.divisor();
        for &id in &self.named {
            let noise = self.noise.get(id as usize).copied().unwrap_or(0.0);
            let (c, exact) = combine_one(base, terms, id, noise);
            let c = if sampling.has_penalties() { numeric(history.penalise(sampling, id, c)) } else { c };
            let value = c / divisor;
            self.upper[id as usize] = value;
            if exact {
                self.known.push(Rank { value, id });
                self.is_known[id as usize] = true;
            }
        }
        if sampling.has_penalties() {
            for (id, occurrences) in history.occurrences().take_while(|&(id, _)| id < vocabulary) {
                let noise = self.noise.get(id as usize).copied().unwrap_or(0.0);
                let (c, _) = combine_one(base, terms, id, noise);
                self.upper[id as usize] = numeric(occurrences.penalise(sampling, c)) / divisor;
            }
        }
        self.known.sort_unstable_by(Rank::order);
    }

    fn greedy(&mut self) -> Option<u32> {
        if self.complete {
            return Some(scan::argmax(&self.upper).id);
        }
        let best = *self.known.first()?;
        scan::collect_above(&self.upper, best, &mut self.missing);
        self.missing.is_empty().then_some(best.id)
    }

    fn unfiltered(&mut self, position: &Position<'_>) -> Option<u32> {
        let best = self.best_known(position, Rank::LAST)?;
        if !self.complete {
            scan::collect_noisy(&self.upper, position.draw(), Rank::LAST, best, &mut self.missing);
        }
        self.missing.is_empty().then_some(best.id)
    }

    fn filtered(&mut self, position: &Position<'_>, filters: &Filters) -> Option<u32> {
        if self.complete {
            let tokens = filters.tokens.map(|tokens| tokens.saturating_add(1));
            let head = tokens.unwrap_or(if filters.mass.is_some() { HEAD } else { 1 });
            scan::top(&self.upper, head.min(HEAD_MAX), &mut self.head);
        }
        let max = if self.complete { &self.head } else { &self.known }.first()?.value;
        if !self.complete {
            // Larger ones make what follows a guess (they weigh as much as `max`): a good one for the rest
            // of the query.
            scan::collect_above(&self.upper, Rank { value: max, id: 0 }, &mut self.missing);
        }
        let total = if filters.mass.is_some() { scan::total_weight(&self.upper, max) } else { 0 };
        let mut cut = self.first_cut(filters, max, total);
        loop {
            let best = self.best_known(position, cut).expect("the most probable known token never fails");
            let candidate = Rank { value: self.upper[best.id as usize], id: best.id };
            let membership = self.membership(filters, candidate, max, total);
            if matches!(membership, Membership::Fails) {
                cut = candidate;
                continue;
            }
            if !self.complete {
                scan::collect_noisy(&self.upper, position.draw(), cut, best, &mut self.missing);
            }
            if matches!(membership, Membership::Open) {
                self.widen(candidate);
            }
            return self.missing.is_empty().then_some(best.id);
        }
    }

    /// The best l + G among the known tokens whose l ranks above `cut`.
    fn best_known(&self, position: &Position<'_>, cut: Rank) -> Option<Rank> {
        if self.complete {
            return scan::best_noisy(&self.upper, position.draw(), cut);
        }
        let alive = self.known.iter().take_while(|rank| rank.above(cut));
        alive
            .map(|rank| Rank { value: rank.value + position.draw().of(rank.id), id: rank.id })
            .reduce(|best, rank| if rank.above(best) { rank } else { best })
    }

    /// [`Chooser::cut`], from a longer ranking if that is what it lacks.
    fn first_cut(&mut self, filters: &Filters, max: f32, total: u64) -> Rank {
        let cut = self.cut(filters, max, total);
        let exhausted = self.head.last().is_some_and(|last| last.above(cut));
        if !(self.complete && filters.mass.is_some() && exhausted) {
            return cut;
        }
        scan::top(&self.upper, HEAD_MAX, &mut self.head);
        self.cut(filters, max, total)
    }

    /// A rank at which and below which every token certainly fails, from the known tokens alone.
    fn cut(&self, filters: &Filters, max: f32, total: u64) -> Rank {
        // A token fails min-p if it ranks below the last that would pass.
        let mut cut = Rank { value: filters.floor(max), id: u32::MAX };
        let ranked = if self.complete { &self.head } else { &self.known };
        let mut above = 0;
        for (index, &rank) in ranked.iter().enumerate() {
            if !rank.above(cut) {
                break;
            }
            if filters.tokens.is_some_and(|tokens| index >= tokens)
                || !filters.within_mass(above, total - above)
            {
                cut = rank;
                break;
            }
            if filters.mass.is_some() {
                above += weight(rank.value, max);
            }
        }
        cut
    }

    /// Of a known token that ranks above the floor of min-p.
    fn membership(&self, filters: &Filters, rank: Rank, max: f32, total: u64) -> Membership {
        let known_above = || self.known.iter().take_while(|known| known.above(rank));
        let mut open = false;
        if let Some(tokens) = filters.tokens {
            let most = scan::count_above(&self.upper, rank);
            let least = if self.complete { most } else { known_above().count() };
            if least >= tokens {
                return Membership::Fails;
            }
            open |= most >= tokens;
        }
        if filters.mass.is_some() {
            let weigh = |sum: u64, known: &Rank| sum + weight(known.value, max);
            let most_above = scan::weight_above(&self.upper, rank, max);
            let (least_above, least_total) = if self.complete {
                (most_above, total)
            } else {
                (known_above().fold(0, weigh), self.known.iter().fold(0, weigh))
            };
            if !filters.within_mass(least_above, total - least_above) {
                return Membership::Fails;
            }
            open |= !filters.within_mass(most_above, least_total - least_above);
        }
        if open { Membership::Open } else { Membership::Survives }
    }

    /// Adds unknown tokens to those that are missing: the ones that may rank above a candidate, the largest
    /// bounds first; if there are none, those below it, whose mass is in doubt.
    fn widen(&mut self, candidate: Rank) {
        let more = (self.vocabulary / WIDEN_SHARE).max(WIDEN_MIN).max(self.known.len());
        scan::top(&self.upper, self.known.len() + more, &mut self.head);
        let unknown = self.head.iter().filter(|rank| !self.is_known[rank.id as usize]);
        let above = unknown.clone().take_while(|rank| rank.above(candidate)).count();
        self.missing.extend(unknown.take(if above > 0 { above.min(more) } else { more }).map(|rank| rank.id));
    }

    /// The question for what is missing.
    pub(crate) fn ask(&mut self, position: &Position<'_>) -> Choice {
        if self.missing.is_empty() {
            self.widen(Rank::LAST); // no list names what the others name
        }
        self.missing.sort_unstable();
        self.missing.dedup();
        let queried =
            position.terms.iter().filter_map(Term::list).map(|list| list.queried()).max().unwrap_or(0);
        if queried + self.missing.len() > self.vocabulary / QUERY_SHARE {
            return Choice::Dense;
        }
        Choice::Query(self.missing.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TopList, choose_dense, top_list};

    const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
    };

    fn choose(base: &[f32], terms: &[Term<'_>], sampling: &Sampling, history: &History) -> Choice {
        let noise = Noise::new(1, 0);
        Chooser::new(base.len()).choose(&Position {
            base,
            terms,
            sampling,
            history,
            noise: &noise,
            position: 0,
        })
    }

    fn list(strength: f32, list: &TopList) -> Term<'_> {
        Term { strength, logits: TermLogits::List(list) }
    }

    /// 100 base logits, all zero but for those given.
    fn row(logits: &[(usize, f32)]) -> Vec<f32> {
        let mut row = vec![0.0; 100];
        logits.iter().for_each(|&(id, logit)| row[id] = logit);
        row
    }

    #[test]
    fn only_the_logits_that_can_change_the_outcome_are_asked_for() {
        // Token 7 has 6 + 3 for certain; tokens 20 and 30 have at most 8 + 2 and 7 + 2, and a tie is won by
        // the lower id.
        let base = row(&[(7, 6.0), (5, 7.0), (20, 8.0), (30, 7.0)]);
        let mut top = TopList::new(vec![7, 9], vec![3.0, 2.0]).unwrap();
        let none = History::default();
        assert_eq!(choose(&base, &[list(1.0, &top)], &GREEDY, &none), Choice::Query(vec![5, 20]));
        top.add(&[5, 20], &[1.5, 0.5]);
        assert_eq!(choose(&base, &[list(1.0, &top)], &GREEDY, &none), Choice::Token(7));
        top.add(&[20], &[9.0]); // late and contradictory: the first answer counts
        assert_eq!(choose(&base, &[list(1.0, &top)], &GREEDY, &none), Choice::Token(7));
    }

    #[test]
    fn a_penalised_token_is_bounded_like_any_other() {
        let base = row(&[(7, 6.0), (20, 8.0)]);
        let top = TopList::new(vec![7, 9], vec![3.0, 2.0]).unwrap();
        let sampling = Sampling { repetition_penalty: 1.25, ..GREEDY };
        let penalised = History::new(&[20]);
        assert_eq!(choose(&base, &[list(1.0, &top)], &sampling, &penalised), Choice::Token(7));
    }

    #[test]
    fn a_strength_decides_what_a_list_is_good_for() {
        let base = row(&[(7, 1.0)]);
        let nothing = TopList::default();
        let none = History::default();
        assert_eq!(choose(&base, &[list(-0.5, &nothing)], &GREEDY, &none), Choice::Dense);
        assert_eq!(choose(&base, &[list(0.0, &nothing)], &GREEDY, &none), Choice::Token(7));
        // A list that names nothing bounds nothing, and 100 tokens are few: not even a query pays.
        assert_eq!(choose(&base, &[list(0.5, &nothing)], &GREEDY, &none), Choice::Dense);
    }

    #[test]
    fn a_candidate_that_an_unknown_token_may_push_out_of_a_filter_waits_for_its_logit() {
        // l is 8 for token 7, 6 for token 9, and for token 20 somewhere below 7.5.
        let base = row(&[(7, 5.0), (9, 4.0), (20, 5.5)]);
        let reward = |logit: f32| row(&[(7, 3.0), (9, 2.0), (20, logit)]);
        let history = History::default();
        // Seeds by which token 9 has the best score, whatever the logits of the unlisted tokens.
        let bounds = row(&[(7, 6.0), (9, 4.0), (20, 5.5)]); // less the 2 that every bound has
        let seeds: Vec<u64> = (0..500)
            .filter(|&seed| {
                let noise = Noise::new(seed, 0);
                let draw = Draw { noise: &noise, position: 0 };
                scan::best_noisy(&bounds, draw, Rank::LAST).is_some_and(|best| best.id == 9)
            })
            .collect();
        assert!(seeds.len() > 10);
        for sampling in
            [Sampling { top_k: 2, ..Sampling::default() }, Sampling { top_p: 0.9, ..Sampling::default() }]
        {
            for &seed in &seeds {
                let noise = Noise::new(seed, 0);
                let place = |terms: &[Term<'_>]| {
                    let position = Position {
                        base: &base,
                        terms,
                        sampling: &sampling,
                        history: &history,
                        noise: &noise,
                        position: 0,
                    };
                    Chooser::new(100).choose(&position)
                };
                let mut top = top_list(&reward(1.9), 2);
                assert_eq!(place(&[list(1.0, &top)]), Choice::Query(vec![20]), "{sampling:?}");
                top.add(&[20], &[-1.0]);
                assert_eq!(place(&[list(1.0, &top)]), Choice::Token(9), "token 20 is out of the way");
                let whole = reward(1.9);
                let whole = place(&[Term { strength: 1.0, logits: TermLogits::Dense(&whole) }]);
                assert!(matches!(whole, Choice::Token(7 | 20)), "token 20 is in the way: {whole:?}");
            }
        }
    }

    #[test]
    fn one_pass_chooses_and_asks_what_a_row_of_bounds_does() {
        let (mut tokens, mut queries) = (0, 0);
        for case in 0..3000_u32 {
            let draw = |salt: u32| Noise::new(u64::from(salt), 0).at(case, 0).abs();
            let vocabulary = [65, 500, 3000][case as usize % 3];
            let row = |salt| {
                let mut row = vec![0.0; vocabulary];
                Noise::new(salt, 1).fill(case, &mut row);
                row.iter_mut().for_each(|z| *z *= draw(1));
                row
            };
            let sampling = Sampling {
                temperature: [0.0, 1.0, 0.5, draw(2)][case as usize / 3 % 4],
                repetition_penalty: [1.0, 1.2][case as usize / 12 % 2],
                presence_penalty: [0.0, 0.5][case as usize / 24 % 2],
                ..Sampling::default()
            };
            let noise = Noise::new(u64::from(case / 100), 0);
            let base = row(100);
            let rewards: Vec<Vec<f32>> = (0..case as usize / 48 % 4)
                .map(|index| {
                    row(101 + index as u64).iter().zip(&base).map(|(z, base)| z + draw(3) * base).collect()
                })
                .collect();
            let strengths = [1.0, draw(4), 0.01 + draw(5)];
            let lists: Vec<TopList> = rewards
                .iter()
                .zip(strengths)
                .enumerate()
                .map(|(index, (row, strength))| {
                    // Most lists are ranked with the scale that lets the noise cancel, but nothing depends on that.
                    let scale = strength / sampling.divisor() * [1.0, 1.0, draw(6)][case as usize % 3];
                    match (case as usize / 5 + index) % 3 {
                        0 => top_list(row, 1 + vocabulary / 20),
                        _ => crate::noisy_top_list(row, 1 + vocabulary / 20, scale, &noise, case),
                    }
                })
                .collect();
            let terms: Vec<Term<'_>> = match case % 7 {
                6 => {
                    rewards.iter().map(|row| Term { strength: 1.5, logits: TermLogits::Dense(row) }).collect()
                }
                _ => lists.iter().zip(strengths).map(|(top, strength)| list(strength, top)).collect(),
            };
            let history = History::new(&[1, 5, 60]);
            let position = Position {
                base: &base,
                terms: &terms,
                sampling: &sampling,
                history: &history,
                noise: &noise,
                position: case,
            };
            let mut chooser = Chooser::new(vocabulary);
            if let Some(choice) = chooser.in_one_pass(&position) {
                chooser.missing.clear();
                assert_eq!(choice, chooser.in_full(&position), "case {case}: {sampling:?}");
                match choice {
                    Choice::Token(_) => tokens += 1,
                    Choice::Query(_) => queries += 1,
                    Choice::Dense => {}
                }
            }
        }
        assert!(tokens > 500 && queries > 100, "only {tokens} tokens and {queries} queries in one pass");
    }

    #[test]
    fn lists_that_have_no_token_in_common_are_made_to_meet() {
        let base: Vec<f32> = (0..2000).map(|id| if id < 3 { 9.0 - id as f32 } else { 0.0 }).collect();
        let first = TopList::new(vec![0, 10], vec![3.0, 0.5]).unwrap();
        let second = TopList::new(vec![1, 11], vec![3.0, 0.5]).unwrap();
        let Choice::Query(ids) =
            choose(&base, &[list(1.0, &first), list(1.0, &second)], &GREEDY, &History::default())
        else {
            panic!("neither list names a token of the other")
        };
        assert!(ids.starts_with(&[0, 1, 2]), "the likeliest are asked for: {ids:?}");
    }

    #[test]
    fn ids_beyond_the_shared_vocabulary_are_never_chosen() {
        // Reward models may have added tokens of their own, at the end.
        let base = row(&[(7, 6.0)]);
        let mut reward = vec![0.0; 120];
        reward[110] = 50.0;
        reward[7] = 1.0;
        let top = top_list(&reward, 3);
        let history = History::new(&[110, 115]);
        let sampling = Sampling { repetition_penalty: 1.25, ..GREEDY };
        assert_eq!(choose(&base, &[list(1.0, &top)], &sampling, &history), Choice::Token(7));
        let whole = [Term { strength: 1.0, logits: TermLogits::Dense(&reward) }];
        assert_eq!(choose(&base, &whole, &sampling, &history), Choice::Token(7));
    }

    #[test]
    fn the_most_probable_token_survives_the_strictest_filters() {
        let base = row(&[(7, 0.5)]);
        let strict = [
            Sampling { top_k: 1, ..Sampling::default() },
            Sampling { top_p: f32::MIN_POSITIVE, ..Sampling::default() },
            Sampling { min_p: 1.0, ..Sampling::default() },
        ];
        let history = History::default();
        for sampling in &strict {
            for seed in 0..100 {
                let noise = Noise::new(seed, 0);
                let position = Position {
                    base: &base,
                    terms: &[],
                    sampling,
                    history: &history,
                    noise: &noise,
                    position: 0,
                };
                assert_eq!(Chooser::new(base.len()).choose(&position), Choice::Token(7));
                assert_eq!(choose_dense(&position), 7);
            }
        }
    }
}
