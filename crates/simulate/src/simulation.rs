//! The loop: one event after the other, until nothing is left to happen.

use std::time::Duration;

use uniarm_decode::SchedulerStats;

use crate::base::{Base, Message};
use crate::front::Front;
use crate::report::{Histogram, PoolReport, Report, Targets};
use crate::reward::Reward;
use crate::setup::Setup;
use crate::stepper::{Ending, Used};
use crate::trace::Arrival;
use crate::world::{Event, Outcome, Request, Worker, World};

/// Runs a trace through a cluster. The result is a function of the arguments.
///
/// `arrivals` stand in the order of their times; `targets` say which requests count as good.
pub fn simulate(setup: &Setup, arrivals: &[Arrival], targets: &Targets) -> Report {
    let mut simulation = Simulation::new(setup, arrivals);
    while let Some((now, event)) = simulation.world.queue.pop() {
        simulation.handle(now, event);
    }
    simulation.report(targets)
}

pub(crate) struct Simulation<'a> {
    pub(crate) world: World<'a>,
    pub(crate) front: Front,
    pub(crate) bases: Vec<Base>,
    pub(crate) rewards: Vec<Reward>,
}

// === impl Simulation ===

impl<'a> Simulation<'a> {
    pub(crate) fn new(setup: &'a Setup, arrivals: &'a [Arrival]) -> Self {
        Self {
            world: World::new(setup, arrivals),
            front: Front::new(setup),
            bases: (0..setup.base.workers).map(|number| Base::new(number, setup)).collect(),
            rewards: (0..setup.reward.workers).map(|number| Reward::new(number, &setup.reward)).collect(),
        }
    }

    pub(crate) fn handle(&mut self, now: Duration, event: Event) {
        let world = &mut self.world;
        match event {
            Event::Arrive(request) => self.front.arrive(request, now, world),
            Event::Refused { request } => self.front.refused(request, now, world),
            Event::Placed { base, request } => {
                self.bases[base].receive(request, now, world);
                self.turn(Worker::Base(base), now);
            }
            Event::Replies { base, reward, replies, load } => {
                self.bases[base].take(Message::Replies { reward, replies, load });
                self.turn(Worker::Base(base), now);
            }
            Event::Reopen { base, request } => {
                self.bases[base].take(Message::Reopen { request });
                self.turn(Worker::Base(base), now);
            }
            Event::Ops { reward, base, ops } => {
                self.rewards[reward].take(base, ops);
                self.turn(Worker::Reward(reward), now);
            }
            Event::Wake(worker) => {
                match worker {
                    Worker::Base(number) => self.bases[number].woke(),
                    Worker::Reward(number) => self.rewards[number].woke(),
                }
                self.turn(worker, now);
            }
            Event::Drained { base } => {
                self.bases[base].drained();
                self.turn(Worker::Base(base), now);
            }
            Event::Look | Event::Started(_) => unreachable!("only pools that scale have them: see scaled.rs"),
            Event::Ends { worker, version } => {
                let ended = match worker {
                    Worker::Base(number) => self.bases[number].end_step(now, version, world),
                    Worker::Reward(number) => self.rewards[number].end_step(now, version, world),
                };
                if ended {
                    self.turn(worker, now);
                    self.tell_neighbour(worker, now);
                }
            }
        }
    }

    /// Lets an idle worker look at its inbox and step. A busy one looks when its step ends.
    pub(crate) fn turn(&mut self, worker: Worker, now: Duration) {
        if self.is_busy(worker) {
            return;
        }
        let crowded = self.neighbour(worker).is_some_and(|neighbour| self.is_busy(neighbour));
        let ending = match worker {
            Worker::Base(number) => {
                let base = &mut self.bases[number];
                let ending = base.turn(now, crowded, &mut self.world);
                for (request, outcome) in base.ended.drain(..) {
                    self.front.ended(request, outcome, &mut self.world);
                }
                for request in base.moved.drain(..) {
                    self.front.moved(request, now, &mut self.world);
                }
                ending
            }
            Worker::Reward(number) => self.rewards[number].turn(now, crowded, &mut self.world),
        };
        if let Some(ending) = ending {
            self.schedule(worker, ending);
            self.tell_neighbour(worker, now);
        }
    }

    fn schedule(&mut self, worker: Worker, ending: Ending) {
        self.world.queue.push(ending.at, Event::Ends { worker, version: ending.version });
    }

    /// The worker on the same machine, where there is one.
    fn neighbour(&self, worker: Worker) -> Option<Worker> {
        if !self.world.setup.colocated {
            return None;
        }
        match worker {
            Worker::Base(number) => (number < self.rewards.len()).then_some(Worker::Reward(number)),
            Worker::Reward(number) => (number < self.bases.len()).then_some(Worker::Base(number)),
        }
    }

