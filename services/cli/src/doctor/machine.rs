//! Processor, memory, limits and folders.

use std::path::Path;

use rustix::process::{Resource, getrlimit};
use uniarm_model::kernels::simd::Isa;

use super::{Finding, State};
use crate::bench::floor::Machine;

const AREA: &str = "machine";

/// Each client and each peer is a file; a router takes thousands.
const FILES_MIN: u64 = 4096;

/// A model of a few billion weights, as its files and as its quantised copy.
const FREE_BYTES_MIN: u64 = 8 << 30;

/// What a machine without vector instructions would be told is slow: a core of ten years ago reads as much.
const STREAM_MIN: f64 = 4e9;

/// What can be read off, without measuring.
pub(super) fn facts(cores: usize) -> Vec<Finding> {
    let isa = Isa::best().name();
    let mut processor = Finding::ok(AREA, "processor", format!("{cores} cores, kernels of {isa}"));
    if isa == "portable" && cfg!(target_arch = "x86_64") {
        processor.state = State::Poor;
        processor = processor.advised(
            "neither AVX2 nor AVX-512: a virtual machine may hide them, ask for the host's CPU model",
        );
    }
    let files = getrlimit(Resource::Nofile).current;
    let mut limit = Finding::ok(
        AREA,
        "open files",
        files.map_or("no limit".to_owned(), |files| format!("{files} at most")),
    );
    if files.is_some_and(|files| files < FILES_MIN) {
        limit.state = State::Poor;
        limit = limit.advised(format!("a router wants one for each client: `ulimit -n {FILES_MIN}` or more"));
    }
    let mut findings = vec![processor];
    findings.extend(memory());
    findings.push(limit);
    findings
}

/// Free memory, by the kernel and by the limit of a container.
fn memory() -> Option<Finding> {
    let of_kernel = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = |name: &str| {
        let line = of_kernel.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    };
    let gibibytes = |kilobytes: f64| kilobytes / f64::from(1 << 20);
    let (free, all) = (gibibytes(kilobytes("MemAvailable:")?), gibibytes(kilobytes("MemTotal:")?));
    let of_container = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = of_container.and_then(|bytes| bytes.trim().parse::<f64>().ok());
    let limit = limit
        .map_or(String::new(), |bytes| format!("; this container may have {:.1}", gibibytes(bytes / 1024.0)));
    Some(Finding::ok(AREA, "memory", format!("{free:.1} of {all:.1} GiB free{limit}")))
}

/// What a worker's threads do.
pub(super) fn rates(machine: &Machine) -> Vec<Finding> {
    let Machine { threads_per_worker: threads, stream_bytes_per_second: stream, .. } = *machine;
    let mut reading =
        Finding::ok(AREA, "memory rate", format!("{:.1} GB/s on {threads} thread(s)", stream / 1e9));
    if stream < STREAM_MIN {
        reading.state = State::Poor;
        reading = reading.advised(
            "every token reads all weights: is something else running, or the memory of another socket?",
        );
    }
    let float = machine.float_operations_per_second / 1e9;
    let integer = machine.integer_operations_per_second / 1e9;
    let arithmetic =
        format!("{float:.0} GFLOP/s in f32, {integer:.0} Gop/s in integers, on {threads} thread(s)");
    vec![reading, Finding::ok(AREA, "arithmetic", arithmetic)]
}

/// Where models are kept.
pub(super) fn folders() -> Vec<Finding> {
    let Some(cache) = uniarm_model::cache_folder() else {
        let missing = Finding::new(AREA, "model cache", State::Poor, "no folder for downloads");
        return vec![missing.advised("set HF_HOME to a folder that stays, or give --model a path")];
    };
    vec![free_space(&cache)]
}

fn free_space(folder: &Path) -> Finding {
    let exists = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let what = "model cache";
    match rustix::fs::statvfs(exists) {
        Ok(found) => {
            let bytes = found.f_bavail * found.f_frsize;
            let detail = format!("{}: {:.1} GiB free", folder.display(), bytes as f64 / f64::from(1 << 30));
            if bytes >= FREE_BYTES_MIN {
                return Finding::ok(AREA, what, detail);
            }
            Finding::new(AREA, what, State::Poor, detail).advised(
                "downloads of models of several billion weights will not fit: set HF_HOME to a larger disk",
            )
        }
        Err(error) => Finding::new(AREA, what, State::Poor, format!("{}: {error}", folder.display()))
            .advised("set HF_HOME to a folder that this user may write"),
    }
}
