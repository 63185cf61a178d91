//! One session: what its sequences hold, which rows are kept for queries, and what it goes on with by itself.
//!
//! ```text
//! positions   0 … chosen        … length
//!             └ the base worker ┘ └ drafted here, not judged yet ┘ ← the next row is for position `length`
//! ```
//!
//! Nothing here computes or speaks: the engine hands rows in and asks what follows from them.

use std::collections::VecDeque;

use uniarm_decode::{
    Chooser, History, Noise, Position, Sampling, Term, TermLogits, TopList,
    guidance::{log_sum_exp, noisy_top_list, top_list, weigh_base},
    scheduler::{SequenceId, Tenant},
};
use uniarm_engine::{Logits, LogitsRow};
use uniarm_model::{DeviceRow, Likeliest, NoiseAt};
use uniarm_proto::{Advance, Draft, DraftMode, SessionGeneration, SessionPace, SessionRow};

use crate::prepare::Prepared;

/// Rows that a session keeps, at most: those of a whole window, and the one before it.
const ROWS_HELD_MAX: usize = uniarm_proto::limits::DRAFT_WINDOW_MAX as usize + 2;

pub(crate) struct Session {
    pub(crate) generation: SessionGeneration,
    pub(crate) sequence: SequenceId,
    pub(crate) prompt_tokens: usize,
    pub(crate) vocabulary: usize,
    /// Tokens that the answer may have.
    pub(crate) room: u32,
    /// The backbone alone, where drafts are made of two rows.
    pub(crate) plain: Option<Plain>,
    /// The prompt as the backbone reads it alone.
    pub(crate) plain_prompt: Vec<u32>,
    pub(crate) pace: SessionPace,
    wants_normalizer: bool,
    list_length: usize,
    /// Strength over temperature, where lists are ranked with the noise.
    noise_scale: Option<f32>,
    noise: Noise,
    sampling: Sampling,
    strength: f32,
    base_strength: f32,
    pub(crate) tenant: Tenant,
    /// Tokens that end an answer: nothing follows them.
    ends: Vec<u32>,
    /// Kept where penalties need it.
    history: Option<History>,
    branch: u32,
    chosen: u32,
    length: u32,
    /// Workspace: the row that stands in for the base model's, times its strength.
    weighed: Vec<f32>,
    /// Rows at positions that are not chosen yet, ascending.
    rows: VecDeque<HeldRow>,
    /// A list was not enough, and its row was gone: the next step brings whole rows.
    is_row_wanted: bool,
    /// What was asked of rows that come with that step.
    asked: Vec<(u32, Vec<u32>)>,
    /// The draft at position `length`, once its row is answered.
    draft: Option<u32>,
}

/// A second sequence of the same answer, without adapter and system text.
pub(crate) struct Plain {
    pub(crate) sequence: SequenceId,
    pub(crate) prompt_tokens: usize,
    /// Its latest row, and the position of that.
    row: Option<(u32, LogitsRow)>,
}

/// What an `Advance` asks of the sequences.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It is late or repeated.
    Nothing,
    /// Keep so many tokens of the answer, then append these.
    Go { keep: u32, ids: Vec<u32> },
}

struct HeldRow {
    position: u32,
    logits: HeldLogits,
    answered: bool,
}

enum HeldLogits {
    Row(LogitsRow),
    /// With its number, by which the row behind it is found.
    List(TopList, u64),
    /// On the device, for a lane.
    Detached(DeviceRow),
    /// It went into the lane, whole: no more of it is asked for.
    Sent,
}

// === impl Session ===

impl Session {
    pub(crate) fn new(generation: SessionGeneration, sequence: SequenceId, prepared: Prepared) -> Self {
        let length = (prepared.tokens.len() - prepared.prompt_tokens) as u32;
        let history = prepared.sampling.has_penalties().then(|| {
            let (prompt, answer) = prepared.tokens.split_at(prepared.prompt_tokens);
            // The base worker's penalties act on the prompt as the base model reads it.
            let plain = &prepared.plain_prompt;
            let mut history = History::new(if plain.is_empty() { prompt } else { plain });
            answer.iter().for_each(|token| history.push(*token));
            history
        });
        Self {
            generation,
            sequence,
            prompt_tokens: prepared.prompt_tokens,
            vocabulary: prepared.vocabulary,
            room: (prepared.tokens_max - prepared.prompt_tokens) as u32,
            plain: None,
            plain_prompt: prepared.plain_prompt,
            pace: prepared.pace,
            wants_normalizer: prepared.wants_normalizer,
            list_length: prepared.list_length,
            noise_scale: prepared.noise_scale,
            noise: prepared.noise,
            sampling: prepared.sampling,
            strength: prepared.strength,
            base_strength: prepared.base_strength,
            tenant: Tenant(prepared.tenant),
            ends: prepared.ends,
            history,
            branch: 0,
            chosen: length,
            length,
            weighed: Vec::new(),
            rows: VecDeque::new(),
            is_row_wanted: false,
            asked: Vec::new(),
            draft: None,
        }
    }

