//! Every answer that an evaluation needs, in one order that never changes.

use std::{collections::BTreeMap, path::Path};

use uniarm_model::Message;
use uniarm_proto::{ChatMessage, Sampling};

use super::{config::EvalConfig, method::MethodConfig};
use crate::{
    cluster_job::{self, Answer, Identities, Question},
    oracle,
    prompts::Prompt,
    scoring,
};

/// One conversation: a prompt under a seed, a method and a preference, with one answer for each turn.
pub struct Cell {
    pub prompt: usize,
    pub seed: usize,
    pub method: usize,
    /// Index in the grid; `None` where the method does not depend on it.
    pub point: Option<usize>,
    pub answers: Vec<Answer>,
}

pub struct Plan<'a> {
    pub config: &'a EvalConfig,
    pub grid: &'a [Vec<f32>],
    pub prompts: &'a [Prompt],
    /// Prompts outermost: neighbours share the base model's prefix.
    pub cells: Vec<Cell>,
}

// === impl Plan ===

impl<'a> Plan<'a> {
    pub fn new(config: &'a EvalConfig, grid: &'a [Vec<f32>], prompts: &'a [Prompt]) -> Self {
        let mut cells = Vec::new();
        for prompt in 0..prompts.len() {
            for seed in 0..config.seeds.len() {
                let asked = |(_, method): &(usize, &MethodConfig)| seed < method.seeds(config);
                for (method, own) in config.methods.iter().enumerate().filter(asked) {
                    let points: Vec<Option<usize>> =
                        if own.has_front() { (0..grid.len()).map(Some).collect() } else { vec![None] };
                    let cell = |point| Cell { prompt, seed, method, point, answers: Vec::new() };
                    cells.extend(points.into_iter().map(cell));
                }
            }
        }
        Self { config, grid, prompts, cells }
    }

    /// Turns of the longest conversation.
    pub fn turns(&self) -> usize {
        self.prompts.iter().map(|prompt| 1 + prompt.follow_ups.len()).max().unwrap_or(0)
    }

    pub fn preference(&self, cell: &Cell) -> &[f32] {
        cell.point.map_or(&[], |point| &self.grid[point])
    }

    /// Indices of the cells of one method, for each of its points in the order of the grid.
    pub fn points(&self, method: usize) -> BTreeMap<Option<usize>, Vec<usize>> {
        let mut points: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
        for (index, cell) in self.cells.iter().enumerate().filter(|(_, cell)| cell.method == method) {
            points.entry(cell.point).or_default().push(index);
        }
        points
    }

    /// The questions of one turn, for the conversations that have it.
    pub fn questions(&self, turn: usize, identities: &Identities) -> Vec<Question> {
        self.cells
            .iter()
            .filter(|cell| self.has_turn(cell, turn))
            .map(|cell| self.question(cell, identities))
            .collect()
    }

    pub fn answered(&mut self, turn: usize, answers: Vec<Answer>) {
        let prompts = self.prompts;
        let has_turn = |cell: &&mut Cell| turn <= prompts[cell.prompt].follow_ups.len();
        for (cell, answer) in self.cells.iter_mut().filter(has_turn).zip(answers) {
            cell.answers.push(answer);
        }
    }

    /// For each conversation, each turn and each objective a score.
    pub fn score(&self, folder: &Path, progress: bool) -> anyhow::Result<Vec<Vec<Vec<f64>>>> {
        let mut conversations = Vec::new();
        for (index, cell) in self.cells.iter().enumerate() {
            for turn in 0..cell.answers.len() {
                conversations.push((index, self.conversation(cell, turn)));
            }
        }
        let mut turns = vec![0; self.cells.len()];
        let asked: Vec<oracle::Answer<'_>> = conversations
            .iter()
            .map(|(index, messages)| {
                let turn = turns[*index];
                turns[*index] += 1;
                oracle::Answer { messages, response: &self.cells[*index].answers[turn].text }
            })
            .collect();
        let origin = |place: usize| self.origin(&self.cells[conversations[place].0]);
        let flat = scoring::score_all(&self.config.oracles(), folder, &asked, origin, progress)?;
        let mut scores = vec![Vec::new(); self.cells.len()];
        for ((index, _), own) in conversations.iter().zip(flat) {
            scores[*index].push(own);
        }
        Ok(scores)
    }

    /// Tokens behind the report; answers that several methods share count for each of them.
    pub fn tokens(&self) -> u64 {
        self.cells.iter().flat_map(|cell| &cell.answers).map(|answer| u64::from(answer.tokens)).sum()
    }

    fn has_turn(&self, cell: &Cell, turn: usize) -> bool {
        turn <= self.prompts[cell.prompt].follow_ups.len()
    }

    fn question(&self, cell: &Cell, identities: &Identities) -> Question {
        let messages = self.conversation(cell, cell.answers.len());
        let prompt = &self.prompts[cell.prompt];
        let chat = messages.into_iter().map(|m| ChatMessage { role: m.role, content: m.content }).collect();
        let reasons: Vec<&str> = prompt.messages.iter().map(|message| message.content.as_str()).collect();
        let sampling = Sampling {
            temperature: self.config.temperature,
            top_p: self.config.top_p,
            seed: Some(cluster_job::seed(self.config.seeds[cell.seed], &reasons)),
            max_tokens: self.config.max_tokens,
            ..Sampling::default()
        };
        let mut request = cluster_job::chat_request(chat, sampling);
        self.config.methods[cell.method].guide(&mut request, self.config, self.preference(cell));
        Question { key: identities.key(&request), request, origin: self.origin(cell) }
    }

    /// What was said before the answer of a turn.
    fn conversation(&self, cell: &Cell, turn: usize) -> Vec<Message> {
        let prompt = &self.prompts[cell.prompt];
        let mut messages = prompt.messages.clone();
        for (answer, follow_up) in cell.answers.iter().zip(&prompt.follow_ups).take(turn) {
            messages.push(Message { role: "assistant".into(), content: answer.text.clone() });
            messages.push(Message { role: "user".into(), content: follow_up.clone() });
        }
        messages
    }

    fn origin(&self, cell: &Cell) -> String {
        let (file, line) = (self.config.prompts.display(), self.prompts[cell.prompt].line);
        let method = &self.config.methods[cell.method].name;
        format!("{file}:{line}, method {method:?}, preference {:?}", self.preference(cell))
    }
}
