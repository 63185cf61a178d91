//! The promise under everything: the logits of a position are a function of its sequence and its adapter.
//! Not of the batch, the cut into chunks, the blocks of the cache, the threads or the instruction set.

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::IndexOp;
use support::{Sequence, bits, demo_model, made_up, open, shared, step};
use tempfile::TempDir;
use uniarm_model::kernels::simd::Isa;
use uniarm_model::{
    Adapter, Conditioned, Forward, Llama, LlamaOptions, ModelError, ModelFiles, Row, reference,
};

/// f32 in two orders of summation, and activations of 16 bits beside quantised weights, over 30 layers.
const REFERENCE_TOLERANCE: f32 = 2e-2;

const PROMPT_TOKENS: usize = 75;

/// Blocks of one sequence of the length of the prompt.
const BLOCKS: u32 = 5;

fn load(files: &ModelFiles, threads: usize) -> Llama {
    Llama::load(files, &LlamaOptions { threads, kv_blocks: 64, block_tokens: 16, ..LlamaOptions::default() })
        .expect("a sound model")
}

fn prompt(seed: u32, vocabulary: usize) -> Vec<u32> {
    let number = |i: u32| (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 7;
    (0..PROMPT_TOKENS as u32).map(|i| number(i) % vocabulary as u32).collect()
}

/// A model, adapters for it, and the folder of a model that was made up.
struct Scene {
    files: ModelFiles,
    adapters: Vec<Conditioned>,
    _folder: Option<TempDir>,
}

/// Every model that is at hand, made-up ones at least, with adapters under several preferences.
fn scenes() -> Vec<Scene> {
    let golden = shared().map(|folder| folder.join("golden"));
    let tiny = golden.as_ref().map(|golden| {
        let files = open(golden.join("tiny-llama").to_str().expect("UTF-8"));
        (files, golden.join("tiny-llama"), ["adapter-moslora-onehot", "adapter-pblora", "adapter-lora"])
    });
    let demo = demo_model()
        .zip(golden)
        .map(|(files, golden)| (files, golden, ["adapter-moslora", "adapter-pblora", "adapter-lora"]));
    let conditioned = |folder: PathBuf, files: &ModelFiles| {
        let adapter = Adapter::load(&folder, &files.config, &files.fingerprint).expect("a sound adapter");
        let adapter = Arc::new(adapter);
        let preferences: &[&[f32]] =
            if adapter.objectives().is_empty() { &[&[]] } else { &[&[1.0, 0.0], &[0.3, 0.7]] };
        let condition = |preference: &&[f32]| adapter.condition(preference).expect("on the simplex");
        preferences.iter().map(condition).collect::<Vec<_>>()
    };
    let made_up = [made_up::scene("llama"), made_up::scene("qwen2"), made_up::quantised_scene()];
    let made_up =
        made_up.into_iter().map(|(files, adapters, folder)| Scene { files, adapters, _folder: Some(folder) });
    let recorded = [tiny, demo].into_iter().flatten().map(|(files, folder, names)| {
        let adapters = names.iter().flat_map(|name| conditioned(folder.join(name), &files)).collect();
        Scene { files, adapters, _folder: None }
    });
    made_up.chain(recorded).collect()
}

/// Logits of the last token of a prompt that has the model for itself, on one thread.
fn alone(model: &mut Llama, prompt: &[u32], adapter: Option<&Conditioned>) -> Vec<u32> {
    bits(&step(model, &mut [Sequence::new(prompt, 0..BLOCKS, adapter)])[0])
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for Scene { files, adapters, _folder } in scenes() {
        let mut model = load(&files, 1);
        let vocabulary = model.vocabulary();
        let mut rows: Vec<(Vec<u32>, Option<&Conditioned>)> = Vec::new();
        for (index, adapter) in adapters.iter().enumerate() {
            // Rows with and without adapters alternate; lengths differ.
            let prompt = |seed: usize| prompt(seed as u32, vocabulary)[..PROMPT_TOKENS - seed].to_vec();
            rows.push((prompt(2 * index), Some(adapter)));
            rows.push((prompt(2 * index + 1), None));
        }
        let expected: Vec<Vec<u32>> =
            rows.iter().map(|(prompt, adapter)| alone(&mut model, prompt, *adapter)).collect();

        let mut threaded = load(&files, 2);
        let sequences = |take: usize| -> Vec<Sequence<'_>> {
            let blocks = |index: usize| index as u32 * BLOCKS..(index as u32 + 1) * BLOCKS;
            let rows = rows.iter().take(take).enumerate();
            rows.map(|(index, (prompt, adapter))| Sequence::new(prompt, blocks(index), *adapter)).collect()
        };
        for take in [rows.len(), 3] {
            for model in [&mut model, &mut threaded] {
                let found = step(model, &mut sequences(take));
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert!(bits(found) == *expected, "{}: row {index} of {take}", files.name);
                }
            }
        }
        // Prefill of some beside decoding of others.
        let mut batch = sequences(rows.len());
        for (index, sequence) in batch.iter_mut().enumerate().filter(|(index, _)| index % 2 == 0) {
            let last = sequence.tokens.pop().expect("a prompt");
            step(&mut threaded, std::slice::from_mut(sequence));
            sequence.tokens.push(last);
            assert_eq!(sequence.row().tokens.len(), 1, "row {index} decodes");
        }
        for (index, (found, expected)) in step(&mut threaded, &mut batch).iter().zip(&expected).enumerate() {
            assert!(bits(found) == *expected, "{}: row {index} of a mixed step", files.name);
        }
    }
}

