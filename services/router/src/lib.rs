//! The router: admits, places and relays. It cannot choose a token: it depends on neither models nor decoding.
//!
//! `server` (the front door) → `place` (pure: which base worker, which reward workers) → `relay` (one request over its
//! attempts) with `peers` (a cluster without a store) beside them.

mod load;
mod metrics;
pub mod peers;
pub mod place;
mod relay;
pub mod server;

pub use load::{LoadGuard, LoadTable};
pub use relay::{ATTEMPTS_MAX, members_of};
pub use server::{RouterOptions, RouterService};