    /// Tokens of the answer that its sequences hold.
    pub(crate) fn length(&self) -> u32 {
        self.length
    }

    /// Whether the token at `index` of its sequence is one that was drafted here and is not chosen yet.
    pub(crate) fn is_ahead(&self, index: usize) -> bool {
        index + 1 > self.prompt_tokens + self.chosen as usize
    }

    /// The list that does in place of rows after the token at `index` of its sequence and those behind it, from a model
    /// whose rows have `vocabulary` logits; none where more of a row is needed. Rows that a lane carries stay on the device.
    pub(crate) fn wanted_list(&self, index: usize, vocabulary: usize, has_lane: bool) -> Option<Likeliest> {
        // A draft adds the base model's share to each logit, which turns the ranking into another one.
        let needs_rows = self.wants_normalizer || self.pace.draft != DraftMode::Off;
        if needs_rows || self.is_row_wanted || self.vocabulary != vocabulary {
            return None;
        }
        if self.list_length == 0 {
            return has_lane.then_some(Likeliest::KEPT);
        }
        let count = self.list_length;
        let Some(scale) = self.noise_scale else {
            return Some(Likeliest { count, scale: 1.0, noise: None });
        };
        let at = NoiseAt {
            seed: self.noise.seed(),
            choice: self.noise.choice(),
            position: self.position_after(index),
        };
        (scale.is_normal() && scale > 0.0).then_some(Likeliest { count, scale, noise: Some(at) })
    }

    /// The logits after the token at `index` of its sequence; again, if they were wanted whole.
    pub(crate) fn on_row(&mut self, index: usize, logits: Logits) {
        let position = self.position_after(index);
        let logits = match logits {
            Logits::Row(row) => HeldLogits::Row(row),
            Logits::List(list, number) => HeldLogits::List(list, number),
        };
        let is_row = matches!(logits, HeldLogits::Row(_));
        match self.rows.iter_mut().find(|row| row.position == position) {
            Some(held) => held.logits = logits,
            None => {
                if self.rows.len() == ROWS_HELD_MAX {
                    self.rows.pop_front();
                }
                self.rows.push_back(HeldRow { position, logits, answered: false });
            }
        }
        if is_row {
            // A short step brings the first of several.
            self.is_row_wanted = self.asked.iter().any(|(position, _)| self.list_number(*position).is_some());
        }
    }

    /// The number of the list that is held for a position, if there is no row.
    pub(crate) fn list_number(&self, position: u32) -> Option<u64> {
        match self.rows.iter().find(|row| row.position == position)?.logits {
            HeldLogits::List(_, number) => Some(number),
            HeldLogits::Row(_) | HeldLogits::Detached(_) | HeldLogits::Sent => None,
        }
    }

    /// Rows without an answer that stayed on the device, with the numbers by which they are found.
    pub(crate) fn kept_rows(&self) -> impl Iterator<Item = (u32, u64)> {
        let kept = self.rows.iter().filter(|row| self.list_length == 0 && !row.answered);
        kept.filter_map(|row| match row.logits {
            HeldLogits::List(_, number) => Some((row.position, number)),
            _ => None,
        })
    }

    /// The copy of such a row that a lane takes.
    pub(crate) fn on_detached(&mut self, position: u32, row: DeviceRow) {
        if let Some(held) = self.rows.iter_mut().find(|row| row.position == position) {
            held.logits = HeldLogits::Detached(row);
        }
    }

    /// The number of the row that a question for all of it can be answered with from the device.
    pub(crate) fn answered_list(&self, position: u32) -> Option<u64> {
        let held = self.rows.iter().find(|row| row.position == position && row.answered)?;
        self.list_number(held.position)
    }

