//! What the next step computes: which sequences, which of their tokens, into which blocks.
//!
//! There is one view of prefill, decode, verification of drafts and recomputation: a sequence is a list of
//! tokens, and `pending = tokens.len() − computed` of them have no keys and values yet. A step computes some
//! pending tokens of many sequences. A sequence whose wanted logits have all been delivered waits for
//! something outside (a reward's answer, the next token) and sits the step out; it holds up nobody.
//!
//! ```text
//!            add                plan: admitted             commit: all delivered
//!   (new) ─────────► waiting ──────────────────► running ◄──────────────────────► running, idle
//!                     ▲  ▲                          │         extend                   │
//!                     │  └──────── preempted ───────┘                                  │ preempted
//!                     └────────────────────────── extend ── parked (no blocks) ◄───────┘
//! ```
//!
//! A step of an engine, here with a model whose next token is always 7:
//!
//! ```
//! # use std::time::Duration;
//! # use uniarm_decode::blocks::CacheRoot;
//! # use uniarm_decode::scheduler::{NewSequence, Priority, Scheduler, SchedulerOptions, SequenceId, Tenant};
//! # let mut scheduler = Scheduler::new(SchedulerOptions::default());
//! # let (id, now) = (SequenceId(1), Duration::ZERO);
//! # let (root, priority, tenant, deadline) = (CacheRoot(0), Priority::Normal, Tenant(0), None);
//! let tokens = vec![1, 2, 3];
//! let new = NewSequence { id, tokens, logits_from: 2, tokens_max: 6, root, priority, tenant, deadline };
//! scheduler.add(now, new).expect("there is room");
//! while scheduler.tokens(id).expect("it was added").len() < 6 {
//!     let plan = scheduler.plan(now);
//!     // forward(&plan.rows) comes here; if it fails, the plan is not committed and the next one repeats it.
//!     scheduler.commit(&plan);
//!     for row in plan.rows.iter().filter(|row| row.logits_from < row.tokens.len()) {
//!         scheduler.extend(row.sequence, &[7]).expect("it has not reached tokens_max");
//!     }
//! }
//! assert_eq!(scheduler.tokens(id), Some(&[1, 2, 3, 7, 7, 7][..]));
//! assert!(scheduler.remove(id));
//! ```
//!
//! The life of a sequence is in this file, the order of a step in `plan`, the arithmetic of one sequence in
//! `sequence`. Nothing here reads a clock: `now` is an argument, any monotonic duration will do.

mod plan;
mod sequence;
mod shares;
mod waiting;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::blocks::{BlockId, BlockPool, CacheRoot, Registration};
use sequence::Sequence;
use shares::Shares;
pub use shares::Tenant;
use waiting::Waiting;

/// A sequence that has waited outside for this long loses the protection of its rank: anyone who needs its
/// blocks may have them. Long against the time of a step and a reward's answer, so that nothing in progress
/// is recomputed; short against a deadline. It is what keeps two pools from waiting for each other's blocks
/// forever.
pub const IDLE_PATIENCE: Duration = Duration::from_secs(1);

/// A sequence that could run but is passed over for this many planned steps rises by one class of priority,
/// for good. With three classes everything is among the oldest of the highest class after twice as many, so
/// nothing starves.
pub const PROMOTION_STEPS: u64 = 256;

/// The smallest token budget of a step: one token more than the quarter that is kept for prefill can take.
pub const STEP_TOKENS_MIN: usize = 4;

/// Places where a step has rows for prompts and for those that run.
const RUNNING_MIN: usize = 2;

/// Names a sequence for as long as the scheduler knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    Low,
    #[default]
    Normal,
    High,
}

#[derive(Clone, Copy, Debug)]
pub struct SchedulerOptions {
    /// Positions per block, as the model lays out its cache.
    pub block_tokens: usize,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Most tokens that one step computes; at least [`STEP_TOKENS_MIN`].
    pub step_tokens: usize,
    /// Most tokens of one sequence in one step.
    pub prefill_chunk: usize,
    /// Running places.
    pub running_max: usize,
    /// Whether a sequence keeps its place while it has nothing to compute, and so holds back those in line: then there
    /// are never more under way than places. If not, it keeps only its blocks, and places bound the rows of a step: where
    /// somebody else decides which sequences go on, those that do must not stand behind those that do not.
    pub idle_keep_places: bool,
    /// Sequences beyond the running places that are taken in.
    pub waiting_max: usize,
    /// Whether sequences that begin alike share blocks.
    pub prefix_cache: bool,
}

