//! A day through pools that the chart's numbers scale: they follow the load, meet the targets and come to rest; and
//! wrong numbers are noticed.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uniarm_decode::SchedulerOptions;
use uniarm_simulate::{
    Autoscale, Day, Drafting, Exchange, Pool, Setup, Targets, Values,
    arrivals::{Length, Pattern, Traffic},
    cost::{Cost, Measured, StepTimes, Swings},
    hardware::named_link,
    simulate_scaled,
};

const TARGETS: Targets = Targets {
    first_token: Duration::from_millis(1500),
    inter_token: Duration::from_millis(250),
    goodput: 0.99,
};

/// Seconds of the compressed day: loads change 24 times as fast as in a real one, and Kubernetes does not.
const DAY: f64 = 3600.0;

const POD_START: Duration = Duration::from_secs(90);

/// A machine whose steps take `base` and `slope` milliseconds more for each token.
fn machine(base: f64, slope: f64) -> Arc<Cost> {
    let layers = vec![(1, (base + slope) / 1e3), (1001, (base + 1001.0 * slope) / 1e3)];
    let times = StepTimes { layers, head: vec![(1, 0.0)], context: 0.0, attended: 0.0 };
    Arc::new(Cost::Measured(Box::new(Measured {
        what: "made up".into(),
        kv_tokens: 1 << 16,
        vocabulary: 1000,
        alone: times.clone(),
        crowded: times,
        choose_unguided: 0.0,
        choose_guided: 0.0,
        list: 0.0,
        draft: 0.0,
        swings: Swings::default(),
    })))
}

fn setup() -> Setup {
    let limits = SchedulerOptions { blocks: 1 << 10, running_max: 16, ..SchedulerOptions::default() };
    let link = named_link("lan-10g").unwrap();
    Setup {
        base: Pool { workers: 1, cost: machine(40.0, 1.0), scheduler: limits },
        reward: Pool { workers: 1, cost: machine(20.0, 1.0), scheduler: limits },
        colocated: false,
        base_requests_max: 1024,
        routers: 1,
        router_requests_max: 4096,
        front: link,
        exchange_link: link,
        exchange: Exchange { list_length: 32, certified: 0.99 },
        system_tokens: 0,
        drafting: Drafting::OFF,
        seed: 3,
    }
}

fn traffic(pattern: Pattern, rate: f64, seconds: f64) -> Traffic {
    Traffic {
        pattern,
        rate,
        requests: (rate * seconds) as usize,
        prompt: Length { mean: 60.0, spread: 0.7, max: 500 },
        answer: Length { mean: 60.0, spread: 0.7, max: 500 },
        shared_tokens: 0,
        guided_share: 1.0,
        preferences: 4,
    }
}

fn run(values: Values, traffic: &Traffic) -> Day {
    let plan = Autoscale { values, pod_start: POD_START };
    simulate_scaled(&setup(), &plan, &traffic.arrivals(1), &TARGETS)
}

fn day_traffic() -> Traffic {
    traffic(Pattern::Day { day_seconds: DAY, factor: 6.0 }, 10.0, DAY)
}

/// The day under the chart's own numbers.
fn chart_day() -> &'static Day {
    static CHART_DAY: OnceLock<Day> = OnceLock::new();
    CHART_DAY.get_or_init(|| run(Values::chart(), &day_traffic()))
}

#[test]
fn a_day_is_followed_by_both_pools_and_every_target_is_met() {
    let day = chart_day();
    assert_eq!(day.report.finished, day.report.requests, "nobody is refused or lost when pods leave");
    let reached = (day.report.first_token, day.report.inter_token, day.report.goodput);
    assert!(day.report.meets(&TARGETS), "{reached:?}");
    for pool in [&day.base, &day.reward] {
        assert!(pool.least == 2 && pool.most >= 5 && pool.most < 10, "{pool:?}");
        // Fewer pods than the most of them for the whole day.
        assert!(pool.pod_seconds < 0.85 * pool.most as f64 * day.report.seconds, "{pool:?}");
    }
    // The largest pools stand around noon.
    let most = day.samples.iter().filter(|sample| sample.base.replicas == day.base.most);
    let at: Vec<_> = most.map(|sample| sample.at / DAY).collect();
    assert!(at.iter().all(|at| (0.3..0.9).contains(at)), "{at:?}");
}

#[test]
fn a_day_has_one_noon_and_the_pools_turn_about_as_often() {
    for pool in [&chart_day().base, &chart_day().reward] {
        assert!(pool.turns <= 3, "{pool:?}");
        assert!(pool.changes <= 4 * (pool.most - pool.least), "{pool:?}");
    }
}

#[test]
fn a_pod_that_leaves_takes_no_stream_with_it() {
    let day = chart_day();
    assert!(day.reward.moved > 0, "no session was open when a reward worker left");
    // Answers end within the time to drain, here: without any, all of them go on elsewhere.
    let values = Values { drain_timeout_seconds: 0, ..Values::chart() };
    let hasty = run(values, &day_traffic());
    assert!(hasty.base.moved > 0, "no stream was under way when a base worker left");
    assert_eq!(hasty.report.finished, hasty.report.requests);
    assert_eq!(hasty.report.tokens, day.report.tokens);
}

