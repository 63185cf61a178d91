//! Places that tenants share: the fewer are free, the fewer one tenant may hold, so that there is always one for the next.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A tenant may hold so many times the places that are free (dynamic thresholds, Choudhury and Hahne 1998): alone eight
/// ninths of all, two of them eight seventeenths each. Nobody has to be told how many tenants there are.
const HELD_PER_FREE: usize = 8;

/// Who holds how many. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Crowd(Arc<Mutex<HashMap<u64, usize>>>);

/// One place of a tenant, given back when it is dropped.
#[derive(Debug)]
pub struct TenantPlace {
    crowd: Crowd,
    tenant: u64,
}

/// Whether a tenant that holds so many places may take one of those that are free. Its first one it may always have.
#[must_use]
pub fn may_take(held: usize, free: usize) -> bool {
    held == 0 || held < HELD_PER_FREE.saturating_mul(free)
}

// === impl Crowd ===

impl Crowd {
    /// A place for a tenant, of those that are free; none, if it holds its share. Tenant 0 is nobody in particular, and
    /// has no share. `is_owed`: it may have more, because it has begun elsewhere.
    #[must_use]
    pub fn enter(&self, tenant: u64, free: usize, is_owed: bool) -> Option<TenantPlace> {
        let mut held = self.lock();
        let count = held.get(&tenant).copied().unwrap_or(0);
        let may = is_owed || tenant == 0 || may_take(count, free);
        may.then(|| {
            held.insert(tenant, count + 1);
            TenantPlace { crowd: self.clone(), tenant }
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        // Counts are whole after each statement, whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl TenantPlace ===

impl Drop for TenantPlace {
    fn drop(&mut self) {
        let mut held = self.crowd.lock();
        let left = held.remove(&self.tenant).unwrap_or(1) - 1;
        if left > 0 {
            held.insert(self.tenant, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `all` places each of these tenants gets, if all of them take what they can, in turns.
    fn shares(all: usize, tenants: &[u64]) -> Vec<usize> {
        let (crowd, mut places) = (Crowd::default(), Vec::new());
        let mut counts = vec![0; tenants.len()];
        for _ in 0..all {
            for (index, tenant) in tenants.iter().enumerate() {
                let free = all - places.len();
                if free > 0
                    && let Some(place) = crowd.enter(*tenant, free, false)
                {
                    places.push(place);
                    counts[index] += 1;
                }
            }
        }
        counts
    }

    #[test]
    fn there_is_a_place_for_the_next_tenant_however_many_are_there() {
        assert_eq!(shares(900, &[1]), [800]);
        assert_eq!(shares(900, &[1, 2]), [424, 424]);
        assert_eq!(shares(900, &[0]), [900], "without tenants nobody keeps anything for another");
        for tenants in 1..20 {
            let everyone: Vec<u64> = (1..=tenants).collect();
            assert!(shares(900, &everyone).iter().sum::<usize>() < 900, "{tenants}");
        }
    }

    #[test]
    fn a_first_request_takes_any_place_and_what_ends_is_given_back() {
        let crowd = Crowd::default();
        let first = crowd.enter(1, 0, false);
        assert!(first.is_some() && crowd.enter(1, 0, false).is_none() && crowd.enter(1, 0, true).is_some());
        drop(first);
        assert!(crowd.lock().is_empty(), "nothing is kept of who holds nothing");
        assert!(crowd.enter(1, 0, false).is_some());
    }
}
