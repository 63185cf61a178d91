//! One guidance term of one answer: its session on a reward worker, and the row it has for the next token.

use std::time::{Duration, Instant};

use uniarm_decode::guidance::{NoisyRanking, Term as DecodeTerm, TermLogits, TopList};
use uniarm_proto::{
    Answer, GuidanceTerm, Open, RewardWorker, SessionGeneration, SessionId, SessionOp, SessionRow,
};

use crate::guide::{LinkId, Links};

/// First wait before a term that every worker has lost is opened again; doubles up to the longest.
const REOPEN_FIRST: Duration = Duration::from_millis(50);
const REOPEN_LONGEST: Duration = Duration::from_secs(2);

pub(crate) struct Term {
    pub(crate) asked: GuidanceTerm,
    pub(crate) session: SessionId,
    pub(crate) link: LinkId,
    generation: SessionGeneration,
    /// Where it may be scored, best first.
    workers: Vec<RewardWorker>,
    current: usize,
    phase: Phase,
    /// Losses since the last row.
    losses: usize,
    not_before: Option<Instant>,
    /// Logits of its rows, once the worker has said so.
    vocabulary: Option<usize>,
    /// Tokens of the answer for which its session has room.
    answer_tokens_max: usize,
    /// Of the ranking that its lists were asked for with; 0: none.
    noise_scale: f32,
}

/// What a reward worker owes us.
enum Phase {
    /// There is no session: the stream is down or was never up.
    Unopened,
    /// The session is asked for its next row.
    Awaiting,
    /// The row is here.
    Ready(TermRow),
    /// The row's list did not suffice: more of it is asked for.
    Querying(TermRow),
}

pub(crate) enum TermRow {
    List { list: TopList, log_normalizer: f32 },
    Whole { row: Vec<f32>, log_normalizer: f32 },
}

/// A worker that sends what it must not.
#[derive(Debug, thiserror::Error)]
#[error("reward worker {worker} sent {what}")]
pub(crate) struct BadRow {
    worker: String,
    what: String,
}

// === impl Term ===

impl Term {
    pub(crate) fn new(
        asked: GuidanceTerm,
        workers: Vec<RewardWorker>,
        session: SessionId,
        links: &mut Links,
    ) -> Self {
        let link = links.to(&workers[0]);
        Self {
            asked,
            session,
            link,
            generation: SessionGeneration(0),
            workers,
            current: 0,
            phase: Phase::Unopened,
            losses: 0,
            not_before: None,
            vocabulary: None,
            answer_tokens_max: usize::MAX,
            noise_scale: 0.0,
        }
    }

    pub(crate) fn generation(&self) -> SessionGeneration {
        self.generation
    }

    pub(crate) fn vocabulary(&self) -> Option<usize> {
        self.vocabulary
    }

    pub(crate) fn answer_tokens_max(&self) -> usize {
        self.answer_tokens_max
    }

    pub(crate) fn worker(&self) -> &RewardWorker {
        &self.workers[self.current]
    }

