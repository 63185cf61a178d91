//! Schedules by the thousand. `UNIARM_SEED=n` runs one, `UNIARM_SCHEDULES=n` runs so many.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{
    ops::Range,
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tonic::Status;
use tonic_types::StatusExt as _;
use uniarm_proto::refusal::{DEADLINE_UNMEETABLE, cause_of};
use uniarm_simulation::{Pool, Schedule};

/// Schedules of a usual run.
const SCHEDULES: u64 = 2000;

/// Schedules that are run twice; `UNIARM_TWICE=n`: so many.
const TWICE: u64 = 30;

/// How a schedule that failed is run again.
const AGAIN: &str = "cargo test --release --workspace --test schedules every_schedule -- --nocapture";

fn seeds() -> Range<u64> {
    let number = |variable: &str| std::env::var(variable).ok().map(|value| value.parse::<u64>().unwrap());
    match (number("UNIARM_SEED"), number("UNIARM_SCHEDULES")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(schedules)) => 0..schedules,
        (None, None) => 0..SCHEDULES,
    }
}

#[test]
fn every_schedule_of_faults_leaves_every_stream_what_it_was() {
    let (pool, seeds) = (Pool::new(), seeds());
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} schedules, {eta} left").unwrap();
    let progress = ProgressBar::new(seeds.end - seeds.start).with_style(style);
    let (next, (outcomes, ended)) = (AtomicU64::new(seeds.start), mpsc::channel());
    let mut failed = 0;
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            let (next, pool, outcomes) = (&next, &pool, outcomes.clone());
            scope.spawn(move || run_until(seeds.end, next, pool, &outcomes));
        }
        drop(outcomes);
        for (schedule, failures) in ended {
            progress.inc(1);
            if !failures.is_empty() {
                failed += 1;
                let seed = schedule.seed;
                println!("{schedule}  {}\n  again: UNIARM_SEED={seed} {AGAIN}", failures.join("\n  "));
            }
        }
    });
    assert_eq!(failed, 0, "schedules failed; how to run each of them again is printed above");
}

/// Runs the next schedule, again and again.
fn run_until(end: u64, next: &AtomicU64, pool: &Pool, outcomes: &mpsc::Sender<(Schedule, Vec<String>)>) {
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            return;
        }
        let schedule = Schedule::drawn(seed);
        let failures = pool.run(&schedule).failures;
        outcomes.send((schedule, failures)).unwrap();
    }
}

#[test]
fn a_seed_gives_one_order_of_events() {
    let pool = Pool::new();
    let number = std::env::var("UNIARM_TWICE").ok().map(|value| value.parse().unwrap());
    for seed in 0..number.unwrap_or(TWICE) {
        let schedule = Schedule::drawn(seed);
        let (first, second) = (pool.run(&schedule).trace, pool.run(&schedule).trace);
        assert_eq!(first, second, "{schedule}");
    }
}

/// Ten times what one base worker can do: whoever is refused hears so at once and why, whoever is taken is answered.
#[test]
fn an_overloaded_cluster_refuses_at_once_and_answers_whom_it_took() {
    let deadline = Duration::from_millis(600);
    let overload = Pool::new().overload(2000, Duration::from_millis(800), deadline);
    println!("{} answered, {} late, {} refused", overload.completed, overload.late, overload.refused.len());
    assert_eq!(overload.failures, [""; 0]);
    assert_eq!(overload.completed + overload.late + overload.refused.len(), 2000);
    assert!(overload.completed >= 100 && overload.late <= overload.completed / 4, "{overload:?}");
    for (took, status) in &overload.refused {
        assert!(*took < Duration::from_millis(50), "{status:?} after {took:?}");
        match cause_of(status).as_deref() {
            Some(DEADLINE_UNMEETABLE) => {}
            Some("base_queue_full") => assert!(retry_delay(status) > Duration::ZERO, "{status:?}"),
            _ => panic!("{status:?}"),
        }
    }
}

/// Whatever it has just been through: nobody waits there, so nobody is refused for a deadline.
#[test]
fn an_idle_cluster_takes_every_deadline_and_ends_what_passes_it() {
    for (overloaded, deadline_ms) in [(0, 15), (0, 40), (600, 15), (600, 40)] {
        let deadline = Duration::from_millis(deadline_ms);
        let (took, status) = Pool::new().short_deadline_after(overloaded, deadline);
        assert_eq!(cause_of(&status).as_deref(), Some("deadline_exceeded"), "{status:?} after {took:?}");
        assert!(took >= deadline && took < deadline * 2, "{status:?} after {took:?}");
    }
}

