//! Weights in the order in which a product reads them: panels of 16 outputs, numbers as the file stores them.
//!
//! Floats lie as (outputs / 16, inputs, 16), so that a vector of a panel holds one input's weights for 16
//! outputs; quantised blocks as [`blocks`](super::blocks) says. Widening all of them to f32 when a model is
//! loaded would be simpler, and a step over few rows would read five times the bytes.

use std::sync::Arc;

use half::{bf16, f16};

use super::blocks::{BLOCK_INPUTS, BlockFormat, Blocks, PanelLayout};
use super::buffer::Buffer;
use super::simd::LANES;

/// Weights begin on a cache line.
const ALIGNMENT: usize = 64;

/// A weight: (outputs / 16) panels, the last filled up with zeros.
pub struct Panels {
    format: Format,
    inputs: usize,
    outputs: usize,
    bytes: Arc<Buffer<u8>>,
    /// Where the first panel begins in `bytes`, which weights may share.
    first: usize,
}

/// How the numbers of a weight are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    F32,
    F16,
    BF16,
    Blocks(BlockFormat),
}

/// Rows of a matrix, (rows, inputs), out of a file.
pub enum Numbers {
    F32(Vec<f32>),
    F16(Vec<u16>),
    BF16(Vec<u16>),
    Blocks(Blocks),
}

impl Panels {
    /// An all-zero weight to be filled by [`Panels::set`].
    pub fn zeroed(format: Format, outputs: usize, inputs: usize) -> Self {
        let bytes = outputs.div_ceil(LANES) * format.panel_bytes(inputs);
        Self { format, inputs, outputs, bytes: Arc::new(Buffer::zeroed(bytes)), first: 0 }
    }

    /// Packs `weight`: (outputs, inputs), row-major.
    pub fn pack(weight: Vec<f32>, outputs: usize, inputs: usize) -> Self {
        let mut panels = Self::zeroed(Format::F32, outputs, inputs);
        panels.set(0, &Numbers::F32(weight));
        panels
    }

    /// Moves weights into one stretch of memory, so that all of it lies on huge pages.
    pub fn adjoin<const N: usize>(weights: [Self; N]) -> [Self; N] {
        let room = |weight: &Self| weight.bytes().next_multiple_of(ALIGNMENT);
        let mut together = Buffer::zeroed(weights.iter().map(room).sum());
        let mut first = 0;
        for weight in &weights {
            together[first..first + weight.bytes()].copy_from_slice(weight.all());
            first += room(weight);
        }
        let together = Arc::new(together);
        let mut next = 0;
        weights.map(|weight| {
            let first = next;
            next += room(&weight);
            Self { bytes: together.clone(), first, ..weight }
        })
    }

    /// Packs `numbers`, (any number of rows, inputs) of this weight's format, as the outputs from `output` on.
    pub fn set(&mut self, output: usize, numbers: &Numbers) {
        assert_eq!(self.format, numbers.format(), "numbers of the weight's format");
        let (format, inputs) = (self.format, self.inputs);
        let panel_bytes = format.panel_bytes(inputs);
        let bytes = Arc::get_mut(&mut self.bytes).expect("weights are filled before they are adjoined");
        for row in 0..numbers.rows(inputs) {
            let (panel, lane) = ((output + row) / LANES, (output + row) % LANES);
            let panel = &mut bytes[panel * panel_bytes..][..panel_bytes];
            let range = row * inputs..(row + 1) * inputs;
            match numbers {
                Numbers::F32(values) => scatter(panel, lane, &values[range], f32::to_ne_bytes),
                Numbers::F16(bits) | Numbers::BF16(bits) => {
                    scatter(panel, lane, &bits[range], u16::to_ne_bytes);
                }
                Numbers::Blocks(blocks) => format.layout(inputs).set(panel, lane, blocks, row),
            }
        }
    }

    /// Copies one output's weights, (inputs): an embedding's row.
    pub fn row(&self, output: usize, row: &mut [f32]) {
        let (panel, lane) = (output / LANES, output % LANES);
        let panel_bytes = self.format.panel_bytes(self.inputs);
        let panel = &self.all()[panel * panel_bytes..][..panel_bytes];
        match self.format {
            Format::F32 => gather(panel, lane, row, f32::from_ne_bytes),
            Format::F16 => gather(panel, lane, row, |bits| f16::from_ne_bytes(bits).to_f32()),
            Format::BF16 => gather(panel, lane, row, |bits| bf16::from_ne_bytes(bits).to_f32()),
            Format::Blocks(_) => self.format.layout(self.inputs).row(panel, lane, row),
        }
    }

    pub fn format(&self) -> Format {
        self.format
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
        self.count() * self.format.panel_bytes(self.inputs)
    }

    /// Where a panel begins; for the one after the last, where it would.
    pub(super) fn panel(&self, index: usize) -> *const u8 {
        self.all().as_ptr().wrapping_add(index * self.format.panel_bytes(self.inputs))
    }

    fn all(&self) -> &[u8] {
        &self.bytes[self.first..][..self.bytes()]
    }
}

impl Format {
    /// Whether products with this format take rows in blocks of integers, rather than of floats.
    pub fn is_blocks(self) -> bool {
        matches!(self, Self::Blocks(_))
    }

    fn panel_bytes(self, inputs: usize) -> usize {
        match self {
            Self::F32 => inputs * LANES * size_of::<f32>(),
            Self::F16 | Self::BF16 => inputs * LANES * size_of::<u16>(),
            Self::Blocks(_) => self.layout(inputs).panel_bytes(),
        }
    }

    /// Of a panel of blocks.
    pub(super) fn layout(self, inputs: usize) -> PanelLayout {
        let Self::Blocks(format) = self else { unreachable!("only blocks have a layout") };
        PanelLayout { format, blocks: inputs / BLOCK_INPUTS }
    }
}

impl Numbers {
    pub fn format(&self) -> Format {
        match self {
            Self::F32(_) => Format::F32,
            Self::F16(_) => Format::F16,
            Self::BF16(_) => Format::BF16,
            Self::Blocks(blocks) => Format::Blocks(blocks.format),
        }
    }

    fn rows(&self, inputs: usize) -> usize {
        let numbers = match self {
            Self::F32(values) => values.len(),
            Self::F16(bits) | Self::BF16(bits) => bits.len(),
            Self::Blocks(blocks) => blocks.integers.len(),
        };
        numbers / inputs
    }
}

/// One row into a lane of a panel, (inputs, 16).
fn scatter<T: Copy, const N: usize>(panel: &mut [u8], lane: usize, row: &[T], bytes: impl Fn(T) -> [u8; N]) {
    for (vector, number) in panel.chunks_exact_mut(LANES * N).zip(row) {
        vector[lane * N..][..N].copy_from_slice(&bytes(*number));
    }
}

/// A lane of a panel, (inputs, 16), into a row.
fn gather<const N: usize>(panel: &[u8], lane: usize, row: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (vector, x) in panel.chunks_exact(LANES * N).zip(row) {
        let (numbers, _) = vector.as_chunks::<N>();
        *x = number(numbers[lane]);
    }
}
