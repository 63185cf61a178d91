//! What came of a simulation: latencies as clients saw them, and how busy the pools were.

use std::time::Duration;

use serde::Serialize;

/// Bits of a duration that a histogram keeps: buckets are at most 1/128 wide.
const MANTISSA_BITS: u32 = 7;

/// What the requests of a trace got.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub base_workers: usize,
    pub reward_workers: usize,
    pub requests: usize,
    pub finished: usize,
    /// Refused by every worker that was tried, or by the router.
    pub refused: usize,
    /// Past their deadline.
    pub expired: usize,
    /// From the trace's zero to the last token.
    pub seconds: f64,
    pub tokens: u64,
    pub tokens_per_second: f64,
    /// Seconds from a request's departure at the client to its first token there.
    pub first_token: Quantiles,
    /// Seconds between two tokens of an answer; tokens that arrive together have none between them.
    pub inter_token: Quantiles,
    /// Seconds from a request's departure to its last token.
    pub end_to_end: Quantiles,
    pub base: PoolReport,
    pub reward: PoolReport,
    /// Base tokens computed for each token of an answer, prompts left out.
    pub base_passes_per_token: f64,
    pub drafted: u64,
    pub accepted: u64,
    /// Between base and reward workers, both ways, for each guided token.
    pub exchange_bytes_per_token: f64,
    /// Requests that met both latency targets on their own, over those that arrived.
    pub goodput: f64,
    pub good_per_second: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PoolReport {
    /// Share of the time that a worker stepped, mean over the pool.
    pub busy: f64,
    pub steps: u64,
    pub rows_per_step: f64,
    pub tokens_per_step: f64,
    pub preemptions: u64,
    /// Share of prompt tokens that were found in the prefix cache.
    pub prefix_hits: f64,
}

/// What every single request should get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    pub first_token: Duration,
    pub inter_token: Duration,
    /// Share of requests that get both.
    pub goodput: f64,
}

/// Counts durations in buckets of equal relative width.
#[derive(Clone, Debug, Default)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: f64,
    most: Duration,
}

// === impl Report ===

impl Report {
    /// Whether the targets are met: the percentiles by all tokens, the goodput request by request.
    pub fn meets(&self, targets: &Targets) -> bool {
        self.first_token.p99 <= targets.first_token.as_secs_f64()
            && self.inter_token.p99 <= targets.inter_token.as_secs_f64()
            && self.goodput >= targets.goodput
    }
}

// === impl Histogram ===

impl Histogram {
    pub(crate) fn add(&mut self, duration: Duration) {
        let bucket = bucket(duration);
        if bucket >= self.buckets.len() {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.sum += duration.as_secs_f64();
        self.most = self.most.max(duration);
    }

    pub(crate) fn quantiles(&self) -> Quantiles {
        if self.count == 0 {
            return Quantiles::default();
        }
        let at = |share: f64| {
            let rank = ((self.count as f64 * share).ceil() as u64).max(1);
            let mut seen = 0;
            let bucket = self.buckets.iter().position(|count| {
                seen += count;
                seen >= rank
            });
            upper(bucket.unwrap_or_default()).min(self.most).as_secs_f64()
        };
        Quantiles {
            mean: self.sum / self.count as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: self.most.as_secs_f64(),
        }
    }
}

/// Exponent and leading bits of the nanoseconds.
fn bucket(duration: Duration) -> usize {
    let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(MANTISSA_BITS + 1);
    ((u64::from(shift) << MANTISSA_BITS) + (nanos >> shift)) as usize
}

/// The largest duration in a bucket.
fn upper(bucket: usize) -> Duration {
    let bucket = bucket as u64;
    let shift = (bucket >> MANTISSA_BITS).saturating_sub(1);
    let mantissa = bucket - (shift << MANTISSA_BITS);
    Duration::from_nanos((((u128::from(mantissa) + 1) << shift) - 1).try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_it_says_within_a_hundredth() {
        let mut last = 0;
        for nanos in (0..2000).chain((2000..10_000_000).step_by(997)) {
            let duration = Duration::from_nanos(nanos);
            let bucket = bucket(duration);
            assert!(bucket >= last && upper(bucket) >= duration, "{nanos}");
            assert!(upper(bucket).as_nanos() as f64 <= nanos as f64 * 1.008 + 1.0, "{nanos}");
            last = bucket;
        }
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_list() {
        let mut histogram = Histogram::default();
        let mut durations: Vec<_> = (1..=1000).map(|n| Duration::from_micros(n * n)).collect();
        durations.iter().for_each(|duration| histogram.add(*duration));
        durations.sort();
        let found = histogram.quantiles();
        for (quantile, share) in [(found.p50, 500), (found.p90, 900), (found.p99, 990)] {
            let exact = durations[share - 1].as_secs_f64();
            assert!((quantile / exact - 1.0).abs() < 0.01, "{quantile} {exact}");
        }
        assert_eq!(found.max, 1.0);
    }
}
