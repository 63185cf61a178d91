//! Answers on disk: a line each, with a checksum, appended as they come.
//!
//! A line that a crash tore, or that a disk changed, is not an answer: it is counted, named and asked again.

use std::{collections::HashMap, path::Path};

use uniarm_batch::{AppendLog, LogError, checksum};

use super::{Answer, Key};

/// Answers that a power cut may cost.
const SYNC_ANSWERS: usize = 64;

/// All answers of a job, in memory and on disk.
#[derive(Debug)]
pub struct Journal {
    log: AppendLog,
    answers: HashMap<Key, Answer>,
    /// Numbers of lines that were no answers.
    damaged: Vec<usize>,
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: Key,
    answer: Answer,
    check: String,
}

// === impl Journal ===

impl Journal {
    /// Opens or makes the journal, and holds it until it is dropped.
    ///
    /// # Errors
    /// When another process holds it, or the file system refuses.
    pub fn open(path: &Path) -> Result<Self, LogError> {
        let (log, content) = AppendLog::open(path, SYNC_ANSWERS)?;
        let (answers, damaged) = read_lines(&content);
        Ok(Self { log, answers, damaged })
    }

    pub fn path(&self) -> &Path {
        self.log.path()
    }

    pub fn get(&self, key: &Key) -> Option<&Answer> {
        self.answers.get(key)
    }

    pub fn len(&self) -> usize {
        self.answers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Numbers of lines that were no answers and will be asked again.
    pub fn damaged(&self) -> &[usize] {
        &self.damaged
    }

    pub(super) fn append(&mut self, key: &Key, answer: Answer) -> Result<(), LogError> {
        let check = check(key, &answer);
        let line = Line { key: key.clone(), answer, check };
        let mut bytes = serde_json::to_vec(&line).expect("strings and numbers");
        bytes.push(b'\n');
        self.log.append(&bytes)?;
        self.answers.insert(line.key, line.answer);
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), LogError> {
        self.log.sync()
    }
}

fn read_lines(bytes: &[u8]) -> (HashMap<Key, Answer>, Vec<usize>) {
    let mut answers = HashMap::new();
    let mut damaged = Vec::new();
    for (index, bytes) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        match serde_json::from_slice::<Line>(bytes) {
            Ok(line) if line.check == check(&line.key, &line.answer) => {
                answers.insert(line.key, line.answer);
            }
            _ => damaged.push(index + 1),
        }
    }
    (answers, damaged)
}

fn check(key: &Key, answer: &Answer) -> String {
    checksum(&serde_json::to_vec(&(key, answer)).expect("strings and numbers"))
}
