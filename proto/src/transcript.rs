//! A stream of events put together again: what a client has when the stream ends.

use crate::{Event, pb};

/// Everything that one request was answered with.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Transcript {
    pub started: Option<pb::Started>,
    /// In the order of their numbers.
    pub choices: Vec<ChoiceTranscript>,
    pub summary: Option<pb::Summary>,
}

/// One of the n answers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChoiceTranscript {
    pub tokens: Vec<u32>,
    pub text: String,
    pub details: Vec<pb::TokenDetail>,
    /// Positions of tokens that were chosen without their reward.
    pub unguided: Vec<u32>,
    pub finished: Option<pb::Finished>,
}

/// An event that no router sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("answer {choice}: tokens from position {got}, expected {expected}")]
pub struct OutOfOrder {
    pub choice: u32,
    pub expected: u32,
    pub got: u32,
}

// === impl Transcript ===

impl Transcript {
    /// Takes the next event in.
    ///
    /// # Errors
    /// When positions do not follow each other: a token would be lost or doubled.
    pub fn apply(&mut self, event: &Event) -> Result<(), OutOfOrder> {
        match event {
            Event::Started(started) => self.started = Some(started.clone()),
            Event::Tokens(tokens) => {
                let choice = self.choice(tokens.choice);
                let expected = choice.tokens.len() as u32;
                if tokens.position != expected {
                    return Err(OutOfOrder { choice: tokens.choice, expected, got: tokens.position });
                }
                choice.tokens.extend_from_slice(&tokens.ids);
                choice.text.push_str(&tokens.text);
                choice.details.extend_from_slice(&tokens.details);
                choice.unguided.extend(tokens.unguided.iter().map(|index| tokens.position + index));
            }
            Event::Finished(finished) => self.choice(finished.choice).finished = Some(finished.clone()),
            Event::Summary(summary) => self.summary = Some(summary.clone()),
        }
        Ok(())
    }

    fn choice(&mut self, number: u32) -> &mut ChoiceTranscript {
        let index = number as usize;
        if self.choices.len() <= index {
            self.choices.resize_with(index + 1, ChoiceTranscript::default);
        }
        &mut self.choices[index]
    }
}

/// The word for a finish reason in JSON, as OpenAI's API has it where it has one.
pub fn finish_reason_name(finished: &pb::Finished) -> &'static str {
    match finished.reason() {
        pb::FinishReason::Stop => "stop",
        pb::FinishReason::Length => "length",
        pb::FinishReason::Context => "context",
        pb::FinishReason::Unspecified => "unknown",
    }
}
