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

/// Seconds of a step as a line: `fixed + per_row · rows`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCost {
    pub fixed: f64,
    pub per_row: f64,
}

/// Learns a [`StepCost`] from steps as they happen: least squares in which older steps fade.
#[derive(Clone, Debug)]
pub struct CostMeter {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_rows: f64,
    rows_seconds: f64,
}

/// Learns how often drafts are right: counts that fade, around a belief to begin with.
#[derive(Clone, Copy, Debug)]
pub struct Acceptance {
    right: f64,
    all: f64,
}

/// What a pace depends on.
#[derive(Clone, Copy, Debug)]
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

/// What a step's weight in a [`CostMeter`] loses with each later step.
const FADING: f64 = 0.98;

/// The same for a draft in an [`Acceptance`].
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
    pub fn seconds(&self, rows: f64) -> f64 {
        self.fixed + self.per_row * rows
    }
}

// === impl CostMeter ===

impl CostMeter {
    /// Begins with two measured steps, so that there is a line from the start: (rows, seconds) each.
    pub fn new(few: (usize, f64), many: (usize, f64)) -> Self {
        let mut meter = Self { weight: 0.0, rows: 0.0, seconds: 0.0, rows_rows: 0.0, rows_seconds: 0.0 };
        meter.observe(few.0, few.1);
        meter.observe(many.0, many.1);
        meter
    }

    pub fn observe(&mut self, rows: usize, seconds: f64) {
        let rows = rows as f64;
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.seconds, seconds),
            (&mut self.rows_rows, rows * rows),
            (&mut self.rows_seconds, rows * seconds),
        ] {
            *sum = *sum * FADING + value;
        }
    }

    /// Where all remembered steps have the same number of rows, their time is taken as fixed for half of it.
    pub fn cost(&self) -> StepCost {
        let (rows, seconds) = (self.rows / self.weight, self.seconds / self.weight);
        let variance = self.rows_rows / self.weight - rows * rows;
        let covariance = self.rows_seconds / self.weight - rows * seconds;
        let steepest = seconds / rows;
        let per_row = if variance > 1e-3 * rows * rows { covariance / variance } else { steepest / 2.0 };
        let per_row = per_row.clamp(0.0, steepest);
        StepCost { fixed: seconds - per_row * rows, per_row }
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

/// The pace that is worth most; [`Pace::OFF`] where drafting is not worth it.
pub fn plan_pace(situation: &Situation) -> Pace {
    let modes = [(DraftMode::Single, Some(situation.single)), (DraftMode::Dual, situation.dual)];
    let modes = modes.into_iter().filter_map(|(mode, share)| Some((mode, share?)));
    let paces = modes.flat_map(|(mode, share)| {
        (1..=GATHER_MAX).map(move |gather| (Pace { mode, window: 2 * gather, gather }, share))
    });
    let lock_step = (Pace::OFF, lock_step_rate(situation), 1.0);
    let drafted = paces.map(|(pace, share)| {
        (pace, drafted_rate(situation, &pace, share), 1.0 / tokens_of_a_pass(share, pace.gather))
    });
    let candidates: Vec<(Pace, f64, f64)> = std::iter::once(lock_step).chain(drafted).collect();
    let best = candidates.iter().map(|(_, rate, _)| *rate).fold(0.0, f64::max);
    let near = candidates.iter().filter(|(_, rate, _)| *rate >= NEARLY * best);
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
    const MEMORY_BOUND: StepCost = StepCost { fixed: 10e-3, per_row: 0.1e-3 };

    fn situation() -> Situation {
        Situation {
            base: MEMORY_BOUND,
            reward: MEMORY_BOUND,
            base_sequences: 1.0,
            reward_sessions: 1.0,
            round_trip: 0.2e-3,
            single: 0.8,
            dual: None,
        }
    }

    #[test]
    fn a_small_reward_model_runs_ahead_of_a_large_base_model() {
        let small = StepCost { fixed: 2.5e-3, per_row: 0.025e-3 };
        let pace = plan_pace(&Situation { reward: small, ..situation() });
        assert_eq!(pace.mode, DraftMode::Single);
        assert!(pace.gather >= 3 && pace.window == 2 * pace.gather, "{pace:?}");
    }

    #[test]
    fn models_of_one_size_stay_in_lock_step_unless_drafts_are_always_right() {
        assert_eq!(plan_pace(&situation()), Pace::OFF, "a wrong draft costs more than it saves");
        let twin = plan_pace(&Situation { dual: Some(1.0), ..situation() });
        assert_eq!((twin.mode, twin.gather), (DraftMode::Dual, GATHER_MAX), "the base rests for free");
    }

    #[test]
    fn drafting_stops_where_arithmetic_is_scarce() {
        let compute_bound = StepCost { fixed: 0.0, per_row: 2e-3 };
        let crowded = Situation {
            base: compute_bound,
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
    fn a_meter_finds_the_line_and_follows_it() {
        let mut meter = CostMeter::new((1, 5.0), (8, 5.7));
        let StepCost { fixed, per_row } = meter.cost();
        assert!((fixed - 4.9).abs() < 1e-3 && (per_row - 0.1).abs() < 1e-3, "{:?}", meter.cost());
        for step in 0..500 {
            let rows = 1 + step % 4;
            meter.observe(rows, 1.0 + 0.5 * rows as f64);
        }
        let StepCost { fixed, per_row } = meter.cost();
        assert!((fixed - 1.0).abs() < 1e-2 && (per_row - 0.5).abs() < 1e-2, "{:?}", meter.cost());
        for _ in 0..2000 {
            meter.observe(4, 8.0);
        }
        let cost = meter.cost();
        assert!(
            (cost.seconds(4.0) - 8.0).abs() < 1e-6 && cost.fixed >= 0.0 && cost.per_row >= 0.0,
            "{cost:?}"
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
