//! The gRPC server as every role uses it; how clients dial it is in `uniarm_proto::client`.

mod connection;
mod server;

pub use server::{GrpcOptions, GrpcServer};
