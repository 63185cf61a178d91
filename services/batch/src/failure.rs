//! Why a line has no answer, in the words of its output.

use serde::Serialize;
use uniarm_proto::Refused;

/// An error as a short line of output has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure<'a> {
    pub code: &'a str,
    pub message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'a str>,
}

// === impl Failure ===

impl<'a> From<&'a Refused> for Failure<'a> {
    fn from(refused: &'a Refused) -> Self {
        Self {
            code: refused.code,
            message: &refused.message,
            field: refused.field.as_deref(),
            // The code says it already.
            cause: refused.cause.as_deref().filter(|cause| *cause != refused.code),
        }
    }
}
