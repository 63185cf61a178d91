//! `uniarm simulate --calibrate`: what steps of a real model cost on this machine.

use std::{
    hint::black_box,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use uniarm_decode::{
    Chooser, History, Noise, Position, Sampling, Term, TermLogits,
    guidance::{log_sum_exp, noisy_top_list},
};
use uniarm_model::{Forward, Llama, Row};
use uniarm_simulate::cost::{Measured, StepTimes};

use crate::{
    args::EngineArgs,
    worker::{self, Threads},
};

/// What a base worker does for a token besides choosing it: text, events, metrics. The `emit` of `uniarm bench step`.
const BOOKKEEPING_SECONDS: f64 = 15e-6;

/// Time for one point: long against the clock, short against whoever else wants the machine.
const POINT_TIME: Duration = Duration::from_millis(250);

/// Measurements of a point at least.
const REPEATS_MIN: usize = 5;

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
#[derive(Clone, Copy)]
struct Trial {
    rows: usize,
    tokens: usize,
    start: usize,
    wanted: bool,
}

/// Loads a model, measures its steps alone and beside a second worker, and writes the machine file.
pub async fn run(model: Option<String>, engine: &EngineArgs, file: &Path) -> anyhow::Result<()> {
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
        let alone = step_times(&mut llama, None)?;
        let crowded = step_times(&mut llama, Some(&mut neighbour))?;
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

fn step_times(llama: &mut Llama, mut neighbour: Option<&mut Llama>) -> anyhow::Result<StepTimes> {
    let mut seconds = |trial: Trial| match neighbour.as_deref_mut() {
        None => time(llama, trial),
        Some(neighbour) => time_beside(llama, neighbour, trial),
    };
    let decode = Trial { rows: 1, tokens: 1, start: 0, wanted: false };
    let (mut layers, mut head) = (Vec::new(), Vec::new());
    for rows in ROWS {
        let plain = seconds(Trial { rows, ..decode })?;
        let whole = seconds(Trial { rows, wanted: true, ..decode })?;
        layers.push((rows, plain));
        head.push((rows, (whole - plain).max(0.0)));
    }
    for rows in PROMPT_PIECES {
        let tokens = worker::BLOCK_TOKENS;
        layers.push((rows * tokens, seconds(Trial { rows, tokens, ..decode })?));
    }
    let at = |tokens: usize| {
        let found = layers.iter().find(|point| point.0 == tokens);
        found.expect("the curve has this point").1
    };
    // Two kinds of rows, two unknowns: a decode row reads each position once for one token, a chunk for all of its own.
    let far = Trial { rows: CONTEXT_ROWS, start: CONTEXT, ..decode };
    let short = seconds(far)? - at(CONTEXT_ROWS);
    let long = seconds(Trial { rows: 1, tokens: CHUNK, start: CONTEXT - CHUNK, ..decode })? - at(CHUNK);
    let pairs = (CHUNK * (CONTEXT - CHUNK) + CHUNK * (CHUNK + 1) / 2) as f64;
    let both = (short / (CONTEXT_ROWS * (CONTEXT + 1)) as f64).max(0.0);
    let attended = ((long - both * CONTEXT as f64) / (pairs - CONTEXT as f64)).clamp(0.0, both);
    Ok(StepTimes { layers, head, context: both - attended, attended })
}

/// Median seconds of a step: what disturbs the machine now and then disturbs a cluster on it too.
fn time(llama: &mut Llama, trial: Trial) -> anyhow::Result<f64> {
    let mut logits = Vec::new();
    step_once(llama, trial, &mut logits)?;
    let (began, mut seconds) = (Instant::now(), Vec::new());
    while began.elapsed() < POINT_TIME || seconds.len() < REPEATS_MIN {
        seconds.push(step_once(llama, trial, &mut logits)?);
    }
    Ok(median(seconds))
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

/// The same while another worker does the same work all the time.
fn time_beside(llama: &mut Llama, neighbour: &mut Llama, trial: Trial) -> anyhow::Result<f64> {
    let (ready, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut logits = Vec::new();
            while !stop.load(Ordering::Relaxed) && step_once(neighbour, trial, &mut logits).is_ok() {
                ready.store(true, Ordering::Relaxed);
            }
            ready.store(true, Ordering::Relaxed);
        });
        while !ready.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        let seconds = time(llama, trial);
        stop.store(true, Ordering::Relaxed);
        seconds
    })
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
