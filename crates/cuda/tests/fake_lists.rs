//! Lists that are made on the device are those that the CPU makes of the same logits, bit for bit: over a libcuda that runs the
//! kernels on the CPU.
//!
//! Without a test harness, so that the counts of the library are one test's alone.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use uniarm_cuda::{CudaLlama, CudaOptions, WeightFormat, list_rows};
use uniarm_engine::likeliest::rank;
use uniarm_model::{Candidate, Forward, Likeliest, Listing, Lists, ModelError, NoiseAt, Row};

#[path = "support/fakes.rs"]
mod fakes;
#[path = "support/made_up.rs"]
mod made_up;

use made_up::{LLAMA, QWEN2, VOCABULARY};

/// Set in the process that finds the library.
const FAKE: &str = "UNIARM_TEST_FAKE_LISTS";

/// Of a list on a GPU.
const LIST_MAX: usize = 1024;

const CACHE_BLOCKS: usize = 20;
const BLOCK_TOKENS: usize = 16;

fn main() {
    let tests: [(&str, fn()); 7] = [
        ("lists of any row are the cpu's", lists_of_any_row_are_the_cpu_s),
        ("rows with too few numbers have no list", rows_with_too_few_numbers_have_no_list),
        ("a model hands over lists beside rows", a_model_hands_over_lists_beside_rows),
        ("the latest rows behind lists are kept", the_latest_rows_behind_lists_are_kept),
        ("of more lists than are kept the last ones are", of_more_lists_than_are_kept_the_last_ones_are),
        ("a list that is too long says nothing", a_list_that_is_too_long_says_nothing),
        ("what leaves the device is the lists", what_leaves_the_device_is_the_lists),
    ];
    fakes::run(FAKE, "lists of a GPU", &tests);
}

/// Numbers that look random, the same in each run.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// About normal, of deviation 2.
    fn logit(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| self.below(1 << 20) as f32 / (1 << 20) as f32).sum();
        2.0 * (sum - 6.0)
    }

    /// Logits of one kind: as of a model, with many ties, of numbers that are none, all the same.
    fn row(&mut self, columns: usize) -> Vec<f32> {
        const ODD: [f32; 10] =
            [f32::NAN, f32::NEG_INFINITY, -0.0, 0.0, f32::MIN, f32::MAX, 1e-45, -1e-40, 1e30, -1e30];
        let kind = self.below(7);
        let (same, infinite) = (self.logit(), self.below(3 * columns));
        let mut row: Vec<f32> = (0..columns)
            .map(|_| match kind {
                0 | 1 => self.logit(),
                2 => (self.logit() * 2.0).round() / 2.0,
                3 if self.below(3) > 0 => self.one(&ODD),
                4 if self.below(20) == 0 => self.one(&ODD),
                5 => same,
                6 => self.one(&[0.0, -0.0, -1.0]),
                _ => self.logit(),
            })
            .collect();
        // What is larger than all numbers takes a place of those that have one.
        if let (4, Some(logit)) = (kind, row.get_mut(infinite)) {
            *logit = f32::INFINITY;
        }
        row
    }

    fn wanted(&mut self) -> Likeliest {
        let seed = self.one(&[0, 1, 1 << 32, u64::MAX, 0x0123_4567_89ab_cdef]) ^ self.below(7) as u64;
        let choice = self.one(&[0, 1, u32::MAX]);
        let position = self.one(&[0, 1, 977, u32::MAX]);
        Likeliest {
            count: self.one(&[1, 2, 8, 32, 128, LIST_MAX]),
            scale: self.one(&[1.0, 0.37, 1.0 / 0.7, 1e-3, 250.0, 1e38]),
            noise: (self.below(4) > 0).then_some(NoiseAt { seed, choice, position }),
        }
    }
}

