//! The HTTP front door: OpenAI's API over the admission, placement and recovery that gRPC has, and a page to try it.
//!
//! `uniarm_openai` reads a body and writes its answer, `RouterService::answer` is between them; `failure` is what any of
//! it can end with, `door_key` who asks, `catalogue` what is served, `page` the playground. `files` (which come by `multipart`) and `batches`
//! are a host's of `uniarm_batch`; `listing` is how both are listed; `cors` says which other sites' pages may ask.

mod batches;
mod catalogue;
mod cors;
mod door_key;
mod failure;
mod files;
mod listing;
mod multipart;
mod page;

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Router,
    body::{Body, Bytes, HttpBody as _},
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::from_fn_with_state,
    response::{
        IntoResponse, Response,
        sse::{Event as Sent, KeepAlive, Sse},
    },
    routing::{get, post},
};
use futures_util::{Stream, StreamExt as _, stream::unfold};
use serde_json::Value;
use tonic::Status;
use uniarm_batch::host::Host;
use uniarm_openai::{Ask, Call, Fields, Names, Writer};
use uniarm_proto::{
    Refusal,
    limits::{NAME_BYTES_MAX, REQUEST_MESSAGE_BYTES_MAX},
    pb,
};

use crate::{
    place::Scope,
    server::{GenerateStream, RouterService},
    tenants::Caller,
};
use cors::Cors;
pub use cors::Origin;
use failure::Failure;

/// What the API is, for tools.
const OPENAPI: &str = include_str!("http/openapi.json");

/// Where reading a body that is refused ends.
const DROPPED_BYTES_MAX: usize = 8 * REQUEST_MESSAGE_BYTES_MAX;

/// A client sends its body within this, or loses the connection: one that dawdles holds memory.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Silence on a stream after which a comment is sent: proxies cut what looks dead, often after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Bits of a seed that is drawn: clients whose numbers are 64-bit floats can send it back.
const DRAWN_SEED_BITS: u32 = 53;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Nginx holds an answer back until it is whole, unless told otherwise.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// What a front door may have.
#[derive(Default)]
pub struct FrontOptions {
    /// Keeps files and batches.
    pub host: Option<Arc<Host>>,
    /// Sites whose pages may ask; without any, none but its own.
    pub cors: Vec<Origin>,
}

#[derive(Clone)]
struct Door {
    service: RouterService,
    /// Files and batches, where this router keeps any.
    host: Option<Arc<Host>>,
    cors: Cors,
    /// Seconds since 1970.
    opened_at: u64,
}

/// A stream on its way to a client. Dropping it, as a client does that hangs up, cancels the request.
struct Streamed {
    events: GenerateStream,
    writer: Writer,
    names: Names,
    ready: VecDeque<String>,
    is_over: bool,
}

// === the door ===

impl RouterService {
    /// The routes of the HTTP front door.
    pub fn http_routes(&self, options: FrontOptions) -> Router {
        let FrontOptions { host, cors } = options;
        let cors = Cors::new(cors);
        let door = Door { service: self.clone(), host, cors: cors.clone(), opened_at: seconds_now() };
        Router::new()
            .route("/v1/chat/completions", post(chat))
            .route("/v1/completions", post(completion))
            .route("/v1/models", get(models))
            .route("/v1/models/{*name}", get(model))
            .route("/health", get(health))
            .route("/status", get(status))
            .route("/openapi.json", get(|| async { json_text(OPENAPI.into()) }))
            .merge(files::routes())
            .merge(batches::routes())
            .merge(page::routes())
            .fallback(no_such_path)
            .layer(from_fn_with_state(door.clone(), door_key::identify))
            .method_not_allowed_fallback(no_such_method)
            .layer(from_fn_with_state(cors, cors::cors))
            .with_state(door)
    }
}

async fn chat(State(door): State<Door>, caller: Extension<Caller>, request: Request) -> Response {
    door.answer(Call::Chat, &caller, request).await
}

async fn completion(State(door): State<Door>, caller: Extension<Caller>, request: Request) -> Response {
    door.answer(Call::Completion, &caller, request).await
}

async fn models(State(door): State<Door>, caller: Extension<Caller>) -> Response {
    json_text(door.models(&caller).to_string())
}

