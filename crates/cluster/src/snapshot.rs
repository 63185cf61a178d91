//! The members at one moment: immutable, shared by everyone who reads it.

use std::sync::Arc;

use tokio::sync::watch;
use uniarm_proto::{Member, MemberId, Role};

/// Always holds the latest snapshot; `changed()` waits for the next.
pub type SnapshotReceiver = watch::Receiver<Arc<Snapshot>>;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// In the order of their ids.
    members: Vec<Arc<Member>>,
    revision: u64,
}

impl Snapshot {
    #[must_use]
    pub fn new(members: impl IntoIterator<Item = Arc<Member>>, revision: u64) -> Self {
        let mut members: Vec<_> = members.into_iter().collect();
        members.sort_by(|a, b| a.id.cmp(&b.id));
        Self { members, revision }
    }

    /// In the order of their ids.
    #[must_use]
    pub fn members(&self) -> &[Arc<Member>] {
        &self.members
    }

    /// Grows with every change. 0: nothing has been read from the store yet.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    #[must_use]
    pub fn get(&self, id: &MemberId) -> Option<&Arc<Member>> {
        self.members.binary_search_by(|member| member.id.cmp(id)).ok().map(|position| &self.members[position])
    }

    pub fn with_role(&self, role: Role) -> impl Iterator<Item = &Arc<Member>> {
        self.members.iter().filter(move |member| member.role == role)
    }
}
