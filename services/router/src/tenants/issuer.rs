//! An OpenID provider whose tokens are taken: where its keys are, and keeping them fresh.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::{Mutex, RwLock};
use serde::Deserialize;
use uniarm_proto::Refusal;
use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::{
    TenantsError,
    token::{Expected, Keys, TokenError},
};

/// Keys are fetched again after this time: a provider may take one away.
const FRESH_FOR: Duration = Duration::from_secs(300);

/// Between two attempts, where a fetch failed or a token names a key that is not known.
const RETRY_AFTER: Duration = Duration::from_secs(10);

const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

const DOCUMENT_BYTES_MAX: u64 = 1 << 20;

/// Where a provider says what it is (OpenID Connect Discovery 1.0, 4).
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// The table `[oidc]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct IssuerConfig {
    /// What `iss` says, and where discovery begins.
    issuer: String,
    /// What `aud` has to name.
    audience: String,
    /// The claim that names who asks.
    #[serde(default = "subject")]
    claim: String,
    /// A file, or a URL, of keys: for providers without discovery.
    jwks: Option<String>,
    /// Who signed the provider's certificate (PEM), where it is no public authority.
    ca: Option<PathBuf>,
}

/// A provider with its keys.
pub(super) struct Issuer {
    config: IssuerConfig,
    expected: Expected,
    keys: RwLock<Keys>,
    fetching: Mutex<Fetching>,
}

#[derive(Default)]
struct Fetching {
    last: Option<Instant>,
    failed: bool,
    /// A token named a key that is not known.
    missed: bool,
}

#[derive(Deserialize)]
struct Discovered {
    issuer: String,
    jwks_uri: String,
}

fn subject() -> String {
    "sub".to_owned()
}

// === impl IssuerConfig ===

impl IssuerConfig {
    pub(super) fn check(&self) -> Result<(), TenantsError> {
        let wrong = |field: &str, reason: &str| Err(TenantsError::wrong(format!("oidc.{field}"), reason));
        if !is_safe(&self.issuer) {
            return wrong("issuer", "wants an https:// URL (http:// on the loopback interface alone)");
        }
        if self.audience.is_empty() {
            return wrong("audience", "is empty: tokens for anybody would do");
        }
        if self.claim.is_empty() {
            return wrong("claim", "is empty");
        }
        if self.jwks.as_ref().is_some_and(|place| place.contains("://") && !is_safe(place)) {
            return wrong(
                "jwks",
                "wants a file, or an https:// URL (http:// on the loopback interface alone)",
            );
        }
        Ok(())
    }
}

/// Keys that come over a wire which others write on are nobody's.
fn is_safe(url: &str) -> bool {
    let is_near = |rest: &str| {
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        // Before an @ stands a user, whatever it looks like.
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
        matches!(host, "127.0.0.1" | "localhost" | "[::1]")
    };
    url.strip_prefix("https://").is_some_and(|rest| !rest.is_empty())
        || url.strip_prefix("http://").is_some_and(is_near)
}

// === impl Issuer ===

impl Issuer {
    pub(super) fn new(config: IssuerConfig) -> Self {
        let expected = Expected { issuer: config.issuer.clone(), audience: config.audience.clone() };
        Self { config, expected, keys: RwLock::default(), fetching: Mutex::default() }
    }

    pub(super) fn config(&self) -> &IssuerConfig {
        &self.config
    }

    /// Whom a token names.
    pub(super) fn subject(&self, token: &str) -> Result<String, Refusal> {
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
        let keys = self.keys.read();
        if keys.count() == 0 {
            let message = "the keys of the tokens' issuer have not been fetched yet; try again soon";
            return Err(Refusal::unavailable("issuer_unknown", message));
        }
        let claims = keys.verify(token, &self.expected, now).map_err(|error| {
            if error == TokenError::UnknownKey {
                self.fetching.lock().missed = true;
            }
            Refusal::unauthenticated(format!("the token {error}"))
        })?;
        let named = claims.get(&self.config.claim).and_then(|claim| claim.as_str());
        named.map(str::to_owned).ok_or_else(|| {
            Refusal::unauthenticated(format!("the token names nobody in its claim {:?}", self.config.claim))
        })
    }

    /// Fetches the keys where it is time; `None`: it is not. What cannot be fetched leaves the keys as they were.
    pub(super) fn refresh(&self) -> Option<Result<usize, String>> {
        if !self.fetching.lock().is_due() {
            return None;
        }
        let fetched = self.fetch();
        *self.fetching.lock() =
            Fetching { last: Some(Instant::now()), failed: fetched.is_err(), missed: false };
        Some(fetched.map(|keys| {
            let count = keys.count();
            *self.keys.write() = keys;
            count
        }))
    }

    fn fetch(&self) -> Result<Keys, String> {
        let place = match &self.config.jwks {
            Some(place) => place.clone(),
            None => self.discover()?,
        };
        let text = match place.contains("://") {
            true => self.get(&place)?,
            false => std::fs::read_to_string(&place).map_err(|error| format!("{place}: {error}"))?,
        };
        Keys::read(&text).map_err(|reason| format!("{place} {reason}"))
    }

    fn discover(&self) -> Result<String, String> {
        let url = format!("{}{DISCOVERY}", self.config.issuer.trim_end_matches('/'));
        let found: Discovered =
            serde_json::from_str(&self.get(&url)?).map_err(|error| format!("{url}: {error}"))?;
        if found.issuer != self.config.issuer {
            return Err(format!("{url} is of the issuer {:?}", found.issuer));
        }
        match is_safe(&found.jwks_uri) {
            true => Ok(found.jwks_uri),
            false => Err(format!("{url} names keys at {:?}, which is no https:// URL", found.jwks_uri)),
        }
    }

    fn get(&self, url: &str) -> Result<String, String> {
        let failed = |error: &dyn fmt::Display| format!("{url}: {error}");
        let agent = Agent::config_builder().timeout_global(Some(FETCH_TIMEOUT)).max_redirects(0);
        let agent = match &self.config.ca {
            None => agent.build(),
            Some(file) => {
                let pem = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
                let authority = Certificate::from_pem(&pem).map_err(|error| failed(&error))?;
                let roots = RootCerts::new_with_certs(&[authority]);
                agent.tls_config(TlsConfig::builder().root_certs(roots).build()).build()
            }
        };
        let mut answer = Agent::from(agent).get(url).call().map_err(|error| failed(&error))?;
        let body = answer.body_mut().with_config().limit(DOCUMENT_BYTES_MAX);
        body.read_to_string().map_err(|error| failed(&error))
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Issuer").field(&self.config.issuer).finish()
    }
}

// === impl Fetching ===

impl Fetching {
    fn is_due(&self) -> bool {
        let age = self.last.map(|last| last.elapsed());
        let wait = if self.failed || self.missed { RETRY_AFTER } else { FRESH_FOR };
        age.is_none_or(|age| age >= wait)
    }
}
