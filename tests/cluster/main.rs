//! The whole system in real processes, on real weights.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where
#![allow(clippy::await_holding_lock)] // tests take turns on the machine, each on a runtime of its own

mod adapters;
mod attacks;
mod audit;
mod bad_input;
mod batches;
mod bench;
mod clients;
mod demo;
mod doctor;
mod exchange;
mod fairness;
mod gpu;
mod hangup;
#[allow(dead_code)] // the fault tests use more of it
mod harness;
mod hosted;
mod http;
mod identical;
mod jobs;
mod oidc;
mod resume;
mod sessions;
mod shards;
mod stall;
mod telemetry;
mod tenants;
mod tls;
mod unread;
