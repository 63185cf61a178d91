//! Causal attention of a few query vectors over one key-value head of the paged cache.
//!
//! Positions are cut into segments, by where they stand in the sequence. For each segment there are two passes: all scores,
//! their maximum and exponentials; then the weighted sum of the values, in the order of positions. Then the segments'
//! sums are added, in their order, each with the factor that its maximum makes due. So neither the cut into chunks, nor the blocks
//! that hold the cache, nor the threads that share the segments show in the result. (Online softmax would save
//! the score buffer and cost a rescaling per block.) Queries that share a key-value head, by grouping or by following
//! one another, are taken together and read the cache once.

use std::ops::Range;

use super::buffer::Buffer;
use super::simd::{F32x16, Isa, Kernel, LANES};
use super::tile::{Element, F16, Tile, panels_together};

/// Query vectors taken together, at most.
const QUERIES_WIDE: usize = 12;
const QUERIES_NARROW: usize = 6;

/// Queries whose values are weighed together, at most, where registers are wide.
const WEIGHED_TOGETHER: usize = 6;

/// Positions of a segment: their scores stay in the first cache, and threads that share one sequence's find enough of them.
const SEGMENT: usize = 512;

/// Panels of values ahead of the one that is weighed, which are asked for: from far away, and once more, because where memory
/// is busy some of what is asked for never comes.
const FETCH_PANELS: [usize; 2] = [4, 2];

/// Chains of maxima over the scores of a query.
const MAXIMA: usize = 4;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// The number format of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    F32,
    F16,
}

/// Where one layer's keys and values lie. Per block: keys (kv_heads, block_tokens / 16, head_dim, 16), each
/// 16 positions a panel as of a weight, then values (kv_heads, block_tokens, head_dim).
#[derive(Clone, Copy)]
pub struct LayerCache {
    pub start: *mut u8,
    pub format: KvFormat,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub block_tokens: usize,
}

/// Queries of one sequence that attend together: `tokens` consecutive positions × `heads` consecutive query
/// heads of one key-value head.
pub struct Queries<'a> {
    /// Position of the first token; all lie in one run of 16 positions, see [`tokens_together`].
    pub position: usize,
    pub tokens: usize,
    pub heads: usize,
    pub kv_head: usize,
    /// First head of the first token: (tokens, stride) of which heads × head_dim are read. Scaled already.
    pub query: *const f32,
    pub query_stride: usize,
    /// The result, as `query`.
    pub output: *mut f32,
    pub output_stride: usize,
    /// Block table of the sequence.
    pub blocks: &'a [u32],
}

/// What the segments of some queries come to: for each segment and query, the weighted sum of its values, the sum of the
/// weights and the greatest score; (segments, queries, head_dim + 16).
#[derive(Clone, Copy)]
pub struct Partials {
    pub start: *mut f32,
    pub head_dim: usize,
}

/// A number format of the cache: what is stored is rounded to it.
trait CacheElement: Element {
    /// Vectors of 16 in a cache line.
    const LINE_VECTORS: usize = LINE_BYTES / (LANES * size_of::<Self>());

    /// # Safety
    /// `to` is writable for 16 of them; no alignment is needed.
    unsafe fn store<V: F32x16>(to: *mut Self, numbers: V);
}

/// The cache, known to hold `W`.
#[derive(Clone, Copy)]
struct Typed<W> {
    start: *mut W,
    layout: LayerCache,
}

/// Stores one position's keys and values.
struct Write<'a, W> {
    cache: Typed<W>,
    slot: usize,
    /// (kv_heads, head_dim)
    keys: &'a [f32],
    values: &'a [f32],
}

/// The work over one segment.
struct Attention<'a, W> {
    isa: Isa,
    queries: &'a Queries<'a>,
    cache: Typed<W>,
    /// Positions of the segment, up to the last that a query sees.
    keys: Range<usize>,
    /// (head_dim, queries)
    packed: *mut f32,
    /// (queries, score_stride)
    scores: *mut f32,
    score_stride: usize,
    /// The segment's results: (queries, head_dim + 16)
    results: *mut f32,
}

