//! Batches of many lines whose own process is killed again and again, while their cluster is killed too.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{
    fleet::{Fault, Fleet},
    harness::machine,
    held::resident_kib,
};

/// Lines of the job; `UNIARM_BATCH_LINES` says otherwise.
const LINES: usize = 20_000;

/// Kills of the job's process, and about as many of the cluster's.
const KILLS: usize = 20;

/// Processes of a job that is shared.
const SHARERS: usize = 3;

/// Between two faults of the cluster: it takes seconds until a process is back.
const PAUSE: Duration = Duration::from_secs(8);

/// Growth of a process's memory over its second half that is noise: allocators keep some.
const GROWTH_MAX: f64 = 1.1;

struct Job<'a> {
    fleet: &'a Fleet,
    folder: &'a Path,
    flags: Vec<String>,
}

// === impl Job ===

impl Job<'_> {
    fn spawn(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_uniarm"));
        command.args(["batch", "in.jsonl", "--raw", "--max-tokens", "4", "--in-flight", "64"]);
        command.args(["--endpoint", &endpoints(self.fleet)]).args(&self.flags);
        command.current_dir(self.folder).stdout(Stdio::null()).spawn().unwrap()
    }

    /// Runs it to its end, and says how long it took and what memory it had, a number each second.
    fn run(&self) -> (Duration, Vec<u64>) {
        let (began, mut memory) = (Instant::now(), Vec::new());
        let mut job = self.spawn();
        let status = loop {
            if let Some(status) = job.try_wait().unwrap() {
                break status;
            }
            memory.extend(resident_kib(job.id()));
            thread::sleep(Duration::from_secs(1));
        };
        assert!(status.success(), "{status}");
        (began.elapsed(), memory)
    }
}

fn endpoints(fleet: &Fleet) -> String {
    fleet.endpoints.iter().map(|address| format!("http://{address}")).collect::<Vec<_>>().join(",")
}

/// Every third line is guided, each with a strength of its own.
fn lines(count: usize) -> String {
    let line = |index: usize| match index % 3 {
        1 => {
            let strength = (index % 11) as f64 / 5.0;
            format!(
                "{{\"id\": {index}, \"prompt\": \"Line {index} says\", \"preference\": {{\"positive\": 1}}, \"strength\": {strength:.1}}}\n"
            )
        }
        _ => format!("{{\"id\": {index}, \"prompt\": \"Line {index} says\"}}\n"),
    };
    (0..count).map(line).collect()
}

/// Whole lines of the output so far; in ranges, where it is shared.
fn written(folder: &Path, output: &str) -> usize {
    let whole = |path: &Path| {
        std::fs::read(path).map_or(0, |text| text.iter().filter(|byte| **byte == b'\n').count())
    };
    let ranges = std::fs::read_dir(folder.join(format!("{output}.ranges")));
    let in_ranges: usize = ranges.map_or(0, |files| files.flatten().map(|file| whole(&file.path())).sum());
    whole(&folder.join(output)) + in_ranges
}

/// A number below `below`, by the seed of the run.
fn drawn(seed: u64, what: &str, below: u64) -> u64 {
    uniarm_batch::seed(seed, &[what]) % below
}

#[test]
#[ignore = "takes many minutes: make test-faults"]
fn a_batch_of_many_lines_is_exact_whatever_is_killed() {
    let _machine = machine();
    let count = std::env::var("UNIARM_BATCH_LINES").map_or(LINES, |lines| lines.parse().unwrap());
    let seed = std::env::var("UNIARM_FAULT_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("UNIARM_BATCH_LINES={count} UNIARM_FAULT_SEED={seed}");
    let fleet = Fleet::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(fleet.client());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("in.jsonl"), lines(count)).unwrap();
    let job = |flags: &[&str]| {
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Job { fleet: &fleet, folder, flags }
    };

    let (time, memory) = job(&["--output", "whole.jsonl"]).run();
    let whole = std::fs::read(folder.join("whole.jsonl")).unwrap();
    assert_eq!(written(folder, "whole.jsonl"), count);
    let (early, late) = memory.split_at(memory.len() / 2);
    let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
    println!(
        "undisturbed: {:.0} s, {:.1} lines/s, resident {} and then {} KiB at most",
        time.as_secs_f64(),
        count as f64 / time.as_secs_f64(),
        most(early),
        most(late)
    );
    assert!(most(late) as f64 <= GROWTH_MAX * most(early) as f64, "memory grows with the lines: {memory:?}");

    let store = fleet.etcd.lock().unwrap().address();
    let alone = vec!["--output", "killed.jsonl"];
    let shared = vec!["--output", "shared.jsonl", "--share", "job", "--lease-ttl", "2", "--store", &store];
    for (flags, processes) in [(alone, 1), (shared, SHARERS)] {
        let output = flags[1];
        let (began, is_over) = (Instant::now(), AtomicBool::new(false));
        let faults = thread::scope(|scope| {
            let storm = scope.spawn(|| storm(&fleet, seed, &is_over));
            killed_again_and_again(&job(&flags), processes, count, seed, output);
            is_over.store(true, Ordering::Relaxed);
            storm.join().unwrap()
        });
        println!("{output}: {:.0} s, {KILLS} kills, {faults} of the cluster", began.elapsed().as_secs_f64());
        assert!(
            std::fs::read(folder.join(output)).unwrap() == whole,
            "{output} differs from the undisturbed job"
        );
    }
}

/// Kills a process of the job at each of so many points, starts it again, and lets it end in the last life.
fn killed_again_and_again(job: &Job<'_>, processes: usize, count: usize, seed: u64, output: &str) {
    let mut lives: Vec<Child> = (0..processes).map(|_| job.spawn()).collect();
    for kill in 0..KILLS {
        let victim = drawn(seed, &format!("victim {kill}"), processes as u64) as usize;
        let target = (1 + kill) * count / (KILLS + 2);
        while written(job.folder, output) < target && lives[victim].try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(drawn(seed, &format!("kill {kill}"), 500)));
        lives[victim].kill().unwrap();
        lives[victim].wait().unwrap();
        lives[victim] = job.spawn();
    }
    for mut life in lives {
        assert!(life.wait().unwrap().success());
    }
}

/// Kills members of the cluster, each kind in its turn, until the job is over.
fn storm(fleet: &Fleet, seed: u64, is_over: &AtomicBool) -> usize {
    let mut faults = 0;
    while !is_over.load(Ordering::Relaxed) {
        let member = drawn(seed, &format!("member {faults}"), fleet.members.len() as u64) as usize;
        fleet.hurt(member, Fault::Kill, |_| {});
        faults += 1;
        let pause = Instant::now();
        while pause.elapsed() < PAUSE && !is_over.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(100));
        }
    }
    faults
}
