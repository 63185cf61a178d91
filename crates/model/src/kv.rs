//! The paged cache: keys and values of all layers, in blocks that a block table strings together.
//!
//! Blocks are only memory here. Who owns one, shares it or frees it is the scheduler's business.

use crate::kernels::attention::LayerCache;
use crate::kernels::buffer::Buffer;

/// Memory of the keys and values of `blocks` × `block_tokens` positions in every layer.
pub(crate) struct KvCache {
    layers: Vec<Buffer>,
    shape: KvShape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub blocks: usize,
    pub block_tokens: usize,
}

impl KvShape {
    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        let floats = LayerCache::block_floats(self.kv_heads, self.head_dim, self.block_tokens);
        self.layers * floats * size_of::<f32>()
    }
}

impl KvCache {
    /// Reserves address space; pages are touched when positions are first written.
    pub fn new(shape: KvShape) -> Self {
        let floats =
            shape.blocks * LayerCache::block_floats(shape.kv_heads, shape.head_dim, shape.block_tokens);
        Self { layers: (0..shape.layers).map(|_| Buffer::zeroed(floats)).collect(), shape }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn layer(&mut self, layer: usize) -> LayerCache {
        let KvShape { kv_heads, head_dim, block_tokens, .. } = self.shape;
        LayerCache { start: self.layers[layer].as_mut_ptr(), kv_heads, head_dim, block_tokens }
    }
}