/// Scores of one query → weights, in place, and their sum behind them.
struct Softmax<'a, W> {
    attention: &'a Attention<'a, W>,
    query: usize,
}

/// Weighted sums of values: `height` queries from `first` on, `width` × 16 columns.
struct Weigh<'a, W> {
    attention: &'a Attention<'a, W>,
    first: usize,
    height: usize,
    column: usize,
    width: usize,
    keys: Range<usize>,
}

/// Adds the segments of one query.
struct Merge {
    partials: Partials,
    /// From a segment's result to the next one's.
    stride: usize,
    segments: usize,
    output: *mut f32,
}

// Safety: a pointer and dimensions; users keep writers of one slot apart (`LayerCache::write`).
unsafe impl Send for LayerCache {}
unsafe impl Sync for LayerCache {}

/// How many query heads of a group, at most, are taken together.
pub fn heads_together(isa: Isa, group: usize) -> usize {
    group.min(queries_max(isa.is_wide()))
}

/// How many of `remaining` tokens from `position` on are taken together, for `heads` heads each: as many as
/// fit a tile and do not cross into the next 16 positions, so that they differ in one panel only.
pub fn tokens_together(isa: Isa, position: usize, remaining: usize, heads: usize) -> usize {
    let fit = (queries_max(isa.is_wide()) / heads).max(1);
    remaining.min(fit).min(LANES - position % LANES)
}

const fn queries_max(wide: bool) -> usize {
    if wide { QUERIES_WIDE } else { QUERIES_NARROW }
}

/// Writes the attention of `queries` over their sequence so far, which includes themselves.
///
/// # Safety
/// As of [`attend_segment`] and [`merge`].
pub unsafe fn attend(isa: Isa, queries: &Queries<'_>, cache: LayerCache, scratch: &mut Buffer) {
    let head_dim = cache.head_dim;
    let own = queries.floats(head_dim);
    scratch.reserve(own + Partials::floats(queries, head_dim));
    let (own, partials) = scratch.split_at_mut(own);
    let partials = Partials { start: partials.as_mut_ptr(), head_dim };
    unsafe {
        for segment in 0..queries.segments() {
            attend_within(isa, (queries, cache), segment, own, partials);
        }
        merge(isa, queries, partials);
    }
}

/// The part of [`attend`] that concerns one segment; others may be another thread's.
///
/// # Safety
/// `queries` points to as many floats as it says, its blocks to blocks of `cache` whose positions up to the last query are
/// written and not being written; `partials` to [`Partials::floats`], of which nobody uses this segment's.
pub unsafe fn attend_segment(
    isa: Isa,
    (queries, cache): (&Queries<'_>, LayerCache),
    segment: usize,
    partials: Partials,
    scratch: &mut Buffer,
) {
    scratch.reserve(queries.floats(cache.head_dim));
    unsafe { attend_within(isa, (queries, cache), segment, scratch, partials) };
}

/// [`attend_segment`] with enough scratch.
unsafe fn attend_within(
    isa: Isa,
    (queries, cache): (&Queries<'_>, LayerCache),
    segment: usize,
    scratch: &mut [f32],
    partials: Partials,
) {
    unsafe {
        match cache.format {
            KvFormat::F32 => {
                Attention::<f32>::new(isa, (queries, cache), segment, scratch, partials).run();
            }
            KvFormat::F16 => {
                Attention::<F16>::new(isa, (queries, cache), segment, scratch, partials).run();
            }
        }
    }
}

/// Writes the output of queries whose segments are all done.
///
/// # Safety
/// The partials are those of these queries, whose output nobody else uses.
pub unsafe fn merge(isa: Isa, queries: &Queries<'_>, partials: Partials) {
    let Queries { heads, output, output_stride, .. } = *queries;
    let Partials { start, head_dim } = partials;
    for query in 0..queries.count() {
        isa.run(Merge {
            partials: Partials { start: start.wrapping_add(query * partials.row_floats()), head_dim },
            stride: queries.count() * partials.row_floats(),
            segments: queries.segments(),
            output: output.wrapping_add(query / heads * output_stride + query % heads * head_dim),
        });
    }
}

impl KvFormat {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::F16 => size_of::<F16>(),
        }
    }
}

