//! Speed of a step beside what the machine can do: decoding against the memory's floor, prefill and batches
//! against the arithmetic's.
//!
//!     cargo run --release -p uniarm-model --example forward_speed -- MODEL [ADAPTER]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uniarm_model::{
    Adapter, Conditioned, Forward, Llama, LlamaOptions, ModelError, OpenOptions, Row, machine, open,
};

const BLOCK_TOKENS: usize = 16;
const BATCH_MAX: usize = 32;

/// Tokens in the cache of each row while decoding.
const CONTEXT: usize = 128;

/// A measurement is the best of so many runs: other users of the machine only ever slow it down.
const REPEATS: usize = 12;

fn main() -> Result<(), ModelError> {
    let mut arguments = std::env::args().skip(1);
    let Some(model) = arguments.next() else {
        eprintln!("usage: forward_speed MODEL [ADAPTER]");
        std::process::exit(2);
    };
    let files = open(&model, &OpenOptions::default())?;
    let began = Instant::now();
    let blocks = BATCH_MAX * (CONTEXT + 1).div_ceil(BLOCK_TOKENS);
    let options = |threads| LlamaOptions { threads, kv_blocks: blocks, block_tokens: BLOCK_TOKENS };
    let loaded = Llama::load(&files, &options(1))?;
    println!(
        "{}: {:.0} MB packed in {:.1} s",
        files.name,
        loaded.weight_bytes() as f64 / 1e6,
        began.elapsed().as_secs_f64()
    );
    let adapter = match arguments.next() {
        Some(folder) => Some(Arc::new(Adapter::load(Path::new(&folder), &files.config, &files.fingerprint)?)),
        None => None,
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for threads in [1, cores] {
        let mut model = loaded.share(&options(threads))?;
        let floors = (machine::stream_bytes_per_second(threads), machine::arithmetic_per_second(threads));
        println!("\n{threads} thread(s): {:.1} GB/s, {:.0} GFLOP/s", floors.0 / 1e9, floors.1 / 1e9);
        println!("{:>22} {:>10} {:>10} {:>10} {:>10}", "", "ms", "tokens/s", "memory", "arithmetic");
        for batch in [1, 2, 4, 8, 16, 32] {
            let seconds = step(&mut model, batch, 1, |_| None)?;
            print(&model, &format!("decode × {batch}"), batch, seconds, floors);
        }
        for tokens in [16, 64, 128] {
            let seconds = step(&mut model, 1, tokens, |_| None)?;
            print(&model, &format!("prefill of {tokens}"), tokens, seconds, floors);
        }
        if let Some(adapter) = &adapter {
            compare_preferences(&mut model, adapter, floors)?;
        }
    }
    Ok(())
}

/// Seconds of a step of `batch` rows with `tokens` tokens each: decoding continues a context, prefill starts.
fn step<'a>(
    model: &mut Llama,
    batch: usize,
    tokens: usize,
    adapter: impl Fn(usize) -> Option<&'a Conditioned>,
) -> Result<f64, ModelError> {
    let per_row = (CONTEXT + 1).div_ceil(BLOCK_TOKENS);
    let tables: Vec<Vec<u32>> = (0..batch)
        .map(|row| (row * per_row..(row + 1) * per_row).map(|block| block as u32).collect())
        .collect();
    let ids: Vec<u32> = (0..tokens as u32).map(|id| 100 + id * 7).collect();
    let rows: Vec<Row<'_>> = tables
        .iter()
        .enumerate()
        .map(|(row, blocks)| Row {
            tokens: &ids,
            start: if tokens == 1 { CONTEXT } else { 0 },
            blocks,
            logits_from: tokens - 1,
            adapter: adapter(row),
        })
        .collect();
    let mut logits = Vec::new();
    let mut best = Duration::MAX;
    for _ in 0..REPEATS {
        let began = Instant::now();
        model.forward(&rows, &mut logits)?;
        best = best.min(began.elapsed());
    }
    Ok(best.as_secs_f64())
}

/// Sixteen rows without an adapter, under one preference, and under sixteen.
fn compare_preferences(
    model: &mut Llama,
    adapter: &Arc<Adapter>,
    floors: (f64, f64),
) -> Result<(), ModelError> {
    let batch = 16;
    let objectives = adapter.objectives().len();
    let preference = |row: usize| -> Vec<f32> {
        let first = row as f32 / batch as f32;
        let mut weights = vec![0.0; objectives];
        if let [a, .., b] = &mut weights[..] {
            (*a, *b) = (first, 1.0 - first);
        } else {
            weights.fill(1.0);
        }
        weights
    };
    let conditioned: Result<Vec<Conditioned>, ModelError> =
        (0..batch).map(|row| adapter.condition(&preference(row))).collect();
    let conditioned = conditioned?;
    let one = step(model, batch, 1, |_| Some(&conditioned[3]))?;
    print(model, "one preference × 16", batch, one, floors);
    let mixed = step(model, batch, 1, |row| Some(&conditioned[row]))?;
    print(model, "16 preferences", batch, mixed, floors);
    Ok(())
}

fn print(model: &Llama, what: &str, tokens: usize, seconds: f64, (stream, arithmetic): (f64, f64)) {
    let bytes = model.weight_bytes() as f64;
    // A multiply-add for every weight and token, but for the output projection of prefill: only the last
    // token's logits are wanted.
    let head = 4.0 * (model.vocabulary() * model.config().hidden) as f64;
    let rows = if what.starts_with("prefill") { 1.0 } else { tokens as f64 };
    let operations = ((bytes - head) * tokens as f64 + head * rows) / 2.0;
    println!(
        "{what:>22} {:>10.2} {:>10.1} {:>9.0}% {:>9.0}%",
        seconds * 1e3,
        tokens as f64 / seconds,
        100.0 * bytes / seconds / stream,
        100.0 * operations / seconds / arithmetic,
    );
}
