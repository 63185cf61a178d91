//! Simulations against what can be worked out by hand, and the two promises of every run: the same arguments give the
//! same report, and a worker more is never a worse answer.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::sync::Arc;
use std::time::Duration;

use uniarm_decode::{
    SchedulerOptions,
    drafting::{DraftMode, Pace},
};
use uniarm_simulate::{
    Arrival, DraftPolicy, Drafting, Exchange, Pool, Report, Setup, Targets,
    arrivals::{Length, Pattern, Traffic},
    cost::{Cost, Measured, StepTimes, Swings},
    hardware::{Link, accelerator, named_link},
    simulate,
};

const MILLIS: f64 = 1e-3;

const EXCHANGE_LATENCY: Duration = Duration::from_micros(500);

const TARGETS: Targets = Targets {
    first_token: Duration::from_millis(200),
    inter_token: Duration::from_millis(40),
    goodput: 0.99,
};

/// A machine whose steps take `base` and `slope` milliseconds more for each token.
fn machine(base: f64, slope: f64) -> Arc<Cost> {
    let alone = StepTimes {
        layers: vec![(1, (base + slope) * MILLIS), (1001, (base + 1001.0 * slope) * MILLIS)],
        head: vec![(1, 0.0)],
        context: 0.0,
        attended: 0.0,
    };
    let crowded =
        StepTimes { layers: alone.layers.iter().map(|&(x, y)| (x, 2.0 * y)).collect(), ..alone.clone() };
    Arc::new(Cost::Measured(Box::new(Measured {
        what: "made up".into(),
        kv_tokens: 1 << 16,
        vocabulary: 1000,
        alone,
        crowded,
        choose_unguided: 0.0,
        choose_guided: 0.0,
        list: 0.0,
        draft: 0.0,
        swings: Swings::default(),
    })))
}

fn setup(base: Arc<Cost>, reward: Arc<Cost>) -> Setup {
    let limits = SchedulerOptions { blocks: 1 << 12, running_max: 16, ..SchedulerOptions::default() };
    let link = Link { latency: EXCHANGE_LATENCY, bytes_per_second: 1e15, ..named_link("process").unwrap() };
    Setup {
        base: Pool { workers: 1, cost: base, scheduler: limits },
        reward: Pool { workers: 1, cost: reward, scheduler: limits },
        colocated: false,
        base_requests_max: 1024,
        routers: 1,
        router_requests_max: 4096,
        front: Link { latency: Duration::ZERO, ..link },
        exchange_link: link,
        exchange: Exchange { list_length: 32, certified: 1.0 },
        system_tokens: 0,
        drafting: Drafting::OFF,
        seed: 3,
    }
}

fn arrival(at: f64, prompt_tokens: usize, answer_tokens: usize, guided: bool) -> Arrival {
    Arrival {
        at,
        prompt_tokens,
        answer_tokens,
        guided,
        preference: String::new(),
        priority: Default::default(),
        prefix: String::new(),
        prefix_tokens: 0,
        timeout: None,
    }
}

fn run(setup: &Setup, arrivals: &[Arrival]) -> Report {
    simulate(setup, arrivals, &TARGETS)
}

#[track_caller]
fn near(found: f64, expected: f64, tolerance: f64) {
    assert!((found / expected - 1.0).abs() <= tolerance, "{found} instead of {expected}");
}

#[test]
fn one_request_alone_takes_its_prefill_and_then_a_step_for_each_token() {
    let setup = setup(machine(10.0, 0.1), machine(1.0, 0.1));
    let report = run(&setup, &[arrival(1.0, 100, 11, false)]);
    near(report.first_token.max, 20.0 * MILLIS, 1e-9);
    near(report.inter_token.max, 10.1 * MILLIS, 1e-9);
    near(report.end_to_end.max, (20.0 + 10.0 * 10.1) * MILLIS, 1e-9);
    // A prompt of more than one chunk takes a step for each.
    let report = run(&setup, &[arrival(0.0, 600, 1, false)]);
    near(report.first_token.max, (3.0 * 10.0 + 60.0) * MILLIS, 1e-9);
}

#[test]
fn a_guided_step_takes_the_longer_of_the_two_and_not_their_sum() {
    for (base, reward) in [(10.0, 4.0), (4.0, 10.0), (9.0, 9.0)] {
        let setup = setup(machine(base, 0.0), machine(reward, 0.0));
        let report = run(&setup, &[arrival(0.0, 10, 21, true)]);
        let there_and_back = 2.0 * EXCHANGE_LATENCY.as_secs_f64();
        near(report.inter_token.max, (base * MILLIS).max(reward * MILLIS + there_and_back), 1e-3);
        near(report.base_passes_per_token, 1.0, 1e-9);
    }
}

