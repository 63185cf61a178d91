//! `uniarm batch`: files of requests become files of answers.

pub mod metrics;
mod show;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::bail;
use clap::Args;
use futures_util::future::BoxFuture;
use tonic::Status;
use uniarm_batch::{
    ATTEMPTS_MAX, Cluster, DriveOptions, Ends, JobOptions, Order, PATIENCE, Part, Plan, Preferences,
    Progress, Source,
};
use uniarm_cluster::Work;
use uniarm_proto::{ClusterClient, GenerateRequest, Priority, Transcript, pb::ListModelsResponse};
use uniarm_runtime::{Admin, Metrics, Readiness};

use crate::{
    args::{COUNT_MAX, GuidanceArgs, SamplingArgs},
    bounds,
    client::{self, EndpointArgs},
    generate, output,
    process::start_admin,
    store::StoreArgs,
    tls::AdminArgs,
};
use show::Display;

/// Requests in flight at most, where nobody says otherwise; the pace finds what the pools take below it.
const IN_FLIGHT_MAX: usize = 256;

#[derive(Debug, Clone, Args)]
pub struct BatchArgs {
    /// JSONL files, .gz or not; patterns such as 'part-*.jsonl'; or - for standard input
    #[arg(required = true, value_name = "INPUT")]
    pub input: Vec<String>,
    /// File for the answers, compressed if it ends in .gz; the same command goes on where it stopped
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Ask each line under each of these preferences: grid:0.1, or a JSONL file of {"objective": weight}
    #[arg(long, value_name = "grid:STEP|FILE")]
    pub preferences: Option<Preferences>,
    /// Objectives of the grid, comma-separated [default: all of the reward model]
    #[arg(long, value_delimiter = ',', requires = "preferences")]
    pub objectives: Vec<String>,
    /// Write answers as they finish, not in the order of the input
    #[arg(long)]
    pub as_finished: bool,
    /// Write bad lines with their error, instead of refusing the whole input
    #[arg(long)]
    pub keep_going: bool,
    /// Take one range of the lines: 0/8 is the first of eight
    #[arg(long, default_value_t = Part::default(), value_name = "INDEX/COUNT")]
    pub part: Part,
    /// Share the job with every process that names it so: each takes ranges of lines through the store, until all are done
    #[arg(long, value_name = "JOB", conflicts_with_all = ["part", "as_finished"])]
    pub share: Option<String>,
    #[command(flatten)]
    pub store: StoreArgs,
    /// Requests in flight at most; fewer while the cluster queues or refuses them
    #[arg(long, default_value_t = IN_FLIGHT_MAX, value_name = "N", value_parser = bounds::within(1..=COUNT_MAX))]
    pub in_flight: usize,
    /// Seconds until an answer is worth nothing
    #[arg(long, value_parser = bounds::seconds)]
    pub timeout: Option<f64>,
    /// Base model of lines that name none [default: the only one served]
    #[arg(long)]
    pub model: Option<String>,
    /// Continue prompts as they are, without the chat template
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub guidance: GuidanceArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub admin: AdminArgs,
    /// Print progress as a JSON object each second, and one at the end
    #[arg(long)]
    pub json: bool,
}

/// The cluster as a job asks it.
struct Routers {
    client: ClusterClient,
    timeout: Option<Duration>,
}

