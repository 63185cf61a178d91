//! One life of a term's session on one reward worker: the rows that have arrived, and what the worker goes on with.

use std::collections::VecDeque;

use bytes::Bytes;
use uniarm_decode::guidance::{NoisyRanking, TopList};
use uniarm_proto::{
    Advance, Answer, Draft, DraftMode, Generation, MemberId, Open, RewardWorker, SessionGeneration,
    SessionId, SessionOp, SessionPace, SessionRow, limits::DRAFT_WINDOW_MAX,
};

use super::TermRow;
use crate::guide::{LinkId, Links};

/// Rows that a worker may be ahead with: its window, and what it computed before it heard of the last tokens.
const ROWS_AHEAD_MAX: usize = 2 * DRAFT_WINDOW_MAX as usize;

pub(super) struct Session {
    id: SessionId,
    pub(super) generation: SessionGeneration,
    pub(super) worker: RewardWorker,
    pub(super) link: LinkId,
    pub(super) is_open: bool,
    branch: u32,
    /// Rows for the next token and those after it, as far as they have arrived.
    rows: VecDeque<Option<Arrived>>,
    /// Tokens that the worker was told to go on with, from the next one on: drafts of another term.
    told: VecDeque<u32>,
    /// The worker has yet to hear that what it went on with was chosen.
    owes_verdict: bool,
    /// As the worker knows it.
    pace: SessionPace,
    /// What the worker said of it; before that, what was said of the term's session before.
    pub(super) opened: Option<Opened>,
    /// Of the ranking that its lists were asked for with; 0: none.
    noise_scale: f32,
}

/// What a worker says when it opens a session.
#[derive(Clone)]
pub(crate) struct Opened {
    /// Logits of its rows.
    pub(crate) vocabulary: usize,
    /// Tokens of the answer for which its session has room.
    pub(crate) answer_tokens_max: usize,
    /// SHA-256 of its backbone's weights; empty: it does not say.
    pub(crate) weights: Bytes,
    /// Who it is, if it is not who was dialled.
    pub(crate) worker: Option<(MemberId, Generation)>,
}

/// A row that is here.
struct Arrived {
    row: TermRow,
    /// What the worker goes on with.
    draft: Option<Draft>,
    /// More of it is asked for.
    is_queried: bool,
}

/// A worker that sends what it must not.
#[derive(Debug, thiserror::Error)]
#[error("reward worker {worker} sent {what}")]
pub(crate) struct BadRow {
    worker: String,
    what: String,
}

// === impl Session ===

impl Session {
    pub(super) fn new(
        id: SessionId,
        generation: SessionGeneration,
        worker: RewardWorker,
        opened: Option<Opened>,
        links: &mut Links,
    ) -> Self {
        Self {
            id,
            generation,
            link: links.to(&worker),
            worker,
            is_open: false,
            branch: 0,
            rows: VecDeque::new(),
            told: VecDeque::new(),
            owes_verdict: false,
            pace: SessionPace::default(),
            opened,
            noise_scale: 0.0,
        }
    }

    /// The row for the next token, unless more of it is asked for.
    pub(super) fn row(&self) -> Option<&TermRow> {
        let arrived = self.rows.front()?.as_ref()?;
        (!arrived.is_queried).then_some(&arrived.row)
    }

    /// Tokens that the worker goes on with by itself, from the next one on, as far as its rows tell.
    pub(super) fn drafts(&self) -> impl Iterator<Item = u32> {
        self.rows.iter().map_while(|row| Some(row.as_ref()?.draft?.token))
    }

    /// Whether a draft for the token after `drafts` of them may come by itself.
    pub(super) fn is_drafting(&self, drafts: usize) -> bool {
        let waits = self.rows.get(drafts).is_some_and(Option::is_some); // a row without a draft
        self.is_open && self.pace.draft != DraftMode::Off && !waits && drafts <= self.pace.window as usize
    }

    pub(super) fn runs_ahead(&self) -> bool {
        self.pace.window > 0
    }

    pub(super) fn open(&mut self, open: Open, links: &mut Links) {
        self.noise_scale = open.noise_scale;
        self.pace = open.pace;
        self.push(SessionOp::Open(Box::new(open)), links);
        self.is_open = true;
    }

    /// Takes in a row for `row.position`, when `next` is the position of the next token. Rows of positions that are
    /// chosen already, of earlier branches, and repeated ones change nothing.
    pub(super) fn on_row(&mut self, next: usize, row: SessionRow) -> Result<(), BadRow> {
        let Some(ahead) = (row.position as usize).checked_sub(next) else { return Ok(()) };
        if !self.is_open || row.branch != self.branch {
            return Ok(());
        }
        if ahead > ROWS_AHEAD_MAX {
            return Err(self.bad(&format!("a row {ahead} tokens ahead")));
        }
        if self.rows.len() <= ahead {
            self.rows.resize_with(ahead + 1, || None);
        }
        if self.rows[ahead].is_none() {
            let draft = row.draft;
            let row = self.read(row)?;
            self.rows[ahead] = Some(Arrived { row, draft, is_queried: false });
        }
        Ok(())
    }

