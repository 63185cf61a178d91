//! Choosing where the base model's logits come as a list as well: from what its ranks hand over without handing over rows.
//!
//! The base model's list stands first among the terms, with the base model's strength b, and a base logit is zero: 0 + b · z
//! is b · z, to the bit. So all that [`crate::guidance`] and [`crate::one_pass`] say of lists holds of this one too. A token
//! that every list names is known. One that only some name is bounded by what these say of it and by the bounds of the
//! others. One that none names has at most the upper score of which [`Ceiling::reaches`] knows; no row is needed for that.
//!
//! The base model's list is ranked with the noise wherever the request samples, and so is a reward's: then their bounds
//! φ_base + φ_reward count the noise twice, and a token without luck is bounded 3.2 too high. That is little beside what lies
//! between the first of a list and its last.

use crate::choose::{Choice, Chooser, Position};
use crate::guidance::{Term, TermLogits};
use crate::one_pass::Ceiling;

impl Chooser {
    /// As [`Chooser::choose`], from a position without base row, whose first term is the base model's list. What is missing
    /// of other lists is asked for; `None`: the base model's whole row is needed.
    ///
    /// # Panics
    /// If there is no term, or a base row.
    pub fn choose_from_lists(&mut self, position: &Position<'_>) -> Option<Choice> {
        let Position { base, terms, sampling, .. } = *position;
        assert!(base.is_empty(), "the base model's logits are a row or a list");
        let negative = |term: &Term<'_>| term.strength < 0.0;
        if !sampling.suits_lists() || terms.iter().any(negative) {
            return None;
        }
        let TermLogits::List(base) = terms[0].logits else { return None };
        let ceiling = Ceiling::new(terms, sampling)?;
        let best = self.best_named(position)?;
        if ceiling.reaches(best.value) {
            return None;
        }
        self.miss(position, best);
        if self.missing.iter().any(|id| base.get(*id).is_none()) {
            return None;
        }
        Some(if self.missing.is_empty() { Choice::Token(best.id) } else { self.ask(position) })
    }
}
