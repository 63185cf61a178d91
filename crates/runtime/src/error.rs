//! Why a process could not be set up: the caller prints it and exits, there is nothing to retry.

use std::net::SocketAddr;

use thiserror::Error;

#[derive(Debug, Error)]
pub enum RuntimeError {
    #[error("cannot listen on {address}: {source}")]
    Bind { address: String, source: std::io::Error },

    #[error("the gRPC server on {address} failed: {source}")]
    Serve { address: SocketAddr, source: tonic::transport::Error },

    #[error("the descriptor set for gRPC reflection is malformed: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),

    #[error("log filter {filter:?}: {reason}")]
    LogFilter { filter: String, reason: String },

    #[error("cannot export traces to {endpoint}: {reason}")]
    Exporter { endpoint: String, reason: String },

    #[error("a tracing subscriber is already installed in this process")]
    SubscriberInstalled,

    #[error("cannot start the {name} thread: {source}")]
    Thread { name: &'static str, source: std::io::Error },

    #[error("cannot listen for termination signals: {0}")]
    Signals(std::io::Error),
}
