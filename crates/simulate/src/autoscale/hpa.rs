//! Kubernetes' HorizontalPodAutoscaler (autoscaling/v2): how many pods a metric asks for, what the behaviour makes of it.
//!
//! Written after the Kubernetes documentation ("Horizontal Pod Autoscaling", algorithm details and configurable scaling
//! behaviour). KEDA makes such an autoscaler of a ScaledObject and feeds it, so that this is its algorithm too.

/// A ratio this near to 1 changes nothing (`--horizontal-pod-autoscaler-tolerance`).
const TOLERANCE: f64 = 0.1;

/// Less than the thousandths that Kubernetes counts in: what is a whole number but for rounding stays one.
const ROUNDING: f64 = 1e-6;

/// What a metric says, and what it should say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Signal {
    /// `AverageValue`: the sum over the pool, and what one pod should have of it.
    PerPod { sum: f64, target: f64 },
    /// `Value`: the same number whatever the pool's size; too high by half wants half as many pods again.
    Whole { value: f64, target: f64 },
}

/// The behaviour of one pool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Behaviour {
    pub(crate) least: usize,
    pub(crate) most: usize,
    pub(crate) up_window: f64,
    pub(crate) up_percent: f64,
    pub(crate) up_pods: usize,
    pub(crate) up_period: f64,
    pub(crate) down_window: f64,
    /// One pod in each.
    pub(crate) down_period: f64,
}

/// One pool's autoscaler. Times are seconds.
pub(crate) struct Hpa {
    behaviour: Behaviour,
    /// What the metrics asked for, and when.
    wanted: Vec<(f64, usize)>,
    /// What the pool grew or shrank by, and when.
    changes: Vec<(f64, isize)>,
}

// === impl Signal ===

impl Signal {
    fn pods(self, current: usize, ready: usize) -> usize {
        let near = |ratio: f64| (ratio - 1.0).abs() <= TOLERANCE;
        let pods = match self {
            Self::PerPod { sum, target } if near(sum / (target * current as f64)) => return current,
            Self::PerPod { sum, target } => sum / target,
            Self::Whole { value, target } if near(value / target) => return current,
            Self::Whole { value, target } => value / target * ready as f64,
        };
        (pods - ROUNDING).ceil().max(0.0) as usize
    }
}

// === impl Hpa ===

impl Hpa {
    pub(crate) fn new(behaviour: Behaviour) -> Self {
        // A new autoscaler takes the present size for what was wanted so far.
        Self { behaviour, wanted: vec![(0.0, behaviour.least)], changes: Vec::new() }
    }

    /// One look: how many pods there should be now. `ready` of the `current` ones serve.
    pub(crate) fn sync(&mut self, now: f64, current: usize, ready: usize, signals: &[Signal]) -> usize {
        let Some(wanted) = signals.iter().map(|signal| signal.pods(current, ready)).max() else {
            return current;
        };
        let settled = self.settle(now, current, wanted);
        let next = self.limit(now, current, settled);
        if next != current {
            self.changes.push((now, next as isize - current as isize));
        }
        next
    }

    /// Grows to the least, shrinks to the most that was wanted within the window.
    fn settle(&mut self, now: f64, current: usize, wanted: usize) -> usize {
        let Behaviour { up_window, down_window, .. } = self.behaviour;
        self.wanted.retain(|(at, _)| now - at < up_window.max(down_window));
        let within =
            |window: f64| self.wanted.iter().filter(move |(at, _)| now - at < window).map(|(_, pods)| *pods);
        let least = within(up_window).fold(wanted, usize::min);
        let most = within(down_window).fold(wanted, usize::max);
        self.wanted.push((now, wanted));
        current.max(least).min(most)
    }

