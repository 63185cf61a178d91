//! What a measurement of steps says: its cases, what they are to each other, and where the time went.

use serde::Serialize;
use uniarm_base::DraftWindow;

use super::{Case, Setting, exchange_name, window_name};
use crate::{
    args::ExchangeMode,
    bench::{
        args::{Roles, Rows},
        breakdown::Breakdown,
        floor::{Machine, Work},
        prompts,
        rig::{Answered, Run},
        statistics::{Spread, bar, interval_of_median},
    },
};

/// Characters of the longest bar.
const BAR: usize = 20;

/// Titles of [`Outcome::cells`].
const CASE_HEAD: &str = "batch  rows              exchange  drafts roles   ";

#[derive(Serialize)]
pub struct Report {
    model: String,
    machine: Machine,
    work: Work,
    temperature: f32,
    cases: Vec<Outcome>,
    comparisons: Vec<Comparison>,
    /// Whether exchange, draft window and roles left every token as it was.
    pub same_tokens: bool,
}

#[derive(Serialize)]
pub struct Outcome {
    batch: usize,
    rows: &'static str,
    exchange: Option<&'static str>,
    draft_window: Option<String>,
    roles: Option<&'static str>,
    tokens_per_second: Spread,
    /// Tokens that came while all rows of their batch ran, of all; the least of the repeats.
    window_share: f64,
    /// Of a step for each token: drafts may do better.
    floor_tokens_per_second: Spread,
    /// Of each repeat's floor.
    share_of_floor: Spread,
    base_passes_per_token: f64,
    /// Drafts that were right, of those that were looked at.
    acceptance: Option<f64>,
    certified_share: Option<f64>,
    exchange_bytes_per_token: Option<f64>,
    /// Of the repeat with the median rate.
    breakdown: Option<Breakdown>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    answers: Vec<Answer>,
    #[serde(skip)]
    case: Case,
    /// Tokens per second of the repeats, in their order.
    #[serde(skip)]
    rates: Vec<f64>,
    /// Of each row in each repeat.
    #[serde(skip)]
    tokens: Vec<Vec<Vec<u32>>>,
}

/// What a row was asked, and its tokens.
#[derive(Serialize)]
struct Answer {
    question: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reward_system: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strength: Option<f32>,
    tokens: Vec<u32>,
}

/// Two cases by the ratios within each repeat: what disturbs the machine disturbs both.
#[derive(Serialize)]
struct Comparison {
    batch: usize,
    name: String,
    ratio: Spread,
    /// With 95 % confidence.
    interval_of_median: Option<[f64; 2]>,
}

// === impl Report ===

impl Report {
    pub fn new(model: String, machine: Machine, work: Work, temperature: f32, cases: Vec<Outcome>) -> Self {
        let comparisons = comparisons(&cases);
        let same_tokens = same_tokens(&cases);
        Self { model, machine, work, temperature, cases, comparisons, same_tokens }
    }

    pub fn print(&self) {
        println!("{}\n{}", self.work.line(&self.model), self.machine.line());
        println!(
            "floor: the greater of weights / bandwidth and operations / peak, a step for each token; guided steps share \
             the memory;\n       both are looked at before each repeat, and a share is of its own look\ntemperature {}; of the window while all rows of a batch run\n",
            self.temperature
        );
        self.print_rates();
        self.print_breakdown();
        // Guided against unguided is in the first table.
        let mut of_guided =
            self.comparisons.iter().filter(|comparison| !comparison.name.ends_with("unguided")).peekable();
        let has_any = of_guided.peek().is_some();
        for Comparison { batch, name, ratio, interval_of_median } in of_guided {
            let interval =
                interval_of_median.map_or(String::new(), |[from, to]| format!("{from:.3} – {to:.3}"));
            println!(
                "batch {batch:>2}: {name:64} {:.3}  {interval:13}  ({:.3} – {:.3})",
                ratio.median, ratio.least, ratio.most
            );
        }
        if has_any {
            println!("median of the repeats; where it lies with 95 % confidence, from 6 repeats on; (range)");
        }
    }

    fn print_rates(&self) {
        println!(
            "{CASE_HEAD} {:>9} {:>15} {:>6} {:>8} {:>6} {:>7} {:>7} {:>9} {:>8}",
            "tokens/s", "range", "window", "floor", "of it", "passes", "accept", "certified", "bytes"
        );
        let most = self.cases.iter().map(|case| case.tokens_per_second.median).fold(0.0, f64::max);
        for case in &self.cases {
            let Spread { median, least, most: highest } = case.tokens_per_second;
            println!(
                "{} {median:>9.1} {:>15} {:>4.0} % {:>8.1} {:>4.0} % {:>7.3} {:>7} {:>9} {:>8}  {}",
                case.cells(),
                format!("{least:.1} – {highest:.1}"),
                100.0 * case.window_share,
                case.floor_tokens_per_second.median,
                100.0 * case.share_of_floor.median,
                case.base_passes_per_token,
                case.acceptance.map_or("–".to_owned(), |share| format!("{share:.2}")),
                case.certified_share.map_or("–".to_owned(), |share| format!("{:.1} %", 100.0 * share)),
                case.exchange_bytes_per_token.map_or("–".to_owned(), |bytes| format!("{bytes:.0}")),
                bar(median, most, BAR)
            );
        }
        println!(
            "window: tokens that came while all rows of a batch ran, which the rate is of\npasses: of the base model for each token; accept: drafts that were right; bytes: of reward logits \
             for each token\n"
        );
    }

