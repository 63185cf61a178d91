//! The order of a step: who is served, who is admitted, and who has to give up blocks for it.
//!
//! 1. Running sequences with a token, or a token and its drafts, to compute: short rows that somebody
//!    watches. They leave a quarter of the budget to prompts if there are any. In a class, who was served
//!    longest ago comes first, so that a budget that is too small for all goes round. The budget is one of tokens,
//!    and of rows where idle sequences keep no place.
//! 2. Chunks of prompts, those in progress and those in line together, in the order of their rank.
//!
//! When blocks run out, the lowest-ranked sequence gives up all of its own (its keys and values are computed
//! again later): only to one of higher rank, or to anyone if it has been idle for longer than
//! [`IDLE_PATIENCE`]. To *start*, a sequence takes blocks from lower classes only, judged by the priority it
//! asked for and not by one it rose to in line; among equals, those that run go on. The highest-ranked
//! sequence that can run therefore always gets what it needs, and as what is added fits the pool by itself,
//! there is no deadlock.
//!
//! [`IDLE_PATIENCE`]: super::IDLE_PATIENCE

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::Duration;

use super::sequence::{Rank, Sequence};
use super::{PlannedRow, Priority, Scheduler, SchedulerOptions, SequenceId, StepPlan};
use crate::blocks::{BlockId, BlockPool, ContentHash};

/// Running rows up to this length (a token and its drafts, the rest of a prompt) go before longer ones.
const SHORT_ROW_TOKENS: usize = 16;

/// The part of the budget that short rows leave to prompts: one in so many tokens.
const PREFILL_SHARE: usize = 4;

/// How many waiting sequences a plan looks at. Most plans admit the first or stop there; the bound is for a
/// long line of sequences that all wait for one prefix to be computed.
const ADMISSION_LOOKAHEAD: usize = 64;

/// Order of the short rows: class, last turn, arrival.
type Turn = (Reverse<Priority>, u64, u64, SequenceId);

/// A step in the making: what is planned, and what is left to plan with.
struct Workbench {
    plan: StepPlan,
    now: Duration,
    tokens_left: usize,
    rows_left: usize,
    /// The next full block of every row: who begins alike waits for it instead of computing it too.
    in_flight: Vec<ContentHash>,
}

/// What a sequence wants other sequences' blocks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// To go on: may take from everyone of lower rank.
    Grow,
    /// To start: may take from lower classes.
    Start,
}

enum Admission {
    Admitted,
    /// Not in this step; those behind may pass.
    Later,
    /// There is no room; nobody may pass, or a long prompt would never find any.
    NoRoom,
}

impl Workbench {
    fn is_full(&self) -> bool {
        self.tokens_left == 0 || self.rows_left == 0
    }
}

impl Scheduler {
    /// Decides what the next step computes. With no rows there is nothing to do before something is added,
    /// extended or removed, before [`Scheduler::next_deadline`], or before
    /// [`IDLE_PATIENCE`](super::IDLE_PATIENCE) has passed.
    pub fn plan(&mut self, now: Duration) -> StepPlan {
        self.step += 1;
        let expired = self.deadlines.range(..=(now, SequenceId(u64::MAX)));
        let plan = StepPlan {
            step: self.step,
            expired: expired.map(|&(_, id)| id).collect(),
            ..StepPlan::default()
        };
        let tokens_left = self.options.step_tokens;
        let rows_left = if self.options.idle_keep_places { usize::MAX } else { self.options.running_max };
        let mut bench = Workbench { plan, now, tokens_left, rows_left, in_flight: Vec::new() };

        self.is_full = false;
        self.promote_waiting();
        let (short, long) = self.runnable(now);
        let (tokens_kept, rows_kept) = self.kept_for_prompts(!long.is_empty());
        bench.tokens_left -= tokens_kept;
        bench.rows_left -= rows_kept;
        let left_out = self.plan_short_rows(&short, &mut bench);
        bench.tokens_left += tokens_kept;
        bench.rows_left += rows_kept;
        self.plan_prompts(&long, &mut bench);
        self.plan_short_rows(left_out, &mut bench);
        bench.plan
    }