    /// Whether every worker that could serve this term has been lost since its last row.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(self.phase, Phase::Unopened) && self.losses >= self.workers.len()
    }

    pub(crate) fn row(&self) -> Option<&TermRow> {
        match &self.phase {
            Phase::Ready(row) => Some(row),
            Phase::Unopened | Phase::Awaiting | Phase::Querying(_) => None,
        }
    }

    /// Whether `open` has something to do: there is no session, the stream is up, and it is not too soon.
    pub(crate) fn can_open(&self, now: Instant, links: &Links) -> bool {
        matches!(self.phase, Phase::Unopened)
            && links.is_up(self.link)
            && self.not_before.is_none_or(|instant| instant <= now)
    }

    /// Unopened => Awaiting.
    pub(crate) fn open(&mut self, open: Open, links: &mut Links) {
        self.noise_scale = open.noise_scale;
        links.push(self.link, self.session, self.generation, SessionOp::Open(Box::new(open)));
        self.phase = Phase::Awaiting;
    }

    /// Any => Unopened, at the next worker in line. Answers to the session so far are stale from here on.
    pub(crate) fn lose(&mut self, links: &mut Links) {
        self.losses += 1;
        self.generation.0 += 1;
        let rounds = (self.losses / self.workers.len()).min(16) as u32;
        self.not_before = rounds.checked_sub(1).map(|doublings| {
            Instant::now() + REOPEN_FIRST.saturating_mul(1 << doublings).min(REOPEN_LONGEST)
        });
        self.phase = Phase::Unopened;
        self.current = (self.current + 1) % self.workers.len();
        self.link = links.to(&self.workers[self.current]);
    }

    pub(crate) fn opened(&mut self, vocabulary: usize, answer_tokens_max: usize) {
        self.vocabulary = Some(vocabulary);
        self.answer_tokens_max = answer_tokens_max;
    }

    /// Awaiting => Ready. A row for another position is late or repeated.
    pub(crate) fn on_row(&mut self, position: usize, row: SessionRow) -> Result<(), BadRow> {
        if !matches!(self.phase, Phase::Awaiting) || row.position as usize != position {
            return Ok(());
        }
        let vocabulary = self.vocabulary.ok_or_else(|| self.bad("a row before it opened the session"))?;
        let log_normalizer = row.log_normalizer;
        self.phase = if row.ids.is_empty() {
            if row.values.len() != vocabulary {
                return Err(self.bad(&format!("{} logits instead of {vocabulary}", row.values.len())));
            }
            Phase::Ready(TermRow::Whole { row: row.values, log_normalizer })
        } else {
            if row.ids.iter().any(|id| *id as usize >= vocabulary) {
                return Err(self.bad("an id outside the vocabulary"));
            }
            let list = match row.floor {
                None => TopList::new(row.ids, row.values),
                Some(floor) => {
                    TopList::noisy(row.ids, row.values, NoisyRanking { scale: self.noise_scale, floor })
                }
            };
            let list = list.map_err(|error| self.bad(&error.to_string()))?;
            Phase::Ready(TermRow::List { list, log_normalizer })
        };
        self.losses = 0;
        Ok(())
    }

    /// Ready => Querying: asks for named logits, or for the whole row.
    pub(crate) fn query(&mut self, position: usize, ids: &[u32], links: &mut Links) {
        let Phase::Ready(row) = std::mem::replace(&mut self.phase, Phase::Awaiting) else {
            unreachable!("only a term with a row is queried");
        };
        let op = SessionOp::Query { position: position as u32, ids: ids.to_vec() };
        links.push(self.link, self.session, self.generation, op);
        self.phase = Phase::Querying(row);
    }

    /// Querying => Ready.
    pub(crate) fn on_answer(&mut self, position: usize, answer: Answer) -> Result<(), BadRow> {
        if answer.position as usize != position {
            return Ok(());
        }
        match std::mem::replace(&mut self.phase, Phase::Unopened) {
            Phase::Querying(TermRow::List { mut list, log_normalizer }) => {
                let row = if answer.ids.is_empty() {
                    if Some(answer.values.len()) != self.vocabulary {
                        return Err(self.bad(&format!("a row of {} logits", answer.values.len())));
                    }
                    TermRow::Whole { row: answer.values, log_normalizer }
                } else {
                    list.add(&answer.ids, &answer.values);
                    TermRow::List { list, log_normalizer }
                };
                self.phase = Phase::Ready(row);
            }
            other => self.phase = other,
        }
        Ok(())
    }

    /// Ready => Awaiting: the token at `position` is chosen.
    pub(crate) fn advance(&mut self, position: usize, token: u32, links: &mut Links) {
        if !matches!(self.phase, Phase::Unopened) {
            let op = SessionOp::Advance { position: position as u32, ids: vec![token] };
            links.push(self.link, self.session, self.generation, op);
            self.phase = Phase::Awaiting;
        }
    }

    pub(crate) fn close(&mut self, links: &mut Links) {
        if !matches!(self.phase, Phase::Unopened) {
            links.push(self.link, self.session, self.generation, SessionOp::Close);
            self.phase = Phase::Unopened;
        }
    }

    fn bad(&self, what: &str) -> BadRow {
        BadRow { worker: self.worker().member.to_string(), what: what.to_owned() }
    }
}

// === impl TermRow ===

impl TermRow {
    pub(crate) fn as_decode(&self, strength: f32, vocabulary: usize) -> DecodeTerm<'_> {
        let logits = match self {
            Self::List { list, .. } => TermLogits::List(list),
            Self::Whole { row, .. } => TermLogits::Dense(&row[..vocabulary]),
        };
        DecodeTerm { strength, logits }
    }

    pub(crate) fn is_whole(&self) -> bool {
        matches!(self, Self::Whole { .. })
    }

    /// Whether the row says this token's logit exactly.
    pub(crate) fn knows(&self, id: u32) -> bool {
        self.logit(id).is_some()
    }

    /// log π_reward(id), where the row knows it.
    pub(crate) fn log_probability(&self, id: u32) -> Option<f32> {
        let (Self::List { log_normalizer, .. } | Self::Whole { log_normalizer, .. }) = self;
        self.logit(id).map(|logit| logit - log_normalizer)
    }

    pub(crate) fn logit(&self, id: u32) -> Option<f32> {
        match self {
            Self::List { list, .. } => list.get(id),
            Self::Whole { row, .. } => row.get(id as usize).copied(),
        }
    }
}
