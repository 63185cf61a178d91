//! One sequence: its tokens, how far they are computed and delivered, and the blocks that hold them.

use std::cmp::Reverse;
use std::time::Duration;

use super::shares::Share;
use super::{IDLE_PATIENCE, NewSequence, PROMOTION_STEPS, Priority, Tenant};
use crate::blocks::{BlockId, BlockPool, CacheRoot, Parent};

/// The order in which sequences are served, and the reverse of the order in which they lose their blocks: by
/// class, then by the share that its tenant has had, then by arrival. Smaller is served earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) class: Reverse<Priority>,
    pub(super) tag: u64,
    pub(super) arrival: u64,
}

pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    pub(super) tokens_max: usize,
    pub(super) deadline: Option<Duration>,
    root: CacheRoot,
    /// The priority that was asked for.
    pub(super) asked: Priority,
    /// The asked priority, or higher by promotion.
    class: Priority,
    pub(super) tenant: Tenant,
    /// When its tenant's turn comes.
    pub(super) share: Share,
    arrival: u64,

    /// Whether it has a running place, and so may hold blocks.
    pub(super) running: bool,
    /// The block table. It covers at least `computed` positions.
    pub(super) blocks: Vec<BlockId>,
    /// The first so many blocks are full and findable: not to be written.
    pub(super) registered: usize,
    /// Keys and values of `tokens[..computed]` are in the blocks.
    pub(super) computed: usize,
    /// `tokens[..delivered]` have been computed once. Beyond lies what somebody waits for; below, what was
    /// lost by preemption and is computed again only when there is something beyond.
    delivered: usize,
    /// First index whose logits are wanted and not yet delivered.
    pub(super) wanted_from: usize,
    /// Up to where the step in flight computes it.
    planned_end: Option<usize>,

    /// Prefix found at the first admission.
    pub(super) cached_tokens: Option<usize>,
    /// Number of its last row among all rows planned: who was served longest ago has the smallest.
    pub(super) turn: u64,
    /// Last step in which it was served or promoted, or had nothing to compute.
    since: u64,
    /// Since when it has had nothing to compute while holding blocks.
    idle_since: Option<Duration>,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, class: Priority, share: Share, arrival: u64) -> Self {
        Self {
            tokens: new.tokens,
            tokens_max: new.tokens_max,
            deadline: new.deadline,
            root: new.root,
            asked: new.priority,
            class,
            tenant: new.tenant,
            share,
            arrival,
            running: false,
            blocks: Vec::new(),
            registered: 0,
            computed: 0,
            delivered: 0,
            wanted_from: new.logits_from,
            planned_end: None,
            cached_tokens: None,
            turn: 0,
            since: 0,
            idle_since: None,
        }
    }

    pub(super) fn rank(&self) -> Rank {
        Rank { class: Reverse(self.class), tag: self.share.tag, arrival: self.arrival }
    }

    pub(super) fn class(&self) -> Priority {
        self.class
    }

    /// Whether somebody waits for something that a step can compute.
    pub(super) fn ready(&self) -> bool {
        self.tokens.len() > self.delivered
    }

    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    pub(super) fn expired(&self, now: Duration) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Whether it has been idle for so long that its blocks are anyone's.
    pub(super) fn unprotected(&self, now: Duration) -> bool {
        self.idle_since.is_some_and(|since| now.saturating_sub(since) >= IDLE_PATIENCE)
    }

    /// Notes, once per step, whether a running sequence has something to compute; returns whether it has.
    pub(super) fn observe(&mut self, now: Duration, step: u64) -> bool {
        if !self.ready() || self.expired(now) {
            self.idle_since.get_or_insert(now);
            self.since = step;
            return false;
        }
        self.idle_since = None;
        if step.saturating_sub(self.since) >= PROMOTION_STEPS {
            self.promote();
            self.since = step;
        }
        true
    }

    pub(super) fn promote(&mut self) {
        self.class = match self.class {
            Priority::Low => Priority::Normal,
            Priority::Normal | Priority::High => Priority::High,
        };
    }

    /// What stands before block `index`, or `None` where the block before it could not be registered.
    pub(super) fn parent(&self, index: usize, pool: &BlockPool) -> Option<Parent> {
        match index.checked_sub(1) {
            None => Some(Parent::Root(self.root)),
            Some(before) if before < self.registered => pool.as_parent(self.blocks[before]),
            Some(_) => None,
        }
    }

    /// Starts to run on a prefix that others have computed.
    pub(super) fn start(&mut self, prefix: Vec<BlockId>, block_tokens: usize, step: u64) {
        let tokens = prefix.len() * block_tokens;
        self.running = true;
        self.registered = prefix.len();
        self.blocks = prefix;
        self.computed = tokens;
        self.delivered = self.delivered.max(tokens);
        self.cached_tokens.get_or_insert(tokens);
        self.idle_since = None;
        self.since = step;
    }

    pub(super) fn serve(&mut self, end: usize, turn: u64, step: u64) {
        self.planned_end = Some(end);
        self.turn = turn;
        self.since = step;
    }

    /// Takes over what the step in flight has computed; false if it was not part of it.
    pub(super) fn commit(&mut self) -> bool {
        let Some(end) = self.planned_end.take() else { return false };
        self.computed = end;
        self.delivered = self.delivered.max(end);
        self.wanted_from = self.wanted_from.max(end);
        true
    }

    /// Forgets `tokens[len..]`, and whatever of a step in flight would have computed them.
    pub(super) fn truncate(&mut self, len: usize, pool: &mut BlockPool, block_tokens: usize) {
        self.tokens.truncate(len);
        self.delivered = self.delivered.min(len);
        self.wanted_from = self.wanted_from.min(len);
        self.keep_computed(len);
        for block in self.blocks.drain(self.blocks.len().min(len.div_ceil(block_tokens))..).rev() {
            pool.release(block);
        }
        let full = len / block_tokens;
        if full < self.registered && !len.is_multiple_of(block_tokens) {
            // What is appended next would be written into a full, findable block.
            if pool.holders(self.blocks[full]) == 1 {
                pool.forget(self.blocks[full]);
            } else {
                // Others read it. To compute the few tokens of one block again is cheaper than a way to copy
                // blocks.
                pool.release(self.blocks.remove(full));
                self.keep_computed(full * block_tokens);
            }
        }
        self.registered = self.registered.min(full);
    }

    /// Gives up its blocks and its running place; everything is to be computed again.
    pub(super) fn stop(&mut self, pool: &mut BlockPool) {
        self.release_blocks(pool);
        self.running = false;
        self.registered = 0;
        self.computed = 0;
        self.planned_end = None;
        self.idle_since = None;
    }

    pub(super) fn release_blocks(&mut self, pool: &mut BlockPool) {
        for block in self.blocks.drain(..).rev() {
            pool.release(block);
        }
    }

    fn keep_computed(&mut self, len: usize) {
        self.computed = self.computed.min(len);
        self.planned_end = self.planned_end.map(|end| end.min(len));
    }
}
