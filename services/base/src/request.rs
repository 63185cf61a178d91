//! One running request: what it was accepted with, what it has used, and what its client hears at the end.

use std::time::Duration;

use bytes::Bytes;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use uniarm_decode::{Sampling, scheduler::SequenceId};
use uniarm_proto::{Open, Placed, Sampling as AskedSampling, SessionPace, pb};
use uniarm_runtime::{crowd::TenantPlace, trace};

use crate::{
    accept::{Accepted, BaseSettings},
    choice::{Chosen, Mode},
    metrics::{BaseMetrics, ModeLabel},
    outlet::Outlet,
    term::Term,
};

/// A request that runs.
pub(crate) struct Request {
    pub(crate) placed: Placed,
    pub(crate) sampling: Sampling,
    pub(crate) seed: u64,
    /// K; 0: whole rows.
    list_length: u32,
    /// Sum of the strengths of all terms.
    strength: f32,
    pub(crate) outlet: Outlet,
    /// Answers that are not finished.
    pub(crate) running: Vec<SequenceId>,
    accepted_at: Instant,
    pub(crate) deadline: Option<Instant>,
    pub(crate) planned_at: Option<Instant>,
    first_token_at: Option<Instant>,
    last_token_at: Option<Instant>,
    stalled: Duration,
    pub(crate) usage: pb::Usage,
    pub(crate) exchange: pb::ExchangeUse,
    pub(crate) speculation: pb::Speculation,
    _permit: (OwnedSemaphorePermit, TenantPlace),
    span: tracing::Span,
}

// === impl Request ===

impl Request {
    /// A request with what it was accepted with, and its prompt.
    pub(crate) fn new(accepted: Accepted) -> (Self, Vec<u32>) {
        let Accepted {
            placed,
            prompt,
            seed,
            sampling,
            list_length,
            accepted_at,
            deadline,
            events,
            permit,
            place,
            span,
        } = accepted;
        let usage = pb::Usage {
            prompt_tokens: prompt.len() as u32,
            completion_tokens: placed.progress.tokens() as u32,
            unguided_tokens: placed.progress.unguided_tokens(),
            ..pb::Usage::default()
        };
        let request = Self {
            strength: placed.request.guidance.iter().map(|term| term.strength).sum(),
            placed,
            sampling,
            seed,
            list_length,
            outlet: Outlet::new(events),
            running: Vec::new(),
            accepted_at,
            deadline,
            planned_at: None,
            first_token_at: None,
            last_token_at: None,
            stalled: Duration::ZERO,
            usage,
            exchange: pb::ExchangeUse::default(),
            speculation: pb::Speculation::default(),
            _permit: (permit, place),
            span,
        };
        (request, prompt)
    }

    pub(crate) fn started(&self, model: &str) -> pb::Started {
        pb::Started {
            request_id: self.placed.request.request_id.clone(),
            model: model.to_owned(),
            seed: self.seed,
            prompt_tokens: self.usage.prompt_tokens,
            guidance: self.placed.request.guidance.iter().cloned().map(Into::into).collect(),
            base_strength: Some(self.placed.request.base_strength),
        }
    }

    /// Books one token.
    pub(crate) fn count(&mut self, chosen: &Chosen, metrics: &BaseMetrics, previous: Option<Instant>) {
        let now = Instant::now();
        if self.first_token_at.is_none() {
            self.first_token_at = Some(now);
            let waited = (now - self.accepted_at).as_secs_f64();
            metrics.first_token.observe(waited, trace::label(&self.span), None);
        }
        if let Some(previous) = previous {
            metrics.inter_token.observe((now - previous).as_secs_f64());
        }
        self.last_token_at = Some(now);
        self.usage.completion_tokens += 1;
        metrics.tokens.inc();
        if chosen.unguided {
            self.usage.unguided_tokens += 1;
            metrics.unguided.inc();
        }
        if let Some(mode) = chosen.mode {
            self.stalled += chosen.stalled;
            metrics.reward_wait.observe(chosen.stalled.as_secs_f64());
            metrics.decided.get_or_create(&ModeLabel { mode: mode.name() }).inc();
            match mode {
                Mode::Certified => self.exchange.certified += 1,
                Mode::Queried => self.exchange.queried += 1,
                Mode::Dense => self.exchange.dense += 1,
            }
        }
    }

