//! The whole path without a GPU: loading, memory, launches and kernels, over a libcuda that runs them on the CPU.
//!
//! The program builds that library (`tests/fake/`) and starts itself again where the loader finds it; without a test
//! harness, so that the counts of the library are this test's alone.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::sync::Arc;

use uniarm_cuda::{CudaLlama, CudaOptions, WeightFormat};
use uniarm_model::{
    Adapter, Conditioned, Forward, Llama, LlamaOptions, ModelError, ModelFiles, OpenOptions, Row, open,
};

#[path = "support/fakes.rs"]
mod fakes;
#[path = "support/made_up.rs"]
mod made_up;

use made_up::{LLAMA, QWEN2, Scene, Shape, VOCABULARY};

/// Set in the process that finds the library.
const FAKE: &str = "UNIARM_TEST_FAKE_GPU";

/// Of the largest logit: f32 in another order of sums, and another exponential.
const TOLERANCE: f32 = 1e-4;

/// Beside a cache of half precision, in which either may round to the other neighbour.
const HALF_TOLERANCE: f32 = 3e-4;

const BLOCK_TOKENS: usize = 16;
const CACHE_BLOCKS: usize = 64;
/// Blocks of one sequence, which has more positions than a warp and than four warps take at a time.
const SEQUENCE_BLOCKS: u32 = 10;
const PROMPT_TOKENS: usize = 150;

fn main() {
    let tests: [(&str, fn()); 7] = [
        ("logits are the cpu's", logits_are_the_cpu_s),
        ("a row has the same bits alone and in any batch", a_row_has_the_same_bits_alone_and_in_any_batch),
        ("chunks and blocks do not show", chunks_and_blocks_do_not_show),
        ("a step that breaks the contract writes nothing", a_step_that_breaks_the_contract_writes_nothing),
        ("steps of a known size allocate nothing", steps_of_a_known_size_allocate_nothing),
        ("a cache that does not fit is refused", a_cache_that_does_not_fit_is_refused),
        ("the demo model says what it says on the cpu", the_demo_model_says_what_it_says_on_the_cpu),
    ];
    fakes::run(FAKE, "kernels on the CPU", &tests);
}

fn load(files: &ModelFiles, weights: WeightFormat) -> CudaLlama {
    let options =
        CudaOptions { device: 0, kv_blocks: CACHE_BLOCKS, block_tokens: BLOCK_TOKENS, weights, graphs: true };
    CudaLlama::load(files, &options).unwrap()
}

fn load_cpu(files: &ModelFiles) -> Llama {
    let options = LlamaOptions {
        threads: 1,
        kv_blocks: CACHE_BLOCKS,
        block_tokens: BLOCK_TOKENS,
        ..LlamaOptions::default()
    };
    Llama::load(files, &options).unwrap()
}

