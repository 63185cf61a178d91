//! Who may ask, and for what: tenants with API keys, or with tokens of an OpenID provider, in a file that is read again when it
//! changes.
//!
//! `config` (the file), `key` (what it keeps of keys), `issuer` and `token` (the provider's keys, and what they have signed),
//! `usage` (limits in time), `floors` (what preferences may not go below). Without a file everybody may ask for everything.

mod config;
mod floors;
mod issuer;
pub mod key;
mod token;
mod usage;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;
use uniarm_proto::{GenerateRequest, Refusal};
use uniarm_runtime::{Metrics, crowd::may_take};

use crate::place::Scope;
use config::{ParsedTenant, Rights};
use issuer::Issuer;
use key::KeyHash;
pub(crate) use usage::Ticket;
use usage::Usage;

/// How often the file is looked at: a key that is taken away is good for so long.
const LOOK_EVERY: Duration = Duration::from_secs(2);

const FILE_BYTES_MAX: u64 = 16 << 20;

/// What the header of a request says before its key, in any case.
const SCHEME: &str = "Bearer ";

/// Everybody who may ask. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Tenants(Option<Arc<Known>>);

#[derive(Debug)]
struct Known {
    path: PathBuf,
    registry: RwLock<Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    /// As it was read.
    text: String,
    by_key: HashMap<KeyHash, Arc<Tenant>>,
    by_subject: HashMap<String, Arc<Tenant>>,
    issuer: Option<Arc<Issuer>>,
    by_name: HashMap<String, Arc<Tenant>>,
}

#[derive(Debug)]
struct Tenant {
    rights: Rights,
    number: u64,
    scope: Scope,
    usage: Arc<Usage>,
}

/// Who asks: a tenant, or anybody where there are none.
#[derive(Debug, Clone, Default)]
pub struct Caller(Option<Arc<Tenant>>);

/// Why the file of tenants cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TenantsError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}: has {bytes} bytes, the limit is {FILE_BYTES_MAX}", path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("{}", if field.is_empty() { reason.clone() } else { format!("{field}: {reason}") })]
    Wrong { field: String, reason: String },
}

// === impl TenantsError ===

impl TenantsError {
    fn wrong(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Wrong { field: field.into(), reason: reason.into() }
    }
}

/// What the file of tenants may say, for whoever describes it.
#[must_use]
pub fn file_schema() -> schemars::Schema {
    config::schema()
}

// === impl Tenants ===

impl Tenants {
    /// # Errors
    /// When the file cannot be read, or says what cannot be meant.
    pub fn open(path: &Path) -> Result<Self, TenantsError> {
        let registry = Registry::default().next(read(path)?)?;
        Ok(Self(Some(Arc::new(Known { path: path.to_owned(), registry: RwLock::new(registry) }))))
    }

    /// Looks at the file again and again, until `ended`. What cannot be used changes nothing, is logged once, and shows in the
    /// metrics for as long as it is so.
    pub async fn follow(self, metrics: Metrics, ended: CancellationToken) {
        let unusable = metrics.scope("router").gauge(
            "tenants_file_unusable",
            "1 while the file of tenants cannot be used, and they stay as they were",
        );
        let Some(known) = self.0 else { return };
        let mut said = String::new();
        known.refresh_keys().await;
        while ended.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_some() {
            let looked = tokio::task::block_in_place(|| known.look());
            known.refresh_keys().await;
            let file = known.path.display();
            unusable.set(i64::from(looked.is_err()));
            match looked {
                Ok(None) => said.clear(),
                Ok(Some(tenants)) => tracing::info!(%file, tenants, "the tenants have changed"),
                Err(error) if error.to_string() == said => {}
                Err(error) => {
                    said = error.to_string();
                    tracing::error!(%file, %error, "the tenants stay as they were");
                }
            }
        }
    }