    fn is_busy(&self, worker: Worker) -> bool {
        match worker {
            Worker::Base(number) => self.bases[number].stepper.is_busy(),
            Worker::Reward(number) => self.rewards[number].stepper.is_busy(),
        }
    }

    fn tell_neighbour(&mut self, worker: Worker, now: Duration) {
        let Some(neighbour) = self.neighbour(worker) else { return };
        let crowded = self.is_busy(worker);
        let ending = match neighbour {
            Worker::Base(number) => self.bases[number].stepper.crowd(now, crowded),
            Worker::Reward(number) => self.rewards[number].stepper.crowd(now, crowded),
        };
        if let Some(ending) = ending {
            self.schedule(neighbour, ending);
        }
    }

    pub(crate) fn report(self, targets: &Targets) -> Report {
        let Self { world, bases, rewards, .. } = self;
        let ended = |outcome| world.requests.iter().filter(|r| r.outcome == Some(outcome)).count();
        let back = world.setup.front.transit(0) * 2;
        let (mut first, mut whole, mut good) = (Histogram::default(), Histogram::default(), 0);
        let mut last = Duration::ZERO;
        for (request, arrival) in world.requests.iter().zip(world.arrivals) {
            let (Some(first_at), Some(last_at)) = (request.first_token_at, request.last_token_at) else {
                continue;
            };
            let at = Duration::from_secs_f64(arrival.at);
            first.add(first_at + back - at);
            last = last.max(last_at + back);
            if request.outcome == Some(Outcome::Finished) {
                whole.add(last_at + back - at);
                good += usize::from(is_good(request, first_at + back - at, targets));
            }
        }
        let seconds = last.as_secs_f64().max(f64::MIN_POSITIVE);
        let per = |count: u64, of: u64| count as f64 / of.max(1) as f64;
        let tally = &world.tally;
        let base =
            pool(bases.iter().map(|base| (base.stepper.used, base.stepper.scheduler.stats())), seconds);
        let prompts: u64 = bases.iter().map(|base| prompt_tokens(&base.stepper.scheduler.stats())).sum();
        let computed: u64 = bases.iter().map(|base| base.stepper.used.tokens).sum();
        Report {
            base_workers: bases.len(),
            reward_workers: rewards.len(),
            requests: world.requests.len(),
            finished: ended(Outcome::Finished),
            refused: ended(Outcome::Refused),
            expired: ended(Outcome::Expired),
            seconds,
            tokens: tally.tokens,
            tokens_per_second: tally.tokens as f64 / seconds,
            first_token: first.quantiles(),
            inter_token: tally.inter_token.quantiles(),
            end_to_end: whole.quantiles(),
            reward: pool(
                rewards.iter().map(|reward| (reward.stepper.used, reward.stepper.scheduler.stats())),
                seconds,
            ),
            base,
            base_passes_per_token: per(computed.saturating_sub(prompts), tally.tokens),
            drafted: tally.drafted,
            accepted: tally.accepted,
            exchange_bytes_per_token: per(tally.exchange_bytes, tally.guided_tokens),
            goodput: per(good as u64, world.requests.len() as u64),
            good_per_second: good as f64 / seconds,
        }
    }
}

/// Whether a finished request met both targets: its first token, and the mean of its gaps.
fn is_good(request: &Request, first_token: Duration, targets: &Targets) -> bool {
    let (Some(first), Some(last)) = (request.first_token_at, request.last_token_at) else { return false };
    let gaps = request.answer.saturating_sub(1).max(1) as u32;
    first_token <= targets.first_token && (last - first) / gaps <= targets.inter_token
}

fn prompt_tokens(stats: &SchedulerStats) -> u64 {
    stats.prefix_query_tokens - stats.prefix_hit_tokens
}

fn pool(workers: impl Iterator<Item = (Used, SchedulerStats)>, seconds: f64) -> PoolReport {
    let (mut report, mut count) = (PoolReport::default(), 0);
    let (mut rows, mut tokens, mut asked, mut found) = (0, 0, 0, 0);
    for (used, stats) in workers {
        count += 1;
        report.busy += used.busy.as_secs_f64() / seconds;
        report.steps += used.steps;
        report.preemptions += stats.preemptions;
        rows += used.rows;
        tokens += used.tokens;
        asked += stats.prefix_query_tokens;
        found += stats.prefix_hit_tokens;
    }
    report.busy /= f64::from(count.max(1));
    report.rows_per_step = rows as f64 / report.steps.max(1) as f64;
    report.tokens_per_step = tokens as f64 / report.steps.max(1) as f64;
    report.prefix_hits = found as f64 / asked.max(1) as f64;
    report
}