    fn promote_waiting(&mut self) {
        let overdue = self.waiting.take_overdue(self.step);
        overdue.iter().for_each(|&id| self.promote(id));
        if !overdue.is_empty() {
            for id in self.waiting.passed() {
                self.waiting.remove(self.sequences[&id].rank());
                self.promote(id);
            }
        }
    }

    /// Of a sequence that was taken out of the line.
    fn promote(&mut self, id: SequenceId) {
        self.sequences.get_mut(&id).expect("who waits is known").promote();
        self.requeue(id);
    }

    /// The running sequences with something to compute, in the order in which they are served.
    fn runnable(&mut self, now: Duration) -> (Vec<Turn>, Vec<(Rank, SequenceId)>) {
        let (mut short, mut long) = (Vec::with_capacity(self.running.len()), Vec::new());
        for &id in &self.running {
            let sequence = self.sequences.get_mut(&id).expect("who runs is known");
            if !sequence.observe(now, self.step) {
                continue;
            }
            let rank = sequence.rank();
            match sequence.pending() <= SHORT_ROW_TOKENS {
                true => short.push((rank.class, sequence.turn, rank.arrival, id)),
                false => long.push((rank, id)),
            }
        }
        short.sort_unstable();
        long.sort_unstable();
        (short, long)
    }

    /// The tokens and rows that short rows leave to prompts at first; what no prompt uses comes back to them.
    fn kept_for_prompts(&self, prompts_run: bool) -> (usize, usize) {
        let SchedulerOptions { step_tokens, prefill_chunk, running_max, .. } = self.options;
        match prompts_run || !self.waiting.is_empty() {
            true => ((step_tokens / PREFILL_SHARE).min(prefill_chunk), running_max.div_ceil(PREFILL_SHARE)),
            false => (0, 0),
        }
    }

