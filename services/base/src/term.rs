//! One guidance term of one answer: its session on a reward worker, and the rows it has for the next tokens.
//!
//! ```text
//! next            next + 1        next + 2
//! row, draft  ──► row, draft  ──► row              rows that arrived, each after the draft before it
//! ```
//!
//! A token that is not what the worker went on with makes a new *branch*: what was computed after it is void. A worker
//! that has fallen silent may get a *rival*: the session is opened at another one too, and the first row for the next
//! token says which of both goes on. Until then no token is chosen, so both stand where they stood.

mod row;
mod session;

use std::time::Duration;

use tokio::time::Instant;
use uniarm_proto::{
    Answer, Draft, GuidanceTerm, Open, RewardWorker, SessionGeneration, SessionId, SessionPace, SessionRow,
    pb,
};

use self::session::Session;
pub(crate) use self::{
    row::TermRow,
    session::{BadRow, Opened},
};
use crate::{
    guide::{LinkId, Links},
    pacing::Guide,
};

/// First wait before a term that every worker has lost is opened again; doubles up to the longest.
const REOPEN_FIRST: Duration = Duration::from_millis(50);
const REOPEN_LONGEST: Duration = Duration::from_secs(2);

pub(crate) struct Term {
    pub(crate) asked: GuidanceTerm,
    pub(crate) guide: Guide,
    pub(crate) session: SessionId,
    /// Where it may be scored, best first.
    workers: Vec<RewardWorker>,
    own: Session,
    /// The one before, whose worker fell silent and may speak yet.
    rival: Option<Session>,
    /// Of the latest session.
    generation: SessionGeneration,
    /// Losses since the last row.
    losses: usize,
    not_before: Option<Instant>,
}