#[test]
fn two_workers_on_one_machine_slow_each_other_while_both_step() {
    let apart = setup(machine(10.0, 0.0), machine(4.0, 0.0));
    let together = Setup { colocated: true, ..apart.clone() };
    let report = run(&together, &[arrival(0.0, 10, 21, true)]);
    // The reward's 4 ms take 8, during which the base does 4 of its 10.
    near(report.inter_token.p50, 14.0 * MILLIS, 1e-2);
    near(run(&apart, &[arrival(0.0, 10, 21, true)]).inter_token.p50, 10.0 * MILLIS, 1e-2);
    near(run(&together, &[arrival(0.0, 10, 21, false)]).inter_token.p50, 10.0 * MILLIS, 1e-2);
}

#[test]
fn a_saturated_worker_gives_its_batch_for_each_step() {
    let setup = setup(machine(10.0, 0.5), machine(1.0, 0.0));
    let arrivals: Vec<_> = (0..64).map(|_| arrival(0.0, 1, 400, false)).collect();
    let report = run(&setup, &arrivals);
    assert_eq!(report.finished, 64);
    near(report.tokens_per_second, 16.0 / (18.0 * MILLIS), 0.01);
    near(report.base.rows_per_step, 16.0, 0.01);
    assert!(report.base.busy > 0.999);
}

#[test]
fn a_single_place_waits_as_in_the_queue_with_constant_service() {
    let base = machine(10.0, 0.0);
    for load in [0.3, 0.6, 0.8] {
        let mut setup = setup(Arc::clone(&base), machine(1.0, 0.0));
        setup.base.scheduler.running_max = 1;
        setup.base.scheduler.waiting_max = 1 << 20;
        setup.base_requests_max = 1 << 20;
        setup.router_requests_max = 1 << 20;
        let traffic = Traffic {
            pattern: Pattern::Poisson,
            rate: load / (10.0 * MILLIS),
            requests: 60_000,
            prompt: Length::fixed(8),
            answer: Length::fixed(1),
            shared_tokens: 0,
            guided_share: 0.0,
            preferences: 1,
        };
        let report = run(&setup, &traffic.arrivals(11));
        // M/D/1: mean wait = ρ · service / (2 (1 − ρ)).
        let wait = load * 10.0 * MILLIS / (2.0 * (1.0 - load));
        near(report.first_token.mean, 10.0 * MILLIS + wait, 0.03);
        near(report.base.busy, load, 0.02);
    }
}

#[test]
fn drafts_save_the_base_passes_that_their_acceptance_promises() {
    for (gather, acceptance) in [(5, 0.8), (8, 0.9), (2, 0.5)] {
        let mut setup = setup(machine(20.0, 0.0), machine(0.1, 0.0));
        setup.exchange_link.latency = Duration::ZERO;
        // The window holds no more than one pass verifies, so that every pass verifies exactly that.
        let pace = Pace { mode: DraftMode::Single, window: gather - 1, gather };
        setup.drafting = Drafting { policy: DraftPolicy::Fixed(pace), single: acceptance, dual: None };
        let report = run(&setup, &[arrival(0.0, 10, 20_000, true)]);
        let tokens_per_pass: f64 = (0..gather).map(|position| acceptance.powi(position as i32)).sum();
        near(report.tokens as f64 / report.base.steps as f64, tokens_per_pass, 0.02);
        let lone =
            run(&Setup { drafting: Drafting::OFF, ..setup.clone() }, &[arrival(0.0, 10, 20_000, true)]);
        near(lone.base.steps as f64, 20_000.0, 1e-3);
        assert_eq!(report.tokens, lone.tokens);
    }
}

#[test]
fn the_measured_policy_drafts_where_that_is_faster_and_not_where_it_is_not() {
    let arrivals: Vec<_> = (0..4).map(|_| arrival(0.0, 10, 300, true)).collect();
    let rate = |base: &Arc<Cost>, reward: &Arc<Cost>, drafting: Drafting| {
        let setup = Setup { drafting, ..setup(Arc::clone(base), Arc::clone(reward)) };
        run(&setup, &arrivals).tokens_per_second
    };
    let measured = Drafting { policy: DraftPolicy::Measured, single: 0.8, dual: None };
    let (large, small) = (machine(20.0, 0.1), machine(2.0, 0.05));
    let gain = rate(&large, &small, measured) / rate(&large, &small, Drafting::OFF);
    assert!(gain > 1.5, "{gain}");
    // Of one size and bound by arithmetic: a wrong draft costs more than it saves.
    let same = machine(0.5, 5.0);
    let gain = rate(&same, &same, measured) / rate(&same, &same, Drafting::OFF);
    assert!(gain > 0.97, "{gain}");
    // The plain backbone is the base model, on a faster machine: every draft is right.
    let twin = Drafting { dual: Some(1.0), ..measured };
    let (slow, fast) = (machine(20.0, 0.05), machine(10.0, 0.05));
    let report = run(&Setup { drafting: twin, ..setup(slow, fast) }, &arrivals);
    assert_eq!(report.accepted, report.drafted);
    assert!(report.base.steps < 300 / 3, "{} steps for 300 tokens", report.base.steps);
}

