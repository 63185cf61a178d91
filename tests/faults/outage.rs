//! etcd loses a node, its majority, all of its nodes, or its room: streams go on, nobody ends, and newcomers come in
//! when it is back.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::{
    fleet::Fleet,
    harness::machine,
    trio::NODES,
    weather::{Diary, Happened, Load, weather},
};

/// etcd is away for so long.
const AWAY: Duration = Duration::from_secs(60);

/// The same where minutes are too much: several leases, and several of the waits between tries.
const AWAY_SHORTLY: Duration = Duration::from_secs(8);

/// A member that came meanwhile is seen within so long of its return: the goal is 2 s, on an idle machine.
const SEEN_WITHIN: Duration = Duration::from_secs(4);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outage {
    /// One node is killed: the others go on.
    Node,
    /// One is left, and may agree on nothing.
    Majority,
    All,
    /// Its database is as large as it may be: it takes no write.
    Full,
}

// === impl Outage ===

impl Outage {
    fn begin(self, fleet: &Fleet) {
        let mut etcd = fleet.etcd.lock().unwrap();
        match self {
            Self::Full => etcd.fill(),
            _ => self.lost().for_each(|node| etcd.kill_node(node)),
        }
    }

    /// Until it answers again.
    fn end(self, fleet: &Fleet) {
        let mut etcd = fleet.etcd.lock().unwrap();
        match self {
            Self::Full => etcd.make_room(),
            _ => self.lost().for_each(|node| etcd.start_node(node)),
        }
        etcd.wait_until_it_answers();
    }

    fn lost(self) -> std::ops::Range<usize> {
        match self {
            Self::Node => 0..1,
            Self::Majority => 0..NODES - 1,
            Self::All => 0..NODES,
            Self::Full => 0..0,
        }
    }

    /// For so long, while a member joins.
    fn undergo(self, fleet: &Fleet, diary: &Diary, away: Duration) {
        let what = format!("etcd: {self:?} for {} s", away.as_secs()).to_lowercase();
        println!("{what}");
        let name = format!("late-{self:?}").to_lowercase();
        diary.lock().unwrap().push(Happened { at: Instant::now(), what, lasts: away, floor: Duration::ZERO });
        self.begin(fleet);
        thread::scope(|scope| {
            let late = scope.spawn(|| fleet.start_late(&name));
            thread::sleep(away);
            // A store that had no gap may have recorded it long ago.
            assert!(self == Self::Node || !fleet.serves(&name), "etcd was not away");
            self.end(fleet);
            let returned = Instant::now();
            while !fleet.serves(&name) {
                thread::sleep(Duration::from_millis(20));
            }
            let seen = returned.elapsed();
            println!("a member that came meanwhile is seen {:.2} s after its return", seen.as_secs_f64());
            assert!(seen < SEEN_WITHIN, "{seen:?}");
            late.join().unwrap();
        });
        assert!(fleet.is_whole(), "nobody restarts");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_go_on_while_etcd_has_lost_its_majority_or_its_room() {
    let _machine = machine();
    let load = Load { different: 12, tokens: 24, together: 4, streams: 12 };
    weather(Fleet::start(), load, |fleet, diary| {
        for outage in [Outage::Majority, Outage::Full] {
            outage.undergo(fleet, diary, AWAY_SHORTLY);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-faults"]
async fn running_and_new_requests_succeed_while_etcd_is_away() {
    let _machine = machine();
    let load = Load { different: 24, tokens: 24, together: 6, streams: 48 };
    weather(Fleet::start(), load, |fleet, diary| {
        for outage in [Outage::Node, Outage::Majority, Outage::All, Outage::Full] {
            outage.undergo(fleet, diary, AWAY);
        }
    })
    .await;
}
