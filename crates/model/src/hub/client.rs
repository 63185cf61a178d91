//! The hub's HTTP: questions asked patiently, files described and downloaded, as often resumed as it takes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

use crate::error::ModelError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that sends nothing for so long has stalled; the download is resumed on a new connection.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Attempts without a single new byte.
const ATTEMPTS: u32 = 5;
pub(super) const RETRY_DELAY: Duration = Duration::from_millis(500);
const RELATIVE_REDIRECTS_MAX: usize = 5;
/// The listing of the largest repositories has some thousand short names.
const JSON_BYTES_MAX: u64 = 16 << 20;
const BUFFER_BYTES: usize = 1 << 18;

/// The hub over HTTP.
pub(super) struct Client {
    endpoint: String,
    token: Option<String>,
    /// Before the second attempt; doubled before each further one.
    retry_delay: Duration,
    /// Show a bar on standard error.
    progress: bool,
    agent: Agent,
}

/// A file of the hub, as its headers describe it.
pub(super) struct Blob {
    url: String,
    /// The hub's checksum: SHA-256 for large files.
    pub etag: String,
    bytes: u64,
}

/// An attempt that failed, and whether another is worth while.
pub(super) struct Failure {
    pub error: ModelError,
    pub transient: bool,
}

impl Client {
    /// A client of the hub at `endpoint` (scheme and host); `token` goes to that host alone.
    pub(super) fn new(endpoint: &str, token: Option<String>, retry_delay: Duration, progress: bool) -> Self {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Self { endpoint, token, retry_delay, progress, agent: agent() }
    }

    /// The JSON behind a path of the hub.
    pub(super) fn json(&self, path: &str) -> Result<Value, Failure> {
        let url = format!("{}/{path}", self.endpoint);
        self.patiently(|| {
            let mut response = self.ask(self.agent.get(&url), &url)?;
            if response.status() != StatusCode::OK {
                return Err(refusal(&url, response.status()));
            }
            let body = response.body_mut().with_config().limit(JSON_BYTES_MAX).read_to_vec();
            let body = body.map_err(|error| Failure::transport(&url, &error))?;
            serde_json::from_slice(&body).map_err(|_| Failure::lasting(&url, "the answer is not JSON"))
        })
    }

    /// Size and checksum of the file behind a path of the hub.
    pub(super) fn describe(&self, path: &str) -> Result<Blob, Failure> {
        self.patiently(|| self.describe_once(path))
    }

    /// The hub answers large files with a redirect to where their bytes are, and describes them in that
    /// answer, which is therefore not followed; renamed repositories redirect within the hub, which is.
    fn describe_once(&self, path: &str) -> Result<Blob, Failure> {
        let mut url = format!("{}/{path}", self.endpoint);
        for _ in 0..RELATIVE_REDIRECTS_MAX {
            let request = self.agent.head(&url).config().max_redirects(0).build();
            let response = self.ask(request, &url)?;
            let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            match text("location") {
                Some(location) if location.starts_with('/') && text("x-linked-etag").is_none() => {
                    url = format!("{}{location}", self.endpoint);
                    continue;
                }
                None if response.status() != StatusCode::OK => return Err(refusal(&url, response.status())),
                _ => {}
            }
            let etag = text("x-linked-etag").or_else(|| text("etag")).and_then(file_name);
            let bytes = text("x-linked-size").or_else(|| text("content-length"));
            return match (etag, bytes.and_then(|bytes| bytes.parse().ok())) {
                (Some(etag), Some(bytes)) => Ok(Blob { url, etag, bytes }),
                _ => Err(Failure::lasting(&url, "the hub tells neither checksum nor size")),
            };
        }
        Err(Failure::lasting(&url, "too many redirects"))
    }

    /// Downloads a blob, as often resumed as it takes, and gives it its name once it is whole and checked.
    pub(super) fn download(&self, blob: &Blob, home: &Path, file: &str) -> Result<(), Failure> {
        let part = home.with_extension("part");
        tracing::info!(file, bytes = blob.bytes, have = size_of(&part)?, "downloading");
        let bar = self.bar(blob.bytes, file);
        let mut idle_attempts = 0;
        loop {
            let before = size_of(&part)?;
            match self.append(blob, &part, &bar) {
                Ok(()) => break,
                Err(failure) if !failure.transient => return Err(failure),
                Err(failure) => {
                    idle_attempts = if size_of(&part)? > before { 0 } else { idle_attempts + 1 };
                    if idle_attempts >= ATTEMPTS {
                        return Err(failure);
                    }
                    tracing::debug!(error = %failure.error, file, "download interrupted: resuming");
                    std::thread::sleep(self.retry_delay * 2_u32.pow(idle_attempts));
                }
            }
        }
        bar.finish_and_clear();
        verify(blob, &part)?;
        fs::rename(&part, home).map_err(|error| ModelError::io(home, error).into())
    }

