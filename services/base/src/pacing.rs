//! What this worker has learnt of the reward models: how often their drafts are right, what their steps cost, and how
//! long lists must be. From that follows how far each session runs ahead; tokens never depend on it.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;
use uniarm_decode::alignment::patience;
use uniarm_decode::drafting::{Acceptance, DraftMode as Draws, Pace, Situation, StepCost, plan_pace};
use uniarm_decode::trial::Trial;
use uniarm_proto::{DraftMode, Load, Priority, SessionPace, limits::LIST_LENGTH_MAX};

use crate::{guide::LinkId, term::Term};

/// From a chosen token to the reward worker's next step: a message on a standing stream, and two threads that wake up.
const ROUND_TRIP_SECONDS: f64 = 0.3e-3;

/// Share of single-row drafts that are taken to be right before any was judged (measured: 0.5 to 0.93).
const SINGLE_BELIEF: f64 = 0.8;

/// The same for two rows of the base model itself: together they are the guided logits, if there is no other term.
const TWIN_BELIEF: f64 = 0.999;

/// The same for another backbone, or beside other terms.
const DUAL_BELIEF: f64 = 0.82;

/// While drafting is not worth it, workers of so few sessions draft for the record: one more look at a row tells whether
/// it would be. That costs 1 % of a step, and so it is done for every token only until so many drafts were judged; then in
/// one of so many stretches between two looks at a pace.
const RECORDED_SESSIONS_MAX: f64 = 2.0;
const RECORDED_DRAFTS: u32 = 64;
const RECORDED_STRETCHES: u32 = 8;

/// Lists grow while more than this share of tokens needs a query, and shrink while fewer than the other one does.
const QUERIED_MOST: f64 = 0.05;
const QUERIED_LEAST: f64 = 0.002;

/// Tokens after which the length of lists is looked at.
const LIST_TOKENS: u32 = 64;

/// Lists double at most so often, from the configured length on: the next doubling costs more bytes for every token than
/// the queries that it saves.
const DOUBLINGS_MAX: u32 = 1;

/// A worker that is busy tells of its line in every step. One that has not for so long may have nothing to do, and
/// nobody is refused for what it said last.
const LINE_BELIEVED: Duration = Duration::from_secs(1);

/// How drafting is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DraftWindow {
    /// As far ahead as is worth it.
    #[default]
    Auto,
    /// So many tokens; 0: no drafts.
    Fixed(u32),
}

/// What drafts are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DraftRows {
    /// Whichever is worth more.
    #[default]
    Auto,
    Single,
    Dual,
}

/// How a base worker paces its reward workers.
#[derive(Debug, Clone, Copy, Default)]
pub struct PaceOptions {
    pub window: DraftWindow,
    pub rows: DraftRows,
}

pub(crate) struct Pacing {
    options: PaceOptions,
    rewards: HashMap<Guide, Learnt>,
    pools: HashMap<LinkId, Pool>,
}

/// What is known of a reward worker.
#[derive(Debug, Clone)]
struct Pool {
    cost: StepCost,
    /// Sessions that are open, of all base workers.
    sessions: f64,
    /// By priority, how long a session stands in line that is opened now.
    wait_ms: [u32; Priority::COUNT],
    heard_at: Instant,
}

/// A reward model in a role: what it drafts is right less often where other terms have a say.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Guide {
    pub(crate) reward: String,
    pub(crate) is_alone: bool,
}

struct Learnt {
    single: Acceptance,
    dual: Acceptance,
    /// Its backbone is the base model itself, as far as is known.
    is_twin: bool,
    list: ListLength,
    trial: Trial,
    record: Record,
}

/// When drafts are made that nobody needs yet.
#[derive(Default)]
struct Record {
    /// That were judged, for the record or not.
    drafts: u32,
    /// Since enough of them were.
    stretches: u32,
}

/// A length that follows the share of tokens that needed a query.
struct ListLength {
    doublings: u32,
    tokens: u32,
    queried: u32,
}

/// What a pace depends on besides the term.
#[derive(Clone)]
pub(crate) struct Bench {
    pub(crate) cost: StepCost,
    /// Sequences that step together.
    pub(crate) sequences: usize,
    /// K as configured; 0: whole rows.
    pub(crate) list_length: u32,
}

// === impl PaceOptions ===

