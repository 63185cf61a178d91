//! `uniarm bench load`: a cluster under open-loop load, as its clients see it.

mod report;
mod steps;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use futures_util::future::join_all;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tonic::{Code, Status};
use uniarm_proto::{
    ClusterClient, Event, GenerateRequest, GuidanceTerm, Input, OnRewardLoss, Priority, Sampling,
    pb::RewardModel,
};

use self::{
    report::{Report, Served},
    steps::Steps,
};
use super::{
    args::BenchLoadArgs,
    arrivals::{Arrival, Traffic},
    step::window_name,
};
use crate::{
    client::{self, EndpointArgs},
    part::{Part, free_address},
    worker::{self, Threads},
};

/// What a request may take at most: beyond, the cluster is not slow but broken.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// How one request went.
enum Outcome {
    Served(Served),
    /// The cluster said that it has no room.
    Refused,
    Failed(String),
}

/// What all requests of a load share.
struct Client {
    cluster: ClusterClient,
    rewards: Vec<RewardModel>,
    temperature: f32,
    progress: ProgressBar,
}

pub async fn run(args: BenchLoadArgs) -> anyhow::Result<()> {
    let admin = args.write_steps.as_ref().map(|_| free_address()).transpose()?;
    let (router, part) = match &args.endpoint {
        Some(endpoint) => (EndpointArgs { endpoint: vec![endpoint.clone()], key: args.key.clone() }, None),
        None => {
            let mut flags = up_flags(&args).await?;
            flags.extend(admin.iter().flat_map(|admin| ["--admin".to_owned(), admin.clone()]));
            let part = Part::start("up", &flags).await?;
            (EndpointArgs::of(&part.address), Some(part))
        }
    };
    let measured = measure(&args, &router, admin).await;
    if let Some(part) = part {
        part.stop().await?;
    }
    let report = measured?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

/// The flags that shape a cluster, handed on to one of our own.
async fn up_flags(args: &BenchLoadArgs) -> anyhow::Result<Vec<String>> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => worker::demo_model().await?,
    };
    let (engine, exchange) = (&args.engine, &args.exchange);
    let mut flags =
        ["--grpc", "127.0.0.1:0", "--http-listen", "none", "--base", &model].map(str::to_owned).to_vec();
    let pairs = [
        ("--exchange", value_name(&exchange.exchange)),
        ("--list-length", exchange.list_length.to_string()),
        ("--draft-window", window_name(exchange.draft_window)),
        ("--draft-rows", value_name(&exchange.draft_rows)),
        ("--threads", worker::threads(engine, Threads::Half).to_string()),
        ("--kv-tokens", engine.kv_tokens.to_string()),
        ("--step-tokens", engine.step_tokens.to_string()),
        ("--running-max", engine.running_max.to_string()),
        ("--waiting-max", engine.waiting_max.to_string()),
    ];
    flags.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
    if engine.no_prefix_cache {
        flags.push("--no-prefix-cache".to_owned());
    }
    for (name, text) in worker::DEMO_PROMPTED {
        flags.extend(["--prompted".to_owned(), format!("{name}={text}")]);
    }
    Ok(flags)
}

/// A value of a flag as it is written.
fn value_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |possible| possible.get_name().to_owned())
}

