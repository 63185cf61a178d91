//! The processes of one run: this one among those that were started by hand, or the others started from here.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use uniarm_collective::{Group, Payload, Tcp};
use uniarm_tls::RoleName;
use uniarm_trainer::train::{config::TrainConfig, ranks::Ranks};

use super::TrainArgs;

/// Longest wait for another worker: a pass over a slice of a batch, an evaluation, or reading a model of some gigabytes.
const WORKER_TIMEOUT: Duration = Duration::from_secs(1800);

/// How often it is looked whether the others are still there, until they have met.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Processes that end with this one.
pub struct Others(Vec<Child>);

/// The rank of this process, and the processes that it started.
pub fn join(args: &TrainArgs, config: &TrainConfig) -> anyhow::Result<(Ranks, Others)> {
    let size = config.workers;
    set_threads(args, size)?;
    let group = Group { size, epoch: 0, payload: Payload::F32, timeout: WORKER_TIMEOUT };
    let wires = args.tls.wires(RoleName::Trainer)?;
    if let (Some(rank), Some(address)) = (args.rank, &args.rendezvous) {
        let tcp = Tcp::connect_over(&*wires, address, rank, group)?;
        return Ok((Ranks::of(Box::new(tcp)), Others(Vec::new())));
    }
    if size == 1 {
        return Ok((Ranks::alone(), Others(Vec::new())));
    }
    let listener = TcpListener::bind("127.0.0.1:0").context("a port for the workers")?;
    let address = listener.local_addr().context("a port for the workers")?.to_string();
    let mut others = Others(Vec::new());
    for rank in 1..size {
        others.0.push(start(rank, size, &address)?);
    }
    let met = AtomicBool::new(false);
    let tcp = thread::scope(|scope| {
        scope.spawn(|| others.watch(&met));
        let tcp = Tcp::lead_over(&*wires, &listener, group);
        met.store(true, Ordering::Relaxed);
        tcp
    })?;
    Ok((Ranks::of(Box::new(tcp)), others))
}

/// The command line of this process, but for what says how many there are.
fn start(rank: usize, size: usize, address: &str) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut arguments = Vec::new();
    let mut given = std::env::args_os().skip(1);
    while let Some(argument) = given.next() {
        let text = argument.to_string_lossy();
        if text == "--workers" {
            given.next();
        } else if !text.starts_with("--workers=") {
            arguments.push(argument);
        }
    }
    let (rank, size) = (rank.to_string(), size.to_string());
    arguments.extend(["--rank", &rank, "--size", &size, "--rendezvous", address].map(Into::into));
    let started = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    started.with_context(|| format!("worker {rank}"))
}

fn set_threads(args: &TrainArgs, workers: usize) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or((cores / workers).max(1));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.context("threads of the network")
}

// === impl Others ===

impl Others {
    /// Until all have met, nobody but this process notices a worker that ends: it ends with it, and has written nothing.
    fn watch(&mut self, met: &AtomicBool) {
        while !met.load(Ordering::Relaxed) {
            for (index, child) in self.0.iter_mut().enumerate() {
                if let Ok(Some(status)) = child.try_wait() {
                    eprintln!(
                        "error: worker {} ended before all had met ({status}); what it said is above",
                        index + 1
                    );
                    std::process::exit(1);
                }
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Others {
    /// A worker alone has nothing to do, and would wait for the timeout to notice.
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It has ended, or may: what it had to say is in the weights.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
