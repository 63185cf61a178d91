//! Preference pairs to adapters to Pareto fronts: training, oracles, labelling, evaluation.
//!
//! Modules stand in the order in which data flows: pairs, the loss that they define, the network that it trains, the
//! oracles that judge answers, what a front of scores is worth; and the jobs that ask a cluster for answers.

// Blank lines keep the modules in reading order: rustfmt sorts neighbours.
pub mod pairs;

pub mod loss;
pub mod network;

pub mod train;

pub mod soup;

pub mod oracle;
pub mod scoring;

pub mod metrics;

pub mod prompts;

pub mod cluster_job;

pub mod label;

pub mod evaluate;

pub mod report;

mod whole_file;
