//! The store's list of adapters, followed: each version is checked, loaded and served, and let go a while after its
//! successor came or its name was removed. Whatever is wrong with one is said, and costs no other.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::time::{sleep, timeout};
use uniarm_cluster::{Adapters, AdaptersReceiver};
use uniarm_model::{Adapter, Config};
use uniarm_proto::{AdapterFault, AdapterRecord, AdapterVersion, adapter::versioned, digits::hexadecimal};
use uniarm_runtime::{Metrics, prometheus_client::metrics::gauge::Gauge};

use crate::{catalogue::RewardCatalogue, handle::RewardHandle};

/// How long a version without a future can still be opened: a stream that began with it and loses its worker finds another
/// one. Most answers take less; those that take longer keep it by their sessions.
pub const RETIRED_KEPT: Duration = Duration::from_secs(15 * 60);

/// How often it is looked whether something is to be let go or tried again. A change of the list is looked at at once.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Files that are not there or not right may come to be: they are tried again after so long.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// Keeps one worker's catalogue as the store lists it.
pub struct AdapterFollower {
    handle: RewardHandle,
    config: Config,
    /// Whether this worker has other ranks, which get its adapters from it.
    shares: bool,
    refused: BTreeMap<(String, u64), Refused>,
    /// Versions that were loaded once: what is let go does not come back.
    had: BTreeSet<(String, u64)>,
    served: Gauge,
    faulty: Gauge,
}

/// A version that was tried.
struct Refused {
    fault: AdapterFault,
    /// `None`: its files have nothing to do with it.
    again_at: Option<Instant>,
}

/// What is to be done for one name.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// For new requests: this one, or else the next older.
    Current,
    /// For streams that have begun with it.
    Retired,
}

// === impl AdapterFollower ===

impl AdapterFollower {
    /// `config`: of the worker's backbone.
    pub fn new(handle: RewardHandle, config: Config, metrics: &Metrics) -> Self {
        let metrics = metrics.scope("reward");
        Self {
            handle,
            config,
            shares: false,
            refused: BTreeMap::new(),
            had: BTreeSet::new(),
            served: metrics.gauge("adapters_served", "Adapters of the store's catalogue for new requests"),
            faulty: metrics.gauge(
                "adapters_refused",
                "Adapters of the store's catalogue that this worker should serve and cannot; its log says why",
            ),
        }
    }

    /// Of rank 0 of a group: the other ranks get what is loaded from it.
    #[must_use]
    pub fn sharing(self) -> Self {
        Self { shares: true, ..self }
    }

    /// Serves what the store lists now, so that a worker comes with it. A store that says nothing for `patience` is waited
    /// for by `run`.
    pub async fn catch_up(&mut self, adapters: &mut AdaptersReceiver, patience: Duration) {
        let first = timeout(patience, adapters.wait_for(|adapters| adapters.revision() > 0)).await;
        // The store cannot tell of anything new while its list is borrowed.
        let listed = first.ok().and_then(Result::ok).map(|first| first.clone());
        if let Some(listed) = listed {
            self.settle(&listed).await;
        }
    }

