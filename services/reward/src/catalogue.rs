//! What a reward worker serves: reward models by name, all on one backbone.
//!
//! A catalogue does not change: the worker has one after the other, and a session keeps what it was opened with. Those of
//! the command line are in all of them; `adapters` adds and takes away what the store lists.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use uniarm_model::{Adapter, ChatTemplate, Conditioned, Config, Method, ModelError, Tokenizer};
use uniarm_proto::{
    AdapterFault, Generation, Member, MemberId, Objective, RewardModel, Role, TokenizerFingerprint,
    adapter::versioned,
};

/// Retired versions of one name that can still be opened. Each is in memory, so that putting one after the other does not
/// fill it; sessions of older ones go on, and find nobody else when their worker is lost.
const RETIRED_MAX: usize = 4;

/// From leaving the worker's record to leaving its memory: who has read the record before may still come.
const LEAVING: Duration = Duration::from_secs(30);

/// The language model under all reward models of a worker.
pub struct Backbone {
    pub name: String,
    /// Identity of its weights: an adapter may name the backbone that it was trained on.
    pub fingerprint: [u8; 32],
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub context_tokens: usize,
    /// Logits of one row.
    pub vocabulary: usize,
}

/// Reward models by name.
#[derive(Clone)]
pub struct RewardCatalogue {
    pub backbone: Arc<Backbone>,
    served: Vec<Served>,
    /// What the store lists and this worker does not serve.
    faults: Vec<AdapterFault>,
    /// Adapters that this worker has ever had: none gets the number of another one, not even of one that is gone.
    adapters: u64,
}

/// One reward model: the backbone under an adapter, under a system text, or as it is.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) record: RewardModel,
    /// This count is of catalogues, the one within of sessions.
    pub(crate) adapter: Option<Arc<Loaded>>,
    pub(crate) system: Option<String>,
    /// Number of the adapter among those of this worker, from 1: part of the prefix cache's key. 0: no adapter.
    pub(crate) adapter_number: u64,
    /// Of what the store lists.
    listed: Option<Listed>,
}

/// An adapter in memory.
pub(crate) struct Loaded(Arc<Adapter>);

/// One version of the store's catalogue.
#[derive(Clone)]
struct Listed {
    name: String,
    digest: [u8; 32],
    /// It is retired, and stays until then at least.
    kept_until: Option<Instant>,
    /// It has left the worker's record.
    left_at: Option<Instant>,
}

#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    #[error("two reward models are named {0:?}")]
    Duplicate(String),
    #[error(transparent)]
    Model(#[from] ModelError),
}

// === impl RewardCatalogue ===

impl RewardCatalogue {
    pub fn new(backbone: Backbone) -> Self {
        Self { backbone: Arc::new(backbone), served: Vec::new(), faults: Vec::new(), adapters: 0 }
    }

    /// The backbone as it is: an autoregressive reward model without a preference.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_plain(&mut self, name: &str) -> Result<(), CatalogueError> {
        self.add(name, "plain", Vec::new(), None, None)
    }

    /// The backbone under a system text: a *prompted* reward model, whose one objective has its name.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_prompted(&mut self, name: &str, system: &str) -> Result<(), CatalogueError> {
        let objective = Objective { name: name.to_owned(), description: system.to_owned() };
        self.add(name, "prompted", vec![objective], None, Some(system.to_owned()))
    }

    /// An adapter folder on the backbone.
    ///
    /// # Errors
    /// When the folder does not hold an adapter of this backbone, or the name is taken.
    pub fn add_adapter(&mut self, name: &str, folder: &Path, config: &Config) -> Result<(), CatalogueError> {
        let adapter = Adapter::load(folder, config, &self.backbone.fingerprint)?;
        let (method, objectives) = description(&adapter);
        self.add(name, method, objectives, Some(adapter), None)
    }

    /// As clients and the store see them.
    pub fn records(&self) -> Vec<RewardModel> {
        let stays = |served: &&Served| served.listed.as_ref().is_none_or(|listed| listed.left_at.is_none());
        self.served.iter().filter(stays).map(|served| served.record.clone()).collect()
    }

    /// What the store says of this worker; id, generation and address are its process's to fill in.
    pub fn member(&self) -> Member {
        Member {
            id: MemberId(String::new()),
            generation: Generation(0),
            role: Role::Reward,
            address: String::new(),
            tokenizer: Some(self.tokenizer_fingerprint()),
            vocabulary: self.backbone.vocabulary as u32,
            capacity: 0,
            base_model: None,
            reward_models: self.records(),
            group: String::new(),
            rank: 0,
            size: 1,
            adapter_faults: self.faults.clone(),
        }
    }

    /// The record of a worker with this catalogue, which was `member` with another.
    #[must_use]
    pub fn describe(&self, member: Member) -> Member {
        Member { reward_models: self.records(), adapter_faults: self.faults.clone(), ..member }
    }

    pub fn tokenizer_fingerprint(&self) -> TokenizerFingerprint {
        let own = self.backbone.tokenizer.fingerprint();
        TokenizerFingerprint { core: own.core, core_tokens: own.core_tokens, full: own.full }
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Served> {
        self.served.iter().find(|served| served.record.name == name)
    }

    fn add(
        &mut self,
        name: &str,
        method: &str,
        objectives: Vec<Objective>,
        adapter: Option<Adapter>,
        system: Option<String>,
    ) -> Result<(), CatalogueError> {
        if self.find(name).is_some() {
            return Err(CatalogueError::Duplicate(name.to_owned()));
        }
        let record = RewardModel {
            name: name.to_owned(),
            single_objective: objectives.len() == 1,
            objectives,
            backbone: self.backbone.name.clone(),
            method: method.to_owned(),
            ..RewardModel::default()
        };
        let adapter_number = if adapter.is_some() { self.next_number() } else { 0 };
        let adapter = adapter.map(|adapter| Arc::new(Loaded(Arc::new(adapter))));
        self.served.push(Served { record, adapter, system, adapter_number, listed: None });
        Ok(())
    }

    fn next_number(&mut self) -> u64 {
        self.adapters += 1;
        self.adapters
    }
}

