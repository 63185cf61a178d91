//! Real processes are killed, hung, cut off, overloaded and left by their clients, and no stream may differ from its
//! undisturbed run.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where
#![allow(clippy::await_holding_lock)] // tests take turns on the machine, each on a runtime of its own

#[allow(dead_code)] // the cluster tests use more of it
#[path = "../cluster/harness.rs"]
mod harness;

mod batch;
mod fleet;
mod held;
mod load;
mod network;
mod outage;
mod overload;
mod partition;
mod reward;
mod storm;
mod trio;
mod vanish;
mod weather;
