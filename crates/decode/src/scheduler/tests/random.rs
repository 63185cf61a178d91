//! Any history of calls keeps the promises: random adds, drafts, refusals, departures, failed steps and
//! deadlines.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Add {
        family: u32,
        tokens: usize,
        growth: usize,
        logits: usize,
        root: u64,
        priority: u8,
        deadline: Option<u64>,
    },
    Extend {
        which: usize,
        tokens: Vec<u32>,
    },
    Truncate {
        which: usize,
        keep: f64,
    },
    Remove {
        which: usize,
    },
    /// A plan, what happens while it is computed, and whether the forward succeeds.
    Step {
        meanwhile: Vec<Op>,
        fails: bool,
    },
    Wait {
        ms: u64,
    },
}

fn change() -> impl Strategy<Value = Op> {
    let which = 0..usize::MAX;
    let add = (0..2u32, 1..20usize, 0..12usize, 0..4usize, 0..2u64, 0..3u8, deadline());
    let add = add.prop_map(|(family, tokens, growth, logits, root, priority, deadline)| Op::Add {
        family,
        tokens,
        growth,
        logits,
        root,
        priority,
        deadline,
    });
    let extend = (which.clone(), prop::collection::vec(0..2u32, 1..5));
    let extend = extend.prop_map(|(which, tokens)| Op::Extend { which, tokens });
    let truncate = (which.clone(), 0.0..1.0f64).prop_map(|(which, keep)| Op::Truncate { which, keep });
    let remove = which.prop_map(|which| Op::Remove { which });
    prop_oneof![3 => add, 6 => extend, 3 => truncate, 1 => remove]
}

fn deadline() -> impl Strategy<Value = Option<u64>> {
    prop::option::weighted(0.1, 0..2000u64)
}

fn op() -> impl Strategy<Value = Op> {
    let step = (prop::collection::vec(change(), 0..3), prop::bool::weighted(0.15));
    let step = step.prop_map(|(meanwhile, fails)| Op::Step { meanwhile, fails });
    let wait = (0..700u64).prop_map(|ms| Op::Wait { ms });
    prop_oneof![4 => change(), 6 => step, 1 => wait]
}

fn options() -> impl Strategy<Value = SchedulerOptions> {
    let sizes = (1..5usize, 2..24usize, 4..40usize, 1..24usize, 1..7usize, 0..6usize);
    (sizes, prop::bool::weighted(0.8), any::<bool>()).prop_map(|(sizes, prefix_cache, idle_keep_places)| {
        let (block_tokens, blocks, step_tokens, prefill_chunk, running_max, waiting_max) = sizes;
        let options = SchedulerOptions { block_tokens, blocks, step_tokens, ..Default::default() };
        SchedulerOptions {
            prefill_chunk,
            running_max,
            waiting_max,
            prefix_cache,
            idle_keep_places,
            ..options
        }
    })
}

impl World {
    fn pick(&self, which: usize) -> Option<SequenceId> {
        self.known.keys().nth(which.checked_rem(self.known.len())?).copied()
    }

    fn apply(&mut self, op: &Op, number: usize) -> Option<StepPlan> {
        match op {
            Op::Add { family, tokens, growth, logits, root, priority, deadline } => {
                let tokens_max = tokens + growth;
                let result = self.add(NewSequence {
                    id: SequenceId(number as u64),
                    tokens: (0..*tokens as u32).map(|index| (index + family) % 3).collect(),
                    logits_from: tokens.saturating_sub(*logits),
                    tokens_max,
                    root: CacheRoot(*root),
                    priority: [Priority::Low, Priority::Normal, Priority::High][*priority as usize],
                    tenant: Tenant(number as u64 % 3),
                    deadline: deadline.map(|ms| self.now + Duration::from_millis(1 + ms)),
                });
                let options = self.scheduler.options();
                let fits = tokens_max <= options.blocks * options.block_tokens;
                let full = self.known.len() - usize::from(result.is_ok())
                    >= options.running_max + options.waiting_max;
                assert_eq!(result.is_ok(), fits && !full);
            }
            Op::Extend { which, tokens } => {
                let id = self.pick(*which)?;
                let result = self.extend(id, tokens);
                assert!(matches!(result, Ok(()) | Err(ExtendError::TooLong { .. })));
            }
            Op::Truncate { which, keep } => {
                let id = self.pick(*which)?;
                self.truncate(id, (self.known[&id].tokens.len() as f64 * keep) as usize);
            }
            Op::Remove { which } => self.pick(*which).into_iter().for_each(|id| self.remove(id)),
            Op::Wait { ms } => self.now += Duration::from_millis(*ms),
            Op::Step { meanwhile, fails } => {
                let earlier = std::mem::take(&mut self.latest);
                let plan = self.plan();
                self.forward(&plan, *fails);
                self.scheduler.commit(&earlier);
                for (sub, op) in meanwhile.iter().enumerate() {
                    self.apply(op, 1_000_000 + number * 10 + sub);
                }
                if !fails {
                    self.commit(&plan);
                }
                for &id in &plan.expired {
                    self.scheduler.remove(id);
                    self.known.remove(&id);
                }
                self.latest = plan.clone();
                return Some(plan);
            }
        }
        self.audit();
        None
    }

    /// Steps until nothing is left to compute. Every step serves somebody, or waits for idle sequences to
    /// lose their protection.
    fn drain(&mut self) {
        let tokens: usize = self.known.values().map(|known| known.tokens.len()).sum();
        let mut steps = 0;
        while self.known.keys().any(|&id| self.undelivered(id) > 0) {
            self.now += IDLE_PATIENCE / 4;
            let plan = self.step();
            for &id in &plan.expired {
                self.remove(id);
            }
            steps += 1;
            assert!(steps <= 16 + 8 * tokens, "no progress: {:?}", self.scheduler.stats());
        }
    }
}

fn check(options: SchedulerOptions, ops: &[Op]) {
    let mut world = World::new(options);
    let mut replay = World::new(options);
    for (number, op) in ops.iter().enumerate() {
        let plan = world.apply(op, number);
        assert_eq!(plan, replay.apply(op, number), "a plan is a function of the calls");
    }
    world.drain();
    for id in world.known.keys().copied().collect::<Vec<_>>() {
        world.remove(id);
    }
    world.audit();
    let stats = world.scheduler.stats();
    assert_eq!((stats.waiting, stats.running, stats.free_blocks), (0, 0, stats.total_blocks));
    assert_eq!(world.scheduler.next_deadline(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_history_computes_what_is_wanted_once_from_the_right_blocks_and_leaks_none(
        options in options(),
        ops in prop::collection::vec(op(), 1..80),
    ) {
        check(options, &ops);
    }
}
