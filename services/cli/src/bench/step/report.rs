//! What a measurement of steps says: its cases, what they are to each other, and where the time went.

use serde::Serialize;
use uniarm_base::DraftWindow;

use super::{Case, exchange_name, window_name};
use crate::{
    args::ExchangeMode,
    bench::{
        args::Rows,
        breakdown::Breakdown,
        floor::{Machine, Work},
        prompts,
        rig::{Answered, Run},
        statistics::{Spread, bar},
    },
};

/// Characters of the longest bar.
const BAR: usize = 20;

#[derive(Serialize)]
pub struct Report {
    model: String,
    machine: Machine,
    work: Work,
    temperature: f32,
    cases: Vec<Outcome>,
    comparisons: Vec<Comparison>,
    /// Whether exchange and draft window left every token as it was.
    same_tokens: bool,
}

#[derive(Serialize)]
pub struct Outcome {
    batch: usize,
    rows: &'static str,
    exchange: Option<&'static str>,
    draft_window: Option<String>,
    tokens_per_second: Spread,
    /// Of a step for each token: drafts may do better.
    floor_tokens_per_second: f64,
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
             the memory\ntemperature {}; of the window while all rows of a batch run\n",
            self.temperature
        );
        self.print_rates();
        self.print_breakdown();
        for Comparison { batch, name, ratio } in &self.comparisons {
            println!(
                "batch {batch:>2}: {name:42} {:.3}  ({:.3} – {:.3})",
                ratio.median, ratio.least, ratio.most
            );
        }
        if !self.same_tokens {
            println!("\nTOKENS DIFFER between exchange modes, draft windows or repeats: that is a bug");
        }
    }

    fn print_rates(&self) {
        println!(
            "{:>5}  {:17} {:9} {:>6} {:>9} {:>15} {:>8} {:>6} {:>7} {:>7} {:>9} {:>8}",
            "batch",
            "rows",
            "exchange",
            "drafts",
            "tokens/s",
            "range",
            "floor",
            "of it",
            "passes",
            "accept",
            "certified",
            "bytes"
        );
        let most = self.cases.iter().map(|case| case.tokens_per_second.median).fold(0.0, f64::max);
        for case in &self.cases {
            let Spread { median, least, most: highest } = case.tokens_per_second;
            println!(
                "{:>5}  {:17} {:9} {:>6} {median:>9.1} {:>15} {:>8.1} {:>4.0} % {:>7.3} {:>7} {:>9} {:>8}  {}",
                case.batch,
                case.rows,
                case.exchange.unwrap_or("–"),
                case.draft_window.as_deref().unwrap_or("–"),
                format!("{least:.1} – {highest:.1}"),
                case.floor_tokens_per_second,
                100.0 * median / case.floor_tokens_per_second,
                case.base_passes_per_token,
                case.acceptance.map_or("–".to_owned(), |share| format!("{share:.2}")),
                case.certified_share.map_or("–".to_owned(), |share| format!("{:.1} %", 100.0 * share)),
                case.exchange_bytes_per_token.map_or("–".to_owned(), |bytes| format!("{bytes:.0}")),
                bar(median, most, BAR)
            );
        }
        println!(
            "passes: of the base model for each token; accept: drafts that were right; bytes: of reward logits \
             for each token\n"
        );
    }

    fn print_breakdown(&self) {
        println!("where a base step's time goes, in microseconds; of a reward step its forward and its lists");
        println!(
            "{:>5}  {:17} {:9} {:>6} {:>8} {:>8} {:>8} {:>7} {:>7} {:>8} {:>7} {:>14} {:>12}",
            "batch",
            "rows",
            "exchange",
            "drafts",
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
                "{:>5}  {:17} {:9} {:>6} {:>8.0} {:>8.0} {:>8.0} {:>7.0} {:>7.0} {:>8.0} {:>7.0} {:>14.0} {:>12.0}",
                case.batch,
                case.rows,
                case.exchange.unwrap_or("–"),
                case.draft_window.as_deref().unwrap_or("–"),
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
    pub fn of(case: Case, runs: &[Run], floor: f64, with_answers: bool) -> Self {
        let rates: Vec<f64> = runs.iter().map(|run| run.rate).collect();
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
            exchange: case.guided.map(|(exchange, _)| exchange_name(exchange)),
            draft_window: case.guided.map(|(_, window)| window_name(window)),
            tokens_per_second: spread,
            floor_tokens_per_second: floor,
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

/// Cases of one batch that differ in one thing.
fn comparisons(cases: &[Outcome]) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for case in cases {
        let Some((exchange, window)) = case.case.guided else { continue };
        let without_drafts = Some((exchange, DraftWindow::Fixed(0)));
        let certified = Some((ExchangeMode::Certified, window));
        let unguided = Case { rows: Rows::Unguided, guided: None, ..case.case };
        let mut compare = |wanted: bool, other: Case, name: String| {
            let other = cases.iter().find(|candidate| candidate.case == other);
            if let (true, Some(other)) = (wanted && other.is_some_and(|o| o.case != case.case), other) {
                let ratios = case.rates.iter().zip(&other.rates).map(|(case, other)| case / other);
                comparisons.push(Comparison { batch: case.batch, name, ratio: Spread::of(ratios.collect()) });
            }
        };
        let rows = case.rows;
        let window_name = window_name(window);
        let one = Case { rows: Rows::One, ..case.case };
        compare(case.case.rows == Rows::Mixed, one, format!("mixed / one preference, drafts {window_name}"));
        let plain = Case { guided: without_drafts, ..case.case };
        compare(true, plain, format!("{rows}: drafts {window_name} / 0"));
        let listed = Case { guided: certified, ..case.case };
        compare(true, listed, format!("{rows}: dense / certified, drafts {window_name}"));
        compare(true, unguided, format!("{rows}, drafts {window_name} / unguided"));
    }
    comparisons
}

fn same_tokens(cases: &[Outcome]) -> bool {
    let is_same = |a: &Outcome, b: &Outcome| {
        a.batch != b.batch || a.rows != b.rows || a.tokens.iter().chain(&b.tokens).all(|t| *t == a.tokens[0])
    };
    cases.iter().enumerate().all(|(index, a)| cases[index..].iter().all(|b| is_same(a, b)))
}
