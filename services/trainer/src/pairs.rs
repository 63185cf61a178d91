//! Preference pairs: two answers to one conversation, and what each objective thinks of them (docs/pairs-format.md).
//!
//! Whatever is wrong with a line is named with file, line and field, and counted: nothing is dropped silently.

mod line;
pub mod tokens;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    io::BufRead as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uniarm_model::Message;

/// Bytes of one line: some hundred times the longest pair that a context of 8192 tokens holds.
const LINE_BYTES_MAX: usize = 4 << 20;
/// Bad lines that an error shows; the counts cover all of them.
const SHOWN_MAX: usize = 10;

/// Two answers to one conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub id: Option<String>,
    /// Ends with a message of the user.
    pub messages: Vec<Message>,
    /// Answers a and b. Different, and not empty.
    pub responses: [String; 2],
    /// Whether each answer is whole. One that a limit cut off says nothing of where to end.
    pub finished: [bool; 2],
    /// By objective.
    pub judgements: BTreeMap<String, Judgement>,
    pub place: Place,
}

/// What one objective thinks of a pair; at least one of the two is there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement {
    pub preferred: Option<Side>,
    /// Scores of a and b, finite; higher is better.
    pub scores: Option<[f64; 2]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    A,
    B,
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
}

/// What happens to a line that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadLine {
    /// Reading ends with an error that names the lines.
    #[default]
    Fail,
    /// The line is left out, counted and listed.
    Skip,
}

/// What can be wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    Malformed,
    UnknownField,
    MissingField,
    EmptyText,
    IdenticalResponses,
    UnknownLabel,
    UnknownObjective,
    MissingObjective,
    NotFinite,
    Contradiction,
    Repeated,
    Tie,
    TooLong,
}

/// A line that cannot be used.
#[derive(Clone, Debug, PartialEq)]
pub struct BadLine {
    pub place: Place,
    /// Path of the field, as `scores.positive.a`; empty where the line as a whole is wrong.
    pub field: String,
    pub fault: Fault,
    pub reason: String,
}

/// All lines that were not used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BadLines(pub Vec<BadLine>);

/// Pairs that can be used, in the order of the files, and the lines that cannot.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    pub pairs: Vec<Pair>,
    pub bad: BadLines,
}

/// Why pairs cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PairsError {
    #[error("{}: {source}", .file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("{0}\nCorrect these lines, or leave them out with on_bad_line = \"skip\"")]
    Bad(BadLines),
}

/// Reads files of pairs. `known` are the objectives that a line may speak of (empty: any), `needed` those that each
/// pair must have. Lines with the same conversation and answers are one pair, so that one file may label one
/// objective and the next file another; the pair stands where its first line does.
///
/// # Errors
/// Where a file cannot be read, and under [`OnBadLine::Fail`] where any line is bad.
pub fn read(
    files: &[PathBuf],
    known: &[String],
    needed: &[String],
    on_bad_line: OnBadLine,
) -> Result<Pairs, PairsError> {
    let mut reading = Reading { known, found: Pairs::default(), by_content: HashMap::new() };
    for file in files {
        reading.file(file)?;
    }
    let mut found = reading.found;
    found.refuse(|pair| {
        let missing = needed.iter().find(|objective| !pair.judgements.contains_key(*objective))?;
        let reason = format!("neither 'preferred' nor 'scores' speaks of objective '{missing}'");
        Some((String::new(), Fault::MissingObjective, reason))
    });
    found.checked(on_bad_line)
}

/// Files in the making of pairs.
struct Reading<'a> {
    known: &'a [String],
    found: Pairs,
    /// Index of each pair, by the digest of its conversation and answers.
    by_content: HashMap<[u8; 32], usize>,
}

// === impl Pair ===

impl Pair {
    /// As a line of a file says it.
    pub fn to_json(&self) -> Value {
        let message = |message: &Message| json!({ "role": message.role, "content": message.content });
        let mut line = json!({
            "messages": self.messages.iter().map(message).collect::<Vec<_>>(),
            "response_a": self.responses[0],
            "response_b": self.responses[1],
        });
        if let Some(id) = &self.id {
            line["id"] = json!(id);
        }
        if self.finished != [true; 2] {
            line["finished"] = json!({ "a": self.finished[0], "b": self.finished[1] });
        }
        for (objective, judgement) in &self.judgements {
            if let Some(side) = judgement.preferred {
                line["preferred"][objective] = json!(side);
            }
            if let Some([a, b]) = judgement.scores {
                line["scores"][objective] = json!({ "a": a, "b": b });
            }
        }
        line
    }

