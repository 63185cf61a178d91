//! What the process itself holds and does, looked up whenever somebody asks for its metrics.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use tokio::runtime::RuntimeMetrics;

const KIB: u64 = 1024;

/// What the operating system tells of this process, under the names that every exporter gives it. Empty where there is
/// no /proc.
#[derive(Debug)]
pub(crate) struct OwnProcess;

/// What tokio tells of the runtime that the services run on.
#[derive(Debug)]
pub(crate) struct OwnRuntime(pub(crate) RuntimeMetrics);

/// A number that somebody else counts.
pub(crate) struct Seen<F> {
    pub(crate) name: &'static str,
    pub(crate) help: String,
    /// Gauge or counter.
    pub(crate) kind: MetricType,
    pub(crate) look: F,
}

/// Of this process, in seconds.
struct Times {
    processor: f64,
    /// Since 1970.
    began: f64,
}

// === impl OwnProcess ===

impl Collector for OwnProcess {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let numbers = [
            ("open_fds", "Open file handles", open_files()),
            ("max_fds", "File handles that may be open at once", files_max()),
            (
                "resident_memory_bytes",
                "Memory that is here, and not swapped out or never touched",
                resident(),
            ),
            ("threads", "Threads of the operating system", status("Threads:")),
        ];
        for (name, help, number) in numbers {
            if let Some(number) = number {
                gauge(&mut encoder, name, help, number)?;
            }
        }
        let Some(Times { processor, began }) = Times::read() else { return Ok(()) };
        let help = "Time that its threads have spent on processors.";
        let descriptor = encoder.encode_descriptor("cpu_seconds", help, None, MetricType::Counter)?;
        ConstCounter::new(processor).encode(descriptor)?;
        let help = "When it began, in seconds since 1970.";
        let descriptor = encoder.encode_descriptor("start_time_seconds", help, None, MetricType::Gauge)?;
        ConstGauge::new(began).encode(descriptor)
    }
}

// === impl Times ===

impl Times {
    #[cfg(target_os = "linux")]
    fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name before may have blanks and brackets in it. After it, counted from 0: 11 and 12 are ticks of the process and
        // of the system for it, 19 is when it began, in ticks since the system did.
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
        let system = fs::read_to_string("/proc/stat").ok()?;
        let booted =
            system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<f64>().ok()?;
        // SAFETY: it takes a number, and returns one.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        Some(Self {
            processor: (ticks(11)? + ticks(12)?) / per_second,
            began: booted + ticks(19)? / per_second,
        })
    }

    #[cfg(not(target_os = "linux"))]
    fn read() -> Option<Self> {
        None
    }
}

// === impl OwnRuntime ===

impl Collector for OwnRuntime {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(runtime) = self;
        gauge(&mut encoder, "tasks_alive", "Tasks that have not ended", runtime.num_alive_tasks() as u64)?;
        gauge(&mut encoder, "workers", "Threads that run tasks", runtime.num_workers() as u64)?;
        if let Some([allocated, free]) = allocator() {
            gauge(&mut encoder, "allocated_bytes", "Memory that was allocated and not freed", allocated)?;
            let help = "Memory that was freed, and that the allocator keeps for later";
            gauge(&mut encoder, "allocator_free_bytes", help, free)?;
        }
        let waiting = runtime.global_queue_depth() as u64;
        gauge(
            &mut encoder,
            "tasks_queued",
            "Tasks that are ready, and that no thread has taken yet",
            waiting,
        )?;
        let busy = (0..runtime.num_workers()).map(|worker| runtime.worker_total_busy_duration(worker));
        let busy = busy.sum::<std::time::Duration>().as_secs_f64();
        let help = "Time that threads have spent on tasks, over all of them.";
        ConstCounter::new(busy).encode(encoder.encode_descriptor(
            "busy_seconds",
            help,
            None,
            MetricType::Counter,
        )?)
    }
}

// === impl Seen ===

