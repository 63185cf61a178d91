//! A storm of faults, drawn from a seed, over a steady load of streams.

use std::{thread, time::Duration};

use crate::{
    fleet::{BASES, Fault, Fleet, MEMBERS, ROUTERS},
    harness::machine,
    weather::{Diary, Happened, Load, weather},
};

/// A hang that everybody has to notice: keepalive takes 4 s.
const HANG: Duration = Duration::from_secs(6);

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
            let member = draw(MEMBERS as u64) as usize;
            let fault = match draw(3) {
                0 => Fault::Kill,
                1 => Fault::Hang(Duration::from_millis(500 + draw(7500))),
                _ => Fault::Leave,
            };
            (member, fault, Duration::from_millis(1000 + draw(4000)))
        })
        .collect()
}

/// Several faults may overlap.
fn carry_out(plan: Vec<Planned>, fleet: &Fleet, diary: &Diary) {
    thread::scope(|scope| {
        for (member, fault, pause) in plan {
            thread::sleep(pause);
            scope.spawn(move || {
                fleet.hurt(member, fault, |at| {
                    diary.lock().unwrap().push(Happened::fault(at, member, fault));
                });
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_fault_leaves_every_stream_as_it_was() {
    let _machine = machine();
    let load = Load { different: 12, tokens: 24, together: 6, streams: 12 };
    weather(Fleet::start(), load, |fleet, diary| carry_out(each_kind_once(), fleet, diary)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes many minutes: make test-faults"]
async fn a_thousand_streams_survive_sixty_faults() {
    let _machine = machine();
    let seed = std::env::var("UNIARM_FAULT_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("UNIARM_FAULT_SEED={seed}");
    let load = Load { different: 48, tokens: 24, together: 12, streams: 1000 };
    weather(Fleet::start(), load, move |fleet, diary| carry_out(drawn(seed, 60), fleet, diary)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-faults"]
async fn a_rolling_update_of_every_pool_loses_no_stream() {
    let _machine = machine();
    let load = Load { different: 24, tokens: 48, together: 8, streams: 48 };
    let roll = |fleet: &Fleet, diary: &Diary| {
        for member in 0..MEMBERS {
            let fault = Fault::Leave;
            fleet.hurt(member, fault, |at| diary.lock().unwrap().push(Happened::fault(at, member, fault)));
        }
    };
    weather(Fleet::start(), load, roll).await;
}
