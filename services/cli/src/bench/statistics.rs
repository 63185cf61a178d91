//! Medians, ranges and percentiles.

use serde::{Deserialize, Serialize};

/// Repeats of one measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

/// A distribution of latencies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

// === impl Spread ===

impl Spread {
    /// # Panics
    /// Without values.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self { median: percentile(&values, 0.5), least: values[0], most: values[values.len() - 1] }
    }
}

/// Where the median of all such measurements lies with 95 % confidence, whatever their distribution: between two of these
/// values, by the chance of a fair coin. `None` where they are too few to say.
pub fn interval_of_median(values: &[f64]) -> Option<[f64; 2]> {
    const OUTSIDE_EACH: f64 = 0.025;
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let flips = values.len();
    // Chances of 0, 1, … heads, while they sum up to no more than may lie outside; their logarithms, since they may be tiny.
    let (mut chance, mut sum, mut outside) = (flips as f64 * 0.5_f64.ln(), 0.0, 0);
    while sum + chance.exp() <= OUTSIDE_EACH {
        sum += chance.exp();
        chance += ((flips - outside) as f64 / (outside + 1) as f64).ln();
        outside += 1;
    }
    let first = outside.checked_sub(1)?;
    Some([values[first], values[flips - 1 - first]])
}

// === impl Percentiles ===

impl Percentiles {
    /// `None` without values.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let at = |share| percentile(&values, share);
        (!values.is_empty()).then(|| Self { p50: at(0.5), p90: at(0.9), p99: at(0.99) })
    }
}

/// The nearest rank: a value that was measured, never one between two.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// `value` as a bar of at most `width` characters, in eighths.
pub fn bar(value: f64, most: f64, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (8.0 * width as f64 * value / most).round() as usize;
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values_of_the_nearest_rank() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(Percentiles::of(hundred), Some(Percentiles { p50: 50.0, p90: 90.0, p99: 99.0 }));
        assert_eq!(Percentiles::of(vec![7.0]), Some(Percentiles { p50: 7.0, p90: 7.0, p99: 7.0 }));
        assert_eq!(Percentiles::of(Vec::new()), None);
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { median: 2.0, least: 1.0, most: 3.0 });
        assert_eq!(Spread::of(vec![2.0, 1.0]).median, 1.0);
    }

    #[test]
    fn the_median_lies_between_the_ranks_of_the_sign_test() {
        let values = |count: u32| (1..=count).rev().map(f64::from).collect::<Vec<_>>();
        // Ranks of the tables: five values are too few, six are just enough.
        assert_eq!(interval_of_median(&values(5)), None);
        assert_eq!(interval_of_median(&values(6)), Some([1.0, 6.0]));
        assert_eq!(interval_of_median(&values(9)), Some([2.0, 8.0]));
        assert_eq!(interval_of_median(&values(41)), Some([14.0, 28.0]));
        assert_eq!(interval_of_median(&values(100)), Some([40.0, 61.0]));
        assert_eq!(interval_of_median(&values(2000)), Some([956.0, 1045.0]), "1000.5 ± 1.96 √500");
    }

    #[test]
    fn bars_are_in_proportion() {
        assert_eq!(bar(1.0, 2.0, 4), "██");
        assert_eq!(bar(1.0, 16.0, 2), "▏");
        assert_eq!(bar(0.0, 1.0, 4), "");
    }
}
