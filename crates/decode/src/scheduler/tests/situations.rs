//! What a reader expects of a scheduler, one situation at a time. Blocks hold four tokens.

use super::*;

pub(super) const A: SequenceId = SequenceId(1);
pub(super) const B: SequenceId = SequenceId(2);
pub(super) const C: SequenceId = SequenceId(3);
pub(super) const D: SequenceId = SequenceId(4);

pub(super) fn world(blocks: usize, step_tokens: usize) -> World {
    let options = SchedulerOptions { block_tokens: 4, blocks, step_tokens, ..SchedulerOptions::default() };
    World::new(SchedulerOptions { prefill_chunk: 16, running_max: 16, waiting_max: 4, ..options })
}

/// A prompt that shares no block with another id's.
pub(super) fn prompt(id: SequenceId, len: u32, priority: Priority) -> NewSequence {
    NewSequence {
        id,
        tokens: (0..len).map(|index| id.0 as u32 * 1000 + index).collect(),
        logits_from: len as usize - 1,
        tokens_max: len as usize,
        root: CacheRoot(0),
        priority,
        tenant: Tenant(0),
        deadline: None,
    }
}

/// A prompt that may grow to so many tokens.
pub(super) fn chat(id: SequenceId, len: u32, tokens_max: usize, priority: Priority) -> NewSequence {
    NewSequence { tokens_max, ..prompt(id, len, priority) }
}

pub(super) fn ids(plan: &StepPlan) -> Vec<SequenceId> {
    plan.rows.iter().map(|row| row.sequence).collect()
}

fn lens(plan: &StepPlan) -> Vec<usize> {
    plan.rows.iter().map(|row| row.tokens.len()).collect()
}

impl World {
    fn drain_all(&mut self) {
        (0..100).for_each(|_| drop(self.step()));
        assert!(self.known.keys().all(|&id| self.undelivered(id) == 0));
    }

