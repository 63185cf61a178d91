//! The files of a chain, and the thread that writes them: a record is on the disk before its request is answered for.
//!
//! Files have a bound, and numbers in the order of the chain: `000001.jsonl`, `000002.jsonl`, … Whole files may be moved
//! away; the chain of those that stay begins with the hash that the last of the others ended with.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use uniarm_batch::{AppendLog, LogError, make_private_folder};
use uniarm_proto::Refusal;
use uniarm_runtime::{
    Metrics,
    prometheus_client::metrics::{counter::Counter, gauge::Gauge},
};

use super::{
    chain::{ChainError, GENESIS, Hash, Link, forge},
    record::Record,
};

/// Records that wait for the disk. Requests that end in another way than well do not wait for their record: what finds
/// no room is lost, logged and counted.
const WAITING_MAX: usize = 1024;

/// Bytes after which a file is followed by the next one.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// The writer says itself when what it has written must be on the disk.
const UNSYNCED_MAX: usize = usize::MAX;

/// After a failed write new requests are refused for so long; then one may try.
const REFUSE_FOR: Duration = Duration::from_secs(5);

/// Clones write the same chain.
#[derive(Debug, Clone)]
pub struct Journal {
    records: mpsc::Sender<Waiting>,
    trouble: Trouble,
    metrics: JournalMetrics,
}

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{}: {source}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("{}, line {line}: {source}; nothing is appended to a chain that is broken: keep the folder, and give another one", path.display())]
    Broken { path: PathBuf, line: usize, source: ChainError },
}

#[derive(Debug, Clone)]
struct JournalMetrics {
    written: Counter,
    unwritable: Gauge,
    lost: Counter,
}

/// When the last record that somebody waited for could not be written. Why is in the log: it names paths.
type Trouble = Arc<Mutex<Option<Instant>>>;

/// It could not be written.
#[derive(Debug)]
struct Unwritten;

struct Waiting {
    record: String,
    written: oneshot::Sender<Result<Hash, Unwritten>>,
}

struct Writer {
    folder: PathBuf,
    file_bytes_max: u64,
    number: u64,
    /// `None`: writing failed, and the file is to be opened again.
    log: Option<AppendLog>,
    last: Hash,
    metrics: JournalMetrics,
}

// === impl Journal ===

impl Journal {
    /// Goes on with the chain in `folder`, or begins one, and starts the thread that writes it. Without a folder there is
    /// none, and its metrics say so.
    ///
    /// # Errors
    /// When the folder cannot be used, another process writes there, or the last file's chain is broken.
    pub fn open(folder: Option<&Path>, metrics: &Metrics) -> Result<Option<Self>, JournalError> {
        let metrics = JournalMetrics::new(metrics);
        folder.map(|folder| Self::in_files_of(FILE_BYTES_MAX, folder, metrics)).transpose()
    }

    fn in_files_of(
        file_bytes_max: u64,
        folder: &Path,
        metrics: JournalMetrics,
    ) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Folder { path: folder.to_owned(), source };
        make_private_folder(folder).map_err(failed)?;
        let number = files(folder).map_err(failed)?.last().map_or(1, |(number, _)| *number);
        let folder = folder.to_owned();
        let mut writer =
            Writer { folder, file_bytes_max, number, log: None, last: GENESIS, metrics: metrics.clone() };
        writer.open()?;
        let (records, waiting) = mpsc::channel(WAITING_MAX);
        let thread = std::thread::Builder::new().name("audit-journal".into());
        let path = writer.folder.clone();
        let failed = |source| JournalError::Folder { path, source };
        thread.spawn(move || writer.run(waiting)).map_err(failed)?;
        Ok(Self { records, trouble: Trouble::default(), metrics })
    }

    /// Whether a request whose record must be kept may begin.
    ///
    /// # Errors
    /// When the last record could not be written, a moment ago.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        match *self.trouble.lock() {
            Some(since) if since.elapsed() < REFUSE_FOR => {
                let message = "audit: records of requests cannot be kept at present, and this one wants one; try again later";
                Err(Refusal::unavailable("audit_unwritable", message))
            }
            _ => Ok(()),
        }
    }

    /// The record's hash, once it is on the disk.
    ///
    /// # Errors
    /// When it could not be written.
    pub(crate) async fn append(&self, record: &Record) -> Result<Hash, Refusal> {
        let (waiting, written) = Waiting::new(record);
        let gone = || Refusal::internal("audit: the thread that writes records has ended");
        self.records.send(waiting).await.map_err(|_| gone())?;
        let result = written.await.map_err(|_| gone())?;
        *self.trouble.lock() = result.is_err().then(Instant::now);
        result.map_err(|Unwritten| {
            Refusal::internal("audit: the record of this request could not be kept; try again later")
        })
    }

    /// Hands a record over without waiting: nobody is there any more who would.
    pub(crate) fn leave(&self, record: &Record) {
        if self.records.try_send(Waiting::new(record).0).is_err() {
            self.metrics.lost.inc();
            tracing::error!(request = record.request_id, "a record of a request is lost: the disk is behind");
        }
    }
}

