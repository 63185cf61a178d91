//! One job over a cluster: a list of questions, each asked until it is answered, every answer kept in a journal.
//!
//! Answers come back in the order of the questions, whoever answered them and in which life of the program. A token is
//! a function of models, request and position, so that a job that is killed and continued ends with the same bytes.

mod journal;
mod models;
mod pace;

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uniarm_proto::{
    ChatMessage, GenerateRequest, Input, OnRewardLoss, Priority, Sampling, Transcript, pb,
    transcript::finish_reason_name,
};

pub use journal::{Journal, JournalError};
pub use models::{Identities, ModelsConfig};
use pace::Pace;

/// Questions in flight at most, where nobody says otherwise: rows beyond it make a step slower, not a token cheaper.
pub const IN_FLIGHT_MAX: usize = 64;

/// Without a single answer for this long the job gives up: longer than a worker takes to restart and load a model.
const PATIENCE: Duration = Duration::from_secs(300);

/// Wait after the first refusal of a question that names no delay of its own; it doubles with each further one.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// A cluster that was away is noticed again after this long at most.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(15);

/// What decides an answer, and nothing else, as a digest in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Key(String);

/// A request and its place in a journal.
#[derive(Debug, Clone)]
pub struct Question {
    pub key: Key,
    pub request: GenerateRequest,
    /// Where it comes from, for whoever reads an error: `prompts.jsonl:12, style "short"`.
    pub origin: String,
}

/// What a job keeps of an answer. No times: they would differ from run to run.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub text: String,
    pub tokens: u32,
    /// `stop`, `length` or `context`.
    pub finish_reason: String,
}

/// Whoever answers a request: a router, or in tests a function.
pub trait Cluster: Send + Sync {
    fn answer(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Transcript, Status>>;
}

#[derive(Debug, Clone)]
pub struct JobOptions {
    /// Questions in flight at most; fewer while the cluster refuses.
    pub in_flight_max: usize,
    /// Show a progress bar on a terminal.
    pub progress: bool,
    pub patience: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("{origin}: {message}{field}\n{kept}", field = field_hint(status), message = status.message())]
    Refused { origin: String, status: Box<Status>, kept: Kept },
    #[error("no answer for {} s, last because: {}\n{kept}", patience.as_secs(), status.message())]
    Away { patience: Duration, status: Box<Status>, kept: Kept },
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What is not lost when a job fails.
#[derive(Debug, Clone, Copy)]
pub struct Kept {
    answered: usize,
    asked: usize,
}

/// A question on its way, in its n-th attempt.
struct Attempt {
    index: usize,
    number: u32,
    wait: Duration,
}

/// How an attempt ended.
struct Outcome {
    index: usize,
    number: u32,
    begun: Instant,
    result: Result<Transcript, Status>,
}

/// A job while it runs.
struct Job<'a> {
    questions: &'a [Question],
    cluster: &'a dyn Cluster,
    options: &'a JobOptions,
    open: VecDeque<Attempt>,
    pace: Pace,
    bar: ProgressBar,
    refusals: u64,
    tokens: u64,
    began: Instant,
    last_answer: Instant,
}

/// Answers every question that the journal does not answer yet, and returns all answers in the order of the questions.
/// Equal keys are asked once.
///
/// # Errors
/// A question that the cluster refuses for good, a cluster that stays away, or a journal that cannot be written. All
/// answers so far are in the journal.
pub async fn run(
    questions: &[Question],
    journal: &mut Journal,
    cluster: &dyn Cluster,
    options: &JobOptions,
) -> Result<Vec<Answer>, JobError> {
    let mut first: HashMap<&Key, usize> = HashMap::new();
    for (index, question) in questions.iter().enumerate() {
        first.entry(&question.key).or_insert(index);
    }
    let mut open: Vec<usize> = first.into_values().collect();
    open.sort_unstable();
    let distinct = open.len();
    open.retain(|index| journal.get(&questions[*index].key).is_none());
    let mut job = Job::new(questions, cluster, options, &open, distinct);
    let done = job.run(journal).await;
    journal.sync()?;
    job.bar.finish_and_clear();
    done?;
    let answer = |question: &Question| journal.get(&question.key).cloned();
    Ok(questions.iter().map(|question| answer(question).expect("every key was answered")).collect())
}

// === impl Key ===

impl Key {
    /// `models` names the weights that answer: a request only has their names.
    pub fn new(request: &GenerateRequest, models: &str) -> Self {
        // The wire form holds every field, those that are added one day too.
        let wire =
            pb::GenerateRequest::from(GenerateRequest { request_id: String::new(), ..request.clone() });
        let mut digest = Sha256::new();
        digest.update((models.len() as u64).to_le_bytes());
        digest.update(models);
        digest.update(wire.encode_to_vec());
        Self(hexadecimal(&digest.finalize()[..16]))
    }
}

/// Says on standard error that lines of a journal were damaged; their questions are asked again.
pub fn say_damaged(journal: &Journal) {
    let damaged = journal.damaged();
    if let Some(first) = damaged.first() {
        eprintln!(
            "note: {} lines of {} are damaged (the first is line {first}); their questions are asked again",
            damaged.len(),
            journal.path().display()
        );
    }
}

pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An unguided request of a job: it can wait for its reward, since nobody waits for the job.
pub fn chat_request(messages: Vec<ChatMessage>, sampling: Sampling) -> GenerateRequest {
    GenerateRequest {
        request_id: String::new(),
        model: String::new(),
        input: Input::Chat(messages),
        sampling,
        base_strength: 1.0,
        guidance: Vec::new(),
        on_reward_loss: OnRewardLoss::Wait,
        priority: Priority::Normal,
        exchange: None,
        skip: 0,
    }
}

