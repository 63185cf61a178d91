//! What a process holds: of the machine, of the cluster's work, and of the time of its cores.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::harness::Running;

/// Connections that come and go by themselves: of whoever looks at the metrics, and to etcd.
const FILES_SPARE: usize = 3;

/// Tasks of such connections, and of timers of the store.
const TASKS_SPARE: f64 = 3.0;

/// Memory that work may leave behind: allocators keep some, and buffers of connections grow with their number.
const GROWTH_KIB_MAX: u64 = 64 << 10;

/// In which /proc counts the time of cores: fixed for what programs see.
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Held {
    pub files: usize,
    pub tasks: f64,
    pub resident_kib: u64,
    /// Requests, sequences and sessions that are under way or wait.
    pub work: f64,
    /// Blocks of the cache.
    pub blocks: f64,
}

// === impl Held ===

impl Held {
    pub fn of(process: &Running) -> Self {
        let taken = |all: &str, free: &str| process.metric(all) - process.metric(free);
        let (work, blocks): (&[&str], f64) = match process.role() {
            "router" => (&["uniarm_router_requests_under_way"], 0.0),
            "base" => (
                &[
                    "uniarm_base_requests_held",
                    "uniarm_base_sequences_running",
                    "uniarm_base_sequences_waiting",
                ],
                taken("uniarm_base_kv_blocks", "uniarm_base_kv_free_blocks"),
            ),
            _ => (
                &["uniarm_reward_sessions", "uniarm_reward_sessions_waiting"],
                taken("uniarm_reward_kv_blocks", "uniarm_reward_kv_free_blocks"),
            ),
        };
        let tasks = process.metric("uniarm_runtime_tasks_alive");
        assert!(tasks > 0.0, "{} has no metric of its tasks", process.role());
        Self {
            files: std::fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap().count(),
            tasks,
            resident_kib: resident_kib(process.id()).unwrap(),
            work: work.iter().map(|name| process.metric(name)).sum(),
            blocks,
        }
    }

    /// Whether nothing is left of what came after `before`.
    fn is_as(&self, before: &Self) -> bool {
        self.work == 0.0
            && self.blocks <= before.blocks
            && self.files <= before.files + FILES_SPARE
            && self.tasks <= before.tasks + TASKS_SPARE
            && self.resident_kib <= before.resident_kib + GROWTH_KIB_MAX
    }
}

pub fn of_all(processes: &[&Running]) -> Vec<Held> {
    processes.iter().map(|process| Held::of(process)).collect()
}

/// Waits until nobody works.
pub fn rest(processes: &[&Running], longest: Duration) -> Vec<Held> {
    let began = Instant::now();
    loop {
        let held = of_all(processes);
        if held.iter().all(|held| held.work == 0.0) {
            return held;
        }
        assert!(began.elapsed() < longest, "somebody still works: {held:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until every process holds what it held before, prints both, and says how long it took.
pub fn is_back(processes: &[&Running], before: &[Held], longest: Duration) -> Duration {
    let began = Instant::now();
    let after = loop {
        let held = of_all(processes);
        if held.iter().zip(before).all(|(now, before)| now.is_as(before)) || began.elapsed() > longest {
            break held;
        }
        thread::sleep(Duration::from_millis(100));
    };
    let took = began.elapsed();
    println!(
        "{:<8} {:>13} {:>13} {:>15} {:>13} {:>19}",
        "process", "files", "tasks", "work", "blocks", "resident MiB"
    );
    for ((process, now), before) in processes.iter().zip(&after).zip(before) {
        println!(
            "{:<8} {:>5} -> {:>4} {:>5} -> {:>4} {:>7} -> {:>4} {:>5} -> {:>4} {:>8.1} -> {:>7.1}",
            process.role(),
            before.files,
            now.files,
            before.tasks,
            now.tasks,
            before.work,
            now.work,
            before.blocks,
            now.blocks,
            before.resident_kib as f64 / 1024.0,
            now.resident_kib as f64 / 1024.0
        );
    }
    for ((process, now), before) in processes.iter().zip(&after).zip(before) {
        assert!(now.is_as(before), "{} keeps something: {before:?}, and now {now:?}", process.role());
    }
    took
}

pub fn resident_kib(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Time that its threads have had of the cores.
pub fn core_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // The name in parentheses may hold anything; user time and system time are the 14th and 15th word of the line.
    let words: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    let ticks: f64 = words[11..13].iter().map(|word| word.parse::<f64>().unwrap()).sum();
    ticks / TICKS_PER_SECOND
}
