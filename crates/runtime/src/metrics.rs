//! The metrics of one process: a registry that the roles in it share, encoded as OpenMetrics text.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};
use tokio::runtime::Handle;

use crate::process::{OwnProcess, OwnRuntime, Seen};
use crate::steps::Steps;

/// Every metric of the product begins with this word.
const PREFIX: &str = "uniarm";

/// What any process has begins with this one, as in every other exporter.
const PROCESS_PREFIX: &str = "process";

/// How a page of metrics is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposition {
    /// With exemplars. Prometheus asks for it.
    OpenMetrics,
    /// Prometheus' older one, which everything else reads, `promtool check metrics` among it.
    Text,
}

/// A handle to the process's metrics. Clones share them; a scope puts its name into the prefix.
#[derive(Debug, Clone)]
pub struct Metrics {
    scopes: Arc<Mutex<Vec<Scope>>>,
    /// Of the engines of the process, in the order in which they began.
    steps: Arc<Mutex<Vec<Steps>>>,
    prefix: String,
}

/// A trace in which a value was observed, for those that a collector gets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TraceLabel {
    pub trace_id: String,
}

/// A histogram whose buckets name a trace that fell into them.
pub type TracedHistogram = HistogramWithExemplars<TraceLabel>;

/// A histogram of seconds that can also say how many they are, to one who wants those since an earlier look. Clones share it.
#[derive(Debug, Clone)]
pub struct Timed {
    histogram: Histogram,
    nanoseconds: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Scope {
    prefix: String,
    registry: Registry,
}

impl Metrics {
    /// Begins with one metric, `uniarm_build_info`.
    #[must_use]
    pub fn new() -> Self {
        let metrics = Self { scopes: Arc::default(), steps: Arc::default(), prefix: PREFIX.to_owned() };
        metrics.insert("build", "Version of the binary", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        metrics
    }

    /// The same process's metrics under a longer prefix: `scope("base")` names them `uniarm_base_…`.
    /// Each role takes one, so that several roles in one process do not collide.
    #[must_use]
    pub fn scope(&self, name: &str) -> Self {
        let (scopes, steps) = (self.scopes.clone(), self.steps.clone());
        Self { scopes, steps, prefix: format!("{}_{name}", self.prefix) }
    }

    /// Registers any metric and returns it. `name` has its unit last and, for a counter, no `_total`
    /// (the encoder adds it); `help` has no full stop (the encoder adds it).
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.insert(name, help, metric.clone());
        metric
    }

    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(name, help, Counter::default())
    }

    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(name, help, Histogram::new(buckets.iter().copied()))
    }

    /// A gauge of what somebody else counts: it is asked whenever the metrics are.
    pub fn gauge_of(&self, name: &'static str, help: &str, look: impl Fn() -> u64 + Send + Sync + 'static) {
        self.collect(Seen { name, help: format!("{help}."), kind: MetricType::Gauge, look });
    }

    /// The same for what only grows.
    pub fn counter_of(&self, name: &'static str, help: &str, look: impl Fn() -> u64 + Send + Sync + 'static) {
        self.collect(Seen { name, help: format!("{help}."), kind: MetricType::Counter, look });
    }

    /// A histogram of what requests took; see [`trace::label`](crate::trace::label).
    pub fn traced_histogram(&self, name: &str, help: &str, buckets: &[f64]) -> TracedHistogram {
        self.register(name, help, HistogramWithExemplars::new(buckets.iter().copied()))
    }

    pub fn timed(&self, name: &str, help: &str, buckets: &[f64]) -> Timed {
        Timed { histogram: self.histogram(name, help, buckets), nanoseconds: Arc::default() }
    }

    /// Where an engine writes its steps down, for the admin port to show.
    #[must_use]
    pub fn steps(&self, engine: &'static str) -> Steps {
        let steps = Steps::new(engine);
        self.engines_mut().push(steps.clone());
        steps
    }

    /// The steps of all engines of the process.
    #[must_use]
    pub fn engines(&self) -> Vec<Steps> {
        self.engines_mut().clone()
    }

    /// Adds what the process holds (`process_open_fds`, …) and how `runtime` does (`uniarm_runtime_…`). Once for a
    /// process: its roles share both.
    pub fn watch_process(&self, runtime: &Handle) {
        let process = Self { prefix: PROCESS_PREFIX.to_owned(), ..self.clone() };
        process.collect(OwnProcess);
        self.scope("runtime").collect(OwnRuntime(runtime.metrics()));
    }

    /// All metrics of the process as OpenMetrics text.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut page = String::new();
        for scope in self.lock().iter() {
            text::encode_registry(&mut page, &scope.registry).expect("writing to a string cannot fail");
        }
        text::encode_eof(&mut page).expect("writing to a string cannot fail");
        page
    }

    fn insert(&self, name: &str, help: &str, metric: impl Metric) {
        self.in_own_scope(|registry| registry.register(name, help, metric));
    }

    fn collect(&self, collector: impl Collector) {
        self.in_own_scope(|registry| registry.register_collector(Box::new(collector)));
    }

    fn in_own_scope(&self, register: impl FnOnce(&mut Registry)) {
        let mut scopes = self.lock();
        let position = scopes.iter().position(|scope| scope.prefix == self.prefix).unwrap_or_else(|| {
            let registry = Registry::with_prefix(self.prefix.clone());
            scopes.push(Scope { prefix: self.prefix.clone(), registry });
            scopes.len() - 1
        });
        register(&mut scopes[position].registry);
    }

    fn engines_mut(&self) -> MutexGuard<'_, Vec<Steps>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Scope>> {
        // A panic elsewhere must not hide the metrics that would explain it.
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