    /// Digest of conversation, answers and their ends, without what is thought of them.
    fn content(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let messages = self.messages.iter().flat_map(|message| [&message.role, &message.content]);
        for text in messages.chain(&self.responses) {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hash.update(self.finished.map(u8::from));
        hash.finalize().into()
    }
}

// === impl Judgement ===

impl Judgement {
    /// s_i: +1 where a is preferred, −1 where b is, 0 where both have the same score.
    pub fn sign(&self) -> f64 {
        match (self.preferred, self.difference()) {
            (Some(Side::A), _) => 1.0,
            (Some(Side::B), _) => -1.0,
            (None, Some(difference)) if difference != 0.0 => difference.signum(),
            (None, _) => 0.0,
        }
    }

    /// Score of a less that of b.
    pub fn difference(&self) -> Option<f64> {
        self.scores.map(|[a, b]| a - b)
    }
}

// === impl Place ===

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

// === impl Fault ===

impl Fault {
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::UnknownField => "unknown_field",
            Self::MissingField => "missing_field",
            Self::EmptyText => "empty_text",
            Self::IdenticalResponses => "identical_responses",
            Self::UnknownLabel => "unknown_label",
            Self::UnknownObjective => "unknown_objective",
            Self::MissingObjective => "missing_objective",
            Self::NotFinite => "not_finite",
            Self::Contradiction => "contradiction",
            Self::Repeated => "repeated",
            Self::Tie => "tie",
            Self::TooLong => "too_long",
        }
    }
}

// === impl BadLine ===

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = if self.field.is_empty() { String::new() } else { format!("{}: ", self.field) };
        write!(f, "{}: {field}{} [{}]", self.place, self.reason, self.fault.name())
    }
}

// === impl BadLines ===

impl BadLines {
    pub fn counts(&self) -> BTreeMap<Fault, usize> {
        let mut counts = BTreeMap::new();
        for line in &self.0 {
            *counts.entry(line.fault).or_default() += 1;
        }
        counts
    }

    /// "2 empty_text, 1 tie"
    pub fn summary(&self) -> String {
        let count = |(fault, count): (Fault, usize)| format!("{count} {}", fault.name());
        self.counts().into_iter().map(count).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for BadLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = if self.0.len() == 1 { "line" } else { "lines" };
        write!(f, "{} {lines} of pairs cannot be used ({}):", self.0.len(), self.summary())?;
        for line in self.0.iter().take(SHOWN_MAX) {
            write!(f, "\n  {line}")?;
        }
        match self.0.len().saturating_sub(SHOWN_MAX) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

// === impl Pairs ===

impl Pairs {
    /// Moves pairs of which `fault` has something to say to the bad lines.
    pub(crate) fn refuse(&mut self, mut fault: impl FnMut(&Pair) -> Option<(String, Fault, String)>) {
        let bad = &mut self.bad.0;
        self.pairs.retain(|pair| {
            let Some((field, fault, reason)) = fault(pair) else { return true };
            bad.push(BadLine { place: pair.place.clone(), field, fault, reason });
            false
        });
    }

    /// # Errors
    /// Under [`OnBadLine::Fail`], where any line is bad.
    pub(crate) fn checked(self, on_bad_line: OnBadLine) -> Result<Self, PairsError> {
        match on_bad_line {
            OnBadLine::Fail if !self.bad.0.is_empty() => Err(PairsError::Bad(self.bad)),
            _ => Ok(self),
        }
    }
}

// === impl Reading ===

impl Reading<'_> {
    fn file(&mut self, file: &Path) -> Result<(), PairsError> {
        let io = |source| PairsError::Io { file: file.to_owned(), source };
        let mut reader = std::io::BufReader::new(std::fs::File::open(file).map_err(io)?);
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            if reader.read_until(b'\n', &mut bytes).map_err(io)? == 0 {
                break;
            }
            let place = Place { file: file.to_owned(), line };
            let added = self.line(&bytes, &place);
            self.found.bad.0.extend(added.err().map(|fault| fault.at(place)));
        }
        Ok(())
    }

    fn line(&mut self, bytes: &[u8], place: &Place) -> Result<(), line::LineFault> {
        if bytes.len() > LINE_BYTES_MAX {
            let reason = format!("{} bytes; at most {LINE_BYTES_MAX}", bytes.len());
            return Err(line::LineFault::new("", Fault::TooLong, reason));
        }
        let text = std::str::from_utf8(bytes)
            .map_err(|error| line::LineFault::new("", Fault::Malformed, format!("not UTF-8: {error}")))?;
        let pair = line::parse(text.trim_end_matches(['\n', '\r']), self.known, place)?;
        match self.by_content.entry(pair.content()) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.found.pairs.len());
                self.found.pairs.push(pair);
            }
            std::collections::hash_map::Entry::Occupied(entry) => {
                let first = &mut self.found.pairs[*entry.get()];
                if let Some(objective) =
                    pair.judgements.keys().find(|name| first.judgements.contains_key(*name))
                {
                    let reason = format!(
                        "this pair is already labelled for objective '{objective}' at {}",
                        first.place
                    );
                    return Err(line::LineFault::new("", Fault::Repeated, reason));
                }
                first.judgements.extend(pair.judgements);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
