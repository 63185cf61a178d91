//! `uniarm bench context`: what the length of the context costs an unguided answer, in its prefill and for each token.

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use uniarm_base::DraftWindow;
use uniarm_proto::{Input, Sampling};

use super::{
    args::{BenchContextArgs, Roles},
    floor::{Machine, Work},
    rig::{Pair, Rig, place},
    statistics::{Spread, bar},
};
use crate::args::{DraftRowsArg, ExchangeArgs, ExchangeMode};

/// Characters of the longest bar.
const BAR: usize = 24;

#[derive(Serialize)]
struct Report {
    model: String,
    machine: Machine,
    work: Work,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    prompt_tokens: usize,
    /// Tokens of the prompt over the time to the first token of the answer.
    prefill_tokens_per_second: Spread,
    /// Of the peak: operations of the weights alone.
    prefill_of_peak: f64,
    decode_ms: Spread,
}

pub async fn run(args: BenchContextArgs) -> anyhow::Result<()> {
    let rig = Rig::load(args.model.clone(), &args.engine).await?;
    let machine = Machine::measure(rig.threads).await?;
    let exchange = ExchangeArgs {
        exchange: ExchangeMode::Certified,
        list_length: 1,
        draft_window: DraftWindow::Fixed(0),
        draft_rows: DraftRowsArg::Auto,
        hedge_after: None,
    };
    let pair = rig.pair(&exchange, Roles::Separate)?;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
    let progress = ProgressBar::new((args.prompt_tokens.len() * args.repeats) as u64).with_style(style);
    let mut cases = Vec::new();
    for &prompt_tokens in &args.prompt_tokens {
        progress.set_message(format!("{prompt_tokens} tokens"));
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for repeat in 0..args.repeats {
            let (first, rest) = measure(&pair, prompt_tokens, repeat, args.tokens).await?;
            prefill.push(first);
            decode.push(rest);
            progress.inc(1);
        }
        let prefill = Spread::of(prefill);
        cases.push(Case {
            prompt_tokens,
            prefill_of_peak: prefill.median * machine.seconds(rig.work.prompt_token),
            prefill_tokens_per_second: prefill,
            decode_ms: Spread::of(decode),
        });
    }
    progress.finish_and_clear();
    let report = Report { model: rig.model, machine, work: rig.work, cases };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

/// Prefilled tokens per second, and milliseconds of a decoded token.
async fn measure(
    pair: &Pair,
    prompt_tokens: usize,
    repeat: usize,
    tokens: u32,
) -> anyhow::Result<(f64, f64)> {
    // Prompts of their own: no repeat profits from the cache of an earlier one.
    let prompt =
        (0..prompt_tokens).map(|index| 100 + ((repeat * 131 + prompt_tokens * 17 + index * 7) % 5000) as u32);
    let sampling = Sampling {
        temperature: 0.0,
        seed: Some(1),
        max_tokens: tokens,
        ignore_eos: true,
        ..Sampling::default()
    };
    let run = pair.run(vec![place(Input::Tokens(prompt.collect()), sampling, Vec::new())]).await?;
    Ok((prompt_tokens as f64 / run.first_token, 1e3 / run.rate))
}

// === impl Report ===

impl Report {
    fn print(&self) {
        println!("{}\n{}\n", self.work.line(&self.model), self.machine.line());
        println!(
            "{:>8} {:>18} {:>17} {:>8} {:>16} {:>13}",
            "context", "prefill, tokens/s", "range", "of peak", "decode, ms/token", "range"
        );
        let most = self.cases.iter().map(|case| case.decode_ms.median).fold(0.0, f64::max);
        for case in &self.cases {
            let (prefill, decode) = (case.prefill_tokens_per_second, case.decode_ms);
            println!(
                "{:>8} {:>18.1} {:>17} {:>6.0} % {:>16.2} {:>13}  {}",
                case.prompt_tokens,
                prefill.median,
                format!("{:.1} – {:.1}", prefill.least, prefill.most),
                100.0 * case.prefill_of_peak,
                decode.median,
                format!("{:.2} – {:.2}", decode.least, decode.most),
                bar(decode.median, most, BAR)
            );
        }
        println!("\nof peak: operations of the weights alone, without attention");
    }
}