impl LayerCache {
    /// Numbers of one block: keys and values of every head.
    pub fn block_numbers(kv_heads: usize, head_dim: usize, block_tokens: usize) -> usize {
        2 * kv_heads * head_dim * block_tokens
    }

    /// Stores one position's keys and values, (kv_heads, head_dim) each.
    ///
    /// # Safety
    /// `slot` (block × block_tokens + offset) lies in the cache, and nobody else uses it.
    pub unsafe fn write(self, isa: Isa, slot: usize, keys: &[f32], values: &[f32]) {
        let size = self.kv_heads * self.head_dim;
        let (keys, values) = (&keys[..size], &values[..size]);
        match self.format {
            KvFormat::F32 => isa.run(Write { cache: Typed::<f32>::new(self), slot, keys, values }),
            KvFormat::F16 => isa.run(Write { cache: Typed::<F16>::new(self), slot, keys, values }),
        }
    }
}

impl CacheElement for f32 {
    #[inline(always)]
    unsafe fn store<V: F32x16>(to: *mut Self, numbers: V) {
        unsafe { numbers.store(to) }
    }
}

impl CacheElement for F16 {
    #[inline(always)]
    unsafe fn store<V: F32x16>(to: *mut Self, numbers: V) {
        unsafe { numbers.store_f16(to.cast()) }
    }
}

impl<W: CacheElement> Typed<W> {
    fn new(layout: LayerCache) -> Self {
        debug_assert_eq!(layout.format.bytes(), size_of::<W>());
        Self { start: layout.start.cast(), layout }
    }

    /// Keys of 16 positions: (head_dim, 16).
    #[inline(always)]
    fn keys(self, block: usize, head: usize, panel: usize) -> *mut W {
        let LayerCache { kv_heads, head_dim, block_tokens, .. } = self.layout;
        let block = block * LayerCache::block_numbers(kv_heads, head_dim, block_tokens);
        self.start.wrapping_add(block + (head * block_tokens + panel * LANES) * head_dim)
    }

    /// Values of 16 positions: (16, head_dim).
    #[inline(always)]
    fn values(self, block: usize, head: usize, panel: usize) -> *mut W {
        let LayerCache { kv_heads, head_dim, block_tokens, .. } = self.layout;
        self.keys(block, head, panel).wrapping_add(kv_heads * head_dim * block_tokens)
    }
}

impl<W: CacheElement> Kernel for Write<'_, W> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { cache, slot, keys, values } = self;
        let LayerCache { head_dim, block_tokens, .. } = cache.layout;
        let (block, offset) = (slot / block_tokens, slot % block_tokens);
        let (panel, lane) = (offset / LANES, offset % LANES);
        for (head, (keys, values)) in
            keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim)).enumerate()
        {
            // Safety: as promised to `LayerCache::write`.
            unsafe {
                let column = cache.keys(block, head, panel).add(lane);
                let row = cache.values(block, head, panel).add(lane * head_dim);
                for first in (0..head_dim).step_by(LANES) {
                    W::store(row.add(first), V::load(values.as_ptr().add(first)));
                    let mut rounded = [std::mem::MaybeUninit::<W>::uninit(); LANES];
                    W::store(rounded.as_mut_ptr().cast(), V::load(keys.as_ptr().add(first)));
                    for (index, key) in rounded.into_iter().enumerate() {
                        *column.add((first + index) * LANES) = key.assume_init();
                    }
                }
            }
        }
    }
}

impl Queries<'_> {
    /// In order of token, then head.
    #[inline(always)]
    fn count(&self) -> usize {
        self.tokens * self.heads
    }

    /// Segments that they see: the same for all, because they lie in one run of 16 positions.
    pub fn segments(&self) -> usize {
        self.position / SEGMENT + 1
    }

    /// Room for themselves and their scores of a segment.
    fn floats(&self, head_dim: usize) -> usize {
        self.count() * (head_dim + self.score_stride())
    }

    /// An extra vector keeps rows of a whole segment out of one cache set.
    fn score_stride(&self) -> usize {
        (self.position + self.tokens).min(SEGMENT).next_multiple_of(LANES) + LANES
    }
}

