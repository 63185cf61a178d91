//! One line of a file of pairs, field by field.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use uniarm_model::Message;

use super::{BadLine, Fault, Judgement, Pair, Place, Side};

const FIELDS: [&str; 9] =
    ["id", "meta", "prompt", "messages", "response_a", "response_b", "finished", "preferred", "scores"];
const ROLES: [&str; 3] = ["system", "user", "assistant"];
/// How Python and JavaScript write what JSON has no word for.
const NOT_NUMBERS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];

/// A bad line that does not yet know its place.
#[derive(Debug)]
pub(super) struct LineFault {
    field: String,
    fault: Fault,
    reason: String,
}

pub(super) fn parse(text: &str, known: &[String], place: &Place) -> Result<Pair, LineFault> {
    let value = json(text)?;
    let line = object(&value, "")?;
    only(line, "", &FIELDS)?;
    let responses = [filled(line, "", "response_a")?, filled(line, "", "response_b")?];
    if responses[0] == responses[1] {
        let reason = "both answers are the same text".to_owned();
        return Err(LineFault::new("response_b", Fault::IdenticalResponses, reason));
    }
    Ok(Pair {
        id: line.get("id").map(|id| id.as_str().map_or_else(|| id.to_string(), str::to_owned)),
        messages: conversation(line)?,
        responses,
        finished: finished(line)?,
        judgements: judgements(line, known)?,
        place: place.clone(),
    })
}

/// Numbers that JSON cannot write become `null`, which no field takes: so the error names the field, not a column.
fn json(text: &str) -> Result<Value, LineFault> {
    let mut text = text.to_owned();
    loop {
        let error = match serde_json::from_str(&text) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let Some((start, length)) = not_a_number(&text, &error) else {
            return Err(LineFault::new("", Fault::Malformed, format!("not JSON: {error}")));
        };
        text.replace_range(start..start + length, "null");
    }
}

/// Where the word is on which the parser stumbled, if it is a number outside the finite ones.
fn not_a_number(text: &str, error: &serde_json::Error) -> Option<(usize, usize)> {
    let column = error.column();
    // The parser stands on the first bytes of a word, or behind the last one of a number. A minus comes first.
    for start in (0..4).map(|back| column.saturating_sub(3) + back) {
        let Some(rest) = text.get(start..) else { continue };
        if let Some(word) = NOT_NUMBERS.iter().find(|word| rest.starts_with(**word)) {
            return Some((start, word.len()));
        }
    }
    if !error.to_string().starts_with("number out of range") {
        return None;
    }
    let in_number = |c: char| c.is_ascii_digit() || "+-.eE".contains(c);
    let before = text.get(..column)?;
    let start = before.trim_end_matches(in_number).len();
    let length = text[start..].find(|c| !in_number(c)).unwrap_or(text.len() - start);
    (length > 0).then_some((start, length))
}

fn conversation(line: &Map<String, Value>) -> Result<Vec<Message>, LineFault> {
    match (line.get("prompt"), line.get("messages")) {
        (Some(_), None) => {
            Ok(vec![Message { role: "user".to_owned(), content: filled(line, "", "prompt")? }])
        }
        (None, Some(Value::Array(messages))) => {
            let read = |(index, value)| message(value, &format!("messages[{index}]"));
            let messages: Vec<Message> =
                messages.iter().enumerate().map(read).collect::<Result<_, LineFault>>()?;
            if messages.last().is_none_or(|message| message.role != "user") {
                return Err(malformed("messages", "must end with a message of the user"));
            }
            Ok(messages)
        }
        (None, Some(_)) => Err(malformed("messages", "must be a list")),
        (Some(_), Some(_)) => Err(malformed("messages", "stands beside 'prompt'; give one of them")),
        (None, None) => {
            let reason = "neither 'prompt' nor 'messages' is there".to_owned();
            Err(LineFault::new("prompt", Fault::MissingField, reason))
        }
    }
}

fn message(value: &Value, path: &str) -> Result<Message, LineFault> {
    let message = object(value, path)?;
    only(message, path, &["role", "content"])?;
    let role = filled(message, path, "role")?;
    if !ROLES.contains(&role.as_str()) {
        return Err(malformed(&format!("{path}.role"), &format!("'{role}' is none of {}", ROLES.join(", "))));
    }
    Ok(Message { role, content: filled(message, path, "content")? })
}

