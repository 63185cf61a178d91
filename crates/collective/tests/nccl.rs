//! The suite over NCCL, and what only NCCL has, with a libcuda and a libnccl that are none (`fakes/`).
//!
//! Libraries are found where the loader looked when the program started, so this program builds them and starts
//! itself again, with their folder in front.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

mod suite;

use std::{
    ffi::c_int,
    net::TcpListener,
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use suite::{Kind, Rank, group, late, numbers, on_all};
use uniarm_collective::{CollectiveError, Group, Nccl};

/// Set for the program that has the fakes.
const HAS_FAKES: &str = "COLLECTIVE_TEST_HAS_FAKES";
const FAKES: [(&str, &str); 2] = [("cuda.c", "libcuda.so.1"), ("nccl.c", "libnccl.so.2")];

/// Settings of `fake_nccl_set`.
const QUIET_ABORTS: c_int = 0;
const HANG_LAUNCH: c_int = 1;
const FAIL_LAUNCH: c_int = 2;

const KINDS: [Kind; 3] = [
    kind("nccl", joined),
    kind("nccl that hears of no abort, with connections", |group| {
        set(QUIET_ABORTS, 1);
        let ranks = connected(group);
        set(QUIET_ABORTS, 0);
        ranks
    }),
    Kind { is_late: true, ..kind("late nccl", |group| late(joined(group), group.timeout)) },
];

const fn kind(name: &'static str, make: fn(Group) -> Vec<Rank>) -> Kind {
    Kind { name, make, ranks_max: usize::MAX, is_late: false }
}

fn main() {
    if std::env::var_os(HAS_FAKES).is_some() {
        return with_fakes();
    }
    what_is_missing_is_named();
    println!("ok      what is missing is named");
    if Command::new("cc").arg("--version").output().is_err() {
        return println!("skipped: no cc, which builds the fake libraries");
    }
    let folder = std::env::temp_dir().join(format!("uniarm-fakes-{}", std::process::id()));
    build(&folder);
    let status = Command::new(std::env::current_exe().unwrap())
        .env("LD_LIBRARY_PATH", &folder)
        .env(HAS_FAKES, "1")
        .status()
        .unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(status.success(), "with the fakes: {status}");
}

fn build(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fakes");
    for (source, library) in FAKES {
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread", "-o"]);
        cc.arg(folder.join(library)).arg(sources.join(source)).arg(format!("-Wl,-soname,{library}"));
        assert!(cc.status().unwrap().success(), "cc {source}");
    }
}

fn with_fakes() {
    assert_eq!(Nccl::version().unwrap(), 22809);
    macro_rules! run {
        ($($case:ident),* $(,)?) => {
            $(
                let began = Instant::now();
                KINDS.iter().for_each(suite::$case);
                println!("ok      {} ({:.1?})", stringify!($case).replace('_', " "), began.elapsed());
                assert_eq!(living(), 0, "a communicator is neither aborted nor destroyed");
            )*
        };
    }
    all_cases!(run);
    one_rank_alone_sends_itself_numbers();
    println!("ok      one rank alone sends itself numbers");
    ranks_that_do_not_come_are_waited_for_no_longer_than_the_timeout();
    println!("ok      ranks that do not come are waited for no longer than the timeout");
    an_error_of_nccl_ends_the_call_and_is_told_in_its_words();
    println!("ok      an error of nccl ends the call and is told in its words");
    a_transfer_that_hangs_though_all_ranks_are_there_is_told_so();
    println!("ok      a transfer that hangs though all ranks are there is told so");
    a_rank_that_comes_just_before_the_timeout_is_in_time();
    println!("ok      a rank that comes just before the timeout is in time");
    a_device_that_is_not_there_is_named();
    println!("ok      a device that is not there is named");
    assert_eq!(living(), 0, "a communicator is neither aborted nor destroyed");
}

/// Of the fake libnccl that this program has loaded.
fn fake<F: Copy>(name: &str) -> F {
    // SAFETY: the fakes do nothing when they are loaded, and both callers name the type of their function.
    unsafe { *libloading::Library::new("libnccl.so.2").unwrap().get::<F>(name.as_bytes()).unwrap() }
}

fn set(setting: c_int, value: c_int) -> c_int {
    fake::<extern "C" fn(c_int, c_int) -> c_int>("fake_nccl_set")(setting, value)
}

fn living() -> c_int {
    fake::<extern "C" fn() -> c_int>("fake_nccl_living")()
}

/// Ranks that share an id, and nothing else.
fn joined(group: Group) -> Vec<Rank> {
    let id = Nccl::unique_id().unwrap();
    let ranks = (0..group.size).map(|rank| move || Nccl::join(&id, rank, group, 0).unwrap());
    together(ranks.collect())
}

/// Ranks that meet over TCP.
fn connected(group: Group) -> Vec<Rank> {
    let address: Arc<str> =
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string().into();
    let rank = |rank| {
        let address = address.clone();
        move || Nccl::connect(&address, rank, group, 0).unwrap()
    };
    together((0..group.size).map(rank).collect())
}

fn together(ranks: Vec<impl FnOnce() -> Nccl + Send>) -> Vec<Rank> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(rank)).collect();
        threads.into_iter().map(|thread| Box::new(thread.join().unwrap()) as Rank).collect()
    })
}

