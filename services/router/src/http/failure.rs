//! A failure as HTTP's answer.

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use serde_json::Value;
use tonic::Status;
use uniarm_openai::Names;
use uniarm_proto::{Refusal, Refused};

/// What OpenAI's clients obey before their own rules.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// As `Retry-After`, which has whole seconds only; OpenAI's clients prefer it.
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// An error as a client reads it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure(uniarm_openai::Failure);

// === impl Failure ===

impl Failure {
    /// Of the door itself: no request came of it.
    pub(super) fn at_the_door(status: StatusCode, cause: &str, message: impl Into<String>) -> Self {
        Self(uniarm_openai::Failure::at_the_door(status.as_u16(), cause, message))
    }

    /// Of a body that was not of the right form: its fields are named already as the client named them.
    pub(super) fn of_body(refusal: Refusal) -> Self {
        Self(Refused::from(refusal).into())
    }

    /// Of a request under way: its fields get the names that the body had for them.
    pub(super) fn of_request(status: &Status, names: &Names) -> Self {
        Self(uniarm_openai::Failure::of_request(Refused::from(status), names))
    }

    pub(super) fn body(&self) -> Value {
        self.0.body()
    }
}

/// Of whoever speaks OpenAI's words itself.
impl From<uniarm_openai::Failure> for Failure {
    fn from(failure: uniarm_openai::Failure) -> Self {
        Self(failure)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response<Body> {
        let body = [(header::CONTENT_TYPE, "application/json")];
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, body, self.body().to_string()).into_response();
        let headers = response.headers_mut();
        if let Some(delay) = self.0.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(delay.as_millis().div_ceil(1000) as u64));
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(delay.as_millis() as u64));
        }
        if self.0.is_final() {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_full_queue_says_when_to_come_back_and_a_passed_deadline_that_it_is_no_use() {
        let status = |refusal: Refusal| Failure::of_body(refusal).into_response();
        let full = status(Refusal::exhausted("base_queue_full", "full", Duration::from_millis(1500)));
        assert_eq!(full.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(
            (&full.headers()["retry-after"], &full.headers()["retry-after-ms"]),
            (&HeaderValue::from(2), &HeaderValue::from(1500))
        );
        let late = status(Refusal::deadline("too late"));
        assert_eq!(late.status(), StatusCode::GATEWAY_TIMEOUT);
        assert_eq!(late.headers()["x-should-retry"], "false");
    }
}
