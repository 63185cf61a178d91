//! The closed loop: what the pools' metrics would say reaches an autoscaler, and its decisions become pods that start
//! and leave.

use std::collections::VecDeque;
use std::time::Duration;

use crate::autoscale::fleet::{Fleet, Moves};
use crate::autoscale::hpa::Signal;
use crate::autoscale::{Autoscale, Autoscaling, Day, PoolSample, SYNC, Sample};
use crate::base::{Base, Message};
use crate::report::{Report, Targets};
use crate::reward::Reward;
use crate::setup::Setup;
use crate::simulation::Simulation;
use crate::stepper::Stepper;
use crate::trace::Arrival;
use crate::world::{Event, Worker};

/// Seconds that a share is taken of at least, as in the chart's expression: an idle pool has no stall.
const SHARED_LEAST: f64 = 0.001;

/// Runs a trace through pools that an autoscaler sizes: they begin with the fewest workers. The sizes in `setup` do not
/// count. The result is a function of the arguments.
pub fn simulate_scaled(setup: &Setup, plan: &Autoscale, arrivals: &[Arrival], targets: &Targets) -> Day {
    let Autoscaling { base, reward, .. } = &plan.values.autoscaling;
    let mut setup = setup.clone();
    (setup.base.workers, setup.reward.workers) = (base.min_replicas as usize, reward.min_replicas as usize);
    // Which worker of one pool would share a machine with which of the other changes with every pod.
    setup.colocated = false;
    let mut scaled = Scaled {
        simulation: Simulation::new(&setup, arrivals),
        plan,
        bases: Fleet::new(&plan.values, base.min_replicas, base.max_replicas),
        rewards: Fleet::new(&plan.values, reward.min_replicas, reward.max_replicas),
        scrapes: VecDeque::new(),
        samples: Vec::new(),
        arrived: 0,
    };
    scaled.show_members();
    scaled.simulation.world.queue.push(SYNC, Event::Look);
    while let Some((now, event)) = scaled.simulation.world.queue.pop() {
        scaled.handle(now, event);
    }
    scaled.day(targets)
}

struct Scaled<'a> {
    simulation: Simulation<'a>,
    plan: &'a Autoscale,
    bases: Fleet,
    rewards: Fleet,
    /// The oldest that a rate wants first.
    scrapes: VecDeque<Scrape>,
    samples: Vec<Sample>,
    /// Requests that had arrived by the last look.
    arrived: usize,
}

/// What Prometheus knows of both pools at one moment, summed over their pods.
#[derive(Clone, Copy, Default)]
struct Scrape {
    sequences: f64,
    base_blocks: f64,
    sessions: f64,
    reward_blocks: f64,
    /// Seconds so far, of all tokens.
    stalled: f64,
    streamed: f64,
    /// Forwards of the reward workers so far, and what each would take with one row.
    forward: f64,
    steps: f64,
    least_forward: f64,
}

// === impl Scaled ===

