//! The suite of groups over real libraries and real GPUs, beside what a round costs.
//!
//! `cargo run --release -p uniarm-collective --example nccl_conformance -- RANKS [DEVICES]`
//!
//! Ranks are threads of this program; rank r has device r modulo DEVICES (as many as ranks, unless said). Two ranks on one
//! device want NCCL 2.30 or later and `NCCL_MULTI_RANK_GPU_ENABLE=1`.

#![allow(clippy::unwrap_used)] // what fails here has failed, and says where

#[path = "../tests/suite/mod.rs"]
mod suite;

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use suite::{Kind, Rank, on_all};
use uniarm_collective::{CollectiveError, Group, Nccl, Payload};

const REPETITIONS: usize = 41;
const NUMBERS: [usize; 5] = [0, 256, 4 << 10, 256 << 10, 4 << 20];

static RANKS: OnceLock<usize> = OnceLock::new();
static DEVICES: OnceLock<usize> = OnceLock::new();

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|word| word.parse::<usize>());
    let ranks = arguments.next().ok_or("say how many ranks")??.max(1);
    let devices = arguments.next().transpose()?.unwrap_or(ranks).max(1);
    let (ranks, devices) = (*RANKS.get_or_init(|| ranks), *DEVICES.get_or_init(|| devices));
    println!("NCCL {}, {ranks} ranks on {devices} devices", Nccl::version()?);
    let alone = &mut nccl(suite::group(1))[0];
    for count in NUMBERS {
        let took =
            (0..REPETITIONS).map(|_| alone.round_to_itself(count * 4)).collect::<Result<Vec<_>, _>>()?;
        println!("to itself, {:>9} bytes: {:>10.1?}", count * 4, median(took));
    }
    let kinds = [
        Kind { name: "nccl", make: boxed, ranks_max: ranks, is_late: false },
        Kind { name: "late nccl", make: late, ranks_max: ranks, is_late: true },
    ];
    macro_rules! run {
        ($($case:ident),* $(,)?) => {
            $(
                kinds.iter().for_each(suite::$case);
                println!("ok      {}", stringify!($case).replace('_', " "));
            )*
        };
    }
    all_cases!(run);
    if ranks > 1 {
        speeds(ranks)?;
    }
    Ok(())
}

fn nccl(group: Group) -> Vec<Nccl> {
    let id = Nccl::unique_id().unwrap();
    let devices = DEVICES.get().copied().unwrap_or(1);
    let join = |rank: usize| Nccl::join(&id, rank, group, rank % devices).unwrap();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..group.size).map(|rank| scope.spawn(move || join(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn boxed(group: Group) -> Vec<Rank> {
    nccl(group).into_iter().map(|rank| Box::new(rank) as Rank).collect()
}

fn late(group: Group) -> Vec<Rank> {
    suite::late(boxed(group), group.timeout)
}

/// The median time of a sum, over NCCL.
fn speeds(ranks: usize) -> Result<(), CollectiveError> {
    for payload in [Payload::F32, Payload::Bf16] {
        for count in NUMBERS {
            let group = Group { payload, ..suite::group(ranks) };
            let times = on_all(boxed(group), |mut rank| {
                let mut values = vec![1e-9; count];
                let sums = (0..REPETITIONS).map(|_| {
                    let began = Instant::now();
                    rank.all_reduce_sum(&mut values).map(|()| began.elapsed())
                });
                sums.collect::<Result<Vec<_>, _>>()
            });
            let mut times = times.into_iter().collect::<Result<Vec<_>, _>>()?;
            println!(
                "all-reduce of {:>9} bytes, {payload:?}: {:>10.1?}",
                count * 4,
                median(times.swap_remove(0))
            );
        }
    }
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