    /// A position whose list says nothing, and for which there is no answer yet.
    pub(crate) fn empty_list(&self) -> Option<u32> {
        let says_nothing =
            |row: &&HeldRow| matches!(&row.logits, HeldLogits::List(list, _) if list.ids().is_empty());
        self.rows.iter().filter(|row| !row.answered).find(says_nothing).map(|row| row.position)
    }

    /// The row behind the list of a position.
    pub(crate) fn on_whole_row(&mut self, position: u32, row: LogitsRow) {
        if let Some(held) = self.rows.iter_mut().find(|row| row.position == position) {
            held.logits = HeldLogits::Row(row);
        }
    }

    /// The row behind the list of a position is gone. Returns the index of the token, in its sequence, from which to compute
    /// again.
    pub(crate) fn want_row(&mut self, position: u32) -> usize {
        self.is_row_wanted = true;
        self.prompt_tokens + position as usize - 1
    }

    /// Keeps a question until the row is there.
    pub(crate) fn ask_later(&mut self, position: u32, ids: Vec<u32>) {
        let question = (position, ids);
        if self.asked.len() < ROWS_HELD_MAX && !self.asked.contains(&question) {
            self.asked.push(question);
        }
    }

    /// The questions that can be answered now, or never.
    pub(crate) fn asked(&mut self) -> Vec<(u32, Vec<u32>)> {
        let asked = std::mem::take(&mut self.asked);
        let (later, now) = asked.into_iter().partition(|(position, _)| self.list_number(*position).is_some());
        self.asked = later;
        now
    }

    fn position_after(&self, index: usize) -> u32 {
        (index + 1 - self.prompt_tokens) as u32
    }

    /// The same of the backbone alone.
    pub(crate) fn on_plain_row(&mut self, index: usize, row: LogitsRow) {
        if let Some(plain) = &mut self.plain {
            plain.row = Some(((index + 1 - plain.prompt_tokens) as u32, row));
        }
    }

    /// Another step of the model is computed, which writes where the latest one did.
    pub(crate) fn keep_rows(&mut self) {
        for held in &mut self.rows {
            if let HeldLogits::Row(row) = &mut held.logits {
                row.keep();
            }
        }
        if let Some(plain) = &mut self.plain {
            // One that is behind is of no more use.
            plain.row = plain.row.take().filter(|(position, _)| *position == self.length);
            if let Some((_, row)) = &mut plain.row {
                row.keep();
            }
        }
    }

    /// Answers for the rows that have none, with what goes into the lane of each; the last one comes with a draft, if the
    /// session makes any.
    pub(crate) fn answer(&mut self, chooser: &mut Chooser) -> Vec<(SessionRow, Option<DeviceRow>)> {
        let mut answers = Vec::new();
        for index in 0..self.rows.len() {
            if self.rows[index].answered {
                continue;
            }
            self.rows[index].answered = true;
            let draft =
                if self.rows[index].position == self.length { self.make_draft(chooser) } else { None };
            let row = SessionRow { branch: self.branch, draft, ..self.list(&self.rows[index]) };
            answers.push((row, self.rows[index].take_detached()));
        }
        answers
    }

    /// The token to append now: it was drafted, and the window has room for it.
    pub(crate) fn go_on(&mut self) -> Option<u32> {
        let token = self.draft?;
        let has_room = self.length < self.chosen + self.pace.window;
        (has_room && !self.ends.contains(&token)).then(|| {
            self.append(&[token]);
            token
        })
    }

    /// What the base worker says of tokens; the caller does to the sequences what the step says.
    pub(crate) fn advance(&mut self, advance: Advance) -> Step {
        let Advance { position, ids, branch, chosen } = advance;
        let is_news = match ids.is_empty() {
            true => branch == self.branch,
            // Of the same branch: it goes on where the session waits. Of a later one: it replaces what is there.
            false if branch == self.branch => position == self.length,
            false => branch > self.branch && position <= self.length,
        };
        if !is_news {
            return Step::Nothing;
        }
        if branch > self.branch {
            self.branch = branch;
            self.length = position;
            self.rows.clear();
            self.asked.clear();
            if let Some(plain) = &mut self.plain {
                plain.row = None; // it followed other tokens
            }
            if let Some(history) = &mut self.history {
                history.truncate(position as usize);
            }
        }
        self.chosen = self.chosen.max(chosen);
        while self.rows.front().is_some_and(|row| row.position < self.chosen) {
            self.rows.pop_front();
        }
        if ids.is_empty() {
            return Step::Nothing;
        }
        let keep = self.length;
        self.append(&ids);
        Step::Go { keep, ids }
    }

