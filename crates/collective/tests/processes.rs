//! Ranks that are processes: the same bits as threads, and a killed one ends the calls of the others.
//!
//! This program starts itself, once for each rank; without a test harness, so that the ranks are nothing but ranks.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{
    io::Read as _,
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use uniarm_collective::{Collective, CollectiveError, Group, Local, Payload, Tcp};

const GROUP: Group = Group { size: 3, epoch: 1, payload: Payload::F32, timeout: Duration::from_secs(60) };
const COUNT: usize = 100_003;

/// A child's rank, where it meets the others, and what it does.
const RANK: &str = "COLLECTIVE_TEST_RANK";
const ADDRESS: &str = "COLLECTIVE_TEST_ADDRESS";
const WORK: &str = "COLLECTIVE_TEST_WORK";

fn main() {
    if let Ok(rank) = std::env::var(RANK) {
        return be_a_rank(rank.parse().unwrap());
    }
    three_processes_sum_to_the_bits_of_three_threads();
    println!("ok      three processes sum to the bits of three threads");
    a_killed_process_ends_the_calls_of_the_others();
    println!("ok      a killed process ends the calls of the others");
}

fn be_a_rank(rank: usize) {
    let mut rank = Tcp::connect(&std::env::var(ADDRESS).unwrap(), rank, GROUP).unwrap();
    match std::env::var(WORK).unwrap().as_str() {
        "sum" => println!("{:016x}", sum(&mut rank)),
        _ => {
            // Until a peer is gone: rank 1 is killed somewhere in here.
            let error =
                std::iter::repeat_with(|| rank.all_reduce_sum(&mut [1.0; COUNT])).find_map(Result::err);
            let Some(CollectiveError::PeerLost { .. }) = error else { panic!("{error:?}") };
            println!("lost");
        }
    }
}

/// A digest of three sums in a row, each of what the last one gave.
fn sum(rank: &mut dyn Collective) -> u64 {
    let mut values: Vec<f32> = (0..COUNT).map(|index| 1.0 / (index + 3 * rank.rank() + 1) as f32).collect();
    for _ in 0..3 {
        values.iter_mut().for_each(|value| *value *= 1.1 + rank.rank() as f32);
        rank.all_reduce_sum(&mut values).unwrap();
    }
    values.iter().fold(7, |digest: u64, value| digest.rotate_left(5) ^ u64::from(value.to_bits()))
}

fn start(work: &str) -> Vec<Child> {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let child = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(RANK, rank.to_string()).env(ADDRESS, &address).env(WORK, work);
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    (0..GROUP.size).map(child).collect()
}

fn said(child: &mut Child) -> String {
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "a rank failed");
    text.trim().to_owned()
}

fn three_processes_sum_to_the_bits_of_three_threads() {
    let threads: Vec<_> = Local::group(GROUP)
        .unwrap()
        .into_iter()
        .map(|mut rank| thread::spawn(move || format!("{:016x}", sum(&mut rank))))
        .collect();
    let processes: Vec<String> = start("sum").iter_mut().map(said).collect();
    let threads: Vec<String> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert_eq!(processes, threads);
    assert!(threads.iter().all(|digest| *digest == threads[0]), "{threads:?}");
}

fn a_killed_process_ends_the_calls_of_the_others() {
    let mut ranks = start("until a peer is lost");
    thread::sleep(Duration::from_millis(500));
    ranks[1].kill().unwrap();
    ranks[1].wait().unwrap();
    let killed = Instant::now();
    assert_eq!([said(&mut ranks[0]), said(&mut ranks[2])], ["lost", "lost"]);
    assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
}
