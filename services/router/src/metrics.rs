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

/// Names come from the operator's file, which bounds them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TenantLabels {
    pub(crate) tenant: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TenantEndLabels {
    pub(crate) tenant: String,
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
    tenant_requests: Family<TenantEndLabels, Counter>,
    tenant_tokens: Family<TenantLabels, Counter>,
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
            tenant_requests: metrics.register(
                "tenant_requests",
                "Requests of a tenant that ended, by gRPC status",
                Family::default(),
            ),
            tenant_tokens: metrics.register("tenant_tokens", "Tokens relayed to a tenant", Family::default()),
        }
    }

    /// `tenant`: empty for anybody.
    pub(crate) fn ended(&self, tenant: &str, outcome: &'static str, code: tonic::Code) {
        let code = code_name(code);
        self.requests.get_or_create(&EndLabels { outcome, code }).inc();
        if !tenant.is_empty() {
            self.tenant_requests.get_or_create(&TenantEndLabels { tenant: tenant.to_owned(), code }).inc();
        }
    }

    pub(crate) fn relayed(&self, tenant: &str, tokens: u64) {
        self.tokens.inc_by(tokens);
        if !tenant.is_empty() {
            self.tenant_tokens.get_or_create(&TenantLabels { tenant: tenant.to_owned() }).inc_by(tokens);
        }
    }
}
