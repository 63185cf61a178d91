//! What a request prefers: a weight for each objective it names, resolved to a point of the simplex.

use std::str::FromStr;

/// Objectives that one preference may name.
pub const OBJECTIVES_MAX: usize = 64;
/// Bytes of an objective's name.
pub const NAME_BYTES_MAX: usize = 128;

/// Weights as a request states them: finite, not negative, not all zero, no name twice.
#[derive(Clone, Debug, PartialEq)]
pub struct PreferenceSpec {
    weights: Vec<(String, f32)>,
}

/// A point of the simplex: one weight for each objective of a reward model, in its order; their sum is one.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference(Vec<f32>);

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PreferenceError {
    #[error("a preference names at least one objective")]
    Empty,
    #[error("a preference names at most {OBJECTIVES_MAX} objectives, not {count}")]
    TooMany { count: usize },
    #[error("the name of an objective has 1 to {NAME_BYTES_MAX} bytes, not {bytes}")]
    Name { bytes: usize },
    #[error("objective \"{objective}\" is named twice")]
    Duplicate { objective: String },
    #[error("the weight of \"{objective}\" must be a finite number that is not negative, not {weight}")]
    Weight { objective: String, weight: f32 },
    #[error("the weights of a preference must not all be zero")]
    Zero,
    #[error("\"{part}\" is not of the form objective=weight")]
    Syntax { part: String },
    #[error("the weight of \"{objective}\" must be a number, not \"{text}\"")]
    Number { objective: String, text: String },
    #[error("unknown objective \"{objective}\"{}; known: {}", hint(nearest), known.join(", "))]
    Unknown { objective: String, nearest: Option<String>, known: Vec<String> },
}

fn hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|name| format!(" (did you mean \"{name}\"?)")).unwrap_or_default()
}

impl PreferenceSpec {
    pub fn new(weights: Vec<(String, f32)>) -> Result<Self, PreferenceError> {
        if weights.is_empty() {
            return Err(PreferenceError::Empty);
        }
        if weights.len() > OBJECTIVES_MAX {
            return Err(PreferenceError::TooMany { count: weights.len() });
        }
        for (index, (objective, weight)) in weights.iter().enumerate() {
            if objective.is_empty() || objective.len() > NAME_BYTES_MAX {
                return Err(PreferenceError::Name { bytes: objective.len() });
            }
            if weights[..index].iter().any(|(earlier, _)| earlier == objective) {
                return Err(PreferenceError::Duplicate { objective: objective.clone() });
            }
            if !(weight.is_finite() && *weight >= 0.0) {
                return Err(PreferenceError::Weight { objective: objective.clone(), weight: *weight });
            }
        }
        if weights.iter().all(|&(_, weight)| weight == 0.0) {
            return Err(PreferenceError::Zero);
        }
        Ok(Self { weights })
    }

    /// As stated, in the order stated.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f32)> {
        self.weights.iter().map(|(objective, weight)| (objective.as_str(), *weight))
    }

    /// On the simplex, in the order of `objectives`; those that are not named weigh nothing.
    pub fn resolve(&self, objectives: &[String]) -> Result<Preference, PreferenceError> {
        let mut resolved = vec![0.0; objectives.len()];
        // In f64, where the sum of 64 floats is finite and its rounding invisible.
        let sum: f64 = self.iter().map(|(_, weight)| f64::from(weight)).sum();
        for (objective, weight) in self.iter() {
            let Some(index) = objectives.iter().position(|known| known == objective) else {
                return Err(PreferenceError::Unknown {
                    objective: objective.to_owned(),
                    nearest: nearest(objective, objectives),
                    known: objectives.to_vec(),
                });
            };
            resolved[index] = (f64::from(weight) / sum) as f32;
        }
        Ok(Preference(resolved))
    }
}

/// `harmless=0.7,helpful=0.3`
impl FromStr for PreferenceSpec {
    type Err = PreferenceError;

