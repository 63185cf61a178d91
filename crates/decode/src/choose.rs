//! The token of a position, from whole rows or from lists of the largest logits: exact, or a question.
//!
use crate::guidance::{Term, TermLogits, combine, combine_one, numeric};
use crate::noise::Noise;
use crate::sampling::{Filters, History, Sampling};
use crate::scan::{self, Rank};

/// A query for a larger share of the vocabulary than 1/16 is answered by whole rows: an id and a value are twice
/// a value, and the second round trip has to be worth its while.
const QUERY_SHARE: usize = 16;
/// Ids that are asked for at once when no candidate is known, or the mass of the unlisted tokens is too uncertain.
const WIDEN_SHARE: usize = 256;
const WIDEN_MIN: usize = 16;
/// Tokens from which the cut of a filter is taken when everything is known.
const HEAD: usize = 256;

/// All that the token of one position depends on.
#[derive(Clone, Copy, Debug)]
pub struct Position<'a> {
    /// The base model's logits; at least the vocabulary.
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
    /// l = c / T of every token, or an upper bound where it is not known.
    upper: Vec<f32>,
    /// Whether all tokens are known. Otherwise `known` holds those that are, in rank order.
    complete: bool,
    known: Vec<Rank>,
    /// Ids that some list names.
    named: Vec<u32>,
    /// Workspaces.
    head: Vec<Rank>,
    missing: Vec<u32>,
}

/// What a filter does to a token.
enum Membership {
    Survives,
    Fails,
    /// It depends on unknown logits.
    Open,
}

impl Chooser {
    /// `vocabulary`: the tokens to choose from are 0..vocabulary, the part that all models share.
    pub fn new(vocabulary: usize) -> Self {
        Self {
            vocabulary,
            upper: vec![0.0; vocabulary],
            complete: true,
            known: Vec::new(),
            named: Vec::new(),
            head: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// The token, or what is needed to choose it; after a query is answered into the lists
    /// ([`crate::TopList::add`]), call it again. Each query names at least one id that is not known and together they
    /// name at most a sixteenth of the vocabulary, so this ends.
    ///
    /// # Panics
    /// If the vocabulary is empty, or `base` or a dense row is shorter.
    pub fn choose(&mut self, position: &Position<'_>) -> Choice {
        let negative =
            |term: &Term<'_>| matches!(term.logits, TermLogits::List(_)) && !(term.strength >= 0.0);
        if position.terms.iter().any(negative) {
            return Choice::Dense; // the list's bound is no bound: see `guidance`
        }
        self.learn(position);
        self.missing.clear();
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

    /// Fills `upper` and finds out which tokens are known.
    fn learn(&mut self, position: &Position<'_>) {
        let Position { base, terms, sampling, history, .. } = *position;
        let vocabulary = self.vocabulary as u32;
        combine(base, terms, sampling.divisor(), &mut self.upper);
        self.known.clear();
        self.named.clear();
        self.named.extend(terms.iter().filter_map(Term::list).flat_map(|list| list.known_ids()));
        self.complete = !terms.iter().any(|term| term.list().is_some());
        self.named.retain(|&id| id < vocabulary);
        self.named.sort_unstable();
        self.named.dedup();
        let reshaped = |id: u32| {
            let (c, exact) = combine_one(base, terms, id);
            let c = if sampling.has_penalties() { numeric(history.penalise(sampling, id, c)) } else { c };
            (c / sampling.divisor(), exact)
        };
        for &id in &self.named {
            let (value, exact) = reshaped(id);
            self.upper[id as usize] = value;
            if exact {
                self.known.push(Rank { value, id });
            }
        }
        if sampling.has_penalties() {
            for id in history.tokens().take_while(|&id| id < vocabulary) {
                self.upper[id as usize] = reshaped(id).0;
            }
        }
        self.known.sort_unstable_by(Rank::order);
    }

    fn greedy(&mut self) -> Option<u32> {
        if self.complete {
            return Some(scan::argmax(&self.upper).expect("the vocabulary is not empty").id);
        }
        let best = *self.known.first()?;
        scan::collect_above(&self.upper, best, &mut self.missing);
        self.missing.is_empty().then_some(best.id)
    }

    fn unfiltered(&mut self, position: &Position<'_>) -> Option<u32> {
        let best = self.best_known(position, Rank::LAST)?;
        if !self.complete {
            scan::collect_noisy(
                &self.upper,
                Rank::LAST,
                best,
                position.noise,
                position.position,
                &mut self.missing,
            );
        }
        self.missing.is_empty().then_some(best.id)
    }

    fn filtered(&mut self, position: &Position<'_>, filters: &Filters) -> Option<u32> {
        // Weights and min-p are relative to the largest l, so that one has to be known.
        let max = if self.complete { scan::max(&self.upper) } else { self.known.first()?.value };
        if !self.complete {
            scan::collect_above(&self.upper, Rank { value: max, id: 0 }, &mut self.missing);
            if !self.missing.is_empty() {
                return None;
            }
        }
        let total = if filters.mass.is_some() { scan::total_weight(&self.upper, max) } else { 0 };
        let mut cut = self.cut(filters, max, total);
        loop {
            let best = self.best_known(position, cut).expect("the most probable known token never fails");
            let Rank { id, .. } = best;
            let rank = Rank { value: self.upper[id as usize], id };
            match self.membership(filters, rank, max, total) {
                Membership::Fails => cut = rank,
                Membership::Survives if self.complete => return Some(id),
                membership => {
                    let Position { noise, position, .. } = *position;
                    scan::collect_noisy(&self.upper, cut, best, noise, position, &mut self.missing);
                    if matches!(membership, Membership::Open) {
                        self.widen();
                    }
                    return self.missing.is_empty().then_some(id);
                }
            }
        }
    }

    /// The best l + G among the known tokens whose l ranks above `cut`.
    fn best_known(&self, position: &Position<'_>, cut: Rank) -> Option<Rank> {
        if self.complete {
            return scan::best_noisy(&self.upper, cut, position.noise, position.position);
        }
        let alive = self.known.iter().take_while(|rank| rank.above(cut));
        alive
            .map(|rank| Rank {
                value: rank.value + position.noise.at(position.position, rank.id),
                id: rank.id,
            })
            .reduce(|best, rank| if rank.above(best) { rank } else { best })
    }

    /// A rank at which and below which every token certainly fails, from the known tokens alone.
    fn cut(&mut self, filters: &Filters, max: f32, total: u64) -> Rank {
        // A token fails min-p if it ranks below the last that would pass.
        let mut cut = Rank { value: filters.floor(max), id: u32::MAX };
        if self.complete {
            scan::top(&self.upper, HEAD, &mut self.head);
        }
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
                above += crate::elementary::weight(rank.value, max);
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
            let weigh = |sum: u64, known: &Rank| sum + crate::elementary::weight(known.value, max);
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

    /// Adds the unknown tokens of the largest bounds to those that are missing, more with each query.
    fn widen(&mut self) {
        let more = (self.vocabulary / WIDEN_SHARE).max(WIDEN_MIN).max(self.known.len());
        scan::top(&self.upper, self.known.len() + more, &mut self.head);
        let unknown = self.head.iter().filter(|rank| !self.known.contains(rank));
        self.missing.extend(unknown.take(more).map(|rank| rank.id));
    }

    /// The question for what is missing.
    fn ask(&mut self, position: &Position<'_>) -> Choice {
        if self.missing.is_empty() {
            self.widen();
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
