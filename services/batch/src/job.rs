//! One job: every line of its input asked, each answer in the output exactly once.
//!
//! The input is read twice. First all of it, to know its digest and its length and to name what is wrong before anything
//! is asked; then again as the cluster takes it, so that memory does not grow with it.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tonic::Status;
use uniarm_cluster::{StoreError, Work};
use uniarm_proto::{Refused, Transcript};

use crate::{
    answer::output_line,
    book::{Alone, Book, Rest},
    digest::hexadecimal,
    drive::{Away, Cluster, Done, Drive, DriveOptions},
    ledger::{Identity, Ledger, LedgerError},
    output::{Encoding, Order},
    request::{Label, Plan, Planned},
    shared::Shared,
    source::{Line, Lines, Place, Source, SourceError},
    tally::Ends,
};

/// Bad lines that are named before a job is refused.
const BAD_LINES_SHOWN: usize = 10;

/// Requests between the oldest unanswered one and the newest: what one long answer may hold back, in memory and in the
/// journal.
const AHEAD_MAX: u64 = 8192;

/// How often a process of a shared job that has nothing left to do looks whether others are done.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Clone)]
pub struct JobOptions {
    pub source: Source,
    pub output: PathBuf,
    pub order: Order,
    pub plan: Plan,
    /// Bad lines are written with their error, instead of refusing the whole input.
    pub keep_going: bool,
    pub part: Part,
    pub drive: DriveOptions,
    /// Where the ends of its requests are counted.
    pub ends: Arc<Ends>,
}

/// Which lines a job takes, of `count` ranges of equal length: their outputs, one after the other, are the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub index: u64,
    pub count: u64,
}

/// A job while it runs, for whoever shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Progress {
    pub requests: u64,
    pub done: u64,
    pub failed: u64,
    /// Done in earlier lives of the job.
    pub kept: u64,
    /// Of answers of this life.
    pub tokens: u64,
    pub in_flight: usize,
    pub refusals: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("{0}")]
    Output(String),
    #[error("{}", BadLines(.lines, *.count))]
    BadLines { lines: Vec<(Place, Refused)>, count: u64 },
    #[error("the input is empty")]
    Empty,
    #[error(
        "the input changed while it was read; what is done is kept, restore the input and repeat the command"
    )]
    ChangedMeanwhile,
    #[error("{away}\n{done} of {requests} are done and kept; repeat the command to go on from there")]
    Away { away: Away, done: u64, requests: u64 },
    #[error("{0}; what is finished is kept, repeat the command to go on from there")]
    Store(#[from] StoreError),
    #[error(
        "{what} differs from what the job that is shared by this name was begun with; restore it, or take another name and another --output"
    )]
    OtherJob { what: String },
    #[error("what the store has of the job by this name was written by another version; take another name")]
    Unreadable,
    #[error("the job by this name is finished, and {} is not here; take another name to do it again", output.display())]
    Gone { output: PathBuf },
    #[error("{} was finished by another process and is not here; those that share a job must see the same folder of --output", path.display())]
    Elsewhere { path: PathBuf },
    #[error("{} is not what was written there; take another name and another --output to do the job again", path.display())]
    Damaged { path: PathBuf },
}

/// The first of the bad lines, a line each.
struct BadLines<'a>(&'a [(Place, Refused)], u64);

/// A request, or why its line is none.
type Reading = Result<Planned, Box<(Refused, Label)>>;

/// What the first reading found.
struct Survey {
    digest: String,
    lines: u64,
}

/// A job that asks.
struct Job<'a, B> {
    plan: &'a Plan,
    ends: &'a Ends,
    source: &'a Source,
    /// Of the whole input, as the first reading found it.
    digest: &'a str,
    lines: Lines,
    book: B,
    drive: Drive<'a>,
    /// Of what is in flight.
    labels: HashMap<u64, Label>,
    /// Requests of the last line that was read, the next one last.
    open: Vec<(u64, Reading)>,
    progress: Progress,
}

