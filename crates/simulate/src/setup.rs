//! A cluster to simulate: pools, limits, links, and how requests are guided.

use std::sync::Arc;

use uniarm_decode::SchedulerOptions;
use uniarm_decode::drafting::{DraftMode, Pace};

use crate::cost::Cost;
use crate::hardware::Link;

/// Everything that a simulation depends on besides its trace.
#[derive(Clone, Debug)]
pub struct Setup {
    pub base: Pool,
    pub reward: Pool,
    /// Base worker i and reward worker i share a machine, and take bandwidth from each other while both step.
    pub colocated: bool,
    /// Requests that a base worker holds at once.
    pub base_requests_max: usize,
    pub routers: usize,
    /// Requests that a router relays at once.
    pub router_requests_max: usize,
    /// Between client, router and base worker.
    pub front: Link,
    /// Between base and reward workers.
    pub exchange_link: Link,
    pub exchange: Exchange,
    /// Tokens that a reward model reads before the prompt: its system text.
    pub system_tokens: usize,
    pub drafting: Drafting,
    pub seed: u64,
}

/// Workers that are all alike.
#[derive(Clone, Debug)]
pub struct Pool {
    pub workers: usize,
    pub cost: Arc<Cost>,
    /// What each one's scheduler is made with.
    pub scheduler: SchedulerOptions,
}

/// How reward logits travel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// Length of the lists; 0: whole rows.
    pub list_length: usize,
    /// Share of tokens that a list certifies; the others need a second round trip.
    pub certified: f64,
}

/// How the reward workers draft.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drafting {
    pub policy: DraftPolicy,
    /// Share of drafts that are right, made from the reward's own logits.
    pub single: f64,
    /// The same with a second row for the plain backbone; `None` where it cannot stand in for the base model.
    pub dual: Option<f64>,
}

/// Who says how far the reward workers run ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftPolicy {
    /// Always the same pace; [`Pace::OFF`] for lock-step.
    Fixed(Pace),
    /// [`uniarm_decode::drafting::plan_pace`] over the costs that the workers measure.
    Measured,
}

// === impl Pool ===

impl Pool {
    /// Workers with as much cache as `cost` says they have, but not more than `tokens_max` in each of the running
    /// sequences could ever use: thousands of workers have their block tables in one process here.
    pub fn new(workers: usize, cost: Arc<Cost>, limits: SchedulerOptions, tokens_max: usize) -> Self {
        let usable = limits.running_max.saturating_mul(tokens_max + limits.block_tokens);
        let blocks = cost.kv_tokens().min(usable).div_ceil(limits.block_tokens);
        Self { workers, cost, scheduler: SchedulerOptions { blocks, ..limits } }
    }
}

// === impl Drafting ===

impl Drafting {
    pub const OFF: Self = Self { policy: DraftPolicy::Fixed(Pace::OFF), single: 0.0, dual: None };

    pub(crate) fn acceptance(&self, mode: DraftMode) -> f64 {
        match mode {
            DraftMode::Off => 0.0,
            DraftMode::Single => self.single,
            DraftMode::Dual => self.dual.unwrap_or(self.single),
        }
    }
}
