//! One suite for every kind of group: what the calls return, that all ranks hold the same bits, and that every call ends.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

mod among;

use std::{
    thread,
    time::{Duration, Instant},
};

pub use among::*;
use half::bf16;
use uniarm_collective::{Collective, CollectiveError, Fault, Faulty, Group, Payload, Rates, Schedule};

pub type Rank = Box<dyn Collective>;

/// A kind of group.
pub struct Kind {
    pub name: &'static str,
    /// All ranks, in order.
    pub make: fn(Group) -> Vec<Rank>,
    /// Cases of more ranks are left out: a machine may have fewer devices.
    pub ranks_max: usize,
    /// Each other call comes late; cases that have bad luck of their own, or much to do, are left out.
    pub is_late: bool,
}

/// Ample on a busy machine; tests that wait for it set their own.
const TIMEOUT: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(400);
/// From the moment that something is wrong, beyond the timeout: threads have to get their turn.
const SLACK: Duration = Duration::from_secs(10);

// === impl Kind ===

impl Kind {
    fn has(&self, ranks: usize) -> bool {
        if ranks > self.ranks_max {
            println!("skipped: {} has {} ranks, the case wants {ranks}", self.name, self.ranks_max);
        }
        ranks <= self.ranks_max
    }
}

/// The one list of cases: a macro of this name gets them.
#[macro_export]
macro_rules! all_cases {
    ($then:ident) => {
        $then!(
            every_call_returns_what_its_definition_says_on_all_ranks,
            sums_of_16_mib_have_the_bits_of_the_reference,
            a_barrier_holds_everyone_until_the_last_has_come,
            arguments_that_make_no_sense_leave_the_group_as_it_was,
            a_fault_at_any_call_ends_the_calls_of_all_ranks,
            ranks_that_call_different_things_are_told_so,
            an_abort_from_another_thread_wakes_a_call_that_waits,
            some_ranks_gather_while_others_gather_elsewhere_or_not_at_all,
            members_that_are_none_are_refused_before_anybody_hears_of_them,
        );
    };
}

pub fn group(size: usize) -> Group {
    Group { size, epoch: 5, payload: Payload::F32, timeout: TIMEOUT }
}

/// Every other call comes up to 3 ms late.
pub fn late(ranks: Vec<Rank>, timeout: Duration) -> Vec<Rank> {
    let rates = Rates { delayed_permille: 500, delay_max: Duration::from_millis(3), ..Rates::default() };
    let schedule = Schedule::Seeded { seed: 11, rates };
    let faulty = |rank| Box::new(Faulty::new(rank, timeout, schedule.clone())) as Rank;
    ranks.into_iter().map(faulty).collect()
}

/// What each rank's thread returns.
pub fn on_all<T: Send>(ranks: Vec<Rank>, work: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Numbers of all magnitudes, so that every other order of sums has other bits.
pub fn numbers(rank: usize, count: usize) -> Vec<f32> {
    let mut state = rank as u32 * 7919 + count as u32 + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    (0..count)
        .map(|_| (next() as f32 / 8_388_608.0 - 1.0) * 2.0_f32.powi((next() % 24) as i32 - 12))
        .collect()
}

fn rounded(payload: Payload, mut values: Vec<f32>) -> Vec<f32> {
    if payload == Payload::Bf16 {
        values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
    }
    values
}

/// The definition.
fn sum(size: usize, count: usize, payload: Payload) -> Vec<f32> {
    let mut sum = rounded(payload, numbers(0, count));
    for rank in 1..size {
        for (sum, value) in sum.iter_mut().zip(rounded(payload, numbers(rank, count))) {
            *sum += value;
        }
    }
    rounded(payload, sum)
}

pub fn assert_bits(got: &[f32], expected: &[f32], what: &str) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(bits(got) == bits(expected), "{what}: other bits");
}