impl Scaled<'_> {
    fn handle(&mut self, now: Duration, event: Event) {
        match event {
            Event::Look => self.look(now),
            Event::Started(Worker::Base(number)) => {
                self.bases.arrived(number);
                self.show_members();
            }
            Event::Started(Worker::Reward(number)) => {
                self.rewards.arrived(number);
                self.show_members();
            }
            event => self.simulation.handle(now, event),
        }
    }

    /// A look of both autoscalers. What they see was scraped a period ago: it is not younger in a real cluster.
    fn look(&mut self, now: Duration) {
        self.bury();
        self.bases.book(now);
        self.rewards.book(now);
        let Autoscaling { base, reward, prometheus, .. } = &self.plan.values.autoscaling;
        let kept = (f64::from(prometheus.rate_seconds) / SYNC.as_secs_f64()).ceil() as usize;
        let seen = self.scrapes.back().copied().unwrap_or_default();
        let before = self.scrapes.front().copied().unwrap_or_default();
        let stall = stall(&before, &seen);
        let per_pod = |sum: f64, target: Option<f64>| target.map(|target| Signal::PerPod { sum, target });
        let signals = [per_pod(seen.sequences, base.sequences), per_pod(seen.base_blocks, base.blocks)];
        let signals: Vec<_> = signals.into_iter().flatten().collect();
        let moves = self.bases.look(now, &signals);
        self.move_bases(now, moves);
        let signals = [
            per_pod(seen.sessions, reward.sessions),
            per_pod(seen.reward_blocks, reward.blocks),
            reward.stall.map(|target| Signal::Whole { value: stall, target }),
        ];
        let signals: Vec<_> = signals.into_iter().flatten().collect();
        let moves = self.rewards.look(now, &signals);
        self.move_rewards(now, moves);

        self.sample(now, &seen, stall);
        let scrape = self.scrape();
        self.scrapes.push_back(scrape);
        if self.scrapes.len() > kept + 1 {
            self.scrapes.pop_front();
        }
        if self.simulation.world.requests.iter().any(|request| request.outcome.is_none()) {
            self.simulation.world.queue.push(now + SYNC, Event::Look);
        }
    }

    fn scrape(&self) -> Scrape {
        let Simulation { world, bases, rewards, .. } = &self.simulation;
        let mut scrape =
            Scrape { stalled: world.tally.stalled, streamed: world.tally.streamed, ..Scrape::default() };
        for number in self.bases.running() {
            let stats = bases[number].stepper.scheduler.stats();
            scrape.sequences += (stats.running + stats.waiting) as f64 / stats.running_max as f64;
            scrape.base_blocks += used_blocks(&bases[number].stepper);
        }
        for number in self.rewards.running() {
            let places = rewards[number].stepper.scheduler.stats().running_max;
            scrape.sessions += rewards[number].sessions() as f64 / places as f64;
            scrape.reward_blocks += used_blocks(&rewards[number].stepper);
            scrape.least_forward += rewards[number].stepper.meter.cost().seconds(1.0);
        }
        scrape.least_forward /= self.rewards.running().count() as f64;
        for Reward { stepper, .. } in rewards {
            scrape.forward += stepper.used.forward.as_secs_f64();
            scrape.steps += stepper.used.steps as f64;
        }
        scrape
    }

    fn sample(&mut self, now: Duration, seen: &Scrape, stall: f64) {
        let world = &mut self.simulation.world;
        let arrived = world.arrivals.partition_point(|arrival| arrival.at <= now.as_secs_f64());
        let [first, gap] = std::mem::take(&mut world.tally.recent).map(|recent| recent.quantiles().p99);
        let pool = |fleet: &Fleet, [places, blocks, stall]: [f64; 3]| PoolSample {
            replicas: fleet.replicas(),
            ready: fleet.ready().count(),
            places,
            blocks,
            stall,
        };
        self.samples.push(Sample {
            at: now.as_secs_f64(),
            requests_per_second: (arrived - self.arrived) as f64 / SYNC.as_secs_f64(),
            first_token_p99: first,
            inter_token_p99: gap,
            base: pool(&self.bases, [seen.sequences, seen.base_blocks, 0.0]),
            reward: pool(&self.rewards, [seen.sessions, seen.reward_blocks, stall]),
        });
        self.arrived = arrived;
    }

    fn move_bases(&mut self, now: Duration, moves: Moves) {
        let Simulation { world, bases, .. } = &mut self.simulation;
        for number in moves.started {
            bases.push(Base::new(number, world.setup));
            world.queue.push(now + self.plan.pod_start, Event::Started(Worker::Base(number)));
        }
        for &number in &moves.leaving {
            bases[number].leave();
            world.queue.push(now + self.plan.values.drain(), Event::Drained { base: number });
        }
        if !moves.leaving.is_empty() {
            self.show_members();
        }
    }

    fn move_rewards(&mut self, now: Duration, moves: Moves) {
        let Simulation { world, rewards, .. } = &mut self.simulation;
        for number in moves.started {
            rewards.push(Reward::new(number, &world.setup.reward));
            world.queue.push(now + self.plan.pod_start, Event::Started(Worker::Reward(number)));
        }
        if moves.leaving.is_empty() {
            return;
        }
        self.show_members();
        for reward in moves.leaving {
            for base in 0..self.simulation.bases.len() {
                self.simulation.bases[base].take(Message::Leaves { reward });
                self.simulation.turn(Worker::Base(base), now);
            }
        }
    }

    /// Pods that have nothing left are gone.
    fn bury(&mut self) {
        let Simulation { bases, rewards, .. } = &self.simulation;
        let done: Vec<_> = self.bases.leaving().filter(|number| bases[*number].holds_nothing()).collect();
        done.into_iter().for_each(|number| self.bases.gone(number));
        let done: Vec<_> = self.rewards.leaving().filter(|number| rewards[*number].sessions() == 0).collect();
        done.into_iter().for_each(|number| self.rewards.gone(number));
    }

    /// Routers and base workers hear who is there.
    fn show_members(&mut self) {
        self.simulation.front.see(self.bases.ready(), self.rewards.ready());
        self.simulation.world.rewards_here = Some(self.rewards.ready().collect());
    }

    fn day(self, targets: &Targets) -> Day {
        let Self { simulation, bases, rewards, samples, .. } = self;
        let (mut base, mut reward) = (bases.report, rewards.report);
        base.moved = simulation.world.tally.moved_streams;
        reward.moved = simulation.world.tally.moved_sessions;
        let report = simulation.report(targets);
        // A pod that was there for an hour is no worker of the whole day.
        let busy = |busy: f64, pods: usize, pod_seconds: f64| {
            busy * pods as f64 * report.seconds / pod_seconds.max(f64::MIN_POSITIVE)
        };
        let mut day_report =
            Report { base_workers: base.most, reward_workers: reward.most, ..report.clone() };
        day_report.base.busy = busy(report.base.busy, report.base_workers, base.pod_seconds);
        day_report.reward.busy = busy(report.reward.busy, report.reward_workers, reward.pod_seconds);
        Day { report: day_report, base, reward, samples }
    }
}

/// The time that tokens waited for their reward over the time that answers took, without the part of a reward step that
/// one row takes as well: no further worker would spare anybody that.
fn stall(before: &Scrape, now: &Scrape) -> f64 {
    let waited = (now.stalled - before.stalled) / (now.streamed - before.streamed).max(SHARED_LEAST);
    let kept =
        now.least_forward * (now.steps - before.steps) / (now.forward - before.forward).max(SHARED_LEAST);
    waited * (1.0 - kept).max(0.0)
}

/// Used blocks of one worker over all that it has.
fn used_blocks(stepper: &Stepper) -> f64 {
    let stats = stepper.scheduler.stats();
    1.0 - stats.free_blocks as f64 / stats.total_blocks as f64
}
