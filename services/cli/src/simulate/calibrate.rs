//! `uniarm simulate --calibrate`: what steps of a real model cost on this machine.

use std::{
    collections::HashMap,
    hint::black_box,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use uniarm_decode::{
    Chooser, History, Noise, Position, Sampling, Term, TermLogits,
    guidance::{log_sum_exp, noisy_top_list},
};
use uniarm_model::{Forward, Llama, Row};
use uniarm_simulate::cost::{Measured, StepTimes, Swings};

use crate::{
    args::EngineArgs,
    worker::{self, Threads},
};

/// What a base worker does for a token besides choosing it: text, events, metrics. The `emit` of `uniarm bench step`.
const BOOKKEEPING_SECONDS: f64 = 15e-6;

/// Time for one turn, of one step at least.
const TURN: Duration = Duration::from_millis(40);

/// Of the prompt before each turn, in pieces of a block. A worker's steps stand between prompts, which leave little of the weights in the
/// last-level cache: a step that is only repeated finds all of them there, and takes two thirds of the time.
const PIECES_BEFORE: usize = 4;

/// Rest before that prompt. Cores that never rest keep more of a shared host than a worker's do, which wait for requests: their
/// arithmetic was half as fast again.
const REST: Duration = Duration::from_millis(100);

/// Rows of the layers' curve; beyond the last, prompts in pieces of a block.
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const PROMPT_PIECES: [usize; 2] = [8, 16];

/// Tokens in the cache of the rows that attention is measured with, and how many there are.
const CONTEXT: usize = 1008;
const CONTEXT_ROWS: usize = 2;

/// Tokens of the chunk that attends to as many.
const CHUNK: usize = 256;

/// Length of the lists.
const LIST_LENGTH: usize = 32;

/// One kind of step: `rows` rows of `tokens` tokens each, from position `start`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Trial {
    rows: usize,
    tokens: usize,
    start: usize,
    wanted: bool,
}

/// Seconds of every kind of step, as often as it was taken.
#[derive(Default)]
struct Turns {
    seconds: HashMap<Trial, Vec<f64>>,
    /// Those of single tokens and of the prompts before them, in the order in which they were taken.
    order: Vec<(Trial, f64)>,
}

/// Loads a model, measures its steps alone and beside a second worker, and writes the machine file.
pub async fn run(
    model: Option<String>,
    engine: &EngineArgs,
    rounds: usize,
    file: &Path,
) -> anyhow::Result<()> {
    let source = match model {
        Some(model) => model,
        None => worker::demo_model().await?,
    };
    let loaded = worker::load(source, engine, Threads::Half).await?;
    let mut neighbour = worker::share(&loaded, engine, Threads::Half)?;
    let mut llama = loaded.llama;
    let threads = worker::threads(engine, Threads::Half);
    let kv_tokens = engine.kv_tokens;
    let what = format!("{}, {threads} thread(s) of this machine", loaded.files.name);
    let measured = tokio::task::spawn_blocking(move || {
        fill(&mut llama)?;
        fill(&mut neighbour)?;
        let ([alone, crowded], swings) = step_times(&mut llama, &mut neighbour, rounds)?;
        let [choose_unguided, choose_guided, list, draft] = choosing(&mut llama)?;
        let vocabulary = llama.vocabulary();
        anyhow::Ok(Measured {
            what,
            kv_tokens,
            vocabulary,
            alone,
            crowded,
            choose_unguided,
            choose_guided,
            list,
            draft,
            swings,
        })
    });
    let measured = measured.await.context("measuring panicked")??;
    let text = serde_json::to_string_pretty(&measured)? + "\n";
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    let [one, many] = [0, 4].map(|point| {
        let rows = measured.alone.layers[point].0;
        (rows, (measured.alone.layers[point].1 + measured.alone.head[point].1) * 1e3)
    });
    println!("{}: {:.1} ms for {} row, {:.1} ms for {}", measured.what, one.1, one.0, many.1, many.0);
    println!("wrote {}", file.display());
    Ok(())
}

/// Writes the cache that the trials read: what was never written costs nothing to read.
fn fill(llama: &mut Llama) -> anyhow::Result<()> {
    let mut logits = Vec::new();
    for start in (0..CONTEXT).step_by(CHUNK) {
        let tokens = vec![1; CHUNK.min(CONTEXT - start)];
        for row in 0..CONTEXT_ROWS {
            let blocks = table(row);
            let row =
                Row { tokens: &tokens, start, blocks: &blocks, logits_from: tokens.len(), adapter: None };
            llama.forward(&[row], &mut logits)?;
        }
    }
    Ok(())
}

/// The blocks of a row: its own.
fn table(row: usize) -> Vec<u32> {
    let blocks = (CONTEXT + CHUNK) / worker::BLOCK_TOKENS;
    (0..blocks).map(|block| (row * blocks + block) as u32).collect()
}