#[test]
fn threads_that_share_a_long_context_do_not_show() {
    /// Longer than two segments of attention, and a row of less than one.
    const LENGTHS: [usize; 2] = [1100, 500];
    const BLOCKS: u32 = 69;
    let long = |scene: &Scene| scene.files.config.context_tokens >= LENGTHS[0];
    let mut compared = 0;
    for Scene { files, _folder, .. } in scenes().into_iter().filter(long) {
        compared += 1;
        let options = |threads| LlamaOptions {
            threads,
            kv_blocks: 2 * BLOCKS as usize,
            block_tokens: 16,
            ..LlamaOptions::default()
        };
        let mut model = Llama::load(&files, &options(1)).expect("a sound model");
        let tokens = prompt(4, model.vocabulary());
        let rows =
            LENGTHS.map(|length| -> Vec<u32> { tokens.iter().copied().cycle().take(length).collect() });
        let expected =
            rows.each_ref().map(|row| bits(&step(&mut model, &mut [Sequence::new(row, 0..BLOCKS, None)])[0]));
        let mut model = model.share(&options(2)).expect("threads");
        let mut batch = [
            Sequence::new(&rows[0][..LENGTHS[0] - 1], 0..BLOCKS, None),
            Sequence::new(&rows[1][..LENGTHS[1] - 1], BLOCKS..2 * BLOCKS, None),
        ];
        step(&mut model, &mut batch);
        for (sequence, row) in batch.iter_mut().zip(&rows) {
            sequence.tokens.clone_from(row);
        }
        let alone = Sequence { computed: batch[0].computed, ..Sequence::new(&rows[0], 0..BLOCKS, None) };
        assert!(bits(&step(&mut model, &mut [alone])[0]) == expected[0], "{}", files.name);
        let found = step(&mut model, &mut batch);
        for (found, expected) in found.iter().zip(&expected) {
            assert!(bits(found) == *expected, "{}", files.name);
        }
    }
    assert!(compared > 1, "no model has a long context");
}