// === impl RewardCatalogue, of what the store lists ===

impl RewardCatalogue {
    /// Whether the command line names a reward model so.
    pub(crate) fn has_unlisted(&self, name: &str) -> bool {
        self.served.iter().any(|served| served.listed.is_none() && served.record.name == name)
    }

    /// The digest of a version that is in memory.
    pub(crate) fn digest_of(&self, name: &str, version: u64) -> Option<[u8; 32]> {
        self.versions(name).find(|(record, _)| record.version == version).map(|(_, listed)| listed.digest)
    }

    /// Adds a version that is not in memory. `kept_until`: it is retired already, and stays until then at least.
    pub(crate) fn add_version(
        &mut self,
        (name, version): (&str, u64),
        digest: [u8; 32],
        adapter: Adapter,
        kept_until: Option<Instant>,
    ) {
        let (method, objectives) = description(&adapter);
        let record = RewardModel {
            name: versioned(name, version),
            single_objective: objectives.len() == 1,
            objectives,
            backbone: self.backbone.name.clone(),
            method: method.to_owned(),
            version,
            retired: kept_until.is_some(),
        };
        let adapter_number = self.next_number();
        let listed = Listed { name: name.to_owned(), digest, kept_until, left_at: None };
        let adapter = Some(Arc::new(Loaded(Arc::new(adapter))));
        self.served.push(Served { record, adapter, system: None, adapter_number, listed: Some(listed) });
    }

    /// New requests get `current` of this name, or none of it; the others stay until `kept_until` at least. False: so it
    /// was.
    pub(crate) fn retire_all_but(&mut self, name: &str, current: Option<u64>, kept_until: Instant) -> bool {
        let mut has_changed = false;
        for served in &mut self.served {
            let Some(listed) = served.listed.as_mut().filter(|listed| listed.name == name) else { continue };
            let retired = Some(served.record.version) != current;
            if retired == listed.kept_until.is_some() {
                continue;
            }
            has_changed = true;
            served.record.retired = retired;
            listed.kept_until = retired.then_some(kept_until);
            if !retired {
                listed.left_at = None;
            }
        }
        has_changed
    }

    /// Lets go of retired versions whose time has come: first from the record, then from memory. False: nothing has
    /// changed.
    pub(crate) fn let_go(&mut self, now: Instant) -> bool {
        let leaving = self.leaving(now);
        for index in &leaving {
            if let Some(listed) = &mut self.served[*index].listed {
                listed.left_at = Some(now);
            }
        }
        let before = self.served.len();
        self.served.retain(|served| {
            let left_at = served.listed.as_ref().and_then(|listed| listed.left_at);
            left_at.is_none_or(|left_at| now < left_at + LEAVING)
        });
        !leaving.is_empty() || self.served.len() < before
    }

    /// Retired versions that leave the record now: those whose time is over and that no session uses, and of each name the
    /// oldest, where there are too many.
    fn leaving(&self, now: Instant) -> Vec<usize> {
        let retired = self.served.iter().enumerate().filter_map(|(index, served)| {
            let listed = served.listed.as_ref().filter(|listed| listed.left_at.is_none())?;
            Some((index, served, listed.name.as_str(), listed.kept_until?))
        });
        let mut retired: Vec<_> = retired.collect();
        retired.sort_by_key(|(_, served, ..)| std::cmp::Reverse(served.record.version));
        let mut of_name: BTreeMap<&str, usize> = BTreeMap::new();
        retired.retain(|(_, served, name, kept_until)| {
            let count = of_name.entry(name).or_default();
            *count += 1;
            *count > RETIRED_MAX || (*kept_until <= now && !served.has_sessions())
        });
        retired.into_iter().map(|(index, ..)| index).collect()
    }

    /// What of the store's list is not served, and why. False: so it was.
    pub(crate) fn set_faults(&mut self, faults: Vec<AdapterFault>) -> bool {
        let has_changed = self.faults != faults;
        self.faults = faults;
        has_changed
    }

