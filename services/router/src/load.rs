//! What this router has under way on each member.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use uniarm_proto::MemberId;

use crate::place::Loads;

/// Requests under way by member.
#[derive(Clone, Default)]
pub struct LoadTable {
    under_way: Arc<Mutex<HashMap<MemberId, usize>>>,
}

/// Counts one request on its members until it is dropped.
pub struct LoadGuard {
    table: LoadTable,
    members: Vec<MemberId>,
}

// === impl LoadTable ===

impl LoadTable {
    /// Counts one more request on each of these members.
    pub fn count(&self, members: Vec<MemberId>) -> LoadGuard {
        let mut under_way = self.under_way.lock();
        for member in &members {
            *under_way.entry(member.clone()).or_default() += 1;
        }
        LoadGuard { table: self.clone(), members }
    }

    /// Members with something under way.
    pub(crate) fn busy(&self) -> HashMap<MemberId, usize> {
        self.under_way.lock().clone()
    }
}

impl Loads for LoadTable {
    fn under_way(&self, member: &MemberId) -> usize {
        self.under_way.lock().get(member).copied().unwrap_or(0)
    }
}

// === impl LoadGuard ===

impl Drop for LoadGuard {
    fn drop(&mut self) {
        let mut under_way = self.table.under_way.lock();
        for member in &self.members {
            if let Some(count) = under_way.get_mut(member) {
                *count -= 1;
                if *count == 0 {
                    under_way.remove(member);
                }
            }
        }
    }
}
