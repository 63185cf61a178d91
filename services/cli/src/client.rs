//! Talking to a cluster: dial, ask, and say what went wrong in words.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tonic::Status;
use tonic_types::StatusExt as _;
use uniarm_proto::{
    ClusterClient, Dice, Event, GenerateRequest, Transcript,
    client::{ApiKey, address},
};

use crate::tls::TrustArgs;

#[derive(Debug, Clone, Args)]
pub struct EndpointArgs {
    /// A router; repeatable: when one is lost, the answer goes on at another
    #[arg(
        long,
        env = "UNIARM_ENDPOINT",
        default_value = "http://127.0.0.1:7000",
        value_delimiter = ',',
        value_parser = address
    )]
    pub endpoint: Vec<String>,
    #[command(flatten)]
    pub key: KeyArgs,
}

#[derive(Debug, Clone, Default, Args)]
pub struct KeyArgs {
    /// Key that the routers know you by, where they ask for one; rather in the environment, which `ps` does not show
    #[arg(long, env = "UNIARM_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<ApiKey>,
    #[command(flatten)]
    pub trust: TrustArgs,
}

/// An error as `--json` prints it.
#[derive(Debug, serde::Serialize)]
pub struct ErrorObject {
    pub code: String,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// The routers at these addresses, one of which answers.
pub async fn dial(routers: &EndpointArgs) -> anyhow::Result<ClusterClient> {
    let endpoints = &routers.endpoint;
    let dialer = routers.key.trust.dialer()?;
    let mut last = None;
    for endpoint in endpoints {
        // That it is an address shows before anybody is dialled.
        dialer
            .channel(endpoint)
            .with_context(|| format!("{endpoint:?} is not an address such as http://127.0.0.1:7000"))?;
        match dialer.connect(endpoint).await {
            Ok(_) => {
                let cluster = ClusterClient::over(&dialer, Dice::default(), endpoints)?;
                return Ok(cluster.with_key(routers.key.api_key.clone()));
            }
            Err(error) => last = Some(anyhow::Error::from(error)),
        }
    }
    let last = last.unwrap_or_else(|| anyhow::anyhow!("no address is given"));
    Err(last.context(format!(
        "no router answers at {}; start one with `uniarm up`, or name it with --endpoint",
        endpoints.join(", ")
    )))
}

/// Runs a request to its end; `seen` is shown each event as it comes.
pub async fn generate(
    cluster: &ClusterClient,
    request: GenerateRequest,
    timeout: Option<Duration>,
    mut seen: impl FnMut(&Event),
) -> Result<Transcript, Status> {
    let mut answers = cluster.generate(request, timeout);
    let mut transcript = Transcript::default();
    while let Some(event) = answers.next().await {
        let event = event?;
        transcript.apply(&event).map_err(|error| Status::internal(error.to_string()))?;
        seen(&event);
    }
    Ok(transcript)
}

// === impl EndpointArgs ===

impl EndpointArgs {
    /// One router, which asks for no key.
    pub fn of(address: &str) -> Self {
        Self { endpoint: vec![format!("http://{address}")], key: KeyArgs::default() }
    }
}

// === impl ErrorObject ===

impl From<&Status> for ErrorObject {
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
        let delay = details.retry_info().and_then(|retry| retry.retry_delay);
        Self {
            code: format!("{:?}", status.code()),
            message: status.message().to_owned(),
            field: violation.map(|violation| violation.field.clone()),
            cause: details.error_info().map(|info| info.reason.clone()),
            retry_after_ms: delay.map(|delay| delay.as_millis() as u64),
        }
    }
}
