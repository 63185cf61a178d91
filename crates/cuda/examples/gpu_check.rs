//! A model on a real GPU beside the same model on the CPU: errors of products and logits, bits of batches, lists of the likeliest
//! tokens, and the speed of decoding.
//!
//!     cargo run --release -p uniarm-cuda --example gpu_check -- MODEL

use std::process::ExitCode;
use std::time::Instant;

use uniarm_cuda::{CudaLlama, CudaOptions, Products, WeightFormat, list_rows};
use uniarm_engine::likeliest::rank;
use uniarm_model::{
    Forward, Likeliest, Lists, Llama, LlamaOptions, ModelError, ModelFiles, NoiseAt, OpenOptions, Row, open,
};

const BLOCK_TOKENS: usize = 16;
const BATCHES: [usize; 3] = [1, 8, 32];

/// Tokens of each row when it decodes: those of its prompt and those that follow, of which the first ones are not timed.
const PROMPT: usize = 128;
const DECODED: usize = 96;
const WARM_UP: usize = 32;

const BLOCKS_OF_A_ROW: usize = (PROMPT + DECODED).div_ceil(BLOCK_TOKENS);
const BLOCKS: usize = BATCHES[BATCHES.len() - 1] * BLOCKS_OF_A_ROW;

/// Of the largest logit. Weights of 16 bits are compared with those of 32.
const TOLERANCES: [(WeightFormat, f32); 2] = [(WeightFormat::F32, 1e-4), (WeightFormat::Bf16, 2e-2)];

/// Of the sum of magnitudes: products of bf16 beside sums in f64. A term that is lost would show by 1e-5.
const PRODUCT_TOLERANCE: f64 = 1e-6;

