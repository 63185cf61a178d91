//! A cluster of UniARM in virtual time.
//!
//! Placement is the router's own function, planning is the scheduler that every worker runs; only the models, the
//! networks and the clock are made up. A thousand workers of each pool run through thousands of requests in less time
//! than those would take on one of them, and the same arguments give the same report to the last bit.
//!
//! In reading order: what arrives ([`trace`], [`arrivals`]), what computes and connects ([`hardware`],
//! [`mod@architecture`], [`cost`], [`observed`]), the cluster ([`setup`]), the run ([`simulate`]), and what came of it ([`report`]);
//! [`search`] asks how many workers a load needs, [`autoscale`] how pools follow a load that changes.

pub mod dice;

pub mod trace;

pub mod arrivals;

pub mod hardware;

pub mod architecture;

pub mod cost;

pub mod observed;

pub mod setup;

mod queue;
mod stepper;
mod world;

mod front;

mod pace;

mod base;

mod reward;

pub mod autoscale;

mod simulation;

mod scaled;

pub mod report;

pub mod search;

pub use autoscale::{Autoscale, Day, Values};
pub use report::{PoolReport, Quantiles, Report, Targets};
pub use scaled::simulate_scaled;
pub use setup::{DraftPolicy, Drafting, Exchange, Pool, Setup};
pub use simulation::simulate;
pub use trace::Arrival;
