//! One answer to a request: its rows, its terms, and the decision for its next token (design: the certificate).

mod detail;
mod rows;

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;
use uniarm_decode::{
    Choice as Verdict, Chooser, History, Noise, Position, Sampling, Term as DecodeTerm, TermLogits,
    TextStream, guidance::weigh_base, scheduler::SequenceId,
};
use uniarm_engine::{Logits, LogitsRow};
use uniarm_model::{Likeliest, NoiseAt, Tokenizer};
use uniarm_proto::{Draft, OnRewardLoss, Sampling as AskedSampling, SessionGeneration, pb};

use self::{
    detail::{WholeRow, detail, reward_logprobs},
    rows::{BaseLogits, BaseRow, BaseRows},
};
use crate::{
    guide::{LinkId, Links},
    metrics::BaseMetrics,
    term::{Term, TermRow},
};

/// Tokens of the base model's list, for answers with guidance and without: where a list of so many decides nothing, the
/// row behind it comes after it. A token with guidance has to be among them unless it is certain that none of the others is
/// better; without, the first few decide. Lists twice or half as long make more bytes travel (docs/shards.md).
const GUIDED_LIST: usize = 128;
const UNGUIDED_LIST: usize = 8;

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
    /// Which of the terms drafts ahead.
    pub(crate) drafter: Option<usize>,
    /// Positions that gather before the base model verifies them.
    pub(crate) gather: usize,
    /// When its pace was set last at a token, and how many tokens it had then.
    pub(crate) paced_at: Option<(Instant, usize)>,
    history: History,
    noise: Noise,
    rows: BaseRows,
    /// Workspace: the row of the next token, times the base model's strength.
    weighed: Vec<f32>,
    /// Drafts that the base model's sequence holds after the answer.
    ahead: VecDeque<u32>,
    /// The last token of the answer is not in the base model's sequence yet.
    is_last_pending: bool,
    /// What the next token has needed so far.
    need: Mode,
    /// The sessions whose rows chose the last token, if its details were wanted.
    scored_by: Option<Vec<Option<(LinkId, SessionGeneration)>>>,
}

/// What becomes of the next token.
pub(crate) enum Decision {
    /// Something is missing that is on its way.
    Waits,
    /// The base model's list of this number decides nothing: the row behind it is needed, which follows the token at this
    /// index.
    NeedsRow {
        number: u64,
        index: usize,
    },
    Chosen(Chosen),
}

/// What followed from a chosen token.
pub(crate) struct Settled {
    /// The draft that it was compared with.
    pub(crate) draft: Option<Draft>,
    /// The base model's sequence went on with another token: only so many tokens of it are right.
    pub(crate) keep: Option<usize>,
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
    /// Weight of the base model's logits.
    pub(crate) base_strength: f32,
    pub(crate) on_loss: OnRewardLoss,
    /// Token details are wanted, with that many alternatives.
    pub(crate) logprobs: Option<u32>,
    pub(crate) tokenizer: &'a Tokenizer,
    /// Of the base model.
    pub(crate) vocabulary: usize,
}

/// What an answer says with a token, and whether it ends with it.
#[derive(Default)]
pub(crate) struct Said {
    pub(crate) text: String,
    /// The stop string that ended it.
    pub(crate) stop: String,
    pub(crate) reason: Option<pb::FinishReason>,
}

