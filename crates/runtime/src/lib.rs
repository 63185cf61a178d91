//! The process shell around every role: telemetry, metrics, admin server, readiness, shutdown and gRPC transport.
//!
//! Nothing here knows what UniARM computes. A role builds its own service and lends this crate the
//! parts that every server process needs in the same way, so that they behave the same everywhere.

pub mod admin;
pub mod crowd;
pub mod drain;
pub mod drive;
pub mod grpc;
pub mod http;
pub mod logits;
pub mod metrics;
pub mod readiness;
pub mod shutdown;
pub mod steps;
pub mod telemetry;
pub mod trace;

mod error;
mod process;
mod wire;

pub use admin::{Admin, AdminOptions};
pub use error::RuntimeError;
pub use metrics::Metrics;
pub use prometheus_client;
pub use readiness::Readiness;
pub use shutdown::Shutdown;
pub use telemetry::{LogFormat, TelemetryGuard, TelemetryOptions};
