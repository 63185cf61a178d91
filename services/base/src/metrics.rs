//! What a base worker reports to Prometheus.

use uniarm_runtime::{
    Metrics,
    logits::LogitMetrics,
    metrics::{Timed, TracedHistogram, buckets},
    prometheus_client::{
        encoding::EncodeLabelSet,
        metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    },
};

use crate::term::Race;

/// How a guided token was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ModeLabel {
    pub(crate) mode: &'static str,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OutcomeLabel {
    pub(crate) outcome: &'static str,
}

/// Whether a draft was the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabel {
    verdict: &'static str,
}

/// Drafts by verdict.
#[derive(Clone)]
pub(crate) struct Drafts {
    accepted: Counter,
    refused: Counter,
}

#[derive(Clone)]
pub(crate) struct BaseMetrics {
    pub(crate) requests: Family<OutcomeLabel, Counter>,
    pub(crate) held: Gauge,
    pub(crate) running: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) places: Gauge,
    pub(crate) free_blocks: Gauge,
    pub(crate) blocks: Gauge,
    pub(crate) steps: Counter,
    pub(crate) computed: Counter,
    pub(crate) tokens: Counter,
    pub(crate) unguided: Counter,
    pub(crate) preemptions: Counter,
    pub(crate) logits: LogitMetrics,
    pub(crate) schedule: Histogram,
    pub(crate) forward: Histogram,
    pub(crate) reward_wait: Histogram,
    pub(crate) choose: Timed,
    pub(crate) emit: Timed,
    pub(crate) first_token: TracedHistogram,
    pub(crate) inter_token: Histogram,
    pub(crate) decided: Family<ModeLabel, Counter>,
    pub(crate) exchange_bytes: Family<ModeLabel, Counter>,
    pub(crate) query_ids: Histogram,
    pub(crate) drafts: Drafts,
    pub(crate) reward_losses: Counter,
    pub(crate) reward_moves: Counter,
    pub(crate) hedges: Counter,
    hedges_won: Counter,
    pub(crate) resumed: Counter,
}

// === impl VerdictLabel ===

impl VerdictLabel {
    fn new(right: bool) -> Self {
        Self { verdict: if right { "accepted" } else { "refused" } }
    }
}

// === impl Drafts ===

impl Drafts {
    fn new(family: &Family<VerdictLabel, Counter>) -> Self {
        let counter = |right| family.get_or_create(&VerdictLabel::new(right)).clone();
        Self { accepted: counter(true), refused: counter(false) }
    }

    pub(crate) fn of(&self, right: bool) -> &Counter {
        if right { &self.accepted } else { &self.refused }
    }
}

// === impl BaseMetrics ===

impl BaseMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let metrics = metrics.scope("base");
        let seconds = &buckets::SECONDS;
        Self {
            requests: metrics.register("requests", "Requests that ended, by outcome", Family::default()),
            held: metrics.gauge("requests_held", "Requests that are here, running or waiting"),
            running: metrics.gauge("sequences_running", "Sequences that hold cache blocks"),
            waiting: metrics.gauge("sequences_waiting", "Sequences that wait for their first step"),
            places: metrics.gauge("sequences_max", "Sequences that may hold cache blocks at once"),
            free_blocks: metrics.gauge("kv_free_blocks", "Free blocks of the paged cache"),
            blocks: metrics.gauge("kv_blocks", "Blocks of the paged cache, free or not"),
            steps: metrics.counter("steps", "Forward passes"),
            computed: metrics.counter("computed_tokens", "Tokens computed, prompts included"),
            tokens: metrics.counter("tokens", "Tokens chosen"),
            unguided: metrics.counter("unguided_tokens", "Tokens chosen without a reward that was asked for"),
            preemptions: metrics.counter("preemptions", "Sequences that lost their blocks to others"),
            logits: LogitMetrics::new(&metrics),
            schedule: metrics.histogram("step_schedule_seconds", "Planning of a step", seconds),
            forward: metrics.histogram("step_forward_seconds", "Forward pass of a step", seconds),
            reward_wait: metrics.histogram(
                "reward_stall_seconds",
                "From a token's base logits to its last reward row, for each token",
                seconds,
            ),
            choose: metrics.timed("step_choose_seconds", "Choosing one token", seconds),
            emit: metrics.timed("step_emit_seconds", "Text, events and bookkeeping of one token", seconds),
            first_token: metrics.traced_histogram(
                "time_to_first_token_seconds",
                "Accepted to first token",
                seconds,
            ),
            inter_token: metrics.histogram("inter_token_seconds", "Between two tokens of an answer", seconds),
            decided: metrics.register(
                "decided_tokens",
                "Guided tokens by what they needed",
                Family::default(),
            ),
            exchange_bytes: metrics.register(
                "exchange_bytes",
                "Payload of reward answers and queries, by what the token needed",
                Family::default(),
            ),
            query_ids: metrics.histogram("query_ids", "Ids of one query for named logits", &buckets::COUNTS),
            drafts: Drafts::new(&metrics.register(
                "drafts",
                "Drafts by verdict: accepted or refused",
                Family::default(),
            )),
            reward_losses: metrics
                .counter("reward_losses", "Sessions lost with a reward worker or its stream"),
            hedges: metrics.counter(
                "reward_hedges",
                "Sessions opened at a second reward worker because the first was silent",
            ),
            hedges_won: metrics
                .counter("reward_hedges_won", "Of these, those that the second one answered first"),
            reward_moves: metrics
                .counter("reward_moves", "Sessions moved away from reward workers that were leaving"),
            resumed: metrics.counter("resumed_answers", "Answers that began on another worker"),
        }
    }

    pub(crate) fn on_race(&self, race: Race) {
        if race == Race::New {
            self.hedges_won.inc();
        }
    }
}
