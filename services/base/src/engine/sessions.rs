//! The engine's side of the sessions: what reward workers say, how they are lost and opened again, and how far they
//! run ahead.

use std::time::Duration;

use tokio::time::Instant;
use uniarm_decode::scheduler::SequenceId;
use uniarm_proto::{
    Failure, FailureCode, OnRewardLoss, Refusal, SessionGeneration, SessionId, SessionOp, SessionPace,
    SessionReply, refusal::REWARD_LOST,
};

use super::Engine;
use crate::{
    choice::{Choice, Mode, RequestKey},
    guide::LinkId,
    metrics::ModeLabel,
    pacing::Bench,
    term::{Opened, Race, Term},
};

/// How often streams of workers that are going away are looked at.
const LEAVE_EVERY: Duration = Duration::from_millis(50);

impl Engine {
    pub(super) fn on_reply(
        &mut self,
        link: LinkId,
        (session, generation): (SessionId, SessionGeneration),
        reply: SessionReply,
    ) {
        let Some((sequence, index)) = self.sessions.get(&session).copied() else {
            return self.disown(link, session, generation, &reply);
        };
        let choice = self.choices.get_mut(&sequence).expect("a session belongs to a running answer");
        let next = choice.answer.len();
        let term = &mut choice.terms[index];
        if !term.hears(generation) {
            return self.disown(link, session, generation, &reply); // of an earlier life of the session
        }
        let request = self.requests.get_mut(&choice.request).expect("an answer belongs to a running request");
        let bytes = reply.payload_bytes() as u64;
        request.exchange.bytes += bytes;
        let received = match reply {
            SessionReply::Opened { vocabulary, answer_tokens_max, backbone, worker, .. } => {
                let is_twin = backbone == self.settings.fingerprint[..];
                let opened = Opened {
                    vocabulary: vocabulary as usize,
                    answer_tokens_max: answer_tokens_max as usize,
                    weights: backbone,
                    worker,
                };
                term.on_opened(generation, opened);
                self.pacing.on_opened(&term.guide, is_twin);
                self.set_pace(sequence);
                Ok(Race::Open)
            }
            SessionReply::Row(row) => {
                let mode = if row.ids.is_empty() { Mode::Dense } else { Mode::Certified };
                self.metrics.exchange_bytes.get_or_create(&ModeLabel { mode: mode.name() }).inc_by(bytes);
                term.on_row(generation, (next, row), &mut self.links)
            }
            SessionReply::Answer(answer) => {
                let mode = if answer.ids.is_empty() { Mode::Dense } else { Mode::Queried };
                self.metrics.exchange_bytes.get_or_create(&ModeLabel { mode: mode.name() }).inc_by(bytes);
                term.on_answer(generation, (next, answer), &mut self.links)
            }
            SessionReply::Failure(_) if term.is_rival(generation) => {
                term.end_rival(&mut self.links);
                Ok(Race::Open)
            }
            SessionReply::Failure(failure) => {
                let key = choice.request;
                self.on_failure(key, sequence, index, failure);
                return;
            }
        };
        match received {
            Ok(race) => self.metrics.on_race(race),
            Err(error) => {
                tracing::error!(%error, "a reward worker broke the contract");
                self.lose_term(sequence, index, &error.to_string());
            }
        }
    }

    /// A worker computes for a session that is no more here: an `Open` that came late, or twice, has brought it back.
    fn disown(
        &mut self,
        link: LinkId,
        session: SessionId,
        generation: SessionGeneration,
        reply: &SessionReply,
    ) {
        if !matches!(reply, SessionReply::Failure(_)) {
            self.links.push(link, session, generation, SessionOp::Close);
        }
    }

    fn on_failure(&mut self, key: RequestKey, sequence: SequenceId, index: usize, failure: Failure) {
        match failure.code {
            FailureCode::InvalidArgument => {
                let field = failure.field.replacen("guidance.", &format!("guidance[{index}]."), 1);
                self.end_request(key, Err(Refusal::invalid(field, failure.message)));
            }
            FailureCode::Internal => self.lose_term(sequence, index, &failure.message),
            FailureCode::ResourceExhausted => {
                self.lose_term(sequence, index, &failure.message);
                self.give_back(sequence, index);
            }
        }
    }

    pub(super) fn on_link_down(&mut self, link: LinkId) {
        self.links.went_down(link);
        let mut lost = Vec::new();
        for choice in self.choices.values_mut() {
            for (index, term) in choice.terms.iter_mut().enumerate() {
                if term.rivals_on(link) {
                    term.end_rival(&mut self.links);
                }
                if term.link() == link {
                    lost.push((choice.sequence, index));
                }
            }
        }
        if lost.is_empty() && self.links.is_given_up(link) {
            self.forget_link(link);
        }
        for (sequence, index) in lost {
            self.lose_term(sequence, index, "its reward worker cannot be reached");
        }
    }

    /// Moves sessions away from workers that are going away, and ends the streams that have none left: a worker leaves
    /// when its last one has ended.
    pub(super) fn leave_leaving_links(&mut self, now: Instant) {
        if self.left_at.is_some_and(|left_at| now - left_at < LEAVE_EVERY) {
            return;
        }
        let leaving = self.links.leaving();
        if leaving.is_empty() {
            return;
        }
        self.left_at = Some(now);
        for link in leaving {
            let Self { choices, links, metrics, .. } = self;
            let on_link = choices.values_mut().flat_map(|choice| &mut choice.terms);
            let mut stay = 0;
            for term in on_link {
                if term.rivals_on(link) {
                    term.end_rival(links);
                }
                if term.link() != link {
                    continue;
                }
                match term.move_on(links) {
                    true => _ = metrics.reward_moves.inc(),
                    false => stay += 1,
                }
            }
            if stay == 0 {
                links.flush(); // the sessions' ends
                self.forget_link(link);
            }
        }
    }

