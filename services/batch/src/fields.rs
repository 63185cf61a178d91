//! A JSON object whose fields are taken one by one, so that every error names its field and none is overlooked.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use uniarm_proto::ProtocolError;

/// A name is offered instead of an unknown one up to this many changed letters.
const TYPOS_MAX: usize = 2;

/// What is left of an object.
pub struct Fields {
    /// Of the object, with a dot at its end; empty for a line's own.
    path: String,
    object: Map<String, Value>,
}

/// Why a line is no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", field.as_ref().map_or(String::new(), |field| format!("{field}: ")))]
pub struct LineError {
    /// None where the line as a whole is wrong.
    pub field: Option<String>,
    pub reason: String,
}

// === impl Fields ===

impl Fields {
    pub fn new(object: Map<String, Value>) -> Self {
        Self { path: String::new(), object }
    }

    pub fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// The value of a field; `null` is as good as none.
    ///
    /// # Errors
    /// When it has another type.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, LineError> {
        match self.object.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value).map(Some).map_err(|error| self.error(name, error)),
        }
    }

    /// # Errors
    /// When it is missing.
    pub fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, LineError> {
        self.take(name)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// The object in a field.
    ///
    /// # Errors
    /// When it is no object.
    pub fn object(&mut self, name: &str) -> Result<Option<Self>, LineError> {
        let Some(object) = self.take(name)? else { return Ok(None) };
        Ok(Some(Self { path: format!("{}{name}.", self.path), object }))
    }

    /// The objects in a field: a list of them, or one.
    ///
    /// # Errors
    /// When it is neither.
    pub fn objects(&mut self, name: &str) -> Result<Vec<Self>, LineError> {
        let Some(value) = self.take::<Value>(name)? else { return Ok(Vec::new()) };
        let (values, is_list) = match value {
            Value::Array(values) => (values, true),
            value => (vec![value], false),
        };
        let named = |(index, value): (usize, Value)| {
            let path = if is_list { format!("{name}[{index}]") } else { name.to_owned() };
            match value {
                Value::Object(object) => Ok(Self { path: format!("{}{path}.", self.path), object }),
                other => Err(self.error(&path, format!("wants an object, not {other}"))),
            }
        };
        values.into_iter().enumerate().map(named).collect()
    }

    pub fn error(&self, name: &str, reason: impl std::fmt::Display) -> LineError {
        LineError { field: Some(format!("{}{name}", self.path)), reason: reason.to_string() }
    }

    /// `known`: all names that the object may have, to offer the nearest.
    ///
    /// # Errors
    /// When a field was not taken.
    pub fn finish(self, known: &[&str]) -> Result<(), LineError> {
        let Some(name) = self.object.keys().next() else { return Ok(()) };
        Err(self.error(name, format!("is unknown{}", did_you_mean(name, known))))
    }
}

// === impl LineError ===

impl LineError {
    pub fn whole(reason: impl std::fmt::Display) -> Self {
        Self { field: None, reason: reason.to_string() }
    }

    /// A request's field, by its name in a flat line.
    pub fn of_request(error: &ProtocolError) -> Self {
        let field = error.field();
        let text = error.to_string();
        let reason =
            text.strip_prefix(field).map_or(text.as_str(), |rest| rest.trim_start_matches([':', ' ']));
        let flat = field.strip_prefix("sampling.").unwrap_or(field);
        Self { field: Some(flat.to_owned()), reason: reason.to_owned() }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_offered_and_none_that_is_far() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(did_you_mean("temprature", &["temperature", "top_p"]), "; did you mean temperature?");
        assert_eq!(did_you_mean("x", &["temperature"]), "");
    }
}
