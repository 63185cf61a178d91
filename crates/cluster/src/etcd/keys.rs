//! Where things are in etcd.

use uniarm_proto::MemberId;

#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.trim_end_matches('/').to_owned() }
    }

    /// All member records, each under its member's lease.
    pub(super) fn members(&self) -> String {
        format!("{}/members/", self.prefix)
    }

    pub(super) fn member(&self, id: &MemberId) -> String {
        format!("{}{id}", self.members())
    }

    /// The catalogue: a record for each name, without a lease.
    pub(super) fn adapters(&self) -> String {
        format!("{}/adapters/", self.prefix)
    }

    pub(super) fn adapter(&self, name: &str) -> String {
        format!("{}{name}", self.adapters())
    }

    /// The last generation given out for `id`, as decimal digits. It has no lease: it outlives members.
    pub(super) fn generation(&self, id: &MemberId) -> String {
        format!("{}/generations/{id}", self.prefix)
    }
}
