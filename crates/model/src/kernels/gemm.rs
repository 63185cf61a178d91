//! Matrix product of activation rows with a packed weight: out = rows · weightᵀ.
//!
//! Every output element is one chain of fused multiply-adds over the inputs 0, 1, 2, …, whatever the number
//! of rows, the tile it falls into, the thread or the instruction set. Its bits therefore depend on its row
//! and its weights alone. Splitting the sum over the inputs would be faster in places and is never done.
//!
//! Weights lie in panels of 16 outputs, (outputs / 16, inputs, 16), so that a vector of a panel holds one
//! input's weights for 16 outputs, and a panel streams through the [`tile`](super::tile) kernel.

use std::ops::Range;
use std::sync::Arc;

use super::buffer::Buffer;
use super::simd::{Isa, LANES};
use super::tile::{Tile, panels_together, rows_together};

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

/// A weight, packed: (outputs / 16, inputs, 16), the last panel filled up with zeros.
pub struct Panels {
    inputs: usize,
    outputs: usize,
    values: Arc<Buffer>,
    /// Where the first panel begins in `values`, which weights may share.
    first: usize,
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

// Safety: whoever makes an `Output` vouches that threads write disjoint columns (`Output::new`).
unsafe impl Send for Output {}
unsafe impl Sync for Output {}

impl Panels {
    /// An all-zero weight to be filled by [`Panels::set`].
    pub fn zeroed(outputs: usize, inputs: usize) -> Self {
        let values = Buffer::zeroed(outputs.div_ceil(LANES) * inputs * LANES);
        Self { inputs, outputs, values: Arc::new(values), first: 0 }
    }

    /// Packs `weight`: (outputs, inputs), row-major.
    pub fn pack(weight: &[f32], outputs: usize, inputs: usize) -> Self {
        let mut panels = Self::zeroed(outputs, inputs);
        panels.set(0, weight);
        panels
    }

    /// Moves weights into one stretch of memory, so that all of it lies on huge pages.
    pub fn adjoin<const N: usize>(weights: [Self; N]) -> [Self; N] {
        let mut together = Buffer::zeroed(weights.iter().map(|weight| weight.floats().len()).sum());
        let mut end = 0;
        for weight in &weights {
            together[end..end + weight.floats().len()].copy_from_slice(weight.floats());
            end += weight.floats().len();
        }
        let together = Arc::new(together);
        let mut first = 0;
        weights.map(|weight| {
            let moved = Self { values: together.clone(), first, ..weight };
            first += moved.floats().len();
            moved
        })
    }

    /// Packs `rows` (any number, inputs) as the outputs from `output` on.
    pub fn set(&mut self, output: usize, rows: &[f32]) {
        let values = Arc::get_mut(&mut self.values).expect("weights are filled before they are adjoined");
        for (index, row) in rows.chunks_exact(self.inputs).enumerate() {
            let (panel, lane) = ((output + index) / LANES, (output + index) % LANES);
            let panel = &mut values[panel * self.inputs * LANES..][..self.inputs * LANES];
            for (vector, weight) in panel.chunks_exact_mut(LANES).zip(row) {
                vector[lane] = *weight;
            }
        }
    }

    /// Copies one output's weights, (inputs): an embedding's row when the output projection is tied to it.
    pub fn row(&self, output: usize, row: &mut [f32]) {
        let panel = &self.floats()[output / LANES * self.inputs * LANES..][..self.inputs * LANES];
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
        size_of_val(self.floats())
    }

    fn floats(&self) -> &[f32] {
        &self.values[self.first..][..self.count() * self.inputs * LANES]
    }

    fn panel(&self, index: usize) -> *const f32 {
        self.floats()[index * self.inputs * LANES..].as_ptr()
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
        for (first, count) in tiles(isa, rows) {
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
pub fn tiles(isa: Isa, rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(rows_together(isa, rows));
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
    let inputs = rows.inputs;
    let tile_count = tiles(isa, rows.rows).count();
    let together = panels_together(isa, rows_together(isa, rows.rows));
    let run_max = if tile_count == 1 { RUN_INPUTS_SINGLE } else { RUN_INPUTS };
    let run_inputs = inputs.div_ceil(inputs.div_ceil(run_max));
    let whole = range.end.min(panels.outputs / LANES);
    let mut panel = range.start;
    while panel < range.end {
        let count = if panel + together <= whole { together } else { 1 };
        for from in (0..inputs).step_by(run_inputs) {
            let depth = run_inputs.min(inputs - from);
            // From a panel's run to its next, or to the first of the panel that comes after these.
            let next = if from + depth < inputs { depth } else { count * inputs - from } * LANES;
            for (turn, (first, height)) in tiles(isa, rows.rows).enumerate() {
                let mut tile = Tile::new(height, depth, from > 0 || start == Start::Output);
                tile.rows = rows.values[first * inputs + from * height..][..depth * height].as_ptr();
                tile.count = count;
                for index in 0..count {
                    let run = panels.panel(panel + index).wrapping_add(from * LANES);
                    tile.panels[index] = run;
                    tile.fetch[index] = run.wrapping_add(match () {
                        () if rows.rows <= STREAMING_ROWS => FETCH_AHEAD,
                        // The tiles share out what is to be fetched.
                        () if index % tile_count == turn => next,
                        () => 0,
                    });
                }
                let output = output.row(first).column(panel * LANES);
                // Safety: the slice above bounds the rows; panels are whole; the caller vouches for the output.
                unsafe {
                    if panel < whole {
                        tile.run(isa, output.start, output.stride);
                    } else {
                        ragged(isa, &tile, output, panels.outputs - panel * LANES);
                    }
                }
            }
        }
        panel += count;
    }
}

/// The last, partly filled panel goes through a copy: its padding has no place in the output.
unsafe fn ragged(isa: Isa, tile: &Tile, output: Output, valid: usize) {
    let mut copy = [0.0f32; super::tile::ROWS_MAX * LANES];
    unsafe {
        for (row, copy) in copy.chunks_exact_mut(LANES).take(tile.height).enumerate() {
            copy[..valid].copy_from_slice(output.slice(row, 0..valid));
        }
        tile.run(isa, copy.as_mut_ptr(), LANES);
        for (row, copy) in copy.chunks_exact(LANES).take(tile.height).enumerate() {
            output.slice(row, 0..valid).copy_from_slice(&copy[..valid]);
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