impl Partials {
    /// Room for those of some queries.
    pub fn floats(queries: &Queries<'_>, head_dim: usize) -> usize {
        queries.segments() * queries.count() * (head_dim + LANES)
    }

    fn row_floats(self) -> usize {
        self.head_dim + LANES
    }
}

impl<'a, W: CacheElement> Attention<'a, W> {
    fn new(
        isa: Isa,
        (queries, cache): (&'a Queries<'a>, LayerCache),
        segment: usize,
        scratch: &mut [f32],
        partials: Partials,
    ) -> Self {
        let (packed, scores) = scratch.split_at_mut(queries.count() * cache.head_dim);
        let start = segment * SEGMENT;
        let results = segment * queries.count() * partials.row_floats();
        Self {
            isa,
            queries,
            cache: Typed::new(cache),
            keys: start..(queries.position + queries.tokens).min(start + SEGMENT),
            packed: packed.as_mut_ptr(),
            scores: scores.as_mut_ptr(),
            score_stride: queries.score_stride(),
            results: partials.start.wrapping_add(results),
        }
    }

    unsafe fn run(&self) {
        debug_assert!(self.count() <= queries_max(self.isa.is_wide()));
        unsafe {
            self.pack_queries();
            self.score();
            self.softmax();
            self.weigh();
        }
    }

    fn count(&self) -> usize {
        self.queries.count()
    }

    /// Keys of the segment that a query sees: those up to its own position.
    #[inline(always)]
    fn visible(&self, query: usize) -> usize {
        (self.queries.position + query / self.queries.heads + 1).min(self.keys.end) - self.keys.start
    }

    /// Where 16 positions of the sequence lie: in which block, and in which panel of that.
    #[inline(always)]
    fn place(&self, panel: usize) -> (usize, usize) {
        let per_block = self.cache.layout.block_tokens / LANES;
        (self.queries.blocks[panel / per_block] as usize, panel % per_block)
    }

    /// Panels are counted from the segment's first.
    #[inline(always)]
    fn key_panel(&self, panel: usize) -> *const W {
        let (block, panel) = self.place(self.keys.start / LANES + panel);
        self.cache.keys(block, self.queries.kv_head, panel)
    }

    #[inline(always)]
    fn value_panel(&self, panel: usize) -> *const W {
        let (block, panel) = self.place(self.keys.start / LANES + panel);
        self.cache.values(block, self.queries.kv_head, panel)
    }

    /// Values of that panel; beyond the last one that the queries see, the keys that are read after them: of the next segment, or of
    /// the next head.
    #[inline(always)]
    fn panel_ahead(&self, panel: usize) -> *const W {
        let panels = self.visible(self.count() - 1).div_ceil(LANES);
        if panel < panels {
            return self.value_panel(panel);
        }
        let (beyond, last) = (panel - panels, self.queries.position / LANES);
        let next_segment = self.keys.end / LANES + beyond;
        if self.keys.end <= self.queries.position && next_segment <= last {
            return self.key_panel(next_segment - self.keys.start / LANES);
        }
        let head = self.queries.kv_head + 1;
        if head < self.cache.layout.kv_heads && beyond <= last {
            let (block, panel) = self.place(beyond);
            return self.cache.keys(block, head, panel);
        }
        self.value_panel(panels - 1)
    }

    /// The weighted values of a query; behind them the sum of its weights, and its greatest score.
    #[inline(always)]
    fn result(&self, query: usize) -> *mut f32 {
        self.results.wrapping_add(query * (self.cache.layout.head_dim + LANES))
    }

    /// (queries, head_dim) → (head_dim, queries)
    unsafe fn pack_queries(&self) {
        let Queries { heads, query, query_stride, .. } = *self.queries;
        let count = self.count();
        for q in 0..count {
            let from = query.wrapping_add(q / heads * query_stride + q % heads * self.cache.layout.head_dim);
            for index in 0..self.cache.layout.head_dim {
                unsafe { *self.packed.add(index * count + q) = *from.add(index) };
            }
        }
    }