pub async fn run(args: Box<BatchArgs>) -> anyhow::Result<()> {
    output::work_unread();
    let timeout = args.timeout.map(Duration::from_secs_f64);
    let client = client::dial(&args.endpoint).await?;
    let served =
        client.list_models().await.map_err(|status| anyhow::anyhow!("{}", generate::sentence(&status)))?;
    let options = JobOptions {
        plan: plan(&args, &served)?,
        source: tokio::task::block_in_place(|| Source::open(&args.input, &args.output))?,
        output: args.output.clone(),
        order: if args.as_finished { Order::Finished } else { Order::Input },
        keep_going: args.keep_going,
        part: args.part,
        drive: DriveOptions { in_flight_max: args.in_flight, patience: PATIENCE, attempts_max: ATTEMPTS_MAX },
        ends: Arc::default(),
    };
    let routers = Routers { client, timeout };
    let work = shared_work(&args)?;
    let left = Arc::new(AtomicU64::new(0));
    let _admin = watch(&args.admin, &options.ends, &left)?;
    let mut display = Display::new(args.json, &args.endpoint);
    let mut seen = |progress: &Progress| {
        left.store(progress.requests.saturating_sub(progress.done), Ordering::Relaxed);
        display.show(progress);
    };
    let ran = match &work {
        None => uniarm_batch::run(&options, &routers, &mut seen).await,
        Some(work) => uniarm_batch::run_shared(&options, work, &routers, &mut seen).await,
    };
    display.clear();
    let progress = ran?;
    display.end(&progress, &args.output);
    if progress.failed > 0 {
        bail!(
            "{} of {} requests have no answer; {} has their errors",
            progress.failed,
            progress.requests,
            args.output.display()
        );
    }
    Ok(())
}

/// Lets Prometheus see what the job does, if that is wanted.
fn watch(args: &AdminArgs, ends: &Arc<Ends>, left: &Arc<AtomicU64>) -> anyhow::Result<Option<Admin>> {
    let (metrics, readiness) = (Metrics::new(), Readiness::starting());
    let (ends, left) = (Arc::clone(ends), Arc::clone(left));
    metrics::watch_batches(&metrics, move || ends.tally(1, left.load(Ordering::Relaxed)));
    readiness.set_ready();
    start_admin(args, &metrics, "batch", &readiness)
}

/// The job of `--share` in the store.
fn shared_work(args: &BatchArgs) -> anyhow::Result<Option<Work>> {
    let Some(name) = &args.share else { return Ok(None) };
    if args.input.iter().any(|name| name == uniarm_batch::STANDARD_INPUT) {
        bail!("--share wants files that every process can read, and standard input is one process's");
    }
    args.store.shared_work(name, PATIENCE).map(Some)
}

fn plan(args: &BatchArgs, served: &ListModelsResponse) -> anyhow::Result<Plan> {
    let mut defaults = generate::template(&args.guidance, &args.sampling);
    defaults.model = match (&args.model, served.base_models.as_slice()) {
        (Some(name), _) => name.clone(),
        // By name: another model under the same address is another job.
        (None, [only]) => only.name.clone(),
        (None, _) => String::new(),
    };
    // Nobody waits for a line; whoever waits for an answer goes first.
    defaults.priority = Priority::Low;
    let fan_out = match &args.preferences {
        None => Vec::new(),
        Some(_) if args.guidance.preference.is_some() => {
            bail!(
                "--preference gives every line one preference, --preferences several; leave one of them out"
            )
        }
        Some(preferences) => {
            let objectives = match args.objectives.is_empty() {
                true => objectives(args.guidance.reward.as_deref(), served),
                false => args.objectives.clone(),
            };
            preferences.read(&objectives)?
        }
    };
    let has_template = served
        .base_models
        .iter()
        .find(|model| model.name == defaults.model)
        .is_none_or(|model| model.has_chat_template);
    let seed = args.sampling.seed.unwrap_or(0);
    Ok(Plan { defaults, is_raw: args.raw || !has_template, fan_out, seed, only: None })
}

/// Of the reward model that is named; else of the first that has several; else of all that have one.
fn objectives(reward: Option<&str>, served: &ListModelsResponse) -> Vec<String> {
    let models = &served.reward_models;
    let several = || models.iter().find(|model| model.objectives.len() > 1);
    let one = match reward {
        // NAME@VERSION of the catalogue is listed as NAME.
        Some(name) => models.iter().find(|model| {
            model.name == name || name.rsplit_once('@').is_some_and(|(bare, _)| bare == model.name)
        }),
        None => several(),
    };
    let of: Vec<_> = one.map_or_else(|| models.iter().collect(), |model| vec![model]);
    of.into_iter().flat_map(|model| &model.objectives).map(|objective| objective.name.clone()).collect()
}

// === impl Routers ===

impl Cluster for Routers {
    fn answer(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Transcript, Status>> {
        Box::pin(self.client.complete(request, self.timeout))
    }
}