/// Whole answers, where the line does not say.
fn finished(line: &Map<String, Value>) -> Result<[bool; 2], LineFault> {
    let Some(value) = line.get("finished") else { return Ok([true; 2]) };
    let sides = object(value, "finished")?;
    only(sides, "finished", &["a", "b"])?;
    let finished = |side: &str| {
        let value = needed(sides, "finished", side)?;
        value.as_bool().ok_or_else(|| malformed(&joined("finished", side), "must be true or false"))
    };
    Ok([finished("a")?, finished("b")?])
}

fn judgements(line: &Map<String, Value>, known: &[String]) -> Result<BTreeMap<String, Judgement>, LineFault> {
    let mut judgements = BTreeMap::<String, Judgement>::new();
    for (field, is_label) in [("preferred", true), ("scores", false)] {
        let Some(value) = line.get(field) else { continue };
        for (objective, value) in object(value, field)? {
            let path = format!("{field}.{objective}");
            if !known.is_empty() && !known.contains(objective) {
                let reason = format!("the objectives are {}", known.join(", "));
                return Err(LineFault::new(&path, Fault::UnknownObjective, reason));
            }
            let judgement =
                judgements.entry(objective.clone()).or_insert(Judgement { preferred: None, scores: None });
            if is_label {
                judgement.preferred = Some(side(value, &path)?);
            } else {
                judgement.scores = Some(scores(value, &path)?);
            }
        }
    }
    for (objective, judgement) in &judgements {
        let difference = judgement.difference().unwrap_or_default();
        if difference != 0.0 && judgement.sign() != difference.signum() {
            let path = format!("preferred.{objective}");
            let reason = "prefers the answer with the lower score".to_owned();
            return Err(LineFault::new(&path, Fault::Contradiction, reason));
        }
    }
    Ok(judgements)
}

fn side(value: &Value, path: &str) -> Result<Side, LineFault> {
    match value.as_str() {
        Some("a") => Ok(Side::A),
        Some("b") => Ok(Side::B),
        _ => Err(LineFault::new(path, Fault::UnknownLabel, format!("{value} is neither \"a\" nor \"b\""))),
    }
}

fn scores(value: &Value, path: &str) -> Result<[f64; 2], LineFault> {
    let sides = object(value, path)?;
    only(sides, path, &["a", "b"])?;
    let score = |side: &str| {
        let value = needed(sides, path, side)?;
        let score = value.as_f64().filter(|score| score.is_finite());
        let path = joined(path, side);
        match (score, value) {
            (Some(score), _) => Ok(score),
            (None, Value::Null) => {
                Err(LineFault::new(&path, Fault::NotFinite, "not a finite number".to_owned()))
            }
            (None, _) => Err(malformed(&path, "must be a number")),
        }
    };
    Ok([score("a")?, score("b")?])
}

fn object<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>, LineFault> {
    value.as_object().ok_or_else(|| malformed(path, "must be an object { … }"))
}

/// Refuses fields that are not `allowed`: a misspelt one would otherwise be a label that nobody learns.
fn only(object: &Map<String, Value>, path: &str, allowed: &[&str]) -> Result<(), LineFault> {
    match object.keys().find(|key| !allowed.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            let reason = format!("unknown field; known are {}", allowed.join(", "));
            Err(LineFault::new(&joined(path, key), Fault::UnknownField, reason))
        }
    }
}

fn needed<'a>(object: &'a Map<String, Value>, path: &str, key: &str) -> Result<&'a Value, LineFault> {
    object.get(key).ok_or_else(|| {
        LineFault::new(&joined(path, key), Fault::MissingField, "the field is missing".to_owned())
    })
}

/// A text of more than white space.
fn filled(object: &Map<String, Value>, path: &str, key: &str) -> Result<String, LineFault> {
    let value = needed(object, path, key)?;
    let text = value.as_str().ok_or_else(|| malformed(&joined(path, key), "must be a text"))?;
    if text.trim().is_empty() {
        let reason = "the text is empty".to_owned();
        return Err(LineFault::new(&joined(path, key), Fault::EmptyText, reason));
    }
    Ok(text.to_owned())
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn malformed(field: &str, reason: &str) -> LineFault {
    LineFault::new(field, Fault::Malformed, reason.to_owned())
}

// === impl LineFault ===

impl LineFault {
    pub(super) fn new(field: &str, fault: Fault, reason: String) -> Self {
        Self { field: field.to_owned(), fault, reason }
    }

    pub(super) fn at(self, place: Place) -> BadLine {
        BadLine { place, field: self.field, fault: self.fault, reason: self.reason }
    }
}
