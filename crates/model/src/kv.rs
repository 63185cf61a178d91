//! The paged cache: keys and values of all layers, in blocks that a block table strings together.
//!
//! Blocks are only memory here. Who owns one, shares it or frees it is the scheduler's business.

use crate::kernels::attention::{KvFormat, LayerCache};
use crate::kernels::buffer::Buffer;

/// Memory of the keys and values of `blocks` × `block_tokens` positions in every layer.
pub(crate) struct KvCache {
    /// Layer by layer. One array, because those of single layers may be too small for huge pages, without which attention over
    /// long contexts takes a fifth longer.
    layers: Buffer<u8>,
    shape: KvShape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub format: KvFormat,
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub blocks: usize,
    pub block_tokens: usize,
}

impl KvShape {
    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.layer_block_bytes()
    }

    fn layer_block_bytes(&self) -> usize {
        LayerCache::block_numbers(self.kv_heads, self.head_dim, self.block_tokens) * self.format.bytes()
    }
}

impl KvCache {
    /// Reserves address space; pages are touched when positions are first written, or now.
    pub fn new(shape: KvShape, at_once: bool) -> Self {
        let bytes = shape.blocks * shape.block_bytes();
        Self { layers: if at_once { Buffer::zeroed_at_once(bytes) } else { Buffer::zeroed(bytes) }, shape }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn layer(&mut self, layer: usize) -> LayerCache {
        let KvShape { format, layers, kv_heads, head_dim, blocks, block_tokens } = self.shape;
        debug_assert!(layer < layers);
        let start = self.layers.as_mut_ptr().wrapping_add(layer * blocks * self.shape.layer_block_bytes());
        LayerCache { start, format, kv_heads, head_dim, block_tokens }
    }
}
