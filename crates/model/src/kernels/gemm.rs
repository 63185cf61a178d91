//! Matrix product of activation rows with a packed weight: out = rows · weightᵀ.
//!
//! Every output element is one chain of fused multiply-adds over the inputs 0, 1, 2, …, whatever the number
//! of rows, the tile it falls into, the thread or the instruction set. Its bits therefore depend on its row
//! and its weights alone. Splitting the sum over the inputs would be faster in places and is never done.
//!
//! Weights lie in panels of 16 outputs, (outputs / 16, inputs, 16), so that a vector of a panel holds one input's
//! weights for 16 outputs. A tile is R rows × P panels of accumulators in registers: few rows take many
//! panels and are bound by memory, many rows reuse each weight from the register.

use std::ops::Range;

use super::buffer::Buffer;
use super::simd::{F32x16, Isa, Kernel, LANES};

/// Rows that one pass over the weights can take: more are cut into tiles.
const ROWS_WIDE: usize = 16;
const ROWS_NARROW: usize = 6;

/// Rows of a tile, at most, when there are several.
const TILE_ROWS_WIDE: usize = 12;
const TILE_ROWS_NARROW: usize = 6;

/// With several tiles, inputs are taken in runs of this many, so that the panels of a run (64 KiB) stay in
/// the second-level cache and the rows of a tile (24 KiB) in the first while tiles take turns.
const RUN_INPUTS: usize = 512;

/// Floats by which a panel is fetched before it is used: four cache lines carry the hardware's prefetcher over
/// page ends. Measured from memory: 25.5 → 26.0 GB/s for one row, 79 → 85 GFLOP/s for sixteen; farther is worse.
const FETCH_AHEAD: usize = 64;

/// A weight, packed: (outputs / 16, inputs, 16), the last panel filled up with zeros.
pub struct Panels {
    inputs: usize,
    outputs: usize,
    values: Buffer,
}

/// Activation rows, packed in tiles: per tile (inputs, rows of the tile). One row is its own packed form.
pub struct Rows<'a> {
    rows: usize,
    inputs: usize,
    values: &'a [f32],
}

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

/// One call's work: all rows times some panels.
struct Product<'a> {
    rows: &'a Rows<'a>,
    panels: &'a Panels,
    range: Range<usize>,
    output: Output,
    start: Start,
}

// Safety: whoever makes an `Output` vouches that threads write disjoint columns (`Output::new`).
unsafe impl Send for Output {}
unsafe impl Sync for Output {}

impl Panels {
    /// An all-zero weight to be filled by [`Panels::set`].
    pub fn zeroed(outputs: usize, inputs: usize) -> Self {
        let values = Buffer::zeroed(outputs.div_ceil(LANES) * inputs * LANES);
        Self { inputs, outputs, values }
    }

    /// Packs `weight`: (outputs, inputs), row-major.
    pub fn pack(weight: &[f32], outputs: usize, inputs: usize) -> Self {
        let mut panels = Self::zeroed(outputs, inputs);
        panels.set(0, weight);
        panels
    }

    /// Packs `rows` (any number, inputs) as the outputs from `output` on.
    pub fn set(&mut self, output: usize, rows: &[f32]) {
        for (index, row) in rows.chunks_exact(self.inputs).enumerate() {
            let (panel, lane) = ((output + index) / LANES, (output + index) % LANES);
            let panel = &mut self.values[panel * self.inputs * LANES..][..self.inputs * LANES];
            for (vector, weight) in panel.chunks_exact_mut(LANES).zip(row) {
                vector[lane] = *weight;
            }
        }
    }

    /// Copies one output's weights, (inputs): an embedding's row when the output projection is tied to it.
    pub fn row(&self, output: usize, row: &mut [f32]) {
        let panel = &self.values[output / LANES * self.inputs * LANES..][..self.inputs * LANES];
        for (vector, weight) in panel.chunks_exact(LANES).zip(row) {
            *weight = vector[output % LANES];
        }
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&*self.values)
    }

    fn panel(&self, index: usize) -> *const f32 {
        self.values[index * self.inputs * LANES..].as_ptr()
    }
}