fn what_is_missing_is_named() {
    match Nccl::unique_id() {
        Ok(_) => println!("skipped: this machine has NCCL and a driver; nothing is missing"),
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains("is not found: install"), "{error}");
            assert!(error.contains("libcuda.so.1") || error.contains("libnccl.so.2"), "{error}");
        }
    }
}

fn one_rank_alone_sends_itself_numbers() {
    let id = Nccl::unique_id().unwrap();
    let mut rank = Nccl::join(&id, 0, group(1), 0).unwrap();
    for bytes in [0, 1, 16 << 10, (16 << 10) + 1, 5_000_000] {
        rank.round_to_itself(bytes).unwrap();
    }
}

fn ranks_that_do_not_come_are_waited_for_no_longer_than_the_timeout() {
    let id = Nccl::unique_id().unwrap();
    let began = Instant::now();
    let group = Group { timeout: Duration::from_millis(200), ..group(2) };
    let error = Nccl::join(&id, 0, group, 0).err().unwrap();
    assert!(matches!(error, CollectiveError::Rendezvous { rank: 0, .. }), "{error}");
    assert!(error.to_string().contains("not all ranks are there within 200ms"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
}

fn an_error_of_nccl_ends_the_call_and_is_told_in_its_words() {
    let ranks = connected(group(2));
    set(FAIL_LAUNCH, 2);
    let ends = on_all(ranks, |mut rank| {
        rank.barrier().unwrap();
        let end = rank.barrier().and_then(|()| rank.barrier()).unwrap_err();
        assert_eq!(rank.barrier(), Err(end.clone()), "the group is over");
        end.to_string()
    });
    set(FAIL_LAUNCH, 0);
    assert!(ends.iter().any(|end| end.contains("barrier: NCCL says")), "{ends:?}");
    assert!(ends.iter().any(|end| end.contains("(3): injected by a test")), "{ends:?}");
}

fn a_transfer_that_hangs_though_all_ranks_are_there_is_told_so() {
    let group = Group { timeout: Duration::from_millis(800), ..group(3) };
    let ranks = connected(group);
    set(HANG_LAUNCH, 1);
    let began = Instant::now();
    let ends = on_all(ranks, |mut rank| {
        let mut values = numbers(rank.rank(), 100);
        rank.all_reduce_sum(&mut values).unwrap_err().to_string()
    });
    set(HANG_LAUNCH, 0);
    assert!(
        ends.iter().any(|end| end.contains("all ranks are there by now, and NCCL did not end it")),
        "{ends:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(10));
}

fn a_rank_that_comes_just_before_the_timeout_is_in_time() {
    let timeout = Duration::from_secs(4);
    on_all(connected(Group { timeout, ..group(3) }), |mut rank| {
        if rank.rank() == 1 {
            thread::sleep(timeout * 7 / 8);
        }
        rank.barrier().unwrap();
        let mut values = [1.0; 9];
        rank.all_reduce_sum(&mut values).unwrap();
        assert_eq!(values, [3.0; 9]);
    });
}

fn a_device_that_is_not_there_is_named() {
    let id = Nccl::unique_id().unwrap();
    let error = Nccl::join(&id, 0, group(1), 3).err().unwrap().to_string();
    assert!(error.contains("device 3 of 1 cannot be opened: CUDA says invalid device ordinal"), "{error}");
}