// === impl JournalMetrics ===

impl JournalMetrics {
    fn new(metrics: &Metrics) -> Self {
        let metrics = metrics.scope("router");
        Self {
            written: metrics.counter("audit_records", "Records of requests written"),
            unwritable: metrics.gauge("audit_unwritable", "1 while records of requests cannot be written"),
            lost: metrics.counter("audit_lost", "Records of requests that ended badly and found no room"),
        }
    }
}

// === impl Waiting ===

impl Waiting {
    fn new(record: &Record) -> (Self, oneshot::Receiver<Result<Hash, Unwritten>>) {
        let record = serde_json::to_string(record).expect("strings, numbers and lists of them");
        let (written, receiver) = oneshot::channel();
        (Self { record, written }, receiver)
    }
}

// === impl Writer ===

impl Writer {
    /// Until the last journal is dropped. What waits is written together, and synced once.
    fn run(mut self, mut waiting: mpsc::Receiver<Waiting>) {
        let mut batch = Vec::new();
        while waiting.blocking_recv_many(&mut batch, WAITING_MAX) > 0 {
            let before = self.last;
            let written = self.write(&batch);
            match &written {
                Ok(_) => {
                    self.metrics.written.inc_by(batch.len() as u64);
                    self.metrics.unwritable.set(0);
                }
                Err(error) => {
                    tracing::error!(%error, "records of requests cannot be written");
                    (self.log, self.last) = (None, before);
                    self.metrics.unwritable.set(1);
                }
            }
            for (index, Waiting { written: reply, .. }) in batch.drain(..).enumerate() {
                // Who has hung up does not wait for it.
                let _ = reply.send(written.as_ref().map(|hashes| hashes[index]).map_err(|_| Unwritten));
            }
        }
    }

    fn write(&mut self, batch: &[Waiting]) -> Result<Vec<Hash>, JournalError> {
        let mut hashes = Vec::with_capacity(batch.len());
        if self.log.is_none() {
            self.open()?;
        }
        for Waiting { record, .. } in batch {
            let log = self.log.as_mut().expect("it was opened");
            if log.bytes() >= self.file_bytes_max {
                log.sync()?;
                self.number += 1;
                self.log = Some(AppendLog::open(&path(&self.folder, self.number), UNSYNCED_MAX)?.0);
            }
            let (line, hash) = forge(&self.last, record);
            self.log.as_mut().expect("it was opened").append(line.as_bytes())?;
            self.last = hash;
            hashes.push(hash);
        }
        self.log.as_mut().expect("it was opened").sync()?;
        Ok(hashes)
    }

    /// The last file, whose chain is checked; what a crash left of a line is cut off.
    fn open(&mut self) -> Result<(), JournalError> {
        let file = path(&self.folder, self.number);
        let (log, content) = AppendLog::open(&file, UNSYNCED_MAX)?;
        let broken = |line, source| JournalError::Broken { path: file.clone(), line, source };
        let mut last = None;
        for (index, line) in
            content.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty())
        {
            let text = std::str::from_utf8(line).map_err(|_| broken(index + 1, ChainError::Form))?;
            let link = Link::read(text, last.as_ref()).map_err(|error| broken(index + 1, error))?;
            last = Some(link.hash);
        }
        if last.is_none() && self.number > 1 && path(&self.folder, self.number - 1).exists() {
            // It was begun and nothing was written: the chain ends in the one before.
            self.number -= 1;
            return self.open();
        }
        (self.last, self.log) = (last.unwrap_or(GENESIS), Some(log));
        Ok(())
    }
}

fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:06}.jsonl"))
}