    /// Whose key it is. `authorization`: the header, or the gRPC metadata, of that name.
    ///
    /// # Errors
    /// When there are tenants and it is nobody's.
    pub fn identify(&self, authorization: Option<&str>) -> Result<Caller, Refusal> {
        let Some(known) = &self.0 else { return Ok(Caller::default()) };
        let Some(authorization) = authorization else {
            return Err(Refusal::unauthenticated("no API key: send the header authorization: Bearer KEY"));
        };
        let said = authorization
            .get(..SCHEME.len())
            .filter(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
            .map(|_| authorization[SCHEME.len()..].trim());
        let Some(said) = said else {
            return Err(Refusal::unauthenticated("authorization: wants Bearer and an API key"));
        };
        let by_key = KeyHash::of(said).and_then(|key| known.registry.read().by_key.get(&key).map(Arc::clone));
        if let Some(tenant) = by_key {
            return Ok(Caller(Some(tenant)));
        }
        let issuer = known.registry.read().issuer.clone();
        match issuer {
            // A key has no dots, a signed token has two.
            Some(issuer) if said.contains('.') => {
                let subject = issuer.subject(said)?;
                let found = known.registry.read().by_subject.get(&subject).map(Arc::clone);
                let nobody = || Refusal::unauthenticated("the token names nobody who is known here");
                found.map(|tenant| Caller(Some(tenant))).ok_or_else(nobody)
            }
            _ => Err(Refusal::unauthenticated("the API key is not known")),
        }
    }

    /// Whoever has that name now: of work that outlives its request. Empty: anybody, where there are no tenants.
    ///
    /// # Errors
    /// When there is no such tenant any more.
    pub fn named(&self, name: &str) -> Result<Caller, Refusal> {
        let Some(known) = &self.0 else { return Ok(Caller::default()) };
        let found = known.registry.read().by_name.get(name).cloned();
        let nobody = || Refusal::unauthenticated(format!("there is no tenant {name:?} any more"));
        found.map(|tenant| Caller(Some(tenant))).ok_or_else(nobody)
    }
}

// === impl Known ===

impl Known {
    /// How many tenants there are now, if the file has changed.
    fn look(&self) -> Result<Option<usize>, TenantsError> {
        let text = read(&self.path)?;
        if self.registry.read().text == text {
            return Ok(None);
        }
        let next = self.registry.read().next(text)?;
        let count = next.by_name.len();
        *self.registry.write() = next;
        Ok(Some(count))
    }
}

impl Known {
    /// Fetches the keys of the issuer where it is time, and says what came of it.
    async fn refresh_keys(&self) {
        let Some(issuer) = self.registry.read().issuer.clone() else { return };
        let name = format!("{issuer:?}");
        // A provider that does not answer holds up this loop, and no request.
        match tokio::task::spawn_blocking(move || issuer.refresh()).await {
            Ok(Some(Ok(keys))) => tracing::debug!(issuer = name, keys, "the issuer's keys are fresh"),
            Ok(Some(Err(error))) => {
                tracing::error!(issuer = name, error, "the issuer's keys stay as they were")
            }
            Ok(None) => {}
            Err(error) => tracing::error!(issuer = name, %error, "fetching the issuer's keys panicked"),
        }
    }
}

/// The same at every router and after every restart; never that of nobody.
fn number_of(name: &str) -> u64 {
    uniarm_batch::seed(0, &["tenant", name]).max(1)
}

fn read(path: &Path) -> Result<String, TenantsError> {
    let failed = |source| TenantsError::File { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(TenantsError::TooLarge { path: path.to_owned(), bytes });
    }
    std::fs::read_to_string(path).map_err(failed)
}

// === impl Registry ===

impl Registry {
    /// What `text` says; who was here before keeps what it has used.
    fn next(&self, text: String) -> Result<Self, TenantsError> {
        let mut next = Self::default();
        let parsed = config::parse(&text)?;
        // One that is as it was keeps its keys.
        let kept = |issuer: &&Arc<Issuer>| parsed.issuer.as_ref() == Some(issuer.config());
        next.issuer = match self.issuer.as_ref().filter(kept) {
            Some(issuer) => Some(Arc::clone(issuer)),
            None => parsed.issuer.clone().map(|config| Arc::new(Issuer::new(config))),
        };
        for ParsedTenant { rights, keys, subjects } in parsed.tenants {
            let before = self.by_name.get(&rights.name);
            let usage = before.map_or_else(|| Arc::new(Usage::new()), |tenant| Arc::clone(&tenant.usage));
            let scope = Scope::only(rights.base_models.clone(), rights.reward_models.clone());
            let number = number_of(&rights.name);
            let tenant = Arc::new(Tenant { rights, number, scope, usage });
            next.by_name.insert(tenant.rights.name.clone(), Arc::clone(&tenant));
            next.by_subject.extend(subjects.into_iter().map(|subject| (subject, Arc::clone(&tenant))));
            next.by_key.extend(keys.into_iter().map(|key| (key, Arc::clone(&tenant))));
        }
        next.text = text;
        Ok(next)
    }
}

// === impl Caller ===

impl Caller {
    /// Empty: anybody.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.as_ref().map_or("", |tenant| &tenant.rights.name)
    }

