//! Requests on their way: as many as the pace allows, each asked again until it is answered or refused for good.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uniarm_proto::{GenerateRequest, Transcript, refusal};

use crate::Pace;

/// Without a single answer for this long a job gives up: longer than a worker takes to restart and load a model.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Attempts of a line that fails by a fault of its own: what was chance is over by then.
pub const ATTEMPTS_MAX: u32 = 5;

/// Wait after the first refusal of a request that names no delay of its own; it doubles with each further one.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// A cluster that was away is noticed again after this long at most.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(15);

/// Attempts of a request during which its workers were lost, while others are answered: then it is what loses them.
const LOSSES_MAX: u32 = 32;

/// Whoever answers a request: a router, or in tests a function.
pub trait Cluster: Send + Sync {
    fn answer(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Transcript, Status>>;
}

#[derive(Debug, Clone)]
pub struct DriveOptions {
    /// Requests in flight at most; fewer while the cluster refuses or queues them.
    pub in_flight_max: usize,
    pub patience: Duration,
    /// Attempts of a request that fails by a fault of its own which may be chance.
    pub attempts_max: u32,
}

/// The end of a request.
pub struct Done {
    pub number: u64,
    pub result: Result<Transcript, Status>,
}

/// The cluster answers nobody.
#[derive(Debug, thiserror::Error)]
#[error("no answer for {} s, last because: {}", patience.as_secs(), status.message())]
pub struct Away {
    pub patience: Duration,
    pub status: Box<Status>,
}

/// All requests on their way to one cluster.
pub struct Drive<'a> {
    cluster: &'a dyn Cluster,
    options: DriveOptions,
    pace: Pace,
    running: FuturesUnordered<BoxFuture<'a, Outcome>>,
    again: VecDeque<Attempt>,
    refusals: u64,
    last_answer: Instant,
}

/// A request in its n-th attempt.
struct Attempt {
    number: u64,
    request: GenerateRequest,
    attempt: u32,
    wait: Duration,
}

/// How an attempt ended.
struct Outcome {
    attempt: Attempt,
    begun: Instant,
    result: Result<Transcript, Status>,
}

/// What a failed attempt says about the next one.
enum Verdict {
    Again,
    Final,
}

// === impl Drive ===

impl<'a> Drive<'a> {
    pub fn new(cluster: &'a dyn Cluster, options: DriveOptions) -> Self {
        Self {
            cluster,
            pace: Pace::new(options.in_flight_max),
            options,
            running: FuturesUnordered::new(),
            again: VecDeque::new(),
            refusals: 0,
            last_answer: Instant::now(),
        }
    }

    pub fn has_room(&self) -> bool {
        self.in_flight() < self.pace.limit()
    }

    pub fn in_flight(&self) -> usize {
        self.running.len() + self.again.len()
    }

    /// Attempts that ended without an answer and were repeated.
    pub fn refusals(&self) -> u64 {
        self.refusals
    }

    /// `number` is the caller's, and comes back with the end.
    pub fn ask(&mut self, number: u64, request: GenerateRequest) {
        self.send(Attempt { number, request, attempt: 0, wait: Duration::ZERO });
    }

    /// The next request to end; none where nothing is in flight.
    ///
    /// # Errors
    /// When nobody has been answered for too long.
    pub async fn next(&mut self) -> Option<Result<Done, Away>> {
        loop {
            while self.running.len() < self.pace.limit()
                && let Some(attempt) = self.again.pop_front()
            {
                self.send(attempt);
            }
            let Outcome { attempt, begun, result } = self.running.next().await?;
            let status = match result {
                Ok(transcript) => {
                    self.last_answer = Instant::now();
                    let timing = transcript.summary.as_ref().and_then(|summary| summary.timing);
                    self.pace.answered(&timing.unwrap_or_default());
                    return Some(Ok(Done { number: attempt.number, result: Ok(transcript) }));
                }
                Err(status) => status,
            };
            if let Verdict::Final = self.verdict(&status, attempt.attempt + 1) {
                self.last_answer = Instant::now();
                return Some(Ok(Done { number: attempt.number, result: Err(status) }));
            }
            if self.last_answer.elapsed() > self.options.patience {
                return Some(Err(Away { patience: self.options.patience, status: Box::new(status) }));
            }
            self.repeat(attempt, begun, &status);
        }
    }

    fn send(&mut self, attempt: Attempt) {
        let cluster = self.cluster;
        self.running.push(Box::pin(async move {
            tokio::time::sleep(attempt.wait).await;
            let begun = Instant::now();
            let result = cluster.answer(attempt.request.clone()).await;
            Outcome { attempt, begun, result }
        }));
    }

    fn verdict(&self, status: &Status, attempts: u32) -> Verdict {
        let attempts_max = match status.code() {
            Code::ResourceExhausted => u32::MAX,
            // As the request asked, if its reward is lost: soon there may be another.
            Code::Unavailable if refusal::cause_of(status).as_deref() == Some(refusal::REWARD_LOST) => {
                self.options.attempts_max
            }
            // `Unknown` is what a broken connection becomes.
            Code::Unavailable | Code::Aborted | Code::Unknown => LOSSES_MAX,
            Code::Internal | Code::DeadlineExceeded | Code::Cancelled => self.options.attempts_max,
            _ => 1,
        };
        if attempts < attempts_max { Verdict::Again } else { Verdict::Final }
    }

    fn repeat(&mut self, attempt: Attempt, begun: Instant, status: &Status) {
        self.refusals += 1;
        if status.code() != Code::Internal {
            self.pace.refused(begun);
        }
        let asked = status.get_error_details().retry_info().and_then(|retry| retry.retry_delay);
        let own = RETRY_DELAY.saturating_mul(1 << attempt.attempt.min(16)).min(RETRY_DELAY_MAX);
        let wait = asked.unwrap_or(own);
        self.again.push_back(Attempt { attempt: attempt.attempt + 1, wait, ..attempt });
    }
}

/// The field that a refusal names, for a sentence.
pub fn field_hint(status: &Status) -> String {
    let details = status.get_error_details();
    let field = details.bad_request().and_then(|bad| bad.field_violations.first());
    field.map_or(String::new(), |violation| format!(" (field {})", violation.field))
}