/// The files of a chain, in its order, with their numbers.
///
/// # Errors
/// When the folder cannot be read.
pub fn files(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_lines = path.extension().is_some_and(|ending| ending == "jsonl");
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        found.extend(number.filter(|_| is_lines).map(|number| (number, path)));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn metrics() -> JournalMetrics {
        JournalMetrics::new(&Metrics::new())
    }

    fn record(id: &str) -> Record {
        Record { request_id: id.to_owned(), ..Record::default() }
    }

    /// Ids of all records, in the order of the chain, which is whole.
    fn ids(folder: &Path) -> Vec<String> {
        let mut last = GENESIS;
        let mut ids = Vec::new();
        for (_, path) in files(folder).unwrap() {
            for line in std::fs::read_to_string(path).unwrap().lines() {
                let link = Link::read(line, Some(&last)).unwrap();
                last = link.hash;
                ids.push(link.record.request_id);
            }
        }
        ids
    }

    #[tokio::test]
    async fn a_chain_goes_on_over_files_and_restarts_and_what_a_crash_left_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Journal::in_files_of(300, folder.path(), metrics());
        let mut hashes = Vec::new();
        for life in 0..3 {
            let journal = opened(open);
            for number in 0..3 {
                hashes.push(journal.append(&record(&format!("{life}-{number}"))).await.unwrap());
            }
            drop(journal);
            let last = files(folder.path()).unwrap().pop().unwrap().1;
            let mut content = std::fs::read(&last).unwrap();
            content.extend_from_slice(b"{\"previous\":\"00");
            std::fs::write(&last, content).unwrap();
        }
        // One that was begun and never written to.
        let next = files(folder.path()).unwrap().pop().unwrap().0 + 1;
        std::fs::write(path(folder.path(), next), "").unwrap();
        hashes.push(opened(open).append(&record("last")).await.unwrap());
        assert_eq!(ids(folder.path()).len(), 10);
        assert!(files(folder.path()).unwrap().len() > 3, "files have a bound");
        hashes.dedup();
        assert_eq!(hashes.len(), 10);
    }

    /// The thread of the journal before lets go of its file when it has ended.
    fn opened(open: impl Fn() -> Result<Journal, JournalError>) -> Journal {
        let busy = |result: &Result<_, _>| matches!(result, Err(JournalError::Log(LogError::Busy { .. })));
        (0..20).map(|_| open()).find(|result| !busy(result)).unwrap().unwrap()
    }

    #[tokio::test]
    async fn only_the_owner_reads_records() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("records");
        let journal = Journal::in_files_of(1, &folder, metrics()).unwrap();
        for id in ["a", "b"] {
            journal.append(&record(id)).await.unwrap();
        }
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let modes: Vec<_> = files(&folder).unwrap().iter().map(|(_, path)| mode(path)).collect();
        assert_eq!((mode(&folder), modes), (0o700, vec![0o600; 2]));
    }

    #[tokio::test]
    async fn a_broken_chain_is_not_appended_to_and_a_second_writer_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::in_files_of(300, folder.path(), metrics()).unwrap();
        journal.append(&record("a")).await.unwrap();
        let second = Journal::in_files_of(300, folder.path(), metrics()).unwrap_err();
        assert!(matches!(second, JournalError::Log(LogError::Busy { .. })), "{second}");
        drop(journal);
        let path = path(folder.path(), 1);
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("\"a\"", "\"b\"")).unwrap();
        let broken = (0..20).map(|_| Journal::in_files_of(300, folder.path(), metrics()).unwrap_err());
        let broken = broken.map(|error| error.to_string()).find(|error| error.contains("line 1")).unwrap();
        assert!(broken.contains("has been changed"), "{broken}");
    }

    #[tokio::test(start_paused = true)]
    async fn while_nothing_can_be_written_nothing_begins_and_it_goes_on_by_itself() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::in_files_of(1, folder.path(), metrics()).unwrap();
        journal.append(&record("a")).await.unwrap();
        // In the way of the next file.
        let next = path(folder.path(), 2);
        std::fs::create_dir(&next).unwrap();
        let failed = journal.append(&record("b")).await.unwrap_err();
        let refused = journal.check().unwrap_err();
        assert_eq!(refused.cause, "audit_unwritable");
        let path = folder.path().to_str().unwrap();
        for told in [failed.message, refused.message] {
            assert!(!told.contains(path) && told.contains("try again later"), "{told}");
        }
        std::fs::remove_dir(&next).unwrap();
        tokio::time::advance(REFUSE_FOR).await;
        journal.check().unwrap();
        journal.append(&record("c")).await.unwrap();
        assert_eq!(ids(folder.path()), ["a", "c"]);
    }
}