    fn print_breakdown(&self) {
        println!(
            "where a base step's time goes, in microseconds; of a reward step its forward and its lists"
        );
        println!(
            "{CASE_HEAD} {:>8} {:>8} {:>8} {:>7} {:>7} {:>8} {:>7} {:>14} {:>12}",
            "step",
            "schedule",
            "forward",
            "choose",
            "emit",
            "wait",
            "stall",
            "reward forward",
            "reward lists"
        );
        for case in &self.cases {
            let Some(parts) = &case.breakdown else { continue };
            println!(
                "{} {:>8.0} {:>8.0} {:>8.0} {:>7.0} {:>7.0} {:>8.0} {:>7.0} {:>14.0} {:>12.0}",
                case.cells(),
                parts.step_us,
                parts.schedule_us,
                parts.forward_us,
                parts.choose_us,
                parts.emit_us,
                parts.wait_us,
                parts.reward_stall_us,
                parts.reward_forward_us,
                parts.reward_lists_us
            );
        }
        println!(
            "wait: for rewards, and messages; stall: of one token, from its base logits to its last reward row\n"
        );
    }
}

// === impl Outcome ===

impl Outcome {
    pub fn of(case: Case, runs: &[Run], floors: Vec<f64>, with_answers: bool) -> Self {
        let rates: Vec<f64> = runs.iter().map(|run| run.rate).collect();
        let shares = rates.iter().zip(&floors).map(|(rate, floor)| rate / floor).collect();
        let spread = Spread::of(rates.clone());
        let middle = runs.iter().find(|run| run.rate == spread.median).unwrap_or(&runs[0]);
        let answers = || runs.iter().flat_map(|run| &run.answers);
        let total = |count: fn(&Answered) -> u64| answers().map(count).sum::<u64>() as f64;
        let share = |part: f64, whole: f64| (case.guided.is_some() && whole > 0.0).then(|| part / whole);

        let chosen = total(|a| a.tokens.len() as u64);
        let certified = total(|a| u64::from(a.exchange.certified));
        let guided = certified + total(|a| u64::from(a.exchange.queried) + u64::from(a.exchange.dense));
        let drafted = total(|a| u64::from(a.speculation.drafted));
        Self {
            batch: case.batch,
            rows: case.rows.name(),
            exchange: case.guided.map(|setting| exchange_name(setting.exchange)),
            draft_window: case.guided.map(|setting| window_name(setting.window)),
            roles: case.guided.map(|setting| setting.roles.name()),
            tokens_per_second: spread,
            window_share: runs.iter().map(|run| run.window_share).fold(1.0, f64::min),
            floor_tokens_per_second: Spread::of(floors),
            share_of_floor: Spread::of(shares),
            base_passes_per_token: total(|a| u64::from(a.speculation.base_passes)) / chosen,
            acceptance: share(total(|a| u64::from(a.speculation.accepted)), drafted),
            certified_share: share(certified, guided),
            exchange_bytes_per_token: share(total(|a| a.exchange.bytes), guided),
            breakdown: middle.breakdown,
            answers: if with_answers { answers_of(case.rows, middle) } else { Vec::new() },
            case,
            rates,
            tokens: runs.iter().map(|run| run.answers.iter().map(|a| a.tokens.clone()).collect()).collect(),
        }
    }

    /// Which case it is.
    fn cells(&self) -> String {
        format!(
            "{:>5}  {:17} {:9} {:>6} {:8}",
            self.batch,
            self.rows,
            self.exchange.unwrap_or("–"),
            self.draft_window.as_deref().unwrap_or("–"),
            self.roles.unwrap_or("–")
        )
    }
}

fn answers_of(rows: Rows, run: &Run) -> Vec<Answer> {
    let steering = |row| (rows == Rows::Prompted).then(|| prompts::steering(row));
    let answer = |(row, answered): (usize, &Answered)| Answer {
        question: prompts::question(row),
        reward_system: steering(row).map(|steering| steering.system),
        strength: steering(row).map(|steering| steering.strength),
        tokens: answered.tokens.clone(),
    };
    run.answers.iter().enumerate().map(answer).collect()
}

