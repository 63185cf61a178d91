//! One guidance term of one answer: its session on a reward worker, and the rows it has for the next tokens.
//!
//! ```text
//! next            next + 1        next + 2
//! row, draft  ──► row, draft  ──► row              rows that arrived, each after the draft before it
//! ```
//!
//! A token that is not what the worker went on with makes a new *branch*: what was computed after it is void.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use uniarm_decode::guidance::{NoisyRanking, Term as DecodeTerm, TermLogits, TopList};
use uniarm_proto::{
    Advance, Answer, Draft, DraftMode, Generation, GuidanceTerm, MemberId, Open, RewardWorker,
    SessionGeneration, SessionId, SessionOp, SessionPace, SessionRow, limits::DRAFT_WINDOW_MAX, pb,
};

use crate::{
    guide::{LinkId, Links},
    pacing::Guide,
};

/// First wait before a term that every worker has lost is opened again; doubles up to the longest.
const REOPEN_FIRST: Duration = Duration::from_millis(50);
const REOPEN_LONGEST: Duration = Duration::from_secs(2);

/// Rows that a worker may be ahead with: its window, and what it computed before it heard of the last tokens.
const ROWS_AHEAD_MAX: usize = 2 * DRAFT_WINDOW_MAX as usize;

pub(crate) struct Term {
    pub(crate) asked: GuidanceTerm,
    pub(crate) guide: Guide,
    pub(crate) session: SessionId,
    pub(crate) link: LinkId,
    generation: SessionGeneration,
    /// Where it may be scored, best first.
    workers: Vec<RewardWorker>,
    current: usize,
    is_open: bool,
    branch: u32,
    /// Rows for the next token and those after it, as far as they have arrived.
    rows: VecDeque<Option<Arrived>>,
    /// Tokens that the worker was told to go on with, from the next one on: drafts of another term.
    told: VecDeque<u32>,
    /// The worker has yet to hear that what it went on with was chosen.
    owes_verdict: bool,
    /// As the worker knows it.
    pace: SessionPace,
    /// Losses since the last row.
    losses: usize,
    not_before: Option<Instant>,
    /// What the worker said of the session; of a lost one, until the next is open.
    opened: Option<Opened>,
    /// Of the ranking that its lists were asked for with; 0: none.
    noise_scale: f32,
}

