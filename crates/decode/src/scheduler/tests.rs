//! A scheduler over a simulated cache: every position of a block remembers the prefix it was computed for, so
//! a wrong block table, a block that was overwritten or a missed recomputation is seen in the step that reads
//! it.

mod places;
mod random;
mod situations;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::*;

/// What the keys and values of a position stand for: the root and all tokens up to it.
fn fingerprint(root: CacheRoot, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (root, tokens).hash(&mut hasher);
    hasher.finish()
}

/// A scheduler, the memory that its plans write, and what the outside knows about its sequences.
struct World {
    scheduler: Scheduler,
    memory: Vec<u64>,
    known: BTreeMap<SequenceId, Known>,
    now: Duration,
    /// The last plan of a random history.
    latest: StepPlan,
    /// Tokens computed in committed steps.
    computed: usize,
}

struct Known {
    tokens: Vec<u32>,
    root: CacheRoot,
    wanted_from: usize,
    /// Per token, whether its logits have been delivered.
    delivered: Vec<bool>,
    /// How far the plan in flight will have computed tokens that are still there.
    planned_end: usize,
}

impl World {
    fn new(options: SchedulerOptions) -> Self {
        let scheduler = Scheduler::new(options);
        let memory = vec![0; options.blocks * options.block_tokens];
        Self {
            scheduler,
            memory,
            known: BTreeMap::new(),
            now: Duration::ZERO,
            latest: StepPlan::default(),
            computed: 0,
        }
    }

    fn add(&mut self, new: NewSequence) -> Result<(), AddError> {
        let known = Known {
            tokens: new.tokens.clone(),
            root: new.root,
            wanted_from: new.logits_from,
            delivered: vec![false; new.tokens.len()],
            planned_end: 0,
        };
        let id = new.id;
        self.scheduler.add(self.now, new)?;
        self.known.insert(id, known);
        Ok(())
    }

    fn extend(&mut self, id: SequenceId, tokens: &[u32]) -> Result<(), ExtendError> {
        self.scheduler.extend(id, tokens)?;
        let known = self.known.get_mut(&id).unwrap();
        known.tokens.extend_from_slice(tokens);
        known.delivered.resize(known.tokens.len(), false);
        Ok(())
    }

    fn truncate(&mut self, id: SequenceId, len: usize) {
        self.scheduler.truncate(id, len);
        let known = self.known.get_mut(&id).unwrap();
        known.tokens.truncate(len);
        known.delivered.truncate(len);
        known.wanted_from = known.wanted_from.min(known.tokens.len());
        known.planned_end = known.planned_end.min(len);
    }

    fn remove(&mut self, id: SequenceId) {
        assert_eq!(self.scheduler.remove(id), self.known.remove(&id).is_some());
    }

    fn plan(&mut self) -> StepPlan {
        let ran = self.scheduler.running.clone();
        let plan = self.scheduler.plan(self.now);
        self.check_limits(&plan);
        self.check_preempted(&plan, &ran);
        for row in &plan.rows {
            self.check_row(row);
            assert!(!plan.expired.contains(&row.sequence), "an expired sequence is not computed");
            self.known.get_mut(&row.sequence).unwrap().planned_end = row.start + row.tokens.len();
        }
        plan
    }

