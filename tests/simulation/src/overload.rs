//! More requests than a cluster can answer in time: who is refused, who is late, who waits how long.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};
use uniarm_proto::{ClusterClient, Event, GenerateRequest, Priority, Transcript, limits::CHOICES_MAX};

use crate::{
    Pool,
    cluster::{Cluster, Shape},
    quiet, runtime,
};

/// Urgent requests that are under way at any moment: more than there are places on a worker.
const URGENT: usize = 48;

/// Requests that nobody is in a hurry for, and when they begin.
const PATIENT: usize = 8;
const PATIENT_BEGIN: Duration = Duration::from_secs(1);

/// Requests of so many answers each as are allowed that have more of them than a base worker holds.
const CROWDING: usize = 6;

/// Answers that share two places.
const CROWD: usize = 24;

/// By then a flood has arrived.
const FLOODED_AFTER: Duration = Duration::from_millis(25);

/// So long after the last of them an overloaded cluster is idle.
const REST: Duration = Duration::from_secs(2);

/// What the clients of an overloaded cluster heard.
#[derive(Debug, Default)]
pub struct Overload {
    pub completed: usize,
    /// Taken, and ended by their deadline.
    pub late: usize,
    /// After what time, and why.
    pub refused: Vec<(Duration, Status)>,
    /// Sentences; none: all is well.
    pub failures: Vec<String>,
}

// === impl Pool ===

impl Pool {
    /// So many requests within so much time on one worker of each kind, each with a deadline.
    pub fn overload(&self, requests: u32, within: Duration, deadline: Duration) -> Overload {
        runtime().block_on(async {
            let cluster = Cluster::start(Shape::UNDISTURBED, 0).await;
            let mut overload = self.rush(&cluster, requests, within, deadline).await;
            overload.failures.extend(quiet(&cluster).await);
            overload
        })
    }

    /// When and how a long answer ends that has a short deadline, on a cluster that has been overloaded and is idle now.
    pub fn short_deadline_after(&self, overloaded: u32, deadline: Duration) -> (Duration, Status) {
        runtime().block_on(async {
            let cluster = Cluster::start(Shape::UNDISTURBED, 0).await;
            self.rush(&cluster, overloaded, Duration::from_millis(200), Duration::from_millis(600)).await;
            sleep(REST).await;
            let length = |answer: &Transcript| answer.choices[0].tokens.len();
            let longest = (0..self.requests.len()).max_by_key(|index| length(&self.undisturbed[*index]));
            let request = self.requests[longest.unwrap()].clone();
            let client = cluster.client("client");
            // Connections are there: only the answer takes time.
            client.complete(request.clone(), None).await.unwrap();
            let began = Instant::now();
            let ended = client.complete(request, Some(deadline)).await.map(|_| ()).unwrap_err();
            (began.elapsed(), ended)
        })
    }

    /// How long patient requests wait for their first token while urgent ones take every place that becomes free.
    pub fn behind_urgent_requests(&self, lasts: Duration) -> Vec<Duration> {
        runtime().block_on(async {
            let shape = Shape { requests_max: 128, ..Shape::UNDISTURBED };
            let cluster = Cluster::start(shape, 0).await;
            let client = cluster.client("client");
            let end = Instant::now() + lasts;
            let urgent = (0..URGENT).map(|number| {
                let (client, mut turn) = (client.clone(), number);
                async move {
                    while Instant::now() < end {
                        let request = self.asked(turn, Priority::High);
                        client.complete(request, None).await.unwrap();
                        turn += URGENT;
                    }
                }
            });
            let urgent = join_all(urgent);
            let patient = join_all((0..PATIENT).map(|number| {
                let (client, request) = (client.clone(), self.asked(number, Priority::Low));
                async move {
                    sleep(PATIENT_BEGIN).await;
                    first_token(client, request).await
                }
            }));
            let (_, waits) = tokio::join!(urgent, patient);
            waits
        })
    }

