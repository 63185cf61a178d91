//! Quantised weights: blocks of 32 inputs that share a scale, and how they lie in a panel of 16 outputs.
//!
//! A weight is scale · integer + minimum. A panel holds the integers of all its blocks, then their scales and
//! minima: per block, vectors of 64 bytes with four inputs of each output, two such vectors packed into
//! one where integers have four bits; then 16 scales, or 32 if each half of a block has its own, and 16 minima.

use half::f16;

use super::simd::LANES;

/// Inputs of a block.
pub const BLOCK_INPUTS: usize = 32;

/// Runs of four inputs in a block: one vector of bytes each.
pub const QUADS: usize = BLOCK_INPUTS / 4;

/// What makes signed bytes unsigned.
pub const BYTE_ZERO: i32 = 128;

/// How blocks are stored. Every quantised format of ggml from Q4_0 on is one of these, without loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockFormat {
    pub integers: Integers,
    pub scales: Scales,
    /// Each half of a block has a scale of its own.
    pub halves: bool,
    pub minimum: Minimum,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Integers {
    /// 0 to 15
    Nibbles,
    /// -128 to 127
    Bytes,
}

/// The number format of scales and minima.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    F16,
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Minimum {
    Zero,
    /// -8 · scale: what makes nibbles signed.
    MinusEightScales,
    /// One for each block.
    Stored,
}

/// Rows of a quantised matrix, one integer a byte, as they come out of a file.
pub struct Blocks {
    pub format: BlockFormat,
    pub inputs: usize,
    /// (rows, inputs)
    pub integers: Vec<i8>,
    /// (rows, blocks), or (rows, 2 × blocks)
    pub scales: Vec<f32>,
    /// (rows, blocks) if they are stored
    pub minima: Vec<f32>,
}

/// Where the parts of a panel lie.
#[derive(Clone, Copy)]
pub struct PanelLayout {
    pub format: BlockFormat,
    pub blocks: usize,
}

impl BlockFormat {
    /// Scales of an output's block.
    pub fn scales_per_block(self) -> usize {
        if self.halves { 2 } else { 1 }
    }
}

impl PanelLayout {
    /// Bytes of one block's integers.
    #[inline(always)]
    pub fn integer_bytes(self) -> usize {
        match self.format.integers {
            Integers::Nibbles => LANES * BLOCK_INPUTS / 2,
            Integers::Bytes => LANES * BLOCK_INPUTS,
        }
    }

    /// Bytes of 16 scales or minima.
    #[inline(always)]
    pub fn vector_bytes(self) -> usize {
        match self.format.scales {
            Scales::F16 => LANES * size_of::<f16>(),
            Scales::F32 => LANES * size_of::<f32>(),
        }
    }

    /// Vectors of scales and minima of one block.
    #[inline(always)]
    pub fn vectors(self) -> usize {
        self.format.scales_per_block() + usize::from(self.format.minimum == Minimum::Stored)
    }

    /// Where a block's scales begin.
    #[inline(always)]
    pub fn scales(self, block: usize) -> usize {
        self.blocks * self.integer_bytes() + block * self.vectors() * self.vector_bytes()
    }

    pub fn panel_bytes(self) -> usize {
        self.scales(self.blocks)
    }

    /// Byte of an input's integer in lane `lane`; a nibble's, if integers are nibbles, is the upper one for odd
    /// quads.
    fn integer(self, input: usize, lane: usize) -> usize {
        let (block, quad) = (input / BLOCK_INPUTS, input % BLOCK_INPUTS / 4);
        let vector = match self.format.integers {
            Integers::Nibbles => quad / 2,
            Integers::Bytes => quad,
        };
        block * self.integer_bytes() + vector * 4 * LANES + lane * 4 + input % 4
    }

    /// Writes a row of `blocks` into a lane of a panel of zeros.
    pub fn set(self, panel: &mut [u8], lane: usize, blocks: &Blocks, row: usize) {
        let inputs = blocks.inputs;
        for (input, integer) in blocks.integers[row * inputs..][..inputs].iter().enumerate() {
            let byte = &mut panel[self.integer(input, lane)];
            match self.format.integers {
                Integers::Bytes => *byte = (i32::from(*integer) + BYTE_ZERO) as u8,
                Integers::Nibbles => *byte |= (*integer as u8) << (input / 4 % 2 * 4),
            }
        }
        let per_block = self.format.scales_per_block();
        let scales = &blocks.scales[row * self.blocks * per_block..][..self.blocks * per_block];
        for (block, scales) in scales.chunks_exact(per_block).enumerate() {
            let minimum = blocks.minima.get(row * self.blocks + block);
            for (vector, value) in scales.iter().chain(minimum).enumerate() {
                let at = self.scales(block) + vector * self.vector_bytes();
                match self.format.scales {
                    Scales::F16 => {
                        let bits = f16::from_f32(*value).to_bits().to_le_bytes();
                        panel[at + 2 * lane..][..2].copy_from_slice(&bits);
                    }
                    Scales::F32 => panel[at + 4 * lane..][..4].copy_from_slice(&value.to_le_bytes()),
                }
            }
        }
    }

    /// The weights of a lane, as the file's format defines them.
    pub fn row(self, panel: &[u8], lane: usize, row: &mut [f32]) {
        for (input, weight) in row.iter_mut().enumerate() {
            let (block, half) = (input / BLOCK_INPUTS, input % BLOCK_INPUTS / (BLOCK_INPUTS / 2));
            let byte = panel[self.integer(input, lane)];
            let integer = match self.format.integers {
                Integers::Bytes => i32::from(byte) - BYTE_ZERO,
                Integers::Nibbles => i32::from(byte >> (input / 4 % 2 * 4) & 15),
            };
            let per_block = self.format.scales_per_block();
            let scale = self.value(panel, block, half.min(per_block - 1), lane);
            let minimum = match self.format.minimum {
                Minimum::Zero => 0.0,
                Minimum::MinusEightScales => -8.0 * scale,
                Minimum::Stored => self.value(panel, block, per_block, lane),
            };
            *weight = scale * integer as f32 + minimum;
        }
    }

    /// A scale or minimum.
    fn value(self, panel: &[u8], block: usize, vector: usize, lane: usize) -> f32 {
        let at = self.scales(block) + vector * self.vector_bytes();
        match self.format.scales {
            Scales::F16 => {
                let [low, high, ..] = panel[at + 2 * lane..] else { unreachable!("scales end a panel") };
                f16::from_le_bytes([low, high]).to_f32()
            }
            Scales::F32 => {
                let bytes = panel[at + 4 * lane..].first_chunk().expect("scales end a panel");
                f32::from_le_bytes(*bytes)
            }
        }
    }
}
