//! How far a reward worker runs ahead of a base worker, and when drafting is worth it at all.
//!
//! A reward worker must compute its logits at every position anyway. After the row at position t it may *draft*
//! token t, with the noise that the base worker will use, and go on to t + 1 without waiting. The base worker then
//! verifies several positions in one forward pass, and takes tokens up to and including the first that differs from
//! its draft. A draft never decides a token, so all that this file can do wrong is to waste time.
//!
//! Whether it wastes any is arithmetic. With T(n) the seconds of a step over n rows ([`StepCost`]), a the share of
//! drafts that are right, and g the positions that one pass verifies:
//!
//! ```text
//! tokens of a pass      E = 1 + a + … + a^(g-1)
//! a pass takes          max( g · T_reward, T_base(g) )                          both pools work at once, and
//!                       + (1 − a^g) · ( min( g · T_reward, T_base(g) ) + T_reward / 2 )
//!                                          a wrong draft empties the pipeline, and the worker is half-way into a step
//! lock-step takes       max( T_base(1), T_reward ) + a round trip, for one token
//! ```
//!
//! [`plan_pace`] takes what gives the most tokens per second and, among what is nearly as fast, what costs the base
//! worker the fewest passes. Two ways of drafting compete: from the reward's logits alone ([`DraftMode::Single`]), or
//! with a second row for the reward worker's own backbone without adapter and system text, which stands in for the base
//! model ([`DraftMode::Dual`]): right more often, always if both have the same weights, for twice the rows.

/// What a draft is made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DraftMode {
    /// No drafts: the worker waits for each token.
    #[default]
    Off,
    /// (1 + w) · z_reward.
    Single,
    /// z_plain + w · z_reward, where z_plain is the reward worker's own backbone.
    Dual,
}

/// How a sequence is drafted and verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    pub mode: DraftMode,
    /// Tokens that the worker may be ahead of the last one chosen. 0: it drafts, and waits for the verdict.
    pub window: u32,
    /// Positions that the base worker lets gather before it verifies them in one pass; at least 1.
    pub gather: u32,
}

/// Seconds of a step by its rows: points, and straight lines between them. A step of few rows is bound by memory, one
/// of many by arithmetic, and kernels have steps of their own: no formula says it better than what was seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepCost {
    /// (rows, seconds), ascending in rows.
    points: Vec<(f64, f64)>,
}

/// Learns a [`StepCost`] from steps as they happen: a running mean for each range of rows, 1, 2, 3–4, 5–8 and so on.
///
/// Fewer rows never cost more. Where means say otherwise the older one is wrong, since the machine has become faster or
/// slower since then: such ranges share one mean, in which each counts by the steps that it was seen in lately.
#[derive(Clone, Debug, Default)]
pub struct CostMeter {
    ranges: [Option<Range>; RANGES],
}

/// Means over the steps of one range, and how many those were: a count that fades with each step of any range.
#[derive(Clone, Copy, Debug)]
struct Range {
    rows: f64,
    seconds: f64,
    steps: f64,
}

/// Learns how often drafts are right: counts that fade, around a belief to begin with.
#[derive(Clone, Copy, Debug)]
pub struct Acceptance {
    right: f64,
    all: f64,
}

/// What a pace depends on.
#[derive(Clone, Debug)]
pub struct Situation {
    pub base: StepCost,
    pub reward: StepCost,
    /// Sequences that the base worker steps together.
    pub base_sequences: f64,
    /// Sessions that the reward worker steps together, of all base workers.
    pub reward_sessions: f64,
    /// Seconds from a chosen token to the reward worker's next step.
    pub round_trip: f64,
    /// Share of single-row drafts that are right.
    pub single: f64,
    /// Share of dual-row drafts that are right; `None` where they cannot be made.
    pub dual: Option<f64>,
}

/// Positions of one pass, at most: a burst of tokens should not be felt as a pause.
pub const GATHER_MAX: u32 = 8;

/// Tokens that a worker may be ahead, at most: what it holds for queries, and what a wrong draft can waste.
pub const WINDOW_MAX: u32 = 64;

/// Rates this close to the best count as equal: then fewer base passes decide. Costs are not known any better.
const NEARLY: f64 = 0.97;

