//! A JSON object whose fields are taken one by one, so that every error names its field; what nobody took is refused at
//! the end.

use serde_json::{Map, Value};
use uniarm_proto::Refusal;

/// Fields of OpenAI's API that cannot change an answer of ours: they are taken and do nothing.
const HARMLESS: [&str; 10] = [
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "system_fingerprint",
    "user",
];

/// Fields that ask for what happens anyway, as clients write them out.
const NEUTRAL: [(&str, &str); 5] = [
    ("modalities", r#"["text"]"#),
    ("response_format", r#"{"type":"text"}"#),
    ("tool_choice", r#""none""#),
    ("tool_choice", r#""auto""#),
    ("function_call", r#""none""#),
];

/// A name is offered instead of an unknown one up to this many changed letters.
const TYPOS_MAX: usize = 2;

/// What is left of an object, and where it stands.
#[derive(Debug)]
pub struct Fields {
    at: String,
    left: Map<String, Value>,
    /// What was asked for: names to offer instead of one that is misspelt.
    known: Vec<&'static str>,
}

// === impl Fields ===

impl Fields {
    /// The body itself.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn of_body(body: &[u8]) -> Result<Self, Refusal> {
        let value = serde_json::from_slice(body)
            .map_err(|error| Refusal::invalid("body", format!("is no JSON: {error}")))?;
        Self::of("", value)
    }

    /// # Errors
    /// When the value is no object.
    pub fn of(at: &str, value: Value) -> Result<Self, Refusal> {
        match value {
            Value::Object(left) => Ok(Self { at: at.to_owned(), left, known: Vec::new() }),
            other => Err(wrong(if at.is_empty() { "body" } else { at }, "an object", &other)),
        }
    }

    /// Where the object stands; empty for the outermost one.
    pub fn at(&self) -> &str {
        &self.at
    }

    pub fn error(&self, name: &str, reason: impl std::fmt::Display) -> Refusal {
        Refusal::invalid(self.path(name), reason)
    }

    pub fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) }
    }

    pub fn has(&self, name: &str) -> bool {
        self.peek(name).is_some()
    }

    /// A field that stays where it is.
    pub fn peek(&self, name: &str) -> Option<&Value> {
        self.left.get(name).filter(|value| !value.is_null())
    }

    /// A field of any kind; null is as good as absent.
    pub fn value(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.left.remove(name).filter(|value| !value.is_null())
    }

    /// # Errors
    /// When there is none.
    pub fn required(&mut self, name: &'static str) -> Result<Value, Refusal> {
        self.value(name).ok_or_else(|| self.error(name, "is missing"))
    }

    /// # Errors
    /// Here and below: when the field is of another kind.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, Refusal> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub fn number(&mut self, name: &'static str) -> Result<Option<f32>, Refusal> {
        self.typed(name, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    pub fn count(&mut self, name: &'static str) -> Result<Option<u32>, Refusal> {
        self.typed(name, "a whole number from 0 to 4294967295", |value| value.as_u64()?.try_into().ok())
    }

    pub fn wide_count(&mut self, name: &'static str) -> Result<Option<u64>, Refusal> {
        self.typed(name, "a whole number from 0 to 18446744073709551615", Value::as_u64)
    }

    pub fn flag(&mut self, name: &'static str) -> Result<Option<bool>, Refusal> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// A list of token ids.
    pub fn ids(&mut self, name: &'static str) -> Result<Option<Vec<u32>>, Refusal> {
        self.typed(name, "a list of token ids", ids_of)
    }

    /// One of a few words.
    pub fn word<T: Copy>(&mut self, name: &'static str, known: &[(&str, T)]) -> Result<Option<T>, Refusal> {
        let Some(asked) = self.text(name)? else { return Ok(None) };
        let found = known.iter().find(|(word, _)| *word == asked);
        found.map(|(_, value)| Some(*value)).ok_or_else(|| {
            let words: Vec<_> = known.iter().map(|(word, _)| *word).collect();
            self.error(name, format!("is {asked:?}, wants one of: {}", words.join(", ")))
        })
    }

    /// The object in a field.
    ///
    /// # Errors
    /// When it is none.
    pub fn object(&mut self, name: &'static str) -> Result<Option<Self>, Refusal> {
        self.value(name).map(|value| Self::of(&self.path(name), value)).transpose()
    }

    /// What is left must say nothing (null, false, "", [] or {}), or ask for what happens anyway.
    ///
    /// # Errors
    /// For the first field that may matter: leaving it out in silence would answer another request.
    pub fn finish(self) -> Result<(), Refusal> {
        self.finish_but(&[])
    }

    /// The same for a whole body, which may also hold what changes no answer.
    pub(crate) fn finish_body(self) -> Result<(), Refusal> {
        self.finish_but(&HARMLESS)
    }

    /// Of an object of ours: nothing may be left.
    ///
    /// # Errors
    /// For the first field that nobody took.
    pub fn finish_strictly(self) -> Result<(), Refusal> {
        let Some(name) = self.left.keys().next() else { return Ok(()) };
        Err(self.error(name, format!("is unknown{}", did_you_mean(name, &self.known))))
    }

    fn finish_but(self, harmless: &[&str]) -> Result<(), Refusal> {
        let matters = |(name, value): &(&String, &Value)| {
            let is_neutral = NEUTRAL.iter().any(|(field, neutral)| {
                field == name
                    && serde_json::from_str::<Value>(neutral).is_ok_and(|neutral| neutral == **value)
            });
            !(harmless.contains(&name.as_str()) || is_neutral || says_nothing(value))
        };
        let Some((name, _)) = self.left.iter().find(matters) else { return Ok(()) };
        Err(match did_you_mean(name, &self.known) {
            near if !near.is_empty() => self.error(name, format!("is unknown{near}")),
            _ => self.error(
                name,
                "is not supported, and might change the answer: leave it out (/openapi.json lists what is)",
            ),
        })
    }

    fn typed<T>(
        &mut self,
        name: &'static str,
        wanted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, Refusal> {
        let Some(value) = self.value(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(&self.path(name), wanted, &value))
    }
}

/// Token ids, where the value is a list of them.
pub(crate) fn ids_of(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64()?.try_into().ok()).collect()
}

/// A refusal of a value that is of another kind than its field wants.
pub(crate) fn wrong(field: &str, wanted: &str, value: &Value) -> Refusal {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(number) => return Refusal::invalid(field, format!("is {number}, wants {wanted}")),
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Refusal::invalid(field, format!("is {kind}, wants {wanted}"))
}

/// A question with the nearest of the valid names, if one is near.
pub fn did_you_mean<S: AsRef<str>>(name: &str, known: &[S]) -> String {
    let nearest = known.iter().map(|known| (distance(name, known.as_ref()), known.as_ref())).min();
    match nearest {
        Some((distance, known)) if (1..=TYPOS_MAX).contains(&distance) => format!("; did you mean {known}?"),
        _ => String::new(),
    }
}

/// Levenshtein's: letters that were added, left out or changed.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, letter) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for j in 0..other.len() {
            let changed = diagonal + usize::from(letter != other[j]);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[other.len()]
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(body: &str) -> Result<(), Refusal> {
        Fields::of_body(body.as_bytes()).unwrap().finish_body()
    }

    #[test]
    fn what_could_change_the_answer_is_refused_by_name_and_the_rest_is_taken() {
        for harmless in [
            r#"{"user": "me", "metadata": {"a": 1}, "store": true, "logit_bias": {}, "tools": [], "echo": false}"#,
            r#"{"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto", "suffix": null}"#,
        ] {
            assert_eq!(finish(harmless), Ok(()));
        }
        for (body, field) in [
            (r#"{"logit_bias": {"50256": -100}}"#, "logit_bias"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
            (r#"{"temprature": 0.5}"#, "temprature"),
            (r#"{"best_of": 0}"#, "best_of"),
        ] {
            assert_eq!(finish(body).unwrap_err().field.as_deref(), Some(field));
        }
        let inside = Fields::of("guidance", serde_json::json!({ "user": "me" })).unwrap();
        assert_eq!(inside.finish().unwrap_err().field.as_deref(), Some("guidance.user"));
    }

    #[test]
    fn a_value_of_another_kind_is_refused_with_what_is_wanted() {
        let mut fields =
            Fields::of_body(br#"{"n": 1.5, "seed": -1, "stream": "yes", "top_p": [1]}"#).unwrap();
        assert_eq!(
            fields.count("n").unwrap_err().message,
            "n: is 1.5, wants a whole number from 0 to 4294967295"
        );
        assert_eq!(fields.wide_count("seed").unwrap_err().field.as_deref(), Some("seed"));
        assert_eq!(fields.flag("stream").unwrap_err().message, "stream: is a string, wants true or false");
        assert_eq!(fields.number("top_p").unwrap_err().message, "top_p: is a list, wants a number");
        assert!(Fields::of_body(b"{").unwrap_err().message.contains("line 1 column 1"));
    }
    #[test]
    fn the_nearest_name_is_offered_and_none_that_is_far() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(did_you_mean("temprature", &["temperature", "top_p"]), "; did you mean temperature?");
        assert_eq!(did_you_mean("x", &["temperature"]), "");
        let mut fields = Fields::of_body(br#"{"temprature": 1}"#).unwrap();
        fields.number("temperature").unwrap();
        let message = fields.finish_body().unwrap_err().message;
        assert_eq!(message, "temprature: is unknown; did you mean temperature?");
    }
}