impl PaceOptions {
    /// Of a model that a reward worker computes with too: drafts and their verification would take turns, while in
    /// lock-step both are one pass. Measured at batch 1: drafts at 0.8 of lock-step.
    pub(crate) fn fused(self) -> Self {
        match self.window {
            DraftWindow::Auto => Self { window: DraftWindow::Fixed(0), ..self },
            DraftWindow::Fixed(_) => self,
        }
    }
}

// === impl Pacing ===

impl Pacing {
    pub(crate) fn new(options: PaceOptions) -> Self {
        Self { options, rewards: HashMap::new(), pools: HashMap::new() }
    }

    pub(crate) fn on_load(&mut self, link: LinkId, load: &Load, now: Instant) {
        let points = load.step_points.iter();
        let points = points.map(|(rows, microseconds)| (f64::from(*rows), f64::from(*microseconds) * 1e-6));
        let (cost, sessions) = (StepCost::new(points), f64::from(load.sessions).max(1.0));
        let pool = Pool { cost, sessions, wait_ms: load.wait_ms, heard_at: now };
        self.pools.insert(link, pool);
    }

    pub(crate) fn forget(&mut self, link: LinkId) {
        self.pools.remove(&link);
    }

    /// How long a session stands in line there that is opened now, as far as is known.
    pub(crate) fn wait_in_line(&self, link: LinkId, priority: Priority, now: Instant) -> Duration {
        let pool = self.pools.get(&link).filter(|pool| now - pool.heard_at <= LINE_BELIEVED);
        pool.map_or(Duration::ZERO, |pool| Duration::from_millis(pool.wait_ms[priority as usize].into()))
    }

    /// How long to wait for rows that a worker is computing.
    pub(crate) fn patience(&self, link: LinkId) -> Duration {
        self.pools.get(&link).map_or(Duration::ZERO, |pool| patience(&pool.cost, pool.sessions))
    }

    /// A worker has said on which backbone the reward model stands.
    pub(crate) fn on_opened(&mut self, guide: &Guide, is_twin: bool) {
        let learnt = self.learnt(guide);
        if learnt.is_twin != is_twin {
            learnt.is_twin = is_twin;
            let belief = if is_twin && guide.is_alone { TWIN_BELIEF } else { DUAL_BELIEF };
            learnt.dual = Acceptance::new(belief);
        }
    }

    /// A draft was judged.
    pub(crate) fn on_verdict(&mut self, guide: &Guide, mode: DraftMode, right: bool) {
        let learnt = self.learnt(guide);
        learnt.record.drafts = learnt.record.drafts.saturating_add(1);
        match mode {
            DraftMode::Dual => learnt.dual.observe(right),
            DraftMode::Single | DraftMode::Off => learnt.single.observe(right),
        }
    }

    /// An answer, one of `sequences` that step together, got so many tokens in this time at one pace.
    pub(crate) fn on_tokens(
        &mut self,
        guide: &Guide,
        is_drafting: bool,
        sequences: usize,
        (tokens, time): (usize, Duration),
    ) {
        self.learnt(guide).trial.observe(is_drafting, sequences, tokens, time.as_secs_f64());
    }

    /// A guided token was decided from this reward's list, or needed more of the row.
    pub(crate) fn on_list(&mut self, guide: &Guide, was_queried: bool) {
        self.learnt(guide).list.observe(was_queried);
    }

    /// The pace of a term that drafts, with the number of positions to gather.
    pub(crate) fn drafting(&mut self, term: &Term, bench: Bench) -> (SessionPace, usize) {
        let list_length = self.list_length(term, &bench);
        let pace = self.plan(term, bench);
        let session = SessionPace {
            draft: match pace.mode {
                Draws::Off => DraftMode::Off,
                Draws::Single => DraftMode::Single,
                Draws::Dual => DraftMode::Dual,
            },
            window: pace.window,
            list_length,
        };
        (session, pace.gather as usize)
    }

    /// The pace of a term that follows another one's drafts.
    pub(crate) fn following(&mut self, term: &Term, bench: &Bench) -> SessionPace {
        SessionPace { list_length: self.list_length(term, bench), ..SessionPace::default() }
    }