/// The list that the CPU makes of a row of the tokens from `first` on.
fn expected(wanted: &Likeliest, row: &[f32], first: usize) -> Vec<(u32, u32, u32)> {
    let (mut candidates, mut lists) = (Vec::new(), Lists::default());
    rank(wanted, (row, first as u32), &mut candidates);
    lists.push(wanted, row.len(), candidates.into_iter());
    bits(lists.iter().next().unwrap())
}

fn bits(list: &[Candidate]) -> Vec<(u32, u32, u32)> {
    list.iter().map(|token| (token.rank.to_bits(), token.id, token.logit.to_bits())).collect()
}

fn lists_of_any_row_are_the_cpu_s() {
    let mut draws = Draws(7);
    let mut tokens = 0;
    // Parts that are not full, that are, and several; ranks whose first token shares its random words with others'.
    let shapes = [
        (1, 0, 20),
        (3, 2, 20),
        (91, 0, 60),
        (700, 49_153, 40),
        (1024, 3, 40),
        (4093, 3, 30),
        (4096, 0, 30),
        (4097, 1, 30),
        (10_007, 0, 30),
        (9000, 24_578, 30),
        (40_000, 0, 8),
    ];
    for (columns, first, cases) in shapes {
        let rows: Vec<f32> = (0..cases).flat_map(|_| draws.row(columns)).collect();
        let wanted: Vec<Likeliest> = (0..cases).map(|_| draws.wanted()).collect();
        let found = list_rows(0, (&rows, first), &wanted).unwrap();
        for (case, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            let expected = expected(wanted, &rows[case * columns..][..columns], first);
            assert!(bits(found) == expected, "case {case} of {columns} tokens from {first} on: {wanted:?}");
            tokens += found.len();
        }
    }
    assert!(tokens > 20_000, "{tokens} tokens were listed");
}

fn rows_with_too_few_numbers_have_no_list() {
    let row = [1.0, f32::NAN, f32::NEG_INFINITY, 2.0];
    for noise in [None, Some(NoiseAt { seed: 1, choice: 0, position: 0 })] {
        let wanted = [2, 3, 9].map(|count| Likeliest { count, scale: 1.0, noise });
        let lists = list_rows(0, (&[row; 3].concat(), 0), &wanted).unwrap();
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [2, 0, 0]);
    }
}

fn load(files: &uniarm_model::ModelFiles, weights: WeightFormat) -> CudaLlama {
    load_with(files, weights, true)
}

fn load_with(files: &uniarm_model::ModelFiles, weights: WeightFormat, graphs: bool) -> CudaLlama {
    let options =
        CudaOptions { device: 0, kv_blocks: CACHE_BLOCKS, block_tokens: BLOCK_TOKENS, weights, graphs };
    CudaLlama::load(files, &options).unwrap()
}

/// A row of the sequence in this block, whose last `wanted` logits are wanted.
fn row<'a>(block: &'a u32, tokens: &'a [u32], wanted: usize) -> Row<'a> {
    let logits_from = tokens.len() - wanted;
    Row { tokens, start: 0, blocks: std::slice::from_ref(block), logits_from, adapter: None }
}

