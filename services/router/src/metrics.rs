//! What a router reports to Prometheus.

use uniarm_proto::refusal::code_name;
use uniarm_runtime::{
    Metrics,
    metrics::buckets,
    prometheus_client::{
        encoding::EncodeLabelSet,
        metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    },
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct EndLabels {
    pub(crate) outcome: &'static str,
    /// The gRPC status that the client was given.
    pub(crate) code: &'static str,
}

#[derive(Clone)]
pub(crate) struct RouterMetrics {
    pub(crate) requests: Family<EndLabels, Counter>,
    pub(crate) under_way: Gauge,
    pub(crate) attempts: Counter,
    pub(crate) tokens: Counter,
    pub(crate) first_event: Histogram,
    pub(crate) migrations: Counter,
    pub(crate) recovery: Histogram,
}

impl RouterMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let metrics = metrics.scope("router");
        Self {
            requests: metrics.register(
                "requests",
                "Requests that ended, by outcome and gRPC status",
                Family::default(),
            ),
            under_way: metrics.gauge("requests_under_way", "Requests that are being relayed"),
            attempts: metrics.counter("attempts", "Base workers asked to run a request, retries included"),
            tokens: metrics.counter("relayed_tokens", "Tokens relayed to clients"),
            first_event: metrics.histogram(
                "placement_seconds",
                "From a request's arrival to its base worker's first answer",
                &buckets::SECONDS,
            ),
            migrations: metrics.counter("migrations", "Streams that moved to another base worker"),
            recovery: metrics.histogram(
                "recovery_seconds",
                "From the loss of a stream's base worker to its next token",
                &buckets::SECONDS,
            ),
        }
    }

    pub(crate) fn ended(&self, outcome: &'static str, code: tonic::Code) {
        self.requests.get_or_create(&EndLabels { outcome, code: code_name(code) }).inc();
    }
}