/// What a worker says when it opens a session.
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
    /// `is_alone`: the answer has no other term.
    pub(crate) fn new(
        (asked, is_alone): (GuidanceTerm, bool),
        workers: Vec<RewardWorker>,
        session: SessionId,
        links: &mut Links,
    ) -> Self {
        let well = workers.iter().position(|worker| links.is_well(worker));
        let current = well.unwrap_or(0);
        Self {
            guide: Guide { reward: asked.reward.clone(), is_alone },
            asked,
            session,
            link: links.to(&workers[current]),
            generation: SessionGeneration(0),
            losses: if well.is_some() { 0 } else { workers.len() },
            workers,
            current,
            is_open: false,
            branch: 0,
            rows: VecDeque::new(),
            told: VecDeque::new(),
            owes_verdict: false,
            pace: SessionPace::default(),
            not_before: None,
            opened: None,
            noise_scale: 0.0,
        }
    }

    pub(crate) fn generation(&self) -> SessionGeneration {
        self.generation
    }

    /// Of the latest session that a worker has answered for.
    pub(crate) fn opened(&self) -> Option<&Opened> {
        self.opened.as_ref()
    }

    pub(crate) fn worker(&self) -> &RewardWorker {
        &self.workers[self.current]
    }

    /// Its worker, as clients hear of it.
    pub(crate) fn scorer(&self) -> pb::Scorer {
        let opened = self.opened.as_ref();
        let dialled = || (self.worker().member.clone(), self.worker().generation);
        let (member, generation) = opened.and_then(|opened| opened.worker.clone()).unwrap_or_else(dialled);
        let weights = opened.map(|opened| opened.weights.clone()).unwrap_or_default();
        pb::Scorer { member: member.0, generation: generation.0, weights }
    }

    /// Whether every worker that could serve this term has been lost since its last row.
    pub(crate) fn is_lost(&self) -> bool {
        !self.is_open && self.losses >= self.workers.len()
    }

    /// The row for the next token, unless more of it is asked for.
    pub(crate) fn row(&self) -> Option<&TermRow> {
        let arrived = self.rows.front()?.as_ref()?;
        (!arrived.is_queried).then_some(&arrived.row)
    }

    /// Tokens that the worker goes on with by itself, from the next one on, as far as its rows tell.
    pub(crate) fn drafts(&self) -> impl Iterator<Item = u32> {
        self.rows.iter().map_while(|row| Some(row.as_ref()?.draft?.token))
    }

    /// Whether a draft for the token after `drafts` of them may come by itself.
    pub(crate) fn is_drafting(&self, drafts: usize) -> bool {
        let waits = self.rows.get(drafts).is_some_and(Option::is_some); // a row without a draft
        self.is_open && self.pace.draft != DraftMode::Off && !waits && drafts <= self.pace.window as usize
    }

    /// Whether `open` has something to do: there is no session, the stream is up, and it is not too soon.
    pub(crate) fn can_open(&self, now: Instant, links: &Links) -> bool {
        !self.is_open && links.is_up(self.link) && self.not_before.is_none_or(|instant| instant <= now)
    }

    pub(crate) fn open(&mut self, open: Open, links: &mut Links) {
        self.noise_scale = open.noise_scale;
        self.pace = open.pace;
        links.push(self.link, self.session, self.generation, SessionOp::Open(Box::new(open)));
        self.is_open = true;
    }

    /// The session is gone: to the next worker in line. Answers to the session so far are stale from here on.
    pub(crate) fn lose(&mut self, links: &mut Links) {
        self.losses += 1;
        self.generation.0 += 1;
        self.forget_session();
        match self.next_well(links) {
            Some(next) => self.current = next,
            // Everyone is known to be away: nothing is gained by asking each of them first.
            None => {
                self.current = (self.current + 1) % self.workers.len();
                self.losses = self.losses.max(self.workers.len());
            }
        }
        self.link = links.to(&self.workers[self.current]);
        let rounds = (self.losses / self.workers.len()).min(16) as u32;
        self.not_before = rounds.checked_sub(1).map(|doublings| {
            let wait = REOPEN_FIRST.saturating_mul(1 << doublings).min(REOPEN_LONGEST);
            // Those that were refused together do not come back together.
            Instant::now() + wait.mul_f64(0.5 + 0.5 * links.roll())
        });
    }

    /// When it may be opened again, if it has to wait for that.
    pub(crate) fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    /// Closes the session; it is opened again when the answer's others are.
    pub(crate) fn give_back(&mut self, until: Option<Instant>, links: &mut Links) {
        if self.is_open {
            self.close(links);
            self.generation.0 += 1;
            self.not_before = until;
        }
    }

    /// Leaves a worker that is going away for another one. False: there is none, and the session stays.
    pub(crate) fn move_on(&mut self, links: &mut Links) -> bool {
        let left = self.worker().clone();
        let Some(next) = self.next_well(links) else {
            // The list of workers may be a new one: the session is still where it was.
            self.current = self.workers.iter().position(|worker| *worker == left).unwrap_or_else(|| {
                self.workers.push(left);
                self.workers.len() - 1
            });
            return false;
        };
        self.close(links);
        self.generation.0 += 1;
        self.current = next;
        self.link = links.to(&self.workers[next]);
        true
    }

    /// The next worker in line that is not known to be away; the cluster may have others than the placement named.
    fn next_well(&mut self, links: &Links) -> Option<usize> {
        let find = |workers: &[RewardWorker], current: usize| {
            let in_line = (1..=workers.len()).map(|step| (current + step) % workers.len());
            in_line.into_iter().find(|index| links.is_well(&workers[*index]))
        };
        find(&self.workers, self.current).or_else(|| {
            let serving = links.serving(&self.asked.reward);
            if !serving.is_empty() {
                self.workers = serving;
                self.current = 0;
            }
            find(&self.workers, self.current)
        })
    }

    pub(crate) fn on_opened(&mut self, opened: Opened) {
        self.opened = Some(opened);
    }

    /// Takes in a row for `row.position`, when `next` is the position of the next token. Rows of positions that are
    /// chosen already, of earlier branches, and repeated ones change nothing.
    pub(crate) fn on_row(&mut self, next: usize, row: SessionRow) -> Result<(), BadRow> {
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
            self.losses = 0;
        }
        Ok(())
    }

    /// Asks for named logits of the next token's row, or for the whole row.
    pub(crate) fn query(&mut self, next: usize, ids: &[u32], links: &mut Links) {
        if let Some(Some(arrived)) = self.rows.front_mut() {
            arrived.is_queried = true;
            let op = SessionOp::Query { position: next as u32, ids: ids.to_vec() };
            links.push(self.link, self.session, self.generation, op);
        }
    }

    /// Takes in what was asked for. Answers for another position are late or repeated.
    pub(crate) fn on_answer(&mut self, next: usize, answer: Answer) -> Result<(), BadRow> {
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
    pub(crate) fn settle(&mut self, next: usize, token: u32, links: &mut Links) -> Option<Draft> {
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
    pub(crate) fn follow(&mut self, next: usize, path: &[u32], links: &mut Links) {
        if self.is_open && path.len() > self.told.len() && self.rows.front().is_none_or(Self::has_no_draft) {
            let ids = path[self.told.len()..].to_vec();
            let position = next + self.told.len();
            self.told.extend(&ids);
            self.go_on_with(position, ids, next, links);
        }
    }

    /// Tells the worker that what it went on with was chosen up to position `next`, if it does not know yet.
    pub(crate) fn give_verdict(&mut self, next: usize, links: &mut Links) {
        if std::mem::take(&mut self.owes_verdict) && self.is_open {
            self.go_on_with(next, Vec::new(), next, links);
        }
    }

    pub(crate) fn set_pace(&mut self, pace: SessionPace, links: &mut Links) {
        if self.is_open && self.pace != pace {
            self.pace = pace;
            links.push(self.link, self.session, self.generation, SessionOp::Pace(pace));
        }
    }

    pub(crate) fn close(&mut self, links: &mut Links) {
        if self.is_open {
            links.push(self.link, self.session, self.generation, SessionOp::Close);
            self.forget_session();
        }
    }

    fn go_on_with(&mut self, position: usize, ids: Vec<u32>, chosen: usize, links: &mut Links) {
        let (position, chosen) = (position as u32, chosen as u32);
        let op = SessionOp::Advance(Advance { position, ids, branch: self.branch, chosen });
        links.push(self.link, self.session, self.generation, op);
    }

    fn forget_session(&mut self) {
        self.is_open = false;
        self.branch = 0;
        self.rows.clear();
        self.told.clear();
        self.owes_verdict = false;
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
