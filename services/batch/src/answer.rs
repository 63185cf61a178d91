//! Lines of output: a function of the request and its tokens, without times, so that every run writes the same bytes.

use serde::Serialize;
use serde_json::{Map, Value};
use uniarm_openai::decimal;
use uniarm_proto::{ChoiceTranscript, Refused, Transcript, transcript::finish_reason_name};

use crate::{
    failure::Failure,
    openai,
    request::{Form, Label},
};

/// An answer in our short form.
#[derive(Serialize)]
struct ShortAnswer<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    preference: Option<Map<String, Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    #[serde(flatten)]
    choice: Option<ShortChoice<'a>>,
    /// Where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    choices: Vec<ShortChoice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    meta: Option<&'a Value>,
}

#[derive(Serialize)]
struct ShortChoice<'a> {
    text: &'a str,
    tokens: usize,
    finish_reason: Option<&'static str>,
    /// Positions of tokens that were chosen without their reward.
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    unguided: &'a [u32],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<Detail>,
}

#[derive(Serialize)]
struct Detail {
    base_logprob: f32,
    reward_contribution: f32,
}

/// The line of output of a request, without its line end.
pub fn output_line(label: &Label, result: Result<&Transcript, &Refused>) -> String {
    if label.form != Form::Short {
        return openai::write_line(label, result);
    }
    let answer = ShortAnswer {
        id: &label.id,
        preference: label.preference.as_ref().map(|preference| {
            preference.iter().map(|(name, weight)| (name.clone(), decimal(*weight))).collect()
        }),
        seed: result.ok().and_then(|transcript| Some(transcript.started.as_ref()?.seed)),
        choice: result.ok().and_then(|transcript| match transcript.choices.as_slice() {
            [one] => Some(ShortChoice::of(one)),
            _ => None,
        }),
        choices: match result {
            Ok(transcript) if transcript.choices.len() != 1 => {
                transcript.choices.iter().map(ShortChoice::of).collect()
            }
            _ => Vec::new(),
        },
        error: result.err().map(Failure::from),
        meta: label.meta.as_ref(),
    };
    serde_json::to_string(&answer).expect("strings, numbers and lists")
}

// === impl ShortChoice ===

impl<'a> ShortChoice<'a> {
    fn of(choice: &'a ChoiceTranscript) -> Self {
        let detail = |detail: &uniarm_proto::pb::TokenDetail| Detail {
            base_logprob: detail.base_logprob,
            reward_contribution: detail.reward_contribution,
        };
        Self {
            text: &choice.text,
            tokens: choice.tokens.len(),
            finish_reason: choice.finished.as_ref().map(finish_reason_name),
            unguided: &choice.unguided,
            logprobs: choice.details.iter().map(detail).collect(),
        }
    }
}