    /// A key block is a panel, and a score a product like any other.
    unsafe fn score(&self) {
        let height = self.count();
        let panels = self.visible(height - 1).div_ceil(LANES);
        let together = panels_together(self.isa, height);
        let mut panel = 0;
        while panel < panels {
            let mut tile = Tile::<W>::new(height, self.cache.layout.head_dim, false);
            tile.rows = self.packed;
            tile.count = if panel + together <= panels { together } else { 1 };
            for index in 0..tile.count {
                tile.panels[index] = self.key_panel(panel + index);
                // Then the values, from the first.
                let next = panel + index + tile.count;
                tile.fetch[index] = if next < panels {
                    self.key_panel(next)
                } else {
                    self.value_panel((next - panels).min(panels - 1))
                };
            }
            unsafe { tile.run(self.isa, self.scores.add(panel * LANES), self.score_stride) };
            panel += tile.count;
        }
    }

    #[inline(always)]
    fn scores(&self, query: usize) -> *mut f32 {
        self.scores.wrapping_add(query * self.score_stride)
    }

    unsafe fn softmax(&self) {
        for query in 0..self.count() {
            self.isa.run(Softmax { attention: self, query });
        }
    }

    /// First over the panels that all queries see whole, then token by token over the last one.
    unsafe fn weigh(&self) {
        let Queries { position, tokens, heads, .. } = *self.queries;
        let first = self.visible(0);
        unsafe {
            if tokens == 1 || position >= self.keys.end {
                return self.weigh_queries(0..self.count(), 0..first);
            }
            let common = (position - self.keys.start) / LANES * LANES;
            self.weigh_queries(0..self.count(), 0..common);
            for token in 0..tokens {
                self.weigh_queries(token * heads..(token + 1) * heads, common..first + token);
            }
        }
    }

    unsafe fn weigh_queries(&self, queries: Range<usize>, keys: Range<usize>) {
        let columns = self.cache.layout.head_dim / LANES;
        let wide = self.isa.is_wide();
        let height_max = if wide { WEIGHED_TOGETHER } else { 4 };
        for first in queries.clone().step_by(height_max) {
            let height = height_max.min(queries.end - first);
            let width_max = match (wide, height) {
                (true, _) => 4,
                (false, 1..=3) => 2,
                (false, _) => 1,
            };
            let mut column = 0;
            while column < columns {
                let width = if column + width_max <= columns { width_max } else { 1 };
                self.isa.run(Weigh { attention: self, first, height, column, width, keys: keys.clone() });
                column += width;
            }
        }
    }
}

impl<W: CacheElement> Kernel for Softmax<'_, W> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { attention, query } = self;
        let visible = attention.visible(query);
        let panels = visible.div_ceil(LANES);
        let scores = attention.scores(query);
        let at = |panel: usize| scores.wrapping_add(panel * LANES);
        // Safety: scores have whole panels.
        unsafe {
            // Whatever lies there, NaN included, is not this sequence's past.
            for key in visible..panels * LANES {
                *scores.add(key) = f32::NEG_INFINITY;
            }
            // Side by side, because each maximum waits for the one before.
            let mut greatest = [V::splat(f32::NEG_INFINITY); MAXIMA];
            let whole = panels / MAXIMA * MAXIMA;
            for first in (0..whole).step_by(MAXIMA) {
                for (index, greatest) in greatest.iter_mut().enumerate() {
                    *greatest = V::load(at(first + index)).max(*greatest);
                }
            }
            for panel in whole..panels {
                greatest[0] = V::load(at(panel)).max(greatest[0]);
            }
            let greatest = greatest.into_iter().fold(V::splat(f32::NEG_INFINITY), V::max).greatest();
            let offset = V::splat(-greatest);
            let mut sum = V::splat(0.0);
            for panel in 0..panels {
                let weight = V::load(at(panel)).add(offset).exp();
                weight.store(at(panel));
                sum = sum.add(weight);
            }
            let result = attention.result(query).add(attention.cache.layout.head_dim);
            *result = sum.sum();
            *result.add(1) = greatest;
        }
    }
}

