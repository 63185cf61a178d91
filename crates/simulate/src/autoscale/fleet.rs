//! The pods of one pool: wanted, starting, serving, leaving, gone.

use std::time::Duration;

use super::hpa::{Behaviour, Hpa, Signal};
use super::{Autoscaling, FleetReport, Values};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Ready,
    /// Told to stop: takes nothing new.
    Leaving,
    Gone,
}

/// What becomes of pods after a look of the autoscaler.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Moves {
    /// Numbers of pods that are started, and of those that are told to stop while they serve.
    pub(crate) started: std::ops::Range<usize>,
    pub(crate) leaving: Vec<usize>,
}

/// One pool. A pod's number is that of its worker, and is never given again.
pub(crate) struct Fleet {
    hpa: Hpa,
    phases: Vec<Phase>,
    looked_at: Duration,
    /// Whether the latest change was growth.
    grew: Option<bool>,
    pub(crate) report: FleetReport,
}

// === impl Behaviour ===

impl Behaviour {
    fn new(values: &Values, least: u32, most: u32) -> Self {
        let Autoscaling { scale_up, scale_down, .. } = &values.autoscaling;
        Self {
            least: least as usize,
            most: most as usize,
            up_window: scale_up.stabilization_seconds.into(),
            up_percent: scale_up.percent.into(),
            up_pods: scale_up.pods as usize,
            up_period: scale_up.period_seconds.into(),
            down_window: scale_down.stabilization_seconds.into(),
            down_period: values.grace().as_secs_f64(),
        }
    }
}

// === impl Fleet ===

impl Fleet {
    /// Begins with the fewest pods, which serve.
    pub(crate) fn new(values: &Values, least: u32, most: u32) -> Self {
        let pods = least as usize;
        Self {
            hpa: Hpa::new(Behaviour::new(values, least, most)),
            phases: vec![Phase::Ready; pods],
            looked_at: Duration::ZERO,
            grew: None,
            report: FleetReport { least: pods, most: pods, ..FleetReport::default() },
        }
    }

    /// Pods that are wanted: those that leave are not.
    pub(crate) fn replicas(&self) -> usize {
        self.numbers(&[Phase::Starting, Phase::Ready]).count()
    }

    pub(crate) fn ready(&self) -> impl Iterator<Item = usize> {
        self.numbers(&[Phase::Ready])
    }

    pub(crate) fn leaving(&self) -> impl Iterator<Item = usize> {
        self.numbers(&[Phase::Leaving])
    }

    /// Pods whose metrics are there to be scraped.
    pub(crate) fn running(&self) -> impl Iterator<Item = usize> {
        self.numbers(&[Phase::Ready, Phase::Leaving])
    }

    fn numbers(&self, wanted: &'static [Phase]) -> impl Iterator<Item = usize> {
        self.phases.iter().enumerate().filter(|(_, phase)| wanted.contains(phase)).map(|(number, _)| number)
    }

    /// A started pod serves, if it is still wanted.
    pub(crate) fn arrived(&mut self, number: usize) {
        if self.phases[number] == Phase::Starting {
            self.phases[number] = Phase::Ready;
        }
    }

    pub(crate) fn gone(&mut self, number: usize) {
        self.phases[number] = Phase::Gone;
    }

    /// Counts the pods that there were since the last look.
    pub(crate) fn book(&mut self, now: Duration) {
        let pods = self.phases.iter().filter(|phase| **phase != Phase::Gone).count();
        self.report.pod_seconds += pods as f64 * (now - self.looked_at).as_secs_f64();
        self.looked_at = now;
    }

    /// A look of the autoscaler. The youngest pods leave first.
    pub(crate) fn look(&mut self, now: Duration, signals: &[Signal]) -> Moves {
        let (current, ready) = (self.replicas(), self.ready().count());
        let next = self.hpa.sync(now.as_secs_f64(), current, ready, signals);
        if next != current {
            self.report.changes += 1;
            self.report.turns += usize::from(self.grew.replace(next > current) == Some(next < current));
            self.report.least = self.report.least.min(next);
            self.report.most = self.report.most.max(next);
        }
        let first = self.phases.len();
        self.phases.extend((current..next).map(|_| Phase::Starting));
        let mut moves = Moves { started: first..self.phases.len(), leaving: Vec::new() };
        for _ in next..current {
            let youngest =
                self.phases.iter().rposition(|phase| matches!(phase, Phase::Starting | Phase::Ready));
            let youngest = youngest.expect("as many as are wanted are there");
            self.phases[youngest] = match self.phases[youngest] {
                Phase::Ready => {
                    moves.leaving.push(youngest);
                    Phase::Leaving
                }
                _ => Phase::Gone,
            };
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_starts_serves_leaves_and_is_counted_until_it_is_gone() {
        let seconds = Duration::from_secs;
        let mut values = Values::chart();
        values.autoscaling.scale_down.stabilization_seconds = 0;
        values.autoscaling.scale_up.stabilization_seconds = 0;
        let mut fleet = Fleet::new(&values, 1, 5);
        let sum = |sum| [Signal::PerPod { sum, target: 1.0 }];
        assert_eq!(fleet.look(seconds(0), &sum(3.0)), Moves { started: 1..3, leaving: vec![] });
        assert_eq!((fleet.replicas(), fleet.ready().count()), (3, 1));
        fleet.book(seconds(10));
        assert_eq!(fleet.report.pod_seconds, 30.0);
        fleet.arrived(1);
        // The youngest has not come yet, and nobody has to drain.
        assert!(fleet.look(seconds(20), &sum(2.0)).leaving.is_empty());
        fleet.arrived(2);
        assert_eq!(fleet.ready().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(fleet.look(seconds(100), &sum(0.0)).leaving, [1]);
        assert_eq!((fleet.replicas(), fleet.running().count()), (1, 2));
        fleet.gone(1);
        assert_eq!(fleet.running().count(), 1);
        assert_eq!((fleet.report.changes, fleet.report.turns, fleet.report.most), (3, 1, 3));
    }
}
