//! Steps that come again are one launch each, and compute what their kernels do when each is launched by itself: over a libcuda
//! that runs them on the CPU.
//!
//! Without a test harness, so that the counts of the library are one test's alone.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use uniarm_cuda::{CudaLlama, CudaOptions, WeightFormat};
use uniarm_model::{Conditioned, Forward, Likeliest, Lists, ModelFiles, NoiseAt, Row};

#[path = "support/fakes.rs"]
mod fakes;
#[path = "support/made_up.rs"]
mod made_up;

use made_up::{LLAMA, QWEN2, Scene, VOCABULARY};

/// Set in the process that finds the library.
const FAKE: &str = "UNIARM_TEST_FAKE_GRAPHS";

const BLOCK_TOKENS: usize = 16;
const CACHE_BLOCKS: usize = 64;
/// Of one sequence.
const BLOCKS: usize = 10;

/// As in `graphs.rs`.
const GRAPHS_MAX: usize = 16;
const STEPS_BETWEEN: usize = 16;
const TOKENS_MAX: usize = 64;

fn main() {
    let tests: [(&str, fn()); 6] = [
        ("steps of a steady batch are one launch each", steps_of_a_steady_batch_are_one_launch_each),
        ("batches that change have the bits of launches", batches_that_change_have_the_bits_of_launches),
        ("another preference needs no other graph", another_preference_needs_no_other_graph),
        ("few graphs are kept, the latest ones", few_graphs_are_kept_the_latest_ones),
        ("prompts are launched kernel by kernel", prompts_are_launched_kernel_by_kernel),
        ("a device without room for graphs goes without", a_device_without_room_for_graphs_goes_without),
    ];
    fakes::run(FAKE, "graphs of a GPU", &tests);
}

/// What a step made the library do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    launches: u64,
    graph_launches: u64,
    graphs_made: u64,
    allocations: u64,
}

const BY_GRAPH: Counts = Counts { launches: 0, graph_launches: 1, graphs_made: 0, allocations: 0 };

impl Counts {
    fn now() -> Self {
        Self {
            launches: fakes::count("fake_launches"),
            graph_launches: fakes::count("fake_graph_launches"),
            graphs_made: fakes::count("fake_graphs_made"),
            allocations: fakes::count("fake_allocations"),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            launches: self.launches - before.launches,
            graph_launches: self.graph_launches - before.graph_launches,
            graphs_made: self.graphs_made - before.graphs_made,
            allocations: self.allocations - before.allocations,
        }
    }
}

/// A model that has graphs, and the same one without, which takes the same steps.
struct Both {
    with: CudaLlama,
    without: CudaLlama,
}

impl Both {
    fn load(files: &ModelFiles, weights: WeightFormat) -> Self {
        let load = |graphs| {
            let options = CudaOptions {
                device: 0,
                kv_blocks: CACHE_BLOCKS,
                block_tokens: BLOCK_TOKENS,
                weights,
                graphs,
            };
            CudaLlama::load(files, &options).unwrap()
        };
        Self { with: load(true), without: load(false) }
    }

    /// Takes a step with both, whose bits have to be equal; what the one with graphs did.
    fn step(&mut self, rows: &[Row<'_>], wanted: &[Option<Likeliest>]) -> Counts {
        let run = |model: &mut CudaLlama| {
            let (mut logits, mut lists, mut behind) = (Vec::new(), Lists::default(), Vec::new());
            let before = Counts::now();
            model.forward_listed((rows, wanted), (&mut logits, &mut lists)).unwrap();
            let counts = Counts::now().since(before);
            let count = lists.iter().count() as u64;
            let numbers: Vec<u64> = (lists.first..lists.first + count).collect();
            model.listed_rows(&numbers, &mut behind).unwrap();
            let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            let listed = lists.iter().flatten().flat_map(|token| [token.rank.to_bits(), token.id]);
            ([bits(&logits), listed.collect(), bits(&behind)], counts)
        };
        let ((found, counts), (expected, plain)) = (run(&mut self.with), run(&mut self.without));
        assert!(found == expected, "{} rows have other bits in a graph", rows.len());
        assert_eq!((plain.graph_launches, plain.graphs_made), (0, 0), "a model without graphs made one");
        counts
    }
}

/// Sequences of a scene: without an adapter, and with each of its adapters.
struct Sequences<'a> {
    adapters: Vec<Option<&'a Conditioned>>,
    /// Of each, its blocks and how many positions are there.
    blocks: Vec<Vec<u32>>,
    lengths: Vec<usize>,
    tokens: Vec<u32>,
}

