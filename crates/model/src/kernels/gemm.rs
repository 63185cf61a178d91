//! Matrix product of activation rows with a packed weight: out = rows · weightᵀ.
//!
//! Every output element is one chain of fused multiply-adds over the inputs 0, 1, 2, …, or, with quantised
//! weights, over the blocks of 32 inputs, whose products are summed exactly. That holds whatever the number
//! of rows, the tile it falls into, the thread or the instruction set: its bits depend on its row and its
//! weights alone. Splitting the sum over the inputs would be faster in places and is never done.
//!
//! Weights lie in panels of 16 outputs, which stream through the kernels of [`tile`](super::tile) and
//! [`block_tile`](super::block_tile).

use std::ops::Range;

use super::block_tile::{self, BlockTile};
use super::panels::{Format, Panels};
use super::rows::{Form, Rows};
use super::simd::{Isa, LANES};
use super::tile::{self, BF16, Element, F16, Tile, panels_together, rows_together};

/// Inputs are taken in equal runs of at most this many. With several tiles, the panels of a run stay in the
/// first-level cache while the tiles take turns (measured on 2 × 8 to 22 × 12 rows: 96 to 512 are slower).
const RUN_INPUTS: usize = 192;

/// With one tile, the panels of a run only have to fit the second-level cache beside those being fetched.
const RUN_INPUTS_SINGLE: usize = 2048;

/// So few rows read their panels straight from memory, at its speed, and a fetch of `FETCH_AHEAD` floats carries
/// the hardware's prefetcher over page ends. More rows fetch the whole next run while they compute, which brings
/// 8 rows from 78 to 98 GFLOP/s.
const STREAMING_ROWS: usize = 4;
const FETCH_AHEAD: usize = 64;

/// Rows whose blocks take turns with a panel: they fit the second-level cache beside it (128 rows of 1,536
/// inputs are 490 KB).
const ROWS_IN_TURN: usize = 128;

/// Where products go: a row-major matrix that several threads write, each its own columns.
#[derive(Clone, Copy)]
pub struct Output {
    start: *mut f32,
    stride: usize,
}

/// What a product starts from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Zero,
    /// The output as it is: the product's chain goes on from there.
    Output,
}

// Safety: whoever makes an `Output` vouches that threads write disjoint columns (`Output::new`).
unsafe impl Send for Output {}
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// `start` is writable for all rows at this stride while the value is used, and no two threads write
    /// (or one reads while another writes) the same columns.
    pub unsafe fn new(start: *mut f32, stride: usize) -> Self {
        Self { start, stride }
    }

    /// The same rows from another column on.
    pub fn column(self, column: usize) -> Self {
        Self { start: self.start.wrapping_add(column), stride: self.stride }
    }

    /// The same columns from another row on.
    pub fn row(self, row: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.stride), stride: self.stride }
    }

    /// Where the first row begins.
    pub fn start(self) -> *mut f32 {
        self.start
    }

    /// Floats of one row, from its first column.
    ///
    /// # Safety
    /// They lie within the matrix, and no other thread has them.
    pub unsafe fn slice<'a>(self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.stride + columns.start), columns.len())
        }
    }
}

/// Multiplies all rows with the panels in `range` and writes (rows, 16 × panels) columns of `output`, whose
/// column 0 belongs to panel 0. Columns past the weight's outputs are not touched.
///
/// # Safety
/// `output` has all rows, and the columns of `range`, and nobody else uses those meanwhile.
pub unsafe fn multiply(
    isa: Isa,
    rows: &Rows<'_>,
    panels: &Panels,
    range: Range<usize>,
    output: Output,
    start: Start,
) {
    assert_eq!(rows.inputs, panels.inputs(), "rows and weight have the same inputs");
    assert_eq!(rows.form, Form::of(panels.format()), "rows are packed for this weight");
    assert!(range.end <= panels.count(), "panels of this weight");
    // Safety: as promised by the caller; a panel consists of what its format says.
    unsafe {
        match panels.format() {
            Format::F32 => multiply_floats::<f32>(isa, rows, panels, range, output, start),
            Format::F16 => multiply_floats::<F16>(isa, rows, panels, range, output, start),
            Format::BF16 => multiply_floats::<BF16>(isa, rows, panels, range, output, start),
            Format::Blocks(_) => {
                assert!(start == Start::Zero, "sums of blocks start from zero");
                multiply_blocks(isa, rows, panels, range, output);
            }
        }
    }
}