/// Runs a job to its end; `seen` is shown its progress after each line of output.
///
/// # Errors
/// Bad lines, unless they are to be written; a cluster that stays away; files that cannot be read or written. What is
/// done stays done, and the same call goes on from there.
pub async fn run(
    options: &JobOptions,
    cluster: &dyn Cluster,
    mut seen: impl FnMut(&Progress),
) -> Result<Progress, JobError> {
    let survey = tokio::task::block_in_place(|| survey(options))?;
    let own = options.part.of(survey.lines);
    let requests = (own.end - own.start) * options.plan.width();
    let identity = identity(options, &survey.digest, requests);
    let encoding = Encoding::of(&options.output).map_err(JobError::Output)?;
    let ledger = Ledger::open(&options.output, identity, options.order, encoding)?;
    let book = Alone::new(ledger, own, options.plan.width());
    let mut job = Job::new(options, cluster, &survey, book, requests);
    let ran = job.run(&mut seen).await;
    job.book.close()?;
    ran?;
    options.source.forget_copy(&options.output);
    Ok(job.progress)
}

/// Takes part in a job that several processes share, until all of it is done by all of them: `options` without a part, in
/// the order of the input, from files and into a folder that all of them see.
///
/// # Errors
/// As [`run`]; besides, a store that stays away, and another job by the same name.
pub async fn run_shared(
    options: &JobOptions,
    work: &Work,
    cluster: &dyn Cluster,
    mut seen: impl FnMut(&Progress),
) -> Result<Progress, JobError> {
    let survey = tokio::task::block_in_place(|| survey(options))?;
    let requests = survey.lines * options.plan.width();
    let identity = identity(options, &survey.digest, requests);
    let encoding = Encoding::of(&options.output).map_err(JobError::Output)?;
    let book = Shared::join(work, &options.output, encoding, identity, survey.lines).await?;
    let is_finished = book.is_finished();
    let mut job = Job::new(options, cluster, &survey, book, requests);
    let ran = if is_finished { Ok(()) } else { job.run(&mut seen).await };
    work.leave().await;
    job.show(&mut seen);
    ran.map(|()| job.progress)
}

fn survey(options: &JobOptions) -> Result<Survey, JobError> {
    let mut lines = options.source.lines();
    let (mut bad, mut count) = (Vec::new(), 0);
    let mut total = 0;
    while let Some(line) = lines.next_line()? {
        total += 1;
        if options.keep_going {
            continue;
        }
        if let Err(unread) = options.plan.read(&line) {
            count += 1;
            if bad.len() < BAD_LINES_SHOWN {
                bad.push((line.place, unread.refused));
            }
        }
    }
    match (total, count) {
        (0, _) => Err(JobError::Empty),
        (_, 0) => Ok(Survey { digest: lines.digest(), lines: total }),
        _ => Err(JobError::BadLines { lines: bad, count }),
    }
}

fn identity(options: &JobOptions, digest_of_input: &str, requests: u64) -> Identity {
    let digest = |bytes: &[u8]| hexadecimal(&Sha256::digest(bytes)[..16]);
    let plan = &options.plan;
    let preferences = serde_json::to_vec(&plan.fan_out).expect("strings and numbers");
    let settings = [
        ("--preferences", digest(&preferences)),
        ("--seed", plan.seed.to_string()),
        ("--raw", plan.is_raw.to_string()),
        ("--as-finished", options.order.name().to_owned()),
        ("--keep-going", options.keep_going.to_string()),
        ("--part", options.part.to_string()),
        (
            "the model, or a flag such as --preference or --temperature,",
            digest(&plan.template().encode_to_vec()),
        ),
    ];
    Identity {
        input: digest_of_input.to_owned(),
        requests,
        settings: settings
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect::<BTreeMap<_, _>>(),
    }
}

// === impl Part ===

impl Part {
    /// Of so many lines.
    fn of(self, lines: u64) -> Range<u64> {
        // Wide enough for any two numbers that count lines and parts.
        let start = |index: u64| (u128::from(lines) * u128::from(index) / u128::from(self.count)) as u64;
        start(self.index)..start(self.index + 1)
    }
}

impl Default for Part {
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl std::str::FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no part; 0/8 is the first of eight, 7/8 the last");
        let (index, count) = text.split_once('/').ok_or_else(wrong)?;
        let part =
            Self { index: index.parse().map_err(|_| wrong())?, count: count.parse().map_err(|_| wrong())? };
        if part.index < part.count { Ok(part) } else { Err(wrong()) }
    }
}

// === impl Job ===

impl<'a, B: Book> Job<'a, B> {
    fn new(
        options: &'a JobOptions,
        cluster: &'a dyn Cluster,
        survey: &'a Survey,
        book: B,
        requests: u64,
    ) -> Self {
        Self {
            plan: &options.plan,
            ends: &options.ends,
            source: &options.source,
            digest: &survey.digest,
            lines: options.source.lines(),
            drive: Drive::new(cluster, options.drive.clone()),
            labels: HashMap::new(),
            open: Vec::new(),
            progress: Progress { requests, kept: book.done(), ..Progress::default() },
            book,
        }
    }

