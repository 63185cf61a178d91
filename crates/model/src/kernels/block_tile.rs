//! The inner loop of every product with quantised weights: R rows × panel after panel, block after block.
//!
//! Within a block, products are summed as integers, exactly and therefore in any order; their sums, times the
//! scales of weight and activations, are then added in f32 in the order of the blocks. One panel at a time is
//! enough: a vector of weights serves all rows, and a panel is one stream for the hardware's prefetcher.

use super::blocks::{BYTE_ZERO, Integers, Minimum, PanelLayout, QUADS, Scales};
use super::simd::{F32x16, I32x16, Isa, Kernel, LANES};

/// Rows of a tile, at most, on any instruction set.
pub const ROWS_MAX: usize = ROWS_WIDE;

/// Sums of 16 rows, the 8 vectors of a block's weights, and a few for scales fit 32 registers.
const ROWS_WIDE: usize = 16;
const ROWS_NARROW: usize = 6;

/// So few rows sum both parts of the products apart, since one sum alone would wait for itself. Sums of two registers each leave
/// room for fewer among sixteen.
const ROWS_APART_WIDE: usize = 6;
const ROWS_APART_NARROW: usize = 2;

/// 32-bit words of a row's block: two parts of every quad, then those of [`Word`].
pub const ROW_WORDS: usize = 2 * QUADS + 4;

/// Words of a row's block after its quads. With x = scale · integer:
#[derive(Clone, Copy)]
pub enum Word {
    /// f32
    Scale = 2 * QUADS as isize,
    /// Sum of the x: f32
    Sum,
    /// -128 × the sum of the integers: i32
    Zero,
    /// The same for the first half of the block.
    ZeroOfFirstHalf,
}

/// One tile's work: output (height, 16 × panels) = rows · panels.
pub struct BlockTile {
    /// Per block: (height, [`ROW_WORDS`])
    pub rows: *const i32,
    pub height: usize,
    /// The first panel; others follow.
    pub panel: *const u8,
    pub panels: usize,
    /// Bring in the panel that comes after each, meanwhile.
    pub fetch: bool,
    pub layout: PanelLayout,
}

/// A tile and where it goes.
struct Placed<'a> {
    tile: &'a BlockTile,
    output: *mut f32,
    stride: usize,
}

/// A block of a panel on its way through the registers.
#[derive(Clone, Copy)]
struct Block {
    integers: *const u8,
    /// Scales, then minima.
    scales: *const u8,
    /// Distance of what to bring into the cache.
    ahead: usize,
    layout: PanelLayout,
}

/// Height of the (first of the) tiles that `rows` rows are cut into.
pub fn rows_together(isa: Isa, rows: usize) -> usize {
    let most = if isa.is_wide() { ROWS_WIDE } else { ROWS_NARROW };
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

impl BlockTile {
    /// Computes the tile into rows of `output`, `stride` floats apart.
    ///
    /// # Safety
    /// Rows, panel and output are as large as the fields say; nobody else uses the output.
    pub unsafe fn run(&self, isa: Isa, output: *mut f32, stride: usize) {
        isa.run(Placed { tile: self, output, stride });
    }
}

impl Kernel for Placed<'_> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        // Safety: as promised to `BlockTile::run`.
        unsafe {
            match (V::WIDE, self.tile.height) {
                (_, 1) => self.accumulate::<V, 1>(),
                (_, 2) => self.accumulate::<V, 2>(),
                (_, 3) => self.accumulate::<V, 3>(),
                (_, 4) => self.accumulate::<V, 4>(),
                (_, 5) => self.accumulate::<V, 5>(),
                (_, 6) => self.accumulate::<V, 6>(),
                (true, 7) => self.accumulate::<V, 7>(),
                (true, 8) => self.accumulate::<V, 8>(),
                (true, 9) => self.accumulate::<V, 9>(),
                (true, 10) => self.accumulate::<V, 10>(),
                (true, 11) => self.accumulate::<V, 11>(),
                (true, 12) => self.accumulate::<V, 12>(),
                (true, 13) => self.accumulate::<V, 13>(),
                (true, 14) => self.accumulate::<V, 14>(),
                (true, 15) => self.accumulate::<V, 15>(),
                (true, 16) => self.accumulate::<V, 16>(),
                _ => unreachable!("a tile of {} rows", self.tile.height),
            }
        }
    }
}

type Weights<V> = [<<V as F32x16>::Integers as I32x16>::Weights; QUADS];

impl Placed<'_> {
    #[inline(always)]
    unsafe fn accumulate<V: F32x16, const R: usize>(&self) {
        let BlockTile { rows, panel, panels, fetch, layout, .. } = *self.tile;
        let panel_bytes = layout.panel_bytes();
        for index in 0..panels {
            let integers = panel.wrapping_add(index * panel_bytes);
            let scales = integers.wrapping_add(layout.scales(0));
            let first = Block { integers, scales, ahead: if fetch { panel_bytes } else { 0 }, layout };
            unsafe {
                let sums = first.accumulate::<V, R>(rows);
                for r in 0..R {
                    sums[r].store(self.output.add(r * self.stride + index * LANES));
                }
            }
        }
    }
}