/// Cases of one batch that differ in one thing, and guided beside unguided.
fn comparisons(cases: &[Outcome]) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for outcome in cases {
        let case = outcome.case;
        let Some(setting) = case.guided else { continue };
        let (rows, window, roles) = (outcome.rows, window_name(setting.window), setting.roles.name());
        let with = |setting: Setting| Case { guided: Some(setting), ..case };
        let others = [
            (Case { rows: Rows::Unguided, guided: None, ..case }, "unguided"),
            (with(Setting { window: DraftWindow::Fixed(0), ..setting }), "without drafts"),
            (with(Setting { exchange: ExchangeMode::Certified, ..setting }), "certified"),
            (with(Setting { roles: Roles::Separate, ..setting }), "separate"),
        ];
        let one = (Case { rows: Rows::One, ..case }, "one preference");
        let one = (case.rows == Rows::Mixed).then_some(one);
        for (other, against) in others.into_iter().chain(one).filter(|(other, _)| *other != case) {
            let Some(other) = cases.iter().find(|candidate| candidate.case == other) else { continue };
            let ratios: Vec<f64> =
                outcome.rates.iter().zip(&other.rates).map(|(own, other)| own / other).collect();
            comparisons.push(Comparison {
                batch: case.batch,
                name: format!(
                    "{rows}, {}, drafts {window}, {roles} / {against}",
                    exchange_name(setting.exchange)
                ),
                interval_of_median: interval_of_median(&ratios),
                ratio: Spread::of(ratios),
            });
        }
    }
    comparisons
}

fn same_tokens(cases: &[Outcome]) -> bool {
    let is_same = |a: &Outcome, b: &Outcome| {
        a.batch != b.batch || a.rows != b.rows || a.tokens.iter().chain(&b.tokens).all(|t| *t == a.tokens[0])
    };
    cases.iter().enumerate().all(|(index, a)| cases[index..].iter().all(|b| is_same(a, b)))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use uniarm_proto::pb;

    use super::*;
    use crate::bench::floor::Count;

    fn run(rate: f64, token: u32) -> Run {
        let answer = Answered {
            tokens: vec![7, token],
            times: vec![Instant::now(); 2],
            exchange: pb::ExchangeUse { bytes: 512, certified: 1, queried: 1, dense: 0 },
            speculation: pb::Speculation { base_passes: 1, drafted: 4, accepted: 3 },
        };
        Run { rate, window_share: 0.5, first_token: 0.1, breakdown: None, answers: vec![answer] }
    }

    fn outcome(window: DraftWindow, rates: [f64; 3], token: u32) -> Outcome {
        let setting = Setting { exchange: ExchangeMode::Certified, window, roles: Roles::Separate };
        let case = Case { batch: 1, rows: Rows::Prompted, guided: Some(setting) };
        Outcome::of(case, &rates.map(|rate| run(rate, token)), vec![100.0, 50.0, 20.0], true)
    }

    fn report(token_with_drafts: u32) -> Report {
        let machine = Machine {
            threads_per_worker: 1,
            stream_bytes_per_second: 1.0,
            stream_bytes_per_second_together: 1.0,
            float_operations_per_second: 1.0,
            integer_operations_per_second: 1.0,
        };
        let count = Count { float: 1.0, integer: 1.0 };
        let work = Work {
            weight_bytes: 1.0,
            position_bytes: 1.0,
            token: count,
            prompt_token: count,
            attention: count,
        };
        let cases = vec![
            outcome(DraftWindow::Auto, [30.0, 20.0, 10.0], token_with_drafts),
            outcome(DraftWindow::Fixed(0), [10.0, 10.0, 10.0], 8),
        ];
        Report::new("model".to_owned(), machine, work, 1.0, cases)
    }

    #[test]
    fn the_json_has_shares_of_tokens_and_ratios_within_repeats() {
        let json = serde_json::to_value(report(8)).unwrap();
        let case = &json["cases"][0];
        assert_eq!(case["tokens_per_second"]["median"], 20.0);
        let share = serde_json::json!({ "median": 0.4, "least": 0.3, "most": 0.5 });
        assert_eq!(case["share_of_floor"], share, "each of its own look");
        assert_eq!((&case["draft_window"], &case["roles"]), (&"auto".into(), &"separate".into()));
        assert_eq!((&case["base_passes_per_token"], &case["acceptance"]), (&0.5.into(), &0.75.into()));
        assert_eq!(
            (&case["certified_share"], &case["exchange_bytes_per_token"]),
            (&0.5.into(), &256.0.into())
        );
        assert_eq!(case["answers"][0]["tokens"], serde_json::json!([7, 8]));
        let comparison = &json["comparisons"][0];
        assert_eq!(comparison["name"], "prompted, certified, drafts auto, separate / without drafts");
        assert_eq!(comparison["ratio"], serde_json::json!({ "median": 2.0, "least": 1.0, "most": 3.0 }));
        assert_eq!(comparison["interval_of_median"], serde_json::Value::Null, "of three");
        assert_eq!(json["comparisons"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn a_draft_that_changed_a_token_is_noticed() {
        assert!(report(8).same_tokens);
        assert!(!report(9).same_tokens);
    }
}
