//! Answers on disk: a line each, with a checksum, appended as they come.
//!
//! A line that a crash tore, or that a disk changed, is not an answer: it is counted, named and asked again.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};

use super::{Answer, Key, hexadecimal};

/// Answers that a power cut may cost.
const SYNC_ANSWERS: usize = 64;

/// And seconds of work that it may cost.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// Bytes of a checksum: it finds torn and rotten lines, it is no defence against a forger.
const CHECK_BYTES: usize = 4;

/// All answers of a job, in memory and on disk.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    answers: HashMap<Key, Answer>,
    unsynced: usize,
    synced: Instant,
    /// Numbers of lines that were no answers.
    damaged: Vec<usize>,
}

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{}: {source}; the answers before are kept, make room or correct the path and repeat the command", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is in use by another process that works on the same job; wait for it or stop it", path.display())]
    Busy { path: PathBuf },
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
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let failed = |source| JournalError::File { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = options.map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        // What follows the last line end was being written when its process died.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).map_err(failed)?;
        file.seek(SeekFrom::Start(whole as u64)).map_err(failed)?;
        let (answers, damaged) = read_lines(&bytes[..whole]);
        Ok(Self { path: path.to_owned(), file, answers, unsynced: 0, synced: Instant::now(), damaged })
    }

    pub fn path(&self) -> &Path {
        &self.path
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

    pub(super) fn append(&mut self, key: &Key, answer: Answer) -> Result<(), JournalError> {
        let check = checksum(key, &answer);
        let line = Line { key: key.clone(), answer: answer.clone(), check };
        let mut bytes = serde_json::to_vec(&line).expect("strings and numbers");
        bytes.push(b'\n');
        self.file.write_all(&bytes).map_err(|source| self.failed(source))?;
        self.answers.insert(key.clone(), answer);
        self.unsynced += 1;
        if self.unsynced >= SYNC_ANSWERS || self.synced.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), JournalError> {
        self.file.sync_data().map_err(|source| self.failed(source))?;
        self.unsynced = 0;
        self.synced = Instant::now();
        Ok(())
    }

    fn failed(&self, source: io::Error) -> JournalError {
        JournalError::File { path: self.path.clone(), source }
    }
}

fn read_lines(bytes: &[u8]) -> (HashMap<Key, Answer>, Vec<usize>) {
    let mut answers = HashMap::new();
    let mut damaged = Vec::new();
    for (index, bytes) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        match serde_json::from_slice::<Line>(bytes) {
            Ok(line) if line.check == checksum(&line.key, &line.answer) => {
                answers.insert(line.key, line.answer);
            }
            _ => damaged.push(index + 1),
        }
    }
    (answers, damaged)
}

fn checksum(key: &Key, answer: &Answer) -> String {
    let bytes = serde_json::to_vec(&(key, answer)).expect("strings and numbers");
    hexadecimal(&Sha256::digest(bytes)[..CHECK_BYTES])
}