#[derive(Clone, Debug)]
pub struct NewSequence {
    pub id: SequenceId,
    /// At least one.
    pub tokens: Vec<u32>,
    /// Index of the first token whose logits are wanted: `len − 1` to generate, 0 to score the whole, `len`
    /// for none.
    pub logits_from: usize,
    /// The sequence will never be longer; it is refused now if that many tokens could never fit the pool.
    pub tokens_max: usize,
    pub root: CacheRoot,
    pub priority: Priority,
    /// In a class, tenants are served tokens in equal parts.
    pub tenant: Tenant,
    /// On the clock of [`Scheduler::plan`].
    pub deadline: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    #[error("the queue is full: {waiting} sequences wait, the limit is {limit}")]
    QueueFull { waiting: usize, limit: usize },
    #[error("{tokens_max} tokens can never fit: the cache holds {capacity} tokens")]
    NeverFits { tokens_max: usize, capacity: usize },
    #[error("a sequence has at least one token")]
    Empty,
    #[error("{tokens} tokens are more than the {tokens_max} that the sequence may ever have")]
    TooLong { tokens: usize, tokens_max: usize },
    #[error("logits are wanted from token {logits_from} of {tokens}")]
    LogitsFrom { logits_from: usize, tokens: usize },
    #[error("the deadline has passed")]
    DeadlinePassed,
    #[error("sequence {} is known already", .0.0)]
    Duplicate(SequenceId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtendError {
    #[error("sequence {} is not known", .0.0)]
    Unknown(SequenceId),
    #[error("{tokens} tokens are more than the {tokens_max} that the sequence may ever have")]
    TooLong { tokens: usize, tokens_max: usize },
}

/// One step: compute the rows, then [`Scheduler::commit`]. Sequences with one token or a few drafts come
/// first, then chunks of prompts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Number of the plan, counting from 1.
    pub step: u64,
    pub rows: Vec<PlannedRow>,
    /// Lost their blocks to another sequence; they will be recomputed by themselves.
    pub preempted: Vec<SequenceId>,
    /// Past their deadline, in every plan until the caller removes them. They are not computed any more.
    pub expired: Vec<SequenceId>,
}

/// Consecutive tokens of one sequence. A sequence has at most one row in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedRow {
    pub sequence: SequenceId,
    /// Index of `tokens[0]` in the sequence: its position.
    pub start: usize,
    /// At least one.
    pub tokens: Vec<u32>,
    /// The block table for positions 0..start + tokens.len(). A block may change its number between two
    /// steps.
    pub blocks: Vec<BlockId>,
    /// First index in `tokens` whose logits are wanted; `tokens.len()` when none are.
    pub logits_from: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that hold no blocks: in line, or preempted while they waited for something outside.
    pub waiting: usize,
    /// Sequences that hold blocks.
    pub running: usize,
    /// Running places.
    pub running_max: usize,
    /// How often a sequence got a running place.
    pub admitted: u64,
    /// The latest plan left somebody in line for want of a place, of blocks or of budget.
    pub is_full: bool,
    pub total_blocks: usize,
    /// Blocks that nobody holds; some of them may still be found by a prefix.
    pub free_blocks: usize,
    /// Blocks that can be found by a prefix, held or not.
    pub cached_blocks: usize,
    /// Plans made.
    pub steps: u64,
    /// How often a sequence lost its blocks to another.
    pub preemptions: u64,
    /// Tokens that admitted sequences looked up in the prefix cache.
    pub prefix_query_tokens: u64,
    /// Tokens that they found there and did not compute.
    pub prefix_hit_tokens: u64,
}

/// Plans the steps of one model over one pool of blocks.
pub struct Scheduler {
    options: SchedulerOptions,
    sequences: HashMap<SequenceId, Sequence>,
    /// Those that hold blocks, in no particular order.
    running: Vec<SequenceId>,
    waiting: Waiting,
    shares: Shares,
    deadlines: BTreeSet<(Duration, SequenceId)>,
    pool: BlockPool,
    step: u64,
    turns: u64,
    arrivals: u64,
    admitted: u64,
    is_full: bool,
    preemptions: u64,
    prefix_query_tokens: u64,
    prefix_hit_tokens: u64,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self {
            block_tokens: 16,
            blocks: 1024,
            step_tokens: 512,
            prefill_chunk: 256,
            running_max: 64,
            idle_keep_places: true,
            waiting_max: 1024,
            prefix_cache: true,
        }
    }
}

