//! What can go wrong with the store, classified once: worth another try, or not.

use thiserror::Error;
use uniarm_proto::{Generation, MemberId};

/// gRPC status codes that another try will not change. Everything else that etcd answers, among
/// it `Unknown` and `Cancelled` while a leader is lost, is temporary.
const TERMINAL_CODES: [i32; 5] = [
    3,  // InvalidArgument: among others, a user without a name
    7,  // PermissionDenied
    9,  // FailedPrecondition: among others, authentication is not enabled
    12, // Unimplemented: not an etcd
    16, // Unauthenticated, after the client has refreshed its token
];

#[derive(Debug, Clone, Error)]
pub enum StoreError {
    /// A live member has this id. A process that was killed holds its id until its lease ends.
    #[error("{id} is already registered, as generation {generation}")]
    AlreadyRegistered { id: MemberId, generation: Generation },

    #[error("the member's record is invalid: {0}")]
    InvalidMember(String),

    #[error("the adapter's record is invalid: {0}")]
    InvalidAdapter(String),

    #[error("the catalogue has no adapter named {name:?}")]
    UnknownAdapter { name: String },

    #[error("store address {address:?}: {reason}")]
    Address { address: String, reason: String },

    /// The store cannot be reached or cannot answer now.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),

    /// The store refuses this client: credentials, permissions, certificates.
    #[error("the store refuses: {0}")]
    Refused(String),

    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether the same call may succeed later without anyone doing anything.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

impl From<etcd_client::Error> for StoreError {
    fn from(error: etcd_client::Error) -> Self {
        use etcd_client::Error;
        match error {
            Error::GRpcStatus(status) if TERMINAL_CODES.contains(&(status.code() as i32)) => {
                Self::Refused(status.message().to_owned())
            }
            Error::InvalidArgs(_)
            | Error::InvalidUri(_)
            | Error::InvalidMetadataValue(_)
            | Error::EndpointsNotManaged => Self::Refused(error.to_string()),
            Error::GRpcStatus(status) => Self::Unavailable(status.message().to_owned()),
            other => Self::Unavailable(other.to_string()),
        }
    }
}