/// Measures the load at every rate; `admin` is where the cluster shows its steps, if they are wanted.
async fn measure(
    args: &BenchLoadArgs,
    router: &EndpointArgs,
    admin: Option<String>,
) -> anyhow::Result<Report> {
    let cluster = client::dial(router).await?;
    let served = cluster.list_models().await;
    let served = served.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    let rewards = served.reward_models;
    anyhow::ensure!(args.guided == 0.0 || !rewards.is_empty(), "no reward model is served; try --guided 0");
    let mut report = Report::new(args);
    for &rate in &args.rate {
        let traffic = Traffic {
            rate,
            duration: Duration::from_secs_f64(args.seconds),
            prompt_tokens: args.prompt_tokens.clone(),
            answer_tokens: args.answer_tokens.clone(),
            guided: args.guided,
        };
        let arrivals = traffic.arrivals(args.seed);
        if let Some(file) = &args.write_trace {
            let trace: Vec<_> = arrivals.iter().map(|arrival| arrival.as_trace(rewards.len())).collect();
            let written = std::fs::write(file, uniarm_simulate::trace::write(&trace));
            written.with_context(|| format!("cannot write {}", file.display()))?;
        }
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
        let progress = ProgressBar::new(arrivals.len() as u64).with_style(style);
        progress.set_message(format!("{rate} requests/s"));
        let client = Client {
            cluster: cluster.clone(),
            rewards: rewards.clone(),
            temperature: args.temperature,
            progress,
        };
        if let Some(file) = &args.write_lines {
            let lines: String = arrivals.iter().map(|arrival| client.line(arrival)).collect();
            std::fs::write(file, lines).with_context(|| format!("cannot write {}", file.display()))?;
        }
        let begin = Instant::now();
        let asked = join_all(arrivals.iter().map(|arrival| client.ask(arrival, begin)));
        let mut steps = admin.clone().map(Steps::of);
        let outcomes = match &mut steps {
            None => asked.await,
            Some(steps) => tokio::select! {
                outcomes = asked => outcomes,
                error = steps.follow() => return Err(error),
            },
        };
        let seconds = begin.elapsed().as_secs_f64();
        if let Some((steps, file)) = steps.zip(args.write_steps.as_ref()) {
            steps.write(begin, file).await?;
        }
        client.progress.finish_and_clear();
        report.add(rate, &outcomes, seconds);
    }
    Ok(report)
}

// === impl Client ===

impl Client {
    /// Asks when the time has come, and follows the answer to its end.
    async fn ask(&self, arrival: &Arrival, begin: Instant) -> Outcome {
        tokio::time::sleep_until((begin + arrival.at).into()).await;
        // From the moment at which it should have been sent: what the client itself is late by counts too.
        let due = begin + arrival.at;
        let mut times = Vec::new();
        let seen = |event: &Event| {
            if let Event::Tokens(tokens) = event {
                times.extend(tokens.ids.iter().map(|_| due.elapsed().as_secs_f64()));
            }
        };
        let asked = client::generate(&self.cluster, self.request(arrival), Some(REQUEST_TIMEOUT), seen).await;
        self.progress.inc(1);
        match asked {
            Ok(_) => Outcome::Served(Served { times }),
            Err(status) => Outcome::of(&status),
        }
    }

    fn request(&self, arrival: &Arrival) -> GenerateRequest {
        GenerateRequest {
            request_id: String::new(),
            model: String::new(),
            input: Input::Tokens(arrival.prompt.clone()),
            sampling: Sampling {
                temperature: self.temperature,
                seed: Some(arrival.seed),
                max_tokens: arrival.answer_tokens,
                ignore_eos: true,
                ..Sampling::default()
            },
            guidance: arrival.guidance.map(|draw| self.term(draw)).into_iter().collect(),
            base_strength: 1.0,
            on_reward_loss: OnRewardLoss::Wait,
            priority: Priority::Normal,
            exchange: None,
            skip: 0,
            audit: false,
        }
    }

    /// The request as a line of a batch.
    fn line(&self, arrival: &Arrival) -> String {
        let term = |term: GuidanceTerm| {
            let preference: serde_json::Map<_, _> =
                term.preference.into_iter().map(|(name, weight)| (name, json!(weight))).collect();
            json!({ "reward": term.reward, "preference": preference, "strength": term.strength })
        };
        let line = json!({
            "token_ids": arrival.prompt,
            "temperature": self.temperature,
            "seed": arrival.seed,
            "max_tokens": arrival.answer_tokens,
            "ignore_eos": true,
            "guidance": arrival.guidance.map(|draw| term(self.term(draw))).into_iter().collect::<Vec<_>>(),
        });
        format!("{line}\n")
    }

    /// One of the reward models; where it has several objectives, a mixture of the first two.
    fn term(&self, (which, weight): (u32, f32)) -> GuidanceTerm {
        let reward = &self.rewards[which as usize % self.rewards.len()];
        let preference = match reward.objectives.as_slice() {
            [first, second, ..] => {
                vec![(first.name.clone(), weight), (second.name.clone(), 1.0 - weight)]
            }
            _ => Vec::new(),
        };
        GuidanceTerm { reward: reward.name.clone(), preference, strength: 1.0 }
    }
}

// === impl Outcome ===

impl Outcome {
    fn of(status: &Status) -> Self {
        match status.code() {
            Code::ResourceExhausted => Self::Refused,
            code => Self::Failed(format!("{code:?}: {}", status.message())),
        }
    }
}
