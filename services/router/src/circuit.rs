//! Which members are left alone for a while. Pure: time and dice are arguments.
//!
//! ```text
//!            connection lost                    the wait is over
//!   closed ───────────────────► open ───────────────────────────► probed by one request
//!     ▲                          ▲                                   │         │
//!     │                          └───────── connection lost ─────────┘         │
//!     └───────────────────────────────── an answer ◄───────────────────────────┘
//! ```

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;
use uniarm_cluster::Snapshot;
use uniarm_proto::{Generation, Member, MemberId};

/// First time for which a member whose connection broke is left alone; it doubles with each probe that fails.
const OPEN_FIRST: Duration = Duration::from_millis(250);

/// A member is back in use within this time of its recovery.
const OPEN_LONGEST: Duration = Duration::from_secs(5);

/// A probe without a verdict after this time has been forgotten: its client went away.
const PROBE_LONGEST: Duration = Duration::from_secs(10);

/// Members with broken connections, each in its life: a restarted one has a clean record.
#[derive(Debug, Default)]
pub(crate) struct Circuits {
    broken: HashMap<(MemberId, Generation), Broken>,
}

#[derive(Debug)]
struct Broken {
    losses: u32,
    /// Nobody tries before this.
    until: Instant,
    /// The one request that tries.
    probed_at: Option<Instant>,
}

// === impl Circuits ===

impl Circuits {
    /// Members that requests should not be sent to now.
    pub(crate) fn sick(&mut self, now: Instant, snapshot: &Snapshot) -> BTreeSet<MemberId> {
        self.broken.retain(|(id, generation), _| {
            snapshot.get(id).is_some_and(|member| member.generation == *generation)
        });
        let is_open = |broken: &Broken| {
            now < broken.until || broken.probed_at.is_some_and(|since| now < since + PROBE_LONGEST)
        };
        self.broken.iter().filter(|(_, broken)| is_open(broken)).map(|((id, _), _)| id.clone()).collect()
    }

    /// A request goes there: if the member was left alone until now, it is the probe.
    pub(crate) fn on_sent(&mut self, member: &Member, now: Instant) {
        if let Some(broken) = self.broken.get_mut(&key(member)) {
            broken.probed_at = Some(now);
        }
    }

    pub(crate) fn on_answer(&mut self, member: &Member) {
        self.broken.remove(&key(member));
    }

    /// Its connection broke. `die` spreads the routers' probes over half of the wait. All streams of a connection
    /// break at once: what comes while the member is left alone already says nothing new.
    pub(crate) fn on_loss(&mut self, member: &Member, now: Instant, die: u32) {
        let broken =
            self.broken.entry(key(member)).or_insert(Broken { losses: 0, until: now, probed_at: None });
        if now < broken.until {
            return;
        }
        let wait = OPEN_FIRST.saturating_mul(1 << broken.losses.min(16)).min(OPEN_LONGEST);
        broken.until = now + jittered(wait, die);
        broken.losses += 1;
        broken.probed_at = None;
    }
}

fn key(member: &Member) -> (MemberId, Generation) {
    (member.id.clone(), member.generation)
}

/// Between half of `wait` and all of it.
pub(crate) fn jittered(wait: Duration, die: u32) -> Duration {
    wait.mul_f64(0.5 + 0.5 * f64::from(die) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uniarm_proto::Role;

    use super::*;

    fn member(generation: u64) -> Member {
        Member {
            id: MemberId("b".into()),
            generation: Generation(generation),
            role: Role::Base,
            address: String::new(),
            tokenizer: None,
            vocabulary: 1,
            capacity: 1,
            base_model: None,
            reward_models: Vec::new(),
            group: String::new(),
            rank: 0,
            size: 1,
            adapter_faults: Vec::new(),
        }
    }

    #[test]
    fn a_member_that_broke_is_left_alone_then_probed_by_one_then_used_again() {
        let (snapshot, began) = (Snapshot::new([Arc::new(member(1))], 1), Instant::now());
        let at = |ms: u64| began + Duration::from_millis(ms);
        let mut circuits = Circuits::default();
        let is_sick = |circuits: &mut Circuits, ms| !circuits.sick(at(ms), &snapshot).is_empty();
        assert!(!is_sick(&mut circuits, 0));
        // A hundred streams break with one connection: one loss.
        (0..100).for_each(|_| circuits.on_loss(&member(1), at(0), u32::MAX));
        assert!(is_sick(&mut circuits, 249));
        assert!(!is_sick(&mut circuits, 250));
        circuits.on_sent(&member(1), at(250));
        assert!(is_sick(&mut circuits, 260), "one probe is enough");
        circuits.on_loss(&member(1), at(300), u32::MAX);
        assert!(is_sick(&mut circuits, 799), "twice as long after a probe that failed");
        assert!(!is_sick(&mut circuits, 800));
        circuits.on_sent(&member(1), at(800));
        assert!(!is_sick(&mut circuits, 800 + PROBE_LONGEST.as_millis() as u64), "a probe that never ended");
        circuits.on_answer(&member(1));
        assert!(!is_sick(&mut circuits, 801));
    }

    #[test]
    fn a_restarted_member_has_a_clean_record() {
        let mut circuits = Circuits::default();
        let now = Instant::now();
        circuits.on_loss(&member(1), now, 0);
        let restarted = Snapshot::new([Arc::new(member(2))], 2);
        assert!(circuits.sick(now, &restarted).is_empty());
    }
}