unsafe fn multiply_floats<W: Element>(
    isa: Isa,
    rows: &Rows<'_>,
    panels: &Panels,
    range: Range<usize>,
    output: Output,
    start: Start,
) {
    let inputs = rows.inputs;
    let tile_count = Form::Floats.tiles(isa, rows.rows).count();
    let together = panels_together(isa, rows_together(isa, rows.rows));
    let run_max = if tile_count == 1 { RUN_INPUTS_SINGLE } else { RUN_INPUTS };
    let run_inputs = inputs.div_ceil(inputs.div_ceil(run_max));
    let whole = range.end.min(panels.outputs() / LANES);
    let mut panel = range.start;
    while panel < range.end {
        let count = if panel + together <= whole { together } else { 1 };
        for from in (0..inputs).step_by(run_inputs) {
            let depth = run_inputs.min(inputs - from);
            // From a panel's run to its next, or to the first of the panel that comes after these.
            let next = if from + depth < inputs { depth } else { count * inputs - from } * LANES;
            for (turn, (first, height)) in Form::Floats.tiles(isa, rows.rows).enumerate() {
                let mut tile = Tile::<W>::new(height, depth, from > 0 || start == Start::Output);
                tile.rows = rows.tile(first, height).wrapping_add(from * height);
                tile.count = count;
                for index in 0..count {
                    let run = panels.panel(panel + index).cast::<W>().wrapping_add(from * LANES);
                    tile.panels[index] = run;
                    tile.fetch[index] = run.wrapping_add(match () {
                        () if rows.rows <= STREAMING_ROWS => FETCH_AHEAD,
                        // The tiles share out what is to be fetched.
                        () if index % tile_count == turn => next,
                        () => 0,
                    });
                }
                let output = output.row(first).column(panel * LANES);
                let run = |output, stride| unsafe { tile.run(isa, output, stride) };
                // Safety: the tile lies within rows and panels; the caller vouches for the output.
                unsafe {
                    if panel < whole {
                        run(output.start, output.stride);
                    } else {
                        ragged(run, height, output, panels.outputs() - panel * LANES);
                    }
                }
            }
        }
        panel += count;
    }
}

unsafe fn multiply_blocks(isa: Isa, rows: &Rows<'_>, panels: &Panels, range: Range<usize>, output: Output) {
    let layout = panels.format().layout(rows.inputs);
    let whole = range.end.min(panels.outputs() / LANES).max(range.start);
    // The tile that meets a panel first brings in the next one.
    let tile = |(first, height), panel, count, fetch| BlockTile {
        rows: rows.tile(first, height).cast(),
        height,
        panel: panels.panel(panel),
        panels: count,
        fetch,
        layout,
    };
    let tiles = || Form::Blocks.tiles(isa, rows.rows);
    // Safety: tiles lie within rows and panels; the caller vouches for the output.
    let run = |place: (usize, usize), panel: usize, count, fetch| unsafe {
        let output = output.row(place.0).column(panel * LANES);
        tile(place, panel, count, fetch).run(isa, output.start, output.stride);
    };
    let tile_count = tiles().count();
    if tile_count == 1 {
        tiles().for_each(|place| run(place, range.start, whole - range.start, true));
    } else {
        let in_turn = ROWS_IN_TURN / block_tile::rows_together(isa, rows.rows);
        for first in (0..tile_count).step_by(in_turn) {
            for panel in range.start..whole {
                let tiles = tiles().skip(first).take(in_turn).enumerate();
                tiles.for_each(|(turn, place)| run(place, panel, 1, turn == 0));
            }
        }
    }
    for panel in whole..range.end {
        for (first, height) in tiles() {
            let valid = panels.outputs() - panel * LANES;
            let run =
                |output, stride| unsafe { tile((first, height), panel, 1, false).run(isa, output, stride) };
            unsafe { ragged(run, height, output.row(first).column(panel * LANES), valid) };
        }
    }
}