// === impl Exposition ===

impl Exposition {
    const OPEN_METRICS: &str = "application/openmetrics-text";

    /// What a client gets that accepts so much, in HTTP's words.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        match accept.split(',').any(|kind| kind.trim().starts_with(Self::OPEN_METRICS)) {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// A page of OpenMetrics, written like this.
    #[must_use]
    pub fn write(self, page: String) -> String {
        match self {
            Self::OpenMetrics => page,
            Self::Text => text_of(&page),
        }
    }
}

/// In the older format a family has the name of its samples, a kind that was known then, and no exemplars. Comments of other
/// kinds (units, the end) are none of its own.
fn text_of(page: &str) -> String {
    let mut kinds: HashMap<&str, &str> = HashMap::new();
    for line in page.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|family| family.split_once(' ')) {
            kinds.insert(name, kind);
        }
    }
    let family = |name: &str| match kinds.get(name) {
        Some(&"counter") => format!("{name}_total"),
        Some(&"info") => format!("{name}_info"),
        _ => name.to_owned(),
    };
    let mut text = String::with_capacity(page.len());
    for line in page.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|line| line.split_once(' ')) {
            text.push_str(&format!("# HELP {} {help}\n", family(name)));
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' '))
        {
            let known = match kind {
                "info" => "gauge",
                "unknown" => "untyped",
                kind => kind,
            };
            text.push_str(&format!("# TYPE {} {known}\n", family(name)));
        } else if !line.starts_with('#') {
            text.push_str(without_exemplar(line));
            text.push('\n');
        }
    }
    text
}

/// What stands before the exemplar: name, labels and value. A label's value may look like anything, but ends with a quote.
fn without_exemplar(sample: &str) -> &str {
    let mut quoted = false;
    let mut escaped = false;
    for (index, character) in sample.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '#' if !quoted => return sample[..index].trim_end(),
            _ => {}
        }
    }
    sample
}

// === impl Timed ===

impl Timed {
    pub fn observe(&self, seconds: f64) {
        self.histogram.observe(seconds);
        self.nanoseconds.fetch_add((seconds * 1e9) as u64, Ordering::Relaxed);
    }

    /// All that was observed.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }
}

/// Bucket bounds that the product's histograms share, so that their quantiles can be compared.
pub mod buckets {
    /// Seconds, from a message on loopback (tens of microseconds) to a long answer.
    pub const SECONDS: [f64; 19] = [
        0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
        2.5, 5.0, 10.0, 30.0, 60.0,
    ];

    /// Bytes of an exchanged row: from a short list (256 bytes) to a dense row of a large vocabulary.
    pub const BYTES: [f64; 12] = [
        64.0,
        128.0,
        256.0,
        512.0,
        1024.0,
        2048.0,
        4096.0,
        16_384.0,
        65_536.0,
        262_144.0,
        1_048_576.0,
        4_194_304.0,
    ];

    /// Rows of a batch, ids of a query, tokens of a draft.
    pub const COUNTS: [f64; 12] = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
}
