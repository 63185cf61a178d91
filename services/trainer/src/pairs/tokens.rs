//! From pairs as text to pairs as the network sees them: token ids, signs and standardised margins.

use serde::{Deserialize, Serialize};
use uniarm_model::{ChatTemplate, Message, ModelError, Tokenizer};

use super::{Fault, Pair, Pairs};
use crate::{loss::Labels, network::TokenPair};

/// An answer that no text contains: what a template writes behind it is the end of a turn.
const PROBE: &str = "\u{2063}answer\u{2063}";

/// What equal scores mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ties {
    /// The objective has no say in this pair: s_i = m_i = 0.
    #[default]
    Neutral,
    /// The pair is a bad line.
    Refuse,
}

/// How one model reads a pair.
pub struct PairReader<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: &'a ChatTemplate,
    /// Takes the place of the conversation's own system messages.
    pub system: Option<&'a str>,
    /// Tokens of a prompt, at most.
    pub max_prompt_tokens: usize,
    /// Tokens of a prompt and the longer answer, at most.
    pub max_tokens: usize,
}

/// Standard deviations of score differences, by objective; what a margin is divided by.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales(Vec<f64>);

// === impl PairReader ===

impl PairReader<'_> {
    /// Token ids of every pair that fits; the others become bad lines.
    ///
    /// # Errors
    /// Where the template has no end of turn.
    pub fn read(
        &self,
        pairs: &mut Pairs,
        objectives: &[String],
        ties: Ties,
    ) -> Result<Vec<TokenPair>, ModelError> {
        let end = self.end_of_turn()?;
        let mut read = Vec::with_capacity(pairs.pairs.len());
        pairs.refuse(|pair| match self.pair(pair, end, objectives, ties) {
            Ok(tokens) => {
                read.push(tokens);
                None
            }
            Err(fault) => Some(fault),
        });
        Ok(read)
    }

    /// The token that follows an answer where a conversation goes on: rendered, not known by name.
    ///
    /// # Errors
    /// Where the template writes nothing behind an answer, or something that is not a token of its own.
    pub fn end_of_turn(&self) -> Result<u32, ModelError> {
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let turns = [message("user", PROBE), message("assistant", PROBE)];
        let rendered = self.template.render(&turns, false)?;
        let behind = rendered.rsplit_once(PROBE).map_or("", |(_, behind)| behind).trim_start();
        let ends = self.tokenizer.encode(behind, false)?;
        let first = ends.first().filter(|id| self.tokenizer.is_special(**id));
        first.copied().ok_or_else(|| {
            let reason = format!("it writes {behind:?} behind an answer, which is no token that ends a turn");
            ModelError::Template(reason)
        })
    }

    fn pair(
        &self,
        pair: &Pair,
        end: u32,
        objectives: &[String],
        ties: Ties,
    ) -> Result<TokenPair, (String, Fault, String)> {
        let unreadable = |field: &str| {
            let field = field.to_owned();
            move |error: ModelError| (field, Fault::Malformed, error.to_string())
        };
        let prompt = self.prompt(pair).map_err(unreadable("messages"))?;
        if prompt.len() > self.max_prompt_tokens {
            let reason = format!("{} tokens; max_prompt_tokens is {}", prompt.len(), self.max_prompt_tokens);
            return Err(("messages".to_owned(), Fault::TooLong, reason));
        }
        let mut answers = [Vec::new(), Vec::new()];
        for (side, field) in ["response_a", "response_b"].into_iter().enumerate() {
            let mut answer =
                self.tokenizer.encode(&pair.responses[side], false).map_err(unreadable(field))?;
            answer.extend(pair.finished[side].then_some(end));
            let all = prompt.len() + answer.len();
            if all > self.max_tokens {
                let reason = format!("{all} tokens with the prompt; max_tokens is {}", self.max_tokens);
                return Err((field.to_owned(), Fault::TooLong, reason));
            }
            answers[side] = answer;
        }
        Ok(TokenPair { prompt, answers, labels: raw_labels(pair, objectives, ties)? })
    }

    fn prompt(&self, pair: &Pair) -> Result<Vec<u32>, ModelError> {
        match self.system {
            None => self.template.encode(self.tokenizer, &pair.messages),
            Some(system) => {
                let own = Message { role: "system".into(), content: system.into() };
                let others = pair.messages.iter().filter(|message| message.role != "system");
                let messages: Vec<_> = std::iter::once(own).chain(others.cloned()).collect();
                self.template.encode(self.tokenizer, &messages)
            }
        }
    }
}

/// Signs, and score differences as they stand (NaN where there are no scores) for [`Scales`].
fn raw_labels(pair: &Pair, objectives: &[String], ties: Ties) -> Result<Labels, (String, Fault, String)> {
    let mut labels = Labels { signs: Vec::new(), margins: Vec::new() };
    for objective in objectives {
        let judgement = pair.judgements.get(objective).expect("pairs have every objective that is needed");
        let sign = judgement.sign();
        if sign == 0.0 && ties == Ties::Refuse {
            let reason = "both answers have the same score, and ties = \"refuse\"".to_owned();
            return Err((format!("scores.{objective}"), Fault::Tie, reason));
        }
        labels.signs.push(sign);
        labels.margins.push(judgement.difference().unwrap_or(f64::NAN));
    }
    Ok(labels)
}

// === impl Scales ===

impl Scales {
    /// Over training pairs whose margins are still differences.
    pub fn of(pairs: &[TokenPair]) -> Self {
        let objectives = pairs.first().map_or(0, |pair| pair.labels.signs.len());
        let scale = |objective: usize| {
            let differences = pairs.iter().map(|pair| pair.labels.margins[objective]);
            let squares: Vec<f64> = differences.filter(|d| d.is_finite()).map(|d| d * d).collect();
            // Around zero: which answer is called a is arbitrary, and so is the mean's sign.
            let deviation = (squares.iter().sum::<f64>() / squares.len() as f64).sqrt();
            if deviation > 0.0 { deviation } else { 1.0 }
        };
        Self((0..objectives).map(scale).collect())
    }

    /// Turns differences into margins.
    pub fn apply(&self, pairs: &mut [TokenPair]) {
        for pair in pairs {
            let Labels { signs, margins } = &mut pair.labels;
            for ((margin, sign), scale) in margins.iter_mut().zip(signs).zip(&self.0) {
                *margin = if margin.is_nan() { *sign } else { *margin / scale };
            }
        }
    }
}