/// Drafting has to promise this much more than lock-step. To begin it costs a prefill where two rows draft, and the
/// costs of a pool are seen beside whatever the other pool did to the memory that both share: with 1.05 here, models of
/// one size on two cores drafted at a loss of up to 20 %.
const WORTH_IT: f64 = 1.25;

/// Ranges of rows: powers of two up to the largest step that anybody plans.
pub(crate) const RANGES: usize = 16;

/// What one step weighs in the mean of its range.
const STEP_WEIGHT: f64 = 0.1;

/// What a range's count of steps loses with each later step.
const STEPS_FADING: f64 = 0.99;

/// What a draft's weight in an [`Acceptance`] loses with each later draft.
const ACCEPTANCE_FADING: f64 = 0.995;

/// Drafts that the first belief of an [`Acceptance`] counts for.
const BELIEF_DRAFTS: f64 = 12.0;

// === impl Pace ===

impl Pace {
    /// Lock-step.
    pub const OFF: Self = Self { mode: DraftMode::Off, window: 0, gather: 1 };

    /// Lock-step in which drafts are made and judged all the same.
    pub const RECORD: Self = Self { mode: DraftMode::Single, ..Self::OFF };

    /// A window that somebody fixed: half of it gathers while the other half is verified.
    pub fn fixed(mode: DraftMode, window: u32) -> Self {
        let window = window.min(WINDOW_MAX);
        match (mode, window) {
            (DraftMode::Off, _) | (_, 0) => Self::OFF,
            _ => Self { mode, window, gather: window.div_ceil(2).min(GATHER_MAX) },
        }
    }
}

// === impl StepCost ===

impl StepCost {
    /// From points in any order; those that are no numbers, or no rows, are left out.
    pub fn new(points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let sound =
            |&(rows, seconds): &(f64, f64)| rows > 0.0 && seconds >= 0.0 && (rows + seconds).is_finite();
        let mut points: Vec<(f64, f64)> = points.into_iter().filter(sound).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by_key(|point| point.0);
        // More rows never cost less.
        let mut most = 0.0_f64;
        for (_, seconds) in &mut points {
            most = most.max(*seconds);
            *seconds = most;
        }
        Self { points }
    }

    /// `fixed + per_row · rows`.
    pub fn line(fixed: f64, per_row: f64) -> Self {
        Self::new([1.0, 1024.0].map(|rows| (rows, fixed + per_row * rows)))
    }

    /// (rows, seconds), ascending in rows.
    pub fn points(&self) -> &[(f64, f64)] {
        &self.points
    }

    /// 0 where nothing is known. Beyond the largest step seen, rows cost what they cost there.
    pub fn seconds(&self, rows: f64) -> f64 {
        let Some(&(first, least)) = self.points.first() else { return 0.0 };
        if rows <= first {
            return least;
        }
        match self.points.windows(2).find(|pair| rows <= pair[1].0) {
            Some(&[(low, from), (high, to)]) => from + (to - from) * (rows - low) / (high - low),
            _ => {
                let (most, seconds) = self.points[self.points.len() - 1];
                seconds * rows / most
            }
        }
    }
}

// === impl CostMeter ===

impl CostMeter {
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        let range = range(rows);
        let rows = rows as f64;
        for range in self.ranges.iter_mut().flatten() {
            // Never zero: a share of nothing would be no number.
            range.steps = (range.steps * STEPS_FADING).max(f64::MIN_POSITIVE);
        }
        let seen = self.ranges[range].get_or_insert(Range { rows, seconds, steps: 0.0 });
        seen.rows += STEP_WEIGHT * (rows - seen.rows);
        seen.seconds += STEP_WEIGHT * (seconds - seen.seconds);
        seen.steps += 1.0;
    }

    pub fn cost(&self) -> StepCost {
        // Groups of neighbouring ranges that share their seconds (the pool of adjacent violators): (seconds, steps, ranges).
        let mut groups: Vec<(f64, f64, usize)> = Vec::with_capacity(RANGES);
        for range in self.ranges.iter().flatten() {
            let mut group = (range.seconds, range.steps, 1);
            while let Some(&(seconds, steps, ranges)) = groups.last().filter(|last| last.0 > group.0) {
                let all = steps + group.1;
                group = ((seconds * steps + group.0 * group.1) / all, all, ranges + group.2);
                groups.pop();
            }
            groups.push(group);
        }
        let seconds = groups.iter().flat_map(|&(seconds, _, ranges)| std::iter::repeat_n(seconds, ranges));
        StepCost::new(self.ranges.iter().flatten().map(|range| range.rows).zip(seconds))
    }
}

