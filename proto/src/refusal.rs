//! The closed set of errors that a client can meet, and the one place that turns them into a gRPC status.

use std::{collections::HashMap, time::Duration};

use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

use crate::ProtocolError;

/// Domain of `google.rpc.ErrorInfo`.
const ERROR_DOMAIN: &str = "uniarm";

/// Cause of a request that asked to fail with its reward (`OnRewardLoss::Fail`): nobody may try it again.
pub const REWARD_LOST: &str = "reward_lost";

/// Cause of a request that was refused before its deadline, because it could not have met it.
pub const DEADLINE_UNMEETABLE: &str = "deadline_unmeetable";

/// Cause of the end of a stream whose client did not read; what it lacks it may ask for again.
pub const CLIENT_STALLED: &str = "client_stalled";

/// Cause of a refusal: the tenant has so many requests under way that the places left are for others.
pub const TENANT_SHARE: &str = "tenant_share";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// A field is wrong; it is named.
    InvalidArgument,
    /// Nobody who is known asks.
    Unauthenticated,
    /// Who asks is known, and may not have this.
    PermissionDenied,
    /// No such model or reward.
    NotFound,
    /// A queue or a pool is full; `retry_after` says when to come back.
    ResourceExhausted,
    /// The deadline passed.
    DeadlineExceeded,
    /// A worker that the request needs cannot be reached.
    Unavailable,
    Cancelled,
    /// A fault of ours.
    Internal,
}

/// Why a request was refused or ended: code, sentence, and what a machine wants to know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub code: Code,
    pub message: String,
    /// Path of the bad field (`sampling.top_p`), where a field is at fault.
    pub field: Option<String>,
    /// Short stable word for the cause (`base_queue_full`), for programs.
    pub cause: &'static str,
    pub retry_after: Option<Duration>,
}

/// What a status says, whoever made it: the way back from a [`Refusal`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// gRPC's code, in its own words: `invalid_argument`.
    pub code: &'static str,
    pub message: String,
    pub field: Option<String>,
    /// The word for programs; none where the peer is not one of ours.
    pub cause: Option<String>,
    pub retry_after: Option<Duration>,
}

/// Where the fault of a failed call lies, and so what may help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The peer cannot be reached, or was lost on the way: another one, or the same after a while.
    Connection,
    /// The peer works and cannot do it now: it is leaving, it is full, or it lacks workers itself.
    Elsewhere,
    /// The request would end like this everywhere.
    Request,
}

// === impl Code ===

impl Code {
    pub fn to_tonic(self) -> tonic::Code {
        match self {
            Self::InvalidArgument => tonic::Code::InvalidArgument,
            Self::Unauthenticated => tonic::Code::Unauthenticated,
            Self::PermissionDenied => tonic::Code::PermissionDenied,
            Self::NotFound => tonic::Code::NotFound,
            Self::ResourceExhausted => tonic::Code::ResourceExhausted,
            Self::DeadlineExceeded => tonic::Code::DeadlineExceeded,
            Self::Unavailable => tonic::Code::Unavailable,
            Self::Cancelled => tonic::Code::Cancelled,
            Self::Internal => tonic::Code::Internal,
        }
    }

    /// Label of metrics.
    pub fn name(self) -> &'static str {
        code_name(self.to_tonic())
    }
}

// === impl Refusal ===

impl Refusal {
    fn new(code: Code, cause: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: None, cause, retry_after: None }
    }

    pub fn invalid(field: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        let field = field.into();
        let mut refusal = Self::new(Code::InvalidArgument, "invalid_argument", format!("{field}: {reason}"));
        refusal.field = Some(field);
        refusal
    }

    /// Of what is no request at all, so that no field can be named.
    pub fn unreadable(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, "invalid_argument", message)
    }

    pub fn not_found(field: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self { code: Code::NotFound, cause: "not_found", ..Self::invalid(field, reason) }
    }

    pub fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(Code::Unauthenticated, "unauthenticated", message)
    }

    /// Of a field whose value whoever asks may not have.
    pub fn denied(field: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self { code: Code::PermissionDenied, cause: "permission_denied", ..Self::invalid(field, reason) }
    }

    pub fn exhausted(cause: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(Code::ResourceExhausted, cause, message) }
    }

    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(Code::DeadlineExceeded, "deadline_exceeded", message)
    }

    /// Refused at once: computing what comes too late takes the machine from what does not.
    pub fn unmeetable(message: impl Into<String>) -> Self {
        Self::new(Code::DeadlineExceeded, DEADLINE_UNMEETABLE, message)
    }

    pub fn unavailable(cause: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, cause, message)
    }

    /// Of a process that is leaving: whatever it was doing goes on elsewhere.
    pub fn draining() -> Self {
        Self::unavailable("draining", "this process is leaving, and takes no more work")
    }

    /// Of a client that did not read its answer.
    pub fn client_stalled() -> Self {
        Self::unavailable(
            CLIENT_STALLED,
            "the client did not read its answer, and the answer was not kept: ask again with what came as `resume`",
        )
    }

    pub fn cancelled(message: impl Into<String>) -> Self {
        Self::new(Code::Cancelled, "cancelled", message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, "internal", message)
    }
}

