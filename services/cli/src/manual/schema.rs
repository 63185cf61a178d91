//! What a file may say, as tables of its fields: out of the schema that the types of its reader have.

use std::fmt::{Result, Write as _};

use serde_json::{Map, Value};

use super::reference::{code, line};

/// The tables of one file.
pub struct Tables<'a> {
    root: &'a Value,
}

/// A table that a field leads to.
struct Below<'a> {
    heading: String,
    schema: &'a Value,
}

// === impl Tables ===

impl<'a> Tables<'a> {
    pub fn of(root: &'a Value) -> Self {
        Self { root }
    }

    pub fn write(&self, page: &mut String) -> Result {
        self.write_table(page, "", self.root)
    }

    fn write_table(&self, page: &mut String, path: &str, schema: &'a Value) -> Result {
        let required = |name: &str| {
            let names = schema["required"].as_array();
            names.is_some_and(|names| names.iter().any(|required| required == name))
        };
        writeln!(page, "\n| field | | default | |\n|---|---|---|---|")?;
        let mut tables = Vec::new();
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            let default = match field.get("default") {
                Some(Value::Object(_)) | None if required(name) => "required".to_owned(),
                Some(Value::Object(_) | Value::Null) | None => String::new(),
                Some(default) => code(&default.to_string()),
            };
            let text = line(field["description"].as_str().unwrap_or_default());
            writeln!(page, "| {} | {} | {default} | {text} |", code(name), self.kind(field))?;
            tables.extend(self.below(&path, field));
        }
        for Below { heading, schema } in tables {
            writeln!(page, "\n{}:", code(&heading))?;
            let path = heading.trim_matches(['[', ']']);
            self.write_table(page, path, schema)?;
        }
        Ok(())
    }

    /// Follows references, and leaves out that a field may be absent.
    fn resolved(&self, schema: &'a Value) -> &'a Value {
        if let Some(reference) = schema["$ref"].as_str() {
            return self.root.pointer(reference.trim_start_matches('#')).unwrap_or(&Value::Null);
        }
        let is_something = |one: &&Value| one["type"] != "null";
        match schema["anyOf"].as_array().and_then(|any| any.iter().find(is_something)) {
            Some(one) => self.resolved(one),
            None => schema,
        }
    }

    /// The table that a field is, or has many of.
    fn below(&self, path: &str, field: &'a Value) -> Option<Below<'a>> {
        let schema = self.resolved(field);
        if schema.get("properties").is_some() {
            return Some(Below { heading: format!("[{path}]"), schema });
        }
        let item = self.resolved(schema.get("items")?);
        item.get("properties").map(|_| Below { heading: format!("[[{path}]]"), schema: item })
    }

    /// What a field takes, in words.
    fn kind(&self, field: &'a Value) -> String {
        let schema = self.resolved(field);
        if let Some(words) = schema.get("enum").or_else(|| schema.get("oneOf")).and_then(Value::as_array) {
            return words.iter().map(|word| self.word(word)).collect::<Vec<_>>().join(", ");
        }
        if let Some(items) = schema.get("items") {
            let kind = self.kind(items);
            return if kind == "table" { "list of tables".to_owned() } else { format!("list of {kind}") };
        }
        if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_object()) {
            return format!("{} by name", self.kind(values));
        }
        let is = |name: &str| match &schema["type"] {
            Value::Array(types) => types.iter().any(|one| one == name),
            one => one == name,
        };
        let words = [
            ("string", "text"),
            ("integer", "whole number"),
            ("number", "number"),
            ("boolean", "`true` or `false`"),
            ("array", "list"),
        ];
        words.iter().find(|(name, _)| is(name)).map_or("table", |(_, word)| word).to_owned()
    }

    /// One of the values of a field that takes few.
    fn word(&self, word: &'a Value) -> String {
        let meaning = |value: &Value| match value["description"].as_str() {
            Some(text) => format!(" ({})", line(text).trim_end_matches('.')),
            None => String::new(),
        };
        if let Some(name) = word.as_str().or_else(|| word["const"].as_str()) {
            return format!("{}{}", code(&format!("\"{name}\"")), meaning(word));
        }
        if let Some(names) = word["enum"].as_array() {
            return names.iter().map(|name| self.word(name)).collect::<Vec<_>>().join(", ");
        }
        let of = |properties: &Map<String, Value>| properties.keys().cloned().collect::<Vec<_>>().join(", ");
        let own = word["properties"].as_object().into_iter().flatten();
        let shapes = own.map(|(name, inner)| {
            let fields = inner["properties"].as_object().map_or_else(String::new, of);
            format!("{}{}", code(&format!("{{ {name} = {{ {fields} }} }}")), meaning(word))
        });
        shapes.collect::<Vec<_>>().join(", ")
    }
}