/// Every call once, with `count` numbers for each rank, against its definition.
fn all_calls(rank: &mut dyn Collective, count: usize, payload: Payload, what: &str) {
    let (own, size) = (rank.rank(), rank.size());
    let mut values = numbers(own, count);
    rank.all_reduce_sum(&mut values).unwrap();
    assert_bits(&values, &sum(size, count, payload), what);

    let mut all = vec![0.0; size * count];
    rank.all_gather(&numbers(own, count), &mut all).unwrap();
    let expected: Vec<f32> = (0..size).flat_map(|rank| rounded(payload, numbers(rank, count))).collect();
    assert_bits(&all, &expected, what);

    // As many of each rank as its number says: none of the first.
    let counts: Vec<usize> = (0..size).map(|rank| rank * count / 2).collect();
    let mut all = vec![0.0; counts.iter().sum()];
    rank.all_gather_parts(&numbers(own, counts[own]), &counts, &mut all).unwrap();
    let parts = counts.iter().enumerate().flat_map(|(rank, count)| rounded(payload, numbers(rank, *count)));
    assert_bits(&all, &parts.collect::<Vec<f32>>(), what);

    let mut part = vec![0.0; count];
    rank.reduce_scatter_sum(&numbers(own, size * count), &mut part).unwrap();
    assert_bits(&part, &sum(size, size * count, payload)[own * count..][..count], what);

    for root in 0..size {
        let mut values = numbers(own, count);
        rank.broadcast(root, &mut values).unwrap();
        assert_bits(&values, &rounded(payload, numbers(root, count)), what);
    }

    // Around the ring, and back.
    for step in [1, size - 1] {
        let (to, from) = ((own + step) % size, (own + size - step) % size);
        if to == own {
            continue;
        }
        let mut values = vec![0.0; count];
        if own % 2 == 0 {
            rank.send(to, &numbers(own, count)).unwrap();
            rank.recv(from, &mut values).unwrap();
        } else {
            rank.recv(from, &mut values).unwrap();
            rank.send(to, &numbers(own, count)).unwrap();
        }
        assert_bits(&values, &rounded(payload, numbers(from, count)), what);
    }
    rank.barrier().unwrap();
}

pub fn every_call_returns_what_its_definition_says_on_all_ranks(kind: &Kind) {
    let &Kind { name: kind, make, ranks_max, .. } = kind;
    for size in (1..=4).filter(|size| *size <= ranks_max) {
        for payload in [Payload::F32, Payload::Bf16] {
            let ranks = make(Group { payload, ..group(size) });
            on_all(ranks, |mut rank| {
                assert_eq!((rank.size(), rank.epoch()), (size, 5));
                // Around the limit of one hop, and around that of one frame.
                for count in [0, 1, 7, 4096, 4097, 70_001] {
                    let what = format!("{kind}, {size} ranks, {count} numbers, {payload:?}");
                    all_calls(&mut *rank, count, payload, &what);
                }
            });
        }
    }
}

pub fn sums_of_16_mib_have_the_bits_of_the_reference(kind: &Kind) {
    const COUNT: usize = 4 << 20;
    for (size, payload) in [(2, Payload::F32), (3, Payload::F32), (3, Payload::Bf16)] {
        if kind.is_late || !kind.has(size) {
            continue;
        }
        let group = Group { payload, ..group(size) };
        let sums = on_all((kind.make)(group), |mut rank: Rank| {
            let mut values = numbers(rank.rank(), COUNT);
            rank.all_reduce_sum(&mut values).unwrap();
            values
        });
        let reference = sum(size, COUNT, payload);
        for got in sums {
            assert_bits(&got, &reference, &format!("{}, {size} ranks, {payload:?}", kind.name));
        }
    }
}

pub fn a_barrier_holds_everyone_until_the_last_has_come(kind: &Kind) {
    if !kind.has(3) {
        return;
    }
    let &Kind { name: kind, make, .. } = kind;
    let began = Instant::now();
    let left = on_all(make(group(3)), |mut rank| {
        if rank.rank() == 1 {
            thread::sleep(Duration::from_millis(100));
        }
        rank.barrier().unwrap();
        began.elapsed()
    });
    assert!(left.iter().all(|left| *left >= Duration::from_millis(100)), "{kind}: {left:?}");
}

pub fn arguments_that_make_no_sense_leave_the_group_as_it_was(kind: &Kind) {
    if !kind.has(2) {
        return;
    }
    let &Kind { name: kind, make, .. } = kind;
    on_all(make(group(2)), |mut rank| {
        let own = rank.rank();
        let mut one = [0.0];
        let field = |result: Result<(), CollectiveError>| match result {
            Err(CollectiveError::Invalid { field, .. }) => field,
            other => panic!("{kind}: {other:?}"),
        };
        assert_eq!(field(rank.all_gather(&[1.0], &mut one)), "length");
        assert_eq!(field(rank.all_gather_parts(&[1.0], &[1], &mut one)), "counts");
        assert_eq!(field(rank.all_gather_parts(&[1.0], &[2, 2], &mut one)), "counts");
        assert_eq!(field(rank.all_gather_parts(&[1.0], &[1, 1], &mut one)), "length");
        assert_eq!(field(rank.reduce_scatter_sum(&[1.0], &mut one)), "length");
        assert_eq!(field(rank.broadcast(2, &mut one)), "root");
        assert_eq!(field(rank.send(own, &one)), "peer");
        assert_eq!(field(rank.recv(7, &mut one)), "peer");
        rank.barrier().unwrap();
    });
}

