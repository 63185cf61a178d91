//! What went wrong, in OpenAI's shape: the one place that turns a status into HTTP's.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uniarm_proto::{Refusal, refusal::REWARD_LOST};

use super::ask::Names;

/// What OpenAI's clients obey before their own rules.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// As `Retry-After`, which has whole seconds only; OpenAI's clients prefer it.
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// An error as a client reads it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    message: String,
    /// The field that was wrong, as the body names it.
    param: Option<String>,
    /// The word for programs, such as `base_queue_full`.
    cause: String,
    retry_after: Option<Duration>,
}

// === impl Failure ===

impl Failure {
    /// Of the door itself: no request came of it.
    pub(super) fn at_the_door(status: StatusCode, cause: &str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, cause: cause.to_owned(), retry_after: None }
    }

    /// Of a body that was not of the right form: its fields are named already as the client named them.
    pub(super) fn of_body(refusal: Refusal) -> Self {
        Self::of_status(&refusal.into(), None)
    }

    /// Of a request under way: its fields get the names that the body had for them.
    pub(super) fn of_request(status: &Status, names: &Names) -> Self {
        Self::of_status(status, Some(names))
    }

    fn of_status(status: &Status, names: Option<&Names>) -> Self {
        let details = status.get_error_details();
        let field = details.bad_request().and_then(|bad| bad.field_violations.first());
        let field = field.map(|violation| violation.field.clone());
        let param = match (&field, names) {
            (Some(field), Some(names)) => Some(names.of_field(field)),
            (field, _) => field.clone(),
        };
        let message = match (&field, &param) {
            (Some(field), Some(param)) => match status.message().strip_prefix(field.as_str()) {
                Some(rest) => format!("{param}{rest}"),
                None => status.message().to_owned(),
            },
            _ => status.message().to_owned(),
        };
        let cause = details.error_info().map(|info| info.reason.clone());
        Self {
            status: http_status(status.code()),
            message,
            param,
            cause: cause.unwrap_or_else(|| format!("{:?}", status.code()).to_lowercase()),
            retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
        }
    }

    /// The body, which a stream that has begun sends as its last event.
    pub(super) fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        json!({
            "error": { "message": self.message, "type": kind, "param": self.param, "code": self.cause }
        })
    }

    /// Whether the same request may fare better: a deadline that has passed, and a reward whose loss was to be
    /// fatal, have been answered as asked.
    fn is_final(&self) -> bool {
        self.status == StatusCode::GATEWAY_TIMEOUT || self.cause == REWARD_LOST
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response<Body> {
        let body = [(header::CONTENT_TYPE, "application/json")];
        let mut response = (self.status, body, self.body().to_string()).into_response();
        let headers = response.headers_mut();
        if let Some(delay) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(delay.as_millis().div_ceil(1000) as u64));
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(delay.as_millis() as u64));
        }
        if self.is_final() {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

fn http_status(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unavailable | Code::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::ask::{Ask, Call};

    fn names(body: &str) -> Names {
        Ask::read(Call::Chat, body.as_bytes(), "r").unwrap().form.names
    }

    #[test]
    fn a_field_gets_the_name_that_the_body_had_for_it() {
        let single = names(r#"{"messages": [], "max_completion_tokens": 5, "guidance": {"strength": 1}}"#);
        let listed = names(r#"{"messages": [], "max_tokens": 5, "guidance": [{}, {}]}"#);
        for (field, wanted, listed_wanted) in [
            ("sampling.max_tokens", "max_completion_tokens", "max_tokens"),
            ("guidance[0].preference", "guidance.preference", "guidance[0].preference"),
            ("input.chat.messages[1].role", "messages[1].role", "messages[1].role"),
            ("input", "messages", "messages"),
            ("sampling.stop[0]", "stop[0]", "stop[0]"),
            ("model", "model", "model"),
        ] {
            let status = Status::from(Refusal::invalid(field, "is wrong"));
            let failure = Failure::of_request(&status, &single);
            assert_eq!(failure.param.as_deref(), Some(wanted));
            assert_eq!(failure.message, format!("{wanted}: is wrong"));
            assert_eq!(Failure::of_request(&status, &listed).param.as_deref(), Some(listed_wanted));
        }
    }

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
        let body = Failure::of_body(Refusal::exhausted("base_queue_full", "full", Duration::ZERO)).body();
        assert_eq!(body["error"]["code"], "base_queue_full");
        assert_eq!(body["error"]["type"], "rate_limit_error");
    }
}