/// The last, partly filled panel goes through a copy: its padding has no place in the output.
unsafe fn ragged(run: impl Fn(*mut f32, usize), height: usize, output: Output, valid: usize) {
    const ROWS_MAX: usize =
        if tile::ROWS_MAX > block_tile::ROWS_MAX { tile::ROWS_MAX } else { block_tile::ROWS_MAX };
    let mut copy = [0.0f32; ROWS_MAX * LANES];
    unsafe {
        for (row, copy) in copy.chunks_exact_mut(LANES).take(height).enumerate() {
            copy[..valid].copy_from_slice(output.slice(row, 0..valid));
        }
        run(copy.as_mut_ptr(), LANES);
        for (row, copy) in copy.chunks_exact(LANES).take(height).enumerate() {
            output.slice(row, 0..valid).copy_from_slice(&copy[..valid]);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::super::blocks::{BLOCK_INPUTS, BlockFormat, Blocks, Integers, Minimum, Scales};
    use super::super::buffer::Buffer;
    use super::super::panels::Numbers;
    use super::*;

    /// The definition: one chain per element.
    fn chain(x: &[f32], weight: &[f32], start: f32) -> f32 {
        x.iter().zip(weight).fold(start, |sum, (x, w)| x.mul_add(*w, sum))
    }

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Every number of rows that has a tile of its own, and some that need several; outputs that end inside a
    /// panel; inputs over more than one run; ranges that leave single panels over.
    #[test]
    fn every_tile_on_every_instruction_set_is_the_plain_chain_bit_for_bit() {
        for isa in Isa::available() {
            for rows in (1..=18).chain([24, 25, 37, 49]) {
                let (inputs, outputs) = if rows % 3 == 0 { (RUN_INPUTS + 70, 37) } else { (50, 16 * 13) };
                let x = numbers(rows * inputs, 1);
                let weight = numbers(outputs * inputs, 2);
                let panels = Panels::pack(weight.clone(), outputs, inputs);
                let mut workspace = Buffer::new();
                let packed = Rows::pack(isa, Form::Floats, &x, (rows, inputs), &mut workspace);
                let before = numbers(rows * outputs, 3);
                for start in [Start::Zero, Start::Output] {
                    let mut y = before.clone();
                    let output = unsafe { Output::new(y.as_mut_ptr(), outputs) };
                    for range in [0..1, 1..panels.count()] {
                        unsafe { multiply(isa, &packed, &panels, range, output, start) };
                    }
                    for (index, y) in y.iter().enumerate() {
                        let (row, column) = (index / outputs, index % outputs);
                        let start = if start == Start::Zero { 0.0 } else { before[index] };
                        let (x, w) = (&x[row * inputs..][..inputs], &weight[column * inputs..][..inputs]);
                        let expected = chain(x, w, start);
                        let place = format!("{} rows {rows} at ({row}, {column})", isa.name());
                        assert_eq!(y.to_bits(), expected.to_bits(), "{place}");
                    }
                }
            }
        }
    }

    const FORMATS: [(Integers, Scales, bool, Minimum); 6] = [
        (Integers::Nibbles, Scales::F16, false, Minimum::MinusEightScales),
        (Integers::Nibbles, Scales::F16, false, Minimum::Stored),
        (Integers::Nibbles, Scales::F32, false, Minimum::Stored),
        (Integers::Bytes, Scales::F16, false, Minimum::Zero),
        (Integers::Bytes, Scales::F16, false, Minimum::Stored),
        (Integers::Bytes, Scales::F32, true, Minimum::Stored),
    ];

    fn blocks(format: BlockFormat, outputs: usize, inputs: usize) -> Blocks {
        let count = outputs * inputs / BLOCK_INPUTS;
        let integer = |x: f32| match format.integers {
            Integers::Nibbles => ((x + 1.0) * 8.0) as i8,
            Integers::Bytes => (x * 128.0).floor() as i8,
        };
        let coarse = |numbers: Vec<f32>| numbers.into_iter().map(|x| (x * 256.0).round() / 4096.0).collect();
        Blocks {
            format,
            inputs,
            integers: numbers(outputs * inputs, 5).into_iter().map(integer).collect(),
            scales: coarse(numbers(count * format.scales_per_block(), 6)),
            minima: if format.minimum == Minimum::Stored { coarse(numbers(count, 7)) } else { Vec::new() },
        }
    }

    /// The definition, block by block: activations as integers of 16 bits, an exact sum of products for each
    /// scale, and f32 in the order of the blocks.
    fn block_chain(x: &[f32], weight: &Blocks, output: usize) -> f32 {
        let per_block = weight.format.scales_per_block();
        let count = weight.inputs / BLOCK_INPUTS;
        let mut sum = 0.0f32;
        for (block, x) in x.chunks_exact(BLOCK_INPUTS).enumerate() {
            let greatest = x.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
            let (scale, inverse) =
                if greatest < 1e-30 { (0.0, 0.0) } else { (greatest / 32_639.0, 32_639.0 / greatest) };
            let x: Vec<i64> = x.iter().map(|x| (x * inverse).round_ties_even() as i64).collect();
            let integers = &weight.integers[output * weight.inputs + block * BLOCK_INPUTS..][..BLOCK_INPUTS];
            let products: Vec<i64> = x.iter().zip(integers).map(|(x, w)| x * i64::from(*w)).collect();
            let scales = &weight.scales[(output * count + block) * per_block..][..per_block];
            for (products, weight) in products.chunks_exact(BLOCK_INPUTS / per_block).zip(scales) {
                sum = (products.iter().sum::<i64>() as f32).mul_add(weight * scale, sum);
            }
            let minimum = match weight.format.minimum {
                Minimum::Zero => continue,
                Minimum::MinusEightScales => scales[0] * -8.0,
                Minimum::Stored => weight.minima[output * count + block],
            };
            sum = minimum.mul_add(scale * x.iter().sum::<i64>() as f32, sum);
        }
        sum
    }

    #[test]
    fn quantised_tiles_on_every_instruction_set_are_the_definition_bit_for_bit() {
        let (inputs, outputs) = (5 * BLOCK_INPUTS, 37);
        for (integers, scales, halves, minimum) in FORMATS {
            let weight = blocks(BlockFormat { integers, scales, halves, minimum }, outputs, inputs);
            let numbers_of_weight = Numbers::Blocks(weight);
            let mut panels = Panels::zeroed(numbers_of_weight.format(), outputs, inputs);
            panels.set(0, &numbers_of_weight);
            let Numbers::Blocks(weight) = numbers_of_weight else { unreachable!() };
            for isa in Isa::available() {
                for rows in (1..=18).chain([33, 150]) {
                    let mut x = numbers(rows * inputs, rows as u32);
                    x[..BLOCK_INPUTS].fill(0.0);
                    x[inputs - 1] = -1e6;
                    let mut workspace = Buffer::new();
                    let packed = Rows::pack(isa, Form::Blocks, &x, (rows, inputs), &mut workspace);
                    let mut y = vec![f32::NAN; rows * outputs];
                    let output = unsafe { Output::new(y.as_mut_ptr(), outputs) };
                    for range in [0..1, 1..panels.count()] {
                        unsafe { multiply(isa, &packed, &panels, range, output, Start::Zero) };
                    }
                    for (index, y) in y.iter().enumerate() {
                        let (row, column) = (index / outputs, index % outputs);
                        let expected = block_chain(&x[row * inputs..][..inputs], &weight, column);
                        let place = format!("{} {:?} rows {rows}", isa.name(), weight.format);
                        assert_eq!(y.to_bits(), expected.to_bits(), "{place} at ({row}, {column})");
                    }
                }
            }
        }
    }

    #[test]
    fn products_with_16_bit_floats_are_those_with_the_same_weights_as_f32() {
        let (rows, inputs, outputs) = (5, 50, 37);
        let x = numbers(rows * inputs, 1);
        let weight = numbers(outputs * inputs, 2);
        let product = |isa: Isa, panels: &Panels| {
            let mut workspace = Buffer::new();
            let packed = Rows::pack(isa, Form::Floats, &x, (rows, inputs), &mut workspace);
            let mut y = vec![0.0; rows * outputs];
            let output = unsafe { Output::new(y.as_mut_ptr(), outputs) };
            unsafe { multiply(isa, &packed, panels, 0..panels.count(), output, Start::Zero) };
            y
        };
        let narrow: [(Numbers, Vec<f32>); 2] = [
            (
                Numbers::F16(weight.iter().map(|x| f16::from_f32(*x).to_bits()).collect()),
                weight.iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
            ),
            (
                Numbers::BF16(weight.iter().map(|x| bf16::from_f32(*x).to_bits()).collect()),
                weight.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
            ),
        ];
        for (numbers, wide) in narrow {
            let mut panels = Panels::zeroed(numbers.format(), outputs, inputs);
            panels.set(0, &numbers);
            let mut row = vec![0.0; inputs];
            panels.row(20, &mut row);
            assert_eq!(row, wide[20 * inputs..][..inputs]);
            let wide = Panels::pack(wide, outputs, inputs);
            for isa in Isa::available() {
                assert_eq!(
                    product(isa, &panels),
                    product(isa, &wide),
                    "{:?} {}",
                    numbers.format(),
                    isa.name()
                );
            }
        }
    }
}