impl From<ProtocolError> for Refusal {
    fn from(error: ProtocolError) -> Self {
        let mut refusal = Self::new(Code::InvalidArgument, "invalid_argument", error.to_string());
        refusal.field = Some(error.field().to_owned());
        refusal
    }
}

// === impl Refused ===

impl From<&Status> for Refused {
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
        Self {
            code: code_name(status.code()),
            message: status.message().to_owned(),
            field: violation.map(|violation| violation.field.clone()),
            cause: details.error_info().map(|info| info.reason.clone()),
            retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
        }
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, message, field, cause, retry_after } = refusal;
        Self { code: code.name(), message, field, cause: Some(cause.to_owned()), retry_after }
    }
}

/// A gRPC status by its name in JSON and in metrics.
pub fn code_name(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::Ok => "ok",
        tonic::Code::Cancelled => "cancelled",
        tonic::Code::Unknown => "unknown",
        tonic::Code::InvalidArgument => "invalid_argument",
        tonic::Code::DeadlineExceeded => "deadline_exceeded",
        tonic::Code::NotFound => "not_found",
        tonic::Code::AlreadyExists => "already_exists",
        tonic::Code::PermissionDenied => "permission_denied",
        tonic::Code::ResourceExhausted => "resource_exhausted",
        tonic::Code::FailedPrecondition => "failed_precondition",
        tonic::Code::Aborted => "aborted",
        tonic::Code::OutOfRange => "out_of_range",
        tonic::Code::Unimplemented => "unimplemented",
        tonic::Code::Internal => "internal",
        tonic::Code::Unavailable => "unavailable",
        tonic::Code::DataLoss => "data_loss",
        tonic::Code::Unauthenticated => "unauthenticated",
    }
}

// === impl Fault ===

impl Fault {
    pub fn of(status: &Status) -> Self {
        // What a peer says travels as a status alone; one with a source was made on this side, of a broken connection.
        if std::error::Error::source(status).is_some() {
            return Self::Connection;
        }
        match status.code() {
            tonic::Code::Unavailable if cause_of(status).as_deref() == Some(REWARD_LOST) => Self::Request,
            tonic::Code::Unavailable | tonic::Code::ResourceExhausted => Self::Elsewhere,
            _ => Self::Request,
        }
    }
}

/// The word for programs, of a status that carries one.
pub fn cause_of(status: &Status) -> Option<String> {
    status.get_error_details().error_info().map(|info| info.reason.clone())
}

/// The standard details, so that any gRPC client can read them: BadRequest, RetryInfo, ErrorInfo.
impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(refusal.cause, ERROR_DOMAIN, HashMap::new());
        if let Some(field) = &refusal.field {
            details.add_bad_request_violation(field, &refusal.message);
        }
        if let Some(delay) = refusal.retry_after {
            details.set_retry_info(Some(delay));
        }
        Status::with_error_details(refusal.code.to_tonic(), refusal.message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fault_says_whether_another_worker_may_help() {
        let of = |refusal: Refusal| Fault::of(&refusal.into());
        assert_eq!(of(Refusal::unavailable("draining", "leaving")), Fault::Elsewhere);
        assert_eq!(of(Refusal::exhausted("base_queue_full", "full", Duration::ZERO)), Fault::Elsewhere);
        assert_eq!(of(Refusal::unavailable(REWARD_LOST, "as the request asks")), Fault::Request);
        assert_eq!(of(Refusal::invalid("n", "is 0")), Fault::Request);
        assert_eq!(of(Refusal::unmeetable("a place is free in 9 s")), Fault::Request);
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert_eq!(Fault::of(&Status::from_error(Box::new(broken))), Fault::Connection);
    }

    #[test]
    fn a_status_carries_field_cause_and_retry_delay() {
        let refusal = Refusal::invalid("sampling.top_p", "is 2");
        let status = Status::from(refusal.clone());
        assert_eq!(Refused::from(&status), Refused::from(refusal), "the way there and back");
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "sampling.top_p");

        let full = Refusal::exhausted("base_queue_full", "queue is full", Duration::from_millis(250));
        let details = Status::from(full).get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "base_queue_full");
        assert_eq!(details.retry_info().unwrap().retry_delay, Some(Duration::from_millis(250)));
    }
}
