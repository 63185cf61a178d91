//! The models of a simulated cluster: scripted logits that take virtual time, and the words that they write.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use uniarm_engine::Clock;
use uniarm_model::{Forward, ModelError, Row, ScriptedForward, ScriptedOptions};

pub const VOCABULARY: usize = 96;
pub const CONTEXT_TOKENS: usize = 256;

/// How much of a logit base and reward model share: drafts are right often, and wrong often enough.
const AGREEMENT: f32 = 0.8;

/// What a step costs, and each of its tokens.
const STEP: Duration = Duration::from_millis(2);
const TOKEN: Duration = Duration::from_micros(100);

/// Which of the two models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Base = 1,
    Reward = 2,
}

/// A scripted model whose steps take time on a clock of its own, which runs ahead of the runtime's until its engine has
/// slept.
pub struct Timed {
    model: ScriptedForward,
    busy_until: Arc<Mutex<Option<Instant>>>,
}

pub fn scripted(part: Part, blocks: usize) -> ScriptedForward {
    ScriptedForward::new(ScriptedOptions {
        vocabulary: VOCABULARY,
        context_tokens: CONTEXT_TOKENS,
        blocks,
        block_tokens: 8,
        seed: part as u64,
        agreement: AGREEMENT,
        ..ScriptedOptions::default()
    })
}

// === impl Timed ===

impl Timed {
    pub fn new(part: Part, blocks: usize) -> (Self, Clock) {
        let busy_until = Arc::new(Mutex::new(None));
        let seen = Arc::clone(&busy_until);
        let clock = Clock::new(move || {
            let now = tokio::time::Instant::now().into_std();
            let busy_until = *seen.lock().unwrap_or_else(PoisonError::into_inner);
            busy_until.map_or(now, |until: Instant| until.max(now))
        });
        (Self { model: scripted(part, blocks), busy_until }, clock)
    }
}

impl Forward for Timed {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    fn context_tokens(&self) -> usize {
        self.model.context_tokens()
    }

    fn block_tokens(&self) -> usize {
        self.model.block_tokens()
    }

    fn blocks(&self) -> usize {
        self.model.blocks()
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
        let now = tokio::time::Instant::now().into_std();
        let mut busy_until = self.busy_until.lock().unwrap_or_else(PoisonError::into_inner);
        let began = busy_until.map_or(now, |until| until.max(now));
        *busy_until = Some(began + STEP + TOKEN * tokens as u32);
        self.model.forward(rows, logits)
    }
}
