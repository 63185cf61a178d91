//! How a request begins: its answers become sequences and terms, at their first token or where another worker left them.

use std::time::Duration;

use tokio::time::Instant;
use uniarm_decode::{
    blocks::CacheRoot,
    scheduler::{AddError, NewSequence, Priority as Rank, SequenceId, Tenant},
};
use uniarm_proto::{AnswerSoFar, Event, Placed, Priority, Refusal, SessionId};

use super::Engine;
use crate::{
    accept::Accepted,
    choice::{Choice, RequestKey},
    request::Request,
    term::Term,
};

/// An estimate may be so far from the truth: only what would be late at this share of it is refused.
const EXPECTED_AT_LEAST: f64 = 0.5;

impl Engine {
    pub(super) fn start(&mut self, accepted: Accepted) {
        let key = RequestKey(self.next_request);
        self.next_request += 1;
        let (mut request, prompt) = Request::new(accepted);
        let mut result = self.check_deadline(&request);
        self.drain.observe(self.executor.now(), 0, true);
        if result.is_ok() {
            let ends = self.start_answers(key, &mut request, &prompt);
            result = ends.map(|ends| {
                // Only now is it sure of its places: to its router, what has started is never refused, only continued.
                let started = Event::Started(request.started(&self.settings.model));
                std::iter::once(started).chain(ends).for_each(|event| request.outlet.push(Ok(event)));
            });
        }
        let is_over = result.is_err() || request.running.is_empty();
        self.requests.insert(key, request);
        if is_over {
            self.end_request(key, result);
        }
    }

    /// Refuses what would still stand in line at its deadline, here or on a reward worker. How long it may write then is
    /// its own affair. What has begun is never refused: its client has paid for it already.
    fn check_deadline(&self, request: &Request) -> Result<(), Refusal> {
        let Some(deadline) = request.deadline.filter(|_| request.placed.progress.tokens() == 0) else {
            return Ok(());
        };
        let (wait, pool) = self.wait_in_line(request);
        let left = deadline.saturating_duration_since(Instant::now());
        if wait.mul_f64(EXPECTED_AT_LEAST) <= left {
            return Ok(());
        }
        Err(Refusal::unmeetable(format!(
            "the deadline cannot be met: answers wait about {:.1} s for a place on the {pool} worker, {:.1} s are left; \
             give more time, or ask again later",
            wait.as_secs_f32(),
            left.as_secs_f32()
        )))
    }

    /// How long it stands in line, and where: in both pools at the same time.
    fn wait_in_line(&self, request: &Request) -> (Duration, &'static str) {
        let Placed { request: asked, placements, .. } = &request.placed;
        let here =
            self.line.wait(self.executor.ahead_of(rank(asked.priority), Tenant(request.placed.tenant)));
        let rewards = placements.iter().filter_map(|workers| {
            let worker = workers.iter().find(|worker| self.links.is_well(worker))?;
            Some(self.pacing.wait_in_line(self.links.known(worker)?, asked.priority, Instant::now()))
        });
        let there = rewards.max().unwrap_or_default();
        if there > here { (there, "reward") } else { (here, "base") }
    }

    /// Returns the ends of those that have nothing left to write.
    fn start_answers(
        &mut self,
        key: RequestKey,
        request: &mut Request,
        prompt: &[u32],
    ) -> Result<Vec<Event>, Refusal> {
        let mut ends = Vec::new();
        for number in 0..request.placed.request.sampling.n {
            ends.extend(self.start_answer(key, request, prompt, number)?);
        }
        Ok(ends)
    }

    /// Starts an answer, unless it has come to its end elsewhere, or does so with the tokens that it has.
    fn start_answer(
        &mut self,
        key: RequestKey,
        request: &mut Request,
        prompt: &[u32],
        number: u32,
    ) -> Result<Option<Event>, Refusal> {
        let so_far = request.placed.progress.answer(number);
        if so_far.is_finished {
            return Ok(None);
        }
        let asked = &request.placed.request.sampling;
        let sequence = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let noise = (request.seed, number);
        let mut choice = Choice::new(key, sequence, prompt, noise, asked.stop.clone());
        if !so_far.ids.is_empty() {
            self.metrics.resumed.inc();
            let (settings, context) = (&self.settings, self.executor.context_tokens());
            check_ids(&so_far, number, settings.vocabulary)?;
            let say = |choice: &mut Choice, id| choice.say(id, asked, &settings.tokenizer, context);
            let last = choice.resume(&so_far.ids, say).map_err(|index| {
                let reason = format!("of answer {number} go on after token {index}, which ends it");
                Refusal::invalid("resume.ids", reason)
            })?;
            if let Some(reason) = last.reason {
                return Ok(Some(Event::Finished(choice.finished(reason, last.stop))));
            }
        }
        self.add_sequence(&choice, request, prompt).map_err(|error| self.refusal_of(&error))?;
        let guidance = &request.placed.request.guidance;
        for (index, (term, workers)) in guidance.iter().zip(&request.placed.placements).enumerate() {
            let session = SessionId(self.next_session);
            self.next_session += 1;
            self.sessions.insert(session, (sequence, index));
            let asked = (term.clone(), guidance.len() == 1);
            choice.terms.push(Term::new(asked, workers.clone(), session, &mut self.links));
        }
        choice.choose_drafter();
        self.choices.insert(sequence, choice);
        request.running.push(sequence);
        Ok(None)
    }

    fn add_sequence(&mut self, choice: &Choice, request: &Request, prompt: &[u32]) -> Result<(), AddError> {
        let asked = &request.placed.request;
        let tokens = [prompt, &choice.answer].concat();
        let tokens_max = prompt.len() + asked.sampling.max_tokens as usize;
        let new = NewSequence {
            id: choice.sequence,
            logits_from: tokens.len() - 1,
            tokens,
            tokens_max: tokens_max.min(self.executor.context_tokens()),
            root: CacheRoot(0),
            priority: rank(asked.priority),
            tenant: Tenant(request.placed.tenant),
            deadline: request.deadline.map(|deadline| self.executor.time_of(deadline.into_std())),
        };
        self.executor.add(new, None)
    }

    fn refusal_of(&self, error: &AddError) -> Refusal {
        match error {
            AddError::QueueFull { .. } => {
                Refusal::exhausted("base_queue_full", error.to_string(), self.drain.retry_after())
            }
            AddError::DeadlinePassed => Refusal::deadline(error.to_string()),
            _ => Refusal::invalid("input", error),
        }
    }
}

fn check_ids(so_far: &AnswerSoFar, number: u32, vocabulary: usize) -> Result<(), Refusal> {
    match so_far.ids.iter().find(|id| **id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => {
            let reason = format!("of answer {number} hold {id}, the vocabulary ends at {vocabulary}");
            Err(Refusal::invalid("resume.ids", reason))
        }
    }
}

fn rank(priority: Priority) -> Rank {
    match priority {
        Priority::Low => Rank::Low,
        Priority::Normal => Rank::Normal,
        Priority::High => Rank::High,
    }
}