/// A seed that is a function of its reasons alone: another order of prompts changes no answer.
pub fn seed(run: u64, reasons: &[&str]) -> u64 {
    let mut digest = Sha256::new();
    digest.update(run.to_le_bytes());
    for reason in reasons {
        digest.update((reason.len() as u64).to_le_bytes());
        digest.update(reason);
    }
    let bytes: [u8; 8] = digest.finalize()[..8].try_into().expect("a digest of 32 bytes");
    u64::from_le_bytes(bytes)
}

// === impl JobOptions ===

impl Default for JobOptions {
    fn default() -> Self {
        Self { in_flight_max: IN_FLIGHT_MAX, progress: true, patience: PATIENCE }
    }
}

// === impl Kept ===

impl std::fmt::Display for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} answers are kept; repeat the command to go on from there",
            self.answered, self.asked
        )
    }
}

// === impl Job ===

impl<'a> Job<'a> {
    fn new(
        questions: &'a [Question],
        cluster: &'a dyn Cluster,
        options: &'a JobOptions,
        open: &[usize],
        distinct: usize,
    ) -> Self {
        let bar = match options.progress {
            true => ProgressBar::new(distinct as u64),
            false => ProgressBar::hidden(),
        };
        let template = "{bar:30} {pos}/{len} answers, {msg}{eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("it is a template"));
        bar.set_position((distinct - open.len()) as u64);
        // What an earlier life answered says nothing about this one's speed.
        bar.reset_eta();
        let now = Instant::now();
        Self {
            questions,
            cluster,
            options,
            open: open
                .iter()
                .map(|index| Attempt { index: *index, number: 0, wait: Duration::ZERO })
                .collect(),
            pace: Pace::new(options.in_flight_max),
            bar,
            refusals: 0,
            tokens: 0,
            began: now,
            last_answer: now,
        }
    }

    async fn run(&mut self, journal: &mut Journal) -> Result<(), JobError> {
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < self.pace.limit()
                && let Some(attempt) = self.open.pop_front()
            {
                running.push(ask(self.cluster, self.questions[attempt.index].request.clone(), attempt));
            }
            let Some(outcome) = running.next().await else { return Ok(()) };
            match outcome.result {
                Ok(transcript) => self.answered(outcome.index, &transcript, journal)?,
                Err(status) => {
                    let attempt = self.refused(outcome.index, outcome.number, outcome.begun, status)?;
                    self.open.push_front(attempt);
                }
            }
        }
    }

    fn answered(
        &mut self,
        index: usize,
        transcript: &Transcript,
        journal: &mut Journal,
    ) -> Result<(), JobError> {
        let answer = Answer::of(transcript);
        self.tokens += u64::from(answer.tokens);
        self.last_answer = Instant::now();
        self.pace.answered();
        journal.append(&self.questions[index].key, answer)?;
        let speed = self.tokens as f64 / self.began.elapsed().as_secs_f64().max(1e-9);
        self.bar.set_message(format!("{speed:.0} tokens/s, {} refusals, ", self.refusals));
        self.bar.inc(1);
        Ok(())
    }

    /// The next attempt, or the reason why there is none.
    fn refused(
        &mut self,
        index: usize,
        number: u32,
        begun: Instant,
        status: Status,
    ) -> Result<Attempt, JobError> {
        if !is_temporary(status.code()) {
            let origin = self.questions[index].origin.clone();
            return Err(JobError::Refused { origin, status: Box::new(status), kept: self.kept() });
        }
        if self.last_answer.elapsed() > self.options.patience {
            let patience = self.options.patience;
            return Err(JobError::Away { patience, status: Box::new(status), kept: self.kept() });
        }
        self.refusals += 1;
        self.pace.refused(begun);
        let asked = status.get_error_details().retry_info().and_then(|retry| retry.retry_delay);
        let own = RETRY_DELAY.saturating_mul(1 << number.min(16)).min(RETRY_DELAY_MAX);
        Ok(Attempt { index, number: number + 1, wait: asked.unwrap_or(own) })
    }

    fn kept(&self) -> Kept {
        Kept { answered: self.bar.position() as usize, asked: self.bar.length().unwrap_or(0) as usize }
    }
}

async fn ask(cluster: &dyn Cluster, request: GenerateRequest, attempt: Attempt) -> Outcome {
    tokio::time::sleep(attempt.wait).await;
    let begun = Instant::now();
    let result = cluster.answer(request).await;
    Outcome { index: attempt.index, number: attempt.number, begun, result }
}

/// Whether the same request may succeed later.
fn is_temporary(code: Code) -> bool {
    // `Unknown` is what a broken connection becomes.
    matches!(code, Code::Unavailable | Code::ResourceExhausted | Code::Aborted | Code::Unknown)
}

fn field_hint(status: &Status) -> String {
    let details = status.get_error_details();
    let field = details.bad_request().and_then(|bad| bad.field_violations.first());
    field.map_or(String::new(), |violation| format!(" (field {})", violation.field))
}

// === impl Answer ===

impl Answer {
    /// Whether the model ended it, and not a limit.
    pub fn is_finished(&self) -> bool {
        self.finish_reason == "stop"
    }

    fn of(transcript: &Transcript) -> Self {
        let choice = transcript.choices.first();
        Self {
            text: choice.map_or(String::new(), |choice| choice.text.clone()),
            tokens: choice.map_or(0, |choice| choice.tokens.len() as u32),
            finish_reason: choice
                .and_then(|choice| choice.finished.as_ref())
                .map_or("unknown", finish_reason_name)
                .to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
