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

/// What an answer is expected to cost before any has ended, in tokens.
const ANSWER_FIRST: u64 = 64;

/// An answer moves its tenant's mean by one part in so many.
const MEAN_OVER: u64 = 8;

pub(super) struct Shares {
    /// The latest tag that was served.
    clock: u64,
    /// Mean length of all answers, times [`MEAN_OVER`]: what is expected of a tenant that nothing is known of.
    answers: u64,
    accounts: HashMap<Tenant, Account>,
}

struct Account {
    /// Tag of its latest sequence.
    latest: u64,
    /// Where its next one begins, unless the clock is further.
    next: u64,
    /// Mean length of its answers, times [`MEAN_OVER`]. What a request may have says little: clients ask for more than they get.
    answers: u64,
    sequences: usize,
}

/// What a sequence was taken to cost when it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) tag: u64,
    cost: u64,
    prompt: usize,
}

impl Default for Shares {
    fn default() -> Self {
        Self { clock: 0, answers: ANSWER_FIRST * MEAN_OVER, accounts: HashMap::new() }
    }
}

impl Shares {
    /// The share of a new sequence of `prompt` tokens, which will never have more than `tokens_max`.
    pub(super) fn enter(&mut self, tenant: Tenant, prompt: usize, tokens_max: usize) -> Share {
        let (clock, answers) = (self.clock, self.answers);
        if self.accounts.len() >= ACCOUNTS_KEPT {
            self.accounts.retain(|_, account| account.sequences > 0 || account.next > clock);
        }
        let fresh = || Account { latest: clock, next: clock, answers, sequences: 0 };
        let account = self.accounts.entry(tenant).or_insert_with(fresh);
        let cost = (prompt as u64 + account.answers / MEAN_OVER).min(tokens_max as u64);
        account.latest = account.next.max(clock);
        account.next = account.latest + cost;
        account.sequences += 1;
        Share { tag: account.latest, cost, prompt }
    }

    /// The tag that a sequence would get now.
    pub(super) fn tag(&self, tenant: Tenant) -> u64 {
        self.accounts.get(&tenant).map_or(self.clock, |account| account.next.max(self.clock))
    }

    /// A sequence with this tag gets a running place.
    pub(super) fn serve(&mut self, tag: u64) {
        self.clock = self.clock.max(tag);
    }

    /// A sequence ends with so many tokens. What it had more or less than it was taken to cost, its tenant's next one
    /// is charged or given back; what its tenant has queued since keeps its order.
    pub(super) fn leave(&mut self, tenant: Tenant, share: Share, tokens: usize) {
        let Some(account) = self.accounts.get_mut(&tenant) else { return };
        let answer = tokens.saturating_sub(share.prompt) as u64;
        for mean in [&mut account.answers, &mut self.answers] {
            *mean = *mean - *mean / MEAN_OVER + answer;
        }
        account.next = (account.next + tokens as u64).saturating_sub(share.cost).max(account.latest);
        account.sequences -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Tenant = Tenant(1);
    const B: Tenant = Tenant(2);
    const C: Tenant = Tenant(3);

    /// Of a sequence that will have exactly so many tokens.
    fn tag(shares: &mut Shares, tenant: Tenant, tokens: usize) -> u64 {
        shares.enter(tenant, tokens, tokens).tag
    }

    #[test]
    fn a_flood_waits_for_whoever_comes_after_it() {
        let mut shares = Shares::default();
        let flood: Vec<u64> = (0..5).map(|_| tag(&mut shares, A, 100)).collect();
        assert_eq!(flood, [0, 100, 200, 300, 400]);
        shares.serve(flood[0]);
        shares.serve(flood[1]);
        // It has had nothing yet, and begins now; then they take turns.
        assert_eq!([tag(&mut shares, B, 100), tag(&mut shares, B, 100)], [100, 200]);
        // Half as long, twice as many.
        assert_eq!([(); 3].map(|()| tag(&mut shares, C, 50)), [100, 150, 200]);
    }

    #[test]
    fn an_answer_costs_what_it_had_and_absence_saves_nothing() {
        let mut shares = Shares::default();
        let share = shares.enter(A, 10, 1000);
        assert_eq!(shares.tag(A), 10 + ANSWER_FIRST);
        shares.leave(A, share, 1000);
        assert_eq!(shares.tag(A), 1000);
        let share = shares.enter(A, 10, 1000);
        shares.leave(A, share, 10);
        assert_eq!(shares.tag(A), 1010);
        shares.serve(5000);
        assert_eq!([shares.tag(A), shares.tag(B)], [5000, 5000]);
    }

    #[test]
    fn a_tenant_is_served_in_the_order_of_arrival_whatever_ends() {
        let mut shares = Shares::default();
        let (mut last, mut open) = (0, Vec::new());
        for round in 0..200 {
            let share = shares.enter(A, 1 + round * 7 % 90, 1000);
            assert!(share.tag >= last, "{} after {last}", share.tag);
            last = share.tag;
            open.push(share);
            if round % 3 == 0 {
                let ends = open.swap_remove(round % open.len());
                shares.leave(A, ends, round * 11 % 900);
            }
        }
    }

    #[test]
    fn accounts_that_say_nothing_are_dropped() {
        let mut shares = Shares::default();
        for number in 0..10_000 {
            shares.serve(number);
            let share = shares.enter(Tenant(number), 1, 1);
            shares.leave(Tenant(number), share, 1);
        }
        assert!(shares.accounts.len() <= ACCOUNTS_KEPT);
    }
}