/// Which of two sessions has the first row for the next token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Race {
    /// There was no rival, or both are still at it.
    Open,
    /// The worker that fell silent.
    Old,
    /// The one that was asked besides.
    New,
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
        let well = workers.iter().find(|worker| links.is_well(worker)).cloned();
        let generation = SessionGeneration(0);
        Self {
            guide: Guide { reward: asked.reward.clone(), is_alone },
            asked,
            session,
            losses: if well.is_some() { 0 } else { workers.len() },
            own: Session::new(session, generation, well.unwrap_or_else(|| workers[0].clone()), None, links),
            workers,
            rival: None,
            generation,
            not_before: None,
        }
    }

    pub(crate) fn link(&self) -> LinkId {
        self.own.link
    }

    pub(crate) fn generation(&self) -> SessionGeneration {
        self.own.generation
    }

    /// Whether what a worker says in this life of the session is heard.
    pub(crate) fn hears(&self, generation: SessionGeneration) -> bool {
        self.own.generation == generation || self.is_rival(generation)
    }

    pub(crate) fn is_rival(&self, generation: SessionGeneration) -> bool {
        self.rival.as_ref().is_some_and(|rival| rival.generation == generation)
    }

    /// Of the latest session that a worker has answered for.
    pub(crate) fn opened(&self) -> Option<&Opened> {
        self.own.opened.as_ref()
    }

    /// Its worker, as clients hear of it.
    pub(crate) fn scorer(&self) -> pb::Scorer {
        let opened = self.opened();
        let dialled = || (self.own.worker.member.clone(), self.own.worker.generation);
        let (member, generation) = opened.and_then(|opened| opened.worker.clone()).unwrap_or_else(dialled);
        let weights = opened.map(|opened| opened.weights.clone()).unwrap_or_default();
        pb::Scorer { member: member.0, generation: generation.0, weights }
    }

    /// Whether every worker that could serve this term has been lost since its last row.
    pub(crate) fn is_lost(&self) -> bool {
        !self.own.is_open && self.losses >= self.workers.len()
    }

    /// The row for the next token, unless more of it is asked for.
    pub(crate) fn row(&self) -> Option<&TermRow> {
        self.own.row()
    }

    /// Tokens that the worker goes on with by itself, from the next one on, as far as its rows tell.
    pub(crate) fn drafts(&self) -> impl Iterator<Item = u32> {
        self.own.drafts()
    }

    /// Whether a draft for the token after `drafts` of them may come by itself.
    pub(crate) fn is_drafting(&self, drafts: usize) -> bool {
        self.own.is_drafting(drafts)
    }

    /// Whether its session may be ahead of the chosen tokens.
    pub(crate) fn runs_ahead(&self) -> bool {
        self.own.runs_ahead()
    }

    /// Whether `open` has something to do: there is no session, the stream is up, and it is not too soon.
    pub(crate) fn can_open(&self, now: Instant, links: &Links) -> bool {
        !self.own.is_open
            && links.is_up(self.own.link)
            && self.not_before.is_none_or(|instant| instant <= now)
    }

    pub(crate) fn open(&mut self, open: Open, links: &mut Links) {
        self.own.open(open, links);
    }

    /// The session is gone: to its rival, or to the next worker in line. Answers to the session so far are stale from
    /// here on.
    pub(crate) fn lose(&mut self, links: &mut Links) {
        if let Some(rival) = self.rival.take() {
            self.own = rival;
            return;
        }
        self.losses += 1;
        let next = self.next_well(links).unwrap_or_else(|| {
            // Everyone is known to be away: nothing is gained by asking each of them first.
            self.losses = self.losses.max(self.workers.len());
            let current = self.current().map_or(0, |current| current + 1);
            self.workers[current % self.workers.len()].clone()
        });
        self.begin_at(next, links);
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
        if self.own.is_open {
            self.close(links);
            self.begin_at(self.own.worker.clone(), links);
            self.not_before = until;
        }
    }

    /// Leaves a worker that is going away for another one. False: there is none, and the session stays.
    pub(crate) fn move_on(&mut self, links: &mut Links) -> bool {
        let Some(next) = self.next_well(links) else { return false };
        self.close(links);
        self.begin_at(next, links);
        true
    }

    /// Opens the session at another worker too, because its own has fallen silent. False: there is no other.
    pub(crate) fn hedge(&mut self, links: &mut Links) -> bool {
        if !self.own.is_open || self.rival.is_some() {
            return false;
        }
        let Some(next) = self.next_well(links).filter(|next| *next != self.own.worker) else { return false };
        let session = self.next_session(next, links);
        self.rival = Some(std::mem::replace(&mut self.own, session));
        self.not_before = None;
        true
    }

    /// Whether its rival is on this stream.
    pub(crate) fn rivals_on(&self, link: LinkId) -> bool {
        self.rival.as_ref().is_some_and(|rival| rival.link == link)
    }

    pub(crate) fn end_rival(&mut self, links: &mut Links) {
        if let Some(mut rival) = self.rival.take() {
            rival.close(links);
        }
    }

    /// The next worker in line that is not known to be away; the cluster may have others than the placement named.
    fn next_well(&mut self, links: &Links) -> Option<RewardWorker> {
        let find = |workers: &[RewardWorker], current: usize| {
            let mut in_line = (1..=workers.len()).map(|step| &workers[(current + step) % workers.len()]);
            in_line.find(|worker| links.is_well(worker)).cloned()
        };
        // Of a list that does not name its worker, the first is the next.
        let current = |term: &Self| term.current().unwrap_or(term.workers.len() - 1);
        find(&self.workers, current(self)).or_else(|| {
            let serving = links.serving(&self.asked.reward);
            if !serving.is_empty() {
                self.workers = serving;
            }
            find(&self.workers, current(self))
        })
    }

    /// Where its own worker stands in line.
    fn current(&self) -> Option<usize> {
        self.workers.iter().position(|worker| *worker == self.own.worker)
    }

    fn begin_at(&mut self, worker: RewardWorker, links: &mut Links) {
        self.own = self.next_session(worker, links);
    }

    fn next_session(&mut self, worker: RewardWorker, links: &mut Links) -> Session {
        self.generation.0 += 1;
        Session::new(self.session, self.generation, worker, self.own.opened.clone(), links)
    }

    pub(crate) fn on_opened(&mut self, generation: SessionGeneration, opened: Opened) {
        if let Some(session) = self.of(generation) {
            session.opened = Some(opened);
        }
    }

    /// Takes in a row for `row.position`, when `next` is the position of the next token. Rows of positions that are
    /// chosen already, of earlier branches, and repeated ones change nothing.
    pub(crate) fn on_row(
        &mut self,
        generation: SessionGeneration,
        (next, row): (usize, SessionRow),
        links: &mut Links,
    ) -> Result<Race, BadRow> {
        self.hear(generation, links, |session| session.on_row(next, row))
    }

    /// Asks for named logits of the next token's row, or for the whole row.
    pub(crate) fn query(&mut self, next: usize, ids: &[u32], links: &mut Links) {
        self.own.query(next, ids, links);
    }

    /// Takes in what was asked for. Answers for another position are late or repeated.
    pub(crate) fn on_answer(
        &mut self,
        generation: SessionGeneration,
        (next, answer): (usize, Answer),
        links: &mut Links,
    ) -> Result<Race, BadRow> {
        self.hear(generation, links, |session| session.on_answer(next, answer))
    }

    fn hear(
        &mut self,
        generation: SessionGeneration,
        links: &mut Links,
        take_in: impl FnOnce(&mut Session) -> Result<(), BadRow>,
    ) -> Result<Race, BadRow> {
        let Some(session) = self.of(generation) else { return Ok(Race::Open) };
        take_in(session)?;
        if session.row().is_some() {
            self.losses = 0;
        }
        Ok(self.decide_race(links))
    }

    /// Whoever has the row for the next token goes on, and the other one ends.
    fn decide_race(&mut self, links: &mut Links) -> Race {
        let Some(rival) = &mut self.rival else { return Race::Open };
        let race = match (self.own.row(), rival.row()) {
            (Some(_), _) => Race::New,
            (None, Some(_)) => Race::Old,
            (None, None) => return Race::Open,
        };
        if race == Race::Old {
            std::mem::swap(&mut self.own, rival);
        }
        self.end_rival(links);
        race
    }

    /// The token at position `next` is chosen. Returns the worker's own draft of it, if it made one.
    pub(crate) fn settle(&mut self, next: usize, token: u32, links: &mut Links) -> Option<Draft> {
        self.end_rival(links); // of a term that the token did without
        self.own.settle(next, token, links)
    }

    /// Has the worker compute drafts of another term: `path` holds those from position `next` on.
    pub(crate) fn follow(&mut self, next: usize, path: &[u32], links: &mut Links) {
        self.own.follow(next, path, links);
    }

    /// Tells the worker that what it went on with was chosen up to position `next`, if it does not know yet.
    pub(crate) fn give_verdict(&mut self, next: usize, links: &mut Links) {
        self.own.give_verdict(next, links);
    }

    pub(crate) fn set_pace(&mut self, pace: SessionPace, links: &mut Links) {
        self.own.set_pace(pace, links);
    }

    pub(crate) fn close(&mut self, links: &mut Links) {
        self.end_rival(links);
        self.own.close(links);
    }

    fn of(&mut self, generation: SessionGeneration) -> Option<&mut Session> {
        let rival = self.rival.as_mut();
        std::iter::once(&mut self.own).chain(rival).find(|session| session.generation == generation)
    }
}