impl Scheduler {
    /// Sizes that could never make progress are raised: a block, a chunk and the running places to one (to two if idle
    /// sequences keep none: one is for prompts), the token budget to [`STEP_TOKENS_MIN`].
    pub fn new(options: SchedulerOptions) -> Self {
        let options = SchedulerOptions {
            block_tokens: options.block_tokens.max(1),
            blocks: options.blocks.max(1),
            step_tokens: options.step_tokens.max(STEP_TOKENS_MIN),
            prefill_chunk: options.prefill_chunk.max(1),
            running_max: options.running_max.max(if options.idle_keep_places { 1 } else { RUNNING_MIN }),
            ..options
        };
        Self {
            pool: BlockPool::new(options.blocks, options.block_tokens),
            options,
            sequences: HashMap::new(),
            running: Vec::new(),
            waiting: Waiting::default(),
            shares: Shares::default(),
            deadlines: BTreeSet::new(),
            step: 0,
            turns: 0,
            arrivals: 0,
            admitted: 0,
            is_full: false,
            preemptions: 0,
            prefix_query_tokens: 0,
            prefix_hit_tokens: 0,
        }
    }

    /// Puts a sequence in line. It gets blocks in one of the next plans.
    pub fn add(&mut self, now: Duration, new: NewSequence) -> Result<(), AddError> {
        self.check(now, &new)?;
        let id = new.id;
        if let Some(deadline) = new.deadline {
            self.deadlines.insert((deadline, id));
        }
        self.arrivals += 1;
        let share = self.shares.enter(new.tenant, new.tokens.len(), new.tokens_max);
        let class = self.waiting.class_at(new.priority, share.tag);
        self.sequences.insert(id, Sequence::new(new, class, share, self.arrivals));
        self.requeue(id);
        Ok(())
    }

    /// Appends chosen or drafted tokens: they become pending, and their logits are wanted.
    pub fn extend(&mut self, id: SequenceId, tokens: &[u32]) -> Result<(), ExtendError> {
        let sequence = self.sequences.get_mut(&id).ok_or(ExtendError::Unknown(id))?;
        let len = sequence.tokens.len() + tokens.len();
        if len > sequence.tokens_max {
            return Err(ExtendError::TooLong { tokens: len, tokens_max: sequence.tokens_max });
        }
        sequence.tokens.extend_from_slice(tokens);
        self.requeue(id);
        Ok(())
    }

    /// Forgets the tokens from index `len` on, computed or not: a refused draft. Before or after the commit
    /// of the step that computed them; logits of what is appended then are wanted again. Unknown sequences
    /// are ignored.
    pub fn truncate(&mut self, id: SequenceId, len: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if len < sequence.tokens.len() {
            sequence.truncate(len, &mut self.pool, self.options.block_tokens);
            self.requeue(id);
        }
    }