/// Of 64 places a quarter is kept for those who are in a hurry.
#[test]
fn a_flood_of_patient_requests_leaves_places_for_an_urgent_one() {
    let (taken, is_urgent_answered) = Pool::new().flood();
    assert!((48..64).contains(&taken), "{taken} patient requests of 64 were taken");
    assert!(is_urgent_answered);
}

#[test]
fn a_request_that_a_full_queue_refuses_hears_so_at_once_and_when_to_come_again() {
    let refused = Pool::new().too_many_answers();
    assert!((1..6).contains(&refused.len()), "{refused:?}");
    for (took, status) in refused {
        assert_eq!(cause_of(&status).as_deref(), Some("base_queue_full"), "{status:?} after {took:?}");
        assert!(retry_delay(&status) > Duration::ZERO, "{status:?}");
        // A step of many rows may be under way.
        assert!(took < Duration::from_millis(200), "{took:?}");
    }
}

/// Sessions that wait for their base worker's next token stand before nobody. When they did, each token of the crowd took
/// as long as a sequence that waits outside is let wait: a second.
#[test]
fn sessions_beyond_a_reward_workers_places_go_round() {
    let (took, preempted) = Pool::new().few_places(256);
    println!("{took:?}");
    assert!(took < Duration::from_secs(6), "{took:?}");
    assert_eq!(preempted, 0);
}

/// Answers of three sessions each, and a reward worker that has four: none holds what another waits for.
#[test]
fn answers_that_get_some_of_their_sessions_give_them_back() {
    let (took, _) = Pool::new().few_places(2);
    println!("{took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
}

/// Everybody rises by a class for each `PROMOTION_STEPS` steps, in both pools at the same time; the longest step takes
/// 8.4 ms, and a place is free when an answer ends.
#[test]
fn nobody_starves_behind_a_stream_of_urgent_requests() {
    let waits = Pool::new().behind_urgent_requests(Duration::from_secs(9));
    println!("first tokens after {waits:?}");
    assert_eq!(waits.len(), 8);
    assert!(waits.iter().all(|wait| *wait < Duration::from_secs(6)), "{waits:?}");
    assert!(waits.iter().all(|wait| *wait > Duration::from_millis(500)), "they did not wait: {waits:?}");
}

/// A message to the router, one to the base worker and one to the reward worker take 3 ms each at most, the longest
/// step of so few takes 5 ms, and an engine that waits for others looks around every 5 ms.
#[test]
fn what_nobody_listens_to_any_more_ends_within_a_step_on_both_pools() {
    let hung_up = Pool::new().hang_up();
    println!("{hung_up:?}");
    assert!(hung_up.sequences > 2 && hung_up.sessions > 2, "{hung_up:?}");
    assert!(hung_up.base <= Duration::from_millis(3 + 3 + 5 + 5), "{hung_up:?}");
    assert!(hung_up.reward <= hung_up.base + Duration::from_millis(3 + 5 + 1), "{hung_up:?}");
}

#[test]
fn a_silent_reward_worker_costs_a_hedged_answer_little_more_than_the_silence_that_is_allowed() {
    let pool = Pool::new();
    let waited = pool.silence(None);
    let hedged = pool.silence(Some(Duration::from_millis(60)));
    println!("{waited:?}, {hedged:?}");
    assert_eq!((waited.hedges, hedged.hedges, hedged.won), (0, 1, 1));
    assert!(waited.took > Duration::from_secs(2));
    assert!(hedged.took < Duration::from_millis(600), "{hedged:?}");
    // It speaks again before the other one has read the prompt, or while it is asked.
    let brief = pool.silence(Some(Duration::from_millis(1995)));
    println!("{brief:?}");
    assert!(brief.took > Duration::from_secs(2) && brief.hedges == 1, "{brief:?}");
}

fn retry_delay(status: &Status) -> Duration {
    status.get_error_details().retry_info().and_then(|info| info.retry_delay).unwrap_or_default()
}
