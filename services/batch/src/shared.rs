//! A job that several processes share through the store: ranges of lines under leases, each finished once.
//!
//! Every process reads the same input, takes the next range that nobody has, and writes its answers as one file beside the
//! output. What a killed process had is taken by another when its lease ends. Who finds all ranges finished joins their
//! files to the output, which has the bytes of a job that was not shared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uniarm_cluster::{Claim, Claimed, Work};

use crate::{
    book::{Book, Rest},
    digest::hexadecimal,
    job::JobError,
    ledger::{Identity, LedgerError},
    output::Encoding,
    private,
};

/// Lines of a range: what the death of a process costs at most, times the ranges that it has. A multiple of what a
/// compressed output takes at once, so that ranges one after the other are the whole.
const RANGE_LINES: u64 = 256;

/// Ranges of a job; of a larger input they are longer.
const RANGES_MAX: u64 = 8192;

/// Name of the last piece: joining the others.
const WHOLE: &str = "whole";

/// Suffix of the folder beside the output where finished ranges wait for the others.
const FOLDER_SUFFIX: &str = ".ranges";

/// Bytes that are copied at once.
const COPY_BYTES: usize = 1 << 20;

/// What a shared job is; recorded by whoever comes first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    identity: Identity,
    lines: u64,
    range_lines: u64,
}

/// What is recorded of a finished range, or of the whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Finished {
    /// In the folder of ranges.
    file: String,
    requests: u64,
    failed: u64,
    bytes: u64,
    digest: String,
}

/// The book of one process.
pub struct Shared<'a> {
    work: &'a Work,
    output: PathBuf,
    encoding: Encoding,
    description: Description,
    /// Requests of a line.
    width: u64,
    finished: BTreeMap<u64, Finished>,
    /// Requests of finished ranges, and those of them that failed.
    done: u64,
    failed: u64,
    whole: Option<Finished>,
    held: BTreeMap<u64, Held>,
    /// The range of the last line that was asked for, and whether it is taken.
    decided: Option<(u64, bool)>,
}

/// A range that this process works on.
struct Held {
    claim: Claim,
    first: u64,
    requests: u64,
    /// All requests below are answered.
    below: u64,
    answers: BTreeMap<u64, Answer>,
}

struct Answer {
    failed: bool,
    line: String,
}

// === impl Shared ===

impl<'a> Shared<'a> {
    /// Joins a job, or begins it.
    pub async fn join(
        work: &'a Work,
        output: &Path,
        encoding: Encoding,
        identity: Identity,
        lines: u64,
    ) -> Result<Self, JobError> {
        let range_lines = RANGE_LINES * lines.div_ceil(RANGE_LINES * RANGES_MAX).max(1);
        let width = identity.requests / lines;
        let own = Description { identity, lines, range_lines };
        let bytes = serde_json::to_vec(&own).expect("strings and numbers");
        let (recorded, is_new) = work.describe(&bytes).await?;
        let description: Description = serde_json::from_slice(&recorded).map_err(|_| JobError::Unreadable)?;
        if let Some(what) = description.identity.difference(&own.identity) {
            return Err(JobError::OtherJob { what });
        }
        if is_new && output.exists() {
            return Err(LedgerError::Exists { path: output.to_owned() }.into());
        }
        let mut book = Self {
            work,
            output: output.to_owned(),
            encoding,
            description,
            width,
            finished: BTreeMap::new(),
            done: 0,
            failed: 0,
            whole: None,
            held: BTreeMap::new(),
            decided: None,
        };
        book.look().await?;
        if book.whole.is_some() && !output.exists() {
            return Err(JobError::Gone { output: output.to_owned() });
        }
        Ok(book)
    }

    pub fn is_finished(&self) -> bool {
        self.whole.is_some()
    }

    fn ranges(&self) -> u64 {
        self.description.lines.div_ceil(self.description.range_lines)
    }

    fn range_of(&self, number: u64) -> u64 {
        number / self.width / self.description.range_lines
    }

    fn folder(&self) -> PathBuf {
        let mut path = self.output.as_os_str().to_owned();
        path.push(FOLDER_SUFFIX);
        path.into()
    }

