//! Activation rows as a product reads them: packed in tiles, as floats or as blocks of 16-bit integers.
//!
//! Beside quantised weights, activations of a block of 32 become integers of 16 bits and a scale: their error,
//! 1/65278 of the block's greatest, is far below that of any such weight. (Eight bits, as in most engines,
//! would halve the arithmetic, and the logits would no longer be those of the model to three digits.)

use super::block_tile::{self, ROW_WORDS, Word, zero_of};
use super::blocks::{BLOCK_INPUTS, QUADS};
use super::buffer::Buffer;
use super::panels::Format;
use super::simd::{F32x16, I32x16, Isa, Kernel, LANES};
use super::tile;

/// The greatest integer whose high byte is still signed when the low byte is, too: 127 · 256 + 127.
const INTEGER_MAX: f32 = 32_639.0;

/// A block without a number greater than this is taken as zeros: its scale would be no normal number.
const GREATEST_MIN: f32 = 1e-30;

/// What the rows of a product consist of; follows from the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Per tile: (inputs, rows of the tile). One row is its own packed form.
    Floats,
    /// Per tile and block: (rows of the tile, [`ROW_WORDS`]).
    Blocks,
}

/// Packed rows.
pub struct Rows<'a> {
    pub(super) form: Form,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) values: &'a [f32],
}

/// Integers of one tile's rows.
struct Quantise<'a> {
    /// (height, inputs)
    source: &'a [f32],
    height: usize,
    packed: *mut i32,
}

impl Form {
    pub fn of(format: Format) -> Self {
        if format.is_blocks() { Self::Blocks } else { Self::Floats }
    }

    /// Cuts rows into tiles of nearly equal height: (first row, rows).
    pub fn tiles(self, isa: Isa, rows: usize) -> impl Iterator<Item = (usize, usize)> {
        let together = match self {
            Self::Floats => tile::rows_together(isa, rows),
            Self::Blocks => block_tile::rows_together(isa, rows),
        };
        let count = rows.div_ceil(together);
        (0..count).map(move |tile| {
            let first = tile * rows / count;
            (first, (tile + 1) * rows / count - first)
        })
    }

    /// 32-bit words of a packed row, no more than its inputs.
    pub fn words(self, inputs: usize) -> usize {
        match self {
            Self::Floats => inputs,
            Self::Blocks => inputs / BLOCK_INPUTS * ROW_WORDS,
        }
    }

    /// Packs one tile, (rows, inputs), into as many rows of [`Form::words`].
    pub fn pack_tile(self, isa: Isa, source: &[f32], rows: usize, packed: &mut [f32]) {
        let inputs = source.len() / rows;
        assert_eq!(packed.len(), rows * self.words(inputs), "room for the tile");
        match self {
            Self::Floats => {
                for (row, source) in source.chunks_exact(inputs).enumerate() {
                    for (vector, x) in packed.chunks_exact_mut(rows).zip(source) {
                        vector[row] = *x;
                    }
                }
            }
            Self::Blocks => {
                assert!(inputs.is_multiple_of(BLOCK_INPUTS), "whole blocks");
                isa.run(Quantise { source, height: rows, packed: packed.as_mut_ptr().cast() });
            }
        }
    }
}

impl<'a> Rows<'a> {
    /// Packs `source`, (rows, inputs), into `workspace`.
    pub fn pack(
        isa: Isa,
        form: Form,
        source: &'a [f32],
        (rows, inputs): (usize, usize),
        workspace: &'a mut Buffer,
    ) -> Self {
        if rows == 1 && form == Form::Floats {
            return Self::packed(form, source, (rows, inputs));
        }
        let words = form.words(inputs);
        workspace.reserve(rows * words);
        for (first, count) in form.tiles(isa, rows) {
            let source = &source[first * inputs..][..count * inputs];
            form.pack_tile(isa, source, count, &mut workspace[first * words..][..count * words]);
        }
        Self::packed(form, workspace, (rows, inputs))
    }

    /// Rows that were packed tile by tile with [`Form::pack_tile`].
    pub fn packed(form: Form, values: &'a [f32], (rows, inputs): (usize, usize)) -> Self {
        Self { form, rows, inputs, values: &values[..rows * form.words(inputs)] }
    }

    /// Where a tile begins.
    pub(super) fn tile(&self, first: usize, count: usize) -> *const f32 {
        let words = self.form.words(self.inputs);
        self.values[first * words..][..count * words].as_ptr()
    }
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { source, height, packed } = self;
        let inputs = source.len() / height;
        for block in 0..inputs / BLOCK_INPUTS {
            for row in 0..height {
                let source = source[row * inputs + block * BLOCK_INPUTS..][..BLOCK_INPUTS].as_ptr();
                let packed = packed.wrapping_add((block * height + row) * ROW_WORDS);
                // Safety: a block is 32 floats, and its words lie within the tile.
                unsafe { quantise::<V>(source, packed) };
            }
        }
    }
}

/// One block of one row into its words.
#[inline(always)]
unsafe fn quantise<V: F32x16>(source: *const f32, packed: *mut i32) {
    unsafe {
        let (low, high) = (V::load(source), V::load(source.add(LANES)));
        let negative = V::splat(-1.0);
        let greatest = low.max(low.mul(negative)).max(high.max(high.mul(negative))).greatest();
        let (scale, inverse) = if greatest < GREATEST_MIN {
            (0.0, 0.0)
        } else {
            (greatest / INTEGER_MAX, INTEGER_MAX / greatest)
        };
        let inverse = V::splat(inverse);
        let (low, high) = (low.mul(inverse).round(), high.mul(inverse).round());
        for (half, integers) in [low, high].into_iter().enumerate() {
            for (part, words) in integers.encode().into_iter().enumerate() {
                packed.add(part * QUADS + half * (QUADS / 2)).cast::<[i32; LANES / 4]>().write(words);
            }
        }
        let (first, sum) = (low.sum(), low.add(high).sum());
        let set = |word: Word, bits: i32| *packed.add(word as usize) = bits;
        set(Word::Scale, scale.to_bits() as i32);
        set(Word::Sum, (scale * sum as f32).to_bits() as i32);
        set(Word::Zero, zero_of(sum));
        set(Word::ZeroOfFirstHalf, zero_of(first));
    }
}
