//! What a job has done, so that a kill at any byte costs only what was in flight.
//!
//! Each finished line goes into a journal, with a checksum, and then into the output at its place. The journal is the
//! truth; the output is compared with it when a job goes on, cut where they part, and written again from there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    append_log::{AppendLog, LogError, open_locked},
    digest::checksum,
    output::{Encoding, Order},
};

/// A journal of so many bytes is written anew without what the output has.
const JOURNAL_BYTES_MAX: u64 = 16 << 20;

/// Suffix of the journal beside the output.
const SUFFIX: &str = ".checkpoint";

/// What a journal is good for: another input, or other flags, would be another job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Digest of all lines.
    pub input: String,
    pub requests: u64,
    /// What else decides the output, by the name of its flag.
    pub settings: BTreeMap<String, String>,
}

/// The state of a job on disk.
pub struct Ledger {
    path: PathBuf,
    output: File,
    encoding: Encoding,
    order: Order,
    identity: Identity,
    journal: AppendLog,
    /// The journal is written anew at this size.
    compact_at: u64,
    /// Requests that are in the journal or in the output.
    done: Numbers,
    failed: u64,
    /// Finished lines that are not in the output yet, by their place there.
    pending: BTreeMap<u64, Finished>,
    /// Lines in the output, and their bytes.
    written: u64,
    bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("{}: {source}; what is done is kept, make room or correct the path and repeat the command", path.display())]
    Output { path: PathBuf, source: io::Error },
    #[error("{} is there already, and nothing says that this job wrote it; name another --output, or remove it", path.display())]
    Exists { path: PathBuf },
    #[error("{what} changed since {} was begun; restore it, name another --output, or remove the output and its checkpoint", path.display())]
    Changed { what: String, path: PathBuf },
    #[error("{} has {bytes} bytes, and its checkpoint says that it had {expected}; restore it, or remove both", path.display())]
    Shorter { path: PathBuf, bytes: u64, expected: u64 },
}

/// A set of numbers that is nearly all of 0..n.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Numbers {
    /// All below are in it.
    below: u64,
    beyond: BTreeSet<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    /// The first line of a journal.
    Begin(Begin),
    Finished(Finished),
}

/// What the output had when the journal was written anew.
#[derive(Serialize, Deserialize)]
struct Begin {
    identity: Identity,
    done: Numbers,
    failed: u64,
    written: u64,
    bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Finished {
    number: u64,
    failed: bool,
    line: String,
}

// === impl Ledger ===

impl Ledger {
    /// Begins a job, or goes on with it where its last life ended. Other processes are kept out until it is dropped.
    ///
    /// # Errors
    /// When the output is another job's, the input or the flags changed, or the file system refuses.
    pub fn open(
        path: &Path,
        identity: Identity,
        order: Order,
        encoding: Encoding,
    ) -> Result<Self, LedgerError> {
        let failed = |source| LedgerError::Output { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        // Its user named it, for whoever the umask lets read it.
        let output = open_locked(path, OpenOptions::new())?;
        let length = output.metadata().map_err(failed)?.len();
        let (mut journal, content) = AppendLog::open(&journal_path(path), usize::MAX)?;
        let mut records = content.split_inclusive(|byte| *byte == b'\n').filter_map(read_record);
        let begin = match records.next() {
            Some(Record::Begin(begin)) => begin,
            _ if length > 0 => return Err(LedgerError::Exists { path: path.to_owned() }),
            _ => {
                let identity = identity.clone();
                let begin = Begin { identity, done: Numbers::default(), failed: 0, written: 0, bytes: 0 };
                let record = Record::Begin(begin);
                journal.append(&write_record(&record))?;
                let Record::Begin(begin) = record else { unreachable!("it was made above") };
                begin
            }
        };
        if let Some(what) = begin.identity.difference(&identity) {
            return Err(LedgerError::Changed { what, path: path.to_owned() });
        }
        if length < begin.bytes {
            return Err(LedgerError::Shorter { path: path.to_owned(), bytes: length, expected: begin.bytes });
        }
        let Begin { done, failed, written, bytes, .. } = begin;
        let compact_at = journal.bytes() + JOURNAL_BYTES_MAX;
        let pending = BTreeMap::new();
        let path = path.to_owned();
        let mut ledger = Self {
            path,
            output,
            encoding,
            order,
            identity,
            journal,
            compact_at,
            done,
            failed,
            pending,
            written,
            bytes,
        };
        for record in records {
            if let Record::Finished(finished) = record {
                ledger.take(finished);
            }
        }
        ledger.compare_output()?;
        ledger.flush()?;
        Ok(ledger)
    }

    pub fn is_done(&self, number: u64) -> bool {
        self.done.contains(number)
    }

    /// All requests below are done.
    pub fn done_below(&self) -> u64 {
        self.done.below
    }

    pub fn done(&self) -> u64 {
        self.done.len()
    }

    /// Of these, the ones that ended with an error.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// # Errors
    /// When the file system refuses.
    pub fn record(&mut self, number: u64, failed: bool, line: String) -> Result<(), LedgerError> {
        let record = Record::Finished(Finished { number, failed, line });
        self.journal.append(&write_record(&record))?;
        let Record::Finished(finished) = record else { unreachable!("it was made above") };
        self.take(finished);
        self.flush()?;
        if self.journal.bytes() >= self.compact_at {
            self.compact()?;
        }
        Ok(())
    }

    /// Makes everything safe from a power cut.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn close(&mut self) -> Result<(), LedgerError> {
        self.compact()
    }

    fn take(&mut self, finished: Finished) {
        if !self.done.insert(finished.number) {
            return;
        }
        self.failed += u64::from(finished.failed);
        let place = match self.order {
            Order::Input => finished.number,
            Order::Finished => self.written + self.pending.len() as u64,
        };
        self.pending.insert(place, finished);
    }