impl<W: CacheElement> Kernel for Weigh<'_, W> {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        // Safety: as promised to `attend`.
        unsafe {
            match (V::WIDE, self.height, self.width) {
                (true, 1, 4) => self.sum::<V, 1, 4>(),
                (true, 2, 4) => self.sum::<V, 2, 4>(),
                (true, 3, 4) => self.sum::<V, 3, 4>(),
                (true, 4, 4) => self.sum::<V, 4, 4>(),
                (true, 5, 4) => self.sum::<V, 5, 4>(),
                (true, 6, 4) => self.sum::<V, 6, 4>(),
                (false, 1, 2) => self.sum::<V, 1, 2>(),
                (false, 2, 2) => self.sum::<V, 2, 2>(),
                (false, 3, 2) => self.sum::<V, 3, 2>(),
                (_, 1, _) => self.sum::<V, 1, 1>(),
                (_, 2, _) => self.sum::<V, 2, 1>(),
                (_, 3, _) => self.sum::<V, 3, 1>(),
                (_, 4, _) => self.sum::<V, 4, 1>(),
                (true, 5, _) => self.sum::<V, 5, 1>(),
                (true, 6, _) => self.sum::<V, 6, 1>(),
                _ => unreachable!("{} queries weighed together", self.height),
            }
        }
    }
}

impl<W: CacheElement> Weigh<'_, W> {
    /// R queries × P × 16 columns; goes on from the output unless the keys start at 0. Masked keys are left
    /// out rather than weighted by zero: stale values may be anything.
    #[inline(always)]
    unsafe fn sum<V: F32x16, const R: usize, const P: usize>(&self) {
        let Self { attention, first, column, ref keys, .. } = *self;
        let head_dim = attention.cache.layout.head_dim;
        let mut outputs = [std::ptr::null_mut(); R];
        let mut weights = [std::ptr::null(); R];
        for r in 0..R {
            outputs[r] = attention.result(first + r).wrapping_add(column * LANES);
            weights[r] = attention.scores.wrapping_add((first + r) * attention.score_stride).cast_const();
        }
        let mut sums = [[V::splat(0.0); P]; R];
        unsafe {
            if keys.start > 0 {
                for r in 0..R {
                    for p in 0..P {
                        sums[r][p] = V::load(outputs[r].add(p * LANES));
                    }
                }
            }
            let mut key = keys.start;
            while key < keys.end {
                let values = attention.value_panel(key / LANES).wrapping_add(column * LANES);
                let mut fetch = FETCH_PANELS.map(|ahead| {
                    let panel = attention.panel_ahead(key / LANES + ahead);
                    panel.wrapping_add(column * LANES + key % LANES * head_dim)
                });
                let panel_end = keys.end.min((key / LANES + 1) * LANES);
                let mut row = values.wrapping_add(key % LANES * head_dim);
                while key < panel_end {
                    let mut vectors = [V::splat(0.0); P];
                    for p in 0..P {
                        vectors[p] = W::load(row.wrapping_add(p * LANES));
                    }
                    // With many queries it is arithmetic that takes the time, and asking twice would add to it.
                    let times = if R < WEIGHED_TOGETHER { FETCH_PANELS.len() } else { 1 };
                    for fetch in &mut fetch[..times] {
                        for line in (0..P).step_by(W::LINE_VECTORS) {
                            V::prefetch(fetch.wrapping_add(line * LANES).cast());
                        }
                        *fetch = fetch.wrapping_add(head_dim);
                    }
                    row = row.wrapping_add(head_dim);
                    for r in 0..R {
                        let weight = V::splat(*weights[r].add(key));
                        for p in 0..P {
                            sums[r][p] = weight.mul_add(vectors[p], sums[r][p]);
                        }
                    }
                    key += 1;
                }
            }
            for r in 0..R {
                for p in 0..P {
                    sums[r][p].store(outputs[r].add(p * LANES));
                }
            }
        }
    }
}

