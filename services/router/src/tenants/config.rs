//! The file that names tenants: TOML, checked line by line before anything of it counts.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uniarm_proto::{Priority, limits::NAME_BYTES_MAX};

use super::{TenantsError, issuer::IssuerConfig, key::KeyHash};

const TENANTS_MAX: usize = 10_000;
const KEYS_MAX: usize = 16;
const LISTED_MAX: usize = 256;

/// Bytes of a subject: OpenID allows 255 characters.
const SUBJECT_BYTES_MAX: usize = 1024;

#[derive(Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct File {
    /// An OpenID provider whose tokens are taken beside keys.
    oidc: Option<IssuerConfig>,
    /// Who may ask; at least one.
    #[serde(default)]
    tenants: Vec<Entry>,
}

#[derive(Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// What files, batches and errors call it.
    name: String,
    /// SHA-256 of its keys, as `uniarm keys new` prints them; up to 16.
    #[serde(default)]
    keys: Vec<String>,
    /// Whom tokens of the provider name; up to 256.
    #[serde(default)]
    subjects: Vec<String>,
    /// Base models that it may use; all without it.
    base_models: Option<Vec<String>>,
    /// Reward models that it may use; all without it.
    reward_models: Option<Vec<String>>,
    /// Requests under way at once, at one router; no limit without it.
    requests_max: Option<usize>,
    /// Refilled evenly, saved up for a minute at most; no limit without it.
    requests_per_minute: Option<u32>,
    /// Tokens that are written for it, in the same way; no limit without it.
    tokens_per_minute: Option<u32>,
    /// The highest that it may ask for.
    #[serde(default = "highest")]
    priority: Class,
    /// Shares of guidance, by objective, that its requests never go below.
    #[serde(default)]
    floors: BTreeMap<String, f32>,
    /// With floors: all guidance together is at least so strong, beside a base model of strength 1; 1 without it.
    guidance_min: Option<f32>,
    /// A record of each of its requests is kept (docs/audit.md); a router without `--audit-dir` refuses them.
    #[serde(default)]
    audit: bool,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Class {
    Low,
    Normal,
    High,
}

/// What a tenant may have.
#[derive(Debug, Clone, PartialEq)]
pub struct Rights {
    pub name: String,
    /// `None`: all that are served.
    pub base_models: Option<BTreeSet<String>>,
    pub reward_models: Option<BTreeSet<String>>,
    /// Requests under way at once, at one router.
    pub requests_max: Option<usize>,
    pub requests_per_minute: Option<u32>,
    /// Tokens that are written for it.
    pub tokens_per_minute: Option<u32>,
    /// The highest that it may ask for.
    pub priority: Priority,
    /// Share of what steers that an objective has at least; see `floors`.
    pub floors: BTreeMap<String, f32>,
    /// Strength of all guidance over that of the base model, at least, where there are floors.
    pub guidance_min: f32,
    /// A record of each of its requests is kept.
    pub audit: bool,
}

/// What the file says.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) issuer: Option<IssuerConfig>,
    pub(super) tenants: Vec<ParsedTenant>,
}

#[derive(Debug)]
pub(super) struct ParsedTenant {
    pub(super) rights: Rights,
    pub(super) keys: Vec<KeyHash>,
    /// Whom a token of the issuer names.
    pub(super) subjects: Vec<String>,
}