    /// Logits of the row at `position`, if it is held: of these ids, or all.
    pub(crate) fn query(&self, position: u32, ids: &[u32]) -> Option<Vec<f32>> {
        let held = self.rows.iter().find(|row| row.position == position && row.answered)?;
        let HeldLogits::Row(row) = &held.logits else { return None };
        let row = &row[..self.vocabulary];
        if ids.is_empty() {
            return Some(row.to_vec());
        }
        // An id outside has no logit: it can never be chosen.
        Some(ids.iter().map(|id| row.get(*id as usize).copied().unwrap_or(f32::NEG_INFINITY)).collect())
    }

    pub(crate) fn set_pace(&mut self, pace: SessionPace) {
        self.pace = pace;
        if self.list_length > 0 && pace.list_length > 0 {
            self.list_length = pace.list_length as usize;
        }
    }

    pub(crate) fn start_plain(&mut self, sequence: SequenceId) {
        self.plain = Some(Plain { sequence, prompt_tokens: self.plain_prompt.len(), row: None });
    }

    fn append(&mut self, ids: &[u32]) {
        self.length += ids.len() as u32;
        self.draft = None;
        if let Some(history) = &mut self.history {
            ids.iter().for_each(|id| history.push(*id));
        }
    }

    /// The token at position `length` as this worker expects it, from the row just computed.
    fn make_draft(&mut self, chooser: &mut Chooser) -> Option<Draft> {
        if self.pace.draft == DraftMode::Off || self.length + 1 >= self.room {
            return None;
        }
        let HeldLogits::Row(own) = &self.rows.back()?.logits else { return None };
        let own = &own[..self.vocabulary];
        let (base, mode) = match &self.plain {
            None => (own, DraftMode::Single),
            // Until it has caught up the session waits: a worse draft now would cost more than it saves.
            Some(plain) => {
                let (_, row) = plain.row.as_ref().filter(|(position, _)| *position == self.length)?;
                (&row[..self.vocabulary], DraftMode::Dual)
            }
        };
        let none = History::default();
        let token = chooser.choose(&Position {
            base: weigh_base(base, self.base_strength, &mut self.weighed),
            terms: &[Term { strength: self.strength, logits: TermLogits::Dense(own) }],
            sampling: &self.sampling,
            history: self.history.as_ref().unwrap_or(&none),
            noise: &self.noise,
            position: self.length,
        });
        let uniarm_decode::Choice::Token(token) = token else { return None };
        self.draft = Some(token);
        Some(Draft { token, mode })
    }

    fn list(&self, held: &HeldRow) -> SessionRow {
        let position = held.position;
        let answer = SessionRow {
            position,
            ids: Vec::new(),
            values: Vec::new(),
            lane_values: 0,
            log_normalizer: 0.0,
            floor: None,
            branch: 0,
            draft: None,
        };
        let of_list = |list: &TopList| {
            let (ids, values) = (list.ids().to_vec(), list.values().to_vec());
            SessionRow { ids, values, floor: list.ranking().map(|ranking| ranking.floor), ..answer.clone() }
        };
        let row = match &held.logits {
            HeldLogits::List(list, _) => return of_list(list),
            HeldLogits::Detached(_) | HeldLogits::Sent => {
                return SessionRow { lane_values: self.vocabulary as u32, ..answer };
            }
            HeldLogits::Row(row) => &row[..self.vocabulary],
        };
        let listed = match (self.list_length, self.noise_scale) {
            (0, _) => SessionRow { values: row.to_vec(), ..answer },
            (k, None) => of_list(&top_list(row, k)),
            (k, Some(scale)) => of_list(&noisy_top_list(row, k, scale, &self.noise, position)),
        };
        let log_normalizer = if self.wants_normalizer { log_sum_exp(row) } else { 0.0 };
        SessionRow { log_normalizer, ..listed }
    }
}

// === impl HeldRow ===

impl HeldRow {
    /// What a lane sends of it, once.
    fn take_detached(&mut self) -> Option<DeviceRow> {
        match std::mem::replace(&mut self.logits, HeldLogits::Sent) {
            HeldLogits::Detached(row) => Some(row),
            other => {
                self.logits = other;
                None
            }
        }
    }
}
