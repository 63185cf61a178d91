//! Why a line has no answer, in the words of its output.

use serde::Serialize;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uniarm_proto::refusal;

use crate::fields::LineError;

/// An error as a line of output has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    pub code: &'static str,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
}

// === impl Failure ===

impl From<&Status> for Failure {
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
        let code = match status.code() {
            Code::InvalidArgument => "invalid_argument",
            Code::NotFound => "not_found",
            Code::ResourceExhausted => "resource_exhausted",
            Code::DeadlineExceeded => "deadline_exceeded",
            Code::Unavailable => "unavailable",
            Code::Cancelled => "cancelled",
            Code::Unauthenticated => "unauthenticated",
            Code::PermissionDenied => "permission_denied",
            _ => "internal",
        };
        Self {
            code,
            message: status.message().to_owned(),
            field: violation.map(|violation| violation.field.clone()),
            // The code says it already.
            cause: refusal::cause_of(status).filter(|cause| cause != code),
        }
    }
}

impl From<&LineError> for Failure {
    fn from(error: &LineError) -> Self {
        Self { code: "invalid_argument", message: error.to_string(), field: error.field.clone(), cause: None }
    }
}

impl Failure {
    pub fn http_status(&self) -> u16 {
        match self.code {
            "invalid_argument" => 400,
            "unauthenticated" => 401,
            "permission_denied" => 403,
            "not_found" => 404,
            "resource_exhausted" => 429,
            "unavailable" => 503,
            "deadline_exceeded" => 504,
            _ => 500,
        }
    }

    pub fn as_openai(&self) -> Value {
        let kind = if self.http_status() < 500 { "invalid_request_error" } else { "server_error" };
        json!({
            "error": { "message": self.message, "type": kind, "param": self.field, "code": self.cause.as_deref().unwrap_or(self.code) },
        })
    }
}