fn main() -> ExitCode {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: gpu_check MODEL");
        return ExitCode::from(2);
    };
    match open(&model, &OpenOptions::default()).and_then(|files| check(&files)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu_check: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything is as it should be.
fn check(files: &ModelFiles) -> Result<bool, ModelError> {
    let load = |weights, graphs| {
        let options =
            CudaOptions { device: 0, kv_blocks: BLOCKS, block_tokens: BLOCK_TOKENS, weights, graphs };
        CudaLlama::load(files, &options)
    };
    // Whether there is a GPU shows before the CPU is asked for anything.
    let mut gpu = load(WeightFormat::F32, true)?;
    println!("{} on {}", files.name, gpu.device_name());
    let options =
        LlamaOptions { kv_blocks: BLOCKS_OF_A_ROW, block_tokens: BLOCK_TOKENS, ..LlamaOptions::default() };
    let expected = prompt_logits(&mut Llama::load_widened(files, &options)?)?;
    let listed = lists_are_the_cpu_s(gpu.vocabulary())?;
    println!("lists equal to the CPU's of the same logits: {listed}");
    let product_error = product_error()?;
    println!("products of bf16: {product_error:.1e} from sums in f64 (allowed {PRODUCT_TOLERANCE:.0e})");
    let mut sound = listed && product_error <= PRODUCT_TOLERANCE;
    for (weights, tolerance) in TOLERANCES {
        if weights != WeightFormat::F32 {
            drop(gpu);
            gpu = load(weights, true)?;
        }
        let error = distance(&prompt_logits(&mut gpu)?, &expected);
        let same = is_invariant(&mut gpu)?;
        println!(
            "{weights:?}: logits {error:.1e} from the CPU's (allowed {tolerance:.0e}); bits of batches equal: {same}"
        );
        sound &= error <= tolerance && same;
        let by_graphs = decoding(&mut gpu)?;
        drop(gpu);
        gpu = load(weights, false)?;
        let by_kernels = decoding(&mut gpu)?;
        report(&gpu, by_graphs, by_kernels);
    }
    Ok(sound)
}

fn tokens(model: &dyn Forward, count: usize) -> Vec<u32> {
    let number = |i: u32| (i + 1).wrapping_mul(2_654_435_761) >> 7;
    (0..count as u32).map(|i| number(i) % model.vocabulary() as u32).collect()
}

/// The blocks of a row of the batch.
fn blocks(row: usize) -> Vec<u32> {
    (row * BLOCKS_OF_A_ROW..(row + 1) * BLOCKS_OF_A_ROW).map(|block| block as u32).collect()
}

/// Logits of the last positions of a prompt.
fn prompt_logits(model: &mut dyn Forward) -> Result<Vec<f32>, ModelError> {
    let tokens = tokens(model, PROMPT);
    let mut logits = Vec::new();
    let row = Row { tokens: &tokens, start: 0, blocks: &blocks(0), logits_from: PROMPT - 4, adapter: None };
    model.forward(&[row], &mut logits)?;
    Ok(logits)
}

/// The largest difference, relative to the largest logit.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Whether a prompt has the same bits alone, in chunks, and in a batch.
fn is_invariant(model: &mut dyn Forward) -> Result<bool, ModelError> {
    let (tokens, vocabulary) = (tokens(model, PROMPT), model.vocabulary());
    let blocks = [blocks(0), blocks(1), blocks(2)];
    let mut logits = Vec::new();
    let whole = Row { tokens: &tokens, start: 0, blocks: &blocks[0], logits_from: PROMPT - 1, adapter: None };
    model.forward(&[whole], &mut logits)?;
    let expected: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
    let begin = Row { tokens: &tokens[..37], logits_from: 37, blocks: &blocks[1], ..whole };
    model.forward(&[begin], &mut logits)?;
    let rest = Row { tokens: &tokens[37..], start: 37, logits_from: PROMPT - 38, ..begin };
    model.forward(&[rest, Row { blocks: &blocks[2], ..whole }], &mut logits)?;
    Ok(logits
        .chunks_exact(vocabulary)
        .all(|row| row.iter().map(|x| x.to_bits()).eq(expected.iter().copied())))
}

/// Whether lists of rows that look random are those of the CPU, to the last bit.
fn lists_are_the_cpu_s(vocabulary: usize) -> Result<bool, ModelError> {
    const ROWS: u32 = 64;
    let number = |i: u32| (i + 1).wrapping_mul(2_654_435_761) >> 8;
    // Every fourth row has many ties.
    let logit = |row: u32, i: u32| {
        let z = number(row.wrapping_mul(7_919).wrapping_add(i)) as f32 / (1 << 21) as f32 - 4.0;
        if row.is_multiple_of(4) { z.round() } else { z }
    };
    let rows: Vec<f32> =
        (0..ROWS).flat_map(|row| (0..vocabulary as u32).map(move |i| logit(row, i))).collect();
    let at = |row| NoiseAt { seed: u64::from(row) << 30, choice: row % 3, position: 17 * row };
    let wanted: Vec<Likeliest> = (0..ROWS)
        .map(|row| Likeliest {
            count: 1 << (row % 11),
            scale: 0.3 + row as f32 / 20.0,
            noise: (row % 5 > 0).then(|| at(row)),
        })
        .collect();
    let found = list_rows(0, (&rows, 0), &wanted)?;
    let mut expected = Lists::default();
    for (wanted, row) in wanted.iter().zip(rows.chunks_exact(vocabulary)) {
        let mut candidates = Vec::new();
        rank(wanted, (row, 0), &mut candidates);
        expected.push(wanted, vocabulary, candidates.into_iter());
    }
    // No zero is among their places, so that equal numbers have equal bits.
    Ok(expected.iter().eq(found.iter().map(Vec::as_slice)))
}

/// The largest error of products on tensor cores, of 1 to 40 rows: dense ones, and ones with a single number.
fn product_error() -> Result<f64, ModelError> {
    const INPUTS: usize = 1040;
    const OUTPUTS: usize = 91;
    let number = |i: usize| {
        let hash = (i as u32 + 1).wrapping_mul(2_654_435_761);
        (hash >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let weights: Vec<f32> =
        (0..OUTPUTS * INPUTS).map(|i| f32::from_bits(number(i).to_bits() & 0xffff_0000)).collect();
    let products = Products::of(0, (&weights, INPUTS), WeightFormat::Bf16)?;
    let mut largest: f64 = 0.0;
    for count in [1, 8, 9, 17, 40] {
        let is_there = |row: usize, k: usize| row.is_multiple_of(2) || k == row * 37 % INPUTS;
        let at = |i: usize| if is_there(i / INPUTS, i % INPUTS) { number(i + 7) } else { 0.0 };
        let rows: Vec<f32> = (0..count * INPUTS).map(at).collect();
        let found = products.with(&rows, None)?;
        for (row, found) in rows.chunks_exact(INPUTS).zip(found.chunks_exact(OUTPUTS)) {
            for (weights, found) in weights.chunks_exact(INPUTS).zip(found) {
                let (sum, size) = row.iter().zip(weights).fold((0.0, 0.0), |(sum, size), (x, w)| {
                    let product = f64::from(*x) * f64::from(*w);
                    (sum + product, size + product.abs())
                });
                let error = (f64::from(*found) - sum).abs() / size;
                largest = if error <= largest { largest } else { error };
            }
        }
    }
    Ok(largest)
}

/// Seconds of a step of each batch.
fn decoding(model: &mut CudaLlama) -> Result<[f64; BATCHES.len()], ModelError> {
    let mut seconds = [0.0; BATCHES.len()];
    for (rows, seconds) in BATCHES.into_iter().zip(&mut seconds) {
        *seconds = time_decoding(model, rows)?;
    }
    Ok(seconds)
}

/// Prints seconds of a step of each batch, with graphs and without.
fn report(model: &CudaLlama, by_graphs: [f64; BATCHES.len()], by_kernels: [f64; BATCHES.len()]) {
    for ((rows, seconds), without) in BATCHES.into_iter().zip(by_graphs).zip(by_kernels) {
        let floor = match model.bandwidth() {
            Some(bandwidth) => {
                let floor = model.weight_bytes() as f64 / bandwidth;
                format!(
                    "reading the weights alone takes {:.3} ms ({:.0} %)",
                    floor * 1e3,
                    100.0 * floor / seconds
                )
            }
            None => "the driver does not say how fast its memory is".to_owned(),
        };
        println!(
            "  {rows:>2} rows: {:>8.0} tokens/s, {:.3} ms a step by graphs and {:.3} ms without; {floor}",
            rows as f64 / seconds,
            seconds * 1e3,
            without * 1e3
        );
    }
}

/// Seconds of a step of so many rows.
fn time_decoding(model: &mut CudaLlama, rows: usize) -> Result<f64, ModelError> {
    let tokens = tokens(model, PROMPT);
    let tables: Vec<Vec<u32>> = (0..rows).map(blocks).collect();
    let mut logits = Vec::new();
    for blocks in &tables {
        let row = Row { tokens: &tokens, start: 0, blocks, logits_from: PROMPT, adapter: None };
        model.forward(&[row], &mut logits)?;
    }
    let step = |start| -> Vec<Row<'_>> {
        let row = |blocks| Row { tokens: &tokens[..1], start, blocks, logits_from: 0, adapter: None };
        tables.iter().map(|blocks| row(blocks)).collect()
    };
    // A graph may be due only some steps after the one of the batch before.
    for start in PROMPT..PROMPT + WARM_UP {
        model.forward(&step(start), &mut logits)?;
    }
    let began = Instant::now();
    for start in PROMPT + WARM_UP..PROMPT + DECODED {
        model.forward(&step(start), &mut logits)?;
    }
    Ok(began.elapsed().as_secs_f64() / (DECODED - WARM_UP) as f64)
}
