//! The store's catalogue of adapters: what reward workers are to serve, by names whose versions only grow.

use crate::{ProtocolError, digits::hexadecimal, pb, request::check_count};

/// Bytes of a name: with a version behind it, it is the name of a reward model, and a part of a key in the store.
pub const ADAPTER_NAME_BYTES_MAX: usize = 128;

/// Versions that a record remembers, the newest among them: streams that began with an older one find its folder by it.
pub const ADAPTER_VERSIONS_MAX: usize = 5;

/// Bytes of a folder's name: Linux takes no longer path.
pub const ADAPTER_SOURCE_BYTES_MAX: usize = 4096;

/// Bytes of a worker's reason, which is part of its record in the store.
pub const ADAPTER_REASON_BYTES_MAX: usize = 512;

/// One name of the catalogue. It outlives its removal, so that no version is given twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterRecord {
    pub name: String,
    /// The newest last; never empty.
    pub versions: Vec<AdapterVersion>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterVersion {
    /// From 1.
    pub version: u64,
    /// A folder, as workers see it.
    pub source: String,
    /// SHA-256 over its files.
    pub digest: [u8; 32],
    /// Of the model that it was trained over, where it names one.
    pub backbone: Option<[u8; 32]>,
    /// Milliseconds since 1970, by the clock of who put it.
    pub put_at_ms: u64,
    /// When it was removed, or had a successor.
    pub retired_at_ms: Option<u64>,
}

/// Why a reward worker does not serve the newest version of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFault {
    pub name: String,
    pub version: u64,
    pub reason: String,
    /// It was trained over another backbone than this worker's: nothing is wrong.
    pub other_backbone: bool,
}

/// What a version is called by sessions, and by whoever wants this very one.
#[must_use]
pub fn versioned(name: &str, version: u64) -> String {
    format!("{name}@{version}")
}

/// What an adapter may be called: a part of a key, and of NAME@VERSION.
///
/// # Errors
/// Names the field `name`.
pub fn check_adapter_name(name: &str) -> Result<(), ProtocolError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > ADAPTER_NAME_BYTES_MAX || !name.bytes().all(plain) {
        let reason = format!(
            "is {name:?}, wants 1..={ADAPTER_NAME_BYTES_MAX} letters, digits, dots, dashes and underscores"
        );
        return Err(ProtocolError::invalid("name", reason));
    }
    Ok(())
}

// === impl AdapterRecord ===

impl AdapterRecord {
    #[must_use]
    pub fn newest(&self) -> &AdapterVersion {
        self.versions.last().expect("a record has at least one version")
    }

    /// Nothing of it is for new requests.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.newest().retired_at_ms.is_some()
    }
}

impl TryFrom<pb::AdapterRecord> for AdapterRecord {
    type Error = ProtocolError;

    fn try_from(wire: pb::AdapterRecord) -> Result<Self, ProtocolError> {
        check_adapter_name(&wire.name)?;
        check_count("versions", wire.versions.len(), ADAPTER_VERSIONS_MAX)?;
        let versions = wire.versions.into_iter().map(TryInto::try_into).collect::<Result<Vec<_>, _>>()?;
        let grows = versions.is_sorted_by(|a: &AdapterVersion, b| a.version < b.version);
        if versions.is_empty() || !grows || versions[0].version == 0 {
            return Err(ProtocolError::invalid("versions", "want numbers from 1 that grow"));
        }
        Ok(Self { name: wire.name, versions })
    }
}

impl From<AdapterRecord> for pb::AdapterRecord {
    fn from(record: AdapterRecord) -> Self {
        Self { name: record.name, versions: record.versions.into_iter().map(Into::into).collect() }
    }
}

// === impl AdapterVersion ===

impl AdapterVersion {
    /// The digest as people and files write it.
    #[must_use]
    pub fn digest_text(&self) -> String {
        hexadecimal(&self.digest)
    }
}

impl TryFrom<pb::AdapterVersion> for AdapterVersion {
    type Error = ProtocolError;

    fn try_from(wire: pb::AdapterVersion) -> Result<Self, ProtocolError> {
        let hash = |field: &str, bytes: &[u8]| {
            bytes.try_into().map_err(|_| ProtocolError::invalid(field, "wants 32 bytes"))
        };
        if wire.source.is_empty() || wire.source.len() > ADAPTER_SOURCE_BYTES_MAX {
            let reason = format!("wants a folder of 1..={ADAPTER_SOURCE_BYTES_MAX} bytes");
            return Err(ProtocolError::invalid("source", reason));
        }
        let backbone = match &wire.backbone_fingerprint[..] {
            [] => None,
            bytes => Some(hash("backbone_fingerprint", bytes)?),
        };
        Ok(Self {
            version: wire.version,
            source: wire.source,
            digest: hash("digest", &wire.digest)?,
            backbone,
            put_at_ms: wire.put_at_ms,
            retired_at_ms: (wire.retired_at_ms > 0).then_some(wire.retired_at_ms),
        })
    }
}

impl From<AdapterVersion> for pb::AdapterVersion {
    fn from(version: AdapterVersion) -> Self {
        Self {
            version: version.version,
            source: version.source,
            digest: version.digest.to_vec().into(),
            backbone_fingerprint: version.backbone.map_or_else(Vec::new, |bytes| bytes.to_vec()).into(),
            put_at_ms: version.put_at_ms,
            retired_at_ms: version.retired_at_ms.unwrap_or(0),
        }
    }
}

// === impl AdapterFault ===

impl AdapterFault {
    /// Cuts a long reason: it is part of a record.
    #[must_use]
    pub fn new(name: &str, version: u64, reason: &str, other_backbone: bool) -> Self {
        let end = reason.floor_char_boundary(ADAPTER_REASON_BYTES_MAX);
        Self { name: name.to_owned(), version, reason: reason[..end].to_owned(), other_backbone }
    }
}

impl From<pb::AdapterFault> for AdapterFault {
    fn from(wire: pb::AdapterFault) -> Self {
        let pb::AdapterFault { name, version, reason, other_backbone } = wire;
        Self { name, version, reason, other_backbone }
    }
}

impl From<AdapterFault> for pb::AdapterFault {
    fn from(fault: AdapterFault) -> Self {
        let AdapterFault { name, version, reason, other_backbone } = fault;
        Self { name, version, reason, other_backbone }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(version: u64) -> pb::AdapterVersion {
        let digest = vec![7; 32].into();
        pb::AdapterVersion { version, source: "/a".into(), digest, ..pb::AdapterVersion::default() }
    }

    #[test]
    fn a_record_survives_the_wire_and_is_refused_where_it_cannot_be() {
        let wire = pb::AdapterRecord { name: "my".into(), versions: vec![version(2), version(5)] };
        let record = AdapterRecord::try_from(wire.clone()).unwrap();
        assert_eq!((record.newest().version, record.is_removed()), (5, false));
        assert_eq!(pb::AdapterRecord::from(record), wire);
        let field = |wire: pb::AdapterRecord| AdapterRecord::try_from(wire).unwrap_err().field().to_owned();
        for name in ["", "a@1", "a/b", "ä"] {
            assert_eq!(field(pb::AdapterRecord { name: name.into(), ..wire.clone() }), "name");
        }
        for versions in [vec![], vec![version(0)], vec![version(2), version(2)], vec![version(1); 6]] {
            assert_eq!(field(pb::AdapterRecord { versions, ..wire.clone() }), "versions");
        }
        let short = pb::AdapterVersion { digest: vec![1].into(), ..version(1) };
        assert_eq!(field(pb::AdapterRecord { versions: vec![short], ..wire }), "digest");
    }
}
