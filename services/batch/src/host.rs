//! Batches as OpenAI's API has them: files and jobs in a folder, for whoever has a cluster at hand. A host that is
//! started again goes on where the last one stopped: a batch is the job of `uniarm batch`, with its journal.
//!
//! `record` (a batch and its states), `shelf` (files and their bounds), `split` (what a job wrote becomes the files of
//! its batch).

mod record;
mod shelf;
mod split;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::{sync::Notify, task::block_in_place, time::sleep};
use uniarm_openai::{Call, Failure};
use uniarm_proto::{GenerateRequest, Input, Priority};

use crate::{
    append_log::{LogError, open_locked},
    drive::{ATTEMPTS_MAX, Cluster, DriveOptions, PATIENCE},
    job::{self, JobError, JobOptions, Part, Progress},
    ledger::{LedgerError, journal_path},
    output::Order,
    private,
    request::Plan,
    source::Source,
    tally::{Ends, Tally},
};
pub use record::{BatchError, BatchRecord, Counts, Errors, NewBatch, Owner, State, WINDOW};
pub use shelf::{FILE_BYTES_MAX, FileRecord, Shelf, ShelfLimits, Upload, not_here, refused};

/// The purpose of files that batches read, and of those that they write.
pub const PURPOSE: &str = "batch";
const OUTPUT_PURPOSE: &str = "batch_output";

/// Files that a batch may write: answers, and errors.
const FILES_OF_BATCH: usize = 2;

/// Batches that are remembered after their end.
const ENDED_KEPT: usize = 1000;

/// A cluster that answers nobody is asked again after this long, until the batch expires.
const AWAY_PAUSE: Duration = Duration::from_secs(15);

#[derive(Debug, Clone)]
pub struct HostOptions {
    /// Nobody else works in it.
    pub folder: PathBuf,
    pub shelf: ShelfLimits,
    /// Batches that are not over; one more is refused.
    pub batches_max: usize,
    /// Requests of one batch in flight at most.
    pub in_flight_max: usize,
    /// From a batch's creation to its expiry.
    pub window: Duration,
}

/// The cluster as the owner of a batch may use it.
pub trait Clusters: Send + Sync {
    fn of(&self, owner: &Owner) -> Arc<dyn Cluster>;
}

/// Files and batches of one process.
pub struct Host {
    options: HostOptions,
    clusters: Arc<dyn Clusters>,
    shelf: Arc<Shelf>,
    batches: Mutex<BTreeMap<String, Held>>,
    ends: Arc<Ends>,
    _lock: File,
}

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("{}: {source}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Busy(#[from] LogError),
}

struct Held {
    record: BatchRecord,
    /// Ends its job.
    stop: Arc<Notify>,
}

/// Why a job asks no more.
enum End {
    /// All lines have an answer or an error.
    Done,
    Cancelled,
    Late,
    Failed(Vec<BatchError>),
}

// === impl Host ===

impl Host {
    /// Takes the folder, and goes on with the batches in it that are not over.
    ///
    /// # Errors
    /// When another process has the folder, or it cannot be read or written.
    ///
    /// # Panics
    /// Outside a runtime with several threads.
    pub fn open(options: HostOptions, clusters: Arc<dyn Clusters>) -> Result<Arc<Self>, HostError> {
        let folder = options.folder.clone();
        let failed = |source| HostError::Folder { path: folder.clone(), source };
        private::make_folder(&folder.join("batches")).map_err(failed)?;
        let lock = open_locked(&folder.join("lock"), private::to_write())?;
        let shelf = Shelf::open(folder.join("files"), options.shelf).map_err(failed)?;
        let mut batches = BTreeMap::new();
        for path in shelf::paths(&folder.join("batches"), "json").map_err(failed)? {
            let record: BatchRecord = shelf::read_record(&path).map_err(failed)?;
            batches.insert(record.id.clone(), Held { record, stop: Arc::default() });
        }
        let open: Vec<String> =
            batches.values().filter(|held| !held.record.status.is_over()).map(Held::id).collect();
        let host = Arc::new(Self {
            options,
            clusters,
            shelf: Arc::new(shelf),
            batches: Mutex::new(batches),
            ends: Arc::default(),
            _lock: lock,
        });
        for id in open {
            host.shelf.owe(FILES_OF_BATCH);
            host.begin(id);
        }
        Ok(host)
    }

