//! Files of answers to be scored: JSON lines with `prompt` or `messages`, and `response`.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use uniarm_model::Message;

use super::Answer;

/// Bytes of one file: it is read as a whole.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// A line of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnedAnswer {
    /// As the line says, or the line's number.
    pub id: String,
    pub messages: Vec<Message>,
    pub response: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<serde_json::Value>,
    #[serde(rename = "meta")]
    _meta: Option<serde::de::IgnoredAny>,
    prompt: Option<String>,
    messages: Option<Vec<LineMessage>>,
    response: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LineMessage {
    role: String,
    content: String,
}

/// # Errors
/// Where the file cannot be read or has no line, and for the first line that is wrong, with its number and what it wants.
pub fn read(file: &Path) -> anyhow::Result<Vec<OwnedAnswer>> {
    let context = || file.display().to_string();
    let size = std::fs::metadata(file).with_context(context)?.len();
    if size > FILE_BYTES_MAX {
        bail!("{}: {size} bytes; at most {FILE_BYTES_MAX}, so split the file", file.display());
    }
    let text = std::fs::read_to_string(file).with_context(context)?;
    let answer = |(index, line): (usize, &str)| {
        parse(line, index + 1).with_context(|| format!("{}:{}", file.display(), index + 1))
    };
    let answers: Vec<OwnedAnswer> = text.lines().enumerate().map(answer).collect::<anyhow::Result<_>>()?;
    if answers.is_empty() {
        bail!("{}: no answers; wants lines {{\"prompt\": …, \"response\": …}}", file.display());
    }
    Ok(answers)
}

fn parse(line: &str, number: usize) -> anyhow::Result<OwnedAnswer> {
    let line: Line = serde_json::from_str(line)?;
    let messages = match (line.prompt, line.messages) {
        (Some(prompt), None) => vec![Message { role: "user".to_owned(), content: prompt }],
        (None, Some(messages)) => messages
            .into_iter()
            .map(|message| Message { role: message.role, content: message.content })
            .collect(),
        _ => bail!("wants either prompt or messages"),
    };
    if messages.last().is_none_or(|last| last.role != "user") {
        bail!("messages: wants a conversation that ends with the user");
    }
    let id = line
        .id
        .map_or_else(|| number.to_string(), |id| id.as_str().map_or_else(|| id.to_string(), str::to_owned));
    Ok(OwnedAnswer { id, messages, response: line.response })
}

// === impl OwnedAnswer ===

impl OwnedAnswer {
    pub fn as_answer(&self) -> Answer<'_> {
        Answer { messages: &self.messages, response: &self.response }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("answers.jsonl");
        let error = |text: &str| {
            std::fs::write(&file, text).unwrap();
            format!("{:#}", read(&file).unwrap_err())
        };
        let good = r#"{"prompt": "Hi", "response": "Hello", "meta": [1]}"#;
        std::fs::write(&file, format!("{good}\n")).unwrap();
        assert_eq!(read(&file).unwrap()[0].id, "1");
        assert!(error(&format!("{good}\n{{}}\n")).contains("answers.jsonl:2: missing field `response`"));
        assert!(error(r#"{"response": "x"}"#).contains("either prompt or messages"));
        assert!(error(r#"{"messages": [], "response": "x"}"#).contains("ends with the user"));
        assert!(error(r#"{"prompt": "x", "response": "x", "score": 1}"#).contains("unknown field `score`"));
        assert!(error("").contains("no answers"));
    }
}
