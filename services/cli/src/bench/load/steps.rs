//! What the engines of a cluster wrote down during a load: the file that `uniarm simulate --observed` reads.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use uniarm_runtime::steps::STEPS_KEPT;

/// Between two looks: an engine keeps [`STEPS_KEPT`], more than the demo model takes meanwhile.
const INTERVAL: Duration = Duration::from_secs(2);

/// How long a look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);

/// The steps of every engine that an admin port speaks of, in the order of its answer.
pub struct Steps {
    /// `host:port`
    admin: String,
    engines: Vec<Engine>,
}

struct Engine {
    name: String,
    /// By number, with the moment at which each ended.
    steps: BTreeMap<u64, (Instant, serde_json::Map<String, serde_json::Value>)>,
}

/// What the port answers, and what is written.
#[derive(Deserialize, Serialize)]
struct Answer {
    engines: Vec<Answered>,
}

#[derive(Deserialize, Serialize)]
struct Answered {
    engine: String,
    steps: Vec<Step>,
}

#[derive(Deserialize, Serialize)]
struct Step {
    age_ms: f64,
    number: u64,
    #[serde(flatten)]
    others: serde_json::Map<String, serde_json::Value>,
}

// === impl Steps ===

impl Steps {
    pub fn of(admin: String) -> Self {
        Self { admin, engines: Vec::new() }
    }

    /// Looks again and again, until nobody waits for it any more or a look fails.
    pub async fn follow(&mut self) -> anyhow::Error {
        loop {
            tokio::time::sleep(INTERVAL).await;
            if let Err(error) = self.look().await {
                return error;
            }
        }
    }

    /// Looks a last time, and writes the steps that ended since `begin`.
    pub async fn write(mut self, begin: Instant, file: &Path) -> anyhow::Result<()> {
        self.look().await?;
        let end = Instant::now();
        let engines = self.engines.into_iter().map(|engine| engine.since(begin, end)).collect();
        let text = serde_json::to_string(&Answer { engines })?;
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    async fn look(&mut self) -> anyhow::Result<()> {
        let answered = tokio::time::timeout(LOOK_TIMEOUT, self.ask()).await;
        let failed = || format!("asking {} for its steps", self.admin);
        let (now, answer) = answered.context("no answer in time").flatten().with_context(failed)?;
        for (place, Answered { engine: name, steps }) in answer.engines.into_iter().enumerate() {
            if place == self.engines.len() {
                self.engines.push(Engine { name, steps: BTreeMap::new() });
            }
            for Step { age_ms, number, others } in steps {
                let age = Duration::try_from_secs_f64(age_ms / 1e3).unwrap_or_default();
                let ended = now.checked_sub(age).unwrap_or(now);
                self.engines[place].steps.entry(number).or_insert((ended, others));
            }
        }
        Ok(())
    }

    /// The answer, and when it was asked for.
    async fn ask(&self) -> anyhow::Result<(Instant, Answer)> {
        let mut connection = TcpStream::connect(&self.admin).await?;
        let now = Instant::now();
        let head = format!("GET /debug/steps?last={STEPS_KEPT}&format=json HTTP/1.0\r\n\r\n");
        connection.write_all(head.as_bytes()).await?;
        let mut text = String::new();
        connection.read_to_string(&mut text).await?;
        let (_, body) = text.split_once("\r\n\r\n").context("no HTTP")?;
        Ok((now, serde_json::from_str(body)?))
    }
}

// === impl Engine ===

impl Engine {
    fn since(self, begin: Instant, end: Instant) -> Answered {
        let during = self.steps.into_iter().filter(|(_, (ended, _))| *ended >= begin);
        let steps = during.map(|(number, (ended, others))| {
            let age_ms = end.saturating_duration_since(ended).as_secs_f64() * 1e3;
            Step { age_ms, number, others }
        });
        Answered { engine: self.name, steps: steps.collect() }
    }
}
