//! A storm of faults, drawn from a seed, over a steady load of streams.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::{
    fleet::{BASES, Fault, Fleet, LATE, REWARDS, ROUTERS},
    harness::machine,
    load::{Answered, ask_all, ask_while, assert_undisturbed, mixed_requests},
};

/// A stream hears the last tokens of a worker that hangs a little after it began to.
const IN_FLIGHT: Duration = Duration::from_millis(500);

/// etcd is gone for so long.
const AWAY: Duration = Duration::from_secs(60);

/// A member that came meanwhile is seen within so long of its return: the goal is 2 s, on an idle machine.
const SEEN_WITHIN: Duration = Duration::from_secs(4);

/// A hang that everybody has to notice: keepalive takes 4 s.
const HANG: Duration = Duration::from_secs(6);

/// One fault, when it began.
struct Happened {
    at: Instant,
    role: &'static str,
    fault: Fault,
}

/// What the clients do meanwhile.
struct Load {
    different: usize,
    tokens: u32,
    together: usize,
    /// At least so many.
    streams: usize,
}

/// Which member, what is done to it, and how long after the fault before.
type Planned = (usize, Fault, Duration);

/// Every kind of fault once to every role, one after the other.
fn each_kind_once() -> Vec<Planned> {
    let (router, base, reward) = (0, ROUTERS, ROUTERS + BASES);
    let pause = Duration::from_secs(2);
    vec![
        (base, Fault::Kill, pause),
        (reward, Fault::Leave, pause),
        (router, Fault::Hang(HANG), pause),
        (base + 1, Fault::Hang(HANG), pause),
        (reward + 1, Fault::Kill, pause),
        (router + 1, Fault::Leave, pause),
        (base, Fault::Leave, pause),
        (reward + 2, Fault::Hang(HANG), pause),
        (router, Fault::Kill, pause),
    ]
}

/// So many, to whom and when as the seed says; several may overlap.
fn drawn(seed: u64, count: usize) -> Vec<Planned> {
    let mut state = seed;
    let mut draw = |below: u64| {
        // Knuth's MMIX generator: a failing seed replays anywhere.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    (0..count)
        .map(|_| {
            let member = draw((ROUTERS + BASES + REWARDS) as u64) as usize;
            let fault = match draw(3) {
                0 => Fault::Kill,
                1 => Fault::Hang(Duration::from_millis(500 + draw(7500))),
                _ => Fault::Leave,
            };
            (member, fault, Duration::from_millis(1000 + draw(4000)))
        })
        .collect()
}

/// A steady load while something is done to the fleet, of at least so many streams. Each is compared with its undisturbed run.
async fn weather(
    fleet: Fleet,
    load: Load,
    disturb: impl FnOnce(&Fleet, &Mutex<Vec<Happened>>) + Send + 'static,
) {
    let (fleet, cluster) = {
        let cluster = fleet.client().await;
        (Arc::new(fleet), cluster)
    };
    let mut requests = mixed_requests(load.different, load.tokens);
    let model = cluster.list_models().await.unwrap().base_models.remove(0).name;
    requests.iter_mut().for_each(|request| request.model.clone_from(&model));
    let undisturbed = ask_all(&cluster, &requests, load.together).await;
    let happened = Arc::new(Mutex::new(Vec::new()));
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

/// Several faults may overlap.
fn carry_out(plan: Vec<Planned>, fleet: &Fleet, happened: &Mutex<Vec<Happened>>) {
    thread::scope(|scope| {
        for (member, fault, pause) in plan {
            thread::sleep(pause);
            scope.spawn(move || {
                let role = fleet.role_of(member);
                fleet.hurt(member, fault, |at| happened.lock().unwrap().push(Happened { at, role, fault }));
            });
        }
    });
}

/// From a fault to the end of the silences that it fell into, by its kind.
fn report(happened: &[Happened], answered: &[Answered]) {
    let mut recoveries: BTreeMap<(&str, &str), Vec<Duration>> = BTreeMap::new();
    for Happened { role, fault, .. } in happened {
        recoveries.entry((role, fault.name())).or_default();
    }
    for silence in answered.iter().flat_map(|answered| &answered.silences) {
        let within =
            |happened: &&Happened| silence.from <= happened.at + IN_FLIGHT && happened.at < silence.until;
        // Of several, the first one began it.
        if let Some(Happened { at, role, fault }) = happened.iter().filter(within).min_by_key(|h| h.at) {
            recoveries.entry((role, fault.name())).or_default().push(silence.until - *at);
        }
    }
    println!("{:<8} {:<7} {:>8} {:>7} {:>7}", "role", "fault", "silences", "p50 s", "p99 s");
    for ((role, fault), mut times) in recoveries {
        times.sort();
        let quantile = |q: f64| match times.len() {
            0 => "-".to_owned(),
            count => format!("{:.2}", times[((count - 1) as f64 * q).round() as usize].as_secs_f64()),
        };
        println!("{role:<8} {fault:<7} {:>8} {:>7} {:>7}", times.len(), quantile(0.5), quantile(0.99));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_fault_leaves_every_stream_as_it_was() {
    let _machine = machine();
    let load = Load { different: 12, tokens: 24, together: 6, streams: 12 };
    weather(Fleet::start(), load, |fleet, happened| carry_out(each_kind_once(), fleet, happened)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes many minutes: make test-faults"]
async fn a_thousand_streams_survive_sixty_faults() {
    let _machine = machine();
    let seed = std::env::var("UNIARM_FAULT_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("UNIARM_FAULT_SEED={seed}");
    let load = Load { different: 48, tokens: 24, together: 12, streams: 1000 };
    weather(Fleet::start(), load, move |fleet, happened| carry_out(drawn(seed, 60), fleet, happened)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-faults"]
async fn a_rolling_update_of_every_pool_loses_no_stream() {
    let _machine = machine();
    let load = Load { different: 24, tokens: 48, together: 8, streams: 48 };
    let roll = |fleet: &Fleet, happened: &Mutex<Vec<Happened>>| {
        for member in 0..fleet.members.len() {
            let (role, fault) = (fleet.role_of(member), Fault::Leave);
            fleet.hurt(member, fault, |at| happened.lock().unwrap().push(Happened { at, role, fault }));
        }
    };
    weather(Fleet::start(), load, roll).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-faults"]
async fn running_and_new_requests_succeed_while_etcd_is_away() {
    let _machine = machine();
    let load = Load { different: 24, tokens: 24, together: 6, streams: 48 };
    let lose_etcd = |fleet: &Fleet, _: &Mutex<Vec<Happened>>| {
        fleet.etcd.lock().unwrap().kill();
        thread::scope(|scope| {
            let late = scope.spawn(|| fleet.start_late());
            thread::sleep(AWAY);
            fleet.etcd.lock().unwrap().restart();
            let returned = Instant::now();
            while !fleet.serves(LATE) {
                thread::sleep(Duration::from_millis(20));
            }
            let seen = returned.elapsed();
            println!("a member that came while etcd was away is seen {seen:?} after its return");
            assert!(seen < SEEN_WITHIN, "{seen:?}");
            late.join().unwrap();
        });
        assert!(fleet.members.iter().all(|member| member.lock().unwrap().is_alive()), "nobody restarts");
    };
    weather(Fleet::start(), load, lose_etcd).await;
}
