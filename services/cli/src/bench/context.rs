//! `uniarm bench context`: what the length of the context costs an unguided answer, in its prefill and for each token.

mod turns;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use uniarm_base::DraftWindow;
use uniarm_proto::{Input, Sampling};

use self::turns::{Turns, prompt};
use super::{
    args::{BenchContextArgs, Roles},
    floor::{Machine, Work},
    rig::{Pair, Rig, place},
    statistics::{Spread, bar},
};
use crate::args::{DraftRowsArg, ExchangeArgs, ExchangeMode};

/// Of an answer whose first one is what is waited for: a batch is measured from there to its end.
const TOKENS_AFTER_PREFILL: u32 = 2;

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
    /// The time in which the operations of the weights and of attention take place at their peaks, over what it takes.
    prefill_of_peak: Spread,
    /// A step.
    decode_ms: Spread,
    /// The time in which weights, keys and values of a token are streamed, over what it takes.
    decode_of_floor: Spread,
    /// What a token costs more than after the first length, over the time in which the keys and values that it reads more are
    /// streamed. None for the first, and for shorter ones.
    growth_of_floor: Option<Spread>,
}

/// One length's repeats.
#[derive(Clone, Default)]
struct Measured {
    prefill: Vec<f64>,
    of_peak: Vec<f64>,
    decode: Vec<f64>,
    of_floor: Vec<f64>,
    growth: Vec<f64>,
}

pub async fn run(args: BenchContextArgs) -> anyhow::Result<()> {
    let rig = Rig::load(args.model.clone(), &args.engine).await?;
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
    progress.set_message("contexts for steps in turns");
    let steps = args.tokens as usize;
    let (model, lengths) = (rig.base_model()?, args.prompt_tokens.clone());
    let mut turns = tokio::task::spawn_blocking(move || Turns::new(model, &lengths, steps)).await??;
    let mut looks = Vec::new();
    let mut measured = vec![Measured::default(); args.prompt_tokens.len()];
    for repeat in 0..args.repeats {
        // All lengths within one look at the machine.
        progress.set_message("a look at the machine");
        let look = Machine::look(rig.threads).await?;
        let stream = look.stream_bytes_per_second;
        looks.push(look);
        progress.set_message("steps in turns");
        let measuring = tokio::task::spawn_blocking(move || (turns.measure(steps), turns));
        let decoded;
        (decoded, turns) = measuring.await?;
        let mut shortest = None;
        for ((&prompt_tokens, measured), decode) in args.prompt_tokens.iter().zip(&mut measured).zip(decoded?)
        {
            progress.set_message(format!("a prompt of {prompt_tokens} tokens"));
            let prefill = prefill_rate(&pair, prompt_tokens, repeat).await?;
            measured.prefill.push(prefill);
            let least = look.seconds(rig.work.prompt(prompt_tokens));
            measured.of_peak.push(least * prefill / prompt_tokens as f64);
            measured.decode.push(decode);
            let read = rig.work.weight_bytes
                + rig.work.position_bytes * (prompt_tokens as f64 + f64::from(args.tokens) / 2.0);
            measured.of_floor.push(1e3 * read / stream / decode);
            let (of_tokens, of_decode) = *shortest.get_or_insert((prompt_tokens, decode));
            if prompt_tokens > of_tokens {
                let bytes = rig.work.position_bytes * (prompt_tokens - of_tokens) as f64;
                measured.growth.push((decode - of_decode) / (1e3 * bytes / stream));
            }
            progress.inc(1);
        }
    }
    let cases = args.prompt_tokens.iter().zip(measured).map(|(&prompt_tokens, measured)| Case {
        prompt_tokens,
        prefill_tokens_per_second: Spread::of(measured.prefill),
        prefill_of_peak: Spread::of(measured.of_peak),
        decode_ms: Spread::of(measured.decode),
        decode_of_floor: Spread::of(measured.of_floor),
        growth_of_floor: (!measured.growth.is_empty()).then(|| Spread::of(measured.growth)),
    });
    let cases = cases.collect();
    progress.finish_and_clear();
    let report = Report { model: rig.model, machine: Machine::median(&looks), work: rig.work, cases };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

/// Prefilled tokens per second.
async fn prefill_rate(pair: &Pair, prompt_tokens: usize, repeat: usize) -> anyhow::Result<f64> {
    let sampling = Sampling {
        temperature: 0.0,
        seed: Some(1),
        max_tokens: TOKENS_AFTER_PREFILL,
        ignore_eos: true,
        ..Sampling::default()
    };
    let input = Input::Tokens(prompt(prompt_tokens, repeat));
    let run = pair.run(vec![place(input, sampling, Vec::new())]).await?;
    Ok(prompt_tokens as f64 / run.first_token)
}

// === impl Report ===

impl Report {
    fn print(&self) {
        println!("{}\n{}\n", self.work.line(&self.model), self.machine.line());
        println!(
            "{:>8} {:>18} {:>17} {:>8} {:>16} {:>13} {:>8} {:>13}",
            "context", "prefill, tokens/s", "range", "of peak", "decode, ms/step", "range", "growth", "range"
        );
        let most = self.cases.iter().map(|case| case.decode_ms.median).fold(0.0, f64::max);
        for case in &self.cases {
            let (prefill, decode) = (case.prefill_tokens_per_second, case.decode_ms);
            let (growth, range) = case.growth_of_floor.map_or_else(
                || ("–".to_owned(), String::new()),
                |growth| {
                    (format!("{:.2}", growth.median), format!("{:.2} – {:.2}", growth.least, growth.most))
                },
            );
            println!(
                "{:>8} {:>18.1} {:>17} {:>6.0} % {:>16.2} {:>13} {:>6.0} % {growth:>8} {range:>13}  {}",
                case.prompt_tokens,
                prefill.median,
                format!("{:.1} – {:.1}", prefill.least, prefill.most),
                100.0 * case.prefill_of_peak.median,
                decode.median,
                format!("{:.2} – {:.2}", decode.least, decode.most),
                100.0 * case.decode_of_floor.median,
                bar(decode.median, most, BAR)
            );
        }
        println!(
            "\nof peak: the time of a prompt's operations at their peaks, the weights' and attention's, over what it takes\n\
             floor: the time in which a token's weights, keys and values are streamed from memory, as measured just before each repeat\n\
             growth: what a step costs more than after the first length, over the time in which the keys and values that it \
             reads more are streamed\ndecode steps of all lengths take turns: what a last-level cache holds for the next step, it holds for each of them alike"
        );
    }
}