async fn model(State(door): State<Door>, caller: Extension<Caller>, Path(name): Path<String>) -> Response {
    let mut listed = door.models(&caller);
    let found = listed["data"].as_array_mut().and_then(|models| {
        let index = models.iter().position(|model| model["id"] == name.as_str())?;
        Some(models.swap_remove(index))
    });
    match found {
        Some(model) => json_text(model.to_string()),
        None => {
            let message = format!("{name:?} is not served; /v1/models lists what is");
            Failure::at_the_door(StatusCode::NOT_FOUND, "not_found", message).into_response()
        }
    }
}

/// Whether a request would find somebody, for load balancers.
async fn health(State(door): State<Door>) -> Response {
    let unwell = |cause, message| {
        Failure::at_the_door(StatusCode::SERVICE_UNAVAILABLE, cause, message).into_response()
    };
    if door.service.is_draining() {
        return unwell("draining", "this router is leaving");
    }
    if door.service.served(Scope::everything()).base_models.is_empty() {
        return unwell("no_base_worker", "no base worker is registered yet");
    }
    json_text(r#"{"status":"ok"}"#.into())
}

async fn status(State(door): State<Door>, caller: Extension<Caller>) -> Response {
    json_text(catalogue::status(&door.service.overview(&caller)).to_string())
}

async fn no_such_path(uri: Uri) -> Failure {
    let message = format!("{} is not here; /openapi.json lists what is", uri.path());
    Failure::at_the_door(StatusCode::NOT_FOUND, "unknown_path", message)
}

async fn no_such_method(method: Method, uri: Uri) -> Failure {
    let message = format!("{} is not for {method}; /openapi.json lists what is", uri.path());
    Failure::at_the_door(StatusCode::METHOD_NOT_ALLOWED, "unknown_method", message)
}

// === impl Door ===

impl Door {
    fn models(&self, caller: &Caller) -> Value {
        catalogue::models(&self.service.served(caller.scope()), self.opened_at)
    }

    fn host(&self) -> Result<&Arc<Host>, Failure> {
        self.host.as_ref().ok_or_else(|| {
            let message = "this router keeps no files and no batches";
            Failure::at_the_door(StatusCode::NOT_FOUND, "batches_off", message)
        })
    }

    /// For what is new: a router that is leaving takes none.
    fn host_that_stays(&self) -> Result<&Arc<Host>, Failure> {
        match self.service.is_draining() {
            true => Err(Failure::of_body(Refusal::draining())),
            false => self.host(),
        }
    }

    async fn answer(&self, call: Call, caller: &Caller, request: Request) -> Response {
        let request_id = match request_id(request.headers()) {
            Ok(request_id) => request_id,
            Err(failure) => return failure.into_response(),
        };
        let answered = self.try_answer((call, caller), request, &request_id).await;
        let mut response = answered.unwrap_or_else(IntoResponse::into_response);
        if let Ok(value) = HeaderValue::try_from(request_id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        response
    }

    async fn try_answer(
        &self,
        (call, caller): (Call, &Caller),
        request: Request,
        request_id: &str,
    ) -> Result<Response, Failure> {
        let body = body_of(request).await?;
        let Ask { request, timeout, form } = read(call, &body, request_id).map_err(|refusal| {
            self.service.relay.metrics.ended(caller.name(), "refused", refusal.code.to_tonic());
            Failure::of_body(refusal)
        })?;
        let answers = request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1);
        let (is_streamed, names) = (form.is_streamed, form.names.clone());
        let failed = |status: Status| Failure::of_request(&status, &names);
        let writer = Writer::new(form, request_id, answers, seconds_now());
        if is_streamed {
            let events = self.service.answer(caller, request, timeout).await.map_err(failed)?;
            return Ok(Streamed::begin(events, writer, names).await?.into_response());
        }
        let transcript = self.service.complete(caller, request, timeout).await.map_err(failed)?;
        Ok(json_text(writer.whole(&transcript).to_string()))
    }
}

fn read(call: Call, body: &[u8], request_id: &str) -> Result<Ask, Refusal> {
    let template = pb::GenerateRequest { request_id: request_id.to_owned(), ..Default::default() };
    let mut ask = Ask::read(call, Fields::of_body(body)?, template)?;
    let drawn = || rand::random::<u64>() >> (u64::BITS - DRAWN_SEED_BITS);
    ask.request.sampling.get_or_insert_default().seed.get_or_insert_with(drawn);
    Ok(ask)
}

/// The client's own name for its request, or one that is drawn.
fn request_id(headers: &HeaderMap) -> Result<String, Failure> {
    let Some(value) = headers.get(REQUEST_ID) else {
        return Ok(format!("{:032x}", rand::random::<u128>()));
    };
    let id = value.to_str().ok().filter(|id| !id.is_empty() && id.len() <= NAME_BYTES_MAX);
    id.map(str::to_owned).ok_or_else(|| {
        let message = format!("x-request-id: wants 1..={NAME_BYTES_MAX} visible ASCII characters");
        Failure::at_the_door(StatusCode::BAD_REQUEST, "invalid_argument", message)
    })
}

async fn body_of(request: Request) -> Result<Bytes, Failure> {
    let readable = check_json(request.headers());
    let collected = tokio::time::timeout(BODY_TIMEOUT, collect(request.into_body())).await;
    readable?;
    match collected {
        Ok(Ok(Some(body))) => Ok(body),
        Ok(Ok(None)) => {
            let message = format!("the body has more than {REQUEST_MESSAGE_BYTES_MAX} bytes");
            Err(Failure::at_the_door(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message))
        }
        Ok(Err(_)) => {
            let message = "body: broke off, or its chunks are malformed";
            Err(Failure::at_the_door(StatusCode::BAD_REQUEST, "invalid_argument", message))
        }
        Err(_) => {
            let message = format!("the body took more than {} s to arrive", BODY_TIMEOUT.as_secs());
            Err(Failure::at_the_door(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message))
        }
    }
}

/// Whether the headers say that the body is JSON as it is read here: UTF-8, and not compressed.
fn check_json(headers: &HeaderMap) -> Result<(), Failure> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("");
    let (name, parameters) = kind.split_at(kind.find(';').unwrap_or(kind.len()));
    // Not politeness: a page of another site may post what it likes here, unless it is called JSON.
    if name.trim() != "application/json" {
        return Err(unsupported(format!("content-type: is {kind:?}, wants application/json")));
    }
    let charset = multipart::parameter(parameters, "charset");
    if let Some(charset) = charset.filter(|charset| !charset.eq_ignore_ascii_case("utf-8")) {
        let message = format!("content-type: has the charset {charset:?}, wants utf-8, as all JSON has");
        return Err(unsupported(message));
    }
    check_encoding(headers)
}