    /// How many of as many patient requests as there are places are taken when all come at once, and whether an urgent
    /// one that comes then is answered.
    pub fn flood(&self) -> (usize, bool) {
        runtime().block_on(async {
            let cluster = Cluster::start(Shape::UNDISTURBED, 0).await;
            let client = cluster.client("client");
            let places = Shape::UNDISTURBED.requests_max;
            let patient = join_all((0..places).map(|number| {
                let (client, request) = (client.clone(), self.asked(number, Priority::Low));
                async move { client.complete(request, None).await.is_ok() }
            }));
            let urgent = async {
                sleep(FLOODED_AFTER).await;
                client.complete(self.asked(0, Priority::High), None).await.is_ok()
            };
            let (patient, urgent) = tokio::join!(patient, urgent);
            (patient.into_iter().filter(|is_answered| *is_answered).count(), urgent)
        })
    }

    /// When and how requests end whose answers find no room together: a worker has a place for each of them, and its queue
    /// has too few.
    pub fn too_many_answers(&self) -> Vec<(Duration, Status)> {
        runtime().block_on(async {
            let cluster = Cluster::start(Shape::UNDISTURBED, 0).await;
            let client = cluster.client("client");
            let asked = (0..CROWDING).map(|_| {
                let (client, mut request) = (client.clone(), self.requests[0].clone());
                request.sampling.n = CHOICES_MAX;
                request.guidance.clear();
                async move {
                    let began = Instant::now();
                    let ended = client.complete(request, None).await;
                    ended.err().map(|status| (began.elapsed(), status))
                }
            });
            join_all(asked).await.into_iter().flatten().collect()
        })
    }

    /// How long a crowd's guided answers take together when each of them has more sessions than its reward worker has
    /// places, and how often anybody lost blocks meanwhile.
    pub fn few_places(&self, waiting_max: usize) -> (Duration, usize) {
        runtime().block_on(async {
            let shape = Shape { places: 2, waiting_max, ..Shape::UNDISTURBED };
            let cluster = Cluster::start(shape, 0).await;
            let client = cluster.client("client");
            let terms = |request: &&GenerateRequest| request.guidance.len() > 2;
            let many = self.requests.iter().filter(terms).cycle().take(CROWD);
            let began = Instant::now();
            let answers = join_all(many.map(|request| client.complete(request.clone(), None))).await;
            answers.into_iter().for_each(|answer| drop(answer.unwrap()));
            let lost = [
                ("base-0", "uniarm_base_preemptions_total"),
                ("reward-0", "uniarm_reward_preemptions_total"),
            ];
            let lost = lost.map(|(host, metric)| cluster.gauge(host, metric).unwrap());
            (began.elapsed(), lost.iter().sum())
        })
    }

    fn asked(&self, turn: usize, priority: Priority) -> GenerateRequest {
        GenerateRequest { priority, ..self.requests[turn % self.requests.len()].clone() }
    }

    async fn rush(&self, cluster: &Cluster, requests: u32, within: Duration, deadline: Duration) -> Overload {
        let client = cluster.client("client");
        let asked = (0..requests).map(|number| {
            let index = number as usize % self.requests.len();
            let (client, request) = (client.clone(), self.requests[index].clone());
            async move {
                sleep(within * number / requests).await;
                let began = Instant::now();
                let answer = client.complete(request, Some(deadline)).await;
                (index, began.elapsed(), answer)
            }
        });
        let mut overload = Overload::default();
        for (index, took, answer) in join_all(asked).await {
            match answer {
                Ok(transcript) if transcript.choices == self.undisturbed[index].choices => {
                    overload.completed += 1;
                }
                Ok(_) => overload.failures.push(format!("request-{index} was answered differently")),
                Err(status) if took >= deadline => {
                    overload.late += usize::from(status.code() == Code::DeadlineExceeded);
                }
                Err(status) => overload.refused.push((took, status)),
            }
        }
        overload
    }
}

async fn first_token(client: ClusterClient, request: GenerateRequest) -> Duration {
    let began = Instant::now();
    let mut answers = client.generate(request, None);
    while let Some(event) = answers.next().await {
        if matches!(event.unwrap(), Event::Tokens(_)) {
            break;
        }
    }
    began.elapsed()
}
