//! `uniarm demo`: three real processes, one prompt, several preferences side by side.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::bail;
use clap::Args;
use futures_util::future::join_all;
use indicatif::{ProgressBar, ProgressStyle};
use uniarm_proto::{
    ClusterClient, Event, GenerateRequest, GuidanceTerm, OnRewardLoss, Priority, Sampling, Transcript, pb,
};

use crate::{
    client::{self, EndpointArgs},
    demo_adapter::DemoAdapter,
    generate,
    part::{Part, READY_TIMEOUT},
    side_by_side, worker,
};

/// Strength w of the demo: prompted reward models are mild, so that 2 shows what they do.
const PROMPTED_STRENGTH: f32 = 2.0;

/// What the caches have room for besides the four answers, up to so many tokens of each: long prompts. Workers take that memory
/// at the start, and a demo need not wait for as much as they have by themselves.
const PROMPT_KV_TOKENS: u32 = 4096;
const ANSWER_KV_TOKENS_MAX: u32 = 2048;

#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// What to answer
    #[arg(default_value = "What should I do on a rainy Sunday?")]
    pub prompt: String,
    /// A GGUF file, a Hugging Face folder, or hf://org/name [default: the demo model]
    #[arg(long)]
    pub model: Option<String>,
    /// Adapter folder to steer with [default: the one that ships, or system texts where --model names another model]
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Length of each answer
    #[arg(long, default_value_t = 72)]
    pub max_tokens: u32,
}

/// One column of the result.
struct Column {
    title: String,
    guidance: Vec<GuidanceTerm>,
}

pub async fn run(args: DemoArgs) -> anyhow::Result<()> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => {
            println!("demo 1/3  model: fetching SmolLM2-135M-Instruct, unless it is cached");
            worker::demo_model().await?
        }
    };
    // The adapter that ships fits the demo model alone.
    let shipped = (args.model.is_none() && args.adapter.is_none()).then(DemoAdapter::unpack).transpose()?;
    let given = args.adapter.as_ref().map(|folder| folder.display().to_string());
    let adapter = shipped.as_ref().map(DemoAdapter::flag).or(given);
    println!("demo 2/3  cluster: starting a reward worker, a base worker and a router");
    let mut parts = Vec::new();
    let shown = show(&args, &model, adapter.as_deref(), &mut parts).await;
    let stopped = stop(parts).await;
    shown?;
    stopped?;
    println!("\nAll three processes have stopped. Next: `uniarm up`, then in another terminal");
    println!("  uniarm generate --preference positive=0.7,concise=0.3 \"Tell me about the sea.\"");
    Ok(())
}

async fn show(
    args: &DemoArgs,
    model: &str,
    adapter: Option<&str>,
    parts: &mut Vec<Part>,
) -> anyhow::Result<()> {
    let mut reward_flags = vec!["--model".to_owned(), model.to_owned()];
    match adapter {
        Some(flag) => reward_flags.extend(["--adapter".to_owned(), flag.to_owned()]),
        None => {
            for (name, text) in worker::DEMO_PROMPTED {
                reward_flags.extend(["--prompted".to_owned(), format!("{name}={text}")]);
            }
        }
    }
    let kv_tokens = PROMPT_KV_TOKENS + 4 * args.max_tokens.min(ANSWER_KV_TOKENS_MAX);
    let kv_flags = ["--kv-tokens".to_owned(), kv_tokens.to_string()];
    reward_flags.extend(kv_flags.clone());
    // Both load at the same time.
    let base_flags = [["--model".to_owned(), model.to_owned()], kv_flags].concat();
    let (reward, base) = tokio::join!(start("reward", &reward_flags), start("base", &base_flags));
    let (reward, base) = (reward.map(|part| push(parts, part)), base.map(|part| push(parts, part)));
    let router_flags = ["--reward-peer".to_owned(), reward?, "--base-peer".to_owned(), base?];
    let router = push(parts, start("router", &router_flags).await?);

    let cluster = client::dial(&EndpointArgs::of(&router)).await?;
    let served = wait_for_models(&cluster).await?;
    let columns = columns(&served, adapter.is_some());
    println!("demo 3/3  prompt: {:?}, answered {} times in one batch\n", args.prompt, columns.len());
    let total = columns.len() as u64 * u64::from(args.max_tokens);
    let style =
        ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {per_sec}").expect("it is a template");
    let progress = ProgressBar::new(total).with_style(style);
    let began = Instant::now();
    let answers = columns.iter().map(|column| {
        let (cluster, progress) = (cluster.clone(), progress.clone());
        let request = request(args, column.guidance.clone());
        async move {
            let count = |event: &Event| {
                if let Event::Tokens(tokens) = event {
                    progress.inc(tokens.ids.len() as u64);
                }
            };
            client::generate(&cluster, request, None, count).await
        }
    });
    let answers: Vec<Transcript> = join_all(answers)
        .await
        .into_iter()
        .collect::<Result<_, _>>()
        .map_err(|status| anyhow::anyhow!("{}", generate::sentence(&status)))?;
    progress.finish_and_clear();
    let titles = columns.iter().map(|column| column.title.as_str());
    side_by_side::print(titles.zip(&answers));
    print_figures(&answers, began.elapsed());
    Ok(())
}

