//! The reward worker: sessions from many base workers, any mixture of preferences in one batch, answered with
//! top-k lists or whole rows.
//!
//! `catalogue` (what is served; `adapters` changes it as the store's list does) → `prepare` (an Open becomes tokens and an
//! adapter state) → `session` (its rows and drafts) → `engine` (one OS thread owns the model) → `handle` (its inbox) →
//! `server` (the gRPC stream) or `local` (the same sessions inside one process). Beside a gRPC stream there may be a `lane`, for whole rows
//! from GPU to GPU.

pub mod adapters;
pub mod catalogue;
mod engine;
mod handle;
mod lane;
pub mod local;
mod metrics;
mod prepare;
pub mod server;
mod session;
mod steps;

pub use adapters::AdapterFollower;
pub use catalogue::{Backbone, CatalogueError, RewardCatalogue};
pub use handle::{Connection, IncomingOp, RewardEngine, RewardHandle, RewardOptions, StartError};