/// Reads the whole file.
pub(super) fn parse(text: &str) -> Result<Parsed, TenantsError> {
    let file: File =
        toml::from_str(text).map_err(|error| TenantsError::wrong("", error.to_string().trim()))?;
    if file.tenants.is_empty() {
        return Err(TenantsError::wrong("tenants", "is empty: nobody could ask for anything"));
    }
    check_count("tenants", file.tenants.len(), TENANTS_MAX)?;
    file.oidc.as_ref().map_or(Ok(()), IssuerConfig::check)?;
    let (mut names, mut keys, mut subjects) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut tenants = Vec::with_capacity(file.tenants.len());
    for (index, mut entry) in file.tenants.into_iter().enumerate() {
        let at = format!("tenants[{index}]");
        let twice = |field: String| Err(TenantsError::wrong(field, "is there twice"));
        let own = entry.keys(&at)?;
        let named = entry.subjects(&at)?;
        let rights = entry.rights(&at)?;
        if !names.insert(rights.name.clone()) {
            return Err(TenantsError::wrong(
                format!("{at}.name"),
                format!("{:?} is there twice", rights.name),
            ));
        }
        if let Some(number) = own.iter().position(|key| !keys.insert(*key)) {
            return twice(format!("{at}.keys[{number}]"));
        }
        if let Some(number) = named.iter().position(|subject| !subjects.insert(subject.clone())) {
            return twice(format!("{at}.subjects[{number}]"));
        }
        if own.is_empty() && named.is_empty() {
            let reason = format!("{:?} has neither keys nor subjects: nobody could ask as it", rights.name);
            return Err(TenantsError::wrong(at, reason));
        }
        if !named.is_empty() && file.oidc.is_none() {
            let reason = "are named by tokens, and no table [oidc] says whose tokens";
            return Err(TenantsError::wrong(format!("{at}.subjects"), reason));
        }
        tenants.push(ParsedTenant { rights, keys: own, subjects: named });
    }
    Ok(Parsed { issuer: file.oidc, tenants })
}

/// What the file may say.
pub(super) fn schema() -> schemars::Schema {
    schemars::schema_for!(File)
}

fn highest() -> Class {
    Class::High
}

fn check_count(field: &str, count: usize, limit: usize) -> Result<(), TenantsError> {
    if count > limit {
        return Err(TenantsError::wrong(field, format!("has {count} entries, the limit is {limit}")));
    }
    Ok(())
}

fn check_name(field: &str, name: &str) -> Result<(), TenantsError> {
    let is_name = !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control);
    match is_name {
        true => Ok(()),
        false => Err(TenantsError::wrong(field, format!("wants a name of 1..={NAME_BYTES_MAX} bytes"))),
    }
}

fn names(field: &str, names: Option<Vec<String>>) -> Result<Option<BTreeSet<String>>, TenantsError> {
    let Some(names) = names else { return Ok(None) };
    check_count(field, names.len(), LISTED_MAX)?;
    for (index, name) in names.iter().enumerate() {
        check_name(&format!("{field}[{index}]"), name)?;
    }
    Ok(Some(names.into_iter().collect()))
}

fn positive<T: PartialEq + Default>(field: &str, value: Option<T>) -> Result<Option<T>, TenantsError> {
    match value {
        Some(value) if value == T::default() => {
            Err(TenantsError::wrong(field, "is 0, wants at least 1; leave it out for no limit"))
        }
        value => Ok(value),
    }
}

// === impl Entry ===

impl Entry {
    fn keys(&self, at: &str) -> Result<Vec<KeyHash>, TenantsError> {
        check_count(&format!("{at}.keys"), self.keys.len(), KEYS_MAX)?;
        let read = |(index, text): (usize, &String)| {
            text.parse().map_err(|reason: &str| TenantsError::wrong(format!("{at}.keys[{index}]"), reason))
        };
        self.keys.iter().enumerate().map(read).collect()
    }

    fn subjects(&mut self, at: &str) -> Result<Vec<String>, TenantsError> {
        let field = format!("{at}.subjects");
        check_count(&field, self.subjects.len(), LISTED_MAX)?;
        let is_one = |subject: &String| !subject.is_empty() && subject.len() <= SUBJECT_BYTES_MAX;
        match self.subjects.iter().position(|subject| !is_one(subject)) {
            Some(number) => {
                let reason = format!("wants a subject of 1..={SUBJECT_BYTES_MAX} bytes");
                Err(TenantsError::wrong(format!("{field}[{number}]"), reason))
            }
            None => Ok(std::mem::take(&mut self.subjects)),
        }
    }