    /// Learns what others have done; returns what somebody works on.
    async fn look(&mut self) -> Result<BTreeSet<String>, JobError> {
        let state = self.work.state().await?;
        for (piece, record) in &state.finished {
            self.learn(piece, record)?;
        }
        Ok(state.claimed)
    }

    fn learn(&mut self, piece: &str, record: &[u8]) -> Result<(), JobError> {
        let finished: Finished = serde_json::from_slice(record).map_err(|_| JobError::Unreadable)?;
        if piece == WHOLE {
            self.whole = Some(finished);
        } else {
            self.count(piece.parse().map_err(|_| JobError::Unreadable)?, finished);
        }
        Ok(())
    }

    fn count(&mut self, range: u64, finished: Finished) {
        let (requests, failed) = (finished.requests, finished.failed);
        if self.finished.insert(range, finished).is_none() {
            self.done += requests;
            self.failed += failed;
        }
    }

    async fn claim(&mut self, range: u64) -> Result<bool, JobError> {
        if self.finished.contains_key(&range) {
            return Ok(false);
        }
        match self.work.claim(&name(range)).await? {
            Claimed::Others => Ok(false),
            Claimed::Finished(record) => self.learn(&name(range), &record).map(|()| false),
            Claimed::Mine(claim) => {
                let lines = self.description.range_lines;
                let first = range * lines * self.width;
                let end = ((range + 1) * lines).min(self.description.lines) * self.width;
                let held =
                    Held { claim, first, requests: end - first, below: first, answers: BTreeMap::new() };
                self.held.insert(range, held);
                Ok(true)
            }
        }
    }

    /// Writes the file of a complete range, and records it; unless another process has the range by now.
    async fn hand_over(&mut self, range: u64, held: Held) -> Result<(), JobError> {
        let Held { mut claim, answers, requests, .. } = held;
        let failed = answers.values().filter(|answer| answer.failed).count() as u64;
        let lines: Vec<String> = answers.into_values().map(|answer| answer.line).collect();
        let mut bytes = Vec::new();
        for block in lines.chunks(self.encoding.block_lines() as usize) {
            bytes.extend(self.encoding.encode(block.iter().map(String::as_str)));
        }
        // Of one claim: a process that lost the range writes into no other's file.
        let file = format!("{}-{}", name(range), claim.revision());
        let path = self.folder().join(&file);
        write_file(&path, &bytes).map_err(|source| refused(&path, source))?;
        let digest = hexadecimal(&Sha256::digest(&bytes));
        let finished = Finished { file, requests, failed, bytes: bytes.len() as u64, digest };
        let record = serde_json::to_vec(&finished).expect("strings and numbers");
        while !self.work.finish(&claim, &record).await? {
            // The lease ended meanwhile. What was answered is as good as before, if nobody else has begun.
            match self.work.claim(&name(range)).await? {
                Claimed::Mine(again) => claim = again,
                other => {
                    // Nobody asks for it: a failure leaves a file, no wrong answer.
                    let _ = std::fs::remove_file(&path);
                    if let Claimed::Finished(record) = other {
                        self.learn(&name(range), &record)?;
                    }
                    return Ok(());
                }
            }
        }
        self.count(range, finished);
        Ok(())
    }

    /// Joins the files of all ranges to the output. False: another process has that to do.
    async fn join_ranges(&mut self) -> Result<bool, JobError> {
        let claim = match self.work.claim(WHOLE).await? {
            Claimed::Others => return Ok(false),
            Claimed::Finished(record) => return self.learn(WHOLE, &record).map(|()| true),
            Claimed::Mine(claim) => claim,
        };
        let mut fresh = self.output.as_os_str().to_owned();
        fresh.push(format!(".{}", claim.revision()));
        let fresh = PathBuf::from(fresh);
        let joined = tokio::task::block_in_place(|| self.copy_ranges(&fresh));
        let finished = joined.inspect_err(|_| drop(std::fs::remove_file(&fresh)))?;
        std::fs::rename(&fresh, &self.output).map_err(|source| refused(&self.output, source))?;
        let record = serde_json::to_vec(&finished).expect("strings and numbers");
        if !self.work.finish(&claim, &record).await? {
            // Whoever has it now joins the same files to the same bytes.
            return Ok(false);
        }
        self.whole = Some(finished);
        // The output has it all; what stays behind is in nobody's way.
        let _ = std::fs::remove_dir_all(self.folder());
        Ok(true)
    }