    fn from_str(text: &str) -> Result<Self, PreferenceError> {
        let parts = text.split(',').filter(|part| !part.trim().is_empty());
        let weights = parts.map(|part| {
            let syntax = || PreferenceError::Syntax { part: part.trim().to_owned() };
            let (objective, text) = part.rsplit_once('=').ok_or_else(syntax)?;
            let (objective, text) = (objective.trim().to_owned(), text.trim().to_owned());
            match text.parse() {
                Ok(weight) => Ok((objective, weight)),
                Err(_) => Err(PreferenceError::Number { objective, text }),
            }
        });
        Self::new(weights.collect::<Result<_, _>>()?)
    }
}

impl Preference {
    pub fn weights(&self) -> &[f32] {
        &self.0
    }
}

/// The known name that is fewest edits away, if those are at most a third of its letters.
fn nearest(name: &str, known: &[String]) -> Option<String> {
    let near = |candidate: &&String| 3 * edits(name, candidate) <= candidate.chars().count().max(3);
    known.iter().filter(near).min_by_key(|candidate| edits(name, candidate)).cloned()
}

/// Insertions, deletions and substitutions between two names, letter case apart (Levenshtein).
fn edits(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_lowercase(), b.to_lowercase());
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.chars().count()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objectives() -> Vec<String> {
        ["helpful", "harmless", "humor"].map(String::from).to_vec()
    }

    #[test]
    fn a_preference_lands_on_the_simplex_in_the_models_order() {
        let spec: PreferenceSpec = "harmless=1.4, helpful=0.6".parse().unwrap();
        assert_eq!(spec.iter().collect::<Vec<_>>(), [("harmless", 1.4), ("helpful", 0.6)]);
        assert_eq!(spec.resolve(&objectives()).unwrap().weights(), [0.3, 0.7, 0.0]);
        let huge =
            PreferenceSpec::new(vec![("helpful".into(), f32::MAX), ("humor".into(), f32::MAX)]).unwrap();
        assert_eq!(huge.resolve(&objectives()).unwrap().weights(), [0.5, 0.0, 0.5]);
    }

    #[test]
    fn an_unknown_objective_is_answered_with_the_known_ones_and_the_nearest() {
        let spec: PreferenceSpec = "Harmles=1".parse().unwrap();
        assert_eq!(
            spec.resolve(&objectives()).unwrap_err().to_string(),
            "unknown objective \"Harmles\" (did you mean \"harmless\"?); known: helpful, harmless, humor"
        );
        let spec: PreferenceSpec = "brevity=1".parse().unwrap();
        assert_eq!(
            spec.resolve(&objectives()).unwrap_err().to_string(),
            "unknown objective \"brevity\"; known: helpful, harmless, humor"
        );
    }

    #[test]
    fn weights_that_mean_nothing_are_refused_by_name() {
        let refused = |text: &str| text.parse::<PreferenceSpec>().unwrap_err();
        assert_eq!(refused(""), PreferenceError::Empty);
        assert_eq!(refused("a=0,b=0"), PreferenceError::Zero);
        assert_eq!(refused("a=-1"), PreferenceError::Weight { objective: "a".into(), weight: -1.0 });
        assert!(matches!(refused("a=NaN"), PreferenceError::Weight { .. }));
        assert!(matches!(refused("a=inf"), PreferenceError::Weight { .. }));
        assert_eq!(refused("a=1,a=2"), PreferenceError::Duplicate { objective: "a".into() });
        assert_eq!(refused("a"), PreferenceError::Syntax { part: "a".into() });
        assert_eq!(refused("=1"), PreferenceError::Name { bytes: 0 });
        let many = (0..65).map(|i| (i.to_string(), 1.0)).collect();
        assert_eq!(PreferenceSpec::new(many), Err(PreferenceError::TooMany { count: 65 }));
    }
}
