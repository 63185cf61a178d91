//! The whole system in real processes, on real weights.

mod bad_input;
mod clients;
mod demo;
mod exchange;
mod hangup;
mod harness;
mod identical;
mod sessions;
mod telemetry;