    async fn run(&mut self, seen: &mut impl FnMut(&Progress)) -> Result<(), JobError> {
        loop {
            while self.drive.has_room() && self.may_read_on() && self.ask_next().await? {}
            self.book.settle().await?;
            self.show(seen);
            match self.drive.next().await {
                None if !self.is_at_end().await? => {}
                None if self.lines.digest() != self.digest => return Err(JobError::ChangedMeanwhile),
                None => match self.book.rest().await? {
                    Rest::Done => return Ok(()),
                    Rest::Again => self.lines = self.source.lines(),
                    Rest::Wait => tokio::time::sleep(LOOK_EVERY).await,
                },
                Some(Ok(Done { number, result })) => self.finish(number, &result)?,
                Some(Err(away)) => {
                    let (done, requests) = (self.book.done(), self.progress.requests);
                    return Err(JobError::Away { away, done, requests });
                }
            }
        }
    }

    fn may_read_on(&self) -> bool {
        let unread = self.book.first_number(self.lines.index());
        let next = self.open.last().map_or(unread, |(number, _)| *number);
        self.book.oldest().is_none_or(|oldest| next < oldest + AHEAD_MAX)
    }

    /// False: all lines are read.
    async fn ask_next(&mut self) -> Result<bool, JobError> {
        let Some((number, planned)) = self.next_request().await? else { return Ok(false) };
        match planned {
            Ok(planned) => {
                self.labels.insert(number, planned.label);
                self.drive.ask(number, planned.request);
            }
            Err(bad) => {
                let (error, label) = *bad;
                let line = output_line(&label, Err(&error));
                self.ends.count(true);
                self.book.record(number, true, line)?;
            }
        }
        Ok(true)
    }

    /// The next request that is not done.
    async fn next_request(&mut self) -> Result<Option<(u64, Reading)>, JobError> {
        loop {
            while let Some((number, planned)) = self.open.pop() {
                if !self.book.is_done(number) {
                    return Ok(Some((number, planned)));
                }
            }
            let Some(line) = self.lines.next_line()? else { return Ok(None) };
            if self.book.takes(line.index).await? {
                self.open_line(&line);
            }
        }
    }

    fn open_line(&mut self, line: &Line) {
        let planned: Vec<_> = match self.plan.read(line) {
            Ok(planned) => planned.into_iter().map(Ok).collect(),
            Err(unread) => {
                let refused = unread.refused;
                unread.labels.into_iter().map(|label| Err(Box::new((refused.clone(), label)))).collect()
            }
        };
        self.open.extend((self.book.first_number(line.index)..).zip(planned));
        self.open.reverse();
    }

    /// Nothing is in flight: is that because nothing is left?
    async fn is_at_end(&mut self) -> Result<bool, JobError> {
        match self.next_request().await? {
            None => Ok(true),
            Some(next) => {
                self.open.push(next);
                Ok(false)
            }
        }
    }

    fn finish(&mut self, number: u64, result: &Result<Transcript, Status>) -> Result<(), JobError> {
        let label = self.labels.remove(&number).expect("what is in flight has a label");
        let line = match result {
            Ok(transcript) => {
                self.progress.tokens += transcript.choices.iter().map(|c| c.tokens.len() as u64).sum::<u64>();
                output_line(&label, Ok(transcript))
            }
            Err(status) => output_line(&label, Err(&Refused::from(status))),
        };
        self.ends.count(result.is_err());
        self.book.record(number, result.is_err(), line)
    }

    fn show(&mut self, seen: &mut impl FnMut(&Progress)) {
        self.progress.done = self.book.done();
        self.progress.failed = self.book.failed();
        self.progress.in_flight = self.drive.in_flight();
        self.progress.refusals = self.drive.refusals();
        seen(&self.progress);
    }
}

// === impl BadLines ===

impl std::fmt::Display for BadLines<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, error) in self.0 {
            writeln!(f, "{place}: {}", error.message)?;
        }
        let more = self.1.saturating_sub(self.0.len() as u64);
        if more > 0 {
            writeln!(f, "and {more} more")?;
        }
        write!(
            f,
            "{} lines are no requests; correct them, or write their errors into the output with --keep-going",
            self.1
        )
    }
}

#[cfg(test)]
pub(crate) mod tests;
