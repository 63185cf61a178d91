//! The cluster that a job asks: one that runs already, or one of its own that starts and stops with the job.

use std::path::Path;

use clap::Args;
use futures_util::future::BoxFuture;
use tonic::Status;
use uniarm_proto::{ClusterClient, GenerateRequest, Transcript};
use uniarm_trainer::cluster_job::{Cluster, IN_FLIGHT_MAX, JobOptions, ModelsConfig};

use crate::{
    args::COUNT_MAX,
    bounds,
    client::{self, EndpointArgs, KeyArgs},
    part::Part,
    worker,
};

/// Where a job's questions go, and how many at once.
#[derive(Debug, Clone, Args)]
pub struct JobArgs {
    /// A router that serves the models of the configuration; repeatable: where one is lost, the job goes on at another
    /// [default: a cluster of its own for the length of the job]
    #[arg(long, env = "UNIARM_ENDPOINT", value_delimiter = ',')]
    pub endpoint: Vec<String>,
    #[command(flatten)]
    pub key: KeyArgs,
    /// Questions in flight at most; fewer while the cluster refuses
    #[arg(long, default_value_t = IN_FLIGHT_MAX, value_name = "N", value_parser = bounds::within(1..=COUNT_MAX))]
    pub in_flight: usize,
    /// Print one JSON object instead of progress and tables
    #[arg(long)]
    pub json: bool,
}

/// A router that answers, and the process behind it where that is the job's own.
pub struct JobCluster {
    routers: ClusterClient,
    own: Option<Part>,
}

// === impl JobArgs ===

impl JobArgs {
    pub fn options(&self) -> JobOptions {
        JobOptions { in_flight_max: self.in_flight, progress: !self.json, ..JobOptions::default() }
    }
}

/// A configuration's models with paths that are good from anywhere; the demo model is fetched where none is named.
pub async fn resolve(models: &ModelsConfig, folder: &Path) -> anyhow::Result<ModelsConfig> {
    let demo_model = match models.base {
        Some(_) => None,
        None => Some(worker::demo_model().await?),
    };
    Ok(models.resolved(folder, demo_model))
}

// === impl JobCluster ===

impl JobCluster {
    /// Dials the router of `--endpoint`, or starts a cluster with `models` and waits until it is ready.
    pub async fn open(args: &JobArgs, models: &ModelsConfig) -> anyhow::Result<Self> {
        if !args.endpoint.is_empty() {
            let routers = EndpointArgs { endpoint: args.endpoint.clone(), key: args.key.clone() };
            return Ok(Self { routers: client::dial(&routers).await?, own: None });
        }
        let mut flags = ["--grpc", "127.0.0.1:0", "--http-listen", "none"].map(str::to_owned).to_vec();
        flags.extend(models.flags());
        // One pass over one copy of the weights, where both roles have the same.
        if models.reward.is_none() {
            flags.push("--fused".to_owned());
        }
        let own = Part::start("up", &flags).await?;
        let routers = client::dial(&EndpointArgs::of(&own.address)).await?;
        Ok(Self { routers, own: Some(own) })
    }

    pub async fn close(self) -> anyhow::Result<()> {
        match self.own {
            Some(part) => part.stop().await,
            None => Ok(()),
        }
    }
}

impl Cluster for JobCluster {
    fn answer(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Transcript, Status>> {
        Box::pin(client::generate(&self.routers, request, None, |_| {}))
    }
}