/// The same prompt unguided and under three preferences over the first two objectives that can be mixed.
fn columns(served: &pb::ListModelsResponse, trained: bool) -> Vec<Column> {
    let (first, second, strength) = if trained {
        let objectives =
            served.reward_models.first().map(|reward| reward.objectives.as_slice()).unwrap_or_default();
        match objectives {
            [first, second, ..] => (first.name.clone(), second.name.clone(), 1.0),
            _ => ("positive".to_owned(), "concise".to_owned(), 1.0),
        }
    } else {
        ("positive".to_owned(), "concise".to_owned(), PROMPTED_STRENGTH)
    };
    let mut columns = vec![Column { title: "unguided".into(), guidance: Vec::new() }];
    for (a, b) in [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)] {
        let preference = vec![(first.clone(), a), (second.clone(), b)];
        columns.push(Column {
            title: format!("{first} {:.0} %, {second} {:.0} %", 100.0 * a, 100.0 * b),
            guidance: vec![GuidanceTerm { reward: String::new(), preference, strength }],
        });
    }
    columns
}

fn request(args: &DemoArgs, guidance: Vec<GuidanceTerm>) -> GenerateRequest {
    GenerateRequest {
        request_id: String::new(),
        model: String::new(),
        input: generate::chat(None, &args.prompt),
        sampling: Sampling {
            temperature: 0.0,
            seed: Some(7),
            max_tokens: args.max_tokens,
            ..Sampling::default()
        },
        guidance,
        base_strength: 1.0,
        on_reward_loss: OnRewardLoss::Wait,
        priority: Priority::Normal,
        exchange: None,
        skip: 0,
        audit: false,
    }
}

// === processes ===

fn push(parts: &mut Vec<Part>, part: Part) -> String {
    let address = part.address.clone();
    parts.push(part);
    address
}

async fn start(role: &'static str, flags: &[String]) -> anyhow::Result<Part> {
    let part = Part::start(role, flags).await?;
    println!("          {role} is ready at {} (process {})", part.address, part.id());
    Ok(part)
}

/// The router finds its peers within a second.
async fn wait_for_models(cluster: &ClusterClient) -> anyhow::Result<pb::ListModelsResponse> {
    let began = Instant::now();
    loop {
        let served = cluster.list_models().await.map_err(|status| anyhow::anyhow!("{status}"))?;
        if !served.base_models.is_empty() && !served.reward_models.is_empty() {
            return Ok(served);
        }
        if began.elapsed() > READY_TIMEOUT {
            bail!("the router found no workers");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Each in its turn, the front door first.
async fn stop(parts: Vec<Part>) -> anyhow::Result<()> {
    for part in parts.into_iter().rev() {
        part.stop().await?;
    }
    Ok(())
}

// === printing ===

fn print_figures(answers: &[Transcript], elapsed: Duration) {
    let mut tokens = 0;
    let mut guided = 0;
    let mut certified = 0;
    let mut bytes = 0;
    for summary in answers.iter().filter_map(|answer| answer.summary.as_ref()) {
        tokens += summary.usage.unwrap_or_default().completion_tokens;
        let exchange = summary.exchange.unwrap_or_default();
        guided += exchange.certified + exchange.queried + exchange.dense;
        certified += exchange.certified;
        bytes += exchange.bytes;
    }
    let seconds = elapsed.as_secs_f64();
    println!(
        "\n{tokens} tokens in {seconds:.1} s ({:.1} per second over all answers)",
        f64::from(tokens) / seconds
    );
    if guided > 0 {
        println!(
            "{:.0} bytes of reward logits per guided token, {:.1} % of tokens certified from the lists alone",
            bytes as f64 / f64::from(guided),
            100.0 * f64::from(certified) / f64::from(guided)
        );
    }
}