fn prompt(seed: u32, count: usize) -> Vec<u32> {
    let number = |i: u32| (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 7;
    (0..count as u32).map(|i| number(i) % VOCABULARY as u32).collect()
}

fn forward(model: &mut dyn Forward, rows: &[Row<'_>]) -> Vec<f32> {
    let mut logits = Vec::new();
    model.forward(rows, &mut logits).unwrap();
    logits
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// The largest difference, relative to the largest logit.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|x| x.is_finite()), "a logit is no number");
    let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// A plain sequence and one for each adapter, of different lengths.
fn sequences(scene: &Scene) -> Vec<(Vec<u32>, Vec<u32>, Option<&Conditioned>)> {
    let adapters = [None].into_iter().chain(scene.adapters.iter().map(Some));
    adapters
        .enumerate()
        .map(|(index, adapter)| {
            let begin = index as u32 * SEQUENCE_BLOCKS;
            (
                prompt(index as u32, PROMPT_TOKENS - 21 * index),
                (begin..begin + SEQUENCE_BLOCKS).collect(),
                adapter,
            )
        })
        .collect()
}

fn logits_are_the_cpu_s() {
    let formats = [(WeightFormat::F32, TOLERANCE), (WeightFormat::Bf16, HALF_TOLERANCE)];
    for (shape, (weights, tolerance)) in
        [LLAMA, QWEN2].into_iter().flat_map(|shape| formats.map(|format| (shape, format)))
    {
        // In the file, too: what has weights of 16 bits has a cache of 16 bits, here and there.
        let scene = Shape { bf16: weights == WeightFormat::Bf16, ..shape }.scene();
        let sequences = sequences(&scene);
        let run = |model: &mut dyn Forward| {
            let mut all = Vec::new();
            // A chunk of each with some of its logits, rows with and without adapters in turn; then the rest, and a step
            // of single tokens of which some share their first blocks.
            for (from, to) in [(0, 30), (30, usize::MAX)] {
                let rows: Vec<Row<'_>> = sequences
                    .iter()
                    .map(|(tokens, blocks, adapter)| {
                        let tokens = &tokens[from..to.min(tokens.len())];
                        let logits_from = tokens.len() - 3;
                        Row { tokens, start: from, blocks, logits_from, adapter: *adapter }
                    })
                    .collect();
                all.extend(forward(model, &rows));
            }
            let shared: Vec<u32> = sequences[0].1.iter().copied().take(4).chain([60, 61]).collect();
            let mut rows: Vec<Row<'_>> = sequences
                .iter()
                .map(|(tokens, blocks, adapter)| Row {
                    tokens: &tokens[..1],
                    start: tokens.len(),
                    blocks,
                    logits_from: 0,
                    adapter: *adapter,
                })
                .collect();
            rows.push(Row { start: 64, blocks: &shared, adapter: None, ..rows[0] });
            all.extend(forward(model, &rows));
            all
        };
        let expected = run(&mut load_cpu(&scene.files));
        let found = run(&mut load(&scene.files, weights));
        let distance = distance(&found, &expected);
        println!("        {weights:?}: {distance:.1e} of the largest logit");
        assert!(distance <= tolerance, "{weights:?}: {distance}");
    }
}

fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for (shape, weights) in [(LLAMA, WeightFormat::F32), (QWEN2, WeightFormat::Bf16)] {
        let scene = shape.scene();
        let mut model = load(&scene.files, weights);
        let sequences = sequences(&scene);
        let rows: Vec<Row<'_>> = sequences
            .iter()
            .map(|(tokens, blocks, adapter)| {
                // Few tokens: what has to differ is the number of rows.
                let tokens = &tokens[..40];
                Row { tokens, start: 0, blocks, logits_from: 39, adapter: *adapter }
            })
            .collect();
        let alone: Vec<Vec<u32>> = rows.iter().map(|row| bits(&forward(&mut model, &[*row]))).collect();
        for (a, b) in [(0, 1), (1, 2), (2, 3)] {
            assert_ne!(alone[a], alone[b], "adapters and preferences matter");
        }
        let same = |found: &[f32], order: &[usize], what: &str| {
            for (row, found) in order.iter().zip(found.chunks_exact(VOCABULARY)) {
                assert!(bits(found) == alone[*row], "row {row} of {what}");
            }
        };
        same(&forward(&mut model, &rows), &[0, 1, 2, 3, 4], "all");
        same(&forward(&mut model, &[rows[3], rows[0], rows[2]]), &[3, 0, 2], "three");
        // Every number of rows: single tokens of all sequences, once more.
        let last: Vec<Row<'_>> = rows
            .iter()
            .map(|row| Row { tokens: &row.tokens[39..], start: 39, logits_from: 0, ..*row })
            .collect();
        for count in 1..=last.len() {
            let order: Vec<usize> = (0..count).collect();
            same(&forward(&mut model, &last[..count]), &order, "single tokens");
        }
        // Prefill of one beside decoding of the others.
        let mixed = [last[4], rows[1], last[0], last[2]];
        same(&forward(&mut model, &mixed), &[4, 1, 0, 2], "a mixed step");
    }
}

fn chunks_and_blocks_do_not_show() {
    let scene = LLAMA.scene();
    let mut model = load(&scene.files, WeightFormat::Bf16);
    let prompt = prompt(9, PROMPT_TOKENS);
    for adapter in [None, Some(&scene.adapters[1])] {
        let blocks: Vec<u32> = (0..SEQUENCE_BLOCKS).collect();
        let whole =
            Row { tokens: &prompt, start: 0, blocks: &blocks, logits_from: PROMPT_TOKENS - 1, adapter };
        let expected = bits(&forward(&mut model, &[whole]));
        for (chunk, blocks) in
            [(1, [9, 3, 41, 0, 17, 20, 21, 5, 6, 7]), (23, [60, 2, 8, 61, 5, 4, 3, 1, 0, 63])]
        {
            let mut logits = Vec::new();
            for start in (0..prompt.len()).step_by(chunk) {
                let tokens = &prompt[start..prompt.len().min(start + chunk)];
                logits = forward(
                    &mut model,
                    &[Row { tokens, start, blocks: &blocks, logits_from: tokens.len() - 1, adapter }],
                );
            }
            assert!(bits(&logits) == expected, "chunks of {chunk}");
        }
        // Two rows of one step may continue each other.
        let first = Row { tokens: &prompt[..40], logits_from: 40, ..whole };
        let rest = Row { tokens: &prompt[40..], start: 40, logits_from: PROMPT_TOKENS - 41, ..whole };
        assert!(bits(&forward(&mut model, &[first, rest])) == expected, "two rows of one sequence");
    }
}

fn a_step_that_breaks_the_contract_writes_nothing() {
    let scene = LLAMA.scene();
    let (mut model, mut cpu) = (load(&scene.files, WeightFormat::F32), load_cpu(&scene.files));
    let prompt = prompt(1, 20);
    let sound = Row { tokens: &prompt, start: 0, blocks: &[0, 1], logits_from: 19, adapter: None };
    let expected = bits(&forward(&mut model, &[sound]));
    let row = Row { tokens: &[1], start: 0, blocks: &[0], logits_from: 0, adapter: None };
    let scripted = Arc::new(Adapter::scripted(Vec::new())).condition(&[]).unwrap();
    let broken = [
        Row { tokens: &[], ..row },
        Row { tokens: &[u32::MAX], ..row },
        Row { blocks: &[CACHE_BLOCKS as u32], ..row },
        Row { start: 1 << 40, ..row },
        Row { logits_from: 2, ..row },
        Row { adapter: Some(&scripted), ..row },
        // The same slot as the row before it.
        Row { blocks: &[63], ..row },
    ];
    let launches = fakes::count("fake_launches");
    for broken in broken {
        let rows = [Row { blocks: &[63], ..row }, broken];
        let mut logits = vec![7.0];
        let refusal = |model: &mut dyn Forward, logits: &mut Vec<f32>| match model.forward(&rows, logits) {
            Err(error @ ModelError::Invalid { .. }) => error.to_string(),
            other => panic!("{broken:?}: {other:?}"),
        };
        assert_eq!(refusal(&mut model, &mut logits), refusal(&mut cpu, &mut Vec::new()));
        assert_eq!(logits, [7.0]);
    }
    assert_eq!(fakes::count("fake_launches"), launches);
    let last = Row { tokens: &prompt[19..], start: 19, logits_from: 0, ..sound };
    assert!(bits(&forward(&mut model, &[last])) == expected);
    assert!(forward(&mut model, &[]).is_empty());
}

fn steps_of_a_known_size_allocate_nothing() {
    let scene = QWEN2.scene();
    let mut model = load(&scene.files, WeightFormat::Bf16);
    let sequences = sequences(&scene);
    let step = |model: &mut CudaLlama, count: usize, start: usize| {
        let rows: Vec<Row<'_>> = sequences[..count]
            .iter()
            .map(|(tokens, blocks, adapter)| Row {
                tokens: &tokens[..1],
                start,
                blocks,
                logits_from: 0,
                adapter: *adapter,
            })
            .collect();
        forward(model, &rows)
    };
    step(&mut model, 5, 0);
    let counts = || {
        ["fake_allocations", "fake_launches", "fake_copies_to_device", "fake_bytes_to_host"].map(fakes::count)
    };
    let before = counts();
    for start in 1..5 {
        step(&mut model, start, start);
    }
    let [allocations, launches, copies, bytes] = std::array::from_fn(|i| counts()[i] - before[i]);
    assert_eq!((allocations, copies), (0, 4));
    assert_eq!(bytes, ((1 + 2 + 3 + 4) * VOCABULARY * size_of::<f32>()) as u64);
    // Two layers; the LoRA of the second row reaches all four groups of each.
    let plain = 1 + 2 * 9 + 2;
    assert_eq!(launches, plain + 3 * (plain + 2 * 4 * 2));
}

/// The library ends the process if what was loaded before the cache is not given back.
fn a_cache_that_does_not_fit_is_refused() {
    let scene = LLAMA.scene();
    let options = CudaOptions {
        device: 0,
        kv_blocks: 1 << 20,
        block_tokens: 16,
        weights: WeightFormat::F32,
        graphs: true,
    };
    let Err(ModelError::Device(message)) = CudaLlama::load(&scene.files, &options) else { panic!() };
    assert!(
        message.starts_with("no room for half of the cache") && message.contains("fewer cache blocks"),
        "{message}"
    );
    let none = CudaLlama::load(&scene.files, &CudaOptions { kv_blocks: usize::MAX, ..options });
    assert!(matches!(none, Err(ModelError::Invalid { field: "kv_blocks", .. })));
}

fn the_demo_model_says_what_it_says_on_the_cpu() {
    const TOKENS: usize = 8;
    let Ok(path) = std::env::var("UNIARM_DEMO_MODEL") else {
        return println!("skipped: no demo model (UNIARM_DEMO_MODEL)");
    };
    let files = open(&path, &OpenOptions::default()).unwrap();
    let prompt = [1, 4093, 198, 504, 3575, 282, 4649, 314];
    let greedy = |model: &mut dyn Forward| {
        let mut tokens = prompt.to_vec();
        let mut start = 0;
        while tokens.len() < prompt.len() + TOKENS {
            let new = &tokens[start..];
            let row = Row { tokens: new, start, blocks: &[5, 9], logits_from: new.len() - 1, adapter: None };
            let logits = forward(model, &[row]);
            start = tokens.len();
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            tokens.push(best as u32);
        }
        tokens
    };
    let mut model = load(&files, WeightFormat::F32);
    assert_eq!(greedy(&mut model), greedy(&mut load_cpu(&files)));
}
