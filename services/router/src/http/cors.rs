//! Pages of other sites that may ask: none, unless they are named.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::failure::Failure;

/// Seconds for which a browser need not ask again.
const PREFLIGHT_SECONDS: &str = "600";

const METHODS: &str = "GET, POST, DELETE";

/// What a page may read besides the body: how to ask again, and the name of its request.
const EXPOSED: &str = "x-request-id, retry-after, retry-after-ms, x-should-retry";

/// A site as browsers name it: `https://example.org`, `http://localhost:3000`, or `*` for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(HeaderValue);

/// Sites whose pages may ask.
#[derive(Debug, Clone, Default)]
pub(super) struct Cors {
    origins: Arc<[Origin]>,
}

// === impl Origin ===

impl std::str::FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no origin; https://example.org, http://localhost:3000 and * are");
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        let is_site = rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(['/', '?', '#', '*', ' ']));
        if !is_site && text != "*" {
            return Err(wrong());
        }
        // As browsers write it.
        HeaderValue::try_from(text.to_ascii_lowercase()).map(Self).map_err(|_| wrong())
    }
}

// === impl Cors ===

impl Cors {
    pub(super) fn new(origins: Vec<Origin>) -> Self {
        Self { origins: origins.into() }
    }

    /// What the site that asks is told, if its pages may.
    fn allowed(&self, headers: &HeaderMap) -> Option<&HeaderValue> {
        let asks = headers.get(header::ORIGIN)?;
        self.origins.iter().map(|origin| &origin.0).find(|origin| *origin == asks || *origin == "*")
    }

    /// Browsers ask nobody before they send a form anywhere, and say whose page it comes from.
    pub(super) fn refuse_foreign_pages(&self, headers: &HeaderMap) -> Result<(), Failure> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let own = text(header::ORIGIN).and_then(|origin| origin.split_once("://")).map(|(_, site)| site);
        let is_own = own.is_some() && own == text(header::HOST);
        if is_own || !headers.contains_key(header::ORIGIN) || self.allowed(headers).is_some() {
            return Ok(());
        }
        let message = "origin: pages of other sites may bring no files, unless --http-cors names the site";
        Err(Failure::at_the_door(StatusCode::FORBIDDEN, "foreign_page", message))
    }
}

/// Answers a browser's question whether a page may ask, and marks answers as its to read.
pub(super) async fn cors(State(cors): State<Cors>, request: Request, next: Next) -> Response {
    let allowed = cors.allowed(request.headers()).cloned();
    let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let is_question = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match (is_question, &allowed) {
        (true, Some(_)) => StatusCode::NO_CONTENT.into_response(),
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    if !cors.origins.is_empty() {
        // A cache must not show one site's answer to another.
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    let Some(origin) = allowed else { return response };
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    if is_question {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_SECONDS));
        if let Some(asked) = asked {
            // None of them changes what is answered; OpenAI's client for browsers sends a dozen.
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(origin: &'static str) -> HeaderMap {
        let here = (header::HOST, HeaderValue::from_static("here:7080"));
        HeaderMap::from_iter([(header::ORIGIN, HeaderValue::from_static(origin)), here])
    }

    #[test]
    fn only_named_sites_may_ask() {
        let origin = |text: &str| text.parse::<Origin>();
        let cors = Cors::new(vec![origin("https://Example.org").unwrap()]);
        assert!(cors.allowed(&asking("https://example.org")).is_some());
        for other in ["http://example.org", "https://example.org.evil", "null"] {
            assert!(cors.allowed(&asking(other)).is_none(), "{other}");
        }
        assert!(Cors::default().allowed(&asking("https://example.org")).is_none(), "off by default");
        let brings = |origin| cors.refuse_foreign_pages(&asking(origin)).is_ok();
        assert!(brings("https://example.org") && brings("http://here:7080"));
        assert!(!brings("http://here") && !brings("null") && !brings("http://there:7080"));
        assert!(cors.refuse_foreign_pages(&HeaderMap::new()).is_ok(), "no browser");
        assert!(Cors::new(vec![origin("*").unwrap()]).allowed(&asking("null")).is_some());
        for wrong in ["example.org", "https://", "https://example.org/", "https://*.org", "ftp://example.org"]
        {
            origin(wrong).unwrap_err();
        }
    }
}