    fn rights(self, at: &str) -> Result<Rights, TenantsError> {
        let field = |name: &str| format!("{at}.{name}");
        check_name(&field("name"), &self.name)?;
        for (objective, floor) in &self.floors {
            let field = field(&format!("floors.{objective}"));
            if !(0.0..=1.0).contains(floor) {
                return Err(TenantsError::wrong(field, format!("is {floor}, wants a share in 0..=1")));
            }
        }
        let sum: f32 = self.floors.values().sum();
        if sum > 1.0 {
            let reason = format!("add up to {sum}, and nothing has more than 1 to give");
            return Err(TenantsError::wrong(field("floors"), reason));
        }
        let guidance_min = self.guidance_min.unwrap_or(1.0);
        if !(guidance_min.is_finite() && guidance_min > 0.0) {
            let reason = format!("is {guidance_min}, wants more than 0");
            return Err(TenantsError::wrong(field("guidance_min"), reason));
        }
        if self.guidance_min.is_some() && self.floors.is_empty() {
            return Err(TenantsError::wrong(field("guidance_min"), "goes with floors"));
        }
        Ok(Rights {
            base_models: names(&field("base_models"), self.base_models)?,
            reward_models: names(&field("reward_models"), self.reward_models)?,
            requests_max: positive(&field("requests_max"), self.requests_max)?,
            requests_per_minute: positive(&field("requests_per_minute"), self.requests_per_minute)?,
            tokens_per_minute: positive(&field("tokens_per_minute"), self.tokens_per_minute)?,
            priority: self.priority.into(),
            floors: self.floors,
            guidance_min,
            audit: self.audit,
            name: self.name,
        })
    }
}

// === impl Class ===

impl From<Class> for Priority {
    fn from(class: Class) -> Self {
        match class {
            Class::Low => Self::Low,
            Class::Normal => Self::Normal,
            Class::High => Self::High,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000001";

    const OIDC: &str = "[oidc]\nissuer = \"https://login.example.org\"\naudience = \"uniarm\"\n";

    fn tenant(more: &str) -> String {
        format!("[[tenants]]\nname = \"a\"\nkeys = [\"{KEY}\"]\n{more}\n")
    }

    #[test]
    fn a_tenant_that_says_nothing_more_may_have_everything() {
        let parsed = parse(&tenant("")).unwrap();
        let ParsedTenant { rights, keys, .. } = &parsed.tenants[0];
        assert_eq!((rights.name.as_str(), keys.len()), ("a", 1));
        assert_eq!((&rights.base_models, rights.requests_max), (&None, None));
        assert_eq!((rights.priority, rights.floors.len()), (Priority::High, 0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let twice = tenant("") + &tenant("").replace("\"a\"", "\"b\"");
        for (text, said) in [
            (String::new(), "tenants: is empty"),
            (tenant("budget = 3"), "unknown field `budget`"),
            (tenant("requests_max = 0"), "tenants[0].requests_max: is 0"),
            (tenant("priority = \"urgent\""), "urgent"),
            (tenant("[tenants.floors]\nharmless = -0.1"), "tenants[0].floors.harmless: is -0.1"),
            (tenant("[tenants.floors]\nharmless = nan"), "tenants[0].floors.harmless: is NaN"),
            (tenant("[tenants.floors]\na = 0.6\nb = 0.6"), "tenants[0].floors: add up to 1.2"),
            (tenant("guidance_min = 1.0"), "tenants[0].guidance_min: goes with floors"),
            (tenant("").replace(KEY, "secret"), "tenants[0].keys[0]: "),
            (
                tenant("").replace(&format!("\"{KEY}\""), ""),
                "tenants[0]: \"a\" has neither keys nor subjects",
            ),
            (twice, "tenants[1].keys[0]: is there twice"),
            (tenant("") + &tenant("").replace("01\"", "02\""), "tenants[1].name: \"a\" is there twice"),
            (tenant("").replace("\"a\"", "\"\""), "tenants[0].name: wants a name"),
            (tenant("subjects = [\"x\"]"), "tenants[0].subjects: are named by tokens"),
            (
                OIDC.to_owned() + &tenant("subjects = [\"x\", \"x\"]"),
                "tenants[0].subjects[1]: is there twice",
            ),
            (OIDC.to_owned() + &tenant("subjects = [\"\"]"), "tenants[0].subjects[0]: wants a subject"),
            (OIDC.replace("https", "http") + &tenant(""), "oidc.issuer: wants an https:// URL"),
            (
                OIDC.replace("https://", "http://localhost:80@") + &tenant(""),
                "oidc.issuer: wants an https:// URL",
            ),
            (OIDC.replace("uniarm", "") + &tenant(""), "oidc.audience: is empty"),
            (
                OIDC.to_owned() + "jwks = \"http://keys.example.org\"\n" + &tenant(""),
                "oidc.jwks: wants a file",
            ),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(said), "{error:?} should have {said:?}");
        }
    }
}
