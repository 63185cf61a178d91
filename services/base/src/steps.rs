//! What the engine writes down of each step, out of what its metrics measure anyway.

use std::time::{Duration, Instant};

use uniarm_decode::scheduler::SchedulerStats;
use uniarm_engine::StepReport;
use uniarm_runtime::{
    Metrics,
    steps::{Step, Steps},
};

use crate::metrics::BaseMetrics;

/// Between two forwards. Times are the scheduler's.
pub(crate) struct StepMeter {
    steps: Steps,
    /// When the latest turn began.
    turn: Duration,
    /// From the beginnings of turns to their plans, since the last step: deciding, and messages.
    decided: Duration,
    /// When the last step ended; `None` after a time without requests, which nobody waited through.
    ended: Option<Duration>,
    before: Totals,
}

/// What only grows.
#[derive(Clone, Copy, Default)]
struct Totals {
    choose: Duration,
    emit: Duration,
    tokens: u64,
    accepted: u64,
    refused: u64,
}

// === impl StepMeter ===

impl StepMeter {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            steps: metrics.steps("base"),
            turn: Duration::ZERO,
            decided: Duration::ZERO,
            ended: None,
            before: Totals::default(),
        }
    }

    /// A turn has read its messages.
    pub(crate) fn turn(&mut self, now: Duration) {
        self.turn = now;
    }

    /// A step was planned, though there may be nothing in it.
    pub(crate) fn planned(&mut self, report: &StepReport) {
        self.decided += report.planned_at.saturating_sub(self.turn);
    }

    /// Nobody asks for anything.
    pub(crate) fn rest(&mut self) {
        (self.ended, self.decided) = (None, Duration::ZERO);
    }

    /// `passes`: sequences that got rows. `ended`: when, by the clock and as the scheduler counts it.
    pub(crate) fn publish(
        &mut self,
        (report, passes): (&StepReport, usize),
        (instant, ended): (Instant, Duration),
        stats: SchedulerStats,
        metrics: &BaseMetrics,
    ) {
        let micros = |duration: Duration| duration.as_micros() as u64;
        let totals = Totals::of(metrics);
        let grown = totals.since(&self.before);
        let StepReport { planned_at, schedule, forward, tokens, rows, .. } = *report;
        let handed_out = ended.saturating_sub(planned_at + schedule + forward);
        let busy = self.decided + schedule + forward + handed_out;
        let whole = self.ended.map_or(busy, |before| ended.saturating_sub(before));
        self.steps.publish(
            instant,
            Step {
                prefill_tokens: (tokens - rows) as u64,
                decode_rows: passes as u64,
                draft_rows: (rows - passes) as u64,
                running: stats.running as u64,
                waiting: stats.waiting as u64,
                wait_us: micros(whole.saturating_sub(busy)),
                plan_us: micros(schedule),
                forward_us: micros(forward),
                choose_us: micros(grown.choose),
                exchange_us: micros(self.decided.saturating_sub(grown.choose + grown.emit)),
                commit_us: micros(grown.emit + handed_out),
                drafts_compared: grown.accepted + grown.refused,
                drafts_accepted: grown.accepted,
                tokens_chosen: grown.tokens,
                blocks_used: (stats.total_blocks - stats.free_blocks) as u64,
                blocks: stats.total_blocks as u64,
                ..Step::default()
            },
        );
        (self.before, self.ended, self.decided) = (totals, Some(ended), Duration::ZERO);
    }
}

// === impl Totals ===

impl Totals {
    fn of(metrics: &BaseMetrics) -> Self {
        Self {
            choose: metrics.choose.total(),
            emit: metrics.emit.total(),
            tokens: metrics.tokens.get(),
            accepted: metrics.drafts.of(true).get(),
            refused: metrics.drafts.of(false).get(),
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            choose: self.choose - before.choose,
            emit: self.emit - before.emit,
            tokens: self.tokens - before.tokens,
            accepted: self.accepted - before.accepted,
            refused: self.refused - before.refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn publish(meter: &mut StepMeter, metrics: &BaseMetrics, planned_at: Duration, ended: Duration) {
        let report = StepReport {
            tokens: 12,
            rows: 5,
            planned_at,
            schedule: ms(1),
            forward: ms(20),
            ..StepReport::default()
        };
        let stats =
            SchedulerStats { running: 2, total_blocks: 9, free_blocks: 3, ..SchedulerStats::default() };
        meter.planned(&report);
        meter.publish((&report, 2), (Instant::now(), ended), stats, metrics);
    }

    #[test]
    fn a_step_is_all_of_the_time_since_the_one_before_and_each_part_once() {
        let metrics = Metrics::new();
        let own = BaseMetrics::new(&metrics);
        let mut meter = StepMeter::new(&metrics);
        meter.turn(ms(1000));
        publish(&mut meter, &own, ms(1004), ms(1026));

        // A turn that found nothing to compute, and one that did: 2 + 10 ms up to the plans, 5 of them for two tokens.
        meter.turn(ms(1030));
        meter.planned(&StepReport { planned_at: ms(1032), ..StepReport::default() });
        meter.turn(ms(1040));
        own.choose.observe(0.002);
        own.choose.observe(0.001);
        own.emit.observe(0.002);
        own.tokens.inc_by(2);
        own.drafts.of(true).inc();
        own.drafts.of(false).inc();
        publish(&mut meter, &own, ms(1050), ms(1074));

        // After a rest, the time without requests is nobody's.
        meter.turn(ms(2000));
        meter.planned(&StepReport { planned_at: ms(2005), ..StepReport::default() });
        meter.rest();
        meter.turn(ms(9000));
        publish(&mut meter, &own, ms(9001), ms(9022));

        let steps = metrics.engines()[0].last(8);
        let [first, second, third] = steps[..] else { panic!("{steps:?}") };
        assert_eq!(first.parts().map(|(_, us)| us / 1000), [0, 0, 1, 4, 1, 20]);
        assert_eq!(second.parts().map(|(_, us)| us / 1000), [12, 3, 5, 7, 1, 20]);
        assert_eq!(second.total_us(), 48_000, "1074 - 1026 ms");
        assert_eq!((third.wait_us, third.exchange_us), (0, 1000));
        assert_eq!((second.prefill_tokens, second.decode_rows, second.draft_rows), (7, 2, 3));
        assert_eq!((second.tokens_chosen, second.drafts_compared, second.drafts_accepted), (2, 2, 1));
        assert_eq!((second.blocks_used, second.blocks, second.running), (6, 9, 2));
    }
}
