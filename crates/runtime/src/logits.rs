//! What an engine reports of the logits that its model hands over: whole rows, or lists of the likeliest tokens.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};

use crate::Metrics;

/// How the logits of a position came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FormLabel {
    form: &'static str,
}

/// How the row behind a list that was not enough was made good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WayLabel {
    way: &'static str,
}

/// Counters of one engine, in the scope of its role.
#[derive(Clone)]
pub struct LogitMetrics {
    rows: Counter,
    lists: Counter,
    gathered_bytes: Counter,
    fetched: Counter,
    repeated: Counter,
}

// === impl LogitMetrics ===

impl LogitMetrics {
    #[must_use]
    pub fn new(scope: &Metrics) -> Self {
        let positions: Family<FormLabel, Counter> = scope.register(
            "positions",
            "Positions whose logits were wanted, by how they came: whole rows, or lists of the likeliest tokens",
            Family::default(),
        );
        let form = |form| positions.get_or_create(&FormLabel { form }).clone();
        let undecided: Family<WayLabel, Counter> = scope.register(
            "undecided_lists",
            "Lists that were not enough, by how the whole row came: fetched from the model, or computed again",
            Family::default(),
        );
        let way = |way| undecided.get_or_create(&WayLabel { way }).clone();
        Self {
            rows: form("row"),
            lists: form("list"),
            gathered_bytes: scope
                .counter("gathered_bytes", "Bytes of logits that came from other ranks of this worker"),
            fetched: way("fetched"),
            repeated: way("repeated"),
        }
    }

    /// A step handed over the logits of so many positions, `lists` of them as lists.
    pub fn on_step(&self, positions: usize, lists: usize, gathered_bytes: usize) {
        self.lists.inc_by(lists as u64);
        self.rows.inc_by((positions - lists) as u64);
        self.gathered_bytes.inc_by(gathered_bytes as u64);
    }

    /// A whole row came after its list, with so many bytes of other ranks.
    pub fn on_fetched(&self, gathered_bytes: usize) {
        self.fetched.inc();
        self.gathered_bytes.inc_by(gathered_bytes as u64);
    }

    /// The row behind a list is not kept any more, and is computed again.
    pub fn on_repeated(&self) {
        self.repeated.inc();
    }
}
