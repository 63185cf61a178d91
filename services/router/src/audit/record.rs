//! What is kept of one request, gathered from its events as they pass.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uniarm_proto::{GenerateRequest, Progress, digits::hexadecimal, pb, transcript::finish_reason_name};

/// One request, from its acceptance by this router to its end here.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Record {
    pub request_id: String,
    /// Empty where nobody asks who asks.
    pub tenant: String,
    /// Milliseconds since 1970.
    pub ended_at_ms: u64,
    /// `ok`; `cancelled` (its client hung up), `failed`, or `handed_over` (to another router, with the tokens so far).
    pub outcome: String,
    pub model: String,
    pub prompt_tokens: u32,
    /// As it was placed: seed drawn, each guidance term with its reward model.
    pub request: pb::GenerateRequest,
    pub answers: Vec<Answer>,
}

/// One of the n answers. The lists of details are as long as `ids` from `details_from` on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Answer {
    pub ids: Vec<u32>,
    /// Of the tokens from `details_from` on.
    pub text: String,
    /// Tokens before this one came with the request: another router has their details.
    pub details_from: usize,
    /// log π_base of each token; absent: not finite.
    pub base_logprobs: Vec<Option<f32>>,
    /// Σ strength · log π_reward of each token.
    pub reward_contributions: Vec<Option<f32>>,
    /// log π_reward of each token under each guidance term; none where a reward was missing.
    pub reward_logprobs: Vec<Vec<Option<f32>>>,
    /// Positions of tokens that were chosen without their reward.
    pub unguided: Vec<u32>,
    pub served: Vec<ServedFrom>,
    /// `stop`, `length` or `context`; absent: it had not ended.
    pub finish_reason: Option<String>,
    /// The stop string that ended it.
    pub stop: String,
}

/// Who computed the tokens from a position on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedFrom {
    pub position: u32,
    pub base: ScorerRecord,
    /// One for each guidance term; without a member: nobody.
    pub rewards: Vec<ScorerRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScorerRecord {
    pub member: String,
    pub generation: u64,
    /// SHA-256 of its model's weights, hexadecimal; of a reward worker its backbone's.
    pub weights: String,
}

/// A record that is being made.
#[derive(Debug, Default)]
pub(crate) struct Trail(Record);

// === impl Trail ===

impl Trail {
    /// `progress`: what the request came with.
    pub(crate) fn new(tenant: &str, request: &GenerateRequest, progress: &Progress) -> Self {
        let answer = |choice: u32| {
            let ids = progress.answer(choice).ids;
            Answer { details_from: ids.len(), ids, ..Answer::default() }
        };
        Self(Record {
            request_id: request.request_id.clone(),
            tenant: tenant.to_owned(),
            answers: (0..request.sampling.n).map(answer).collect(),
            ..Record::default()
        })
    }

    pub(crate) fn on_started(&mut self, started: &pb::Started) {
        self.0.model.clone_from(&started.model);
        self.0.prompt_tokens = started.prompt_tokens;
    }

    /// Tokens that were not there before, in the order of their positions.
    pub(crate) fn on_tokens(&mut self, tokens: &pb::Tokens) {
        let Some(answer) = self.0.answers.get_mut(tokens.choice as usize) else { return };
        if let Some(served) = &tokens.served {
            answer.served.push(ServedFrom::new(tokens.position, served));
        }
        answer.ids.extend_from_slice(&tokens.ids);
        answer.text.push_str(&tokens.text);
        answer.unguided.extend(tokens.unguided.iter().map(|index| tokens.position + index));
        for detail in &tokens.details {
            answer.add(detail);
        }
    }

    pub(crate) fn on_finished(&mut self, finished: &pb::Finished) {
        let Some(answer) = self.0.answers.get_mut(finished.choice as usize) else { return };
        answer.finish_reason = Some(finish_reason_name(finished).to_owned());
        answer.stop.clone_from(&finished.stop);
    }

    /// `request`: as it was placed.
    pub(crate) fn end(self, outcome: &str, request: GenerateRequest) -> Record {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Record {
            ended_at_ms: now.as_millis() as u64,
            outcome: outcome.to_owned(),
            request: request.into(),
            ..self.0
        }
    }
}

// === impl Answer ===

impl Answer {
    /// What was thought of its next token.
    pub fn add(&mut self, detail: &pb::TokenDetail) {
        self.base_logprobs.push(finite(detail.base_logprob));
        self.reward_contributions.push(finite(detail.reward_contribution));
        self.reward_logprobs.push(detail.reward_logprobs.iter().copied().map(finite).collect());
    }
}

/// JSON has no other numbers.
fn finite(number: f32) -> Option<f32> {
    number.is_finite().then_some(number)
}

// === impl ServedFrom ===

impl ServedFrom {
    #[must_use]
    pub fn new(position: u32, served: &pb::Served) -> Self {
        Self {
            position,
            base: ScorerRecord::from(&served.base.clone().unwrap_or_default()),
            rewards: served.rewards.iter().map(ScorerRecord::from).collect(),
        }
    }
}

impl From<&pb::Scorer> for ScorerRecord {
    fn from(scorer: &pb::Scorer) -> Self {
        Self {
            member: scorer.member.clone(),
            generation: scorer.generation,
            weights: hexadecimal(&scorer.weights),
        }
    }
}

#[cfg(test)]
mod tests {
    use uniarm_proto::{GuidanceTerm, Input, Sampling};

    use super::*;

    fn tokens(position: u32, id: u32, reward: f32) -> pb::Tokens {
        let detail = pb::TokenDetail {
            base_logprob: -0.1,
            reward_contribution: 0.3,
            reward_logprobs: vec![reward],
            ..pb::TokenDetail::default()
        };
        pb::Tokens { position, ids: vec![id], details: vec![detail], ..pb::Tokens::default() }
    }

    #[test]
    fn it_survives_json_to_the_bit() {
        let request = GenerateRequest {
            guidance: vec![GuidanceTerm {
                reward: "r".into(),
                preference: vec![("a".into(), 0.1)],
                strength: 1.7,
            }],
            sampling: Sampling { seed: Some(u64::MAX), n: 2, temperature: 0.7, ..Sampling::default() },
            ..GenerateRequest::new(Input::Tokens(vec![1, 2]))
        };
        let mut trail = Trail::new("t", &request, &Progress::default());
        trail.on_tokens(&tokens(0, 5, f32::NEG_INFINITY));
        trail.on_tokens(&tokens(1, 6, -1.0 / 3.0));
        let record = trail.end("ok", request.clone());
        let text = serde_json::to_string(&record).unwrap();
        let read: Record = serde_json::from_str(&text).unwrap();
        assert_eq!(read, record);
        assert_eq!(GenerateRequest::try_from(read.request).unwrap(), request);
        assert_eq!(read.answers[0].ids, [5, 6]);
        assert_eq!(read.answers[0].reward_logprobs, [vec![None], vec![Some(-1.0 / 3.0)]]);
        assert_eq!(read.answers[1], Answer::default(), "the second one has not begun");
    }
}
