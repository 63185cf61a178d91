//! How far the answers of a request have come: what another worker, or another router, needs to go on with them.

use crate::{
    Event, ProtocolError, Sampling,
    limits::{CHOICES_MAX, MAX_TOKENS_MAX},
    pb,
    request::check_count,
};

/// Every token that was received so far, by the number of its answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    answers: Vec<AnswerSoFar>,
}

/// One of the n answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnswerSoFar {
    pub ids: Vec<u32>,
    /// Of these, the tokens that were chosen without their reward.
    pub unguided_tokens: u32,
    pub is_finished: bool,
}

// === impl Progress ===

impl Progress {
    /// Takes an event in. False: it says nothing new, because its answer has come that far already.
    ///
    /// # Errors
    /// When tokens are missing before it.
    pub fn record(&mut self, event: &Event) -> Result<bool, ProtocolError> {
        match event {
            Event::Tokens(tokens) => {
                let answer = self.answer_mut(tokens.choice)?;
                let (position, have) = (tokens.position as usize, answer.ids.len());
                if position + tokens.ids.len() <= have {
                    return Ok(false);
                }
                if position != have || answer.is_finished {
                    let reason = format!("is {position}, answer {} goes on at {have}", tokens.choice);
                    return Err(ProtocolError::invalid("tokens.position", reason));
                }
                answer.ids.extend_from_slice(&tokens.ids);
                answer.unguided_tokens += tokens.unguided.len() as u32;
                Ok(true)
            }
            Event::Finished(finished) => {
                let answer = self.answer_mut(finished.choice)?;
                Ok(!std::mem::replace(&mut answer.is_finished, true))
            }
            Event::Started(_) | Event::Summary(_) => Ok(true),
        }
    }

    /// The answer of that number; an empty one where it has not begun.
    pub fn answer(&self, choice: u32) -> AnswerSoFar {
        self.answers.get(choice as usize).cloned().unwrap_or_default()
    }

    /// Tokens of all answers.
    pub fn tokens(&self) -> usize {
        self.answers.iter().map(|answer| answer.ids.len()).sum()
    }

    pub fn unguided_tokens(&self) -> u32 {
        self.answers.iter().map(|answer| answer.unguided_tokens).sum()
    }

    /// Reads `resume` of a request.
    ///
    /// # Errors
    /// When an answer is impossible by itself; `check` says what is impossible for its request.
    pub fn from_wire(wire: Vec<pb::AnswerSoFar>) -> Result<Self, ProtocolError> {
        let mut progress = Self::default();
        for (index, answer) in wire.into_iter().enumerate() {
            let field = |name: &str| format!("resume[{index}].{name}");
            check_count(&field("ids"), answer.ids.len(), MAX_TOKENS_MAX as usize)?;
            check_count(&field("unguided_tokens"), answer.unguided_tokens as usize, answer.ids.len())?;
            let known = progress.answer_mut(answer.choice).map_err(|_| {
                ProtocolError::invalid(field("choice"), format!("wants a number below {CHOICES_MAX}"))
            })?;
            if *known != AnswerSoFar::default() {
                return Err(ProtocolError::invalid(field("choice"), "is there twice"));
            }
            *known = AnswerSoFar {
                ids: answer.ids,
                unguided_tokens: answer.unguided_tokens,
                is_finished: answer.finished,
            };
        }
        Ok(progress)
    }

    /// # Errors
    /// When there are more answers, or longer ones, than the request may have.
    pub fn check(&self, sampling: &Sampling) -> Result<(), ProtocolError> {
        check_count("resume.choice", self.answers.len().saturating_sub(1), sampling.n as usize - 1)?;
        let longest = self.answers.iter().map(|answer| answer.ids.len()).max().unwrap_or(0);
        check_count("resume.ids", longest, sampling.max_tokens as usize)
    }

    fn answer_mut(&mut self, choice: u32) -> Result<&mut AnswerSoFar, ProtocolError> {
        if choice >= CHOICES_MAX {
            return Err(ProtocolError::invalid(
                "choice",
                format!("is {choice}, wants less than {CHOICES_MAX}"),
            ));
        }
        let index = choice as usize;
        if self.answers.len() <= index {
            self.answers.resize_with(index + 1, AnswerSoFar::default);
        }
        Ok(&mut self.answers[index])
    }
}

impl From<Progress> for Vec<pb::AnswerSoFar> {
    fn from(progress: Progress) -> Self {
        let begun = |(_, answer): &(usize, AnswerSoFar)| *answer != AnswerSoFar::default();
        let to_wire = |(choice, answer): (usize, AnswerSoFar)| pb::AnswerSoFar {
            choice: choice as u32,
            ids: answer.ids,
            unguided_tokens: answer.unguided_tokens,
            finished: answer.is_finished,
        };
        progress.answers.into_iter().enumerate().filter(begun).map(to_wire).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(choice: u32, position: u32, ids: &[u32]) -> Event {
        Event::Tokens(pb::Tokens { choice, position, ids: ids.to_vec(), ..pb::Tokens::default() })
    }

    #[test]
    fn repeated_tokens_say_nothing_new_and_missing_ones_are_noticed() {
        let mut progress = Progress::default();
        assert_eq!(progress.record(&tokens(1, 0, &[7])), Ok(true));
        assert_eq!(progress.record(&tokens(1, 0, &[7])), Ok(false));
        assert_eq!(progress.record(&tokens(1, 1, &[8, 9])), Ok(true));
        assert_eq!(progress.record(&tokens(1, 4, &[1])).unwrap_err().field(), "tokens.position");
        assert_eq!(progress.record(&tokens(1, 2, &[9, 1])).unwrap_err().field(), "tokens.position");
        let finished = Event::Finished(pb::Finished { choice: 1, ..pb::Finished::default() });
        assert_eq!(progress.record(&finished), Ok(true));
        assert_eq!(progress.record(&finished), Ok(false));
        assert!(progress.record(&tokens(1, 3, &[1])).is_err(), "nothing follows the end");
        assert_eq!((progress.answer(0).ids.len(), progress.answer(1).ids), (0, vec![7, 8, 9]));
    }

    #[test]
    fn it_survives_the_wire_and_is_refused_where_it_cannot_be() {
        let mut progress = Progress::default();
        progress.record(&tokens(2, 0, &[7, 8])).unwrap();
        let wire: Vec<pb::AnswerSoFar> = progress.clone().into();
        assert_eq!(wire.len(), 1, "answers that have not begun do not travel");
        assert_eq!(Progress::from_wire(wire.clone()), Ok(progress.clone()));
        let field = |wire| Progress::from_wire(wire).unwrap_err().field().to_owned();
        assert_eq!(field(vec![wire[0].clone(), wire[0].clone()]), "resume[1].choice");
        assert_eq!(field(vec![pb::AnswerSoFar { choice: 9999, ..wire[0].clone() }]), "resume[0].choice");
        assert_eq!(
            field(vec![pb::AnswerSoFar { unguided_tokens: 3, ..wire[0].clone() }]),
            "resume[0].unguided_tokens"
        );
        let sampling = Sampling { n: 3, max_tokens: 2, ..Sampling::default() };
        assert_eq!(progress.check(&sampling), Ok(()));
        let fields = [Sampling { n: 2, ..sampling.clone() }, Sampling { max_tokens: 1, ..sampling }]
            .map(|sampling| progress.check(&sampling).unwrap_err().field().to_owned());
        assert_eq!(fields, ["resume.choice", "resume.ids"]);
    }
}