    /// A step after which every sequence whose logits were delivered gets its next token.
    pub(super) fn generate(&mut self) -> StepPlan {
        let plan = self.step();
        for row in plan.rows.iter().filter(|row| row.logits_from < row.tokens.len()) {
            self.extend(row.sequence, &[5]).unwrap();
        }
        plan
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_while_answers_go_on() {
    let mut world = world(1000, 20);
    world.add(chat(A, 4, 1000, Priority::Normal)).unwrap();
    world.generate();
    world.add(chat(B, 40, 1000, Priority::Normal)).unwrap();
    let plans: Vec<_> = (0..4).map(|_| world.generate()).collect();
    assert!(plans.iter().all(|plan| ids(plan) == [A, B]));
    assert_eq!(plans.iter().map(lens).collect::<Vec<_>>(), [[1, 16], [1, 16], [1, 8], [1, 1]]);
    let wanted = |plan: &StepPlan| plan.rows[1].tokens.len() - plan.rows[1].logits_from;
    assert_eq!(plans.iter().map(wanted).collect::<Vec<_>>(), [0, 0, 1, 1], "only the last token's logits");
}

#[test]
fn a_refused_draft_is_computed_again_from_the_token_that_replaces_it() {
    for refused_before_commit in [true, false] {
        let mut world = world(1000, 20);
        world.add(chat(A, 6, 1000, Priority::Normal)).unwrap();
        world.step();
        world.extend(A, &[11, 12, 13, 14]).unwrap();
        let plan = world.plan();
        assert_eq!((plan.rows[0].start, plan.rows[0].tokens.len(), plan.rows[0].logits_from), (6, 4, 0));
        world.forward(&plan, false);
        if refused_before_commit {
            world.truncate(A, 8);
            world.extend(A, &[99]).unwrap();
            world.commit(&plan);
        } else {
            world.commit(&plan);
            world.truncate(A, 8);
            world.extend(A, &[99]).unwrap();
        }
        let row = &world.step().rows[0];
        assert_eq!((row.start, row.tokens.as_slice(), row.logits_from), (8, &[99][..], 0));
    }
}

#[test]
fn a_sweep_of_one_prompt_computes_it_once() {
    let mut world = world(1000, 64);
    world.scheduler.options.running_max = 100;
    for id in (1..=91).map(SequenceId) {
        let tokens = (0..40).collect();
        world.add(NewSequence { tokens, ..prompt(id, 40, Priority::Normal) }).unwrap();
    }
    world.drain_all();
    // Nine full blocks are shared; the last block holds the token whose logits are wanted.
    assert_eq!(world.computed, 40 + 90 * 4);
    let cached: Vec<_> = (1..=91).map(|id| world.scheduler.cached_tokens(SequenceId(id))).collect();
    assert_eq!((cached[0], &cached[1..]), (0, &[36; 90][..]));
    assert_eq!(world.scheduler.stats().prefix_hit_tokens, 90 * 36);
}

#[test]
fn another_preference_does_not_see_the_blocks_of_the_first() {
    let mut world = world(1000, 64);
    for (id, root) in [(A, 1), (B, 2), (C, 1)] {
        let tokens = (0..12).collect();
        let same = NewSequence { tokens, root: CacheRoot(root), ..prompt(id, 12, Priority::Normal) };
        world.add(same).unwrap();
        world.drain_all();
    }
    assert_eq!([A, B, C].map(|id| world.scheduler.cached_tokens(id)), [0, 0, 8]);
}

#[test]
fn the_next_turn_of_a_conversation_finds_the_last_one_with_its_answer() {
    let mut world = world(1000, 64);
    world.add(chat(A, 10, 1000, Priority::Normal)).unwrap();
    (0..7).for_each(|_| drop(world.generate()));
    let mut tokens = world.scheduler.tokens(A).unwrap().to_vec();
    world.remove(A);
    tokens.extend([1, 2, 3]);
    world.add(NewSequence { tokens, ..chat(B, 20, 1000, Priority::Normal) }).unwrap();
    world.step();
    assert_eq!(world.scheduler.cached_tokens(B), 16, "four full blocks of prompt and answer");
}

#[test]
fn when_blocks_run_out_the_youngest_recomputes_and_both_answers_are_whole() {
    let mut world = world(6, 16);
    world.add(chat(A, 8, 16, Priority::Normal)).unwrap();
    world.add(chat(B, 8, 16, Priority::Normal)).unwrap();
    let mut preempted = Vec::new();
    while !world.known.is_empty() {
        let plan = world.step();
        preempted.extend(plan.preempted);
        // That every logit is delivered exactly once, recomputed or not, is checked in every commit.
        for id in plan.rows.iter().map(|row| row.sequence) {
            match world.undelivered(id) {
                0 if world.known[&id].tokens.len() < 16 => world.extend(id, &[5]).unwrap(),
                0 => world.remove(id),
                _ => {}
            }
        }
    }
    assert_eq!(preempted, [B]);
}

#[test]
fn the_lowest_class_loses_its_blocks_before_the_youngest() {
    let mut world = world(7, 16);
    for (id, priority) in [(A, Priority::Low), (B, Priority::Normal), (C, Priority::Normal)] {
        world.add(chat(id, 4, 28, priority)).unwrap();
        world.step();
    }
    world.extend(B, &[5; 16]).unwrap();
    let plan = world.step();
    assert_eq!((plan.preempted.as_slice(), lens(&plan)), (&[][..], vec![16]));
    world.extend(B, &[5; 1]).unwrap();
    assert_eq!(world.step().preempted, [A]);
    world.extend(B, &[5; 4]).unwrap();
    let plan = world.step();
    assert_eq!(
        (plan.preempted.as_slice(), lens(&plan)),
        (&[][..], vec![3]),
        "for drafts nobody loses a block"
    );
    assert_eq!(world.step().preempted, [C]);
}

#[test]
fn an_urgent_prompt_takes_the_blocks_of_a_lower_class_but_not_of_its_own() {
    for (priority, taken) in [(Priority::High, true), (Priority::Normal, false)] {
        let mut world = world(8, 64);
        world.add(chat(A, 16, 32, Priority::Normal)).unwrap();
        world.generate();
        world.add(prompt(B, 20, priority)).unwrap();
        let plan = world.step();
        assert_eq!(plan.preempted == [A], taken);
        assert_eq!(ids(&plan), if taken { [B] } else { [A] });
    }
}

#[test]
fn an_urgent_prompt_takes_the_running_place_of_a_lower_class() {
    let mut world = world(1000, 64);
    world.scheduler.options.running_max = 1;
    world.add(chat(A, 4, 32, Priority::Low)).unwrap();
    world.generate();
    world.add(prompt(B, 4, Priority::Normal)).unwrap();
    let plan = world.step();
    assert_eq!((ids(&plan), plan.preempted), (vec![B], vec![A]));
}

#[test]
fn who_waits_outside_holds_up_nobody_and_after_a_while_does_not_keep_its_blocks() {
    let mut world = world(4, 64);
    world.add(chat(A, 13, 14, Priority::High)).unwrap();
    world.add(prompt(B, 8, Priority::Low)).unwrap();
    assert_eq!(ids(&world.step()), [A]);
    world.now = Duration::from_millis(10);
    assert_eq!(world.step().rows, [], "A waits for its reward, B for blocks");
    world.now += IDLE_PATIENCE;
    let plan = world.step();
    assert_eq!((ids(&plan), plan.preempted), (vec![B], vec![A]));
    world.remove(B);
    assert_eq!(world.step().rows, [], "nobody waits for A's keys and values yet");
    world.extend(A, &[7]).unwrap();
    let row = &world.step().rows[0];
    assert_eq!((row.start + row.tokens.len(), row.tokens.len() - row.logits_from), (14, 1));
}

#[test]
fn who_is_answered_in_time_keeps_its_blocks_however_often_it_waits() {
    let mut world = world(4, 64);
    world.add(chat(A, 8, 16, Priority::Normal)).unwrap();
    world.add(prompt(B, 8, Priority::Normal)).unwrap();
    for _ in 0..6 {
        assert_eq!(ids(&world.step()), [A]);
        assert_eq!(world.step().rows, [], "the reward takes its time");
        world.now += IDLE_PATIENCE * 2 / 3;
        assert_eq!(world.step().rows, []);
        world.extend(A, &[5]).unwrap();
    }
    assert_eq!(world.scheduler.stats().preemptions, 0);
}

#[test]
fn nobody_waits_forever_behind_a_stream_of_urgent_prompts() {
    let mut world = world(1000, 64);
    world.scheduler.options.running_max = 1;
    world.add(prompt(A, 4, Priority::Low)).unwrap();
    for step in 0..2 * PROMOTION_STEPS + 2 {
        let id = SequenceId(100 + step);
        world.add(prompt(id, 4, Priority::High)).unwrap();
        let plan = world.step();
        if ids(&plan) == [A] {
            assert!(step >= 2 * PROMOTION_STEPS - 1, "not before its time: step {step}");
            return;
        }
        plan.rows.iter().for_each(|row| world.remove(row.sequence));
    }
    panic!("the low priority was never served");
}

#[test]
fn who_rose_by_waiting_is_next_but_takes_nothing_from_those_that_run() {
    let mut world = world(500, 64);
    world.scheduler.options.running_max = 1;
    world.add(chat(A, 4, 2000, Priority::Normal)).unwrap();
    world.generate();
    world.add(prompt(B, 4, Priority::Normal)).unwrap();
    (0..=PROMOTION_STEPS).for_each(|_| assert_eq!(ids(&world.generate()), [A]));
    world.add(prompt(C, 4, Priority::High)).unwrap();
    world.remove(A);
    assert_eq!(ids(&world.step()), [B]);
}

#[test]
fn who_waits_for_a_prefix_stands_before_nobody_and_who_waits_for_the_budget_does() {
    let mut world = world(1000, 64);
    for id in [A, B] {
        world.add(NewSequence { id, ..prompt(A, 20, Priority::Normal) }).unwrap();
    }
    world.step();
    assert_eq!(world.scheduler.ahead(Priority::Low), 0);
    let mut world = self::world(1000, 8);
    world.add(prompt(A, 12, Priority::Normal)).unwrap();
    world.add(prompt(B, 12, Priority::Normal)).unwrap();
    world.step();
    assert_eq!(world.scheduler.ahead(Priority::Low), 1);
}

#[test]
fn nobody_waits_forever_beside_urgent_answers_that_use_the_whole_budget() {
    let mut world = world(10_000, 4);
    world.add(chat(A, 4, 1000, Priority::Low)).unwrap();
    world.step();
    for id in (10..14).map(SequenceId) {
        world.add(chat(id, 1, 1000, Priority::High)).unwrap();
    }
    (0..8).for_each(|_| drop(world.generate()));
    world.extend(A, &[5]).unwrap();
    let served = (0..4 + 2 * PROMOTION_STEPS).position(|_| ids(&world.generate()).contains(&A));
    assert!(served.is_some_and(|step| step as u64 >= 2 * PROMOTION_STEPS - 2), "{served:?}");
}

#[test]
fn answers_that_exceed_the_budget_take_turns_and_leave_a_quarter_to_a_prompt() {
    let mut world = world(1000, 8);
    let chats: Vec<_> = (10..20).map(SequenceId).collect();
    for &id in &chats {
        world.add(chat(id, 1, 1000, Priority::Normal)).unwrap();
    }
    (0..2).for_each(|_| drop(world.generate()));
    world.add(prompt(A, 40, Priority::Low)).unwrap();
    let mut answered: HashMap<SequenceId, usize> = HashMap::new();
    for _ in 0..10 {
        let plan = world.generate();
        let tokens = |row: &&PlannedRow| row.sequence == A && row.tokens.len() == 2;
        assert_eq!((plan.rows.len(), plan.rows.iter().filter(tokens).count()), (7, 1));
        ids(&plan).into_iter().for_each(|id| *answered.entry(id).or_default() += 1);
    }
    assert!(chats.iter().all(|id| answered[id] == 6), "60 tokens for 10 answers: {answered:?}");
}

#[test]
fn the_quarter_that_no_prompt_can_use_goes_back_to_the_answers() {
    let mut world = world(16, 8);
    for id in (10..18).map(SequenceId) {
        world.add(chat(id, 1, 40, Priority::Normal)).unwrap();
    }
    world.generate();
    world.add(prompt(A, 40, Priority::Normal)).unwrap();
    assert_eq!(world.generate().rows.len(), 8);
}

#[test]
fn a_long_prompt_that_finds_no_room_is_not_overtaken() {
    let mut world = world(8, 64);
    world.add(prompt(A, 16, Priority::Normal)).unwrap();
    world.step();
    world.add(prompt(B, 28, Priority::Normal)).unwrap();
    world.add(prompt(C, 4, Priority::Normal)).unwrap();
    assert_eq!(world.step().rows, []);
    world.remove(A);
    assert_eq!(ids(&world.step()), [B]);
}

#[test]
fn a_prompt_does_not_start_into_a_pool_that_running_answers_are_about_to_fill() {
    let mut world = world(6, 64);
    world.add(chat(A, 16, 24, Priority::Normal)).unwrap();
    world.add(prompt(B, 8, Priority::Normal)).unwrap();
    for _ in 0..8 {
        assert_eq!(ids(&world.generate()), [A]);
    }
    assert_eq!(world.scheduler.stats().preemptions, 0);
    world.remove(A);
    assert_eq!(ids(&world.step()), [B]);
}

#[test]
fn a_failed_step_is_repeated() {
    let mut world = world(1000, 64);
    world.add(prompt(A, 10, Priority::Normal)).unwrap();
    world.add(prompt(B, 5, Priority::Normal)).unwrap();
    let plan = world.plan();
    world.forward(&plan, true);
    assert_eq!(world.step().rows, plan.rows);
}

#[test]
fn a_client_that_hangs_up_in_the_middle_of_a_step_frees_its_blocks_and_disturbs_nobody() {
    let mut world = world(1000, 64);
    world.add(chat(A, 10, 1000, Priority::Normal)).unwrap();
    world.add(chat(B, 10, 1000, Priority::Normal)).unwrap();
    let plan = world.plan();
    world.remove(A);
    assert_eq!(world.scheduler.stats().free_blocks, 997);
    world.forward(&plan, false);
    world.commit(&plan);
    world.extend(B, &[5]).unwrap();
    assert_eq!(ids(&world.step()), [B]);
}

#[test]
fn going_back_into_a_block_that_others_read_computes_that_block_again() {
    let mut world = world(1000, 64);
    for id in [A, B] {
        world.add(NewSequence { tokens: (0..12).collect(), ..chat(id, 12, 1000, Priority::Normal) }).unwrap();
        world.step();
    }
    world.truncate(A, 6);
    world.extend(A, &[77]).unwrap();
    world.extend(B, &[8]).unwrap();
    let plan = world.step();
    let a = plan.rows.iter().find(|row| row.sequence == A).unwrap();
    assert_eq!((a.start, a.tokens.as_slice(), a.logits_from), (4, &[4, 5, 77][..], 2));
    let b = plan.rows.iter().find(|row| row.sequence == B).unwrap();
    assert_eq!((b.start, b.tokens.as_slice()), (12, &[8][..]));
}

#[test]
fn a_request_past_its_deadline_is_named_until_it_is_removed_and_not_computed() {
    let mut world = world(1000, 64);
    let deadline = Some(Duration::from_secs(3));
    world.add(NewSequence { deadline, ..chat(A, 10, 1000, Priority::Normal) }).unwrap();
    assert_eq!(world.scheduler.next_deadline(), deadline);
    world.generate();
    world.now = Duration::from_secs(3);
    for _ in 0..2 {
        let plan = world.step();
        assert_eq!((plan.expired, plan.rows), (vec![A], vec![]));
    }
    world.remove(A);
    assert_eq!(world.step().expired, []);
    assert_eq!(world.scheduler.stats().free_blocks, 1000);
    let late = NewSequence { deadline, ..chat(A, 10, 1000, Priority::Normal) };
    assert_eq!(world.add(late), Err(AddError::DeadlinePassed));
}

#[test]
fn what_cannot_be_served_is_refused_with_the_reason() {
    let mut world = world(4, 64);
    let normal = |len| prompt(A, len, Priority::Normal);
    assert_eq!(world.add(normal(17)), Err(AddError::NeverFits { tokens_max: 17, capacity: 16 }));
    let empty = NewSequence { tokens: vec![], ..normal(1) };
    assert_eq!(world.add(empty), Err(AddError::Empty));
    let long = NewSequence { tokens_max: 2, ..normal(3) };
    assert_eq!(world.add(long), Err(AddError::TooLong { tokens: 3, tokens_max: 2 }));
    let beyond = NewSequence { logits_from: 4, ..normal(3) };
    assert_eq!(world.add(beyond), Err(AddError::LogitsFrom { logits_from: 4, tokens: 3 }));
    world.add(normal(16)).unwrap();
    assert_eq!(world.add(normal(3)), Err(AddError::Duplicate(A)));
    assert_eq!(world.extend(A, &[1]), Err(ExtendError::TooLong { tokens: 17, tokens_max: 16 }));
    assert_eq!(world.extend(B, &[1]), Err(ExtendError::Unknown(B)));
    for id in (10..29).map(SequenceId) {
        world.add(prompt(id, 1, Priority::Normal)).unwrap();
    }
    assert_eq!(world.add(prompt(B, 1, Priority::High)), Err(AddError::QueueFull { waiting: 4, limit: 4 }));
}
