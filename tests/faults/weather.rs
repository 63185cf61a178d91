//! A steady load of streams while something is done to a fleet, each compared with its undisturbed run; and a table of
//! what it cost them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::{
    fleet::{Fault, Fleet, role_of},
    load::{Answered, ask_all, ask_while, assert_undisturbed, mixed_requests},
};

/// A stream hears the last tokens of a worker that hangs a little after it began to.
const IN_FLIGHT: Duration = Duration::from_millis(500);

/// One fault.
#[derive(Debug, Clone)]
pub struct Happened {
    pub at: Instant,
    /// Of the line in the table.
    pub what: String,
    /// Of a fault that harms all the while: zero, where its beginning alone does.
    pub lasts: Duration,
    /// The shortest pause that it can cost a stream.
    pub floor: Duration,
}

pub type Diary = Mutex<Vec<Happened>>;

/// What the clients do meanwhile.
pub struct Load {
    pub different: usize,
    pub tokens: u32,
    pub together: usize,
    /// At least so many.
    pub streams: usize,
}

// === impl Happened ===

impl Happened {
    pub fn fault(at: Instant, member: usize, fault: Fault) -> Self {
        let what = format!("{} {}", role_of(member), fault.name());
        Self { at, what, lasts: Duration::ZERO, floor: fault.floor() }
    }

    fn has_met(&self, from: Instant, until: Instant) -> bool {
        if self.lasts.is_zero() {
            from <= self.at + IN_FLIGHT && self.at < until
        } else {
            self.at <= from && from < self.at + self.lasts
        }
    }
}

/// A steady load while something is done to the fleet, of at least so many streams. Each is compared with its undisturbed run.
pub async fn weather(fleet: Fleet, load: Load, disturb: impl FnOnce(&Fleet, &Diary) + Send + 'static) {
    let (fleet, cluster) = {
        let cluster = fleet.client().await;
        (Arc::new(fleet), cluster)
    };
    let mut requests = mixed_requests(load.different, load.tokens);
    let model = cluster.list_models().await.unwrap().base_models.remove(0).name;
    requests.iter_mut().for_each(|request| request.model.clone_from(&model));
    let undisturbed = ask_all(&cluster, &requests, load.together).await;
    let happened = Arc::new(Diary::default());
    let faults = thread::spawn({
        let (fleet, happened) = (Arc::clone(&fleet), Arc::clone(&happened));
        move || disturb(&fleet, &happened)
    });
    let faults = Arc::new(faults);
    let (began, streams) = (Instant::now(), load.streams);
    let go_on = {
        let faults = Arc::clone(&faults);
        move |started| started < streams || !faults.is_finished()
    };
    let answered = ask_while(&cluster, &requests, load.together, go_on).await;
    assert!(faults.is_finished());
    Arc::into_inner(faults).unwrap().join().unwrap();
    let happened = happened.lock().unwrap();
    let seconds = began.elapsed().as_secs_f64();
    println!("{} streams under {} faults in {seconds:.0} s", answered.len(), happened.len());
    report(&happened, &answered);
    assert_undisturbed(&answered, &undisturbed, &requests);
}

/// From a fault to the end of the silences that it fell into, by its kind; of one that lasts, the silences themselves.
fn report(happened: &[Happened], answered: &[Answered]) {
    let mut recoveries: BTreeMap<&str, (Duration, Vec<Duration>)> = BTreeMap::new();
    for Happened { what, floor, .. } in happened {
        let (least, _) = recoveries.entry(what).or_insert((*floor, Vec::new()));
        *least = (*least).min(*floor);
    }
    for silence in answered.iter().flat_map(|answered| &answered.silences) {
        let met = |happened: &&Happened| happened.has_met(silence.from, silence.until);
        // Of several, the first one began it.
        if let Some(Happened { at, what, .. }) = happened.iter().filter(met).min_by_key(|h| h.at) {
            let (_, times) = recoveries.get_mut(what.as_str()).unwrap();
            times.push(silence.until - (*at).max(silence.from));
        }
    }
    println!("{:<40} {:>8} {:>8} {:>7} {:>7}", "fault", "silences", "floor s", "p50 s", "p99 s");
    for (what, (floor, mut times)) in recoveries {
        times.sort();
        let (p50, p99) = (seconds(quantile(&times, 0.5)), seconds(quantile(&times, 0.99)));
        println!("{what:<40} {:>8} {:>8.2} {p50:>7} {p99:>7}", times.len(), floor.as_secs_f64());
    }
}

/// Of sorted values; none of none.
pub fn quantile(sorted: &[Duration], q: f64) -> Option<Duration> {
    sorted.get((sorted.len().saturating_sub(1) as f64 * q).round() as usize).copied()
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or("-".to_owned(), |time| format!("{:.2}", time.as_secs_f64()))
}
