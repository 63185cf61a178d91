//! What the engine writes down of each step, out of what its metrics measure anyway.

use std::time::{Duration, Instant};

use uniarm_decode::scheduler::SchedulerStats;
use uniarm_engine::StepReport;
use uniarm_runtime::{
    Metrics,
    steps::{Step, Steps},
};

use crate::metrics::RewardMetrics;

/// Between two forwards. Times are the scheduler's.
pub(crate) struct StepMeter {
    steps: Steps,
    /// When the last step ended; `None` after a time without sessions, which nobody waited through.
    ended: Option<Duration>,
    /// Drafts made and rows answered until then.
    before: (u64, u64),
}

// === impl StepMeter ===

impl StepMeter {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self { steps: metrics.steps("reward"), ended: None, before: (0, 0) }
    }

    /// There is no session.
    pub(crate) fn rest(&mut self) {
        self.ended = None;
    }

    /// `drafted`: rows after drafts. `computed`: when the rows were handed out, by the clock and as the scheduler counts it,
    /// and how long their lists took then.
    pub(crate) fn publish(
        &mut self,
        (report, drafted): (&StepReport, usize),
        (instant, computed, replied): (Instant, Duration, Duration),
        stats: SchedulerStats,
        metrics: &RewardMetrics,
    ) {
        let micros = |duration: Duration| duration.as_micros() as u64;
        let totals = (metrics.drafts.get(), metrics.rows.get());
        let StepReport { planned_at, schedule, forward, tokens, rows, .. } = *report;
        let handed_out = computed.saturating_sub(planned_at + schedule + forward);
        let (ended, busy) = (computed + replied, schedule + forward + handed_out + replied);
        let whole = self.ended.map_or(busy, |before| ended.saturating_sub(before));
        self.steps.publish(
            instant + replied,
            Step {
                prefill_tokens: (tokens - rows) as u64,
                decode_rows: (rows - drafted) as u64,
                draft_rows: drafted as u64,
                running: stats.running as u64,
                waiting: stats.waiting as u64,
                wait_us: micros(whole.saturating_sub(busy)),
                plan_us: micros(schedule),
                forward_us: micros(forward),
                exchange_us: micros(replied),
                commit_us: micros(handed_out),
                drafts_made: totals.0 - self.before.0,
                rows_answered: totals.1 - self.before.1,
                blocks_used: (stats.total_blocks - stats.free_blocks) as u64,
                blocks: stats.total_blocks as u64,
                ..Step::default()
            },
        );
        (self.before, self.ended) = (totals, Some(ended));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_all_of_the_time_since_the_one_before_and_each_part_once() {
        let ms = Duration::from_millis;
        let metrics = Metrics::new();
        let own = RewardMetrics::new(&metrics);
        let mut meter = StepMeter::new(&metrics);
        for (planned_at, rests) in [(ms(100), false), (ms(150), false), (ms(9000), true)] {
            if rests {
                meter.rest();
            }
            own.drafts.inc_by(2);
            own.rows.inc_by(5);
            let report = StepReport {
                tokens: 12,
                rows: 5,
                planned_at,
                schedule: ms(1),
                forward: ms(20),
                ..StepReport::default()
            };
            let stats = SchedulerStats { total_blocks: 9, free_blocks: 3, ..SchedulerStats::default() };
            let times = (Instant::now(), planned_at + ms(24), ms(4));
            meter.publish((&report, 3), times, stats, &own);
        }
        let steps = metrics.engines()[0].last(8);
        // Wait, choose, commit, exchange, plan, forward.
        let parts = steps.iter().map(|step| step.parts().map(|(_, us)| us / 1000));
        assert_eq!(
            parts.collect::<Vec<_>>(),
            [[0, 0, 3, 4, 1, 20], [22, 0, 3, 4, 1, 20], [0, 0, 3, 4, 1, 20]]
        );
        for step in steps {
            assert_eq!((step.prefill_tokens, step.decode_rows, step.draft_rows), (7, 2, 3));
            assert_eq!((step.drafts_made, step.rows_answered, step.blocks_used), (2, 5, 6));
        }
    }
}