fn busy_traffic() -> Traffic {
    Traffic {
        pattern: Pattern::Bursts { period_seconds: 5.0, factor: 4.0 },
        rate: 40.0,
        requests: 400,
        prompt: Length { mean: 80.0, spread: 0.8, max: 1000 },
        answer: Length { mean: 40.0, spread: 0.6, max: 400 },
        shared_tokens: 32,
        guided_share: 0.8,
        preferences: 3,
    }
}

#[test]
fn the_same_arguments_give_the_same_report_byte_for_byte() {
    let arrivals = busy_traffic().arrivals(5);
    let mut setup = setup(machine(5.0, 0.3), machine(3.0, 0.2));
    setup.base.workers = 3;
    setup.reward.workers = 2;
    setup.exchange.certified = 0.97;
    setup.drafting = Drafting { policy: DraftPolicy::Measured, single: 0.8, dual: Some(0.9) };
    let bytes = |setup: &Setup| serde_json::to_string(&run(setup, &arrivals)).unwrap();
    assert_eq!(bytes(&setup), bytes(&setup));
    assert_ne!(bytes(&setup), bytes(&Setup { seed: 4, ..setup.clone() }));
}

/// Goodput that a worker more may cost by luck: with another pool size the router's dice fall on other workers.
const LUCK: f64 = 0.01;

#[test]
fn more_workers_never_lower_the_goodput() {
    let arrivals = busy_traffic().arrivals(5);
    let goodput = |base: usize, reward: usize| {
        let mut setup = setup(machine(5.0, 0.3), machine(3.0, 0.2));
        setup.base.workers = base;
        setup.reward.workers = reward;
        let report = run(&setup, &arrivals);
        assert_eq!(report.finished + report.refused, report.requests);
        report.goodput
    };
    let table: Vec<Vec<f64>> =
        [1, 2, 3, 4, 6, 8].map(|base| [1, 2, 4, 8].map(|reward| goodput(base, reward)).into()).into();
    assert!(table[0][0] < 0.5 && table[5][3] > 0.99, "the table spans too little: {table:?}");
    for base in 0..table.len() {
        for reward in 0..table[0].len() {
            let least = |other: f64| assert!(table[base][reward] >= other - LUCK, "{table:?}");
            if base > 0 {
                least(table[base - 1][reward]);
            }
            if reward > 0 {
                least(table[base][reward - 1]);
            }
        }
    }
}

#[test]
fn a_request_that_finds_no_room_is_tried_elsewhere_and_then_refused() {
    let mut setup = setup(machine(10.0, 0.0), machine(1.0, 0.0));
    setup.base.workers = 2;
    setup.base_requests_max = 3;
    let arrivals: Vec<_> = (0..10).map(|_| arrival(0.0, 4, 50, false)).collect();
    let report = run(&setup, &arrivals);
    assert_eq!((report.finished, report.refused), (6, 4));
    setup.router_requests_max = 5;
    assert_eq!(run(&setup, &arrivals).finished, 5);
    // A deadline ends what is under way.
    let late: Vec<_> = arrivals.iter().map(|a| Arrival { timeout: Some(0.2), ..a.clone() }).collect();
    assert_eq!(run(&setup, &late).expired, 5);
}

#[test]
fn sessions_that_a_reward_worker_refuses_go_to_the_next() {
    let mut setup = setup(machine(10.0, 0.0), machine(1.0, 0.0));
    setup.reward.workers = 2;
    setup.reward.scheduler.running_max = 2;
    setup.reward.scheduler.waiting_max = 0;
    let arrivals: Vec<_> = (0..12).map(|i| arrival(0.01 * f64::from(i), 4, 20, true)).collect();
    let report = run(&setup, &arrivals);
    assert_eq!(report.finished, 12);
    assert!(report.end_to_end.max > 0.5, "four at a time: {:?}", report.end_to_end);
}

#[test]
fn accelerators_are_known_by_name() {
    assert!(
        accelerator("h100").unwrap().bytes_per_second > accelerator("a100-40g").unwrap().bytes_per_second
    );
    assert!(accelerator("abacus").is_none());
}
