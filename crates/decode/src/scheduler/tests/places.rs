//! Who gets a place: among sequences of one class by what their tenants have had, and where idle sequences keep none.

use super::situations::{A, B, C, D, chat, ids, world};
use super::*;

#[test]
fn who_waits_outside_keeps_no_place_where_others_decide_who_goes_on() {
    let mut world = world(1000, 64);
    (world.scheduler.options.running_max, world.scheduler.options.idle_keep_places) = (2, false);
    for id in [A, B, C, D] {
        world.add(chat(id, 4, 16, Priority::Normal)).unwrap();
    }
    assert_eq!(ids(&world.step()), [A, B]);
    assert_eq!(ids(&world.step()), [C, D], "nobody has asked for the next token of the first two");
    assert_eq!(world.step().rows, []);
    // A step has two rows, whoever holds blocks; and who was served longest ago comes first.
    for id in [D, C, B] {
        world.extend(id, &[5]).unwrap();
    }
    assert_eq!(ids(&world.step()), [B, C]);
    world.extend(B, &[5]).unwrap();
    assert_eq!(ids(&world.step()), [D, B]);
    assert_eq!(world.scheduler.stats().preemptions, 0);
}

#[test]
fn prompts_begin_beside_rows_that_fill_a_step() {
    let mut world = world(1000, 64);
    (world.scheduler.options.running_max, world.scheduler.options.idle_keep_places) = (4, false);
    for number in 1..=8 {
        world.add(chat(SequenceId(number), 4, 100, Priority::Normal)).unwrap();
    }
    // The first four, then one beside three that go on.
    (0..5).for_each(|_| drop(world.generate()));
    assert_eq!(world.scheduler.stats().waiting, 0);
    // Everyone goes round.
    let mut served = [0; 9];
    for _ in 0..20 {
        let plan = world.generate();
        assert_eq!(plan.rows.len(), 4);
        ids(&plan).iter().for_each(|id| served[id.0 as usize] += 1);
    }
    assert_eq!(served[1..], [10; 8]);
}

#[test]
fn nobody_stands_before_a_newcomer_while_there_is_room() {
    let mut world = world(1000, 64);
    world.scheduler.options.running_max = 2;
    world.add(chat(A, 4, 100, Priority::Normal)).unwrap();
    world.add(chat(B, 4, 100, Priority::Normal)).unwrap();
    assert_eq!(world.scheduler.ahead(Priority::Normal), 0, "both begin in the next step");
    world.generate();
    world.add(chat(C, 4, 100, Priority::Normal)).unwrap();
    assert_eq!(world.scheduler.ahead(Priority::Normal), 0, "no plan has passed it over yet");
    world.generate();
    let ahead = [Priority::Low, Priority::Normal, Priority::High].map(|class| world.scheduler.ahead(class));
    assert_eq!(ahead, [1, 1, 0]);
    world.remove(A);
    world.generate();
    assert_eq!((world.scheduler.ahead(Priority::Low), world.scheduler.stats().admitted), (0, 3));
}

#[test]
fn whoever_asks_for_little_is_next_behind_another_tenants_flood() {
    let mut world = world(1000, 64);
    world.scheduler.options.running_max = 1;
    let [flooder, other] = [Tenant(1), Tenant(2)];
    for number in 1..=4 {
        let tenant = flooder;
        world.add(NewSequence { tenant, ..chat(SequenceId(number), 4, 100, Priority::Normal) }).unwrap();
    }
    world.generate();
    assert_eq!(world.scheduler.ahead_of(Priority::Normal, other), 0);
    assert_eq!(world.scheduler.ahead_of(Priority::Normal, flooder), 3);
    world.add(NewSequence { tenant: other, ..chat(SequenceId(9), 4, 100, Priority::Normal) }).unwrap();
    let mut order = Vec::new();
    for _ in 0..5 {
        let served = ids(&world.step())[0];
        order.push(served.0);
        world.remove(served);
    }
    assert_eq!(order, [1, 9, 2, 3, 4]);
}

#[test]
fn a_flood_that_has_waited_for_long_does_not_pass_who_comes_then() {
    let mut world = world(1000, 64);
    (world.scheduler.options.running_max, world.scheduler.options.waiting_max) = (1, 100);
    let (flooder, other) = (Tenant(1), Tenant(2));
    for number in 1..=40 {
        world
            .add(NewSequence { tenant: flooder, ..chat(SequenceId(number), 4, 400, Priority::Normal) })
            .unwrap();
    }
    // Everything in line rises meanwhile.
    (0..PROMOTION_STEPS + 10).for_each(|_| drop(world.generate()));
    world.add(NewSequence { tenant: other, ..chat(SequenceId(99), 4, 400, Priority::Normal) }).unwrap();
    world.remove(SequenceId(1));
    assert_eq!(ids(&world.step()), [SequenceId(99)]);
    // And who stood in line when others rose has risen with them.
    world.add(NewSequence { tenant: other, ..chat(SequenceId(98), 4, 400, Priority::Normal) }).unwrap();
    (0..PROMOTION_STEPS + 10).for_each(|_| drop(world.generate()));
    world.remove(SequenceId(99));
    let next = ids(&world.step())[0];
    world.remove(next);
    let after = ids(&world.step())[0];
    assert!([next, after].contains(&SequenceId(98)), "{next:?} {after:?}");
}

#[test]
fn two_tenants_get_tokens_in_equal_parts_however_long_their_answers_are() {
    let mut world = world(1000, 64);
    (world.scheduler.options.running_max, world.scheduler.options.waiting_max) = (4, 100);
    // Both may have 400 tokens; even numbers end after 40, odd ones after 5. Each has ten in line whenever one ends.
    let length = |id: SequenceId| if id.0.is_multiple_of(2) { 40 } else { 5 };
    let mut next = 20;
    let new = |number: u64| {
        let tenant = Tenant(1 + number % 2);
        NewSequence { tenant, ..chat(SequenceId(number), 4, 404, Priority::Normal) }
    };
    (0..next).for_each(|number| world.add(new(number)).unwrap());
    let mut served = [0_usize; 2];
    for step in 0..4000 {
        for id in ids(&world.generate()) {
            // The first answers tell how long they are.
            served[(id.0 % 2) as usize] += usize::from(step >= 1000);
            if world.scheduler.tokens(id).is_some_and(|tokens| tokens.len() >= 4 + length(id)) {
                world.remove(id);
                next += 2;
                world.add(new(next + id.0 % 2)).unwrap();
            }
        }
    }
    // Prompts of four tokens count too: 40 of 44 against 5 of 9.
    let share = served[0] as f64 / (served[0] + served[1]) as f64;
    assert!((0.5..0.72).contains(&share), "{served:?}");
}