impl<'a> Rows<'a> {
    /// Packs `source`, (rows, inputs), into `workspace`.
    pub fn pack(isa: Isa, source: &'a [f32], shape: (usize, usize), workspace: &'a mut Buffer) -> Self {
        let (rows, inputs) = shape;
        if rows == 1 {
            return Self { rows, inputs, values: &source[..inputs] };
        }
        workspace.reserve(rows * inputs);
        for (first, count) in tiles(isa.is_wide(), rows) {
            let range = first * inputs..(first + count) * inputs;
            pack_tile(&source[range.clone()], count, &mut workspace[range]);
        }
        Self { rows, inputs, values: &workspace[..rows * inputs] }
    }

    /// Rows that were packed tile by tile with [`pack_tile`].
    pub fn packed(values: &'a [f32], shape: (usize, usize)) -> Self {
        let (rows, inputs) = shape;
        Self { rows, inputs, values: &values[..rows * inputs] }
    }
}

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

/// Cuts rows into tiles of nearly equal height: (first row, rows).
pub fn tiles(wide: bool, rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let (single, height) = if wide { (ROWS_WIDE, TILE_ROWS_WIDE) } else { (ROWS_NARROW, TILE_ROWS_NARROW) };
    let count = if rows <= single { 1 } else { rows.div_ceil(height) };
    (0..count).map(move |tile| {
        let first = tile * rows / count;
        (first, (tile + 1) * rows / count - first)
    })
}

/// Packs one tile: (rows, inputs) → (inputs, rows).
pub fn pack_tile(source: &[f32], rows: usize, packed: &mut [f32]) {
    for (row, source) in source.chunks_exact(packed.len() / rows).enumerate() {
        for (vector, x) in packed.chunks_exact_mut(rows).zip(source) {
            vector[row] = *x;
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
    assert_eq!(rows.inputs, panels.inputs, "rows and weight have the same inputs");
    assert!(range.end <= panels.count(), "panels of this weight");
    isa.run(Product { rows, panels, range, output, start });
}

impl Kernel for Product<'_> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let single = if V::WIDE { ROWS_WIDE } else { ROWS_NARROW };
        if self.rows.rows > single {
            return self.several_tiles::<V>();
        }
        if V::WIDE {
            match self.rows.rows {
                1 => self.one_tile::<V, 1, 8>(),
                2 => self.one_tile::<V, 2, 8>(),
                3 => self.one_tile::<V, 3, 8>(),
                4 => self.one_tile::<V, 4, 6>(),
                5 => self.one_tile::<V, 5, 5>(),
                6 => self.one_tile::<V, 6, 4>(),
                7 => self.one_tile::<V, 7, 4>(),
                8 => self.one_tile::<V, 8, 3>(),
                9 => self.one_tile::<V, 9, 3>(),
                10 => self.one_tile::<V, 10, 2>(),
                11 => self.one_tile::<V, 11, 2>(),
                12 => self.one_tile::<V, 12, 2>(),
                13 => self.one_tile::<V, 13, 2>(),
                14 => self.one_tile::<V, 14, 2>(),
                15 => self.one_tile::<V, 15, 1>(),
                16 => self.one_tile::<V, 16, 1>(),
                _ => {}
            }
        } else {
            match self.rows.rows {
                1 => self.one_tile::<V, 1, 4>(),
                2 => self.one_tile::<V, 2, 2>(),
                3 => self.one_tile::<V, 3, 1>(),
                4 => self.one_tile::<V, 4, 1>(),
                5 => self.one_tile::<V, 5, 1>(),
                6 => self.one_tile::<V, 6, 1>(),
                _ => {}
            }
        }
    }
}