#[test]
fn chunks_and_blocks_do_not_show() {
    for Scene { files, adapters, _folder } in scenes() {
        let mut model = load(&files, 2);
        let prompt = prompt(9, model.vocabulary());
        for adapter in [None, adapters.first()] {
            // Fill the cache with another sequence's leavings first.
            let expected = alone(&mut model, &prompt, adapter);
            for (chunk, blocks) in [(1, [9, 3, 41, 0, 17]), (16, [4, 3, 2, 1, 0]), (23, [60, 2, 8, 61, 5])] {
                let mut logits = Vec::new();
                let mut computed = 0;
                while computed < prompt.len() {
                    let end = prompt.len().min(computed + chunk);
                    let logits_from = if end == prompt.len() { end - computed - 1 } else { end - computed };
                    let tokens = &prompt[computed..end];
                    let row = Row { tokens, start: computed, blocks: &blocks, logits_from, adapter };
                    model.forward(&[row], &mut logits).expect("a sound row");
                    computed = end;
                }
                assert!(bits(&logits) == expected, "{}: chunks of {chunk}", files.name);
            }
            // Two rows of one step may continue each other, and logits of every position come in order.
            let blocks: Vec<u32> = (20..20 + BLOCKS).collect();
            let row = Row { tokens: &prompt[..40], start: 0, blocks: &blocks, logits_from: 40, adapter };
            let rest = Row { tokens: &prompt[40..], start: 40, logits_from: 30, ..row };
            let mut logits = Vec::new();
            model.forward(&[row, rest], &mut logits).expect("sound rows");
            assert_eq!(logits.len(), 5 * model.vocabulary());
            assert!(
                bits(&logits[4 * model.vocabulary()..]) == expected,
                "{}: two rows of one sequence",
                files.name
            );
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for Scene { files, adapters, _folder } in scenes() {
        let mut model = load(&files, 2);
        // Plain Rust emulates the fused multiply-add on some machines: a short prompt will do.
        let prompt = &prompt(5, model.vocabulary())[..6];
        let sequences = || [Sequence::new(prompt, 0..1, adapters.first()), Sequence::new(prompt, 1..2, None)];
        let expected = step(&mut model, &mut sequences());
        for isa in Isa::available() {
            let mut other = model
                .share(&LlamaOptions {
                    threads: 2,
                    kv_blocks: 2,
                    block_tokens: 16,
                    ..LlamaOptions::default()
                })
                .expect("a model");
            other = other.with_isa(isa);
            for (found, expected) in step(&mut other, &mut sequences()).iter().zip(&expected) {
                assert!(bits(found) == bits(expected), "{} on {}", files.name, isa.name());
            }
        }
    }
}

#[test]
fn the_fast_forward_agrees_with_the_plain_one() {
    for Scene { files, adapters, _folder } in scenes() {
        let mut model = load(&files, 2);
        let prompt = &prompt(3, model.vocabulary())[..40];
        let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let mut plain = Vec::new();
        for adapter in [None].into_iter().chain(adapters.iter().map(Some)) {
            let found = &step(&mut model, &mut [Sequence::new(prompt, 0..BLOCKS, adapter)])[0];
            let expected = reference::logits(&files, prompt, adapter).expect("a forward pass"); // (40, vocabulary)
            let expected = expected.i(39).and_then(|row| row.to_vec1::<f32>()).expect("a row");
            assert!(distance(found, &expected) <= REFERENCE_TOLERANCE, "{}: {adapter:?}", files.name);
            match adapter {
                None => plain.clone_from(found),
                Some(_) => assert!(distance(found, &plain) > REFERENCE_TOLERANCE, "{adapter:?} does nothing"),
            }
        }
    }
}

#[test]
fn a_step_that_breaks_the_contract_leaves_the_model_as_it_was() {
    let (files, _, _folder) = made_up::scene("llama");
    let mut model = load(&files, 1);
    let prompt = prompt(1, model.vocabulary());
    let mut sequence = Sequence::new(&prompt, 0..BLOCKS, None);
    let expected = bits(&step(&mut model, std::slice::from_mut(&mut sequence))[0]);
    sequence.computed -= 1;
    let again = |model: &mut Llama| {
        let mut logits = Vec::new();
        model.forward(&[sequence.row()], &mut logits).expect("a sound row");
        bits(&logits)
    };
    let row = Row { tokens: &[1], start: 0, blocks: &[0], logits_from: 0, adapter: None };
    let scripted = Arc::new(Adapter::scripted(Vec::new())).condition(&[]).expect("no objectives");
    let broken = [
        ("tokens", Row { tokens: &[u32::MAX], ..row }),
        ("blocks", Row { blocks: &[64], ..row }),
        ("start", Row { start: 1 << 40, ..row }),
        ("adapter", Row { adapter: Some(&scripted), ..row }),
    ];
    for (name, broken) in broken {
        let sound = Row { blocks: &[63], ..row };
        match model.forward(&[sound, broken], &mut Vec::new()) {
            Err(ModelError::Invalid { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
        assert!(again(&mut model) == expected, "after a broken '{name}'");
    }
    match model.forward(&[row, row], &mut Vec::new()) {
        Err(ModelError::Invalid { field: "blocks", .. }) => assert!(again(&mut model) == expected),
        other => panic!("two writers of one slot: {other:?}"),
    }
}