    pub fn shelf(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// All batches that are remembered, the newest first.
    pub fn list(&self) -> Vec<BatchRecord> {
        let mut batches: Vec<_> = self.batches.lock().values().map(|held| held.record.clone()).collect();
        batches.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        batches
    }

    /// # Errors
    /// When there is no such batch.
    pub fn get(&self, id: &str) -> Result<BatchRecord, Failure> {
        let found = self.batches.lock().get(id).map(|held| held.record.clone());
        found.ok_or_else(|| shelf::not_here("batch_id", id))
    }

    /// # Errors
    /// When its file is not there, or there are too many batches or files.
    pub fn create(self: &Arc<Self>, asked: NewBatch) -> Result<BatchRecord, Failure> {
        let mut batches = self.batches.lock();
        let limit = self.options.batches_max;
        if batches.values().filter(|held| !held.record.status.is_over()).count() >= limit {
            let message =
                format!("{limit} batches are under way, which is the limit: wait for one, or cancel one");
            return Err(Failure::at_the_door(429, "batches_full", message));
        }
        let file = self.shelf.get("input_file_id", &asked.input_file_id)?;
        if file.purpose != PURPOSE {
            let message = format!("input_file_id: has the purpose {}, wants {PURPOSE}", file.purpose);
            let failure = Failure::at_the_door(400, "invalid_argument", message);
            return Err(Failure { param: Some("input_file_id".to_owned()), ..failure });
        }
        self.shelf.check_room(FILES_OF_BATCH, 0)?;
        let id = format!("batch_{:032x}", rand::random::<u128>());
        let record = BatchRecord::new(id.clone(), asked, seconds_now(), self.options.window.as_secs());
        self.save(&record).map_err(|error| refused(&error))?;
        self.shelf.owe(FILES_OF_BATCH);
        batches.insert(id.clone(), Held { record: record.clone(), stop: Arc::default() });
        drop(batches);
        self.begin(id);
        Ok(record)
    }

    /// # Errors
    /// When there is no such batch, or it is nearly or wholly over.
    pub fn cancel(&self, id: &str) -> Result<BatchRecord, Failure> {
        let mut batches = self.batches.lock();
        let held = batches.get_mut(id).ok_or_else(|| shelf::not_here("batch_id", id))?;
        match held.record.status {
            State::Validating | State::InProgress => {
                held.record.enter(State::Cancelling, seconds_now());
                self.save(&held.record).map_err(|error| refused(&error))?;
                held.stop.notify_one();
            }
            State::Cancelling => {}
            other => {
                let message = format!("batch_id: {id:?} is {other}, and cannot be cancelled any more");
                return Err(conflict("batch_id", message));
            }
        }
        Ok(held.record.clone())
    }

    /// What its batches do, for metrics.
    pub fn tally(&self) -> Tally {
        let batches = self.batches.lock();
        let under_way = batches.values().filter(|held| !held.record.status.is_over());
        let left = |held: &Held| held.record.request_counts.left();
        let (jobs, left) = under_way.fold((0, 0), |(jobs, sum), held| (jobs + 1, sum + left(held)));
        self.ends.tally(jobs, left)
    }

    /// # Errors
    /// When there is no such file, or a batch still reads it.
    pub fn delete_file(&self, id: &str) -> Result<(), Failure> {
        let batches = self.batches.lock();
        let reads = |held: &&Held| !held.record.status.is_over() && held.record.input_file_id == id;
        if let Some(held) = batches.values().find(reads) {
            let message = format!("file_id: {id:?} is being read by {}: cancel it first", held.record.id);
            return Err(conflict("file_id", message));
        }
        self.shelf.remove(id)
    }

    fn begin(self: &Arc<Self>, id: String) {
        let host = Arc::clone(self);
        tokio::spawn(async move {
            let Some((record, stop)) = host.held(&id) else { return };
            let end = host.ask_until_end(&record, &stop).await;
            block_in_place(|| host.end(&id, end));
        });
    }

    fn held(&self, id: &str) -> Option<(BatchRecord, Arc<Notify>)> {
        self.batches.lock().get(id).map(|held| (held.record.clone(), Arc::clone(&held.stop)))
    }

    // --- a batch under way ---

    async fn ask_until_end(&self, record: &BatchRecord, stop: &Notify) -> End {
        if record.status == State::Cancelling {
            return End::Cancelled;
        }
        let late = sleep(Duration::from_secs(record.expires_at.saturating_sub(seconds_now())));
        tokio::pin!(late);
        loop {
            tokio::select! {
                () = stop.notified() => return self.why_stopped(&record.id),
                () = &mut late => return End::Late,
                ran = self.ask_all(record) => match ran {
                    Ok(_) => return End::Done,
                    Err(JobError::Away { .. }) => {}
                    Err(error) => return End::Failed(errors_of(error)),
                },
            }
            tokio::select! {
                () = stop.notified() => return self.why_stopped(&record.id),
                () = &mut late => return End::Late,
                () = sleep(AWAY_PAUSE) => {}
            }
        }
    }

    /// Dropping it is as good as a kill: what is done stays done.
    async fn ask_all(&self, record: &BatchRecord) -> Result<Progress, JobError> {
        let output = self.output(&record.id);
        let call = Call::at(&record.endpoint).map_err(JobError::Output)?;
        let input = self.shelf.path(&record.input_file_id).display().to_string();
        // A job leaves the mode of its output to the umask, for it is a user's; this one is a client's.
        private::to_write()
            .open(&output)
            .map_err(|source| LogError::File { path: output.clone(), source })
            .map_err(LedgerError::from)?;
        let options = JobOptions {
            source: Source::open(&[input], &output)?,
            output,
            order: Order::Input,
            plan: plan(call),
            keep_going: false,
            part: Part::default(),
            drive: DriveOptions {
                in_flight_max: self.options.in_flight_max,
                patience: PATIENCE,
                attempts_max: ATTEMPTS_MAX,
            },
            ends: Arc::clone(&self.ends),
        };
        let cluster = self.clusters.of(&record.owner);
        job::run(&options, &*cluster, |progress| self.saw(&record.id, progress)).await
    }

    fn saw(&self, id: &str, progress: &Progress) {
        let written = std::fs::metadata(self.output(id)).map_or(0, |output| output.len());
        let mut batches = self.batches.lock();
        let Some(held) = batches.get_mut(id) else { return };
        let Progress { requests: total, done, failed, .. } = *progress;
        held.record.request_counts = Counts { total, completed: done - failed, failed };
        if held.record.status == State::Validating {
            held.record.enter(State::InProgress, seconds_now());
            // A state that a crash forgets is entered again.
            let _ = self.save(&held.record);
        }
        if !self.shelf.grows(id, written) {
            held.stop.notify_one();
        }
    }

    fn why_stopped(&self, id: &str) -> End {
        match self.held(id) {
            Some((record, _)) if record.status != State::Cancelling => {
                let message = "its answers fill what all files may have: delete files, and create it again";
                End::Failed(vec![BatchError {
                    code: "storage_full".into(),
                    message: message.into(),
                    ..BatchError::default()
                }])
            }
            _ => End::Cancelled,
        }
    }

    fn end(&self, id: &str, end: End) {
        // Whoever was told that it is being cancelled shall not see it completed.
        let is_cancelled = self.get(id).is_ok_and(|record| record.status == State::Cancelling);
        let end = if is_cancelled { End::Cancelled } else { end };
        if matches!(end, End::Done) {
            self.update(id, |record| record.enter(State::Finalizing, seconds_now()));
        }
        let published = self.publish(id);
        self.update(id, |record| {
            let now = seconds_now();
            let (state, mut errors) = match end {
                End::Done => (State::Completed, Vec::new()),
                End::Cancelled => (State::Cancelled, Vec::new()),
                End::Late => (State::Expired, Vec::new()),
                End::Failed(errors) => (State::Failed, errors),
            };
            match published {
                Ok((answers, errors)) => (record.output_file_id, record.error_file_id) = (answers, errors),
                Err(error) => errors.push(BatchError::of_host(refused(&error).message)),
            }
            let state = if errors.is_empty() { state } else { State::Failed };
            record.errors = (!errors.is_empty()).then_some(Errors { data: errors });
            record.enter(state, now);
        });
        for path in [self.output(id), journal_path(&self.output(id))] {
            // One that stays behind is in nobody's way.
            let _ = std::fs::remove_file(path);
        }
        self.shelf.has_grown(id);
        self.shelf.release(FILES_OF_BATCH);
        self.forget_oldest();
    }

    /// The names of the two files, of those that have lines.
    fn publish(&self, id: &str) -> io::Result<(Option<String>, Option<String>)> {
        // Functions of the batch: what a crash interrupts is done again under the same names.
        let name = id.trim_start_matches("batch_");
        let (answers, errors) = (format!("file-{name}-output"), format!("file-{name}-errors"));
        let lines = split::split(&self.output(id), self.shelf.draft(&answers), self.shelf.draft(&errors))?;
        let owner = self.held(id).map(|(record, _)| record.owner).unwrap_or_default();
        let put = |file: String, lines: u64, kind: &str| -> io::Result<Option<String>> {
            if lines == 0 {
                return Ok(None);
            }
            let draft = self.shelf.draft(&file);
            let record = FileRecord {
                id: file.clone(),
                owner: owner.clone(),
                bytes: std::fs::metadata(&draft)?.len(),
                created_at: seconds_now(),
                filename: format!("{id}_{kind}.jsonl"),
                purpose: OUTPUT_PURPOSE.to_owned(),
            };
            self.shelf.put(&draft, record)?;
            Ok(Some(file))
        };
        Ok((put(answers, lines.answers, "output")?, put(errors, lines.errors, "error")?))
    }

    // --- records ---

    /// Where a job writes.
    fn output(&self, id: &str) -> PathBuf {
        self.options.folder.join("batches").join(format!("{id}.jsonl"))
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.options.folder.join("batches").join(format!("{id}.json"))
    }

    fn save(&self, record: &BatchRecord) -> io::Result<()> {
        shelf::write_record(&self.record_path(&record.id), record)
    }

    fn update(&self, id: &str, change: impl FnOnce(&mut BatchRecord)) {
        let mut batches = self.batches.lock();
        let Some(held) = batches.get_mut(id) else { return };
        change(&mut held.record);
        // A disk that takes no record shows at the next start, when the batch goes on from its last one.
        let _ = self.save(&held.record);
    }

    fn forget_oldest(&self) {
        let mut batches = self.batches.lock();
        let mut ended: Vec<(u64, String)> = batches
            .values()
            .filter(|held| held.record.status.is_over())
            .map(|held| (held.record.created_at, held.id()))
            .collect();
        ended.sort_unstable();
        let surplus = ended.len().saturating_sub(ENDED_KEPT);
        for (_, id) in ended.into_iter().take(surplus) {
            batches.remove(&id);
            // It would be forgotten again at the next end.
            let _ = std::fs::remove_file(self.record_path(&id));
        }
    }
}

// === impl Held ===

impl Held {
    fn id(&self) -> String {
        self.record.id.clone()
    }
}

/// What all hosted batches have in common: a line says the rest.
fn plan(call: Call) -> Plan {
    // Nobody waits for a line; whoever waits for an answer goes first.
    let defaults =
        GenerateRequest { priority: Priority::Low, ..GenerateRequest::new(Input::Chat(Vec::new())) };
    Plan { defaults, is_raw: false, fan_out: Vec::new(), seed: 0, only: Some(call) }
}

fn errors_of(error: JobError) -> Vec<BatchError> {
    match error {
        JobError::BadLines { lines, count } => {
            let more = count.saturating_sub(lines.len() as u64);
            let errors = lines.into_iter().map(|(place, refused)| BatchError {
                code: refused.cause.unwrap_or_else(|| refused.code.to_owned()),
                message: refused.message,
                param: refused.field,
                line: Some(place.line),
            });
            let rest = (more > 0).then(|| BatchError {
                code: "invalid_argument".into(),
                message: format!("and {more} more lines"),
                ..BatchError::default()
            });
            errors.chain(rest).collect()
        }
        JobError::Empty => vec![BatchError {
            code: "empty_file".into(),
            message: "input_file_id: the file has no lines".into(),
            param: Some("input_file_id".into()),
            line: None,
        }],
        // They name files of this machine.
        JobError::Source(_) | JobError::Ledger(_) => {
            tracing::error!(%error, "a batch failed by the folder of files and batches (--batch-dir)");
            vec![BatchError::of_host(shelf::STORAGE_FAILED.to_owned())]
        }
        other => vec![BatchError::of_host(other.to_string())],
    }
}

fn conflict(param: &str, message: String) -> Failure {
    Failure { param: Some(param.to_owned()), ..Failure::at_the_door(409, "conflict", message) }
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
