//! What arrives: one line of JSON for each request, in any order.

use serde::{Deserialize, Serialize};
use uniarm_proto::Priority;

/// Tokens of one prompt or answer: a longer one is a mistake in the trace, and would fill every cache.
const TOKENS_MAX: usize = 1 << 20;

/// The longest a trace may take, and a request in it: three years. A clock that counts further loses the parts of a step.
pub const SECONDS_MAX: f64 = 1e8;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arrival {
    /// Seconds since the trace began.
    pub at: f64,
    pub prompt_tokens: usize,
    /// Tokens until the answer ends.
    pub answer_tokens: usize,
    #[serde(default = "guided")]
    pub guided: bool,
    /// Whatever tells preferences apart: a reward worker shares prefixes only under the same one.
    #[serde(default)]
    pub preference: String,
    #[serde(default)]
    pub priority: ArrivalPriority,
    /// Prompts with the same name begin with the same tokens.
    #[serde(default)]
    pub prefix: String,
    /// How many of them.
    #[serde(default)]
    pub prefix_tokens: usize,
    /// Seconds until the answer is worth nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
}

/// A request's priority as a trace writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArrivalPriority {
    Low,
    #[default]
    Normal,
    High,
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("line {line} is not a request: {source}")]
    Json { line: usize, source: serde_json::Error },
    #[error("line {line}: {field} {reason}")]
    Invalid { line: usize, field: &'static str, reason: String },
    #[error("the trace has no requests")]
    Empty,
}

fn guided() -> bool {
    true
}

// === impl ArrivalPriority ===

impl From<ArrivalPriority> for Priority {
    fn from(priority: ArrivalPriority) -> Self {
        match priority {
            ArrivalPriority::Low => Self::Low,
            ArrivalPriority::Normal => Self::Normal,
            ArrivalPriority::High => Self::High,
        }
    }
}

/// Reads a trace; empty lines do not count. The arrivals come back in the order of their times.
///
/// # Errors
/// Names the first line that is no request, and the field that is wrong.
pub fn read(text: &str) -> Result<Vec<Arrival>, TraceError> {
    let mut arrivals = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line_number = index + 1;
        let arrival: Arrival =
            serde_json::from_str(line).map_err(|source| TraceError::Json { line: line_number, source })?;
        arrival.check().map_err(|(field, reason)| TraceError::Invalid {
            line: line_number,
            field,
            reason,
        })?;
        arrivals.push(arrival);
    }
    if arrivals.is_empty() {
        return Err(TraceError::Empty);
    }
    arrivals.sort_by(|a, b| a.at.total_cmp(&b.at));
    Ok(arrivals)
}

/// Writes a trace as [`read`] takes it.
pub fn write(arrivals: &[Arrival]) -> String {
    let line = |arrival| serde_json::to_string(arrival).expect("numbers and text are always JSON") + "\n";
    arrivals.iter().map(line).collect()
}

// === impl Arrival ===

impl Arrival {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let is_time = |seconds: f64| (0.0..=SECONDS_MAX).contains(&seconds);
        if !is_time(self.at) {
            return Err(("at", format!("wants seconds from 0 to {SECONDS_MAX}, not {}", self.at)));
        }
        for (field, tokens) in [("prompt_tokens", self.prompt_tokens), ("answer_tokens", self.answer_tokens)]
        {
            if !(1..=TOKENS_MAX).contains(&tokens) {
                return Err((field, format!("wants 1..={TOKENS_MAX}, not {tokens}")));
            }
        }
        if self.prefix_tokens > self.prompt_tokens {
            return Err(("prefix_tokens", format!("is more than the prompt's {}", self.prompt_tokens)));
        }
        match self.timeout {
            Some(timeout) if !is_time(timeout) => {
                Err(("timeout", format!("wants seconds from 0 to {SECONDS_MAX}, not {timeout}")))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_read_back_as_it_was_written_and_a_wrong_line_is_named() {
        let text = "{\"at\":2.5,\"prompt_tokens\":30,\"answer_tokens\":5,\"preference\":\"harmless\"}\n\n\
                    {\"at\":1,\"prompt_tokens\":9,\"answer_tokens\":1,\"guided\":false,\"priority\":\"high\"}\n";
        let arrivals = read(text).unwrap();
        assert_eq!(arrivals.iter().map(|arrival| arrival.at).collect::<Vec<_>>(), [1.0, 2.5]);
        assert!(!arrivals[0].guided && arrivals[1].guided);
        assert_eq!(read(&write(&arrivals)).unwrap(), arrivals);

        let message = |text: &str| read(text).unwrap_err().to_string();
        assert!(message("{\"at\":1}").starts_with("line 1 is not a request"));
        let endless = "\n{\"at\":1,\"prompt_tokens\":0,\"answer_tokens\":1}";
        assert_eq!(message(endless), "line 2: prompt_tokens wants 1..=1048576, not 0");
        let far = "{\"at\":1e300,\"prompt_tokens\":1,\"answer_tokens\":1}";
        assert!(message(far).starts_with("line 1: at wants seconds from 0 to 100000000, not 1"));
        assert_eq!(message("\n"), "the trace has no requests");
    }
}