    /// What the policies and the bounds allow of a change.
    fn limit(&self, now: f64, current: usize, wanted: usize) -> usize {
        let Behaviour { least, most, up_percent, up_pods, up_period, down_period, .. } = self.behaviour;
        let before = |period: f64| {
            let changed: isize =
                self.changes.iter().filter(|(at, _)| now - at < period).map(|(_, change)| change).sum();
            current as isize - changed
        };
        match wanted.cmp(&current) {
            std::cmp::Ordering::Greater => {
                let start = before(up_period).max(0) as usize;
                let grown = (start as f64 * (1.0 + up_percent / 100.0) - ROUNDING).ceil() as usize;
                wanted.min(grown.max(start + up_pods).max(current)).min(most)
            }
            std::cmp::Ordering::Less => {
                let lowest = (before(down_period) - 1).clamp(0, current as isize) as usize;
                wanted.max(lowest).max(least)
            }
            std::cmp::Ordering::Equal => current,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEHAVIOUR: Behaviour = Behaviour {
        least: 1,
        most: 20,
        up_window: 0.0,
        up_percent: 100.0,
        up_pods: 4,
        up_period: 60.0,
        down_window: 300.0,
        down_period: 70.0,
    };

    fn per_pod(sum: f64) -> [Signal; 1] {
        [Signal::PerPod { sum, target: 0.5 }]
    }

    #[test]
    fn a_metric_asks_for_as_many_pods_as_the_documentation_says() {
        // "If the current metric value is 200m, and the desired value is 100m, the number of replicas will be doubled",
        // "50m … halved", and nothing within a tenth.
        let whole = |value: f64| Signal::Whole { value, target: 0.1 }.pods(4, 4);
        assert_eq!([0.2, 0.05, 0.109, 0.091, 0.112].map(whole), [8, 2, 4, 4, 5]);
        // Pods that are not ready do not count: what they are there for is not yet in the metric.
        assert_eq!(Signal::Whole { value: 0.2, target: 0.1 }.pods(4, 2), 4);
        assert_eq!([2.0, 2.19, 2.21, 1.1, 0.0].map(|sum| per_pod(sum)[0].pods(4, 4)), [4, 4, 5, 3, 0]);
        assert_eq!(Signal::PerPod { sum: 0.6 * 7.0, target: 0.6 }.pods(2, 2), 7);
    }

    #[test]
    fn the_largest_of_several_metrics_counts() {
        let mut hpa = Hpa::new(BEHAVIOUR);
        let signals = [per_pod(0.4)[0], Signal::Whole { value: 0.9, target: 0.3 }];
        assert_eq!(hpa.sync(0.0, 2, 2, &signals), 6);
        assert_eq!(Hpa::new(BEHAVIOUR).sync(0.0, 2, 2, &[]), 2);
    }

    #[test]
    fn a_pool_grows_by_its_policy_in_each_period() {
        let mut hpa = Hpa::new(BEHAVIOUR);
        let (mut pods, mut sizes) = (1, Vec::new());
        for look in 0..10 {
            pods = hpa.sync(15.0 * f64::from(look), pods, pods, &per_pod(100.0));
            sizes.push(pods);
        }
        assert_eq!(sizes, [5, 5, 5, 5, 10, 10, 10, 10, 20, 20]);
    }

    #[test]
    fn a_pool_shrinks_by_one_at_a_time_after_the_window() {
        let mut hpa = Hpa::new(BEHAVIOUR);
        assert_eq!(hpa.sync(0.0, 4, 4, &per_pod(2.0)), 4);
        let (mut pods, mut left_at) = (4, Vec::new());
        for look in 1..60 {
            let now = 15.0 * f64::from(look);
            let next = hpa.sync(now, pods, pods, &per_pod(0.2));
            assert!(next == pods || next + 1 == pods);
            if next < pods {
                left_at.push(now);
            }
            pods = next;
        }
        assert_eq!((pods, left_at), (1, vec![300.0, 375.0, 450.0]));
    }

    #[test]
    fn what_goes_up_and_down_within_the_window_stays_up() {
        let mut hpa = Hpa::new(BEHAVIOUR);
        let mut pods = 4;
        for look in 0..100 {
            let sum = if look % 10 == 0 { 2.0 } else { 1.0 };
            pods = hpa.sync(15.0 * f64::from(look), pods, pods, &per_pod(sum));
            assert_eq!(pods, 4);
        }
        let mut nervous = Hpa::new(Behaviour { down_window: 0.0, ..BEHAVIOUR });
        let sizes: Vec<_> = (0..20)
            .scan(4, |pods, look| {
                let sum = if look % 10 == 0 { 2.0 } else { 1.0 };
                *pods = nervous.sync(15.0 * f64::from(look), *pods, *pods, &per_pod(sum));
                Some(*pods)
            })
            .collect();
        assert!(sizes.contains(&2) && sizes[10] == 4, "{sizes:?}");
    }
}
