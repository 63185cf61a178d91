//! The quantised formats of ggml as blocks of integers, scales and minima, without loss.
//!
//! Layouts: <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::kernels::blocks::{BLOCK_INPUTS, BlockFormat, Blocks, Integers, Minimum, Scales};

/// Elements of a block of the K formats, and blocks of 32 in it.
const SUPER_ELEMENTS: usize = 256;
const SUPER_BLOCKS: usize = SUPER_ELEMENTS / BLOCK_INPUTS;

/// How a format's blocks are stored beside a kernel; None for those that are widened to f32.
pub(crate) fn format(kind: GgmlDType) -> Option<BlockFormat> {
    let format = |integers, scales, minimum| BlockFormat { integers, scales, halves: false, minimum };
    Some(match kind {
        GgmlDType::Q4_0 => format(Integers::Nibbles, Scales::F16, Minimum::MinusEightScales),
        GgmlDType::Q4_1 => format(Integers::Nibbles, Scales::F16, Minimum::Stored),
        GgmlDType::Q5_0 | GgmlDType::Q8_0 => format(Integers::Bytes, Scales::F16, Minimum::Zero),
        GgmlDType::Q5_1 => format(Integers::Bytes, Scales::F16, Minimum::Stored),
        // A scale of these is a product of two, which f16 does not hold.
        GgmlDType::Q4K => format(Integers::Nibbles, Scales::F32, Minimum::Stored),
        GgmlDType::Q5K => format(Integers::Bytes, Scales::F32, Minimum::Stored),
        GgmlDType::Q6K => BlockFormat { halves: true, ..format(Integers::Bytes, Scales::F32, Minimum::Zero) },
        _ => return None,
    })
}

/// Decodes rows of `inputs` elements each; None for a format without [`format`].
pub(crate) fn decode(kind: GgmlDType, bytes: &[u8], inputs: usize) -> Option<Blocks> {
    let format = format(kind)?;
    let mut blocks = Blocks { format, inputs, integers: Vec::new(), scales: Vec::new(), minima: Vec::new() };
    blocks.integers.reserve(bytes.len() / kind.type_size() * kind.block_size());
    for bytes in bytes.chunks_exact(kind.type_size()) {
        match kind {
            GgmlDType::Q4K | GgmlDType::Q5K => blocks.push_k(bytes),
            GgmlDType::Q6K => blocks.push_q6k(bytes),
            _ => blocks.push_legacy(kind, bytes),
        }
    }
    Some(blocks)
}

/// The format that holds both without loss.
pub(crate) fn cover(one: BlockFormat, other: BlockFormat) -> BlockFormat {
    let either = |bytes| if bytes { Integers::Bytes } else { Integers::Nibbles };
    BlockFormat {
        integers: either(one.integers == Integers::Bytes || other.integers == Integers::Bytes),
        scales: if one.scales == other.scales { one.scales } else { Scales::F32 },
        halves: one.halves || other.halves,
        minimum: if one.minimum == other.minimum { one.minimum } else { Minimum::Stored },
    }
}

impl Blocks {
    /// The same weights in a format that [`cover`]s theirs.
    pub(crate) fn widen(mut self, format: BlockFormat) -> Self {
        if format.minimum != self.format.minimum {
            let factor = if self.format.minimum == Minimum::Zero { 0.0 } else { -8.0 };
            if self.format.minimum != Minimum::Stored {
                let first = self.scales.iter().step_by(self.format.scales_per_block());
                self.minima = first.map(|scale| factor * scale).collect();
            }
        }
        if format.halves && !self.format.halves {
            self.scales = self.scales.iter().flat_map(|scale| [*scale; 2]).collect();
        }
        Self { format, ..self }
    }

    /// Scale, minimum, fifth bits and integers of 32 elements, as far as the format has them.
    fn push_legacy(&mut self, kind: GgmlDType, bytes: &[u8]) {
        let (scale, mut rest) = half(bytes);
        self.scales.push(scale);
        if self.format.minimum == Minimum::Stored {
            let minimum;
            (minimum, rest) = half(rest);
            self.minima.push(minimum);
        }
        if kind == GgmlDType::Q8_0 {
            self.integers.extend(rest.iter().map(|byte| *byte as i8));
            return;
        }
        let mut fifth = 0;
        if matches!(kind, GgmlDType::Q5_0 | GgmlDType::Q5_1) {
            let (bits, integers) = rest.split_first_chunk().expect("a whole block");
            (fifth, rest) = (u32::from_le_bytes(*bits), integers);
        }
        let signed = if kind == GgmlDType::Q5_0 { 16 } else { 0 };
        let integer = |index: usize, nibble: u8| (nibble | ((fifth >> index & 1) as u8 * 16)) as i8 - signed;
        self.integers.extend(rest.iter().enumerate().map(|(index, byte)| integer(index, byte & 15)));
        self.integers.extend(rest.iter().enumerate().map(|(index, byte)| integer(index + 16, byte >> 4)));
    }