impl<'a> Sequences<'a> {
    fn of(scene: &'a Scene) -> Self {
        let adapters: Vec<_> = [None].into_iter().chain(scene.adapters.iter().map(Some)).collect();
        let blocks = |sequence: usize| (0..BLOCKS).map(|block| (sequence * BLOCKS + block) as u32).collect();
        Self {
            blocks: (0..adapters.len()).map(blocks).collect(),
            lengths: vec![0; adapters.len()],
            tokens: (0..200_u32).map(|i| i * i % VOCABULARY as u32).collect(),
            adapters,
        }
    }

    /// The next tokens of a sequence, of which the last one's logits are wanted; its row has the blocks that it needs.
    fn row(&self, sequence: usize, count: usize) -> Row<'_> {
        let start = self.lengths[sequence];
        let end = start + count;
        Row {
            tokens: &self.tokens[start..end],
            start,
            blocks: &self.blocks[sequence][..end.div_ceil(BLOCK_TOKENS)],
            logits_from: count - 1,
            adapter: self.adapters[sequence],
        }
    }
}

fn list(count: usize, position: usize) -> Option<Likeliest> {
    let noise = NoiseAt { seed: 77, choice: 0, position: position as u32 };
    Some(Likeliest { count, scale: 0.9, noise: Some(noise) })
}

fn steps_of_a_steady_batch_are_one_launch_each() {
    const STEPS: usize = 24;
    for (shape, weights) in [(LLAMA, WeightFormat::F32), (QWEN2, WeightFormat::Bf16)] {
        let scene = shape.scene();
        let mut both = Both::load(&scene.files, weights);
        let mut sequences = Sequences::of(&scene);
        // Contexts of different lengths, which reach further blocks in different steps.
        let prompts: Vec<usize> = (0..5).map(|sequence| 5 + 3 * sequence).collect();
        let rows: Vec<Row<'_>> = (0..5).map(|sequence| sequences.row(sequence, prompts[sequence])).collect();
        both.step(&rows, &[None; 5]);
        sequences.lengths = prompts;
        let mut all = Vec::new();
        for step in 0..STEPS {
            let rows: Vec<Row<'_>> = (0..5).map(|sequence| sequences.row(sequence, 1)).collect();
            // What lists are of changes with each step, and in one of them how long they are.
            let count = if step % 2 == 0 { 8 } else { 7 };
            all.push(both.step(&rows, &[list(count, step), None, None, list(3, step), None]));
            sequences.lengths.iter_mut().for_each(|length| *length += 1);
        }
        assert_eq!((all[0].graph_launches, all[0].graphs_made), (0, 0), "{:?}", all[0]);
        assert!(all[0].launches > 0);
        assert_eq!(all[1], Counts { graphs_made: 1, ..BY_GRAPH });
        assert!(all[2..].iter().all(|counts| *counts == BY_GRAPH), "{all:?}");
    }
}

/// Rows join and leave, with adapters and lists and without, some of several tokens; contexts grow over many blocks and begin anew.
fn batches_that_change_have_the_bits_of_launches() {
    const STEPS: usize = 180;
    let scene = LLAMA.scene();
    let mut both = Both::load(&scene.files, WeightFormat::Bf16);
    let mut sequences = Sequences::of(&scene);
    let mut state = 5_u64;
    let mut below = |end: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % end
    };
    let (mut batch, mut listed): (Vec<usize>, usize) = (Vec::new(), 0);
    let (mut by_graph, mut by_kernel) = (0, 0);
    for step in 0..STEPS {
        if step % 12 == 0 {
            // A batch of neighbours in turn, whose last rows are listed.
            let (first, count) = (below(5), 1 + below(4));
            batch = (first..first + count).map(|sequence| sequence % 5).collect();
            listed = below(count + 1);
        }
        let counts: Vec<usize> =
            batch.iter().map(|_| if below(30) == 0 { 2 + below(20) } else { 1 }).collect();
        for (sequence, count) in batch.iter().zip(&counts) {
            if sequences.lengths[*sequence] + count > BLOCKS * BLOCK_TOKENS {
                sequences.lengths[*sequence] = 0;
            }
        }
        let rows: Vec<Row<'_>> =
            batch.iter().zip(&counts).map(|(sequence, count)| sequences.row(*sequence, *count)).collect();
        let wanted: Vec<Option<Likeliest>> =
            (0..batch.len()).map(|row| list(5, step).filter(|_| batch.len() - row <= listed)).collect();
        let did = both.step(&rows, &wanted);
        by_graph += did.graph_launches;
        by_kernel += u64::from(did.launches > 0);
        for (sequence, count) in batch.iter().zip(counts) {
            sequences.lengths[*sequence] += count;
        }
    }
    println!("        {by_graph} steps by graphs, {by_kernel} by kernels");
    assert_eq!(by_graph + by_kernel, STEPS as u64);
    assert!(by_graph > 60 && by_kernel > 20, "{by_graph} and {by_kernel}");
}

