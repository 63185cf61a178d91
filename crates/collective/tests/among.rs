//! Gathers among some of the ranks, while the others do something else.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{net::TcpListener, ops::Range, thread, time::Duration};

use uniarm_collective::{Collective, CollectiveError, Group, Local, Payload, Tcp};

const RANKS: usize = 5;

fn group(payload: Payload) -> Group {
    Group { size: RANKS, epoch: 3, payload, timeout: Duration::from_secs(60) }
}

fn local(group: Group) -> Vec<Box<dyn Collective>> {
    Local::group(group).unwrap().into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect()
}

fn tcp(group: Group) -> Vec<Box<dyn Collective>> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let others: Vec<_> =
            (1..RANKS).map(|rank| scope.spawn(move || Tcp::connect(address, rank, group).unwrap())).collect();
        let leader = Tcp::lead(&listener, group).unwrap();
        let others = others.into_iter().map(|rank| rank.join().unwrap());
        std::iter::once(leader).chain(others).map(|rank| Box::new(rank) as Box<dyn Collective>).collect()
    })
}

/// What a rank brings in a round: as many numbers as it has number and round, none at times.
fn brought(rank: usize, round: usize) -> Vec<f32> {
    (0..(rank + round) % 4 * 1000).map(|i| 1.0 + (i * (rank + 1) + round) as f32 / 4096.0).collect()
}

fn gather(group: &mut dyn Collective, members: Range<usize>, round: usize) -> Vec<u32> {
    let own = brought(group.rank(), round);
    let counts: Vec<usize> = members.clone().map(|rank| brought(rank, round).len()).collect();
    let mut all = vec![0.0; counts.iter().sum()];
    group.all_gather_among(members, &own, &counts, &mut all).unwrap();
    all.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn some_ranks_gather_while_others_gather_elsewhere_or_not_at_all() {
    for payload in [Payload::F32, Payload::Bf16] {
        for ranks in [local(group(payload)), tcp(group(payload))] {
            let found: Vec<Vec<Vec<u32>>> = thread::scope(|scope| {
                let ranks: Vec<_> = ranks
                    .into_iter()
                    .map(|mut rank| {
                        scope.spawn(move || {
                            // Two of one part, two of the other that are twice as often there, and one alone.
                            let (members, rounds) = match rank.rank() {
                                0 | 1 => (0..2, 3),
                                2 | 3 => (2..4, 6),
                                _ => (4..5, 1),
                            };
                            let gathered =
                                (0..rounds).map(|round| gather(&mut *rank, members.clone(), round)).collect();
                            let everybody = gather(&mut *rank, 0..RANKS, 7);
                            (gathered, everybody)
                        })
                    })
                    .collect();
                ranks
                    .into_iter()
                    .map(|rank| {
                        let (mut gathered, everybody): (Vec<_>, _) = rank.join().unwrap();
                        gathered.push(everybody);
                        gathered
                    })
                    .collect()
            });
            let expected = |members: Range<usize>, round: usize| -> Vec<u32> {
                let values = members.flat_map(|rank| brought(rank, round));
                values.map(|value| round_to(payload, value).to_bits()).collect()
            };
            for (rank, found) in found.iter().enumerate() {
                let (members, rounds) = [(0..2, 3), (0..2, 3), (2..4, 6), (2..4, 6), (4..5, 1)][rank].clone();
                for (round, found) in found.iter().take(rounds).enumerate() {
                    assert!(
                        *found == expected(members.clone(), round),
                        "{payload:?}: rank {rank}, round {round}"
                    );
                }
                assert!(found[rounds] == expected(0..RANKS, 7), "{payload:?}: rank {rank} with all others");
            }
        }
    }
}

/// To the nearest bf16, ties to even.
fn round_to(payload: Payload, value: f32) -> f32 {
    match payload {
        Payload::F32 => value,
        Payload::Bf16 => {
            let bits = value.to_bits();
            f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
        }
    }
}

#[test]
fn members_that_are_none_are_refused_before_anybody_hears_of_them() {
    for mut ranks in [local(group(Payload::F32)), tcp(group(Payload::F32))] {
        for members in [0..2, 3..6, 5..5] {
            let error = ranks[2].all_gather_among(members, &[], &[0, 0], &mut []).unwrap_err();
            assert!(matches!(error, CollectiveError::Invalid { field: "members", .. }), "{error}");
        }
        let error = ranks[2].all_gather_among(2..4, &[1.0], &[2, 0], &mut [0.0; 2]).unwrap_err();
        assert!(matches!(error, CollectiveError::Invalid { field: "counts", .. }), "{error}");
    }
}
