//! What computes and what connects: named accelerators and links, with where their numbers come from.

use std::time::Duration;

/// The part of the peak that matrix products of a serving step reach. Assumed: published steps of dense models reach 0.4
/// to 0.6.
const COMPUTE_SHARE: f64 = 0.5;

/// The part of the memory bandwidth that reading weights and caches reaches. Assumed, likewise 0.7 to 0.9.
const BANDWIDTH_SHARE: f64 = 0.8;

/// What a step costs before it computes anything: launches, the sampler, the engine's own work. Assumed.
const STEP_OVERHEAD: Duration = Duration::from_micros(300);

/// The part of the memory that weights and cache may take; the rest is workspace.
const MEMORY_SHARE: f64 = 0.9;

/// An accelerator by its data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accelerator {
    pub name: &'static str,
    /// 16-bit multiply-adds on its matrix units count as two; dense, not the figure for sparse matrices.
    pub operations_per_second: f64,
    pub bytes_per_second: f64,
    pub memory_bytes: f64,
    pub compute_share: f64,
    pub bandwidth_share: f64,
    pub step_overhead: Duration,
    pub source: &'static str,
}

/// A network between two processes: what a message waits before its first byte, and how fast the rest follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    pub name: &'static str,
    pub latency: Duration,
    pub bytes_per_second: f64,
    pub source: &'static str,
}

const fn gpu(name: &'static str, teraflops: f64, gigabytes_per_second: f64, gigabytes: f64) -> Accelerator {
    Accelerator {
        name,
        operations_per_second: teraflops * 1e12,
        bytes_per_second: gigabytes_per_second * 1e9,
        memory_bytes: gigabytes * 1e9,
        compute_share: COMPUTE_SHARE,
        bandwidth_share: BANDWIDTH_SHARE,
        step_overhead: STEP_OVERHEAD,
        source: "",
    }
}

/// Every accelerator that has a name.
pub const ACCELERATORS: [Accelerator; 4] = [
    // 242 teraFLOPS are stated for sparse matrices.
    Accelerator { source: "NVIDIA L4 data sheet (2023)", ..gpu("l4", 121.0, 300.0, 24.0) },
    Accelerator {
        source: "NVIDIA A100 data sheet (2021), 40 GB SXM",
        ..gpu("a100-40g", 312.0, 1555.0, 40.0)
    },
    // 1,979 teraFLOPS are stated for sparse matrices.
    Accelerator { source: "NVIDIA H100 data sheet (2023), SXM", ..gpu("h100", 989.4, 3350.0, 80.0) },
    Accelerator { source: "NVIDIA H200 data sheet (2024), SXM", ..gpu("h200", 989.4, 4800.0, 141.0) },
];

const fn link(name: &'static str, micros: u64, gigabits: f64, source: &'static str) -> Link {
    Link { name, latency: Duration::from_micros(micros), bytes_per_second: gigabits * 1e9 / 8.0, source }
}

/// Every link that has a name. Latencies are from one process's memory to another's, gRPC included.
pub const LINKS: [Link; 5] = [
    // (step − reward forward − lists) / 2 of `uniarm bench step`: three threads wake up one after the other.
    link("process", 150, 100.0, "threads of one process; measured on two cores"),
    link("loopback", 30, 16.0, "half of a gRPC round trip on one machine; measured here"),
    link("lan-10g", 60, 10.0, "10 Gbit/s Ethernet in one rack: loopback and a switch; assumed"),
    link("lan-100g", 45, 100.0, "100 Gbit/s Ethernet in one rack: loopback and a switch; assumed"),
    link("zones", 500, 25.0, "between availability zones of one region, 1 ms there and back; assumed"),
];

/// The accelerator of this name.
pub fn accelerator(name: &str) -> Option<Accelerator> {
    ACCELERATORS.into_iter().find(|accelerator| accelerator.name == name)
}

/// The link of this name.
pub fn named_link(name: &str) -> Option<Link> {
    LINKS.into_iter().find(|link| link.name == name)
}

// === impl Accelerator ===

impl Accelerator {
    /// Bytes that are left for the cache beside weights of this size.
    pub fn cache_bytes(&self, weight_bytes: f64) -> f64 {
        (self.memory_bytes * MEMORY_SHARE - weight_bytes).max(0.0)
    }
}

// === impl Link ===

impl Link {
    /// From the first byte's departure to the last one's arrival.
    pub fn transit(&self, bytes: usize) -> Duration {
        self.latency + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second)
    }
}