impl Block {
    /// Sums over this block and those that follow it in the panel.
    #[inline(always)]
    unsafe fn accumulate<V: F32x16, const R: usize>(mut self, mut rows: *const i32) -> [V; R] {
        let layout = self.layout;
        let (integer_bytes, vector_bytes) = (layout.integer_bytes(), layout.vector_bytes());
        let scale_bytes = layout.vectors() * vector_bytes;
        let mut sums = [V::splat(0.0); R];
        for _ in 0..layout.blocks {
            unsafe {
                let weights = self.weights::<V>();
                if layout.format.halves {
                    let first = products::<V, R, 0, { QUADS / 2 }>(&weights, rows, layout);
                    scale::<V, R>(&mut sums, first, self.vector(0), rows);
                    let second = products::<V, R, { QUADS / 2 }, QUADS>(&weights, rows, layout);
                    scale::<V, R>(&mut sums, second, self.vector(vector_bytes), rows);
                } else {
                    let whole = products::<V, R, 0, QUADS>(&weights, rows, layout);
                    scale::<V, R>(&mut sums, whole, self.vector(0), rows);
                }
                match layout.format.minimum {
                    Minimum::Zero => {}
                    Minimum::MinusEightScales => {
                        add_minima::<V, R>(&mut sums, self.vector::<V>(0).mul(V::splat(-8.0)), rows);
                    }
                    Minimum::Stored => {
                        add_minima::<V, R>(
                            &mut sums,
                            self.vector(scale_bytes.wrapping_sub(vector_bytes)),
                            rows,
                        );
                    }
                }
            }
            self.integers = self.integers.wrapping_add(integer_bytes);
            self.scales = self.scales.wrapping_add(scale_bytes);
            rows = rows.wrapping_add(ROW_WORDS * R);
        }
        sums
    }

    /// The integers, one input a byte.
    #[inline(always)]
    unsafe fn weights<V: F32x16>(&self) -> Weights<V> {
        let Self { integers, ahead, layout, .. } = *self;
        unsafe {
            let vector = |index: usize| {
                let from = integers.add(index * 4 * LANES);
                V::prefetch(from.wrapping_add(ahead).cast());
                V::Integers::load_weights(from)
            };
            let mut weights = [V::Integers::load_weights(integers); QUADS];
            match layout.format.integers {
                Integers::Bytes => {
                    for quad in 0..QUADS {
                        weights[quad] = vector(quad);
                    }
                }
                Integers::Nibbles => {
                    for pair in 0..QUADS / 2 {
                        let packed = vector(pair);
                        weights[2 * pair] = V::Integers::low_nibbles(packed);
                        weights[2 * pair + 1] = V::Integers::high_nibbles(packed);
                    }
                }
            }
            weights
        }
    }

    /// Sixteen scales or minima, so many bytes after the first.
    #[inline(always)]
    unsafe fn vector<V: F32x16>(&self, offset: usize) -> V {
        let from = self.scales.wrapping_add(offset);
        V::prefetch(from.wrapping_add(self.ahead).cast());
        unsafe {
            match self.layout.format.scales {
                Scales::F16 => V::load_f16(from.cast()),
                Scales::F32 => V::load(from.cast()),
            }
        }
    }
}

/// sums += products · scales of the weights · scale of the row
#[inline(always)]
unsafe fn scale<V: F32x16, const R: usize>(
    sums: &mut [V; R],
    products: [V::Integers; R],
    scales: V,
    rows: *const i32,
) {
    for r in 0..R {
        let scale = scales.mul(unsafe { word::<V>(rows, Word::Scale, r) });
        sums[r] = V::of_integers(products[r]).mul_add(scale, sums[r]);
    }
}

/// sums += minima · sum of the row's block
#[inline(always)]
unsafe fn add_minima<V: F32x16, const R: usize>(sums: &mut [V; R], minima: V, rows: *const i32) {
    for r in 0..R {
        sums[r] = minima.mul_add(unsafe { word::<V>(rows, Word::Sum, r) }, sums[r]);
    }
}

/// Integer products of quads `FROM..TO` of a block with every row.
#[inline(always)]
unsafe fn products<V: F32x16, const R: usize, const FROM: usize, const TO: usize>(
    weights: &Weights<V>,
    rows: *const i32,
    layout: PanelLayout,
) -> [V::Integers; R] {
    let quad = |part: usize, quad: usize, r: usize| unsafe { *rows.add(r * ROW_WORDS + part * QUADS + quad) };
    let mut sums = [V::Integers::splat(0); R];
    if R <= if V::WIDE { ROWS_APART_WIDE } else { ROWS_APART_NARROW } {
        let mut second = sums;
        for q in FROM..TO {
            for r in 0..R {
                sums[r] = sums[r].dot::<0>(weights[q], quad(0, q, r));
                second[r] = second[r].dot::<1>(weights[q], quad(1, q, r));
            }
        }
        for r in 0..R {
            sums[r] = sums[r].weigh_first().add(second[r]);
        }
    } else {
        for q in FROM..TO {
            for r in 0..R {
                sums[r] = sums[r].dot::<0>(weights[q], quad(0, q, r));
            }
        }
        for r in 0..R {
            sums[r] = sums[r].weigh_first();
        }
        for q in FROM..TO {
            for r in 0..R {
                sums[r] = sums[r].dot::<1>(weights[q], quad(1, q, r));
            }
        }
    }
    if layout.format.integers == Integers::Bytes {
        for r in 0..R {
            let zero = |word: Word| unsafe { *rows.add(r * ROW_WORDS + word as usize) };
            let zero = match (FROM, TO) {
                (0, QUADS) => zero(Word::Zero),
                (0, _) => zero(Word::ZeroOfFirstHalf),
                _ => zero(Word::Zero) - zero(Word::ZeroOfFirstHalf),
            };
            sums[r] = sums[r].add(V::Integers::splat(zero));
        }
    }
    sums
}

#[inline(always)]
unsafe fn word<V: F32x16>(rows: *const i32, word: Word, r: usize) -> V {
    V::splat(unsafe { *rows.add(r * ROW_WORDS + word as usize).cast::<f32>() })
}

/// What [`Word::Zero`] takes from a sum of integers.
pub const fn zero_of(sum: i32) -> i32 {
    -BYTE_ZERO * sum
}