    /// One of several who share the cluster; else anybody, who has it for himself.
    pub(crate) fn is_tenant(&self) -> bool {
        self.0.is_some()
    }

    /// Whether a record of each of its requests is kept.
    pub(crate) fn is_audited(&self) -> bool {
        self.0.as_ref().is_some_and(|tenant| tenant.rights.audit)
    }

    /// What workers know it by; 0: anybody.
    pub(crate) fn number(&self) -> u64 {
        self.0.as_ref().map_or(0, |tenant| tenant.number)
    }

    /// Whether it may have another of the places that are free; its last one counts already.
    pub(crate) fn may_take(&self, free: usize) -> bool {
        self.0.as_ref().is_none_or(|tenant| {
            let held = tenant.usage.under_way.load(Ordering::Relaxed);
            may_take(held.saturating_sub(1), free)
        })
    }

    /// What of the cluster it may use.
    pub(crate) fn scope(&self) -> &Scope {
        match &self.0 {
            Some(tenant) => &tenant.scope,
            None => Scope::everything(),
        }
    }

    /// Counts a request. `written`: tokens that it has already, from elsewhere.
    pub(crate) fn enter(&self, request: &GenerateRequest, written: u64) -> Result<Ticket, Refusal> {
        let Some(tenant) = &self.0 else { return Ok(Ticket::default()) };
        let Tenant { rights, usage, .. } = &**tenant;
        let name = &rights.name;
        if request.priority > rights.priority {
            let reason = format!("is {:?}, {name} may have {:?} at most", request.priority, rights.priority);
            return Err(Refusal::denied("priority", reason));
        }
        let tokens = u64::from(request.sampling.max_tokens) * u64::from(request.sampling.n);
        if let Some(most) = rights.tokens_per_minute.filter(|most| tokens > u64::from(*most)) {
            let reason = format!("asks for {tokens} tokens in all answers, {name} may have {most} a minute");
            return Err(Refusal::denied("sampling.max_tokens", reason));
        }
        if !usage.enter(rights.requests_max) {
            let most = rights.requests_max.unwrap_or_default();
            let message = format!("{name} has as many requests under way as it may: {most}");
            // One of its own has to end first, and nobody knows when.
            return Err(Refusal::exhausted("tenant_full", message, Duration::from_secs(1)));
        }
        let mut ticket = Ticket::new(Arc::clone(usage));
        if let Some(most) = rights.requests_per_minute.filter(|_| written == 0) {
            let taken = usage.requests.lock().take(1, most);
            taken.map_err(|wait| slower(name, &format!("{most} requests"), wait))?;
        }
        if let Some(most) = rights.tokens_per_minute {
            let taken = ticket.reserve(tokens.saturating_sub(written), most);
            taken.map_err(|wait| slower(name, &format!("{most} tokens"), wait))?;
        }
        Ok(ticket)
    }

    /// `request` has been placed: each term names its reward model.
    pub(crate) fn check_floors(&self, request: &GenerateRequest) -> Result<(), Refusal> {
        self.0.as_ref().map_or(Ok(()), |tenant| floors::check(&tenant.rights, request))
    }
}

fn slower(tenant: &str, limit: &str, wait: Duration) -> Refusal {
    let message = format!("{tenant} may have {limit} a minute, and has had them");
    Refusal::exhausted("tenant_rate", message, wait)
}
