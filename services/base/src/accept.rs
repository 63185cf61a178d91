//! A placed request becomes what the engine works with: token ids, settings, a deadline. Off the engine's thread,
//! because tokenising a long prompt must not hold up a step.

use std::sync::Arc;

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::Instant,
};
use uniarm_decode::sampling::Sampling;
use uniarm_engine::prompt::{Prompt, Reader};
use uniarm_model::{ChatTemplate, Message, Tokenizer};
use uniarm_proto::{
    BaseModel, Event, Exchange, Generation, Input, Member, MemberId, Placed, Refusal, Role,
    TokenizerFingerprint, pb,
};
use uniarm_runtime::crowd::TenantPlace;

/// What a base worker serves and how.
pub struct BaseSettings {
    pub model: String,
    /// SHA-256 of the weights.
    pub fingerprint: [u8; 32],
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub context_tokens: usize,
    /// Logits of one row.
    pub vocabulary: usize,
    /// For requests that do not choose.
    pub exchange: Exchange,
    /// K of the lists.
    pub list_length: u32,
}

/// A request that the engine can start.
pub(crate) struct Accepted {
    pub(crate) placed: Placed,
    pub(crate) prompt: Vec<u32>,
    pub(crate) seed: u64,
    pub(crate) sampling: Sampling,
    /// 0: whole rows.
    pub(crate) list_length: u32,
    pub(crate) accepted_at: Instant,
    pub(crate) deadline: Option<Instant>,
    pub(crate) events: mpsc::Sender<Result<Event, Refusal>>,
    /// A place among the requests that this worker holds; given back when the request ends.
    pub(crate) permit: OwnedSemaphorePermit,
    /// The same among those of its tenant.
    pub(crate) place: TenantPlace,
    pub(crate) span: tracing::Span,
}

// === impl BaseSettings ===

impl BaseSettings {
    pub fn tokenizer_fingerprint(&self) -> TokenizerFingerprint {
        let own = self.tokenizer.fingerprint();
        TokenizerFingerprint { core: own.core, core_tokens: own.core_tokens, full: own.full }
    }

    /// What the store says of this worker; id, generation and address are its process's to fill in.
    pub fn member(&self) -> Member {
        Member {
            id: MemberId(String::new()),
            generation: Generation(0),
            role: Role::Base,
            address: String::new(),
            tokenizer: Some(self.tokenizer_fingerprint()),
            vocabulary: self.vocabulary as u32,
            capacity: 0,
            base_model: Some(BaseModel {
                name: self.model.clone(),
                context_tokens: self.context_tokens as u32,
                vocabulary: self.vocabulary as u32,
                has_chat_template: self.template.is_some(),
            }),
            reward_models: Vec::new(),
            group: self.model.clone(),
            rank: 0,
            size: 1,
            adapter_faults: Vec::new(),
        }
    }

    /// Who chooses a token that `rewards` have scored; the name of this worker is its server's to fill in.
    pub(crate) fn served(&self, rewards: Vec<pb::Scorer>) -> pb::Served {
        let weights = Bytes::copy_from_slice(&self.fingerprint);
        pb::Served { base: Some(pb::Scorer { weights, ..pb::Scorer::default() }), rewards }
    }

    /// Token ids of the request's input.
    pub(crate) fn read(&self, input: &Input) -> Result<Vec<u32>, Refusal> {
        let reader = Reader {
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            vocabulary: self.vocabulary,
        };
        let messages;
        let prompt = match input {
            Input::Prompt(text) => Prompt::Text(text),
            Input::Tokens(ids) => Prompt::Tokens(ids),
            Input::Chat(chat) => {
                messages = chat
                    .iter()
                    .map(|m| Message { role: m.role.clone(), content: m.content.clone() })
                    .collect::<Vec<_>>();
                Prompt::Chat(&messages)
            }
        };
        let tokens = reader.read(prompt, None).map_err(|error| Refusal::invalid("input", error))?;
        if tokens.len() >= self.context_tokens {
            let reason = format!(
                "has {} tokens, the context of {} is {} and the answer wants room",
                tokens.len(),
                self.model,
                self.context_tokens
            );
            return Err(Refusal::invalid("input", reason));
        }
        Ok(tokens)
    }

    /// K for this request. Alternatives want the guided distribution, and so whole rows.
    pub(crate) fn list_length_for(&self, placed: &Placed) -> u32 {
        let wants_distribution = placed.request.sampling.logprobs.unwrap_or(0) > 0;
        match placed.request.exchange.unwrap_or(self.exchange) {
            Exchange::Certified if !wants_distribution => self.list_length,
            Exchange::Certified | Exchange::Dense => 0,
        }
    }

    /// Refuses what only the model's owner can judge.
    pub(crate) fn check(&self, placed: &Placed) -> Result<(), Refusal> {
        let asked = &placed.request.model;
        if !asked.is_empty() && *asked != self.model {
            return Err(Refusal::not_found(
                "model",
                format!("{asked:?} is not served here, {:?} is", self.model),
            ));
        }
        let stop_ids = &placed.request.sampling.stop_token_ids;
        if let Some(id) = stop_ids.iter().find(|id| **id as usize >= self.vocabulary) {
            let reason = format!("{id} is outside the vocabulary of {}", self.vocabulary);
            return Err(Refusal::invalid("sampling.stop_token_ids", reason));
        }
        Ok(())
    }
}

pub(crate) fn decode_sampling(asked: &uniarm_proto::Sampling) -> Sampling {
    Sampling {
        temperature: asked.temperature,
        top_k: asked.top_k,
        top_p: asked.top_p,
        min_p: asked.min_p,
        repetition_penalty: asked.repetition_penalty,
        presence_penalty: asked.presence_penalty,
        frequency_penalty: asked.frequency_penalty,
    }
}

/// Shared by the engine's thread and the gRPC edge.
pub(crate) type SharedSettings = Arc<BaseSettings>;
