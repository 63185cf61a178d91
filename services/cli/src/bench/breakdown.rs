//! Where the time of a step goes, read from the engines' own metrics.

use std::collections::HashMap;

use serde::Serialize;
use uniarm_runtime::Metrics;

/// Sums and counts of the engines at one moment.
pub struct Snapshot(HashMap<String, f64>);

/// Microseconds of a base step between two snapshots, by what the base engine's thread did.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Breakdown {
    pub base_steps: f64,
    pub tokens: f64,
    pub step_us: f64,
    pub schedule_us: f64,
    pub forward_us: f64,
    pub choose_us: f64,
    pub emit_us: f64,
    /// The rest: it waited for reward rows, or moved messages.
    pub wait_us: f64,
    /// Of one token: from its base logits to its last reward row.
    pub reward_stall_us: f64,
    pub reward_steps: f64,
    /// Of one reward step.
    pub reward_forward_us: f64,
    pub reward_lists_us: f64,
}

// === impl Snapshot ===

impl Snapshot {
    pub fn take(metrics: &Metrics) -> Self {
        Self::parse(&metrics.encode())
    }

    /// Samples without labels of an OpenMetrics page.
    fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|line| !line.starts_with('#'));
        let pairs = samples.filter_map(|line| line.split_once(' '));
        Self(pairs.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect())
    }

    fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }
}

// === impl Breakdown ===

impl Breakdown {
    /// `None`: no step ended in between.
    pub fn between(before: &Snapshot, after: &Snapshot, seconds: f64) -> Option<Self> {
        let grown = |name: &str| after.get(name) - before.get(name);
        let base_steps = grown("uniarm_base_steps_total");
        if base_steps <= 0.0 {
            return None;
        }
        let each = |name: &str, count: f64| if count > 0.0 { 1e6 * grown(name) / count } else { 0.0 };
        let step_us = 1e6 * seconds / base_steps;
        let schedule_us = each("uniarm_base_step_schedule_seconds_sum", base_steps);
        let forward_us = each("uniarm_base_step_forward_seconds_sum", base_steps);
        let choose_us = each("uniarm_base_step_choose_seconds_sum", base_steps);
        let emit_us = each("uniarm_base_step_emit_seconds_sum", base_steps);
        let reward_steps = grown("uniarm_reward_steps_total");
        let stalls = grown("uniarm_base_reward_stall_seconds_count");
        Some(Self {
            base_steps,
            tokens: grown("uniarm_base_tokens_total"),
            step_us,
            schedule_us,
            forward_us,
            choose_us,
            emit_us,
            wait_us: (step_us - schedule_us - forward_us - choose_us - emit_us).max(0.0),
            reward_stall_us: each("uniarm_base_reward_stall_seconds_sum", stalls),
            reward_steps,
            reward_forward_us: each("uniarm_reward_step_forward_seconds_sum", reward_steps),
            reward_lists_us: each("uniarm_reward_step_reply_seconds_sum", reward_steps),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_divided_by_what_grew_between_two_pages() {
        let page = |steps: u32, forward: f64| {
            Snapshot::parse(&format!(
                "# HELP uniarm_base_steps Forward passes.\nuniarm_base_steps_total {steps}\n\
                 uniarm_base_step_forward_seconds_sum {forward}\n\
                 uniarm_base_step_forward_seconds_bucket{{le=\"0.1\"}} 3\n# EOF\n"
            ))
        };
        let breakdown = Breakdown::between(&page(10, 1.0), &page(20, 1.5), 1.0).unwrap();
        assert_eq!((breakdown.step_us, breakdown.forward_us, breakdown.wait_us), (1e5, 5e4, 5e4));
        assert_eq!(breakdown.reward_forward_us, 0.0);
        assert!(Breakdown::between(&page(10, 1.0), &page(10, 1.0), 1.0).is_none());
    }

    #[test]
    fn the_engines_have_the_metrics_that_are_read() {
        let source = include_str!("breakdown.rs");
        let base = include_str!("../../../base/src/metrics.rs");
        let reward = include_str!("../../../reward/src/metrics.rs");
        for (prefix, metrics) in [("uniarm_base_", base), ("uniarm_reward_", reward)] {
            let quoted = source.split('"').filter_map(|word| word.strip_prefix(prefix));
            for name in quoted.filter(|name| name.ends_with("_sum") || name.ends_with("_total")) {
                let stem = name.trim_end_matches("_sum").trim_end_matches("_total");
                assert!(metrics.contains(&format!("\"{stem}\"")), "{prefix}{stem} is not registered");
            }
        }
    }
}