#[test]
fn a_constant_load_brings_the_pools_to_rest() {
    let seconds = 2400.0;
    let day = run(Values::chart(), &traffic(Pattern::Poisson, 12.0, seconds));
    assert_eq!(day.report.finished, day.report.requests);
    let sizes = |from: f64, until: f64| -> Vec<_> {
        let within = day.samples.iter().filter(|sample| (from..until).contains(&(sample.at / seconds)));
        within.map(|sample| (sample.base.replicas, sample.reward.replicas)).collect()
    };
    // A third of the pods that it takes is there at first: queues make both pools grow beyond that, once.
    assert!(day.base.turns <= 3 && day.reward.turns <= 3, "{:?} {:?}", day.base, day.reward);
    let settled = sizes(0.6, 0.98);
    assert!(settled.iter().all(|size| *size == settled[0]), "{settled:?}");
    assert!(settled[0].0 > 2 && settled[0].1 > 2, "{settled:?}");
}

#[test]
fn without_stabilisation_the_same_day_flaps() {
    let mut values = Values::chart();
    values.autoscaling.scale_up.stabilization_seconds = 0;
    values.autoscaling.scale_down.stabilization_seconds = 0;
    let day = run(values, &day_traffic());
    for (nervous, calm) in [(&day.base, &chart_day().base), (&day.reward, &chart_day().reward)] {
        assert!(nervous.turns >= 8 && nervous.turns > 3 * calm.turns, "{nervous:?} {calm:?}");
    }
}

#[test]
fn with_targets_beyond_the_places_the_same_day_misses_its_latencies() {
    let mut values = Values::chart();
    values.autoscaling.base.sequences = Some(3.0);
    values.autoscaling.reward.sessions = Some(3.0);
    values.autoscaling.reward.stall = None;
    let day = run(values, &day_traffic());
    assert!(!day.report.meets(&TARGETS) && day.report.goodput < 0.9, "{}", day.report.goodput);
}

#[test]
fn a_slow_reward_pool_grows_by_its_stall_alone() {
    // Places for everybody, and steps that take the longer the more sessions a worker has.
    let mut setup = setup();
    setup.base = Pool { cost: machine(20.0, 0.5), ..setup.base };
    setup.reward = Pool { cost: machine(5.0, 3.0), ..setup.reward };
    setup.reward.scheduler.running_max = 256;
    let load = Traffic { prompt: Length::fixed(10), ..traffic(Pattern::Poisson, 8.5, 1200.0) };
    let arrivals = load.arrivals(1);
    let mut values = Values::chart();
    let most = |values: &Values| {
        let plan = Autoscale { values: values.clone(), pod_start: POD_START };
        simulate_scaled(&setup, &plan, &arrivals, &TARGETS)
    };
    let day = most(&values);
    values.autoscaling.reward.stall = None;
    let blind = most(&values);
    assert_eq!(blind.reward.most, 2, "{:?}", blind.reward);
    assert!(day.reward.most > 2, "{:?}", day.reward);
    let stall = |day: &Day| {
        let settled = &day.samples[day.samples.len() / 2..];
        settled.iter().map(|sample| sample.reward.stall).sum::<f64>() / settled.len() as f64
    };
    assert!(stall(&day) < 0.4 && stall(&blind) > 0.5, "{} {}", stall(&day), stall(&blind));
    assert!(day.report.inter_token.p90 < blind.report.inter_token.p90);
}

#[test]
fn a_wait_that_no_worker_could_shorten_starts_none() {
    // A small model on a slow machine: its steps take longer than the base's, of one row as of many.
    let mut setup = setup();
    setup.base = Pool { cost: machine(10.0, 0.0), ..setup.base };
    setup.reward = Pool { cost: machine(30.0, 0.05), ..setup.reward };
    let arrivals = traffic(Pattern::Poisson, 2.0, 900.0).arrivals(1);
    let plan = Autoscale { values: Values::chart(), pod_start: POD_START };
    let day = simulate_scaled(&setup, &plan, &arrivals, &TARGETS);
    assert_eq!(day.report.finished, day.report.requests);
    assert_eq!(day.reward.most, 2, "{:?}", day.reward);
    // Steps take three times as long as the base's: two thirds of the time are a wait.
    assert!(day.report.inter_token.p50 > 0.03, "{:?}", day.report.inter_token);
}

#[test]
fn the_same_morning_gives_the_same_samples_byte_for_byte() {
    let bytes = |day: &Day| serde_json::to_string(day).unwrap();
    let morning = || run(Values::chart(), &traffic(Pattern::Poisson, 8.0, 300.0));
    assert_eq!(bytes(&morning()), bytes(&morning()));
}