/// A script that passes through every call; how many calls were made, and how the last one ended.
fn script(rank: &mut dyn Collective) -> Result<(), CollectiveError> {
    let (own, size) = (rank.rank(), rank.size());
    let (mut values, mut all) = (vec![1.0; 5000], vec![0.0; 5000 * size]);
    rank.all_reduce_sum(&mut values)?;
    rank.all_gather(&values, &mut all)?;
    let counts: Vec<usize> = (0..size).map(|rank| 100 * rank).collect();
    rank.all_gather_parts(&values[..counts[own]], &counts, &mut all[..counts.iter().sum()])?;
    rank.reduce_scatter_sum(&all, &mut values)?;
    rank.broadcast(1, &mut values)?;
    rank.barrier()?;
    match own {
        0 => rank.recv(1, &mut values)?,
        1 => rank.send(0, &values)?,
        _ => {}
    }
    rank.barrier()
}

pub fn a_fault_at_any_call_ends_the_calls_of_all_ranks(kind: &Kind) {
    if !kind.has(3) || kind.is_late {
        return;
    }
    let &Kind { name: kind, make, .. } = kind;
    for fault in [Fault::Death, Fault::Abort, Fault::Silence] {
        for call in 0..8 {
            let group = Group { timeout: if fault == Fault::Silence { SHORT } else { TIMEOUT }, ..group(3) };
            let began = Instant::now();
            let ends = on_all(make(group), |rank| {
                let faults = if rank.rank() == 1 {
                    Schedule::once(call, fault)
                } else {
                    Schedule::At(Default::default())
                };
                let mut rank = Faulty::new(rank, group.timeout, faults);
                let end = script(&mut rank);
                // The group is over: the same error again, at once.
                assert_eq!(rank.barrier().err(), end.clone().err(), "{fault:?} at call {call}");
                end
            });
            assert!(ends.iter().all(Result::is_err), "{kind}, {fault:?} at call {call}: {ends:?}");
            assert!(began.elapsed() < 2 * SHORT + SLACK, "{fault:?} at call {call}: {:?}", began.elapsed());
            let named = ends.iter().any(|end| match end {
                Err(CollectiveError::PeerLost { rank, .. } | CollectiveError::Deadline { rank, .. }) => {
                    *rank == 1
                }
                _ => false,
            });
            assert!(named, "{kind}: nobody names the rank that failed: {ends:?}");
        }
    }
}

pub fn ranks_that_call_different_things_are_told_so(kind: &Kind) {
    type Call = fn(&mut dyn Collective) -> Result<(), CollectiveError>;
    let calls: [(Call, Call, &str); 4] = [
        (|rank| rank.all_reduce_sum(&mut [0.0; 8]), |rank| rank.barrier(), "barrier"),
        (|rank| rank.all_reduce_sum(&mut [0.0; 8]), |rank| rank.all_reduce_sum(&mut [0.0; 9]), "all-reduce"),
        (
            |rank| rank.all_gather_parts(&[0.0; 2], &[2, 3], &mut [0.0; 5]),
            |rank| rank.all_gather_parts(&[0.0; 2], &[3, 2], &mut [0.0; 5]),
            "all-gather",
        ),
        (|rank| rank.recv(1, &mut [0.0; 8]), |rank| rank.send(0, &[0.0; 3]), "send"),
    ];
    if !kind.has(2) {
        return;
    }
    let &Kind { name: kind, make, .. } = kind;
    for (zero, one, word) in calls {
        let ends = on_all(make(group(2)), |mut rank| {
            let call = if rank.rank() == 0 { zero } else { one };
            call(&mut *rank)
        });
        let mismatch = ends
            .iter()
            .filter_map(|end| end.as_ref().err())
            .find(|error| matches!(error, CollectiveError::Mismatch { .. }));
        let sentence = mismatch.unwrap_or_else(|| panic!("{kind}: {ends:?}")).to_string();
        assert!(sentence.contains(word), "{sentence}");
    }
}

pub fn an_abort_from_another_thread_wakes_a_call_that_waits(kind: &Kind) {
    if !kind.has(2) {
        return;
    }
    let &Kind { name: kind, make, .. } = kind;
    let mut ranks = make(group(2));
    let mut waiting = ranks.remove(0);
    let aborter = waiting.aborter();
    let began = Instant::now();
    let error = thread::scope(|scope| {
        let call = scope.spawn(move || waiting.barrier().unwrap_err());
        thread::sleep(Duration::from_millis(50));
        aborter.abort("the step is cancelled");
        call.join().unwrap()
    });
    assert_eq!(error, CollectiveError::Aborted { reason: "the step is cancelled".to_owned() }, "{kind}");
    // What it had said before, its peer may still hear: the barrier that it was aborted in.
    let peer = &mut ranks[0];
    let error = peer.barrier().and_then(|()| peer.barrier()).unwrap_err();
    assert!(matches!(error, CollectiveError::PeerLost { rank: 0, .. }), "{kind}: {error}");
    assert!(began.elapsed() < SLACK);
}
