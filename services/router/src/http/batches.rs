//! `/v1/batches`: the jobs of `uniarm batch`, kept by the router that has the folder.

use std::sync::Arc;

use axum::{
    Extension, Router,
    extract::{Path, Request, State},
    http::Uri,
    response::Response,
    routing::{get, post},
};
use futures_util::future::BoxFuture;
use serde_json::{Map, Value};
use tokio::task::block_in_place;
use tonic::Status;
use uniarm_batch::{
    Cluster,
    host::{BatchRecord, Clusters, NewBatch, Owner, WINDOW, not_here},
};
use uniarm_openai::{Call, Fields};
use uniarm_proto::{GenerateRequest, Refusal, Transcript};

use super::{Door, body_of, failure::Failure, json_text, listing::Listing};
use crate::{server::RouterService, tenants::Caller};

/// Batches of one page of the list, and the most that may be asked for, as OpenAI has it.
const PAGE_BATCHES: usize = 20;
const PAGE_BATCHES_MAX: usize = 100;

/// OpenAI's bounds of `metadata`.
const METADATA_PAIRS_MAX: usize = 16;
const METADATA_KEY_CHARACTERS_MAX: usize = 64;
const METADATA_VALUE_CHARACTERS_MAX: usize = 512;

pub(super) fn routes() -> Router<Door> {
    Router::new()
        .route("/v1/batches", get(list).post(create))
        .route("/v1/batches/{id}", get(retrieve))
        .route("/v1/batches/{id}/cancel", post(cancel))
}

/// The cluster of one owner. Lines of batches are asked in this process: no connection to itself whose address somebody
/// would have to know, and the admission, the placement and the recovery that every request has.
struct Owned {
    service: RouterService,
    owner: Owner,
}

impl Clusters for RouterService {
    fn of(&self, owner: &Owner) -> Arc<dyn Cluster> {
        Arc::new(Owned { service: self.clone(), owner: owner.clone() })
    }
}

impl Cluster for Owned {
    fn answer(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Transcript, Status>> {
        Box::pin(async move {
            // Looked up for each line: rights change while a batch runs.
            let caller = self.service.tenants().named(&self.owner)?;
            self.service.complete(&caller, request.into(), None).await
        })
    }
}

async fn list(State(door): State<Door>, caller: Extension<Caller>, uri: Uri) -> Result<Response, Failure> {
    let listing = Listing::of(&uri, PAGE_BATCHES, PAGE_BATCHES_MAX, &[])?;
    let batches = door.host()?.list().into_iter().filter(|batch| batch.owner == caller.name());
    listing.page(batches.map(|batch| (batch.id.clone(), batch.as_json())))
}

async fn create(
    State(door): State<Door>,
    caller: Extension<Caller>,
    request: Request,
) -> Result<Response, Failure> {
    let host = Arc::clone(door.host_that_stays()?);
    let body = body_of(request).await?;
    let asked = read(&body, caller.name()).map_err(Failure::of_body)?;
    door.file("input_file_id", &asked.input_file_id, &caller)?;
    let record = block_in_place(|| host.create(asked))?;
    Ok(shown(&record))
}

async fn retrieve(
    State(door): State<Door>,
    caller: Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    Ok(shown(&door.batch(&id, &caller)?))
}

async fn cancel(
    State(door): State<Door>,
    caller: Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    let host = Arc::clone(door.host()?);
    door.batch(&id, &caller)?;
    let record = block_in_place(|| host.cancel(&id))?;
    Ok(shown(&record))
}

impl Door {
    /// A batch of the caller's; others' are as if they were not.
    fn batch(&self, id: &str, caller: &Caller) -> Result<BatchRecord, Failure> {
        let batch = self.host()?.get(id)?;
        if batch.owner != caller.name() {
            return Err(not_here("batch_id", id).into());
        }
        Ok(batch)
    }
}

fn shown(record: &BatchRecord) -> Response {
    json_text(record.as_json().to_string())
}

fn read(body: &[u8], owner: &str) -> Result<NewBatch, Refusal> {
    let mut fields = Fields::of_body(body)?;
    let mut required = |name| fields.text(name)?.ok_or_else(|| Refusal::invalid(name, "is missing"));
    let input_file_id = required("input_file_id")?;
    let endpoint = required("endpoint")?;
    let window = required("completion_window")?;
    let call = Call::at(&endpoint).map_err(|reason| fields.error("endpoint", reason))?;
    if window != WINDOW {
        return Err(fields.error("completion_window", format!("is {window:?}, wants {WINDOW}")));
    }
    let metadata = fields.value("metadata").map(metadata).transpose()?;
    fields.finish()?;
    Ok(NewBatch { owner: owner.to_owned(), input_file_id, call, metadata })
}

fn metadata(value: Value) -> Result<Map<String, Value>, Refusal> {
    let Value::Object(pairs) = value else {
        return Err(Refusal::invalid("metadata", "wants an object of strings"));
    };
    if pairs.len() > METADATA_PAIRS_MAX {
        let reason = format!("has {} pairs, the limit is {METADATA_PAIRS_MAX}", pairs.len());
        return Err(Refusal::invalid("metadata", reason));
    }
    for (key, value) in &pairs {
        let length = value.as_str().map(|text| text.chars().count());
        if key.chars().count() > METADATA_KEY_CHARACTERS_MAX
            || length.is_none_or(|length| length > METADATA_VALUE_CHARACTERS_MAX)
        {
            let reason = format!(
                "wants a name of {METADATA_KEY_CHARACTERS_MAX} characters at most, and a string of {METADATA_VALUE_CHARACTERS_MAX}"
            );
            return Err(Refusal::invalid(format!("metadata.{key}"), reason));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_batch_is_asked_for_in_openais_words() {
        let body = |more: Value| {
            let mut body = json!({
                "input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h",
                "metadata": { "a": "b" },
            });
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            body.to_string()
        };
        let asked = read(body(json!({})).as_bytes(), "").unwrap();
        assert_eq!((asked.input_file_id.as_str(), asked.call), ("file-1", Call::Completion));
        for (change, field) in [
            (json!({ "endpoint": "/v1/embeddings" }), "endpoint"),
            (json!({ "completion_window": "1h" }), "completion_window"),
            (json!({ "input_file_id": null }), "input_file_id"),
            (json!({ "metadata": { "a": 1 } }), "metadata.a"),
            (json!({ "metadata": [] }), "metadata"),
            (json!({ "output_expires_after": { "seconds": 5 } }), "output_expires_after"),
        ] {
            assert_eq!(read(body(change).as_bytes(), "").unwrap_err().field.as_deref(), Some(field));
        }
    }
}
