//! What runs batches reports to Prometheus: a router that keeps them, or the process of `uniarm batch`.

use std::sync::Arc;

use uniarm_batch::Tally;
use uniarm_runtime::Metrics;

/// `look` is asked whenever the metrics are.
pub fn watch_batches(metrics: &Metrics, look: impl Fn() -> Tally + Send + Sync + 'static) {
    let (metrics, look) = (metrics.scope("batch"), Arc::new(look));
    let of = |number: fn(Tally) -> u64| {
        let look = Arc::clone(&look);
        move || number(look())
    };
    metrics.gauge_of("jobs", "Batches under way", of(|tally| tally.jobs));
    let help = "Requests of batches under way that have neither answer nor error";
    metrics.gauge_of("requests_left", help, of(|tally| tally.left));
    metrics.counter_of(
        "requests_answered",
        "Requests of batches that were answered",
        of(|tally| tally.answered),
    );
    let help = "Requests of batches that ended with an error";
    metrics.counter_of("requests_failed", help, of(|tally| tally.failed));
}
