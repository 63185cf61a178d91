//! `uniarm doctor`: what this machine has and does, what is missing for which purpose, and what to do about it.

mod gpu;
mod machine;
mod model;

use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use uniarm_cluster::StoreAddress;
use uniarm_proto::MemberId;

use crate::{args::THREADS_MAX, bench::floor::Machine, bounds, store::StoreArgs, worker};

/// A store that takes longer is none to build on.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// Counted up in the store, to see that it takes a write: no member has this id.
const STORE_PROBE: &str = "doctor";

#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Also load this model and decode with it: a folder, a .gguf file, hf://org/name, or `demo`
    #[arg(long, env = "UNIARM_MODEL")]
    pub model: Option<String>,
    #[command(flatten)]
    pub store: StoreArgs,
    /// Threads to measure with [default: half of the machine's cores, as a worker takes]
    #[arg(long, env = "UNIARM_THREADS", value_parser = bounds::within(1..=THREADS_MAX))]
    pub threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub(crate) struct Finding {
    area: &'static str,
    what: String,
    state: State,
    /// What was found, in numbers.
    detail: String,
    /// What to do, where there is something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    Ok,
    /// Not there, and not needed by everybody.
    Missing,
    /// It works, worse than it should.
    Poor,
    Failed,
}

/// Prints findings as they come, or keeps them for one JSON object.
struct Report {
    findings: Vec<Finding>,
    json: bool,
}

// === impl Finding ===

impl Finding {
    pub(crate) fn new(
        area: &'static str,
        what: impl Into<String>,
        state: State,
        detail: impl Into<String>,
    ) -> Self {
        Self { area, what: what.into(), state, detail: detail.into(), advice: None }
    }

    pub(crate) fn ok(area: &'static str, what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(area, what, State::Ok, detail)
    }

    pub(crate) fn advised(self, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..self }
    }
}

// === impl State ===

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::Poor => "poor",
            Self::Failed => "FAILED",
        }
    }
}

// === impl Report ===

impl Report {
    fn add(&mut self, findings: impl IntoIterator<Item = Finding>) {
        for finding in findings {
            if !self.json {
                let Finding { area, what, state, detail, advice } = &finding;
                if self.findings.last().is_none_or(|last| last.area != *area) {
                    println!("{}", area.to_uppercase());
                }
                println!("  {:8} {what:18} {detail}", state.word());
                if let Some(advice) = advice {
                    println!("  {:8} {:18} → {advice}", "", "");
                }
            }
            self.findings.push(finding);
        }
    }

    fn end(&self) -> anyhow::Result<()> {
        let failed: Vec<&str> = self
            .findings
            .iter()
            .filter(|finding| finding.state == State::Failed)
            .map(|finding| finding.what.as_str())
            .collect();
        if self.json {
            println!("{}", serde_json::json!({ "findings": self.findings, "healthy": failed.is_empty() }));
        }
        if failed.is_empty() { Ok(()) } else { bail!("not in order: {}", failed.join(", ")) }
    }
}

// === run ===

/// # Errors
/// When something that was asked for does not work; what is merely missing is no error.
pub async fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let mut report = Report { findings: Vec::new(), json: args.json };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or((cores / 2).max(1));
    report.add(machine::facts(cores));
    eprintln!("measuring the machine ({threads} thread(s) for each worker)");
    let measured = Machine::look(threads).await?;
    report.add(machine::rates(&measured));
    report.add(machine::folders());
    report.add(tokio::task::spawn_blocking(gpu::look).await?);
    if let Some(source) = args.model {
        let source = if source == "demo" { worker::demo_model().await? } else { source };
        let findings = tokio::task::spawn_blocking(move || model::look(&source, measured)).await?;
        report.add(findings);
    }
    if args.store.parse()? != StoreAddress::Memory {
        report.add([store(&args.store).await]);
    }
    report.end()
}

/// A write and its answer.
async fn store(args: &StoreArgs) -> Finding {
    let (area, what) = ("store", args.address.as_str());
    let asked = async {
        let store = args.open()?;
        let began = Instant::now();
        let probe = MemberId(STORE_PROBE.to_owned());
        let counted = tokio::time::timeout(STORE_PATIENCE, store.next_generation(&probe)).await;
        let took = began.elapsed();
        let members = store.watch().borrow().members().len();
        store.close().await;
        match counted {
            Ok(counted) => counted.map(|_| (took, members)).map_err(anyhow::Error::from),
            Err(_) => bail!("no answer within {} s", STORE_PATIENCE.as_secs()),
        }
    };
    match asked.await {
        Ok((took, members)) => {
            let detail = format!("a write takes {:.1} ms; {members} members", took.as_secs_f64() * 1e3);
            Finding::ok(area, what, detail)
        }
        Err(error) => Finding::new(area, what, State::Failed, format!("{error:#}")).advised(
            "is etcd running there, and do --store-ca, --store-user and the firewall fit it? (docs/tls.md)",
        ),
    }
}
