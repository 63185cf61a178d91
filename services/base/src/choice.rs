//! One answer to a request: its rows, its terms, and the decision for its next token (design: the certificate).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use uniarm_decode::{
    Choice as Verdict, Chooser, History, Noise, Position, Sampling, TextStream, guidance::log_sum_exp,
    guidance::top_list, scheduler::SequenceId,
};
use uniarm_model::Tokenizer;
use uniarm_proto::{OnRewardLoss, pb};

use crate::{
    guide::Links,
    metrics::BaseMetrics,
    term::{Term, TermRow},
};

/// One of the n answers.
pub(crate) struct Choice {
    pub(crate) request: RequestKey,
    pub(crate) number: u32,
    pub(crate) sequence: SequenceId,
    pub(crate) prompt_tokens: usize,
    pub(crate) answer: Vec<u32>,
    pub(crate) terms: Vec<Term>,
    pub(crate) text: TextStream,
    pub(crate) last_token_at: Option<Instant>,
    history: History,
    noise: Noise,
    /// The base model's logits for the next token; reused.
    row: Vec<f32>,
    /// Since when they are there.
    row_since: Option<Instant>,
    /// What the next token has needed so far.
    need: Mode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RequestKey(pub(crate) u64);

/// What a guided token needed from the reward workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// The lists alone.
    Certified,
    /// Named logits beyond the lists.
    Queried,
    /// Whole rows.
    Dense,
}

/// What a decision depends on besides the answer itself.
pub(crate) struct Rules<'a> {
    pub(crate) sampling: &'a Sampling,
    pub(crate) on_loss: OnRewardLoss,
    /// Token details are wanted, with that many alternatives.
    pub(crate) logprobs: Option<u32>,
    pub(crate) tokenizer: &'a Tokenizer,
}

/// A decision.
pub(crate) struct Chosen {
    pub(crate) token: u32,
    /// `None`: the request has no guidance, or this token did without.
    pub(crate) mode: Option<Mode>,
    pub(crate) unguided: bool,
    pub(crate) detail: Option<pb::TokenDetail>,
    /// How long the base row waited for the last reward row.
    pub(crate) stalled: Duration,
}

// === impl Mode ===

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Certified => "certified",
            Self::Queried => "queried",
            Self::Dense => "dense",
        }
    }
}

// === impl Choice ===

impl Choice {
    pub(crate) fn new(
        request: RequestKey,
        sequence: SequenceId,
        prompt: &[u32],
        noise: (u64, u32),
        stops: Vec<String>,
    ) -> Self {
        let (seed, number) = noise;
        Self {
            request,
            number,
            sequence,
            prompt_tokens: prompt.len(),
            answer: Vec::new(),
            terms: Vec::new(),
            text: TextStream::new(stops),
            last_token_at: None,
            history: History::new(prompt),
            noise: Noise::new(seed, number),
            row: Vec::new(),
            row_since: None,
            need: Mode::Certified,
        }
    }

    /// The base model's logits for the token after the one at `index`.
    pub(crate) fn on_base_row(&mut self, index: usize, logits: &[f32]) {
        debug_assert_eq!(index + 1, self.prompt_tokens + self.answer.len());
        self.row.clear();
        self.row.extend_from_slice(logits);
        self.row_since = Some(Instant::now());
    }

    /// Chooses the next token if everything it needs is here, or asks for what is missing.
    pub(crate) fn decide(
        &mut self,
        rules: &Rules<'_>,
        choosers: &mut HashMap<usize, Chooser>,
        links: &mut Links,
        metrics: &BaseMetrics,
    ) -> Option<Chosen> {
        let row_since = self.row_since?;
        let may_miss = |term: &Term| rules.on_loss == OnRewardLoss::Unguided && term.is_lost();
        if self.terms.iter().any(|term| term.row().is_none() && !may_miss(term)) {
            return None;
        }
        let stalled = row_since.elapsed();
        let vocabulary =
            self.terms.iter().filter_map(Term::vocabulary).fold(self.row.len(), |least, own| least.min(own));
        let base = &self.row[..vocabulary];
        let rows: Vec<(f32, &TermRow)> =
            self.terms.iter().filter_map(|term| Some((term.asked.strength, term.row()?))).collect();
        let position = self.answer.len();
        let terms: Vec<_> = rows.iter().map(|(strength, row)| row.as_decode(*strength, vocabulary)).collect();
        let began = Instant::now();
        let chooser = choosers.entry(vocabulary).or_insert_with(|| Chooser::new(vocabulary));
        let verdict = chooser.choose(&Position {
            base,
            terms: &terms,
            sampling: rules.sampling,
            history: &self.history,
            noise: &self.noise,
            position: position as u32,
        });
        metrics.choose.observe(began.elapsed().as_secs_f64());
        let token = match verdict {
            Verdict::Token(token) => token,
            Verdict::Query(ids) => {
                metrics.query_ids.observe(ids.len() as f64);
                self.ask(Mode::Queried, &ids, links);
                return None;
            }
            Verdict::Dense => {
                self.ask(Mode::Dense, &[], links);
                return None;
            }
        };
        if rows.iter().any(|(_, row)| row.is_whole()) {
            self.need = Mode::Dense;
        }
        Some(Chosen {
            token,
            mode: (!rows.is_empty()).then_some(self.need),
            unguided: rows.len() < self.terms.len(),
            detail: rules.logprobs.map(|count| detail(token, count as usize, base, &rows, rules.tokenizer)),
            stalled,
        })
    }