fn a_model_hands_over_lists_beside_rows() {
    let tokens = [5, 90, 3, 17, 61, 8, 2];
    let at = |position| Some(NoiseAt { seed: 99, choice: 1, position });
    let (some, all) = (
        Some(Likeliest { count: 7, scale: 0.8, noise: at(40) }),
        Some(Likeliest { count: 128, scale: 1.3, noise: at(2) }),
    );
    let greedy = Some(Likeliest { count: 3, scale: 1.0, noise: None });
    for (shape, weights) in [(LLAMA, WeightFormat::F32), (QWEN2, WeightFormat::Bf16)] {
        let scene = shape.scene();
        let mut model = load(&scene.files, weights);
        assert!(model.gives_lists());
        let mut first = 0;
        let adapter = Some(&scene.adapters[0]);
        let rows = [
            row(&0, &tokens, 3),
            Row { adapter, ..row(&1, &tokens[..4], 2) },
            row(&2, &tokens[1..], 1),
            row(&3, &tokens[2..], 0),
            row(&4, &tokens[3..], 1),
        ];
        for wanted in [
            [some, None, greedy, None, None],
            [None, all, None, greedy, some],
            [some, greedy, all, some, greedy],
            [None; 5],
        ] {
            let (mut logits, mut whole, mut lists) = (vec![7.0], Vec::new(), Lists::default());
            model.forward(&rows, &mut whole).unwrap();
            model.forward_listed((&rows, &wanted), (&mut logits, &mut lists)).unwrap();
            assert_eq!(lists.gathered_bytes, 0);
            let (mut found, mut numbers) = (lists.iter(), lists.first..);
            let mut handed = logits.chunks_exact(VOCABULARY);
            let mut of = whole.chunks_exact(VOCABULARY);
            for (row, wanted) in rows.iter().zip(wanted) {
                for (offset, whole) in of.by_ref().take(row.wanted()).enumerate() {
                    let Some(wanted) = wanted.map(|wanted| wanted.later(offset)) else {
                        assert!(handed.next().unwrap() == whole);
                        continue;
                    };
                    assert!(bits(found.next().unwrap()) == expected(&wanted, whole, 0), "{wanted:?}");
                    let mut behind = Vec::new();
                    model.listed_rows(&[numbers.next().unwrap()], &mut behind).unwrap();
                    assert!(behind == whole, "the row behind {wanted:?}");
                }
            }
            assert!(found.next().is_none() && handed.next().is_none());
            let count = lists.iter().count() as u64;
            assert!(count == 0 || lists.first == first, "numbers go on");
            first += count;
        }
    }
}

fn the_latest_rows_behind_lists_are_kept() {
    let scene = LLAMA.scene();
    let mut model = load(&scene.files, WeightFormat::F32);
    let list = Some(Likeliest { count: 4, scale: 1.0, noise: None });
    let (mut logits, mut lists, mut behind) = (Vec::new(), Lists::default(), Vec::new());
    let mut rows: Vec<Vec<f32>> = Vec::new();
    for step in 0..36_u32 {
        let tokens: Vec<u32> = (0..8).map(|i| (step * 11 + i * 7) % VOCABULARY as u32).collect();
        let row = row(&0, &tokens, 8);
        // Steps without a list count for nothing.
        model.forward(&[row], &mut logits).unwrap();
        rows.extend(logits.chunks_exact(VOCABULARY).map(<[f32]>::to_vec));
        model.forward_listed((&[row], &[list]), (&mut logits, &mut lists)).unwrap();
        assert!(logits.is_empty());
        assert_eq!(lists.first, u64::from(step) * 8);
        let ages: Vec<usize> = [0, 1, 97, 255].into_iter().filter(|age| *age < rows.len()).collect();
        let numbers: Vec<u64> = ages.iter().map(|age| (rows.len() - 1 - age) as u64).collect();
        model.listed_rows(&numbers, &mut behind).unwrap();
        let expected: Vec<f32> = numbers.iter().flat_map(|number| rows[*number as usize].clone()).collect();
        assert!(behind == expected, "step {step}");
    }
    for number in [0, 31, 288, u64::MAX] {
        let error = model.listed_rows(&[number], &mut behind).unwrap_err();
        assert!(matches!(error, ModelError::Invalid { field: "numbers", .. }), "{error}");
        assert!(error.to_string().contains("not kept"), "{error}");
    }
    model.listed_rows(&[32], &mut behind).unwrap();
}