    /// Asks for named logits of the next token's row, or for the whole row.
    pub(super) fn query(&mut self, next: usize, ids: &[u32], links: &mut Links) {
        if let Some(Some(arrived)) = self.rows.front_mut() {
            arrived.is_queried = true;
            self.push(SessionOp::Query { position: next as u32, ids: ids.to_vec() }, links);
        }
    }

    /// Takes in what was asked for. Answers for another position are late or repeated.
    pub(super) fn on_answer(&mut self, next: usize, answer: Answer) -> Result<(), BadRow> {
        let vocabulary = self.opened.as_ref().map(|opened| opened.vocabulary);
        let arrived = self.rows.front_mut().and_then(Option::as_mut).filter(|arrived| arrived.is_queried);
        let Some(arrived) = arrived.filter(|_| answer.position as usize == next) else { return Ok(()) };
        arrived.is_queried = false;
        if let TermRow::List { list, log_normalizer } = &mut arrived.row {
            if !answer.ids.is_empty() {
                list.add(&answer.ids, &answer.values);
            } else if Some(answer.values.len()) == vocabulary {
                arrived.row = TermRow::Whole { row: answer.values, log_normalizer: *log_normalizer };
            } else {
                return Err(self.bad(&format!("a row of {} logits", answer.values.len())));
            }
        }
        Ok(())
    }

    /// The token at position `next` is chosen. Returns the worker's own draft of it, if it made one.
    pub(super) fn settle(&mut self, next: usize, token: u32, links: &mut Links) -> Option<Draft> {
        if !self.is_open {
            return None;
        }
        let draft = self.rows.pop_front().flatten().and_then(|arrived| arrived.draft);
        let assumed = self.told.pop_front().or(draft.map(|draft| draft.token));
        if assumed == Some(token) {
            self.owes_verdict = true;
            return draft;
        }
        if assumed.is_some() {
            self.branch += 1;
            self.rows.clear();
            self.told.clear();
        }
        self.owes_verdict = false; // what follows says it too
        self.go_on_with(next, vec![token], next + 1, links);
        draft
    }

    /// Has the worker compute drafts of another term: `path` holds those from position `next` on.
    pub(super) fn follow(&mut self, next: usize, path: &[u32], links: &mut Links) {
        if self.is_open && path.len() > self.told.len() && self.rows.front().is_none_or(Self::has_no_draft) {
            let ids = path[self.told.len()..].to_vec();
            let position = next + self.told.len();
            self.told.extend(&ids);
            self.go_on_with(position, ids, next, links);
        }
    }

    /// Tells the worker that what it went on with was chosen up to position `next`, if it does not know yet.
    pub(super) fn give_verdict(&mut self, next: usize, links: &mut Links) {
        if std::mem::take(&mut self.owes_verdict) && self.is_open {
            self.go_on_with(next, Vec::new(), next, links);
        }
    }

    pub(super) fn set_pace(&mut self, pace: SessionPace, links: &mut Links) {
        if self.is_open && self.pace != pace {
            self.pace = pace;
            self.push(SessionOp::Pace(pace), links);
        }
    }

    pub(super) fn close(&mut self, links: &mut Links) {
        if self.is_open {
            self.push(SessionOp::Close, links);
            self.is_open = false;
            self.rows.clear();
        }
    }

    fn go_on_with(&mut self, position: usize, ids: Vec<u32>, chosen: usize, links: &mut Links) {
        let (position, chosen) = (position as u32, chosen as u32);
        self.push(SessionOp::Advance(Advance { position, ids, branch: self.branch, chosen }), links);
    }

    fn push(&self, op: SessionOp, links: &mut Links) {
        links.push(self.link, self.id, self.generation, op);
    }

    fn has_no_draft(row: &Option<Arrived>) -> bool {
        row.as_ref().is_none_or(|arrived| arrived.draft.is_none())
    }

    fn read(&self, row: SessionRow) -> Result<TermRow, BadRow> {
        let opened = self.opened.as_ref().ok_or_else(|| self.bad("a row before it opened the session"))?;
        let (vocabulary, log_normalizer) = (opened.vocabulary, row.log_normalizer);
        let draft = row.draft.map(|draft| draft.token);
        if row.ids.iter().chain(&draft).any(|id| *id as usize >= vocabulary) {
            return Err(self.bad("an id outside the vocabulary"));
        }
        if row.ids.is_empty() {
            if row.values.len() != vocabulary {
                return Err(self.bad(&format!("{} logits instead of {vocabulary}", row.values.len())));
            }
            return Ok(TermRow::Whole { row: row.values, log_normalizer });
        }
        let list = match row.floor {
            None => TopList::new(row.ids, row.values),
            Some(floor) => {
                TopList::noisy(row.ids, row.values, NoisyRanking { scale: self.noise_scale, floor })
            }
        };
        let list = list.map_err(|error| self.bad(&error.to_string()))?;
        Ok(TermRow::List { list, log_normalizer })
    }

    fn bad(&self, what: &str) -> BadRow {
        BadRow { worker: self.worker.member.to_string(), what: what.to_owned() }
    }
}
