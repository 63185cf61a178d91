//! Talking to a cluster: dial, ask, and say what went wrong in words.

use std::time::Duration;

use anyhow::Context as _;
use tonic::{Request, Status, transport::Channel};
use tonic_types::StatusExt as _;
use uniarm_proto::{
    Event, GenerateRequest, Transcript, client,
    pb::{self, inference_client::InferenceClient},
};

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

pub async fn dial(endpoint: &str) -> anyhow::Result<InferenceClient<Channel>> {
    let dialled = client::endpoint(endpoint)
        .with_context(|| format!("{endpoint:?} is not an address such as http://127.0.0.1:7000"))?
        .connect()
        .await;
    let channel = dialled.with_context(|| {
        format!("no router answers at {endpoint}; start one with `uniarm up`, or name it with --endpoint")
    })?;
    Ok(client::inference(channel))
}

pub async fn list_models(client: &mut InferenceClient<Channel>) -> Result<pb::ListModelsResponse, Status> {
    Ok(client.list_models(pb::ListModelsRequest {}).await?.into_inner())
}

/// Runs a request to its end; `seen` is shown each event as it comes.
pub async fn generate(
    client: &mut InferenceClient<Channel>,
    request: GenerateRequest,
    timeout: Option<Duration>,
    mut seen: impl FnMut(&Event),
) -> Result<Transcript, Status> {
    let mut request = Request::new(pb::GenerateRequest::from(request));
    if let Some(timeout) = timeout {
        request.set_timeout(timeout);
    }
    let mut events = client.generate(request).await?.into_inner();
    let mut transcript = Transcript::default();
    while let Some(response) = events.message().await? {
        let Some(event) = response.event else { continue };
        transcript.apply(&event).map_err(|error| Status::internal(error.to_string()))?;
        seen(&event);
    }
    if transcript.summary.is_none() {
        return Err(Status::unavailable("the stream ended before the answer did"));
    }
    Ok(transcript)
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