/// Bodies are read as they come: what unpacks them decides how large they become.
fn check_encoding(headers: &HeaderMap) -> Result<(), Failure> {
    let is_plain = |value: &&HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    match headers.get_all(header::CONTENT_ENCODING).iter().find(|value| !is_plain(value)) {
        None => Ok(()),
        Some(value) => Err(unsupported(format!(
            "content-encoding: is {value:?}, wants identity: send the body as it is, or leave the header out"
        ))),
    }
}

fn unsupported(message: String) -> Failure {
    Failure::at_the_door(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_argument", message)
}

/// `None`: it is too large. Some of what is too much is read nevertheless: a client that still sends when it is answered
/// sees a broken connection, and not the answer.
async fn collect(body: Body) -> Result<Option<Bytes>, axum::Error> {
    if body.size_hint().lower() > DROPPED_BYTES_MAX as u64 {
        return Ok(None); // it says so itself
    }
    let mut chunks = body.into_data_stream();
    let (mut read, mut length) = (Vec::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        length += chunk.len();
        if length <= REQUEST_MESSAGE_BYTES_MAX {
            read.extend_from_slice(&chunk);
        } else if length > DROPPED_BYTES_MAX {
            break;
        }
    }
    Ok((length <= REQUEST_MESSAGE_BYTES_MAX).then(|| Bytes::from(read)))
}

fn json_text(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], Body::from(text)).into_response()
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

// === impl Streamed ===

impl Streamed {
    /// Waits for the first event: a request that ends before it still gets a status of its own.
    async fn begin(mut events: GenerateStream, writer: Writer, names: Names) -> Result<Self, Failure> {
        let first = events.next().await;
        let mut streamed = Self { events, writer, names, ready: VecDeque::new(), is_over: false };
        match first {
            Some(Err(status)) => return Err(Failure::of_request(&status, &streamed.names)),
            first => streamed.take(first),
        }
        Ok(streamed)
    }

    fn take(&mut self, next: Option<Result<pb::GenerateResponse, Status>>) {
        match next {
            Some(Ok(response)) => {
                let chunks = response.event.map(|event| self.writer.chunks(event)).unwrap_or_default();
                self.ready.extend(chunks.iter().map(Value::to_string));
            }
            Some(Err(status)) => {
                self.is_over = true;
                self.ready.push_back(Failure::of_request(&status, &self.names).body().to_string());
            }
            None => {
                self.is_over = true;
                self.ready.push_back("[DONE]".to_owned());
            }
        }
    }

