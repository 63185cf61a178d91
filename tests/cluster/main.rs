//! The whole system in real processes, on real weights.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

mod bad_input;
mod clients;
mod demo;
mod exchange;
mod hangup;
mod harness;
mod identical;
mod sessions;
mod telemetry;
