//! What a reward worker reports to Prometheus.

use std::sync::atomic::AtomicU64;

use uniarm_runtime::{
    Metrics,
    logits::LogitMetrics,
    metrics::buckets,
    prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
};

#[derive(Clone)]
pub(crate) struct RewardMetrics {
    pub(crate) sessions: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) places: Gauge,
    pub(crate) free_blocks: Gauge,
    pub(crate) blocks: Gauge,
    pub(crate) steps: Counter,
    pub(crate) rows: Counter,
    pub(crate) lane_rows: Counter,
    pub(crate) logits: LogitMetrics,
    pub(crate) tokens: Counter,
    pub(crate) queries: Counter,
    pub(crate) drafts: Counter,
    pub(crate) preemptions: Counter,
    pub(crate) schedule: Histogram,
    pub(crate) forward: Histogram,
    /// Of a step of one row.
    pub(crate) least_forward: Gauge<f64, AtomicU64>,
    pub(crate) reply: Histogram,
    pub(crate) stall: Histogram,
}

impl RewardMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let metrics = metrics.scope("reward");
        let seconds = &buckets::SECONDS;
        Self {
            sessions: metrics.gauge("sessions", "Open sessions"),
            waiting: metrics.gauge("sessions_waiting", "Sessions whose first step has not been planned"),
            places: metrics.gauge("sessions_max", "Sessions that one step serves at most"),
            free_blocks: metrics.gauge("kv_free_blocks", "Free blocks of the paged cache"),
            blocks: metrics.gauge("kv_blocks", "Blocks of the paged cache, free or not"),
            steps: metrics.counter("steps", "Forward passes"),
            rows: metrics.counter("rows", "Rows of logits answered"),
            lane_rows: metrics.counter("lane_rows", "Whole rows that went from GPU to GPU"),
            logits: LogitMetrics::new(&metrics),
            tokens: metrics.counter("tokens", "Tokens computed, prompts included"),
            queries: metrics.counter("queries", "Queries for named logits or whole rows"),
            drafts: metrics.counter("drafts", "Tokens that sessions went on with before they were chosen"),
            preemptions: metrics.counter("preemptions", "Sessions that lost their blocks to others"),
            schedule: metrics.histogram("step_schedule_seconds", "Planning of a step", seconds),
            forward: metrics.histogram("step_forward_seconds", "Forward pass of a step", seconds),
            least_forward: metrics.register(
                "step_least_seconds",
                "Forward pass of the smallest step, as the latest of its kind took",
                Gauge::default(),
            ),
            reply: metrics.histogram("step_reply_seconds", "Lists of a step", seconds),
            stall: metrics.histogram(
                "base_stall_seconds",
                "Sessions were open and no base worker asked",
                seconds,
            ),
        }
    }
}