    fn plan(&mut self, term: &Term, bench: Bench) -> Pace {
        let PaceOptions { window, rows } = self.options;
        let pool = self.pools.get(&term.link()).cloned();
        let learnt = self.learnt(&term.guide);
        let (is_twin, may_draft) = (learnt.is_twin, learnt.trial.allows(bench.sequences));
        if let DraftWindow::Fixed(window) = window {
            let mode = match rows {
                DraftRows::Single => Draws::Single,
                DraftRows::Auto if !is_twin => Draws::Single,
                DraftRows::Auto | DraftRows::Dual => Draws::Dual,
            };
            return Pace::fixed(mode, window);
        }
        // Until the worker has said what its steps cost, it waits for every token.
        let Some(pool) = pool.filter(|pool| !pool.cost.points().is_empty()) else { return Pace::OFF };
        let situation = Situation {
            base: bench.cost,
            reward: pool.cost,
            base_sequences: bench.sequences.max(1) as f64,
            reward_sessions: pool.sessions,
            round_trip: ROUND_TRIP_SECONDS,
            single: if rows == DraftRows::Dual { 0.0 } else { learnt.single.share() },
            dual: (rows != DraftRows::Single).then(|| learnt.dual.share()),
        };
        let promised = plan_pace(&situation);
        match if may_draft { promised } else { Pace::OFF } {
            Pace::OFF if situation.reward_sessions <= RECORDED_SESSIONS_MAX && learnt.record.is_due() => {
                Pace::RECORD
            }
            pace => pace,
        }
    }

    fn list_length(&mut self, term: &Term, bench: &Bench) -> u32 {
        if bench.list_length == 0 {
            return bench.list_length;
        }
        self.learnt(&term.guide).list.of(bench.list_length)
    }

    fn learnt(&mut self, guide: &Guide) -> &mut Learnt {
        if !self.rewards.contains_key(guide) {
            let learnt = Learnt {
                single: Acceptance::new(SINGLE_BELIEF),
                dual: Acceptance::new(DUAL_BELIEF),
                is_twin: false,
                list: ListLength { doublings: 0, tokens: 0, queried: 0 },
                trial: Trial::default(),
                record: Record::default(),
            };
            self.rewards.insert(guide.clone(), learnt);
        }
        self.rewards.get_mut(guide).expect("it was just inserted")
    }
}

// === impl Record ===

impl Record {
    /// Whether the stretch that begins is one of those.
    fn is_due(&mut self) -> bool {
        if self.drafts < RECORDED_DRAFTS {
            return true;
        }
        self.stretches = (self.stretches + 1) % RECORDED_STRETCHES;
        self.stretches == 0
    }
}

// === impl ListLength ===

impl ListLength {
    fn observe(&mut self, was_queried: bool) {
        self.tokens += 1;
        self.queried += u32::from(was_queried);
        if self.tokens < LIST_TOKENS {
            return;
        }
        let share = f64::from(self.queried) / f64::from(self.tokens);
        if share > QUERIED_MOST {
            self.doublings = (self.doublings + 1).min(DOUBLINGS_MAX);
        } else if share < QUERIED_LEAST {
            self.doublings = self.doublings.saturating_sub(1);
        }
        (self.tokens, self.queried) = (0, 0);
    }

    fn of(&self, configured: u32) -> u32 {
        (configured << self.doublings).min(LIST_LENGTH_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stretch_is_on_record_until_enough_drafts_were_judged_and_then_one_in_eight() {
        let mut record = Record::default();
        for _ in 0..RECORDED_DRAFTS {
            assert!(record.is_due());
            record.drafts += 1;
        }
        assert_eq!((0..80).filter(|_| record.is_due()).count(), 10);
    }

    #[test]
    fn lists_grow_while_tokens_need_queries_and_shrink_when_none_does() {
        let mut list = ListLength { doublings: 0, tokens: 0, queried: 0 };
        (0..2 * LIST_TOKENS).for_each(|token| list.observe(token % 10 == 0));
        assert_eq!(list.of(32), 64);
        (0..100 * LIST_TOKENS).for_each(|_| list.observe(true));
        assert_eq!(list.of(32), 64);
        assert_eq!(list.of(LIST_LENGTH_MAX), LIST_LENGTH_MAX);
        (0..100 * LIST_TOKENS).for_each(|_| list.observe(false));
        assert_eq!(list.of(32), 32);
    }
}
