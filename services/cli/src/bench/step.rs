//! `uniarm bench step`: tokens per second by batch, guidance, exchange and draft window, with the floor beside it.

mod report;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use uniarm_base::DraftWindow;
use uniarm_proto::{Exchange, Placed, Sampling};

use self::report::{Outcome, Report};
use super::{
    args::{BenchStepArgs, Roles, Rows},
    floor::Machine,
    prompts,
    rig::{Pair, Rig, Run, place},
};
use crate::args::{ExchangeArgs, ExchangeMode};

/// One point of the cross product.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Case {
    batch: usize,
    rows: Rows,
    /// `None`: unguided rows know neither exchange nor drafts.
    guided: Option<Setting>,
}

/// How guided rows are computed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Setting {
    exchange: ExchangeMode,
    window: DraftWindow,
    roles: Roles,
}

/// Engines for one setting; the exchange is each request's.
struct Engines {
    window: DraftWindow,
    roles: Roles,
    pair: Pair,
}

pub async fn run(args: BenchStepArgs) -> anyhow::Result<()> {
    let rig = Rig::load(args.model.clone(), &args.engine).await?;
    let mut pairs = Vec::new();
    for &roles in &args.roles {
        for &window in &args.draft_window {
            let pair = rig.pair(&exchange_args(&args, window), roles)?;
            pairs.push(Engines { window, roles, pair });
        }
    }
    let cases = cases(&args);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
    let progress = ProgressBar::new((cases.len() * args.repeats) as u64).with_style(style);
    let (mut looks, mut outcomes) = (Vec::new(), Vec::new());
    for same_batch in cases.chunk_by(|a, b| a.batch == b.batch) {
        let mut runs: Vec<Vec<Run>> = same_batch.iter().map(|_| Vec::new()).collect();
        let first_look = looks.len();
        // Interleaved, so that what disturbs the machine disturbs all alike.
        for repeat in 0..args.repeats {
            progress.set_message("a look at the machine");
            looks.push(Machine::look(rig.threads).await?);
            let mut turn: Vec<_> = same_batch.iter().zip(&mut runs).collect();
            if repeat % 2 == 1 {
                turn.reverse();
            }
            for (case, runs) in turn {
                progress.set_message(case.name());
                runs.push(pair_of(case, &pairs).run(case.requests(&args)).await?);
                progress.inc(1);
            }
        }
        for (case, runs) in same_batch.iter().zip(runs) {
            let floor = |look: &Machine| look.tokens_per_second(rig.work, case.batch, case.guided.is_some());
            let floors: Vec<f64> = looks[first_look..].iter().map(floor).collect();
            outcomes.push(Outcome::of(*case, &runs, floors, args.answers));
        }
    }
    progress.finish_and_clear();
    let report = Report::new(rig.model, Machine::median(&looks), rig.work, args.temperature, outcomes);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    anyhow::ensure!(
        report.same_tokens,
        "tokens differ between exchange modes, draft windows, roles or repeats: that is a bug"
    );
    Ok(())
}

fn exchange_args(args: &BenchStepArgs, draft_window: DraftWindow) -> ExchangeArgs {
    ExchangeArgs {
        exchange: ExchangeMode::Certified, // each request says what it wants
        list_length: args.list_length,
        draft_window,
        draft_rows: args.draft_rows,
        hedge_after: None,
    }
}

/// The cross product in the order of its measurement: batch by batch.
fn cases(args: &BenchStepArgs) -> Vec<Case> {
    let mut cases = Vec::new();
    for &batch in &args.batch {
        for &rows in &args.rows {
            if rows == Rows::Unguided {
                cases.push(Case { batch, rows, guided: None });
                continue;
            }
            for &roles in &args.roles {
                for &exchange in &args.exchange {
                    let settings =
                        args.draft_window.iter().map(|&window| Setting { exchange, window, roles });
                    cases.extend(settings.map(|setting| Case { batch, rows, guided: Some(setting) }));
                }
            }
        }
    }
    cases
}

/// Unguided rows may run on any engine.
fn pair_of<'a>(case: &Case, engines: &'a [Engines]) -> &'a Pair {
    let is_meant = |engines: &&Engines| {
        case.guided.is_none_or(|wanted| (wanted.window, wanted.roles) == (engines.window, engines.roles))
    };
    &engines.iter().find(is_meant).expect("each setting has its engines").pair
}

// === impl Case ===

impl Case {
    fn name(&self) -> String {
        let guided = self.guided.map(|Setting { exchange, window, roles }| {
            let (exchange, window, roles) = (exchange_name(exchange), window_name(window), roles.name());
            format!(", {exchange}, draft window {window}, {roles}")
        });
        format!("batch {}, {}{}", self.batch, self.rows.name(), guided.unwrap_or_default())
    }

    fn requests(&self, args: &BenchStepArgs) -> Vec<Placed> {
        let request = |row: usize| {
            let sampling = Sampling {
                temperature: args.temperature,
                seed: Some(row as u64),
                max_tokens: args.tokens,
                ignore_eos: true,
                ..Sampling::default()
            };
            let guidance = prompts::term(self.rows, row, self.batch);
            let mut placed = place(prompts::input(row), sampling, guidance.into_iter().collect());
            placed.request.exchange = self.guided.map(|setting| match setting.exchange {
                ExchangeMode::Certified => Exchange::Certified,
                ExchangeMode::Dense => Exchange::Dense,
            });
            placed
        };
        (0..self.batch).map(request).collect()
    }
}

fn exchange_name(exchange: ExchangeMode) -> &'static str {
    match exchange {
        ExchangeMode::Certified => "certified",
        ExchangeMode::Dense => "dense",
    }
}

pub fn window_name(window: DraftWindow) -> String {
    match window {
        DraftWindow::Auto => "auto".to_owned(),
        DraftWindow::Fixed(tokens) => tokens.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::{
        args::{Cli, Command},
        bench::args::{BenchArgs, BenchCommand},
    };

    #[test]
    fn unguided_rows_stand_outside_the_product_of_exchange_and_window() {
        let line = "uniarm bench step --batch 1,16 --rows unguided,mixed --exchange certified,dense --draft-window auto,0 --roles separate,fused";
        let Command::Bench(BenchArgs { command: BenchCommand::Step(args) }) =
            Cli::parse_from(line.split(' ')).command
        else {
            panic!("another command")
        };
        let cases = cases(&args);
        assert_eq!(cases.len(), 2 * (1 + 2 * 2 * 2));
        assert_eq!(cases[0], Case { batch: 1, rows: Rows::Unguided, guided: None });
        let last =
            Setting { exchange: ExchangeMode::Dense, window: DraftWindow::Fixed(0), roles: Roles::Fused };
        assert_eq!(cases.last(), Some(&Case { batch: 16, rows: Rows::Mixed, guided: Some(last) }));
        assert!(cases.chunk_by(|a, b| a.batch == b.batch).count() == 2);
    }
}