    pub(crate) fn summary(&self) -> pb::Summary {
        let milliseconds = |until: Option<Instant>| {
            until.map_or(0.0, |until| (until - self.accepted_at).as_secs_f64() * 1e3)
        };
        pb::Summary {
            usage: Some(self.usage),
            timing: Some(pb::Timing {
                queue_ms: milliseconds(self.planned_at),
                first_token_ms: milliseconds(self.first_token_at),
                total_ms: milliseconds(self.last_token_at),
                reward_stall_ms: self.stalled.as_secs_f64() * 1e3,
            }),
            exchange: Some(self.exchange),
            speculation: Some(self.speculation),
            // The router's to fill in.
            audit: Bytes::new(),
        }
    }

    pub(crate) fn log(&self, outcome: &'static str) {
        let _entered = self.span.enter();
        tracing::info!(
            request = self.placed.request.request_id,
            outcome,
            prompt_tokens = self.usage.prompt_tokens,
            completion_tokens = self.usage.completion_tokens,
            certified = self.exchange.certified,
            queried = self.exchange.queried,
            base_passes = self.speculation.base_passes,
            drafted = self.speculation.drafted,
            accepted = self.speculation.accepted,
            dense = self.exchange.dense,
            milliseconds = self.accepted_at.elapsed().as_millis() as u64,
            "request ended"
        );
    }

    /// Lists that are ranked with the noise certify more tokens, unless filters look at logits without it.
    fn noise_scale(&self, term: &Term) -> f32 {
        if self.sampling.is_greedy() || self.sampling.has_filters() || term.asked.strength <= 0.0 {
            return 0.0;
        }
        term.asked.strength / self.sampling.temperature
    }

    /// What ranks the base model's tokens, if a list of its likeliest ones may stand for its row: scale, and whether with
    /// noise. Whole rows are wanted for filters and for penalties that may raise a logit, which look at all tokens; for
    /// details, which say how probable the token was; beside whole rows of a reward, and strengths that turn a ranking around.
    pub(crate) fn base_ranking(&self) -> Option<(f32, bool)> {
        let asked = &self.placed.request;
        let sparse = asked.guidance.is_empty() || self.list_length > 0;
        let upright = asked.base_strength > 0.0 && asked.guidance.iter().all(|term| term.strength >= 0.0);
        let scale = asked.base_strength / self.sampling.divisor();
        let suits = self.sampling.suits_lists() && asked.sampling.logprobs.is_none() && sparse && upright;
        (suits && scale.is_normal()).then_some((scale, !self.sampling.is_greedy()))
    }

    /// K of a term's lists; 0: whole rows. The lower tail certifies nothing, so a negative strength wants all of a row.
    pub(crate) fn list_length(&self, term: &Term) -> u32 {
        if term.asked.strength < 0.0 { 0 } else { self.list_length }
    }

    /// What opens a session of one of its answers: of that number, with so much of it chosen.
    pub(crate) fn open_message(
        &self,
        settings: &BaseSettings,
        (number, answer): (u32, &[u32]),
        term: &Term,
        pace: SessionPace,
    ) -> Open {
        // Stop strings are this worker's business, and may be long.
        let sampling = AskedSampling { stop: Vec::new(), ..self.placed.request.sampling.clone() };
        Open {
            reward: term.asked.reward.clone(),
            preference: term.asked.preference.clone(),
            input: self.placed.request.input.clone(),
            answer: answer.to_vec(),
            list_length: self.list_length(term),
            priority: self.placed.request.priority,
            tokenizer: Some(settings.tokenizer_fingerprint()),
            vocabulary: settings.vocabulary as u32,
            seed: self.seed,
            choice: number,
            answer_tokens_max: self.placed.request.sampling.max_tokens,
            noise_scale: self.noise_scale(term),
            sampling,
            strength: self.strength,
            base_strength: self.placed.request.base_strength,
            tenant: self.placed.tenant,
            pace,
            wants_normalizer: self.placed.request.sampling.logprobs.is_some(),
        }
    }
}