// === impl Acceptance ===

impl Acceptance {
    /// `belief`: the share to begin with.
    pub fn new(belief: f64) -> Self {
        Self { right: belief * BELIEF_DRAFTS, all: BELIEF_DRAFTS }
    }

    pub fn observe(&mut self, right: bool) {
        self.right = self.right * ACCEPTANCE_FADING + f64::from(u8::from(right));
        self.all = self.all * ACCEPTANCE_FADING + 1.0;
    }

    pub fn share(&self) -> f64 {
        self.right / self.all
    }
}

/// The range of so many rows: 1, 2, 3–4, 5–8 and so on.
pub(crate) fn range(rows: usize) -> usize {
    (rows.max(1).next_power_of_two().ilog2() as usize).min(RANGES - 1)
}

/// The pace that is worth most; [`Pace::OFF`] where drafting is not worth it.
pub fn plan_pace(situation: &Situation) -> Pace {
    let modes = [(DraftMode::Single, Some(situation.single)), (DraftMode::Dual, situation.dual)];
    let modes = modes.into_iter().filter_map(|(mode, share)| Some((mode, share?)));
    let paces = modes.flat_map(|(mode, share)| {
        (1..=GATHER_MAX).map(move |gather| (Pace { mode, window: 2 * gather, gather }, share))
    });
    let lock_step = (Pace::OFF, lock_step_rate(situation), 1.0);
    let least = WORTH_IT * lock_step.1;
    let drafted = paces.map(|(pace, share)| {
        (pace, drafted_rate(situation, &pace, share), 1.0 / tokens_of_a_pass(share, pace.gather))
    });
    let candidates: Vec<(Pace, f64, f64)> = std::iter::once(lock_step).chain(drafted).collect();
    let best = candidates.iter().map(|(_, rate, _)| *rate).fold(0.0, f64::max);
    let near = candidates.iter().filter(|(_, rate, _)| *rate >= (NEARLY * best).max(least));
    near.min_by(|a, b| a.2.total_cmp(&b.2)).map_or(Pace::OFF, |(pace, ..)| *pace)
}

/// Tokens per second of one sequence.
fn lock_step_rate(situation: &Situation) -> f64 {
    let Situation { base, reward, base_sequences, reward_sessions, round_trip, .. } = situation;
    1.0 / (base.seconds(*base_sequences).max(reward.seconds(*reward_sessions)) + round_trip)
}

fn drafted_rate(situation: &Situation, pace: &Pace, share: f64) -> f64 {
    let rows_of_a_session = if pace.mode == DraftMode::Dual { 2.0 } else { 1.0 };
    let gather = f64::from(pace.gather);
    let draft = situation.reward.seconds(rows_of_a_session * situation.reward_sessions);
    let gathering = gather * draft;
    let verifying = situation.base.seconds(gather * situation.base_sequences);
    let wrong = 1.0 - share.powf(gather);
    let seconds =
        gathering.max(verifying) + wrong * (gathering.min(verifying) + draft / 2.0 + situation.round_trip);
    tokens_of_a_pass(share, pace.gather) / seconds
}

