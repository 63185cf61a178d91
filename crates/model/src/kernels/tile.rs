//! The inner loop of every product: R rows × P panels of sums stay in registers while the inputs go by.
//!
//! Every number of rows has an instance of its own, so that small batches waste nothing: few rows take many
//! panels and are bound by memory, many rows use each weight many times from its register.

use super::simd::{F32x16, Isa, Kernel, LANES};

/// Rows of a tile, at most, on any instruction set.
pub const ROWS_MAX: usize = ROWS_WIDE;

/// Panels of a tile, at most.
pub const PANELS_MAX: usize = 4;

/// Rows that are taken in one tile if there are no more: the weights stream by once.
const ROWS_WIDE: usize = 14;
const ROWS_NARROW: usize = 6;

/// Height of the tiles if there are several: with two panels, sums fill 24 of 32 registers.
const SEVERAL_ROWS_WIDE: usize = 12;

/// A number format of weights, or of keys and values, that is widened to f32, exactly, on its way into a register.
pub trait Element: Copy {
    /// # Safety
    /// `from` is readable for 16 of them; no alignment is needed.
    unsafe fn load<V: F32x16>(from: *const Self) -> V;
}

#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F16(u16);

#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct BF16(u16);

/// One tile's work: output (height, 16 × count) = or += rows · panels.
pub struct Tile<W: Element = f32> {
    /// (depth, height)
    pub rows: *const f32,
    pub height: usize,
    /// The first `count`: (depth, 16) each.
    pub panels: [*const W; PANELS_MAX],
    /// What to bring into the cache meanwhile, as large as the panels: the next panels, so that memory and
    /// arithmetic overlap where the hardware's prefetcher stops, at the ends of pages.
    pub fetch: [*const W; PANELS_MAX],
    /// 1, or [`panels_together`] for the height.
    pub count: usize,
    pub depth: usize,
    /// Sums go on from the output instead of starting from zero.
    pub carried: bool,
}

/// A tile and where it goes.
struct Placed<'a, W: Element> {
    tile: &'a Tile<W>,
    output: *mut f32,
    stride: usize,
}

/// Height of the (first of the) tiles that `rows` rows are cut into.
pub fn rows_together(isa: Isa, rows: usize) -> usize {
    let (single, several) =
        if isa.is_wide() { (ROWS_WIDE, SEVERAL_ROWS_WIDE) } else { (ROWS_NARROW, ROWS_NARROW) };
    if rows <= single { rows.max(1) } else { rows.div_ceil(rows.div_ceil(several)) }
}

/// Panels that a tile of this height takes.
pub fn panels_together(isa: Isa, height: usize) -> usize {
    match (isa.is_wide(), height) {
        (true, 0..=4) => 4,
        (true, _) => 2,
        (false, 0..=1) => 4,
        (false, 2) => 2,
        (false, _) => 1,
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const Self) -> V {
        unsafe { V::load(from) }
    }
}

impl Element for F16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const Self) -> V {
        unsafe { V::load_f16(from.cast()) }
    }
}

impl Element for BF16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const Self) -> V {
        unsafe { V::load_bf16(from.cast()) }
    }
}

impl<W: Element> Tile<W> {
    /// A tile without rows and panels.
    pub fn new(height: usize, depth: usize, carried: bool) -> Self {
        let none = [std::ptr::null(); PANELS_MAX];
        Self { rows: std::ptr::null(), height, panels: none, fetch: none, count: 0, depth, carried }
    }

    /// Computes the tile into rows of `output`, `stride` floats apart.
    ///
    /// # Safety
    /// Rows, panels and output are as large as the fields say; nobody else uses the output.
    pub unsafe fn run(&self, isa: Isa, output: *mut f32, stride: usize) {
        debug_assert!(self.count == 1 || self.count == panels_together(isa, self.height));
        isa.run(Placed { tile: self, output, stride });
    }
}

