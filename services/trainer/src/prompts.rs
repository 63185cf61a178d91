//! Prompts to answer: our own JSONL, MT-Bench's questions, AlpacaEval's instructions, or the conversations of pairs.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uniarm_model::Message;

use crate::pairs::{self, OnBadLine};

/// Bytes of a file of prompts: a hundred thousand long ones, read into memory.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Which file it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PromptFormat {
    /// `{"prompt": "…"}` or `{"messages": […]}` a line, with `id` and `meta` where wanted.
    #[default]
    Jsonl,
    /// FastChat's `question.jsonl`: the turns are asked one after the other.
    MtBench,
    /// AlpacaEval's list of `{"instruction", …}`.
    AlpacaEval,
    /// Preference pairs, of which only the conversations are used, each of them once.
    Pairs,
}

/// A conversation that wants an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// As the file has it, else the line's number.
    pub id: String,
    /// Ends with a message of the user.
    pub messages: Vec<Message>,
    /// What the user says after the answer, and after the answer to that.
    pub follow_ups: Vec<String>,
    /// AlpacaEval's name of the set that it comes from.
    pub dataset: Option<String>,
    /// Line, or place in the list, from 1.
    pub line: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum PromptsError {
    #[error("{}: {source}", file.display())]
    File { file: PathBuf, source: std::io::Error },
    #[error("{}:{line}: {reason}", file.display())]
    Line { file: PathBuf, line: usize, reason: String },
    #[error("{}: {reason}", file.display())]
    Whole { file: PathBuf, reason: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PromptLine {
    id: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<MessageLine>>,
    /// Anything; not read.
    #[serde(default, rename = "meta")]
    _meta: serde::de::IgnoredAny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MessageLine {
    role: String,
    content: String,
}

/// Other fields (category, reference) are for the judge.
#[derive(Deserialize)]
struct MtBenchLine {
    question_id: u64,
    turns: Vec<String>,
}

#[derive(Deserialize)]
struct AlpacaEvalItem {
    instruction: String,
    dataset: Option<String>,
}

/// Reads all prompts of a file, or says which line is wrong and how.
///
/// # Errors
/// A file that cannot be read, a line that is no prompt, an id that stands twice, or no prompt at all.
pub fn read(file: &Path, format: PromptFormat) -> Result<Vec<Prompt>, PromptsError> {
    let failed = |source| PromptsError::File { file: file.to_owned(), source };
    let bytes = std::fs::metadata(file).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        let reason = format!("has {bytes} bytes, the limit is {FILE_BYTES_MAX}; split it");
        return Err(PromptsError::Whole { file: file.to_owned(), reason });
    }
    let text = std::fs::read_to_string(file).map_err(failed)?;
    let prompts = match format {
        PromptFormat::Jsonl => read_lines(file, &text, own_prompt)?,
        PromptFormat::MtBench => read_lines(file, &text, mt_bench_prompt)?,
        PromptFormat::AlpacaEval => alpaca_eval_prompts(file, &text)?,
        PromptFormat::Pairs => conversations_of_pairs(file)?,
    };
    if prompts.is_empty() {
        return Err(PromptsError::Whole { file: file.to_owned(), reason: "has no prompts".into() });
    }
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for prompt in &prompts {
        if let Some(first) = seen.insert(&prompt.id, prompt.line) {
            let reason = format!("id {:?} stands in line {first} already", prompt.id);
            return Err(PromptsError::Line { file: file.to_owned(), line: prompt.line, reason });
        }
    }
    Ok(prompts)
}

fn read_lines(
    file: &Path,
    text: &str,
    parse: impl Fn(&str, usize) -> Result<Prompt, String>,
) -> Result<Vec<Prompt>, PromptsError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, text)| {
            let line = index + 1;
            let prompt = parse(text, line).and_then(checked);
            prompt.map_err(|reason| PromptsError::Line { file: file.to_owned(), line, reason })
        })
        .collect()
}

fn own_prompt(text: &str, line: usize) -> Result<Prompt, String> {
    let read: PromptLine = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let messages = match (read.prompt, read.messages) {
        (Some(prompt), None) => vec![user(prompt)],
        (None, Some(messages)) => {
            messages.into_iter().map(|m| Message { role: m.role, content: m.content }).collect()
        }
        _ => return Err("wants either the field prompt or the field messages".into()),
    };
    let id = read.id.unwrap_or_else(|| line.to_string());
    Ok(Prompt { id, messages, follow_ups: Vec::new(), dataset: None, line })
}

fn mt_bench_prompt(text: &str, line: usize) -> Result<Prompt, String> {
    let read: MtBenchLine = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mut turns = read.turns.into_iter();
    let first = turns.next().ok_or("turns is empty")?;
    Ok(Prompt {
        id: read.question_id.to_string(),
        messages: vec![user(first)],
        follow_ups: turns.collect(),
        dataset: None,
        line,
    })
}