fn of_more_lists_than_are_kept_the_last_ones_are() {
    let scene = LLAMA.scene();
    let mut model = load(&scene.files, WeightFormat::F32);
    let list = Some(Likeliest { count: 2, scale: 1.0, noise: None });
    let blocks: Vec<u32> = (0..CACHE_BLOCKS as u32).collect();
    let tokens: Vec<u32> = (0..(BLOCK_TOKENS + CACHE_BLOCKS) as u32).map(|i| i * 7 % 91).collect();
    let of = |block: &u32| *block as usize..*block as usize + BLOCK_TOKENS;
    let rows: Vec<Row<'_>> = blocks.iter().map(|block| row(block, &tokens[of(block)], 1)).collect();
    let all: Vec<Row<'_>> = rows.iter().map(|row| Row { logits_from: 0, ..*row }).collect();
    let (mut whole, mut logits, mut lists, mut behind) =
        (Vec::new(), Vec::new(), Lists::default(), Vec::new());
    model.forward_listed((&rows, &vec![list; rows.len()]), (&mut logits, &mut lists)).unwrap();
    model.forward(&all, &mut whole).unwrap();
    model.forward_listed((&all, &vec![list; all.len()]), (&mut logits, &mut lists)).unwrap();
    let count = lists.iter().count();
    assert!(count > Listing::KEPT && count * VOCABULARY == whole.len());
    let end = lists.first + count as u64;
    let numbers: Vec<u64> = (end - Listing::KEPT as u64..end).collect();
    model.listed_rows(&numbers, &mut behind).unwrap();
    assert!(behind == whole[(count - Listing::KEPT) * VOCABULARY..]);
    model.listed_rows(&[numbers[0] - 1], &mut behind).unwrap_err();
}

fn a_list_that_is_too_long_says_nothing() {
    let row: Vec<f32> = (0..3000).map(|i| (i % 97) as f32).collect();
    let wanted =
        [LIST_MAX, LIST_MAX + 1, 3000, 1 << 40, 5].map(|count| Likeliest { count, scale: 1.0, noise: None });
    let lists = list_rows(0, (&[&row[..]; 5].concat(), 0), &wanted).unwrap();
    assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [LIST_MAX, 0, 0, 0, 5]);
    // Of a small vocabulary there is room for all.
    let scene = LLAMA.scene();
    let mut model = load(&scene.files, WeightFormat::F32);
    let mut lists = Lists::default();
    let wanted = [Some(Likeliest { count: 1 << 40, scale: 1.0, noise: None })];
    model.forward_listed((&[self::row(&0, &[1], 1)], &wanted), (&mut Vec::new(), &mut lists)).unwrap();
    assert_eq!(lists.iter().next().unwrap().len(), VOCABULARY);
}

fn what_leaves_the_device_is_the_lists() {
    let scene = LLAMA.scene();
    // Each kernel counts.
    let mut model = load_with(&scene.files, WeightFormat::F32, false);
    let (mut logits, mut lists) = (Vec::new(), Lists::default());
    let list = |count| Some(Likeliest { count, scale: 1.0, noise: None });
    let (a, b, c) = (row(&0, &[1, 2], 2), row(&1, &[3], 1), row(&2, &[4], 1));
    let mut step = |rows: &[Row<'_>], wanted: &[Option<Likeliest>]| {
        let counts = || {
            ["fake_allocations", "fake_launches", "fake_copies_to_device", "fake_bytes_to_host"]
                .map(fakes::count)
        };
        let before = counts();
        model.forward_listed((rows, wanted), (&mut logits, &mut lists)).unwrap();
        std::array::from_fn::<u64, 4, _>(|i| counts()[i] - before[i])
    };
    let rows = [a, b, c];
    // What is reserved at first is there from then on.
    step(&rows, &[list(8), list(16), list(4)]);
    step(&rows, &[None; 3]);
    let whole = step(&rows, &[None; 3]);
    let listed = step(&rows, &[list(8), list(16), list(4)]);
    let mixed = step(&rows, &[list(8), None, list(4)]);
    let row_bytes = (VOCABULARY * size_of::<f32>()) as u64;
    assert_eq!(whole, [0, whole[1], 1, 4 * row_bytes]);
    assert_eq!(listed, [0, whole[1] + 2, 1, 12 * (8 + 8 + 16 + 4)]);
    assert_eq!(mixed, [0, whole[1] + 2, 1, row_bytes + 12 * (8 + 8 + 4)]);
}