impl<W: Element> Kernel for Placed<'_, W> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        // Safety: as promised to `Tile::run`.
        unsafe {
            if V::WIDE {
                match (self.tile.height, self.tile.count) {
                    (1, 4) => self.accumulate::<V, 1, 4>(),
                    (2, 4) => self.accumulate::<V, 2, 4>(),
                    (3, 4) => self.accumulate::<V, 3, 4>(),
                    (4, 4) => self.accumulate::<V, 4, 4>(),
                    (5, 2) => self.accumulate::<V, 5, 2>(),
                    (6, 2) => self.accumulate::<V, 6, 2>(),
                    (7, 2) => self.accumulate::<V, 7, 2>(),
                    (8, 2) => self.accumulate::<V, 8, 2>(),
                    (9, 2) => self.accumulate::<V, 9, 2>(),
                    (10, 2) => self.accumulate::<V, 10, 2>(),
                    (11, 2) => self.accumulate::<V, 11, 2>(),
                    (12, 2) => self.accumulate::<V, 12, 2>(),
                    (13, 2) => self.accumulate::<V, 13, 2>(),
                    (14, 2) => self.accumulate::<V, 14, 2>(),
                    (1, _) => self.accumulate::<V, 1, 1>(),
                    (2, _) => self.accumulate::<V, 2, 1>(),
                    (3, _) => self.accumulate::<V, 3, 1>(),
                    (4, _) => self.accumulate::<V, 4, 1>(),
                    (5, _) => self.accumulate::<V, 5, 1>(),
                    (6, _) => self.accumulate::<V, 6, 1>(),
                    (7, _) => self.accumulate::<V, 7, 1>(),
                    (8, _) => self.accumulate::<V, 8, 1>(),
                    (9, _) => self.accumulate::<V, 9, 1>(),
                    (10, _) => self.accumulate::<V, 10, 1>(),
                    (11, _) => self.accumulate::<V, 11, 1>(),
                    (12, _) => self.accumulate::<V, 12, 1>(),
                    (13, _) => self.accumulate::<V, 13, 1>(),
                    (14, _) => self.accumulate::<V, 14, 1>(),
                    _ => unreachable!("a tile of {} rows", self.tile.height),
                }
            } else {
                match (self.tile.height, self.tile.count) {
                    (1, 4) => self.accumulate::<V, 1, 4>(),
                    (2, 2) => self.accumulate::<V, 2, 2>(),
                    (1, _) => self.accumulate::<V, 1, 1>(),
                    (2, _) => self.accumulate::<V, 2, 1>(),
                    (3, _) => self.accumulate::<V, 3, 1>(),
                    (4, _) => self.accumulate::<V, 4, 1>(),
                    (5, _) => self.accumulate::<V, 5, 1>(),
                    (6, _) => self.accumulate::<V, 6, 1>(),
                    _ => unreachable!("a tile of {} rows", self.tile.height),
                }
            }
        }
    }
}

impl<W: Element> Placed<'_, W> {
    #[inline(always)]
    unsafe fn accumulate<V: F32x16, const R: usize, const P: usize>(&self) {
        let Self { tile: &Tile { rows, panels, fetch, depth, carried, .. }, output, stride } = *self;
        let mut sums = [[V::splat(0.0); P]; R];
        unsafe {
            if carried {
                for r in 0..R {
                    for p in 0..P {
                        sums[r][p] = V::load(output.add(r * stride + p * LANES));
                    }
                }
            }
            for input in 0..depth {
                let mut weights = [V::splat(0.0); P];
                for p in 0..P {
                    weights[p] = W::load(panels[p].add(input * LANES));
                    V::prefetch(fetch[p].wrapping_add(input * LANES).cast());
                }
                for r in 0..R {
                    let x = V::splat(*rows.add(input * R + r));
                    for p in 0..P {
                        sums[r][p] = x.mul_add(weights[p], sums[r][p]);
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    sums[r][p].store(output.add(r * stride + p * LANES));
                }
            }
        }
    }
}