    /// Forgets a sequence and frees its blocks at once, in the middle of a step too: the rest of the step may
    /// be committed. False if it was not known.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let Some(mut sequence) = self.sequences.remove(&id) else { return false };
        sequence.release_blocks(&mut self.pool);
        if let Some(deadline) = sequence.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.waiting.remove(sequence.rank());
        self.shares.leave(sequence.tenant, sequence.share, sequence.tokens.len());
        self.running.retain(|&running| running != id);
        true
    }

    /// Records that the rows of the latest plan have been computed and their logits delivered; full blocks
    /// become findable. A commit of an earlier plan, or a second one, does nothing.
    ///
    /// A plan that failed is simply not committed: the next one repeats its tokens. What happened to a
    /// sequence since the plan (removed, truncated, extended) is respected.
    pub fn commit(&mut self, plan: &StepPlan) {
        if plan.step != self.step {
            return;
        }
        for row in &plan.rows {
            let Some(sequence) = self.sequences.get_mut(&row.sequence) else { continue };
            if sequence.commit() && self.options.prefix_cache {
                register_full_blocks(sequence, &mut self.pool, self.options.block_tokens);
            }
        }
    }

    /// Tokens that the sequence found in the prefix cache and did not compute when it was first admitted.
    pub fn cached_tokens(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).and_then(|sequence| sequence.cached_tokens).unwrap_or(0)
    }

    /// Whether the sequence has ever got a running place; it may have lost it since.
    pub fn has_started(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.cached_tokens.is_some())
    }

    /// The tokens of a sequence, pending ones included.
    pub fn tokens(&self, id: SequenceId) -> Option<&[u32]> {
        self.sequences.get(&id).map(|sequence| sequence.tokens.as_slice())
    }

    /// How many of those in line a new sequence of this priority would find before it. None while the latest plan had
    /// room for all: whoever has come since begins in the next one.
    pub fn ahead(&self, priority: Priority) -> usize {
        if self.is_full { self.waiting.until(priority, u64::MAX) } else { 0 }
    }

    /// The same for a sequence of this tenant.
    pub fn ahead_of(&self, priority: Priority, tenant: Tenant) -> usize {
        if self.is_full { self.waiting.until(priority, self.shares.tag(tenant)) } else { 0 }
    }

    /// When the next sequence expires: the latest time for the next plan.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    pub fn options(&self) -> &SchedulerOptions {
        &self.options
    }

    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.sequences.len() - self.running.len(),
            running: self.running.len(),
            running_max: self.options.running_max,
            admitted: self.admitted,
            is_full: self.is_full,
            total_blocks: self.pool.total(),
            free_blocks: self.pool.free(),
            cached_blocks: self.pool.findable(),
            steps: self.step,
            preemptions: self.preemptions,
            prefix_query_tokens: self.prefix_query_tokens,
            prefix_hit_tokens: self.prefix_hit_tokens,
        }
    }

    fn check(&self, now: Duration, new: &NewSequence) -> Result<(), AddError> {
        let (tokens, tokens_max, logits_from) = (new.tokens.len(), new.tokens_max, new.logits_from);
        let capacity = self.options.blocks * self.options.block_tokens;
        let waiting = self.sequences.len().saturating_sub(self.options.running_max);
        if self.sequences.contains_key(&new.id) {
            Err(AddError::Duplicate(new.id))
        } else if tokens == 0 {
            Err(AddError::Empty)
        } else if tokens > tokens_max {
            Err(AddError::TooLong { tokens, tokens_max })
        } else if logits_from > tokens {
            Err(AddError::LogitsFrom { logits_from, tokens })
        } else if tokens_max > capacity {
            Err(AddError::NeverFits { tokens_max, capacity })
        } else if new.deadline.is_some_and(|deadline| deadline <= now) {
            Err(AddError::DeadlinePassed)
        } else if self.sequences.len() >= self.options.running_max + self.options.waiting_max {
            Err(AddError::QueueFull { waiting, limit: self.options.waiting_max })
        } else {
            Ok(())
        }
    }

    /// Puts a sequence without blocks in line if it has something to compute, and out of it if not.
    fn requeue(&mut self, id: SequenceId) {
        let sequence = &self.sequences[&id];
        if sequence.ready() && !sequence.running {
            self.waiting.insert(sequence.rank(), id, sequence.asked, self.step);
        } else {
            self.waiting.remove(sequence.rank());
        }
    }
}

/// Makes the full computed blocks of a sequence findable. Where another sequence was first with the same
/// prefix, its block is held instead and the own copy is freed: their contents are the same, and every
/// registered block then has a registered parent that its holders hold too.
fn register_full_blocks(sequence: &mut Sequence, pool: &mut BlockPool, block_tokens: usize) {
    while (sequence.registered + 1) * block_tokens <= sequence.computed {
        let index = sequence.registered;
        let parent = sequence.parent(index, pool).expect("blocks are registered from the first on");
        let block = sequence.blocks[index];
        let tokens = &sequence.tokens[index * block_tokens..(index + 1) * block_tokens];
        match pool.register(block, parent, tokens) {
            Registration::New => {}
            Registration::Known(known) => {
                pool.hold(known);
                pool.release(block);
                sequence.blocks[index] = known;
            }
            Registration::Refused => return,
        }
        sequence.registered += 1;
    }
}

#[cfg(test)]
mod tests;