    fn check_limits(&self, plan: &StepPlan) {
        let options = self.scheduler.options();
        let tokens = plan.rows.iter().map(|row| row.tokens.len());
        assert!(tokens.clone().sum::<usize>() <= options.step_tokens, "the budget is respected");
        assert!(tokens.max().unwrap_or(1) <= options.prefill_chunk, "the chunk is respected");
        let in_places =
            if options.idle_keep_places { self.scheduler.stats().running } else { plan.rows.len() };
        assert!(in_places <= options.running_max, "places are respected");
        let mut ids: Vec<_> = plan.rows.iter().map(|row| row.sequence).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), plan.rows.len(), "one row per sequence");
        assert!(plan.preempted.iter().all(|id| !ids.contains(id)), "who lost its blocks sits the step out");
    }

    /// Who had something to do lost its blocks only to somebody of higher rank, who is served in this step, or who
    /// started in it and found everything computed.
    fn check_preempted(&self, plan: &StepPlan, ran: &[SequenceId]) {
        let rank = |id: &SequenceId| self.scheduler.sequences[id].rank();
        let served = plan.rows.iter().map(|row| &row.sequence);
        let started = self.scheduler.running.iter().filter(|id| !ran.contains(id));
        let best = served.chain(started).map(rank).min();
        for id in &plan.preempted {
            let sequence = &self.scheduler.sequences[id];
            let idle = !sequence.ready() || sequence.expired(self.now);
            assert!(idle || best.is_some_and(|best| best < rank(id)), "{id:?} lost its blocks to nobody");
        }
    }

    /// The row asks for the right tokens and logits, and finds its whole past in its blocks.
    fn check_row(&self, row: &PlannedRow) {
        let (known, block_tokens) = (&self.known[&row.sequence], self.scheduler.options().block_tokens);
        let end = row.start + row.tokens.len();
        assert!(row.start < end);
        assert_eq!(row.tokens, known.tokens[row.start..end]);
        assert_eq!(row.blocks.len(), end.div_ceil(block_tokens));
        for index in row.start..end {
            let wanted = index >= known.wanted_from && !known.delivered[index];
            assert_eq!(index - row.start >= row.logits_from, wanted, "logits of token {index}");
        }
        self.check_memory(row.sequence, &row.blocks, row.start);
    }

    fn check_memory(&self, id: SequenceId, blocks: &[BlockId], len: usize) {
        let known = &self.known[&id];
        for index in 0..len {
            let expected = fingerprint(known.root, &known.tokens[..=index]);
            assert_eq!(self.memory[self.slot(blocks, index)], expected, "{id:?} reads token {index}");
        }
    }

    fn slot(&self, blocks: &[BlockId], index: usize) -> usize {
        let block_tokens = self.scheduler.options().block_tokens;
        blocks[index / block_tokens].0 as usize * block_tokens + index % block_tokens
    }

    /// A forward: it writes the row's positions, with rubbish if it fails on the way.
    fn forward(&mut self, plan: &StepPlan, fails: bool) {
        for row in &plan.rows {
            // Who has left in the meantime is computed all the same.
            let Some(known) = self.known.get(&row.sequence) else { continue };
            let (root, tokens) = (known.root, known.tokens.clone());
            for index in row.start..row.start + row.tokens.len() {
                let slot = self.slot(&row.blocks, index);
                self.memory[slot] = if fails { 1 } else { fingerprint(root, &tokens[..=index]) };
            }
        }
    }

    fn commit(&mut self, plan: &StepPlan) {
        self.scheduler.commit(plan);
        for row in &plan.rows {
            self.computed += row.tokens.len();
            let Some(known) = self.known.get_mut(&row.sequence) else { continue };
            let end = std::mem::take(&mut known.planned_end);
            for index in (row.start + row.logits_from)..end.max(row.start + row.logits_from) {
                let before = std::mem::replace(&mut known.delivered[index], true);
                assert!(!before, "logits of token {index} of {:?} twice", row.sequence);
            }
        }
        self.audit();
    }

    fn step(&mut self) -> StepPlan {
        let plan = self.plan();
        self.forward(&plan, false);
        self.commit(&plan);
        plan
    }

    /// Everything that the scheduler believes is computed is in memory, and the pool is consistent.
    fn audit(&self) {
        let sequences = &self.scheduler.sequences;
        assert_eq!(sequences.len(), self.known.len());
        for (id, sequence) in sequences {
            assert_eq!(sequence.tokens, self.known[id].tokens);
            assert!(sequence.running || sequence.blocks.is_empty(), "only running sequences hold blocks");
            assert_eq!(sequence.running, self.scheduler.running.contains(id));
            assert!(sequence.computed <= sequence.blocks.len() * self.scheduler.options().block_tokens);
            self.check_memory(*id, &sequence.blocks, sequence.computed);
        }
        let tables: Vec<_> = sequences.values().map(|sequence| sequence.blocks.as_slice()).collect();
        self.scheduler.pool.audit(&tables);
    }

    fn undelivered(&self, id: SequenceId) -> usize {
        let known = &self.known[&id];
        known.delivered.iter().skip(known.wanted_from).filter(|delivered| !**delivered).count()
    }
}