/// Times of steps alone on the machine, and beside a neighbour that does the same. Kinds of steps take turns: a minute that
/// neighbours of the machine disturb disturbs all of them alike.
fn step_times(
    llama: &mut Llama,
    neighbour: &mut Llama,
    rounds: usize,
) -> anyhow::Result<([StepTimes; 2], Swings)> {
    let trials = trials();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
    let progress = ProgressBar::new((rounds * 2 * trials.len()) as u64).with_style(style);
    let (mut alone, mut crowded, mut logits) = (Turns::default(), Turns::default(), Vec::new());
    for _ in 0..rounds {
        for &trial in &trials {
            progress.set_message("steps alone");
            turn(llama, trial, &mut logits, &mut alone)?;
            progress.inc(1);
        }
        for &trial in &trials {
            progress.set_message("steps beside another worker's");
            turn_beside((&mut *llama, neighbour), trial, &mut logits, &mut crowded)?;
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let mut swings = Swings::default();
    alone.swings(&mut swings);
    crowded.swings(&mut swings);
    Ok(([alone.times(), crowded.times()], swings))
}

/// Every kind of step that is measured, in the order of a round.
fn trials() -> Vec<Trial> {
    let of_rows = ROWS.iter().flat_map(|&rows| [Trial::decode(rows), Trial::decode(rows).with_logits()]);
    let of_pieces = PROMPT_PIECES.map(Trial::prompt);
    of_rows.chain(of_pieces).chain([Trial::FAR, Trial::CHUNK]).collect()
}

/// One turn: rest, a prompt, and one step after another.
fn turn(llama: &mut Llama, trial: Trial, logits: &mut Vec<f32>, turns: &mut Turns) -> anyhow::Result<()> {
    thread::sleep(REST);
    turns.add(Trial::BEFORE, step_once(llama, Trial::BEFORE, logits)?);
    steps(llama, trial, logits, turns)
}

/// The same while another worker does the same work all the time.
fn turn_beside(
    (llama, neighbour): (&mut Llama, &mut Llama),
    trial: Trial,
    logits: &mut Vec<f32>,
    turns: &mut Turns,
) -> anyhow::Result<()> {
    let (ready, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::sleep(REST);
    thread::scope(|scope| {
        let beside = scope.spawn(|| {
            let mut logits = Vec::new();
            let mut taken = step_once(neighbour, Trial::BEFORE, &mut logits);
            ready.store(true, Ordering::Relaxed);
            while taken.is_ok() && !stop.load(Ordering::Relaxed) {
                taken = step_once(neighbour, trial, &mut logits);
            }
            taken
        });
        let before = step_once(llama, Trial::BEFORE, logits);
        while !ready.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        let taken = before.and_then(|seconds| {
            turns.add(Trial::BEFORE, seconds);
            steps(llama, trial, logits, turns)
        });
        stop.store(true, Ordering::Relaxed);
        beside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        taken
    })
}

/// One step after another, as long as the turn is.
fn steps(llama: &mut Llama, trial: Trial, logits: &mut Vec<f32>, turns: &mut Turns) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        turns.add(trial, step_once(llama, trial, logits)?);
        if began.elapsed() >= TURN {
            return Ok(());
        }
    }
}

/// Seconds of one step; `logits` keep their memory from step to step, as an engine's do.
fn step_once(llama: &mut Llama, trial: Trial, logits: &mut Vec<f32>) -> anyhow::Result<f64> {
    let tokens = vec![1; trial.tokens];
    let blocks: Vec<Vec<u32>> = (0..trial.rows).map(table_of(trial)).collect();
    let logits_from = if trial.wanted { 0 } else { trial.tokens };
    let row = |blocks| Row { tokens: &tokens, start: trial.start, blocks, logits_from, adapter: None };
    let rows: Vec<Row<'_>> = blocks.iter().map(|blocks| row(blocks)).collect();
    let began = Instant::now();
    llama.forward(&rows, logits)?;
    Ok(began.elapsed().as_secs_f64())
}

/// Rows with a context have the blocks that were filled; the others one each.
fn table_of(trial: Trial) -> impl Fn(usize) -> Vec<u32> {
    move |row| if trial.start > 0 { table(row) } else { vec![row as u32] }
}

/// Seconds by which a token is chosen without and with guidance, and by which a list and a draft are made.
fn choosing(llama: &mut Llama) -> anyhow::Result<[f64; 4]> {
    let vocabulary = llama.vocabulary();
    let row = |token: u32, llama: &mut Llama| {
        let mut logits = Vec::new();
        let row = Row { tokens: &[token, 2, 3], start: 0, blocks: &[0], logits_from: 2, adapter: None };
        llama.forward(&[row], &mut logits)?;
        anyhow::Ok(logits)
    };
    let (base, reward) = (row(1, llama)?, row(5, llama)?); // (vocabulary)
    let (noise, sampling, history) = (Noise::new(7, 0), Sampling::default(), History::new(&[1, 2, 3]));
    let mut chooser = Chooser::new(vocabulary);
    let mut choose = |terms: &[Term<'_>], position: u32| {
        // A step's rows come from the last level of cache: a copy stands for reading one from there.
        let base = black_box(base.clone());
        let at =
            Position { base: &base, terms, sampling: &sampling, history: &history, noise: &noise, position };
        black_box(chooser.choose(&at));
    };
    let unguided = time_positions(|position| choose(&[], position));
    let lists: Vec<_> = (0..64).map(|at| noisy_top_list(&reward, LIST_LENGTH, 1.0, &noise, at)).collect();
    let guided = time_positions(|position| {
        let list = &lists[position as usize % lists.len()];
        choose(&[Term { strength: 1.0, logits: TermLogits::List(list) }], position % lists.len() as u32);
    });
    let list = time_positions(|position| {
        let row = black_box(reward.clone());
        black_box(log_sum_exp(&row));
        black_box(noisy_top_list(&row, LIST_LENGTH, 1.0, &noise, position));
    });
    let draft = time_positions(|position| {
        choose(&[Term { strength: 1.0, logits: TermLogits::Dense(&reward) }], position);
    });
    Ok([unguided + BOOKKEEPING_SECONDS, guided + BOOKKEEPING_SECONDS, list, draft])
}

fn time_positions(mut run: impl FnMut(u32)) -> f64 {
    let seconds = |position| {
        let began = Instant::now();
        run(position);
        began.elapsed().as_secs_f64()
    };
    median((0..500).map(seconds).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

// === impl Trial ===

impl Trial {
    /// The prompt before a turn.
    const BEFORE: Self = Self::prompt(PIECES_BEFORE);

    /// Rows that read a context.
    const FAR: Self = Self { rows: CONTEXT_ROWS, tokens: 1, start: CONTEXT, wanted: false };

    /// A part of a prompt that reads as much.
    const CHUNK: Self = Self { rows: 1, tokens: CHUNK, start: CONTEXT - CHUNK, wanted: false };

    const fn decode(rows: usize) -> Self {
        Self { rows, tokens: 1, start: 0, wanted: false }
    }

    const fn with_logits(self) -> Self {
        Self { wanted: true, ..self }
    }

    const fn prompt(pieces: usize) -> Self {
        Self { rows: pieces, tokens: worker::BLOCK_TOKENS, start: 0, wanted: false }
    }
}

// === impl Turns ===

impl Turns {
    fn add(&mut self, trial: Trial, seconds: f64) {
        self.seconds.entry(trial).or_default().push(seconds);
        if trial.tokens == 1 || trial == Trial::BEFORE {
            self.order.push((trial, seconds));
        }
    }

    /// Medians: what disturbs the machine now and then is in the swings.
    fn at(&self, trial: Trial) -> f64 {
        median(self.seconds.get(&trial).expect("every kind had its turns").clone())
    }

    /// Adds what single steps took over the times of their kinds.
    fn swings(&self, swings: &mut Swings) {
        let mut times = HashMap::new();
        for &(trial, seconds) in &self.order {
            let swing = seconds / *times.entry(trial).or_insert_with(|| self.at(trial));
            if trial == Trial::BEFORE { &mut swings.prompts } else { &mut swings.decode }.push(swing);
        }
    }

    fn times(&self) -> StepTimes {
        let at = |trial| self.at(trial);
        let (mut layers, mut head) = (Vec::new(), Vec::new());
        for rows in ROWS {
            let (plain, whole) = (at(Trial::decode(rows)), at(Trial::decode(rows).with_logits()));
            // So many tokens are rather a prompt, and those before each turn were seen most often.
            let is_prompt = rows == PIECES_BEFORE * worker::BLOCK_TOKENS;
            layers.push((rows, if is_prompt { at(Trial::BEFORE) } else { plain }));
            head.push((rows, (whole - plain).max(0.0)));
        }
        for pieces in PROMPT_PIECES {
            layers.push((pieces * worker::BLOCK_TOKENS, at(Trial::prompt(pieces))));
        }
        let (far, chunk) = (at(Trial::FAR), at(Trial::CHUNK));
        let without_context = |tokens: usize| {
            let found = layers.iter().find(|point| point.0 == tokens);
            found.expect("the curve has this point").1
        };
        // Two kinds of rows, two unknowns: a decode row reads each position once for one token, a chunk for all of its own.
        let short = far - without_context(CONTEXT_ROWS);
        let long = chunk - without_context(CHUNK);
        let pairs = (CHUNK * (CONTEXT - CHUNK) + CHUNK * (CHUNK + 1) / 2) as f64;
        let both = (short / (CONTEXT_ROWS * (CONTEXT + 1)) as f64).max(0.0);
        let attended = ((long - both * CONTEXT as f64) / (pairs - CONTEXT as f64)).clamp(0.0, both);
        StepTimes { layers, head, context: both - attended, attended }
    }
}