    /// Versions of the store's catalogue that new requests may get.
    pub(crate) fn current_versions(&self) -> usize {
        self.served.iter().filter(|served| served.listed.is_some() && !served.record.retired).count()
    }

    fn versions<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a RewardModel, &'a Listed)> {
        let listed = self.served.iter().filter_map(|served| Some((&served.record, served.listed.as_ref()?)));
        listed.filter(move |(_, listed)| listed.name == name)
    }
}

// === impl Served ===

impl Served {
    fn has_sessions(&self) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| Arc::strong_count(&adapter.0) > 1)
    }
}

// === impl Loaded ===

impl Loaded {
    /// What a session holds of it.
    pub(crate) fn condition(&self, preference: &[f32]) -> Result<Conditioned, ModelError> {
        self.0.condition(preference)
    }
}

/// Method and objectives, as records have them.
fn description(adapter: &Adapter) -> (&'static str, Vec<Objective>) {
    let method = match adapter.method() {
        Method::MosLora => "moslora",
        Method::PbLora => "pblora",
        Method::Lora => "lora",
    };
    let objective =
        |o: &uniarm_model::Objective| Objective { name: o.name.clone(), description: o.description.clone() };
    (method, adapter.objectives().iter().map(objective).collect())
}

#[cfg(test)]
mod tests {
    use uniarm_model::ScriptedForward;

    use super::*;

    const KEPT: Duration = Duration::from_secs(900);

    fn catalogue() -> RewardCatalogue {
        let mut catalogue = RewardCatalogue::new(Backbone {
            name: "scripted".into(),
            fingerprint: [1; 32],
            tokenizer: ScriptedForward::tokenizer(64),
            template: None,
            context_tokens: 64,
            vocabulary: 64,
        });
        catalogue.add_plain("plain").unwrap();
        catalogue
    }

    fn with_versions(count: u64) -> RewardCatalogue {
        let mut catalogue = catalogue();
        for version in 1..=count {
            catalogue.add_version(("my", version), [version as u8; 32], Adapter::scripted(Vec::new()), None);
        }
        catalogue
    }

    fn names(catalogue: &RewardCatalogue) -> Vec<(String, bool)> {
        catalogue.records().into_iter().map(|record| (record.name, record.retired)).collect()
    }

    #[test]
    fn a_retired_version_stays_for_its_time_then_leaves_the_record_and_later_the_memory() {
        let now = Instant::now();
        let mut catalogue = with_versions(2);
        assert!(catalogue.retire_all_but("my", Some(2), now + KEPT));
        assert!(!catalogue.retire_all_but("my", Some(2), now + 2 * KEPT), "its time does not begin again");
        let all = [("plain", false), ("my@1", true), ("my@2", false)].map(|(name, r)| (name.to_owned(), r));
        assert_eq!(names(&catalogue), all);
        assert!(!catalogue.let_go(now));
        assert!(catalogue.let_go(now + KEPT));
        assert_eq!(names(&catalogue), [all[0].clone(), all[2].clone()]);
        assert!(catalogue.find("my@1").is_some(), "who read the record before may still come");
        assert!(catalogue.let_go(now + KEPT + LEAVING));
        assert!(catalogue.find("my@1").is_none());
        assert!(catalogue.retire_all_but("my", None, now), "and a name may be removed");
        assert_eq!(names(&catalogue)[1], ("my@2".to_owned(), true));
    }

    #[test]
    fn sessions_keep_a_retired_version_unless_there_are_too_many() {
        let now = Instant::now();
        let mut catalogue = with_versions(1);
        let session = Arc::clone(catalogue.find("my@1").unwrap().adapter.as_ref().unwrap());
        let session = session.condition(&[]).unwrap();
        catalogue.retire_all_but("my", None, now);
        assert!(!catalogue.clone().let_go(now), "copies of a catalogue are no sessions, and this one is");
        drop(session);
        assert!(catalogue.clone().let_go(now));

        let mut many = with_versions(RETIRED_MAX as u64 + 2);
        let oldest = many.find("my@1").unwrap().adapter.as_ref().unwrap().condition(&[]).unwrap();
        many.retire_all_but("my", Some(RETIRED_MAX as u64 + 2), now + KEPT);
        assert!(many.let_go(now));
        assert_eq!(many.records().len(), 2 + RETIRED_MAX);
        assert!(names(&many).iter().all(|(name, _)| name != "my@1"));
        drop(oldest);
    }

    #[test]
    fn no_adapter_gets_the_number_of_one_that_is_gone() {
        let now = Instant::now();
        let mut catalogue = with_versions(2);
        catalogue.retire_all_but("my", None, now);
        catalogue.let_go(now);
        catalogue.let_go(now + LEAVING);
        assert_eq!(catalogue.served.len(), 1);
        catalogue.add_version(("my", 3), [3; 32], Adapter::scripted(Vec::new()), None);
        assert_eq!(catalogue.find("my@3").unwrap().adapter_number, 3);
    }
}
