//! Preference pairs to adapters to Pareto fronts: training, oracles, labelling, evaluation.
//!
//! Modules stand in the order in which data flows: pairs, the loss that they define, the network that it trains,
//! the oracles that judge answers, and what a front of scores is worth.

// Blank lines keep the modules in reading order: rustfmt sorts neighbours.
pub mod pairs;

pub mod cluster_job;
pub mod loss;
pub mod network;

pub mod train;

pub mod soup;

pub mod report;

pub mod oracle;

pub mod metrics;

mod whole_file;