fn alpaca_eval_prompts(file: &Path, text: &str) -> Result<Vec<Prompt>, PromptsError> {
    let whole = |reason: String| PromptsError::Whole { file: file.to_owned(), reason };
    let items: Vec<AlpacaEvalItem> = serde_json::from_str(text).map_err(|error| whole(error.to_string()))?;
    let prompt = |(index, item): (usize, AlpacaEvalItem)| {
        let line = index + 1;
        let messages = vec![user(item.instruction)];
        let prompt =
            Prompt { id: line.to_string(), messages, follow_ups: Vec::new(), dataset: item.dataset, line };
        checked(prompt).map_err(|reason| PromptsError::Line { file: file.to_owned(), line, reason })
    };
    items.into_iter().enumerate().map(prompt).collect()
}

fn conversations_of_pairs(file: &Path) -> Result<Vec<Prompt>, PromptsError> {
    let read = pairs::read(&[file.to_owned()], &[], &[], OnBadLine::Fail)
        .map_err(|error| PromptsError::Whole { file: file.to_owned(), reason: error.to_string() })?;
    let mut seen = HashSet::new();
    let first_of_its_kind = read.pairs.into_iter().filter(|pair| {
        let texts = pair.messages.iter().map(|message| (message.role.clone(), message.content.clone()));
        seen.insert(texts.collect::<Vec<_>>())
    });
    let prompt = |pair: pairs::Pair| Prompt {
        id: pair.place.line.to_string(),
        messages: pair.messages,
        follow_ups: Vec::new(),
        dataset: None,
        line: pair.place.line,
    };
    Ok(first_of_its_kind.map(prompt).collect())
}

fn user(content: String) -> Message {
    Message { role: "user".into(), content }
}

fn checked(prompt: Prompt) -> Result<Prompt, String> {
    match prompt.messages.last() {
        Some(last) if last.role == "user" => {}
        Some(last) => return Err(format!("messages ends with {:?}, wants the user", last.role)),
        None => return Err("messages is empty".into()),
    }
    let texts = prompt.messages.iter().map(|message| &message.content).chain(&prompt.follow_ups);
    if texts.into_iter().any(|text| text.trim().is_empty()) {
        return Err("a message is empty".into());
    }
    Ok(prompt)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use super::*;

    fn read_text(text: &str, format: PromptFormat) -> Result<Vec<Prompt>, PromptsError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts");
        std::fs::write(&file, text).unwrap();
        read(&file, format)
    }

    #[test]
    fn all_formats_become_the_same_prompts() {
        let own =
            read_text("{\"id\": \"a\", \"prompt\": \"Hi\", \"meta\": {\"x\": 1}}\n", PromptFormat::Jsonl)
                .unwrap();
        assert_eq!((own[0].id.as_str(), own[0].messages[0].content.as_str()), ("a", "Hi"));
        let bench = "{\"question_id\": 81, \"category\": \"writing\", \"turns\": [\"Hi\", \"Again\"]}\n";
        let bench = read_text(bench, PromptFormat::MtBench).unwrap();
        assert_eq!((bench[0].id.as_str(), bench[0].follow_ups.as_slice()), ("81", &["Again".to_owned()][..]));
        let alpaca =
            "[{\"dataset\": \"koala\", \"instruction\": \"Hi\", \"output\": \"Ho\", \"generator\": \"x\"}]";
        let alpaca = read_text(alpaca, PromptFormat::AlpacaEval).unwrap();
        assert_eq!(alpaca[0].messages, own[0].messages);
        assert_eq!(alpaca[0].dataset.as_deref(), Some("koala"));
        let pair = |answer: &str| {
            format!(
                "{{\"prompt\":\"Hi\",\"response_a\":\"x\",\"response_b\":\"{answer}\",\"preferred\":{{}}}}\n"
            )
        };
        let pairs = read_text(&(pair("y") + &pair("z")), PromptFormat::Pairs).unwrap();
        assert_eq!((pairs.len(), &pairs[0].messages), (1, &own[0].messages));
    }

    #[test]
    fn a_wrong_line_is_named_with_its_fault() {
        let fault = |text: &str| read_text(text, PromptFormat::Jsonl).unwrap_err().to_string();
        let good = "{\"prompt\": \"Hi\"}\n";
        assert!(fault(&format!("{good}{{\"promt\": \"Hi\"}}\n")).contains(":2: unknown field `promt`"));
        assert!(fault(&format!("{good}\n{{\"prompt\": \" \"}}\n")).contains(":3: a message is empty"));
        assert!(fault("{\"prompt\": \"Hi\", \"messages\": []}").contains("either the field prompt"));
        let reply = "{\"messages\": [{\"role\": \"assistant\", \"content\": \"Hi\"}]}";
        assert!(fault(reply).contains("wants the user"));
        let twice = "{\"id\": \"a\", \"prompt\": \"Hi\"}\n{\"id\": \"a\", \"prompt\": \"Ho\"}";
        assert!(fault(twice).contains(":2: id \"a\" stands in line 1 already"));
        assert!(fault("\n").contains("has no prompts"));
    }
}
