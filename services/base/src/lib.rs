//! The base worker: the only place where a token is chosen.
//!
//! `accept` (a placed request becomes tokens and settings) → `engine` (one OS thread owns the model) → `guide` (standing
//! streams to the reward workers) → `choice` (one answer: its rows, its terms, its next token) → `outlet` (bounded
//! events to the client) → `server` (the gRPC edge).

mod accept;
mod choice;
pub mod engine;
pub mod guide;
mod metrics;
mod outlet;
pub mod server;
mod term;

pub use accept::BaseSettings;
pub use engine::{BaseEngine, BaseHandle, BaseOptions};
pub use guide::{GrpcScorer, LinkError, LinkStream, Scorer};