fn tokens_of_a_pass(share: f64, gather: u32) -> f64 {
    (0..gather).map(|position| share.powi(position as i32)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step of few rows is bound by memory: rows are nearly free.
    fn memory_bound() -> StepCost {
        StepCost::line(10e-3, 0.1e-3)
    }

    fn situation() -> Situation {
        Situation {
            base: memory_bound(),
            reward: memory_bound(),
            base_sequences: 1.0,
            reward_sessions: 1.0,
            round_trip: 0.2e-3,
            single: 0.8,
            dual: None,
        }
    }

    #[test]
    fn a_small_reward_model_runs_ahead_of_a_large_base_model() {
        let small = StepCost::line(2.5e-3, 0.025e-3);
        let pace = plan_pace(&Situation { reward: small, ..situation() });
        assert_eq!(pace.mode, DraftMode::Single);
        assert!(pace.gather >= 3 && pace.window == 2 * pace.gather, "{pace:?}");
    }

    #[test]
    fn models_of_one_size_stay_in_lock_step_unless_messages_are_slow_and_drafts_right() {
        assert_eq!(plan_pace(&situation()), Pace::OFF, "a wrong draft costs more than it saves");
        let twin = Situation { dual: Some(1.0), ..situation() };
        assert_eq!(plan_pace(&twin), Pace::OFF, "it saves nothing but base passes");
        let far = plan_pace(&Situation { round_trip: 4e-3, ..twin });
        assert_eq!((far.mode, far.gather), (DraftMode::Dual, GATHER_MAX), "nobody waits for messages");
    }

    #[test]
    fn drafting_stops_where_arithmetic_is_scarce() {
        let compute_bound = StepCost::line(0.0, 2e-3);
        let crowded = Situation {
            base: compute_bound.clone(),
            reward: compute_bound,
            base_sequences: 16.0,
            reward_sessions: 16.0,
            dual: Some(1.0),
            single: 0.9,
            ..situation()
        };
        assert_eq!(plan_pace(&crowded), Pace::OFF);
    }

    #[test]
    fn a_meter_knows_what_it_saw_and_lines_between() {
        let mut meter = CostMeter::default();
        assert_eq!(meter.cost().seconds(4.0), 0.0);
        for (rows, seconds) in [(1, 4.0), (8, 14.0), (16, 30.0), (64, 54.0)] {
            meter.observe(rows, seconds);
        }
        let cost = meter.cost();
        assert_eq!([1.0, 8.0, 16.0].map(|rows| cost.seconds(rows)), [4.0, 14.0, 30.0]);
        assert_eq!(cost.seconds(12.0), 22.0);
        assert_eq!((cost.seconds(0.5), cost.seconds(128.0)), (4.0, 108.0));
        (0..2000).for_each(|_| meter.observe(1, 15.0));
        assert!((meter.cost().seconds(1.0) - 15.0).abs() < 1e-6, "it follows");
        assert!(meter.cost().seconds(8.0) >= meter.cost().seconds(1.0), "more rows never cost less");
        assert_eq!(meter.cost().seconds(16.0), 30.0, "what contradicts nothing stays");
        assert_eq!(StepCost::new([(f64::NAN, 1.0), (-1.0, 1.0), (2.0, f64::INFINITY)]), StepCost::default());
    }

    #[test]
    fn what_was_seen_long_ago_gives_way_to_what_contradicts_it() {
        // Tried while other processes started; then nobody steps one row alone.
        let mut meter = CostMeter::default();
        meter.observe(1, 50.0);
        (0..1000).for_each(|_| meter.observe(4, 12.0));
        let cost = meter.cost();
        assert!((cost.seconds(1.0) - 12.0).abs() < 0.1, "one row costs no more than four: {cost:?}");
        assert!((cost.seconds(4.0) - 12.0).abs() < 0.1, "{cost:?}");

        // The other way round: large steps of an idle machine do not make its busy hours cheap.
        let mut meter = CostMeter::default();
        meter.observe(16, 10.0);
        (0..1000).for_each(|_| meter.observe(4, 12.0));
        assert!((meter.cost().seconds(16.0) - 12.0).abs() < 0.1, "{meter:?}");
        (0..1_000_000).for_each(|_| meter.observe(4, 12.0));
        assert!(
            (meter.cost().seconds(16.0) - 12.0).abs() < 0.1,
            "no count of steps fades to nothing: {meter:?}"
        );
    }

    #[test]
    fn acceptance_starts_from_a_belief_and_forgets_it() {
        let mut acceptance = Acceptance::new(0.9);
        assert!((acceptance.share() - 0.9).abs() < 1e-9);
        (0..2000).for_each(|draft| acceptance.observe(draft % 2 == 0));
        assert!((acceptance.share() - 0.5).abs() < 0.01);
    }
}
