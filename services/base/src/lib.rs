//! The base worker: the only place where a token is chosen.
//!
//! `handle` (starts an engine) → `accept` (a placed request becomes tokens and settings) → `engine` (one OS thread owns the model) → `guide` (standing
//! streams to the reward workers; `store_scorer`: to whom; `lane`: whole rows from GPU to GPU beside one) → `pacing` (how far they run ahead) → `choice` (one answer: its rows, its terms, its
//! next token) → `outlet` (bounded
//! events to the client) → `server` (the gRPC edge).

mod accept;
mod choice;
mod engine;
pub mod guide;
mod handle;
mod lane;
mod metrics;
mod outlet;
mod pacing;
mod request;
pub mod server;
mod steps;
mod store_scorer;
mod term;

pub use accept::BaseSettings;

pub use guide::{GrpcScorer, LinkError, LinkStream, Scorer};
pub use handle::{BaseEngine, BaseHandle, BaseOptions, StartError};
pub use lane::Lanes;
pub use pacing::{DraftRows, DraftWindow, PaceOptions};
pub use store_scorer::StoreScorer;
