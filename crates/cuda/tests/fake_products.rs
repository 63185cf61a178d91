//! Products with weights by themselves, over a libcuda that runs the kernels on the CPU: how exact they are, and that a row's
//! sums know nothing of the other rows.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use uniarm_cuda::{CudaLlama, CudaOptions, Products, WeightFormat};
use uniarm_model::ModelError;

#[path = "support/fakes.rs"]
#[allow(dead_code)]
mod fakes;
#[path = "support/made_up.rs"]
#[allow(dead_code)]
mod made_up;

/// Set in the process that finds the library.
const FAKE: &str = "UNIARM_TEST_FAKE_PRODUCTS";

/// Of the sum of what is added up, all positive: a few roundings of f32, each up to 6e-8 of what there is by then.
const TOLERANCE: f64 = 3e-7;

/// The tests' second device, of compute capability 7.5.
const OLD_DEVICE: usize = 1;

/// More than the largest instance takes at a time, twice.
const ROWS_MAX: usize = 70;

const FORMATS: [WeightFormat; 2] = [WeightFormat::F32, WeightFormat::Bf16];

fn main() {
    let tests: [(&str, fn()); 4] = [
        ("products are as exact as those of f32", products_are_as_exact_as_those_of_f32),
        ("a row has the same bits in every batch", a_row_has_the_same_bits_in_every_batch),
        ("what is no number stays in its row and output", what_is_no_number_stays_in_its_row_and_output),
        ("an old device takes weights of f32 alone", an_old_device_takes_weights_of_f32_alone),
    ];
    fakes::run(FAKE, "products of a GPU", &tests);
}

/// Numbers that look random, the same in each run.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    /// Of 24 significant bits, and either sign.
    fn number(&mut self) -> f32 {
        let magnitude = ((1 << 23) + self.below(1 << 23)) as f32 / (1 << 24) as f32;
        if self.below(2) == 0 { magnitude } else { -magnitude }
    }

    /// Exact in bf16.
    fn weights(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| f32::from_bits(self.number().to_bits() & 0xffff_0000)).collect()
    }

    /// A row of one kind: numbers of one size, of many, a single one among zeros of both signs.
    fn row(&mut self, inputs: usize) -> Vec<f32> {
        let (kind, single) = (self.below(3), self.below(inputs));
        let number = |k| match kind {
            0 => self.number(),
            1 => self.number() * f32::powi(2.0, self.below(40) as i32 - 20),
            _ if k == single => self.number(),
            _ => self.number() * 0.0,
        };
        (0..inputs).map(number).collect()
    }

    fn rows(&mut self, count: usize, inputs: usize) -> Vec<f32> {
        (0..count).flat_map(|_| self.row(inputs)).collect()
    }
}

/// The largest error, of the sum of what is added up.
fn error(weights: &[f32], rows: &[f32], inputs: usize, (added_to, found): (Option<&[f32]>, &[f32])) -> f64 {
    let outputs = weights.len() / inputs;
    assert_eq!(found.len(), rows.len() / inputs * outputs);
    let error = |(index, found): (usize, &f32)| {
        let row = rows.chunks_exact(inputs).nth(index / outputs).unwrap();
        let weights = weights.chunks_exact(inputs).nth(index % outputs).unwrap();
        let before = added_to.map_or(0.0, |sums| f64::from(sums[index]));
        let products = row.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w));
        let (sum, size) = products
            .fold((before, before.abs()), |(sum, size), product| (sum + product, size + product.abs()));
        (f64::from(*found) - sum).abs() / size
    };
    found
        .iter()
        .enumerate()
        .map(error)
        .fold(0.0, |largest, error| if error <= largest { largest } else { error })
}