fn another_preference_needs_no_other_graph() {
    let scene = LLAMA.scene();
    let mut both = Both::load(&scene.files, WeightFormat::F32);
    let sequences = Sequences::of(&scene);
    // One adapter under two preferences.
    let [one, other] = [2, 3].map(|sequence| sequences.row(sequence, 1));
    both.step(&[one], &[None]);
    assert_eq!(both.step(&[other], &[None]), Counts { graphs_made: 1, ..BY_GRAPH });
    assert_eq!(both.step(&[one], &[None]), BY_GRAPH);
    // Another adapter is another launch, in its grid at least.
    assert_eq!(both.step(&[sequences.row(4, 1)], &[None]).graph_launches, 0);
}

fn few_graphs_are_kept_the_latest_ones() {
    let scene = LLAMA.scene();
    let mut both = Both::load(&scene.files, WeightFormat::F32);
    let sequences = Sequences::of(&scene);
    // As many tokens as rows, and logits of some.
    let kinds: Vec<(usize, usize)> =
        (1..=5).flat_map(|rows| (0..=rows).map(move |wanted| (rows, wanted))).take(GRAPHS_MAX + 2).collect();
    assert_eq!(kinds.len(), GRAPHS_MAX + 2);
    let mut step = |(rows, wanted): (usize, usize)| {
        let rows = (0..rows).map(|row| Row {
            logits_from: usize::from(row >= wanted),
            adapter: None,
            ..sequences.row(row, 1)
        });
        both.step(&rows.collect::<Vec<_>>(), &[])
    };
    // The largest step comes first: then everything has its place.
    step((5, 5));
    for (index, kind) in kinds.iter().enumerate() {
        let before = fakes::count("fake_graphs_made");
        for _ in 0..STEPS_BETWEEN + 2 {
            step(*kind);
        }
        assert_eq!(fakes::count("fake_graphs_made") - before, 1, "{kind:?}");
        assert_eq!(fakes::count("fake_graphs"), (index + 1).min(GRAPHS_MAX) as u64);
        // The first one is used all the time.
        assert_eq!(step(kinds[0]), BY_GRAPH);
    }
    let gone = kinds.len() - GRAPHS_MAX;
    for kind in &kinds[gone + 1..] {
        assert_eq!(step(*kind), BY_GRAPH, "{kind:?}");
    }
    let counts = step(kinds[gone]);
    assert!(counts.launches > 0 || counts.graphs_made > 0, "a graph that was dropped was launched");
    drop(both);
    assert_eq!(fakes::count("fake_graphs"), 0);
}

fn prompts_are_launched_kernel_by_kernel() {
    let scene = LLAMA.scene();
    let mut both = Both::load(&scene.files, WeightFormat::F32);
    let sequences = Sequences::of(&scene);
    for (tokens, graphs) in [(TOKENS_MAX + 1, 0), (TOKENS_MAX, 2)] {
        let rows = [sequences.row(0, tokens)];
        let launched = (0..3).map(|_| both.step(&rows, &[None]).graph_launches).sum::<u64>();
        assert_eq!(launched, graphs, "{tokens} tokens");
    }
}

fn a_device_without_room_for_graphs_goes_without() {
    let scene = LLAMA.scene();
    let mut both = Both::load(&scene.files, WeightFormat::F32);
    let sequences = Sequences::of(&scene);
    let rows = [sequences.row(0, 1), sequences.row(1, 1)];
    assert_eq!(fakes::count("fake_toggle_room_for_graphs"), 0);
    for _ in 0..4 {
        assert_eq!(both.step(&rows, &[None; 2]).graph_launches, 0);
    }
    assert_eq!(fakes::count("fake_toggle_room_for_graphs"), 1);
    let launched: Vec<u64> =
        (0..STEPS_BETWEEN + 1).map(|_| both.step(&rows, &[None; 2]).graph_launches).collect();
    // It tries again, and not with every step.
    assert_eq!((launched[0], launched[STEPS_BETWEEN]), (0, 1));
}