    /// Goes on until the store is closed.
    pub async fn run(mut self, mut adapters: AdaptersReceiver) {
        loop {
            let listed = adapters.borrow_and_update().clone();
            self.settle(&listed).await;
            tokio::select! {
                changed = adapters.changed() => if changed.is_err() { return },
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// A name that is not listed any more was lost by the store, not removed: removed ones are listed as such. It stays.
    async fn settle(&mut self, listed: &Adapters) {
        for record in listed.records() {
            self.follow(record).await;
        }
        let is_listed = |(name, version): &(String, u64)| {
            listed.get(name).is_some_and(|record| record.versions.iter().any(|one| one.version == *version))
        };
        self.refused.retain(|key, _| is_listed(key));
        self.had.retain(is_listed);
        let newest = |fault: &&AdapterFault| {
            listed
                .get(&fault.name)
                .is_some_and(|record| !record.is_removed() && record.newest().version == fault.version)
        };
        let faults = self.refused.values().map(|refused| &refused.fault).filter(newest);
        let faults: Vec<_> = faults.cloned().collect();
        self.faulty.set(faults.iter().filter(|fault| !fault.other_backbone).count() as i64);
        self.change(|catalogue| {
            let has_changed = catalogue.set_faults(faults);
            catalogue.let_go(Instant::now()) || has_changed
        });
        self.served.set(self.handle.catalogue().current_versions() as i64);
    }

    /// Loads what is wanted of one name, and says which version new requests get.
    async fn follow(&mut self, record: &AdapterRecord) {
        let mut current = None;
        for (version, wanted) in wanted(record, SystemTime::now()) {
            if wanted == Wanted::Current && current.is_some() {
                continue;
            }
            let is_there = match self.handle.catalogue().digest_of(&record.name, version.version) {
                Some(digest) if digest == version.digest => true,
                Some(_) => {
                    let reason = "this worker has other files under this version, from before the store lost its \
                                  data; put them once more, as the next version";
                    let fault = AdapterFault::new(&record.name, version.version, reason, false);
                    self.refuse(version, fault, Some(Instant::now() + RETRY_AFTER))
                }
                None if wanted == Wanted::Retired && self.has_had(record, version) => false,
                None => self.load(record, version).await,
            };
            if is_there && !record.is_removed() && current.is_none() {
                current = Some(version.version);
            }
        }
        // Nothing that works is given up for nothing.
        if current.is_some() || record.is_removed() {
            let kept_until = Instant::now() + RETIRED_KEPT;
            self.change(|catalogue| catalogue.retire_all_but(&record.name, current, kept_until));
        }
    }

    /// True: it is in the catalogue now.
    async fn load(&mut self, record: &AdapterRecord, version: &AdapterVersion) -> bool {
        let (name, number) = (record.name.as_str(), version.version);
        let now = Instant::now();
        if let Some(refused) = self.refused.get(&(name.to_owned(), number))
            && refused.again_at.is_none_or(|again_at| now < again_at)
        {
            return false;
        }
        if let Some(fault) = self.objection(name, version) {
            return self.refuse(version, fault, None);
        }
        let own = self.handle.catalogue().backbone.fingerprint;
        let (wanted, config, shares) = (version.clone(), self.config.clone(), self.shares);
        let loading = tokio::task::spawn_blocking(move || load(&wanted, (&config, &own), shares));
        let loaded = loading.await.unwrap_or_else(|_| Err("loading it panicked".to_owned()));
        match loaded {
            Ok(adapter) => {
                self.refused.remove(&(name.to_owned(), number));
                self.had.insert((name.to_owned(), number));
                let kept_until = version.retired_at_ms.map(|_| now + RETIRED_KEPT);
                self.change(|catalogue| {
                    catalogue.add_version((name, number), version.digest, adapter, kept_until);
                    true
                });
                let (adapter, source) = (versioned(name, number), &version.source);
                tracing::info!(adapter, source, "serving an adapter");
                true
            }
            Err(reason) => {
                let fault = AdapterFault::new(name, number, &reason, false);
                self.refuse(version, fault, Some(now + RETRY_AFTER))
            }
        }
    }

    /// Why this worker does not serve a version, whatever its files are.
    fn objection(&self, name: &str, version: &AdapterVersion) -> Option<AdapterFault> {
        let fault = |reason: &str, other| Some(AdapterFault::new(name, version.version, reason, other));
        let catalogue = self.handle.catalogue();
        let own = catalogue.backbone.fingerprint;
        if let Some(backbone) = version.backbone.filter(|backbone| *backbone != own) {
            let (backbone, own) = (hexadecimal(&backbone), hexadecimal(&own));
            let reason = format!("it was trained over backbone {backbone}, this worker's is {own}");
            return fault(&reason, true);
        }
        if catalogue.has_unlisted(name) {
            let reason = format!(
                "this worker's command line names a reward model {name:?} too; put it under another name, or start the \
                 worker without that flag"
            );
            return fault(&reason, false);
        }
        None
    }

    fn has_had(&self, record: &AdapterRecord, version: &AdapterVersion) -> bool {
        self.had.contains(&(record.name.clone(), version.version))
    }

    /// Said once for each reason. Always false.
    fn refuse(&mut self, version: &AdapterVersion, fault: AdapterFault, again_at: Option<Instant>) -> bool {
        let key = (fault.name.clone(), fault.version);
        if self.refused.get(&key).is_none_or(|former| former.fault != fault) {
            let (adapter, reason) = (versioned(&fault.name, fault.version), &fault.reason);
            match fault.other_backbone || version.retired_at_ms.is_some() {
                true => tracing::info!(adapter, reason, "an adapter of the catalogue is not for this worker"),
                false => tracing::error!(adapter, reason, "an adapter of the catalogue is not served"),
            }
        }
        self.refused.insert(key, Refused { fault, again_at });
        false
    }

    /// One catalogue after the other; `change` returns false where nothing has changed.
    fn change(&self, change: impl FnOnce(&mut RewardCatalogue) -> bool) {
        let mut catalogue = RewardCatalogue::clone(&self.handle.catalogue());
        if change(&mut catalogue) {
            self.handle.set_catalogue(catalogue);
        }
    }
}

/// What a worker should have of a name, the newest first. Clocks that disagree keep an old version longer or shorter, and
/// decide nothing else.
fn wanted(record: &AdapterRecord, now: SystemTime) -> Vec<(&AdapterVersion, Wanted)> {
    let now_ms = now.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis());
    let is_recent = |version: &AdapterVersion| {
        version.retired_at_ms.is_none_or(|at| now_ms < u128::from(at) + RETIRED_KEPT.as_millis())
    };
    let newest_first = record.versions.iter().rev();
    newest_first
        .filter_map(|version| match (is_recent(version), record.is_removed()) {
            (true, _) if version.retired_at_ms.is_some() => Some((version, Wanted::Retired)),
            (_, false) => Some((version, Wanted::Current)),
            (_, true) => None,
        })
        .collect()
}

/// Its files are what they were when it was put.
fn load(
    version: &AdapterVersion,
    (config, backbone): (&Config, &[u8; 32]),
    to_share: bool,
) -> Result<Adapter, String> {
    let (folder, digest) = (Path::new(&version.source), &version.digest);
    let loaded = match to_share {
        true => Adapter::load_to_share(folder, config, backbone, digest),
        false => Adapter::load_known(folder, config, backbone, digest),
    };
    loaded.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(versions: &[(u64, Option<u64>)]) -> AdapterRecord {
        let version = |(version, retired_at_ms): &(u64, Option<u64>)| AdapterVersion {
            version: *version,
            source: "/a".into(),
            digest: [1; 32],
            backbone: None,
            put_at_ms: 1,
            retired_at_ms: *retired_at_ms,
        };
        AdapterRecord { name: "my".into(), versions: versions.iter().map(version).collect() }
    }

    #[test]
    fn the_newest_is_wanted_older_ones_for_a_while_and_of_a_removed_name_no_more() {
        let now = UNIX_EPOCH + 2 * RETIRED_KEPT;
        let (just_now, long_ago) = (now - RETIRED_KEPT / 2, UNIX_EPOCH + RETIRED_KEPT / 2);
        let ms = |at: SystemTime| Some(at.duration_since(UNIX_EPOCH).unwrap().as_millis() as u64);
        let of = |record: &AdapterRecord| -> Vec<(u64, bool)> {
            let wanted = wanted(record, now).into_iter();
            wanted.map(|(version, wanted)| (version.version, wanted == Wanted::Retired)).collect()
        };
        let served = record(&[(1, ms(long_ago)), (2, ms(just_now)), (3, None)]);
        assert_eq!(of(&served), [(3, false), (2, true), (1, false)]);
        let removed = record(&[(1, ms(long_ago)), (2, ms(just_now))]);
        assert_eq!(of(&removed), [(2, true)]);
        assert!(of(&record(&[(1, ms(long_ago))])).is_empty());
    }
}
