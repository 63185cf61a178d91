//! The gRPC deadline of a request, as the standard header `grpc-timeout` states it.

use std::time::Duration;

use tonic::metadata::MetadataMap;

use crate::{ProtocolError, limits::TIMEOUT_MAX};

const HEADER: &str = "grpc-timeout";

/// Digits that the gRPC specification allows.
const DIGITS_MAX: usize = 8;

/// Time that the client gives this request; `None`: it did not say.
///
/// # Errors
/// When the header is there and is not `<up to eight digits><H|M|S|m|u|n>`.
pub fn timeout(metadata: &MetadataMap) -> Result<Option<Duration>, ProtocolError> {
    let Some(value) = metadata.get(HEADER) else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(parse);
    parsed
        .map(|timeout| Some(timeout.min(TIMEOUT_MAX)))
        .ok_or_else(|| ProtocolError::invalid(HEADER, "wants up to eight digits and a unit"))
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > DIGITS_MAX || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_read_as_the_specification_says() {
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for wrong in ["", "m", "5", "1.5S", "123456789S", "-1S", "5é"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