    fn copy_ranges(&self, fresh: &Path) -> Result<Finished, JobError> {
        let failed = |source| refused(fresh, source);
        let mut output = File::create(fresh).map_err(failed)?;
        let (mut whole, mut digest) = (Finished::default(), Sha256::new());
        let mut buffer = vec![0; COPY_BYTES];
        for range in self.finished.values() {
            let path = self.folder().join(&range.file);
            let mut file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(JobError::Elsewhere { path });
                }
                opened => opened.map_err(|source| refused(&path, source))?,
            };
            let mut own = Sha256::new();
            loop {
                let read = file.read(&mut buffer).map_err(|source| refused(&path, source))?;
                if read == 0 {
                    break;
                }
                own.update(&buffer[..read]);
                digest.update(&buffer[..read]);
                output.write_all(&buffer[..read]).map_err(failed)?;
            }
            if hexadecimal(&own.finalize()) != range.digest {
                return Err(JobError::Damaged { path });
            }
            whole.requests += range.requests;
            whole.failed += range.failed;
            whole.bytes += range.bytes;
        }
        output.sync_all().map_err(failed)?;
        whole.digest = hexadecimal(&digest.finalize());
        Ok(whole)
    }
}

impl Book for Shared<'_> {
    async fn takes(&mut self, line: u64) -> Result<bool, JobError> {
        let range = line / self.description.range_lines;
        if line >= self.description.lines {
            return Ok(false); // the input grew meanwhile, which its digest tells in the end
        }
        if self.decided.is_none_or(|(decided, _)| decided != range) {
            let is_taken = self.claim(range).await?;
            self.decided = Some((range, is_taken));
        }
        Ok(self.decided.is_some_and(|(_, is_taken)| is_taken))
    }

    fn first_number(&self, line: u64) -> u64 {
        line * self.width
    }

    fn is_done(&self, number: u64) -> bool {
        self.held.get(&self.range_of(number)).is_none_or(|held| held.answers.contains_key(&number))
    }

    fn oldest(&self) -> Option<u64> {
        self.held.values().next().map(|held| held.below)
    }

    fn record(&mut self, number: u64, failed: bool, line: String) -> Result<(), JobError> {
        let range = self.range_of(number);
        if let Some(held) = self.held.get_mut(&range) {
            held.answers.insert(number, Answer { failed, line });
            while held.answers.contains_key(&held.below) {
                held.below += 1;
            }
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), JobError> {
        while let Some(range) =
            self.held.iter().find_map(|(range, held)| held.is_complete().then_some(*range))
        {
            let Some(held) = self.held.remove(&range) else { return Ok(()) };
            self.hand_over(range, held).await?;
        }
        Ok(())
    }

    async fn rest(&mut self) -> Result<Rest, JobError> {
        self.decided = None;
        let claimed = self.look().await?;
        if self.whole.is_some() {
            return Ok(Rest::Done);
        }
        if self.finished.len() as u64 == self.ranges() {
            return Ok(if self.join_ranges().await? { Rest::Done } else { Rest::Wait });
        }
        let is_free = |range: &u64| !self.finished.contains_key(range) && !claimed.contains(&name(*range));
        Ok(if (0..self.ranges()).any(|range| is_free(&range)) { Rest::Again } else { Rest::Wait })
    }

    fn done(&self) -> u64 {
        self.done + self.held.values().map(|held| held.answers.len() as u64).sum::<u64>()
    }

    fn failed(&self) -> u64 {
        let own = self.held.values().flat_map(|held| held.answers.values());
        self.failed + own.filter(|answer| answer.failed).count() as u64
    }
}

// === impl Held ===

impl Held {
    fn is_complete(&self) -> bool {
        self.below == self.first + self.requests
    }
}

/// A range as keys and files are named: in the order of the ranges.
fn name(range: u64) -> String {
    format!("{range:06}")
}

fn refused(path: &Path, source: io::Error) -> JobError {
    LedgerError::Output { path: path.to_owned(), source }.into()
}

/// The whole file, safe from a power cut when it is recorded.
fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        private::make_folder(folder)?;
    }
    private::write(path, bytes)
}

#[cfg(test)]
mod tests;
