//! Two roles over one copy of the weights: the forwards of a base and a reward engine become one pass.
//!
//! In lock-step both engines ask for a forward at about the same time. Whoever asks first waits a moment for the other;
//! then one of the two computes the rows of both, so that the weights stream by once. Each engine keeps half of the
//! cache's blocks, and neither notices: a row's logits do not depend on its neighbours.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use uniarm_model::{Conditioned, Forward, ModelError, Row};

/// How long a forward waits for the other role: far less than a step, and more than a message between the two takes.
const MEETING_WAIT: Duration = Duration::from_micros(400);

/// So many steps alone in a row, and nobody is waited for until both are busy again.
const ALONE_MAX: u32 = 4;

/// One role's half of a shared model.
pub struct FusedForward {
    shared: Arc<Shared>,
    role: usize,
    dimensions: Dimensions,
}

#[derive(Clone, Copy)]
struct Dimensions {
    vocabulary: usize,
    context_tokens: usize,
    block_tokens: usize,
    /// Of one role.
    blocks: usize,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Absent while somebody computes.
    model: Option<Model>,
    /// What each role has asked for.
    asked: [Option<Batch>; 2],
    /// What each role gets.
    done: [Option<Result<Vec<f32>, ModelError>>; 2],
    /// Steps since both roles were busy at once.
    alone: u32,
}

struct Model {
    forward: Box<dyn Forward>,
    /// Logits of both roles' rows; reused.
    logits: Vec<f32>,
}

/// Rows that own what they name, with block numbers of the whole cache.
struct Batch {
    rows: Vec<OwnedRow>,
    /// The asker's own buffer, to be filled.
    logits: Vec<f32>,
}

struct OwnedRow {
    tokens: Vec<u32>,
    start: usize,
    blocks: Vec<u32>,
    logits_from: usize,
    adapter: Option<Conditioned>,
}

/// Splits a model between two roles.
pub fn fuse(model: Box<dyn Forward>) -> [FusedForward; 2] {
    let dimensions = Dimensions {
        vocabulary: model.vocabulary(),
        context_tokens: model.context_tokens(),
        block_tokens: model.block_tokens(),
        blocks: model.blocks() / 2,
    };
    let model = Model { forward: model, logits: Vec::new() };
    let state = State { model: Some(model), asked: [None, None], done: [None, None], alone: 0 };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    [0, 1].map(|role| FusedForward { shared: Arc::clone(&shared), role, dimensions })
}

// === impl FusedForward ===

impl Forward for FusedForward {
    fn vocabulary(&self) -> usize {
        self.dimensions.vocabulary
    }

    fn context_tokens(&self) -> usize {
        self.dimensions.context_tokens
    }

    fn block_tokens(&self) -> usize {
        self.dimensions.block_tokens
    }

    fn blocks(&self) -> usize {
        self.dimensions.blocks
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let batch = Batch { rows: self.own(rows)?, logits: std::mem::take(logits) };
        let mut state = self.shared.lock();
        state.asked[self.role] = Some(batch);
        self.shared.changed.notify_all();
        let asked_at = Instant::now();
        loop {
            if let Some(done) = state.done[self.role].take() {
                *logits = done?;
                return Ok(());
            }
            let meets = state.asked[1 - self.role].is_some();
            let waited = asked_at.elapsed();
            let patience = if state.alone < ALONE_MAX { MEETING_WAIT } else { Duration::ZERO };
            state = match state.model.take() {
                Some(model) if meets || waited >= patience => self.compute(model, state),
                model => {
                    state.model = model;
                    self.shared.wait(state, patience.saturating_sub(waited))
                }
            };
        }
    }
}

impl FusedForward {
    fn own(&self, rows: &[Row<'_>]) -> Result<Vec<OwnedRow>, ModelError> {
        let blocks = self.dimensions.blocks;
        let first = (self.role * blocks) as u32;
        let own = |row: &Row<'_>| {
            // Blocks beyond this role's half would be the other's.
            if row.blocks.iter().any(|block| *block as usize >= blocks) {
                let reason = format!("a block of a cache of {blocks} blocks");
                return Err(ModelError::Invalid { field: "blocks", reason });
            }
            Ok(OwnedRow {
                tokens: row.tokens.to_vec(),
                start: row.start,
                blocks: row.blocks.iter().map(|block| first + block).collect(),
                logits_from: row.logits_from,
                adapter: row.adapter.cloned(),
            })
        };
        rows.iter().map(own).collect()
    }

