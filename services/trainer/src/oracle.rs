//! Oracles: what an answer is worth to one objective, as a number (docs/oracles.md).
//!
//! An oracle judges, it does not steer: it labels training pairs and scores what a cluster wrote. Nothing here is on a
//! token's path.

// Blank lines keep the modules in reading order: rustfmt sorts neighbours.
mod text;

mod vader;

mod ngram;

mod minimise;

pub mod fit;

pub mod relabel;

pub mod answers;

mod command;

mod encoder;

mod classifier;

use std::path::PathBuf;

use uniarm_model::Message;

pub use classifier::Classifier;
pub use command::Program;
pub use ngram::Ngram;
pub use text::{Brevity, Profanity, Readability};
pub use vader::Vader;

/// Every form that [`open`] knows.
const FORMS: &str = "vader, brevity, readability, profanity, ngram:FILE, classifier:FOLDER[#LABEL], \
    command:PROGRAM ARGUMENTS";

/// Answers that an oracle sees at once: a program starts once for so many, and a bar moves every few seconds.
const PART: usize = 512;

/// An answer to be judged.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The conversation that it answers, ending with the user.
    pub messages: &'a [Message],
    pub response: &'a str,
}

/// A judge of answers.
pub trait Oracle: Send {
    /// As people would name what it likes: `vader`, `brevity`, the name of an objective.
    fn name(&self) -> &str;

    /// One finite number for each answer, higher is better. The score of an answer does not depend on the others.
    ///
    /// # Errors
    /// Where a program or a model fails, or gives what is not a finite number.
    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError>;
}

/// Why there is no score.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    #[error("oracle \"{spec}\": {reason}; known: {FORMS}")]
    Unknown { spec: String, reason: String },
    #[error("{}: {source}", .file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("{}: {reason}", .file.display())]
    Malformed { file: PathBuf, reason: String },
    #[error("program \"{program}\": {reason}")]
    Program { program: String, reason: String },
    #[error("{}: {reason}", .folder.display())]
    Classifier { folder: PathBuf, reason: String },
}

/// Scores in parts, so that a bar moves and no batch is unbounded; `progress` gets the number of answers done.
///
/// # Errors
/// The oracle's.
pub fn score_in_parts(
    oracle: &mut dyn Oracle,
    answers: &[Answer<'_>],
    mut progress: impl FnMut(usize),
) -> Result<Vec<f64>, OracleError> {
    let mut scores = Vec::with_capacity(answers.len());
    for part in answers.chunks(PART) {
        scores.extend(oracle.score(part)?);
        progress(scores.len());
    }
    Ok(scores)
}

/// The oracle that a specification names: see [`FORMS`] and docs/oracles.md.
///
/// # Errors
/// [`OracleError::Unknown`] for other words; what is wrong with a file, a folder or a program.
pub fn open(spec: &str) -> Result<Box<dyn Oracle>, OracleError> {
    let (kind, argument) = spec.split_once(':').map_or((spec, None), |(kind, rest)| (kind, Some(rest)));
    let unknown = |reason: &str| OracleError::Unknown { spec: spec.to_owned(), reason: reason.to_owned() };
    match (kind, argument) {
        ("vader", None) => Ok(Box::new(Vader::new())),
        ("brevity", None) => Ok(Box::new(Brevity)),
        ("readability", None) => Ok(Box::new(Readability)),
        ("profanity", None) => Ok(Box::new(Profanity)),
        ("ngram", Some(file)) => Ok(Box::new(Ngram::read(file.as_ref())?)),
        ("classifier", Some(folder)) => Ok(Box::new(Classifier::open(folder)?)),
        ("command", Some(line)) => match Program::new(line) {
            Some(program) => Ok(Box::new(program)),
            None => Err(unknown("names no program")),
        },
        ("ngram" | "classifier" | "command", None) => Err(unknown("wants an argument after a colon")),
        ("vader" | "brevity" | "readability" | "profanity", Some(_)) => Err(unknown("takes no argument")),
        _ => Err(unknown("there is no such oracle")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifications_name_oracles_or_say_what_is_known() {
        assert_eq!(open("brevity").unwrap().name(), "brevity");
        assert_eq!(open("command:cat -").unwrap().name(), "cat");
        let reason = |spec: &str| open(spec).err().unwrap().to_string();
        assert!(
            reason("vadr").starts_with("oracle \"vadr\": there is no such oracle; known: vader, brevity")
        );
        assert!(reason("vader:x").contains("takes no argument"));
        assert!(reason("ngram").contains("wants an argument after a colon"));
        assert!(reason("command:  ").contains("names no program"));
        assert!(reason("ngram:/no/such/file").starts_with("/no/such/file: No such file"));
    }

    #[test]
    fn scores_in_parts_are_the_scores_of_all() {
        let texts: Vec<String> = (0..PART + 5).map(|words| "word ".repeat(words)).collect();
        let answers: Vec<Answer<'_>> =
            texts.iter().map(|response| Answer { messages: &[], response }).collect();
        let mut seen = Vec::new();
        let scores = score_in_parts(&mut Brevity, &answers, |done| seen.push(done)).unwrap();
        assert_eq!(scores, Brevity.score(&answers).unwrap());
        assert_eq!(seen, [PART, PART + 5]);
    }
}