impl Product<'_> {
    /// All rows in one tile: the weights stream by once.
    #[inline(always)]
    fn one_tile<V: F32x16, const R: usize, const P: usize>(&self) {
        let mut panel = self.range.start;
        while panel + P <= self.range.end && (panel + P) * LANES <= self.panels.outputs {
            self.tile::<V, R, P>(0, panel, 0..self.rows.inputs);
            panel += P;
        }
        while panel < self.range.end {
            self.tile::<V, R, 1>(0, panel, 0..self.rows.inputs);
            panel += 1;
        }
    }

    /// Tiles take turns on a few panels, run by run of the inputs.
    #[inline(always)]
    fn several_tiles<V: F32x16>(&self) {
        let mut panel = self.range.start;
        while panel < self.range.end {
            let whole = (panel + 2) * LANES <= self.panels.outputs;
            let pair = V::WIDE && whole && panel + 2 <= self.range.end;
            for from in (0..self.rows.inputs).step_by(RUN_INPUTS) {
                let run = from..self.rows.inputs.min(from + RUN_INPUTS);
                for (first, rows) in tiles(V::WIDE, self.rows.rows) {
                    let run = run.clone();
                    match (rows, pair) {
                        (12, true) => self.tile::<V, 12, 2>(first, panel, run),
                        (11, true) => self.tile::<V, 11, 2>(first, panel, run),
                        (10, true) => self.tile::<V, 10, 2>(first, panel, run),
                        (9, true) => self.tile::<V, 9, 2>(first, panel, run),
                        (8, true) => self.tile::<V, 8, 2>(first, panel, run),
                        (12, false) => self.tile::<V, 12, 1>(first, panel, run),
                        (11, false) => self.tile::<V, 11, 1>(first, panel, run),
                        (10, false) => self.tile::<V, 10, 1>(first, panel, run),
                        (9, false) => self.tile::<V, 9, 1>(first, panel, run),
                        (8, false) => self.tile::<V, 8, 1>(first, panel, run),
                        (6, _) => self.tile::<V, 6, 1>(first, panel, run),
                        (5, _) => self.tile::<V, 5, 1>(first, panel, run),
                        (4, _) => self.tile::<V, 4, 1>(first, panel, run),
                        (3, _) => self.tile::<V, 3, 1>(first, panel, run),
                        _ => unreachable!("tiles of {} rows have 3 to 12", self.rows.rows),
                    }
                }
            }
            panel += if pair { 2 } else { 1 };
        }
    }

    /// R rows from `first` on × P panels, over a run of the inputs.
    #[inline(always)]
    fn tile<V: F32x16, const R: usize, const P: usize>(&self, first: usize, panel: usize, run: Range<usize>) {
        let inputs = self.rows.inputs;
        let carried = run.start > 0 || self.start == Start::Output;
        let mut weights = [std::ptr::null(); P];
        for (p, weight) in weights.iter_mut().enumerate() {
            *weight = self.panels.panel(panel + p).wrapping_add(run.start * LANES);
        }
        let rows = self.rows.values[first * inputs + run.start * R..][..run.len() * R].as_ptr();
        let output = self.output.row(first).column(panel * LANES);
        let valid = self.panels.outputs - panel * LANES;
        // Safety: the slice above bounds the rows; panels are whole; the caller of `multiply` vouches for
        // the output, of which only columns below `outputs` are touched.
        unsafe {
            if valid >= P * LANES {
                accumulate::<V, R, P>(rows, weights, run.len(), output, carried);
            } else {
                // The last, partly filled panel goes through a copy: its padding has no place in the output.
                let mut copy = [[0.0f32; LANES]; R];
                for (row, copy) in copy.iter_mut().enumerate() {
                    copy[..valid].copy_from_slice(output.slice(row, 0..valid));
                }
                let padded = Output { start: copy.as_mut_ptr().cast(), stride: LANES };
                accumulate::<V, R, 1>(rows, [weights[0]], run.len(), padded, carried);
                for (row, copy) in copy.iter().enumerate() {
                    output.slice(row, 0..valid).copy_from_slice(&copy[..valid]);
                }
            }
        }
    }
}

/// The inner loop, of this module and of the attention scores: R × P vectors of sums stay in registers while
/// `depth` inputs go by.
///
/// # Safety
/// `rows` has depth × R floats, each of `panels` depth × 16, `output` R rows of P × 16.
#[inline(always)]
pub unsafe fn accumulate<V: F32x16, const R: usize, const P: usize>(
    rows: *const f32,
    panels: [*const f32; P],
    depth: usize,
    output: Output,
    carried: bool,
) {
    let mut sums = [[V::splat(0.0); P]; R];
    unsafe {
        if carried {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (p, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(output.start.add(r * output.stride + p * LANES));
                }
            }
        }
        for input in 0..depth {
            let mut vectors = [V::splat(0.0); P];
            for (vector, panel) in vectors.iter_mut().zip(panels) {
                *vector = V::load(panel.add(input * LANES));
                V::prefetch(panel.wrapping_add(input * LANES + FETCH_AHEAD));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = V::splat(*rows.add(input * R + r));
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = x.mul_add(vector, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                sum.store(output.start.add(r * output.stride + p * LANES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
                let panels = Panels::pack(&weight, outputs, inputs);
                let mut workspace = Buffer::new();
                let packed = Rows::pack(isa, &x, (rows, inputs), &mut workspace);
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
}