impl<F> fmt::Debug for Seen<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl<F: Fn() -> u64 + Send + Sync + 'static> Collector for Seen<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let number = (self.look)();
        let encoder = encoder.encode_descriptor(self.name, &self.help, None, self.kind)?;
        match self.kind {
            MetricType::Counter => ConstCounter::new(number).encode(encoder),
            _ => ConstGauge::new(number.cast_signed()).encode(encoder),
        }
    }
}

/// Bytes in use, and bytes kept free, as the C library's allocator counts them. It walks through its free lists for it:
/// microseconds, whenever somebody asks for metrics.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn allocator() -> Option<[u64; 2]> {
    // SAFETY: it takes nothing, returns numbers, and takes the allocator's own locks.
    let info = unsafe { libc::mallinfo2() };
    Some([(info.uordblks + info.hblkhd) as u64, info.fordblks as u64])
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn allocator() -> Option<[u64; 2]> {
    None
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, number: u64) -> fmt::Result {
    let help = format!("{help}.");
    // No process has so many of anything that the sign would be lost.
    let number = ConstGauge::new(number.cast_signed());
    number.encode(encoder.encode_descriptor(name, &help, None, MetricType::Gauge)?)
}

fn open_files() -> Option<u64> {
    let handles = fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    // One of them is the folder that was just read.
    Some(handles.saturating_sub(1))
}

fn files_max() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    limit.split_ascii_whitespace().next()?.parse().ok()
}

fn resident() -> Option<u64> {
    status("VmRSS:").map(|kib| kib * KIB)
}

/// A number of /proc/self/status.
fn status(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use crate::Metrics;

    #[tokio::test]
    async fn work_is_counted_in_seconds_of_processors() {
        let metrics = Metrics::new();
        metrics.watch_process(&tokio::runtime::Handle::current());
        let spent = || value(&metrics.encode(), "process_cpu_seconds_total");
        let before = spent();
        while spent() < before + 0.05 {
            std::hint::black_box((0..1_000_000_u64).sum::<u64>());
        }
    }

    fn value(page: &str, name: &str) -> f64 {
        let sample = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        sample.unwrap_or_else(|| panic!("no {name} in {page}")).parse().unwrap()
    }

    #[tokio::test]
    async fn files_and_tasks_that_are_held_are_counted_until_they_are_gone() {
        let metrics = Metrics::new();
        metrics.watch_process(&tokio::runtime::Handle::current());
        let tasks = || value(&metrics.encode(), "uniarm_runtime_tasks_alive");
        let files = || value(&metrics.encode(), "process_open_fds");
        assert_eq!(tasks(), 0.0);
        let task = tokio::spawn(std::future::pending::<()>());
        assert_eq!(tasks(), 1.0);
        task.abort();
        let _ = task.await;
        assert_eq!(tasks(), 0.0);

        // Tests beside this one open and close files too: so many cannot be theirs.
        let before = files();
        let held: Vec<_> = (0..200).map(|_| std::fs::File::open("/proc/self/status").unwrap()).collect();
        assert!(files() >= before + 100.0, "{before}, {}", files());
        drop(held);
        assert!(files() < before + 100.0);

        let allocated = || value(&metrics.encode(), "uniarm_runtime_allocated_bytes");
        let before = allocated();
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert!(allocated() > before + f64::from(32 << 20), "{before}, {}", allocated());
        drop(block);
        assert!(allocated() < before + f64::from(32 << 20));

        let page = metrics.encode();
        assert!(value(&page, "uniarm_runtime_allocator_free_bytes") >= 0.0, "{page}");
        assert!(value(&page, "process_resident_memory_bytes") > 1e6, "{page}");
        assert!(value(&page, "process_max_fds") >= value(&page, "process_open_fds"), "{page}");
        assert!(value(&page, "uniarm_runtime_workers") >= 1.0, "{page}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - value(&page, "process_start_time_seconds");
        assert!((-1.0..3600.0).contains(&age), "it began {age} s ago");
        assert!(page.contains("# TYPE uniarm_runtime_busy_seconds counter"), "{page}");
    }
}
