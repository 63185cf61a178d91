//! What a token's details are in OpenAI's terms: log-probabilities of the guided distribution, and beside them what the
//! base model thought of the token and what the reward added.

use serde_json::{Map, Value, json};
use uniarm_proto::pb;

/// Tokens of one answer with their details.
pub(crate) struct Detailed<'a> {
    pub(crate) ids: &'a [u32],
    pub(crate) details: &'a [pb::TokenDetail],
    /// Alternatives to show.
    pub(crate) shown: usize,
}

/// The text of a token alone, and its log-probability under the guided distribution.
struct Chosen<'a> {
    text: &'a str,
    logprob: f32,
}

// === impl Detailed ===

impl Detailed<'_> {
    /// `logprobs` of a chat's choice.
    pub(crate) fn of_chat(&self) -> Value {
        let entries = self.each().map(|(id, detail)| {
            let chosen = chosen(id, detail);
            let top = detail.alternatives.iter().take(self.shown).map(|other| {
                let mut entry = entry(&other.text, other.guided_logprob);
                entry["uniarm"] = extension(other.id, other.base_logprob, other.reward_contribution);
                entry
            });
            let mut entry = entry(chosen.text, chosen.logprob);
            entry["top_logprobs"] = top.collect();
            entry["uniarm"] = of_token(id, detail);
            entry
        });
        json!({ "content": entries.collect::<Vec<_>>(), "refusal": null })
    }

    /// `logprobs` of a completion's choice. `offset`: characters of the answer's tokens before these.
    pub(crate) fn of_completion(&self, mut offset: usize) -> Value {
        let (mut tokens, mut logprobs, mut tops) = (Vec::new(), Vec::new(), Vec::new());
        let (mut offsets, mut extensions) = (Vec::new(), Vec::new());
        for (id, detail) in self.each() {
            let chosen = chosen(id, detail);
            let shown = detail.alternatives.iter().take(self.shown);
            let mut top: Map<_, _> =
                shown.map(|other| (other.text.clone(), decimal(other.guided_logprob))).collect();
            // As OpenAI has it: the chosen one is there, whether it is among the best or not.
            top.entry(chosen.text).or_insert_with(|| decimal(chosen.logprob));
            tokens.push(json!(chosen.text));
            logprobs.push(decimal(chosen.logprob));
            tops.push(Value::Object(top));
            offsets.push(json!(offset));
            extensions.push(of_token(id, detail));
            offset += chosen.text.chars().count();
        }
        json!({
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
            "uniarm": extensions,
        })
    }

    /// Characters of these tokens, each by itself.
    pub(crate) fn characters(&self) -> usize {
        self.each().map(|(id, detail)| chosen(id, detail).text.chars().count()).sum()
    }

    fn each(&self) -> impl Iterator<Item = (u32, &pb::TokenDetail)> {
        self.ids.iter().copied().zip(self.details)
    }
}

/// The chosen token is among its alternatives, because one at least was asked for.
fn chosen(id: u32, detail: &pb::TokenDetail) -> Chosen<'_> {
    let found = detail.alternatives.iter().find(|other| other.id == id);
    found.map_or(Chosen { text: "", logprob: detail.base_logprob }, |other| Chosen {
        text: &other.text,
        logprob: other.guided_logprob,
    })
}

fn entry(text: &str, logprob: f32) -> Value {
    // A token that holds a part of a character alone has no text of its own.
    let bytes = (!text.contains(char::REPLACEMENT_CHARACTER)).then_some(text.as_bytes());
    json!({ "token": text, "logprob": decimal(logprob), "bytes": bytes })
}

fn extension(id: u32, base_logprob: f32, reward_contribution: f32) -> Value {
    json!({ "id": id, "base_logprob": decimal(base_logprob), "reward_contribution": decimal(reward_contribution) })
}

fn of_token(id: u32, detail: &pb::TokenDetail) -> Value {
    let mut extension = extension(id, detail.base_logprob, detail.reward_contribution);
    extension["reward_logprobs"] = detail.reward_logprobs.iter().copied().map(decimal).collect();
    extension
}

/// A number as short as its 32 bits are; widened to 64, it would print digits that say nothing.
pub fn decimal(number: f32) -> Value {
    number.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alternative(id: u32, text: &str, guided_logprob: f32) -> pb::Alternative {
        pb::Alternative { id, text: text.into(), guided_logprob, ..pb::Alternative::default() }
    }

    #[test]
    fn the_chosen_token_is_found_among_one_more_than_is_shown() {
        let detail = pb::TokenDetail {
            base_logprob: -3.0,
            reward_contribution: -0.5,
            reward_logprobs: vec![-0.25],
            alternatives: vec![alternative(1, "a", -0.1), alternative(9, " é", -4.0)],
        };
        let detailed = Detailed { ids: &[9], details: &[detail], shown: 1 };
        let chat = detailed.of_chat();
        let entry = &chat["content"][0];
        assert_eq!((&entry["token"], &entry["logprob"]), (&json!(" é"), &json!(-4.0)));
        assert_eq!(entry["bytes"], json!([32, 195, 169]));
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 1);
        assert_eq!(entry["uniarm"]["base_logprob"], json!(-3.0));
        assert_eq!(entry["uniarm"]["reward_logprobs"], json!([-0.25]));
        let completion = detailed.of_completion(7);
        assert_eq!(completion["text_offset"], json!([7]));
        assert_eq!(completion["top_logprobs"], json!([{ "a": -0.1, " é": -4.0 }]));
        assert_eq!(detailed.characters(), 2);
    }

    #[test]
    fn half_a_character_has_no_bytes() {
        assert_eq!(entry("\u{fffd}", -1.0)["bytes"], Value::Null);
    }
}