    /// Returns those that the budget left out.
    fn plan_short_rows<'a>(&mut self, short: &'a [Turn], bench: &mut Workbench) -> &'a [Turn] {
        for (at, &(.., id)) in short.iter().enumerate() {
            if bench.is_full() {
                return &short[at..];
            }
            self.serve(id, bench);
        }
        &[]
    }

    fn plan_prompts(&mut self, long: &[(Rank, SequenceId)], bench: &mut Workbench) {
        let mut long = long.iter().copied().peekable();
        let mut waiting = self.waiting.first_after(None);
        let mut lookahead = ADMISSION_LOOKAHEAD;
        while !bench.is_full() {
            match (long.peek().copied(), waiting) {
                (Some((rank, id)), next) if next.is_none_or(|(next, _)| rank < next) => {
                    long.next();
                    self.serve(id, bench);
                }
                (_, Some((rank, id))) => {
                    lookahead -= 1;
                    let admission = self.admit(id, bench);
                    if let Admission::Admitted = admission {
                        self.serve(id, bench);
                    }
                    self.is_full |= matches!(admission, Admission::NoRoom);
                    waiting = match admission {
                        Admission::NoRoom => None,
                        _ if lookahead == 0 => None,
                        _ => self.waiting.first_after(Some(rank)),
                    };
                }
                _ => return,
            }
        }
        self.is_full |= waiting.is_some();
    }

    /// Plans as many pending tokens of a running sequence as budget, chunk and blocks allow. For the first of
    /// them others may lose their blocks; the rest (drafts, more of a prompt) takes only what is free.
    fn serve(&mut self, id: SequenceId, bench: &mut Workbench) {
        let block_tokens = self.options.block_tokens;
        let sequence = &self.sequences[&id];
        let start = sequence.computed;
        let wish = sequence.pending().min(self.options.prefill_chunk).min(bench.tokens_left);
        // It may have lost its place to a sequence that was served before it.
        if wish == 0
            || bench.rows_left == 0
            || !sequence.running
            || !self.grow(id, start / block_tokens + 1, bench)
        {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("who is served is known");
        while sequence.blocks.len() * block_tokens < start + wish {
            let Some(block) = self.pool.allocate() else { break };
            sequence.blocks.push(block);
        }
        let end = (start + wish).min(sequence.blocks.len() * block_tokens);
        self.turns += 1;
        sequence.serve(end, self.turns, self.step);
        bench.tokens_left -= end - start;
        bench.rows_left -= 1;
        bench.plan.rows.push(row(id, sequence, start..end, block_tokens));
        if self.options.prefix_cache {
            bench.in_flight.extend(next_full_block(sequence, start / block_tokens, &self.pool, block_tokens));
        }
    }

    /// Sees to it that a running sequence has this many blocks.
    fn grow(&mut self, id: SequenceId, blocks: usize, bench: &mut Workbench) -> bool {
        while self.sequences[&id].blocks.len() < blocks {
            if self.pool.free() == 0 && !self.preempt_for(id, bench) {
                return false;
            }
            let block = self.pool.allocate().expect("a block is free");
            self.sequences.get_mut(&id).expect("who grows is known").blocks.push(block);
        }
        true
    }

    /// Frees a block for a running sequence. Nobody is preempted in vain: those who may lose their blocks
    /// could hold them together with others who keep them.
    fn preempt_for(&mut self, id: SequenceId, bench: &mut Workbench) -> bool {
        let victims = self.victims(id, Claim::Grow, bench.now);
        if self.freed_by(&victims) == 0 {
            return false;
        }
        for victim in victims {
            if self.pool.free() == 0 {
                self.preempt(victim, bench);
            }
        }
        true
    }

    /// Gives a waiting sequence a running place and blocks for all tokens it has, so that prompts that start
    /// together cannot get stuck on each other half-way.
    fn admit(&mut self, id: SequenceId, bench: &mut Workbench) -> Admission {
        let block_tokens = self.options.block_tokens;
        let sequence = &self.sequences[&id];
        if sequence.expired(bench.now) || bench.plan.preempted.contains(&id) {
            return Admission::Later;
        }
        let (prefix, next) = self.find_prefix(sequence);
        if next.is_some_and(|next| bench.in_flight.contains(&next)) {
            return Admission::Later;
        }
        let looked_up = sequence.wanted_from.min(sequence.tokens.len());
        let fresh = sequence.tokens.len().div_ceil(block_tokens) - prefix.len();
        prefix.iter().for_each(|&block| self.pool.hold(block));
        if !self.make_room(id, fresh, bench) {
            prefix.iter().rev().for_each(|&block| self.pool.release(block));
            return Admission::NoRoom;
        }
        self.prefix_query_tokens += if self.options.prefix_cache { looked_up as u64 } else { 0 };
        self.prefix_hit_tokens += (prefix.len() * block_tokens) as u64;
        let sequence = self.sequences.get_mut(&id).expect("who is admitted is known");
        self.waiting.remove(sequence.rank());
        self.running.push(id);
        self.admitted += 1;
        sequence.start(prefix, block_tokens, self.step);
        self.shares.serve(sequence.share.tag);
        let allocate = |_| self.pool.allocate().expect("room was made");
        sequence.blocks.extend((0..fresh).map(allocate));
        Admission::Admitted
    }

    /// The findable blocks that a sequence begins with, and the hash of the first one that was not found.
    /// Tokens whose logits are wanted have to be computed, so they are not looked for.
    fn find_prefix(&self, sequence: &Sequence) -> (Vec<BlockId>, Option<ContentHash>) {
        let mut found = Vec::new();
        if !self.options.prefix_cache {
            return (found, None);
        }
        let mut parent = sequence.parent(0, &self.pool).expect("the first block has the root");
        let shareable = sequence.wanted_from.min(sequence.tokens.len());
        for tokens in sequence.tokens[..shareable].chunks_exact(self.options.block_tokens) {
            let Some(block) = self.pool.find(parent, tokens) else {
                return (found, Some(BlockPool::hash(parent, tokens)));
            };
            found.push(block);
            parent = self.pool.as_parent(block).expect("a found block has content");
        }
        (found, None)
    }

    /// Sees to it that a waiting sequence can start with this many fresh blocks and still leave one free for
    /// every other running sequence: whoever starts into a full pool would be the first to be preempted.
    fn make_room(&mut self, id: SequenceId, fresh: usize, bench: &mut Workbench) -> bool {
        let SchedulerOptions { running_max, idle_keep_places, .. } = self.options;
        // Where idle sequences keep no place, the rows of the step have said already whether there is one.
        let places = if idle_keep_places { running_max } else { usize::MAX };
        let fits = |scheduler: &Self| {
            let running = scheduler.running.len();
            running < places && scheduler.pool.free() >= fresh + running
        };
        if fits(self) {
            return true;
        }
        let victims = self.victims(id, Claim::Start, bench.now);
        let left = self.running.len() - victims.len();
        if left >= places || self.pool.free() + self.freed_by(&victims) < fresh + left {
            return false;
        }
        for victim in victims {
            if !fits(self) {
                self.preempt(victim, bench);
            }
        }
        true
    }

    /// Who may lose blocks to a sequence, first the one that loses them first: the lowest class, there the
    /// youngest. Sequences of higher rank that have been idle for too long come last.
    fn victims(&self, id: SequenceId, claim: Claim, now: Duration) -> Vec<SequenceId> {
        let claimant = &self.sequences[&id];
        let below = |other: &Sequence| match claim {
            Claim::Grow => other.rank() > claimant.rank(),
            Claim::Start => other.class() < claimant.asked,
        };
        let others =
            self.running.iter().filter(|&&other| other != id).map(|other| (*other, &self.sequences[other]));
        let others = others.filter(|(_, other)| below(other) || other.unprotected(now));
        let mut victims: Vec<_> = others.map(|(id, other)| (below(other), other.rank(), id)).collect();
        victims.sort_unstable_by_key(|&(below, rank, _)| Reverse((below, rank)));
        victims.into_iter().map(|(_, _, id)| id).collect()
    }

    /// How many blocks become free if all of these are preempted.
    fn freed_by(&self, victims: &[SequenceId]) -> usize {
        let mut held: HashMap<BlockId, usize> = HashMap::new();
        let tables = victims.iter().map(|victim| &self.sequences[victim].blocks);
        tables.flatten().for_each(|&block| *held.entry(block).or_default() += 1);
        held.iter().filter(|&(&block, &count)| self.pool.holders(block) == count).count()
    }

    /// Takes a sequence's blocks and running place, and its row out of the step.
    fn preempt(&mut self, id: SequenceId, bench: &mut Workbench) {
        let sequence = self.sequences.get_mut(&id).expect("who is preempted is known");
        sequence.stop(&mut self.pool);
        self.running.retain(|&running| running != id);
        if let Some(at) = bench.plan.rows.iter().position(|row| row.sequence == id) {
            bench.tokens_left += bench.plan.rows.remove(at).tokens.len();
            bench.rows_left += 1;
        }
        bench.plan.preempted.push(id);
        self.preemptions += 1;
        self.requeue(id);
    }
}

fn row(
    id: SequenceId,
    sequence: &Sequence,
    range: std::ops::Range<usize>,
    block_tokens: usize,
) -> PlannedRow {
    PlannedRow {
        sequence: id,
        start: range.start,
        tokens: sequence.tokens[range.clone()].to_vec(),
        blocks: sequence.blocks[..range.end.div_ceil(block_tokens)].to_vec(),
        logits_from: sequence.wanted_from.clamp(range.start, range.end) - range.start,
    }
}

/// The hash of a block of a sequence whose tokens are all known.
fn next_full_block(
    sequence: &Sequence,
    index: usize,
    pool: &BlockPool,
    block_tokens: usize,
) -> Option<ContentHash> {
    let tokens = sequence.tokens.get(index * block_tokens..(index + 1) * block_tokens)?;
    Some(BlockPool::hash(sequence.parent(index, pool)?, tokens))
}