    /// Computes what is asked for, of both roles.
    fn compute<'a>(&'a self, mut model: Model, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let batches = [0, 1].map(|role| state.asked[role].take());
        let met = batches.iter().all(Option::is_some);
        drop(state);
        let results = forward_all(&mut model, batches);
        let mut state = self.shared.lock();
        state.model = Some(model);
        // Who asked meanwhile is as busy: the next step can be one.
        let busy = met || state.asked.iter().any(Option::is_some);
        state.alone = if busy { 0 } else { state.alone.saturating_add(1) };
        for (done, result) in state.done.iter_mut().zip(results) {
            if let Some(result) = result {
                *done = Some(result);
            }
        }
        self.shared.changed.notify_all();
        state
    }
}

/// One pass for all batches; where one of them is refused, each by itself, so that nobody pays for another's fault.
fn forward_all(model: &mut Model, batches: [Option<Batch>; 2]) -> [Option<Result<Vec<f32>, ModelError>>; 2] {
    let Model { forward, logits } = model;
    let rows: Vec<Row<'_>> = batches.iter().flatten().flat_map(|batch| &batch.rows).map(borrow).collect();
    if forward.forward(&rows, logits).is_err() {
        return batches.map(|batch| {
            let Batch { rows, mut logits } = batch?;
            let rows: Vec<Row<'_>> = rows.iter().map(borrow).collect();
            Some(forward.forward(&rows, &mut logits).map(|()| logits))
        });
    }
    let vocabulary = forward.vocabulary();
    let mut rest = logits.as_slice();
    batches.map(|batch| {
        let Batch { rows, mut logits } = batch?;
        let wanted: usize = rows.iter().map(|row| borrow(row).wanted()).sum();
        let own = rest.split_off(..wanted * vocabulary).expect("the forward writes every wanted row");
        logits.clear();
        logits.extend_from_slice(own);
        Some(Ok(logits))
    })
}

fn borrow(row: &OwnedRow) -> Row<'_> {
    Row {
        tokens: &row.tokens,
        start: row.start,
        blocks: &row.blocks,
        logits_from: row.logits_from,
        adapter: row.adapter.as_ref(),
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until something changes, or for so long; zero waits until something changes.
    fn wait<'a>(&'a self, state: MutexGuard<'a, State>, longest: Duration) -> MutexGuard<'a, State> {
        if longest.is_zero() {
            return self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.changed.wait_timeout(state, longest).unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use uniarm_model::{ScriptedForward, ScriptedOptions};

    use super::*;

    fn logits(model: &mut dyn Forward, tokens: &[u32], blocks: &[u32]) -> Vec<f32> {
        let mut logits = Vec::new();
        let row = Row { tokens, start: 0, blocks, logits_from: 0, adapter: None };
        model.forward(&[row], &mut logits).expect("a sound row");
        logits
    }

    #[test]
    fn two_roles_compute_what_each_would_alone() {
        let scripted = || ScriptedForward::new(ScriptedOptions::default());
        let [mut first, mut second] = fuse(Box::new(scripted()));
        assert_eq!(first.blocks(), scripted().blocks() / 2);
        let expected = [[1, 2, 3], [7, 8, 9]].map(|tokens| logits(&mut scripted(), &tokens, &[5]));
        let other = std::thread::spawn(move || {
            (0..200).map(|_| logits(&mut second, &[7, 8, 9], &[5])).collect::<Vec<_>>()
        });
        for _ in 0..200 {
            assert_eq!(logits(&mut first, &[1, 2, 3], &[5]), expected[0]);
        }
        assert!(other.join().expect("no panic").iter().all(|found| *found == expected[1]));
        // Alone, after the other has gone.
        assert_eq!(logits(&mut first, &[7, 8, 9], &[1]), expected[1]);
    }

    #[test]
    fn a_row_that_is_refused_harms_only_its_own_role() {
        let [mut first, mut second] = fuse(Box::new(ScriptedForward::new(ScriptedOptions::default())));
        let beyond = first.vocabulary() as u32;
        let wrong = std::thread::spawn(move || {
            let row = Row { tokens: &[beyond], start: 0, blocks: &[0], logits_from: 0, adapter: None };
            (0..50).all(|_| second.forward(&[row], &mut Vec::new()).is_err())
        });
        (0..50).for_each(|_| drop(logits(&mut first, &[1], &[0])));
        assert!(wrong.join().expect("no panic"));
        let half = first.blocks() as u32;
        let row = Row { tokens: &[1], start: 0, blocks: &[half], logits_from: 0, adapter: None };
        assert!(first.forward(&[row], &mut Vec::new()).is_err(), "the other role's block");
    }
}