impl Kernel for Merge {
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { partials: Partials { start, head_dim }, stride, segments, output } = self;
        let row = |segment: usize| start.wrapping_add(segment * stride);
        // Safety: as promised to `merge`.
        unsafe {
            let sum = |segment: usize| row(segment).add(head_dim);
            let greatest = |segment: usize| row(segment).add(head_dim + 1);
            let greatest_of_all =
                (0..segments).fold(f32::NEG_INFINITY, |most, segment| most.max(*greatest(segment)));
            let mut total = 0.0;
            for segment in 0..segments {
                let factor = V::splat(*greatest(segment) - greatest_of_all).exp().lanes()[0];
                total += factor * *sum(segment);
                *greatest(segment) = factor;
            }
            let scale = V::splat(1.0 / total);
            for column in (0..head_dim).step_by(LANES) {
                let mut sums = V::splat(0.0);
                for segment in 0..segments {
                    let factor = V::splat(*greatest(segment));
                    sums = factor.mul_add(V::load(row(segment).add(column)), sums);
                }
                sums.mul(scale).store(output.add(column));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KV_HEADS: usize = 2;
    const GROUP: usize = 3;

    /// A prime: every stride visits all of them.
    const BLOCKS: usize = 127;

    fn number(seed: usize) -> f32 {
        let x = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// A cache full of NaN, a sequence written through a scattered block table, and its queries.
    struct Scene {
        cache: Buffer<u8>,
        layout: LayerCache,
        blocks: Vec<u32>,
        /// (tokens, heads, head_dim)
        queries: Vec<f32>,
        tokens: usize,
    }

    impl Scene {
        /// Of `tokens`, written on an instruction set; each block of the sequence lies `stride` behind the one before.
        fn new(
            (isa, format): (Isa, KvFormat),
            tokens: usize,
            (head_dim, block_tokens, stride): (usize, usize, usize),
        ) -> Self {
            let blocks: Vec<u32> =
                (0..tokens.div_ceil(block_tokens)).map(|b| (b * stride % BLOCKS) as u32).collect();
            let block_bytes = LayerCache::block_numbers(KV_HEADS, head_dim, block_tokens) * format.bytes();
            let mut cache = Buffer::zeroed(BLOCKS * block_bytes);
            cache.fill(0xff); // NaN in either format
            let start = cache.as_mut_ptr();
            let layout = LayerCache { start, format, kv_heads: KV_HEADS, head_dim, block_tokens };
            for token in 0..tokens {
                let [keys, values] = [1, 2].map(|kind| Self::rows(token, kind, head_dim));
                let slot = blocks[token / block_tokens] as usize * block_tokens + token % block_tokens;
                unsafe { layout.write(isa, slot, &keys, &values) };
            }
            let queries = (0..tokens * KV_HEADS * GROUP * head_dim).map(|i| number(i * 5 + 3)).collect();
            Self { cache, layout, blocks, queries, tokens }
        }

        fn rows(token: usize, kind: usize, head_dim: usize) -> Vec<f32> {
            (0..KV_HEADS * head_dim).map(|i| number((token * 1000 + i) * 7 + kind)).collect()
        }

        /// Attention of all tokens from `from` on, at most `together` at once.
        fn attend(&mut self, isa: Isa, from: usize, together: usize) -> Vec<f32> {
            let mut scratch = Buffer::new();
            self.each(isa, (from, together), |queries, cache| unsafe {
                attend(isa, queries, cache, &mut scratch);
            })
        }

        /// The same, one segment after another, the last one first.
        fn attend_in_segments(&mut self, isa: Isa, from: usize, together: usize) -> Vec<f32> {
            let (mut scratch, mut memory) = (Buffer::new(), Buffer::new());
            self.each(isa, (from, together), |queries, cache| {
                memory.reserve(Partials::floats(queries, cache.head_dim));
                memory.fill(f32::NAN);
                let partials = Partials { start: memory.as_mut_ptr(), head_dim: cache.head_dim };
                for segment in (0..queries.segments()).rev() {
                    unsafe { attend_segment(isa, (queries, cache), segment, partials, &mut scratch) };
                }
                unsafe { merge(isa, queries, partials) };
            })
        }

        fn each(
            &mut self,
            isa: Isa,
            (from, together): (usize, usize),
            mut attend: impl FnMut(&Queries<'_>, LayerCache),
        ) -> Vec<f32> {
            self.layout.start = self.cache.as_mut_ptr();
            let stride = KV_HEADS * GROUP * self.layout.head_dim;
            let mut output = vec![0.0; self.tokens * stride];
            for kv_head in 0..KV_HEADS {
                let mut token = from;
                while token < self.tokens {
                    let tokens = tokens_together(isa, token, (self.tokens - token).min(together), GROUP);
                    let at = token * stride + kv_head * GROUP * self.layout.head_dim;
                    let queries = Queries {
                        position: token,
                        tokens,
                        heads: GROUP,
                        kv_head,
                        query: self.queries[at..].as_ptr(),
                        query_stride: stride,
                        output: output[at..].as_mut_ptr(),
                        output_stride: stride,
                        blocks: &self.blocks,
                    };
                    attend(&queries, self.layout);
                    token += tokens;
                }
            }
            output
        }

        /// The definition, in f64, over keys and values as the cache holds them.
        fn reference(&self, token: usize, head: usize) -> Vec<f64> {
            let head_dim = self.layout.head_dim;
            let held = |x: f32| match self.layout.format {
                KvFormat::F32 => f64::from(x),
                KvFormat::F16 => half::f16::from_f32(x).to_f64(),
            };
            let query = &self.queries[(token * KV_HEADS * GROUP + head) * head_dim..][..head_dim];
            let at = head / GROUP * head_dim;
            let weights: Vec<f64> = (0..=token)
                .map(|key| {
                    let key = &Self::rows(key, 1, head_dim)[at..][..head_dim];
                    query.iter().zip(key).map(|(a, b)| f64::from(*a) * held(*b)).sum::<f64>().exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            let mut output = vec![0.0; head_dim];
            for (key, weight) in weights.iter().enumerate() {
                let value = &Self::rows(key, 2, head_dim)[at..][..head_dim];
                for (y, v) in output.iter_mut().zip(value) {
                    *y += weight / total * held(*v);
                }
            }
            output
        }
    }

    const FORMATS: [KvFormat; 2] = [KvFormat::F32, KvFormat::F16];

    #[test]
    fn attention_is_the_definition_and_ignores_what_lies_in_unused_slots() {
        const LONG: usize = 2 * SEGMENT + 75;
        let cases = [
            (64, 16, 0, &[0, 1, 15, 16, 17, 40, 74][..]),
            (80, 32, 0, &[0, 1, 15, 16, 17, 40, 74]),
            (
                16,
                16,
                SEGMENT - 20,
                &[SEGMENT - 20, SEGMENT - 1, SEGMENT, SEGMENT + 1, SEGMENT + 16, LONG - 1],
            ),
        ];
        for (format, (head_dim, block_tokens, from, tokens)) in
            FORMATS.into_iter().flat_map(|format| cases.map(|case| (format, case)))
        {
            let count = tokens[tokens.len() - 1] + 1;
            let mut scene = Scene::new((Isa::best(), format), count, (head_dim, block_tokens, 4));
            let output = scene.attend(Isa::best(), from, usize::MAX);
            for &token in tokens {
                for head in 0..KV_HEADS * GROUP {
                    let found = &output[(token * KV_HEADS * GROUP + head) * head_dim..][..head_dim];
                    for (y, exact) in found.iter().zip(scene.reference(token, head)) {
                        assert!(
                            (f64::from(*y) - exact).abs() < 1e-5,
                            "{format:?} token {token} head {head}: {y} {exact}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_tiles_blocks_segments_of_threads_or_instruction_set() {
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let cases = [(75, 0), (2 * SEGMENT + 40, 2 * SEGMENT - 20)];
        for (format, (tokens, from)) in
            FORMATS.into_iter().flat_map(|format| cases.map(|case| (format, case)))
        {
            let best = (Isa::best(), format);
            let expected = bits(&Scene::new(best, tokens, (80, 16, 1)).attend(Isa::best(), from, 1));
            for isa in Isa::available() {
                for together in [1, 2, 3, 16] {
                    let mut scene = Scene::new((isa, format), tokens, (80, 32, 4));
                    assert_eq!(
                        bits(&scene.attend(isa, from, together)),
                        expected,
                        "{format:?} {} {together} together",
                        isa.name()
                    );
                    assert_eq!(
                        bits(&scene.attend_in_segments(isa, from, together)),
                        expected,
                        "{format:?} {} {together} together, in segments",
                        isa.name()
                    );
                }
            }
        }
    }
}