    fn forget_link(&mut self, link: LinkId) {
        self.links.forget(link);
        self.pacing.forget(link);
        self.alignment.forget(link);
    }

    /// The term goes to the next worker in line; where there is none, the request's policy decides.
    pub(super) fn lose_term(&mut self, sequence: SequenceId, index: usize, why: &str) {
        let Some(choice) = self.choices.get_mut(&sequence) else { return };
        let term = &mut choice.terms[index];
        term.lose(&mut self.links);
        self.metrics.reward_losses.inc();
        let key = choice.request;
        if term.is_lost() && self.requests[&key].placed.request.on_reward_loss == OnRewardLoss::Fail {
            let message = format!("guidance[{index}] ({}) lost its reward: {why}", term.asked.reward);
            self.end_request(key, Err(Refusal::unavailable(REWARD_LOST, message)));
        }
    }

    /// Has the sessions of silent workers opened elsewhere too: those that a base row has waited for so long, from workers
    /// that have said nothing to anybody meanwhile. One that only has much to do is not silent.
    pub(super) fn hedge(&mut self, now: Instant) {
        let Some(after) = self.hedge_after else { return };
        let Self { choices, links, metrics, .. } = self;
        for choice in choices.values_mut() {
            if choice.waits_since().is_none_or(|since| now - since < after) {
                continue;
            }
            let waits = |term: &&mut Term| term.row().is_none();
            for term in choice.terms.iter_mut().filter(waits) {
                if links.is_silent(term.link(), now, after) && term.hedge(links) {
                    metrics.hedges.inc();
                }
            }
        }
    }

    /// An answer that gets no session for one of its terms anywhere keeps none of the others while it waits: answers that
    /// hold what the others wait for would wait for ever.
    fn give_back(&mut self, sequence: SequenceId, index: usize) {
        let Self { choices, requests, links, .. } = self;
        let Some(choice) = choices.get_mut(&sequence) else { return };
        let waits = requests[&choice.request].placed.request.on_reward_loss == OnRewardLoss::Wait;
        if waits && choice.terms[index].is_lost() {
            let until = choice.terms[index].not_before();
            choice.terms.iter_mut().for_each(|term| term.give_back(until, links));
        }
    }

    /// Opens the sessions that can be, of answers that have begun: reward workers then compute their prompts while this
    /// one does. Earlier, sessions of answers in line here would stand there before those that go on.
    pub(super) fn open_sessions(&mut self, now: Instant) {
        let Self { choices, links, executor, .. } = self;
        let closed = |choice: &&Choice| {
            choice.terms.iter().any(|term| term.can_open(now, links)) && executor.has_started(choice.sequence)
        };
        let closed: Vec<SequenceId> = choices.values().filter(closed).map(|choice| choice.sequence).collect();
        for sequence in &closed {
            self.open_terms(*sequence, now);
        }
        if !closed.is_empty() {
            self.links.flush();
        }
    }

    fn open_terms(&mut self, sequence: SequenceId, now: Instant) {
        let paces = self.paces(sequence);
        let choice = self.choices.get_mut(&sequence).expect("it was just looked at");
        let request = &self.requests[&choice.request];
        choice.paced_at = None;
        let progress = (choice.number, choice.answer.as_slice());
        for (term, pace) in choice.terms.iter_mut().zip(paces) {
            if term.can_open(now, &self.links) {
                let open = request.open_message(&self.settings, progress, term, pace);
                term.open(open, &mut self.links);
            }
        }
    }

    /// Takes in what the pace of an answer was worth, and sets it anew.
    pub(super) fn review_pace(&mut self, sequence: SequenceId) {
        let sequences = self.executor.stats().running;
        if let Some(choice) = self.choices.get_mut(&sequence)
            && let Some(drafter) = choice.drafter
        {
            let (now, tokens) = (Instant::now(), choice.answer.len());
            if let Some((since, before)) = choice.paced_at.replace((now, tokens)) {
                let (term, got) = (&choice.terms[drafter], (tokens - before, now - since));
                self.pacing.on_tokens(&term.guide, term.runs_ahead(), sequences, got);
            }
        }
        self.set_pace(sequence);
    }

    /// Sets how far the sessions of an answer run ahead.
    pub(super) fn set_pace(&mut self, sequence: SequenceId) {
        let paces = self.paces(sequence);
        let Some(choice) = self.choices.get_mut(&sequence) else { return };
        for (term, pace) in choice.terms.iter_mut().zip(paces) {
            term.set_pace(pace, &mut self.links);
        }
    }

    /// How far each session of an answer may run ahead, by what is known now; and how many positions gather for it.
    fn paces(&mut self, sequence: SequenceId) -> Vec<SessionPace> {
        let Some(choice) = self.choices.get_mut(&sequence) else { return Vec::new() };
        let request = &self.requests[&choice.request];
        let cost = self.executor.step_cost();
        let sequences = self.executor.stats().running;
        let mut paces = Vec::with_capacity(choice.terms.len());
        for (index, term) in choice.terms.iter().enumerate() {
            let bench = Bench { cost: cost.clone(), sequences, list_length: request.list_length(term) };
            if choice.drafter == Some(index) {
                let (pace, gather) = self.pacing.drafting(term, bench);
                choice.gather = gather;
                paces.push(pace);
            } else {
                paces.push(self.pacing.following(term, &bench));
            }
        }
        paces
    }
}