fn products_are_as_exact_as_those_of_f32() {
    let mut draws = Draws(3);
    let mut shapes = vec![(16, 1), (32, 16), (48, 17), (256, 15), (272, 91), (528, 33), (2064, 3)];
    shapes.extend((0..12).map(|_| (16 * (1 + draws.below(60)), 1 + draws.below(150))));
    for format in FORMATS {
        let mut largest: f64 = 0.0;
        for (inputs, outputs) in shapes.iter().copied() {
            let weights = draws.weights(outputs * inputs);
            let products = Products::of(0, (&weights, inputs), format).unwrap();
            for count in [1, 8, 9, 17, 1 + draws.below(ROWS_MAX)] {
                let rows = draws.rows(count, inputs);
                let sums: Vec<f32> = (0..count * outputs).map(|_| draws.number()).collect();
                for added_to in [None, Some(&sums[..])] {
                    let found = products.with(&rows, added_to).unwrap();
                    let error = error(&weights, &rows, inputs, (added_to, &found));
                    assert!(
                        error <= TOLERANCE,
                        "{format:?}, {count} rows of {inputs} × {outputs}: {error:.1e}"
                    );
                    largest = largest.max(error);
                }
            }
        }
        println!("        {format:?}: {largest:.1e} of what is added up");
    }
}

fn a_row_has_the_same_bits_in_every_batch() {
    let mut draws = Draws(5);
    for (inputs, outputs) in [(16, 5), (80, 16), (272, 91), (1040, 33)] {
        let weights = draws.weights(outputs * inputs);
        let rows = draws.rows(ROWS_MAX, inputs);
        let sums: Vec<f32> = (0..ROWS_MAX * outputs).map(|_| draws.number()).collect();
        for format in FORMATS {
            let products = Products::of(0, (&weights, inputs), format).unwrap();
            // Rows `first` to `first + count`, beginning anew behind the last.
            let multiply = |first: usize, count: usize| {
                let of = |numbers: &[f32], width: usize| -> Vec<f32> {
                    numbers.iter().copied().cycle().skip(first * width).take(count * width).collect()
                };
                let found = products.with(&of(&rows, inputs), Some(&of(&sums, outputs))).unwrap();
                found.iter().map(|sum| sum.to_bits()).collect::<Vec<u32>>()
            };
            let alone: Vec<Vec<u32>> = (0..ROWS_MAX).map(|row| multiply(row, 1)).collect();
            for count in [2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 48, 57, 64, 65, ROWS_MAX] {
                let first = draws.below(ROWS_MAX);
                for (place, found) in multiply(first, count).chunks_exact(outputs).enumerate() {
                    let row = (first + place) % ROWS_MAX;
                    assert!(found == alone[row], "{format:?}, {inputs} × {outputs}: row {place} of {count}");
                }
            }
        }
    }
}

fn what_is_no_number_stays_in_its_row_and_output() {
    // A part and a half: what a lane has none of lies in the next row.
    const INPUTS: usize = 48;
    const OUTPUTS: usize = 40;
    const ROWS: usize = 40;
    let (bad_row, bad_output) = (5, 7);
    let mut draws = Draws(9);
    let (mut weights, mut rows) = (draws.weights(OUTPUTS * INPUTS), draws.rows(ROWS, INPUTS));
    weights[bad_output * INPUTS..][..INPUTS].fill(f32::NAN);
    rows[bad_row * INPUTS..][..INPUTS].fill(f32::INFINITY);
    for format in FORMATS {
        let products = Products::of(0, (&weights, INPUTS), format).unwrap();
        for count in [8, 16, ROWS] {
            let found = products.with(&rows[..count * INPUTS], None).unwrap();
            for (index, sum) in found.iter().enumerate() {
                let (row, output) = (index / OUTPUTS, index % OUTPUTS);
                let expected = row != bad_row && output != bad_output;
                assert_eq!(sum.is_finite(), expected, "{format:?}: output {output} of row {row} of {count}");
            }
        }
    }
}

fn an_old_device_takes_weights_of_f32_alone() {
    let scene = made_up::LLAMA.scene();
    let load = |weights| {
        let options =
            CudaOptions { device: OLD_DEVICE, kv_blocks: 2, block_tokens: 16, weights, graphs: true };
        CudaLlama::load(&scene.files, &options)
    };
    assert!(load(WeightFormat::F32).is_ok());
    let Err(ModelError::Device(message)) = load(WeightFormat::Bf16) else { panic!() };
    for said in ["compute capability 8.0", "7.5", "--gpu-weights f32"] {
        assert!(message.contains(said), "{message}");
    }
}
