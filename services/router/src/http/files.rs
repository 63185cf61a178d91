//! `/v1/files`: what batches read and write. Files come from and go to disk as they travel.

use std::sync::Arc;

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Path, Request, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::stream::try_unfold;
use serde_json::json;
use tokio::{fs::File, io::AsyncReadExt as _, task::block_in_place};
use uniarm_batch::host::{FileRecord, PURPOSE, not_here, refused};
use uniarm_proto::{Refusal, limits::NAME_BYTES_MAX};

use super::{Door, failure::Failure, json_text, listing::Listing, multipart::Multipart, seconds_now};
use crate::tenants::Caller;

/// Bytes that are read from disk at a time.
const READ_BYTES: usize = 64 << 10;

/// Files of one page of the list, as OpenAI has it.
const PAGE_FILES: usize = 10_000;

/// Of a file that comes without a name.
const UNNAMED: &str = "unnamed.jsonl";

pub(super) fn routes() -> Router<Door> {
    Router::new()
        // An upload counts its bytes itself.
        .route("/v1/files", get(list).post(upload).layer(DefaultBodyLimit::disable()))
        .route("/v1/files/{id}", get(retrieve).delete(delete))
        .route("/v1/files/{id}/content", get(content))
}

impl Door {
    /// A file of the caller's; others' are as if they were not. `param`: the field that names it.
    pub(super) fn file(&self, param: &str, id: &str, caller: &Caller) -> Result<FileRecord, Failure> {
        let file = self.host()?.shelf().get(param, id)?;
        if file.owner != caller.name() {
            return Err(not_here(param, id).into());
        }
        Ok(file)
    }
}

async fn list(State(door): State<Door>, caller: Extension<Caller>, uri: Uri) -> Result<Response, Failure> {
    let host = door.host()?;
    let listing = Listing::of(&uri, PAGE_FILES, PAGE_FILES, &["purpose"])?;
    let is_listed = |purpose: &str| listing.filter("purpose").is_none_or(|asked| asked == purpose);
    let files = host.shelf().list().into_iter();
    let files = files.filter(|file| file.owner == caller.name() && is_listed(&file.purpose));
    listing.page(files.map(|file| (file.id.clone(), file.as_json())))
}

async fn upload(
    State(door): State<Door>,
    caller: Extension<Caller>,
    request: Request,
) -> Result<Response, Failure> {
    let host = door.host_that_stays()?;
    door.cors.refuse_foreign_pages(request.headers())?;
    let mut form = Multipart::of(request)?;
    let (mut purpose, mut file) = (None, None);
    while let Some(part) = form.next_part().await? {
        match part.name.as_str() {
            "purpose" => purpose = Some(purpose_of(&form.text("purpose", NAME_BYTES_MAX).await?)?),
            "file" if file.is_none() => {
                let filename = filename_of(part.filename)?;
                let mut upload = host.shelf().begin_upload().await?;
                while let Some(chunk) = form.chunk().await? {
                    upload.write(&chunk).await?;
                }
                file = Some((upload, filename));
            }
            "file" => return Err(wrong("file", "is there twice, wants one")),
            other => {
                return Err(wrong(other, "is not supported: leave it out (/openapi.json lists what is)"));
            }
        }
    }
    let purpose = purpose.ok_or_else(|| wrong("purpose", "is missing"))?;
    let (upload, filename) = file.ok_or_else(|| wrong("file", "is missing"))?;
    let record = upload.finish(caller.name().to_owned(), filename, purpose, seconds_now()).await?;
    Ok(json_text(record.as_json().to_string()))
}

fn purpose_of(text: &str) -> Result<String, Failure> {
    match text {
        PURPOSE => Ok(text.to_owned()),
        other => Err(wrong("purpose", &format!("is {other:?}, wants {PURPOSE}: nothing else reads files"))),
    }
}

fn filename_of(filename: Option<String>) -> Result<String, Failure> {
    match filename {
        None => Ok(UNNAMED.to_owned()),
        Some(name) if name.len() <= NAME_BYTES_MAX => Ok(name),
        Some(_) => Err(wrong("file", &format!("has a name of more than {NAME_BYTES_MAX} bytes"))),
    }
}

fn wrong(field: &str, reason: &str) -> Failure {
    Failure::of_body(Refusal::invalid(field, reason))
}

async fn retrieve(
    State(door): State<Door>,
    caller: Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    let record = door.file("file_id", &id, &caller)?;
    Ok(json_text(record.as_json().to_string()))
}

async fn delete(
    State(door): State<Door>,
    caller: Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    let host = Arc::clone(door.host()?);
    door.file("file_id", &id, &caller)?;
    block_in_place(|| host.delete_file(&id))?;
    Ok(json_text(json!({ "id": id, "object": "file", "deleted": true }).to_string()))
}

async fn content(
    State(door): State<Door>,
    caller: Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    let shelf = door.host()?.shelf();
    let record = door.file("file_id", &id, &caller)?;
    let file = File::open(shelf.path(&id)).await.map_err(|error| refused(&error))?;
    let bytes = try_unfold(file, |mut file| async move {
        let mut piece = vec![0; READ_BYTES];
        let length = file.read(&mut piece).await?;
        piece.truncate(length);
        Ok::<_, std::io::Error>((length > 0).then(|| (Bytes::from(piece), file)))
    });
    let headers = [
        (header::CONTENT_TYPE, "application/jsonl".to_owned()),
        (header::CONTENT_LENGTH, record.bytes.to_string()),
        // What somebody uploaded is no page of ours.
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((StatusCode::OK, headers, Body::from_stream(bytes)).into_response())
}