    /// Scale of scales, scale of minima, both in six bits; for Q5K the fifth bits; the lower four bits.
    fn push_k(&mut self, bytes: &[u8]) {
        let (scale, rest) = half(bytes);
        let (minimum, rest) = half(rest);
        let (packed, rest) = rest.split_at(12);
        let (fifth, nibbles) = rest.split_at(rest.len() - SUPER_ELEMENTS / 2);
        for block in 0..SUPER_BLOCKS {
            let (factor, offset) = match block {
                0..4 => (packed[block] & 63, packed[block + 4] & 63),
                _ => (
                    packed[block + 4] & 15 | packed[block - 4] >> 6 << 4,
                    packed[block + 4] >> 4 | packed[block] >> 6 << 4,
                ),
            };
            self.scales.push(scale * f32::from(factor));
            self.minima.push(-minimum * f32::from(offset));
            let pair = &nibbles[block / 2 * BLOCK_INPUTS..][..BLOCK_INPUTS];
            self.integers.extend(pair.iter().enumerate().map(|(index, byte)| {
                let bit = fifth.get(index).map_or(0, |bits| bits >> block & 1);
                (byte >> (block % 2 * 4) & 15 | bit << 4) as i8
            }));
        }
    }

    /// Lower four bits, upper two, a scale of each 16 elements, and the scale of scales.
    fn push_q6k(&mut self, bytes: &[u8]) {
        let (lower, rest) = bytes.split_at(SUPER_ELEMENTS / 2);
        let (upper, rest) = rest.split_at(SUPER_ELEMENTS / 4);
        let (factors, rest) = rest.split_at(SUPER_ELEMENTS / 16);
        let (scale, _) = half(rest);
        self.scales.extend(factors.iter().map(|factor| scale * f32::from(*factor as i8)));
        for element in 0..SUPER_ELEMENTS {
            let (part, quarter, index) = (element / 128, element / 32 % 4, element % 32);
            let nibble = lower[part * 64 + quarter % 2 * 32 + index] >> (quarter / 2 * 4) & 15;
            let bits = upper[part * 32 + index] >> (quarter * 2) & 3;
            self.integers.push((nibble | bits << 4) as i8 - 32);
        }
    }
}

/// A number of half precision, and what follows it.
fn half(bytes: &[u8]) -> (f32, &[u8]) {
    let (bits, rest) = bytes.split_first_chunk().expect("a whole block");
    (f16::from_le_bytes(*bits).to_f32(), rest)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::kernels::panels::{Format, Numbers, Panels};

    const KINDS: [GgmlDType; 8] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    const ROWS: usize = 19;
    const INPUTS: usize = 2 * SUPER_ELEMENTS;

    /// Weights of a panel's rows.
    fn unpacked(blocks: Blocks) -> Vec<f32> {
        let mut panels = Panels::zeroed(Format::Blocks(blocks.format), ROWS, INPUTS);
        panels.set(0, &Numbers::Blocks(blocks));
        let mut weights = vec![0.0; ROWS * INPUTS];
        weights.chunks_exact_mut(INPUTS).enumerate().for_each(|(row, weights)| panels.row(row, weights));
        weights
    }

    #[test]
    fn blocks_hold_what_the_formats_of_ggml_say_and_so_do_formats_that_cover_them() {
        let numbers = (0..ROWS * INPUTS).map(|i| ((i * 7919 % 1013) as f32 / 506.5 - 0.9) * (i % 37) as f32);
        let tensor = Tensor::from_iter(numbers, &Device::Cpu).and_then(|x| x.reshape((ROWS, INPUTS)));
        let tensor = tensor.expect("as many numbers");
        for kind in KINDS {
            let stored = QTensor::quantize(&tensor, kind).expect("whole blocks");
            let bytes = stored.data().expect("bytes on the CPU");
            let expected = stored.dequantize(&Device::Cpu).and_then(|x| x.flatten_all()?.to_vec1::<f32>());
            let expected = expected.expect("f32");
            let decoded = || decode(kind, &bytes, INPUTS).expect("a known format");
            assert_eq!(unpacked(decoded()), expected, "{kind:?}");
            for other in KINDS {
                let format = cover(decoded().format, format(other).expect("a known format"));
                assert_eq!(unpacked(decoded().widen(format)), expected, "{kind:?} beside {other:?}");
            }
        }
    }
}
