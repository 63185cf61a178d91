//! Who has had how much: among sequences of one class, those of a tenant that has had less are served first.
//!
//! Start-time fair queueing. A clock counts tokens of service; a sequence gets the *tag* at which its tenant's turn comes:
//! now, or when what the tenant asked for before has been served, if it alone were served until then. The line is ordered
//! by tags, so that two tenants get tokens in equal parts, whatever each of them has queued, and a tenant that comes late
//! begins at the clock: it is owed nothing for the time when it asked for nothing. One tenant alone is served in the order
//! of arrival.

use std::collections::HashMap;

/// Accounts that say nothing any more are dropped when there are so many.
const ACCOUNTS_KEPT: usize = 256;

/// Whose a sequence is; 0: nobody's in particular.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant(pub u64);

#[derive(Default)]
pub(super) struct Shares {
    /// The latest tag that was served.
    clock: u64,
    accounts: HashMap<Tenant, Account>,
}

#[derive(Default)]
struct Account {
    /// Tag of its latest sequence.
    latest: u64,
    /// Where its next one begins, unless the clock is further.
    next: u64,
    sequences: usize,
}

impl Shares {
    /// The tag of a new sequence, which may cost so many tokens.
    pub(super) fn enter(&mut self, tenant: Tenant, tokens: usize) -> u64 {
        let clock = self.clock;
        if self.accounts.len() >= ACCOUNTS_KEPT {
            self.accounts.retain(|_, account| account.sequences > 0 || account.next > clock);
        }
        let account = self.accounts.entry(tenant).or_default();
        account.latest = account.next.max(clock);
        account.next = account.latest + tokens as u64;
        account.sequences += 1;
        account.latest
    }

    /// The tag that a sequence would get now.
    pub(super) fn tag(&self, tenant: Tenant) -> u64 {
        self.accounts.get(&tenant).map_or(self.clock, |account| account.next.max(self.clock))
    }

    /// A sequence with this tag gets a running place.
    pub(super) fn serve(&mut self, tag: u64) {
        self.clock = self.clock.max(tag);
    }

    /// A sequence ends, and so many of the tokens that it might have cost were not needed. What its tenant has queued
    /// since keeps its order.
    pub(super) fn leave(&mut self, tenant: Tenant, unused: usize) {
        let Some(account) = self.accounts.get_mut(&tenant) else { return };
        account.next = account.next.saturating_sub(unused as u64).max(account.latest);
        account.sequences -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Tenant = Tenant(1);
    const B: Tenant = Tenant(2);
    const C: Tenant = Tenant(3);

    #[test]
    fn a_flood_waits_for_whoever_comes_after_it() {
        let mut shares = Shares::default();
        let flood: Vec<u64> = (0..5).map(|_| shares.enter(A, 100)).collect();
        assert_eq!(flood, [0, 100, 200, 300, 400]);
        shares.serve(flood[0]);
        shares.serve(flood[1]);
        // It has had nothing yet, and begins now; then they take turns.
        assert_eq!([shares.enter(B, 100), shares.enter(B, 100)], [100, 200]);
        // Half as long, twice as many.
        assert_eq!([shares.enter(C, 50), shares.enter(C, 50), shares.enter(C, 50)], [100, 150, 200]);
    }

    #[test]
    fn tokens_that_were_not_needed_are_given_back_and_absence_saves_nothing() {
        let mut shares = Shares::default();
        shares.enter(A, 1000);
        shares.leave(A, 900);
        assert_eq!(shares.enter(A, 10), 100);
        shares.leave(A, 10);
        shares.serve(5000);
        assert_eq!([shares.tag(A), shares.tag(B)], [5000, 5000]);
    }

    #[test]
    fn a_tenant_is_served_in_the_order_of_arrival_whatever_ends() {
        let mut shares = Shares::default();
        let mut last = 0;
        for round in 0..100 {
            let tag = shares.enter(A, 1 + round * 7 % 90);
            assert!(tag >= last, "{tag} after {last}");
            last = tag;
            if round % 3 == 0 {
                shares.leave(A, round * 7 % 90);
            }
        }
    }

    #[test]
    fn accounts_that_say_nothing_are_dropped() {
        let mut shares = Shares::default();
        for number in 0..10_000 {
            shares.serve(number);
            shares.enter(Tenant(number), 1);
            shares.leave(Tenant(number), 1);
        }
        assert!(shares.accounts.len() <= ACCOUNTS_KEPT);
    }
}
