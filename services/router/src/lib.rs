//! The router: admits, places and relays. It cannot choose a token: it depends on neither models nor decoding.
//!
//! `server` (the front door) → `place` (pure: which base worker, which reward workers; `resolve`: which reward models are
//! meant) → `relay` (one request over its
//! attempts), which asks `recovery` (pure: what to do after a loss) and `circuit` (pure: who is left alone for a while);
//! `http` (the same front door in OpenAI's terms, and the playground), `tenants` (who may ask, and for what), `audit` (records of requests), `peers` (a cluster without a store) and `report`
//! (what operators see) beside them.

pub mod audit;
mod circuit;
mod http;
mod load;
mod metrics;
pub mod peers;
pub mod place;
mod recovery;
mod relay;
mod report;
pub mod resolve;
pub mod server;
mod stall;
pub mod tenants;

pub use http::{FrontOptions, Origin};
pub use load::{LoadGuard, LoadTable};
pub use recovery::ATTEMPTS_MAX;
pub use relay::members_of;
pub use server::{RouterOptions, RouterService};