    /// The bytes of the next block of lines, if all its lines are there, and how many they are.
    fn next_block(&self) -> Option<(Vec<u8>, u64)> {
        let end = self.identity.requests.min(self.written + self.encoding.block_lines());
        let count = end - self.written;
        let block = self.pending.range(self.written..end);
        if count == 0 || block.clone().count() as u64 != count {
            return None;
        }
        Some((self.encoding.encode(block.map(|(_, finished)| finished.line.as_str())), count))
    }

    fn leave(&mut self, bytes: u64, lines: u64) {
        self.bytes += bytes;
        self.written += lines;
        self.pending = self.pending.split_off(&self.written);
    }

    /// Finds how much of the output is what the journal says, and cuts off the rest.
    fn compare_output(&mut self) -> Result<(), LedgerError> {
        self.output.seek(SeekFrom::Start(self.bytes)).map_err(|source| self.refused(source))?;
        while let Some((block, lines)) = self.next_block() {
            let mut there = Vec::with_capacity(block.len());
            let read = (&self.output).take(block.len() as u64).read_to_end(&mut there);
            read.map_err(|source| self.refused(source))?;
            if there != block {
                break;
            }
            self.leave(block.len() as u64, lines);
        }
        self.output.set_len(self.bytes).map_err(|source| self.refused(source))?;
        self.output.seek(SeekFrom::Start(self.bytes)).map_err(|source| self.refused(source))?;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LedgerError> {
        while let Some((block, lines)) = self.next_block() {
            self.output.write_all(&block).map_err(|source| self.refused(source))?;
            self.leave(block.len() as u64, lines);
        }
        Ok(())
    }

    /// Writes the journal anew, without the lines that the output has for certain.
    fn compact(&mut self) -> Result<(), LedgerError> {
        self.output.sync_data().map_err(|source| self.refused(source))?;
        let mut done = self.done.clone();
        let mut failed = self.failed;
        for finished in self.pending.values() {
            done.remove(finished.number);
            failed -= u64::from(finished.failed);
        }
        let path = journal_path(&self.path);
        let mut fresh = path.clone().into_os_string();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        // One that a crash left behind is nobody's.
        let _ = std::fs::remove_file(&fresh);
        let (mut journal, _) = AppendLog::open(&fresh, usize::MAX)?;
        let (identity, written, bytes) = (self.identity.clone(), self.written, self.bytes);
        journal.append(&write_record(&Record::Begin(Begin { identity, done, failed, written, bytes })))?;
        for finished in self.pending.values() {
            let Finished { number, failed, line } = finished;
            let finished = Finished { number: *number, failed: *failed, line: line.clone() };
            journal.append(&write_record(&Record::Finished(finished)))?;
        }
        journal.sync()?;
        std::fs::rename(&fresh, &path).map_err(|source| self.refused(source))?;
        self.compact_at = 2 * journal.bytes() + JOURNAL_BYTES_MAX;
        self.journal = journal;
        Ok(())
    }

    fn refused(&self, source: io::Error) -> LedgerError {
        LedgerError::Output { path: self.path.clone(), source }
    }
}

/// The journal of the job that writes this output.
pub fn journal_path(output: &Path) -> PathBuf {
    let mut path = output.as_os_str().to_owned();
    path.push(SUFFIX);
    path.into()
}

/// Finished lines that the output of a job in [`Order::Input`] does not have, because one before them is not there; in
/// order. `written`: whole lines of that output.
///
/// # Errors
/// When the journal cannot be read; none is no error.
pub fn waiting(output: &Path, written: u64) -> io::Result<Vec<String>> {
    let file = match File::open(journal_path(output)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = BTreeMap::new();
    for line in BufReader::new(file).split(b'\n') {
        if let Some(Record::Finished(finished)) = read_record(&line?)
            && finished.number >= written
        {
            found.insert(finished.number, finished.line);
        }
    }
    Ok(found.into_values().collect())
}

/// A checksum, a space, and the record.
fn write_record(record: &Record) -> Vec<u8> {
    let text = serde_json::to_string(record).expect("strings, numbers and lists");
    format!("{} {text}\n", checksum(text.as_bytes())).into_bytes()
}

/// None: a crash tore the line, or a disk changed it; what it said is asked again.
fn read_record(line: &[u8]) -> Option<Record> {
    let (check, text) = std::str::from_utf8(line).ok()?.trim_end_matches('\n').split_once(' ')?;
    if check != checksum(text.as_bytes()) {
        return None;
    }
    serde_json::from_str(text).ok()
}

// === impl Identity ===

impl Identity {
    /// What of the other is not the same, for a sentence.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if (&self.input, self.requests) != (&now.input, now.requests) && self.settings == now.settings {
            return Some("the input".to_owned());
        }
        let names = self.settings.keys().chain(now.settings.keys());
        let changed = |name: &&String| self.settings.get(*name) != now.settings.get(*name);
        if let Some(name) = names.clone().find(changed) {
            return Some(format!("what {name} says"));
        }
        None
    }
}

// === impl Numbers ===

impl Numbers {
    fn contains(&self, number: u64) -> bool {
        number < self.below || self.beyond.contains(&number)
    }

    fn len(&self) -> u64 {
        self.below + self.beyond.len() as u64
    }

    /// False: it was there.
    fn insert(&mut self, number: u64) -> bool {
        if number < self.below || !self.beyond.insert(number) {
            return false;
        }
        while self.beyond.remove(&self.below) {
            self.below += 1;
        }
        true
    }

    fn remove(&mut self, number: u64) {
        if number < self.below {
            self.beyond.extend(number + 1..self.below);
            self.below = number;
        } else {
            self.beyond.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests;
