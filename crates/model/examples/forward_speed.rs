//! Speed of a step beside what the machine can do: decoding against the memory's floor, prefill and batches
//! against the arithmetic's.
//!
//!     cargo run --release -p uniarm-model --example forward_speed -- MODEL [ADAPTER]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uniarm_model::{
    Adapter, Conditioned, Forward, Llama, LlamaOptions, ModelError, OpenOptions, Operations, Row, machine,
    open,
};

const BLOCK_TOKENS: usize = 16;
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const PREFILLS: [usize; 4] = [16, 64, 128, 512];

/// Tokens in the cache of each row while decoding, and those of a short and a long context.
const CONTEXT: usize = 128;
const CONTEXTS: [usize; 2] = [100, 2000];

/// Blocks of the cache: the largest of the steps below.
const BLOCKS: usize = 32 * (CONTEXT + 1).div_ceil(BLOCK_TOKENS);

/// A measurement is the best of so many runs: other users of the machine only ever slow it down.
const REPEATS: usize = 12;

/// A step's shape.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    /// Tokens of each row that are computed, and those that precede them.
    tokens: usize,
    context: usize,
}

/// What the machine does at most: bytes per second, and operations per second of either arithmetic.
struct Peaks {
    stream: f64,
    float: f64,
    integer: f64,
}

fn main() -> Result<(), ModelError> {
    let mut arguments = std::env::args().skip(1);
    let Some(model) = arguments.next() else {
        eprintln!("usage: forward_speed MODEL [ADAPTER]");
        std::process::exit(2);
    };
    let files = open(&model, &OpenOptions::default())?;
    let began = Instant::now();
    let options = |threads| LlamaOptions {
        threads,
        kv_blocks: BLOCKS,
        block_tokens: BLOCK_TOKENS,
        ..LlamaOptions::default()
    };
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
        fill(&mut model)?;
        let peaks = Peaks::measure(threads);
        println!(
            "\n{threads} thread(s): {:.1} GB/s, {:.0} GFLOP/s, {:.0} Gop/s in integers",
            peaks.stream / 1e9,
            peaks.float / 1e9,
            peaks.integer / 1e9
        );
        println!("{:>22} {:>10} {:>10} {:>10} {:>10}", "", "ms", "tokens/s", "memory", "arithmetic");
        measure_backbone(&mut model, &peaks)?;
        if let Some(adapter) = &adapter {
            compare_preferences(&mut model, adapter, &peaks)?;
        }
    }
    Ok(())
}

fn measure_backbone(model: &mut Llama, peaks: &Peaks) -> Result<(), ModelError> {
    for rows in BATCHES {
        let shape = Shape { rows, tokens: 1, context: CONTEXT };
        let seconds = step(model, shape, |_| None)?;
        peaks.print(model, &format!("decode × {rows}"), shape, seconds);
    }
    for tokens in PREFILLS {
        let shape = Shape { rows: 1, tokens, context: 0 };
        let seconds = step(model, shape, |_| None)?;
        peaks.print(model, &format!("prefill of {tokens}"), shape, seconds);
    }
    for context in CONTEXTS {
        let shape = Shape { rows: 1, tokens: 1, context };
        let seconds = step(model, shape, |_| None)?;
        peaks.print(model, &format!("decode after {context}"), shape, seconds);
    }
    Ok(())
}

/// Writes every block of the cache: memory that was never written is no memory yet.
fn fill(model: &mut Llama) -> Result<(), ModelError> {
    let ids: Vec<u32> = (0..BLOCK_TOKENS as u32).map(|id| 100 + id * 7).collect();
    for block in 0..BLOCKS as u32 {
        let row = Row { tokens: &ids, start: 0, blocks: &[block], logits_from: ids.len(), adapter: None };
        model.forward(&[row], &mut Vec::new())?;
    }
    Ok(())
}

/// Sixteen rows under one preference, and under sixteen.
fn compare_preferences(model: &mut Llama, adapter: &Arc<Adapter>, peaks: &Peaks) -> Result<(), ModelError> {
    let shape = Shape { rows: 16, tokens: 1, context: CONTEXT };
    let objectives = adapter.objectives().len();
    let preference = |row: usize| -> Vec<f32> {
        let first = row as f32 / shape.rows as f32;
        let mut weights = vec![0.0; objectives];
        if let [a, .., b] = &mut weights[..] {
            (*a, *b) = (first, 1.0 - first);
        } else {
            weights.fill(1.0);
        }
        weights
    };
    let conditioned: Result<Vec<Conditioned>, ModelError> =
        (0..shape.rows).map(|row| adapter.condition(&preference(row))).collect();
    let conditioned = conditioned?;
    let one = step(model, shape, |_| Some(&conditioned[3]))?;
    peaks.print(model, "one preference × 16", shape, one);
    let mixed = step(model, shape, |row| Some(&conditioned[row]))?;
    peaks.print(model, "16 preferences", shape, mixed);
    Ok(())
}

/// Seconds of a step; what the cache holds of other sequences will do for a context.
fn step<'a>(
    model: &mut Llama,
    Shape { rows, tokens, context }: Shape,
    adapter: impl Fn(usize) -> Option<&'a Conditioned>,
) -> Result<f64, ModelError> {
    let per_row = (context + tokens).div_ceil(BLOCK_TOKENS);
    let tables: Vec<Vec<u32>> = (0..rows)
        .map(|row| (row * per_row..(row + 1) * per_row).map(|block| block as u32).collect())
        .collect();
    let ids: Vec<u32> = (0..tokens as u32).map(|id| 100 + id * 7).collect();
    let row = |(index, blocks)| {
        let adapter = adapter(index);
        Row { tokens: &ids, start: context, blocks, logits_from: tokens - 1, adapter }
    };
    let rows: Vec<Row<'_>> = tables.iter().map(Vec::as_slice).enumerate().map(row).collect();
    let mut logits = Vec::new();
    let mut best = Duration::MAX;
    for _ in 0..REPEATS {
        let began = Instant::now();
        model.forward(&rows, &mut logits)?;
        best = best.min(began.elapsed());
    }
    Ok(best.as_secs_f64())
}

impl Peaks {
    fn measure(threads: usize) -> Self {
        Self {
            stream: machine::stream_bytes_per_second(threads),
            float: machine::arithmetic_per_second(threads),
            integer: machine::integer_arithmetic_per_second(threads),
        }
    }

    fn print(&self, model: &Llama, what: &str, shape: Shape, seconds: f64) {
        let tokens = (shape.rows * shape.tokens) as f64;
        let least = |operations: Operations| {
            operations.float as f64 / self.float + operations.integer as f64 / self.integer
        };
        // Only the last token of a row needs the output projection.
        let (all, head) = (least(model.operations()), least(model.head_operations()));
        let least = tokens * (all - head) + shape.rows as f64 * head;
        println!(
            "{what:>22} {:>10.2} {:>10.1} {:>9.0}% {:>9.0}%",
            seconds * 1e3,
            tokens / seconds,
            100.0 * model.weight_bytes() as f64 / seconds / self.stream,
            100.0 * least / seconds,
        );
    }
}
