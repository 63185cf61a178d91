//! One job over a cluster: a list of questions, each asked until it is answered, every answer kept in a journal.
//!
//! Answers come back in the order of the questions, whoever answered them and in which life of the program. A token is
//! a function of models, request and position, so that a job that is killed and continued ends with the same bytes.

mod journal;
mod models;

use std::{
    collections::{HashMap, VecDeque},
    io::Write as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tonic::Status;
use uniarm_batch::{Away, Done, Drive, DriveOptions, PATIENCE, field_hint};
use uniarm_proto::{
    ChatMessage, GenerateRequest, Input, OnRewardLoss, Priority, Sampling, Transcript, pb,
    transcript::finish_reason_name,
};

pub use journal::Journal;
pub use models::{Identities, ModelsConfig};
pub use uniarm_batch::{Cluster, LogError as JournalError, hexadecimal, seed};

/// Questions in flight at most, where nobody says otherwise: rows beyond it make a step slower, not a token cheaper.
pub const IN_FLIGHT_MAX: usize = 64;

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
    #[error("{away}\n{kept}")]
    Away { away: Away, kept: Kept },
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What is not lost when a job fails.
#[derive(Debug, Clone, Copy)]
pub struct Kept {
    answered: usize,
    asked: usize,
}

/// A job while it runs.
struct Job<'a> {
    questions: &'a [Question],
    /// Questions that have not been asked yet.
    open: VecDeque<usize>,
    drive: Drive<'a>,
    bar: ProgressBar,
    tokens: u64,
    began: Instant,
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
        // Who has closed standard error wants the work all the same.
        let _ = writeln!(
            std::io::stderr(),
            "note: {} lines of {} are damaged (the first is line {first}); their questions are asked again",
            damaged.len(),
            journal.path().display()
        );
    }
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
        audit: false,
    }
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
        let drive = DriveOptions {
            in_flight_max: options.in_flight_max,
            patience: options.patience,
            // A question that fails by itself stops the job: its answer would be missing in whatever is made of it.
            attempts_max: 1,
        };
        Self {
            questions,
            open: open.iter().copied().collect(),
            drive: Drive::new(cluster, drive),
            bar,
            tokens: 0,
            began: Instant::now(),
        }
    }

    async fn run(&mut self, journal: &mut Journal) -> Result<(), JobError> {
        loop {
            while self.drive.has_room()
                && let Some(index) = self.open.pop_front()
            {
                self.drive.ask(index as u64, self.questions[index].request.clone());
            }
            match self.drive.next().await {
                None => return Ok(()),
                Some(Err(away)) => return Err(JobError::Away { away, kept: self.kept() }),
                Some(Ok(Done { number, result: Ok(transcript) })) => {
                    self.answered(number as usize, &transcript, journal)?;
                }
                Some(Ok(Done { number, result: Err(status) })) => {
                    let origin = self.questions[number as usize].origin.clone();
                    return Err(JobError::Refused { origin, status: Box::new(status), kept: self.kept() });
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
        journal.append(&self.questions[index].key, answer)?;
        let speed = self.tokens as f64 / self.began.elapsed().as_secs_f64().max(1e-9);
        self.bar.set_message(format!("{speed:.0} tokens/s, {} refusals, ", self.drive.refusals()));
        self.bar.inc(1);
        Ok(())
    }

    fn kept(&self) -> Kept {
        Kept { answered: self.bar.position() as usize, asked: self.bar.length().unwrap_or(0) as usize }
    }
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
