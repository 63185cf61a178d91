//! What went wrong, in OpenAI's shape: the one place that says which status of HTTP a refusal is.

use std::time::Duration;

use serde_json::{Value, json};
use uniarm_proto::{Refused, refusal::REWARD_LOST};

use crate::ask::Names;

/// An error as a client reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// HTTP's.
    pub status: u16,
    pub message: String,
    /// The field that was wrong, as the body names it.
    pub param: Option<String>,
    /// The word for programs, such as `base_queue_full`.
    pub cause: String,
    pub retry_after: Option<Duration>,
}

// === impl Failure ===

impl Failure {
    /// Of the door itself: no request came of it.
    pub fn at_the_door(status: u16, cause: &str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, cause: cause.to_owned(), retry_after: None }
    }

    /// Of a request under way: its fields get the names that the body had for them.
    pub fn of_request(refused: Refused, names: &Names) -> Self {
        names.in_body(refused).into()
    }

    /// The body, which a stream that has begun sends as its last event.
    pub fn body(&self) -> Value {
        let kind = match self.status {
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        json!({
            "error": { "message": self.message, "type": kind, "param": self.param, "code": self.cause }
        })
    }

    /// Whether the same request would fare no better: a deadline that has passed, and a reward whose loss was to be
    /// fatal, have been answered as asked.
    pub fn is_final(&self) -> bool {
        self.status == 504 || self.cause == REWARD_LOST
    }
}

/// Of what names its fields already as the client named them.
impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let Refused { code, message, field: param, cause, retry_after } = refused;
        let cause = cause.unwrap_or_else(|| code.to_owned());
        Self { status: http_status(code), message, param, cause, retry_after }
    }
}

fn http_status(code: &str) -> u16 {
    match code {
        "invalid_argument" | "out_of_range" | "failed_precondition" => 400,
        "unauthenticated" => 401,
        "permission_denied" => 403,
        "not_found" => 404,
        "resource_exhausted" => 429,
        "unimplemented" => 501,
        "unavailable" | "cancelled" => 503,
        "deadline_exceeded" => 504,
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use uniarm_proto::{Refusal, pb};

    use super::*;
    use crate::{Ask, Call, Fields};

    fn names(at: &str, body: Value) -> Names {
        let fields = Fields::of(at, body).unwrap();
        Ask::read(Call::Chat, fields, pb::GenerateRequest::default()).unwrap().form.names
    }

    #[test]
    fn a_field_gets_the_name_that_the_body_had_for_it() {
        let single = json!({ "messages": [], "max_completion_tokens": 5, "guidance": { "strength": 1 } });
        let in_a_line = names("body", single.clone());
        let single = names("", single);
        let listed = names("", json!({ "messages": [], "max_tokens": 5, "guidance": [{}, {}] }));
        for (field, wanted, listed_wanted) in [
            ("sampling.max_tokens", "max_completion_tokens", "max_tokens"),
            ("guidance[0].preference", "guidance.preference", "guidance[0].preference"),
            ("input.chat.messages[1].role", "messages[1].role", "messages[1].role"),
            ("input", "messages", "messages"),
            ("sampling.stop[0]", "stop[0]", "stop[0]"),
            ("model", "model", "model"),
        ] {
            let refused = || Refused::from(Refusal::invalid(field, "is wrong"));
            let failure = Failure::of_request(refused(), &single);
            assert_eq!(failure.param.as_deref(), Some(wanted));
            assert_eq!(failure.message, format!("{wanted}: is wrong"));
            assert_eq!(Failure::of_request(refused(), &listed).param.as_deref(), Some(listed_wanted));
            let failure = Failure::of_request(refused(), &in_a_line);
            assert_eq!(failure.param, Some(format!("body.{wanted}")));
        }
    }

    #[test]
    fn a_failure_says_its_kind_its_cause_and_whether_it_is_final() {
        let of = |refusal: Refusal| Failure::from(Refused::from(refusal));
        let full = of(Refusal::exhausted("base_queue_full", "full", Duration::from_millis(1500)));
        assert_eq!((full.status, full.is_final()), (429, false));
        let error = &full.body()["error"];
        assert_eq!((&error["code"], &error["type"]), (&json!("base_queue_full"), &json!("rate_limit_error")));
        let late = of(Refusal::deadline("too late"));
        assert_eq!((late.status, late.is_final()), (504, true));
        assert_eq!(late.body()["error"]["type"], "server_error");
    }
}