    async fn next_data(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.is_over {
                return None;
            }
            let next = self.events.next().await;
            self.take(next);
        }
    }

    fn into_events(self) -> impl Stream<Item = Result<Sent, Infallible>> {
        unfold(self, |mut streamed| async move {
            let data = streamed.next_data().await?;
            Some((Ok(Sent::default().data(data)), streamed))
        })
    }
}

impl IntoResponse for Streamed {
    fn into_response(self) -> Response {
        let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
        let mut response = Sse::new(self.into_events()).keep_alive(keep_alive).into_response();
        response.headers_mut().insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
        response
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn inputs() -> [(Call, &'static str, Value); 2] {
        let messages = json!([{ "role": "user", "content": "Hello" }]);
        [
            (Call::Chat, "ChatRequest", json!({ "messages": messages })),
            (Call::Completion, "CompletionRequest", json!({ "prompt": "Hello" })),
        ]
    }

    #[test]
    fn every_documented_field_is_read() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        for (call, schema, input) in inputs() {
            let fields = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
            assert!(fields.len() > 20);
            for field in fields.keys() {
                let mut body = input.clone();
                body["stream"] = json!(true);
                // Of no field's kind.
                body[field] = json!([{ "no": "such" }]);
                let refusal = read(call, body.to_string().as_bytes(), "r").unwrap_err();
                assert!(refusal.field.as_deref().unwrap().starts_with(field.as_str()), "{refusal:?}");
                for unread in ["is not supported", "is unknown"] {
                    let is_unread = refusal.message.starts_with(&format!("{field}: {unread}"));
                    assert!(!is_unread, "{field} is documented, and not read");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_is_not_plain_json_is_refused_by_the_header_that_says_so() {
        let ask = async |headers: &[(HeaderName, &str)]| {
            let mut request = Request::new(Body::from("{}"));
            for (name, value) in headers {
                request.headers_mut().append(name, HeaderValue::from_str(value).unwrap());
            }
            body_of(request).await.map_err(|failure| failure.body()["error"]["message"].to_string())
        };
        let (kind, encoding) = (header::CONTENT_TYPE, header::CONTENT_ENCODING);
        let json = (kind.clone(), "application/json");
        for headers in [
            vec![json.clone()],
            vec![(kind.clone(), "application/json; charset=UTF-8")],
            vec![(kind.clone(), "application/json;charset=\"utf-8\"")],
            vec![json.clone(), (encoding.clone(), "Identity")],
        ] {
            assert_eq!(ask(&headers).await.unwrap(), "{}", "{headers:?}");
        }
        for (headers, named) in [
            (vec![], "content-type"),
            (vec![(kind.clone(), "text/plain; a=application/json")], "content-type"),
            (vec![(kind, "application/json; charset=iso-8859-1")], "content-type: has the charset"),
            (vec![json.clone(), (encoding.clone(), "gzip")], "content-encoding: is \\\"gzip"),
            (vec![json.clone(), (encoding.clone(), "identity"), (encoding, "br")], "content-encoding"),
        ] {
            let message = ask(&headers).await.unwrap_err();
            assert!(message.contains(named), "{headers:?}: {message}");
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_malformed_and_one_that_does_not_end_too_large() {
        let status = async |pieces: Vec<Result<Vec<u8>, std::io::Error>>| {
            let mut request = Request::new(Body::from_stream(futures_util::stream::iter(pieces)));
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(header::CONTENT_TYPE, json);
            body_of(request).await.unwrap_err().into_response().status()
        };
        let broken = vec![Ok(b"{".to_vec()), Err(std::io::ErrorKind::InvalidData.into())];
        assert_eq!(status(broken).await, StatusCode::BAD_REQUEST);
        let large = vec![Ok(vec![b' '; REQUEST_MESSAGE_BYTES_MAX + 1])];
        assert_eq!(status(large).await, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[test]
    fn a_drawn_seed_survives_a_client_with_floats_for_numbers() {
        for (call, _, body) in inputs() {
            for _ in 0..50 {
                let request = read(call, body.to_string().as_bytes(), "r").unwrap().request;
                let seed = request.sampling.unwrap().seed.unwrap();
                assert_eq!(seed as f64 as u64, seed);
            }
        }
    }
}