/// A decision.
pub(crate) struct Chosen {
    pub(crate) token: u32,
    /// `None`: the request has no guidance, or this token did without.
    pub(crate) mode: Option<Mode>,
    pub(crate) unguided: bool,
    pub(crate) detail: Option<pb::TokenDetail>,
    /// Who scored it, for each term; only with details, and where it is not who scored the token before.
    pub(crate) scorers: Option<Vec<pb::Scorer>>,
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
            drafter: None,
            gather: 1,
            paced_at: None,
            history: History::new(prompt),
            noise: Noise::new(seed, number),
            rows: BaseRows::default(),
            weighed: Vec::new(),
            ahead: VecDeque::new(),
            is_last_pending: false,
            need: Mode::Certified,
            scored_by: None,
        }
    }

    /// Takes in the tokens that it has already, through the same steps as tokens that are chosen here: text that is held
    /// back, unfinished characters and penalties are where they were. Returns what the last one said.
    ///
    /// # Errors
    /// With the index of a token that ended the answer before its last one.
    pub(crate) fn resume(
        &mut self,
        ids: &[u32],
        mut say: impl FnMut(&mut Self, u32) -> Said,
    ) -> Result<Said, usize> {
        let mut last = Said::default();
        for (index, id) in ids.iter().enumerate() {
            if last.reason.is_some() {
                return Err(index - 1);
            }
            last = say(self, *id);
            self.history.push(*id);
            self.answer.push(*id);
        }
        Ok(last)
    }

    /// Appends the next token's text; the token itself is accepted after it.
    pub(crate) fn say(
        &mut self,
        token: u32,
        asked: &AskedSampling,
        tokenizer: &Tokenizer,
        context_tokens: usize,
    ) -> Said {
        let length = self.answer.len() + 1;
        let mut said = Said::default();
        if ends(tokenizer, asked, token) {
            said.reason = Some(pb::FinishReason::Stop);
        } else {
            let delta = self.text.push(tokenizer.token_bytes(token));
            said.text = delta.text;
            if let Some(index) = delta.stop {
                said.reason = Some(pb::FinishReason::Stop);
                said.stop.clone_from(&asked.stop[index]);
            } else if length >= asked.max_tokens as usize {
                said.reason = Some(pb::FinishReason::Length);
            } else if length >= self.room(context_tokens) {
                said.reason = Some(pb::FinishReason::Context);
            }
        }
        if said.reason.is_some() && said.stop.is_empty() {
            said.text.push_str(&self.text.finish());
        }
        said
    }

    pub(crate) fn finished(&self, reason: pb::FinishReason, stop: String) -> pb::Finished {
        pb::Finished {
            choice: self.number,
            reason: reason as i32,
            completion_tokens: self.answer.len() as u32,
            stop,
        }
    }

    /// The strongest of the terms drafts: its logits say most about the token.
    pub(crate) fn choose_drafter(&mut self) {
        let strengths = self.terms.iter().map(|term| term.asked.strength).enumerate();
        let strongest = strengths.filter(|(_, strength)| *strength > 0.0).max_by(|a, b| a.1.total_cmp(&b.1));
        self.drafter = strongest.map(|(index, _)| index);
    }

    /// The list that would do in place of the base model's rows after the token at `index` and those behind it, where the
    /// request allows lists, ranked by `ranking` (see [`Request::base_ranking`](crate::request::Request::base_ranking)).
    pub(crate) fn base_list(&self, index: usize, (scale, with_noise): (f32, bool)) -> Option<Likeliest> {
        if !self.rows.suit_lists() {
            return None;
        }
        let count = if self.terms.is_empty() { UNGUIDED_LIST } else { GUIDED_LIST };
        let position = (index + 1 - self.prompt_tokens) as u32;
        let at = NoiseAt { seed: self.noise.seed(), choice: self.noise.choice(), position };
        Some(Likeliest { count, scale, noise: with_noise.then_some(at) })
    }

    /// The base model's logits for the token after the one at `index`.
    pub(crate) fn on_base_row(&mut self, index: usize, logits: Logits) {
        debug_assert_eq!(index + 1, self.prompt_tokens + self.answer.len() + self.rows.len());
        self.rows.push(logits);
    }

    /// Another step of the base model is computed, which writes where the latest one did.
    pub(crate) fn keep_rows(&mut self) {
        self.rows.keep();
    }

    /// Since when the base model's logits for the next token are here.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        self.rows.next().map(|row| row.since)
    }

    /// The stream of an answer that advances token by token and has its base row: such answers gain by going together.
    /// `None` for those that draft, and for those whose reward still reads the prompt.
    pub(crate) fn lock_step_link(&self) -> Option<LinkId> {
        let begun = self.rows.next().is_some() && !self.answer.is_empty();
        let term = self.terms.first().filter(|_| begun && self.gather <= 1)?;
        Some(term.link())
    }

    pub(crate) fn has_reward_rows(&self) -> bool {
        self.terms.iter().all(|term| term.row().is_some())
    }

    /// Tokens that the base model computes next: the last chosen one, and the drafts that have arrived for the
    /// positions up to `room`. None, while it is worth waiting for more drafts, or for a verdict on those that are computed.
    pub(crate) fn feed(&mut self, room: usize, ends: impl Fn(u32) -> bool) -> Vec<u32> {
        // The next token is in question: base and reward model disagree about it, so that its draft is often wrong, and
        // what follows it. An answer to a question is here sooner than a pass over what follows.
        if self.need > Mode::Certified {
            return Vec::new();
        }
        let next = self.answer.len();
        let drafter = self.drafter.map(|index| &self.terms[index]);
        // A draft is worth computing if a token may follow it.
        let useful = room.saturating_sub(next + 1);
        let drafts: Vec<u32> = drafter.map_or_else(Vec::new, |term| term.drafts().take(useful).collect());
        let path: Vec<u32> = drafts.iter().copied().take_while(|token| !ends(*token)).collect();
        // A worker that took over may draft otherwise than the one before: then what is computed is judged first.
        let is_continued = path.iter().zip(&self.ahead).all(|(draft, ahead)| draft == ahead);
        let fresh = path.get(self.ahead.len()..).filter(|_| is_continued).unwrap_or_default();
        let positions = usize::from(self.is_last_pending) + fresh.len();
        let may_grow = path.len() == drafts.len()
            && path.len() < useful
            && drafter.is_some_and(|term| term.is_drafting(path.len()));
        if positions < self.gather && may_grow {
            return Vec::new();
        }
        let last = self.is_last_pending.then(|| self.answer[next - 1]);
        let tokens = last.into_iter().chain(fresh.iter().copied()).collect();
        self.ahead.extend(fresh);
        self.is_last_pending = false;
        tokens
    }

    /// Has every other term compute the drafts of the one that drafts.
    pub(crate) fn share_drafts(&mut self, room: usize, links: &mut Links) {
        let Some(drafter) = self.drafter.filter(|_| self.terms.len() > 1) else { return };
        let next = self.answer.len();
        let useful = room.saturating_sub(next + 1);
        let path: Vec<u32> = self.terms[drafter].drafts().take(useful).collect();
        for (index, term) in self.terms.iter_mut().enumerate() {
            if index != drafter {
                term.follow(next, &path, links);
            }
        }
    }

    /// Tells the reward workers which of their drafts were right, where no correction told them.
    pub(crate) fn give_verdicts(&mut self, links: &mut Links) {
        let next = self.answer.len();
        self.terms.iter_mut().for_each(|term| term.give_verdict(next, links));
    }

    /// Chooses the next token if everything it needs is here, or asks for what is missing.
    pub(crate) fn decide(
        &mut self,
        rules: &Rules<'_>,
        choosers: &mut HashMap<usize, Chooser>,
        links: &mut Links,
        metrics: &BaseMetrics,
    ) -> Decision {
        let Some(BaseRow { logits, since }) = self.rows.next() else { return Decision::Waits };
        let may_miss = |term: &Term| rules.on_loss == OnRewardLoss::Unguided && term.is_lost();
        if self.terms.iter().any(|term| term.row().is_none() && !may_miss(term)) {
            return Decision::Waits;
        }
        let stalled = since.elapsed();
        let vocabularies = self.terms.iter().filter_map(Term::opened).map(|opened| opened.vocabulary);
        let vocabulary = vocabularies.fold(rules.vocabulary, usize::min);
        let rows: Vec<(f32, &TermRow)> =
            self.terms.iter().filter_map(|term| Some((term.asked.strength, term.row()?))).collect();
        let position = self.answer.len();
        let base_list = match logits {
            BaseLogits::Row(_) => None,
            BaseLogits::List(list, number) => {
                Some((DecodeTerm { strength: rules.base_strength, logits: TermLogits::List(list) }, *number))
            }
        };
        let terms = rows.iter().map(|(strength, row)| row.as_decode(*strength, vocabulary));
        let terms: Vec<_> = base_list.iter().map(|(term, _)| *term).chain(terms).collect();
        let began = Instant::now();
        let base = match logits {
            BaseLogits::Row(row) => {
                let own = &row[..vocabulary];
                WholeRow { own, weighed: weigh_base(own, rules.base_strength, &mut self.weighed) }
            }
            BaseLogits::List(..) => WholeRow { own: &[], weighed: &[] },
        };
        let chooser = choosers.entry(vocabulary).or_insert_with(|| Chooser::new(vocabulary));
        let asked = Position {
            base: base.weighed,
            terms: &terms,
            sampling: rules.sampling,
            history: &self.history,
            noise: &self.noise,
            position: position as u32,
        };
        let verdict = match base_list {
            None => Ok(chooser.choose(&asked)),
            Some((_, number)) => chooser.choose_from_lists(&asked).ok_or(number),
        };
        metrics.choose.observe(began.elapsed().as_secs_f64());
        let token = match verdict {
            Ok(Verdict::Token(token)) => token,
            Ok(Verdict::Query(ids)) => {
                metrics.query_ids.observe(ids.len() as f64);
                self.ask(Mode::Queried, &ids, links);
                return Decision::Waits;
            }
            Ok(Verdict::Dense) => {
                self.ask(Mode::Dense, &[], links);
                return Decision::Waits;
            }
            Err(number) => {
                let index = self.prompt_tokens + self.answer.len() - 1;
                return Decision::NeedsRow { number, index };
            }
        };
        if rows.iter().any(|(_, row)| row.is_whole()) {
            self.need = Mode::Dense;
        }
        let unguided = rows.len() < self.terms.len();
        let mode = (!rows.is_empty()).then_some(self.need);
        let detail = rules.logprobs.map(|count| pb::TokenDetail {
            reward_logprobs: if unguided { Vec::new() } else { reward_logprobs(token, &rows) },
            ..detail(token, count as usize, &base, &rows, rules.tokenizer)
        });
        let scorers = rules.logprobs.and_then(|_| self.new_scorers());
        Decision::Chosen(Chosen { token, mode, unguided, detail, scorers, stalled })
    }

    /// The whole row for the next token, in place of its list.
    pub(crate) fn on_whole_row(&mut self, row: LogitsRow) {
        self.rows.replace_next(row);
    }

    /// Gives up what came of the base model for the next token and for those after it. The models' tokens stay, drafts
    /// among them: what is computed again is what was computed.
    pub(crate) fn want_row(&mut self) {
        self.rows.want_row();
    }

    /// Takes the chosen token in: reward workers go on with it, and the rows of its position are spent.
    pub(crate) fn accept(&mut self, token: u32, links: &mut Links) -> Settled {
        let next = self.answer.len();
        let mut settled = Settled { draft: None, keep: None };
        for (index, term) in self.terms.iter_mut().enumerate() {
            let draft = term.settle(next, token, links);
            if self.drafter == Some(index) {
                settled.draft = draft;
            }
        }
        self.push(token);
        match self.ahead.pop_front() {
            Some(ahead) if ahead == token => return settled,
            Some(_) => {
                self.ahead.clear();
                self.rows.clear();
                settled.keep = Some(self.prompt_tokens + next);
            }
            None => {}
        }
        self.is_last_pending = true;
        settled
    }

    /// The same for the last token, after which no row is wanted.
    pub(crate) fn accept_last(&mut self, token: u32, links: &mut Links) {
        self.close(links);
        self.push(token);
    }

    pub(crate) fn close(&mut self, links: &mut Links) {
        for term in &mut self.terms {
            term.close(links);
        }
    }

    /// Tokens that the answer may have: every model that reads it needs room.
    pub(crate) fn room(&self, context_tokens: usize) -> usize {
        let rewards = self.terms.iter().filter_map(Term::opened).map(|opened| opened.answer_tokens_max);
        rewards.fold(context_tokens - self.prompt_tokens, usize::min)
    }

    /// Who scores the next token, unless they are those who scored the one before.
    fn new_scorers(&mut self) -> Option<Vec<pb::Scorer>> {
        let session = |term: &Term| term.row().map(|_| (term.link(), term.generation()));
        let sessions: Vec<_> = self.terms.iter().map(session).collect();
        if self.scored_by.as_ref() == Some(&sessions) {
            return None;
        }
        self.scored_by = Some(sessions);
        let scorer = |term: &Term| term.row().map_or_else(pb::Scorer::default, |_| term.scorer());
        Some(self.terms.iter().map(scorer).collect())
    }

    fn push(&mut self, token: u32) {
        self.history.push(token);
        self.answer.push(token);
        self.rows.spend();
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

/// Whether nothing follows this token.
pub(crate) fn ends(tokenizer: &Tokenizer, asked: &AskedSampling, token: u32) -> bool {
    (tokenizer.eos().contains(&token) && !asked.ignore_eos) || asked.stop_token_ids.contains(&token)
}