    /// Takes the chosen token in: reward workers go on with it, and the rows of its position are spent.
    pub(crate) fn accept(&mut self, token: u32, links: &mut Links) {
        let position = self.answer.len();
        for term in &mut self.terms {
            term.advance(position, token, links);
        }
        self.push(token);
    }

    /// The same for the last token, after which no row is wanted.
    pub(crate) fn accept_last(&mut self, token: u32, links: &mut Links) {
        for term in &mut self.terms {
            term.close(links);
        }
        self.push(token);
    }

    pub(crate) fn close(&mut self, links: &mut Links) {
        for term in &mut self.terms {
            term.close(links);
        }
    }

    /// Tokens that the answer may have: every model that reads it needs room.
    pub(crate) fn room(&self, context_tokens: usize) -> usize {
        let rewards = self.terms.iter().map(Term::answer_tokens_max);
        rewards.fold(context_tokens - self.prompt_tokens, usize::min)
    }

    fn push(&mut self, token: u32) {
        self.history.push(token);
        self.answer.push(token);
        self.row_since = None;
        self.need = Mode::Certified;
        self.last_token_at = Some(Instant::now());
    }

    /// Asks every list for `ids` that it lacks, or for its whole row.
    fn ask(&mut self, mode: Mode, ids: &[u32], links: &mut Links) {
        self.need = self.need.max(mode);
        let position = self.answer.len();
        for term in &mut self.terms {
            let Some(row) = term.row() else { continue };
            if row.is_whole() {
                continue;
            }
            let missing: Vec<u32> = ids.iter().copied().filter(|id| !row.knows(*id)).collect();
            if mode == Mode::Dense || !missing.is_empty() {
                term.query(position, &missing, links);
            }
        }
    }
}

/// What the reward changed, for one token. Alternatives need whole rows, which such requests ask for.
fn detail(
    token: u32,
    alternatives: usize,
    base: &[f32],
    rows: &[(f32, &TermRow)],
    tokenizer: &Tokenizer,
) -> pb::TokenDetail {
    let base_normalizer = log_sum_exp(base);
    let contribution = |id: u32| {
        let of = |(strength, row): &(f32, &TermRow)| strength * row.log_probability(id).unwrap_or(0.0);
        rows.iter().map(of).sum::<f32>()
    };
    let mut detail = pb::TokenDetail {
        base_logprob: base[token as usize] - base_normalizer,
        reward_contribution: contribution(token),
        alternatives: Vec::new(),
    };
    if alternatives == 0 {
        return detail;
    }
    let mut guided = base.to_vec(); // (vocabulary)
    for (strength, row) in rows {
        for (id, sum) in guided.iter_mut().enumerate() {
            *sum += strength * row.logit(id as u32).unwrap_or(f32::NEG_INFINITY);
        }
    }
    let guided_normalizer = log_sum_exp(&guided);
    let mut ids = top_list(&guided, alternatives).ids().to_vec();
    if !ids.contains(&token) {
        ids.pop();
        ids.push(token);
    }
    detail.alternatives = ids
        .into_iter()
        .map(|id| pb::Alternative {
            id,
            text: String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned(),
            base_logprob: base[id as usize] - base_normalizer,
            reward_contribution: contribution(id),
            guided_logprob: guided[id as usize] - guided_normalizer,
        })
        .collect();
    detail
}
