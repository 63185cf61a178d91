//! The catalogue of adapters: what its records become by a put and a removal, and how its readers see it. Pure.

use std::sync::Arc;

use prost::Message as _;
use tokio::sync::watch;
use uniarm_proto::{
    AdapterRecord, AdapterVersion,
    adapter::{ADAPTER_VERSIONS_MAX, check_adapter_name},
    pb,
};

use crate::StoreError;

/// Names that are not removed. Each reward worker holds all of them in memory, and lists them in its record, of which
/// etcd takes 1.5 MB.
pub const ADAPTERS_MAX: usize = 256;

/// Always holds the latest catalogue; `changed()` waits for the next.
pub type AdaptersReceiver = watch::Receiver<Arc<Adapters>>;

/// The catalogue at one moment: immutable, shared by everyone who reads it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Adapters {
    /// In the order of their names.
    records: Vec<Arc<AdapterRecord>>,
    revision: u64,
}

/// What somebody puts into the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewAdapter {
    pub name: String,
    /// A folder, as workers see it.
    pub source: String,
    /// SHA-256 over its files.
    pub digest: [u8; 32],
    /// Of the model that it was trained over, where it names one.
    pub backbone: Option<[u8; 32]>,
}

// === impl Adapters ===

impl Adapters {
    #[must_use]
    pub fn new(records: impl IntoIterator<Item = Arc<AdapterRecord>>, revision: u64) -> Self {
        let mut records: Vec<_> = records.into_iter().collect();
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Self { records, revision }
    }

    /// In the order of their names; removed ones too.
    #[must_use]
    pub fn records(&self) -> &[Arc<AdapterRecord>] {
        &self.records
    }

    /// Grows with every change. 0: nothing has been read from the store yet.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<AdapterRecord>> {
        self.records
            .binary_search_by(|record| record.name.as_str().cmp(name))
            .ok()
            .map(|position| &self.records[position])
    }
}

/// The record after a put; `None`: it says so already. The very same folder and files again are no new version, so that
/// a put whose answer was lost can be sent again.
pub(crate) fn put(former: Option<&AdapterRecord>, new: &NewAdapter, now_ms: u64) -> Option<AdapterRecord> {
    let mut versions = former.map_or_else(Vec::new, |record| record.versions.clone());
    let last = versions.last_mut();
    let number = last.as_ref().map_or(1, |last| last.version + 1);
    if let Some(last) = last {
        if last.retired_at_ms.is_none() && last.source == new.source && last.digest == new.digest {
            return None;
        }
        last.retired_at_ms.get_or_insert(now_ms);
    }
    versions.push(AdapterVersion {
        version: number,
        source: new.source.clone(),
        digest: new.digest,
        backbone: new.backbone,
        put_at_ms: now_ms,
        retired_at_ms: None,
    });
    let surplus = versions.len().saturating_sub(ADAPTER_VERSIONS_MAX);
    versions.drain(..surplus);
    Some(AdapterRecord { name: new.name.clone(), versions })
}

/// The record after a removal; `None`: it is removed already.
pub(crate) fn remove(
    former: Option<&AdapterRecord>,
    name: &str,
    now_ms: u64,
) -> Result<Option<AdapterRecord>, StoreError> {
    let former = former.ok_or_else(|| StoreError::UnknownAdapter { name: name.to_owned() })?;
    if former.is_removed() {
        return Ok(None);
    }
    let mut record = former.clone();
    if let Some(newest) = record.versions.last_mut() {
        newest.retired_at_ms = Some(now_ms);
    }
    Ok(Some(record))
}

/// Refuses what readers would refuse, and one name too many. `others`: names besides this one that are not removed.
pub(crate) fn check(new: &NewAdapter, others: usize) -> Result<(), StoreError> {
    check_adapter_name(&new.name).map_err(|error| StoreError::InvalidAdapter(error.to_string()))?;
    let record = put(None, new, 1).expect("the first version is new");
    decode(&encode(&record))?;
    if others >= ADAPTERS_MAX {
        let reason =
            format!("the catalogue has {others} adapters, the limit is {ADAPTERS_MAX}; remove one first");
        return Err(StoreError::InvalidAdapter(reason));
    }
    Ok(())
}

pub(crate) fn encode(record: &AdapterRecord) -> Vec<u8> {
    pb::AdapterRecord::from(record.clone()).encode_to_vec()
}

/// A record that another version of the product, or another hand, may have written.
pub(crate) fn decode(bytes: &[u8]) -> Result<AdapterRecord, StoreError> {
    let wire =
        pb::AdapterRecord::decode(bytes).map_err(|error| StoreError::InvalidAdapter(error.to_string()))?;
    wire.try_into()
        .map_err(|error: uniarm_proto::ProtocolError| StoreError::InvalidAdapter(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(source: &str, digest: u8) -> NewAdapter {
        NewAdapter { name: "my".into(), source: source.into(), digest: [digest; 32], backbone: None }
    }

    #[test]
    fn versions_grow_over_removals_and_a_record_remembers_few() {
        let mut record = put(None, &new("/1", 1), 10).unwrap();
        assert_eq!(put(Some(&record), &new("/1", 1), 11), None, "the same again");
        record = remove(Some(&record), "my", 20).unwrap().unwrap();
        assert_eq!(remove(Some(&record), "my", 21).unwrap(), None);
        for version in 2..=8 {
            record = put(Some(&record), &new("/1", version as u8 % 2), version * 10).unwrap();
        }
        let versions: Vec<_> = record.versions.iter().map(|one| (one.version, one.retired_at_ms)).collect();
        assert_eq!(versions, [(4, Some(50)), (5, Some(60)), (6, Some(70)), (7, Some(80)), (8, None)]);
        assert_eq!(decode(&encode(&record)).unwrap(), record);
        assert!(matches!(remove(None, "your", 1), Err(StoreError::UnknownAdapter { .. })));
    }

    #[test]
    fn what_a_reader_would_refuse_is_refused() {
        assert!(check(&new("/1", 1), ADAPTERS_MAX - 1).is_ok());
        for (wrong, others) in [
            (NewAdapter { name: "my@1".into(), ..new("/1", 1) }, 0),
            (new("", 1), 0),
            (new(&"x".repeat(5000), 1), 0),
            (new("/1", 1), ADAPTERS_MAX),
        ] {
            assert!(matches!(check(&wrong, others), Err(StoreError::InvalidAdapter(_))), "{wrong:?}");
        }
    }
}