    /// One attempt: asks for what is missing of `part` and appends it.
    fn append(&self, blob: &Blob, part: &Path, bar: &ProgressBar) -> Result<(), Failure> {
        let mut have = size_of(part)?;
        if have > blob.bytes {
            fs::remove_file(part).map_err(|error| ModelError::io(part, error))?;
            have = 0;
        }
        if have == blob.bytes && have > 0 {
            return Ok(());
        }
        let request = self.agent.get(&blob.url).header(header::RANGE, format!("bytes={have}-"));
        let mut response = self.ask(request, &blob.url)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_at(&response, have) => {}
            // The server does not know ranges: from the start.
            StatusCode::OK => have = 0,
            // An empty file has no bytes from 0 on.
            StatusCode::RANGE_NOT_SATISFIABLE if blob.bytes == 0 => have = 0,
            status => return Err(refusal(&blob.url, status)),
        }
        let io = |error| Failure::from(ModelError::io(part, error));
        let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(part).map_err(io)?;
        file.set_len(have).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;

        bar.set_position(have);
        let mut reader = response.body_mut().as_reader().take(blob.bytes - have);
        let mut buffer = vec![0; BUFFER_BYTES];
        while have < blob.bytes {
            match reader.read(&mut buffer) {
                Ok(0) => return Err(Failure::transient(&blob.url, "the connection was closed early")),
                Ok(count) => {
                    file.write_all(&buffer[..count]).map_err(io)?;
                    have += count as u64;
                    bar.set_position(have);
                }
                Err(error) => return Err(Failure::transient(&blob.url, &error.to_string())),
            }
        }
        file.sync_all().map_err(io)
    }

    fn ask(&self, request: RequestBuilder<WithoutBody>, url: &str) -> Result<Response<Body>, Failure> {
        let request = request.header(header::ACCEPT_ENCODING, "identity");
        let request = match &self.token {
            Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        };
        request.call().map_err(|error| Failure::transport(url, &error))
    }

    /// Tries again, each time after a longer pause, what fails for now.
    fn patiently<T>(&self, attempt: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut failed = 0;
        loop {
            match attempt() {
                Err(failure) if failure.transient && failed + 1 < ATTEMPTS => {
                    std::thread::sleep(self.retry_delay * 2_u32.pow(failed));
                    failed += 1;
                }
                outcome => return outcome,
            }
        }
    }

    fn bar(&self, bytes: u64, file: &str) -> ProgressBar {
        if !self.progress {
            return ProgressBar::hidden();
        }
        let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(style).expect("a template without conditions");
        ProgressBar::new(bytes).with_style(style).with_message(file.to_owned())
    }
}

impl Failure {
    pub(super) fn lasting(url: &str, reason: &str) -> Self {
        let error = ModelError::Download { url: url.to_owned(), reason: reason.to_owned() };
        Self { error, transient: false }
    }

    fn transient(url: &str, reason: &str) -> Self {
        Self { transient: true, ..Self::lasting(url, reason) }
    }

    /// No answer at all: worth another attempt, unless the address itself is wrong.
    fn transport(url: &str, error: &ureq::Error) -> Self {
        match error {
            ureq::Error::BadUri(_) | ureq::Error::InvalidProxyUrl => Self::lasting(url, &error.to_string()),
            ureq::Error::TooManyRedirects | ureq::Error::BodyExceedsLimit(_) => {
                Self::lasting(url, &error.to_string())
            }
            _ => Self::transient(url, &error.to_string()),
        }
    }
}

/// What went wrong on this machine will go wrong again.
impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        Self { error, transient: false }
    }
}

fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects_will_error(false)
        // The token is for the hub; the host that large files are redirected to has signed addresses.
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(READ_TIMEOUT))
        .timeout_per_read(Some(READ_TIMEOUT))
        .user_agent(concat!("uniarm/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// What a status other than success means to the person who named the model.
fn refusal(url: &str, status: StatusCode) -> Failure {
    match status.as_u16() {
        // The hub does not tell a stranger which of these it is.
        401 | 403 => Failure::lasting(
            url,
            "no such model, or it is private or gated: set HF_TOKEN to a token that may read it",
        ),
        404 => Failure::lasting(url, "no such model, revision or file"),
        408 | 429 | 500..=599 => Failure::transient(url, &format!("the hub answered {status}")),
        _ => Failure::lasting(url, &format!("the hub answered {status}")),
    }
}

/// An entity tag as the name of a file, if it can be one.
fn file_name(etag: &str) -> Option<String> {
    let name = etag.trim_start_matches("W/").trim_matches('"');
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    (plain && (1..=128).contains(&name.len())).then(|| name.to_owned())
}

/// Whether a partial answer begins where we stopped.
fn starts_at(response: &Response<Body>, start: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    range.is_some_and(|range| range.starts_with(&format!("bytes {start}-")))
}

/// Checks a download against the checksum that large files have; others are known by a git hash, and are
/// small text that shows its damage when parsed.
fn verify(blob: &Blob, part: &Path) -> Result<(), Failure> {
    if blob.etag.len() != 64 {
        return Ok(());
    }
    let mut hash = Sha256::new();
    let mut file = File::open(part).map_err(|error| ModelError::io(part, error))?;
    std::io::copy(&mut file, &mut hash).map_err(|error| ModelError::io(part, error))?;
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found == blob.etag {
        return Ok(());
    }
    // What is wrong must not be resumed.
    fs::remove_file(part).map_err(|error| ModelError::io(part, error))?;
    let reason = format!("the download has SHA-256 {found} instead of {}; nothing is kept", blob.etag);
    Err(Failure::lasting(&blob.url, &reason))
}

fn size_of(file: &Path) -> Result<u64, ModelError> {
    match fs::metadata(file) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(ModelError::io(file, error)),
    }
}
