//! How a base worker sets the pace of its drafts: the real policy over what it and the reward workers measure.

use std::collections::HashMap;
use std::time::Duration;

use uniarm_decode::drafting::{Acceptance, DraftMode, Pace, Situation, plan_pace};

use crate::setup::{DraftPolicy, Setup};
use crate::stepper::Stepper;
use crate::world::{Drafted, Load};

/// One base worker's knowledge of the reward workers, and the paces that follow from it.
pub(crate) struct Paces {
    policy: DraftPolicy,
    single: Acceptance,
    dual: Option<Acceptance>,
    round_trip: Duration,
    loads: HashMap<usize, Load>,
}

// === impl Paces ===

impl Paces {
    /// What drafts are worth is believed to be what it is, so that a run need not begin with learning it.
    pub(crate) fn new(setup: &Setup) -> Self {
        let drafting = &setup.drafting;
        Self {
            policy: drafting.policy,
            single: Acceptance::new(drafting.single),
            dual: drafting.dual.map(Acceptance::new),
            round_trip: 2 * setup.exchange_link.latency,
            loads: HashMap::new(),
        }
    }

    pub(crate) fn hear(&mut self, reward: usize, load: Load) {
        self.loads.insert(reward, load);
    }

    pub(crate) fn load(&self, reward: usize) -> Option<&Load> {
        self.loads.get(&reward)
    }

    /// A draft was held against the chosen token.
    pub(crate) fn observe(&mut self, drafted: Drafted) {
        match (drafted.mode, &mut self.dual) {
            (DraftMode::Dual, Some(dual)) => dual.observe(drafted.right),
            _ => self.single.observe(drafted.right),
        }
    }

    /// The pace for a session on a reward worker; lock-step until that one has said what its steps cost.
    pub(crate) fn of(&self, reward: usize, stepper: &Stepper) -> Pace {
        if let DraftPolicy::Fixed(pace) = self.policy {
            return pace;
        }
        let Some(load) = self.loads.get(&reward) else { return Pace::OFF };
        plan_pace(&Situation {
            base: stepper.meter.cost(),
            reward: load.cost.clone(),
            base_sequences: stepper.scheduler.stats().running.max(1) as f64,
            reward_sessions: load.sessions.max(1.0),
            round_trip: self.round_trip.as_secs_f64(),
            single: self.single.share(),
            dual: self.dual.map(|dual| dual.share()),
        })
    }
}
