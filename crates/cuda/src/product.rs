//! Products with weights: which kernel computes one, over how many blocks.

use uniarm_model::ModelError;

use crate::device::Argument::{Address, Integer};
use crate::device::{Argument, Device, Grid};
use crate::locked::Locked;
use crate::memory::Memory;
use crate::step::{WARP, integer};
use crate::weights::{Matrix, WeightFormat};

/// As in `kernels/matmul.cu`.
const MATMUL_WARPS: u32 = 8;
const MATMUL_COLUMNS: usize = 2;
const MATMUL_ROWS_MAX: usize = 8;

/// As in `kernels/matmul_bf16.cu`.
const TENSOR_WARPS: u32 = 8;
const TILE_OUTPUTS: usize = 16;
const TILE_ROWS: usize = 8;
const TILES_MAX: usize = 4;

/// A launch.
pub(crate) struct Product {
    pub kernel: &'static str,
    pub grid: Grid,
    pub arguments: [Argument; 7],
}

/// A matrix of weights on a device by itself: its products are to be compared with sums of more digits.
pub struct Products {
    matrix: Matrix,
    /// The last one to go: memory is given back through it.
    device: Device,
}

// === impl Product ===

impl Product {
    /// output = input · weightᵀ, or += where `add` is set; the first two are addresses. More rows to a block than there are would be
    /// computed for nothing; no sum depends on the choice.
    pub fn new(weight: &Matrix, (input, output, rows): (u64, u64, usize), add: bool) -> Self {
        let (kernel, grid) = match weight.format() {
            WeightFormat::F32 => plain(weight.outputs, rows),
            WeightFormat::Bf16 => on_tensor_cores(weight.outputs, rows),
        };
        let arguments = [
            Address(weight.address()),
            Address(input),
            Address(output),
            integer(rows),
            integer(weight.inputs),
            integer(weight.outputs),
            Integer(i32::from(add)),
        ];
        Self { kernel, grid, arguments }
    }
}

fn plain(outputs: usize, rows: usize) -> (&'static str, Grid) {
    let together = rows.next_power_of_two().min(MATMUL_ROWS_MAX);
    let kernel = match together {
        1 => "matmul_f32_1",
        2 => "matmul_f32_2",
        4 => "matmul_f32_4",
        _ => "matmul_f32_8",
    };
    let columns = MATMUL_COLUMNS * MATMUL_WARPS as usize;
    let blocks = [outputs.div_ceil(columns), rows.div_ceil(together), 1];
    (kernel, Grid { blocks, threads: MATMUL_WARPS * WARP })
}

fn on_tensor_cores(outputs: usize, rows: usize) -> (&'static str, Grid) {
    let tiles = rows.div_ceil(TILE_ROWS).next_power_of_two().min(TILES_MAX);
    let kernel = match tiles {
        1 => "matmul_bf16_8",
        2 => "matmul_bf16_16",
        _ => "matmul_bf16_32",
    };
    let blocks = [rows.div_ceil(tiles * TILE_ROWS), outputs.div_ceil(tiles * TILE_OUTPUTS), 1];
    (kernel, Grid { blocks, threads: TENSOR_WARPS * WARP })
}

// === impl Products ===

impl Products {
    /// Brings weights, (outputs, inputs), to a device. `inputs` is a multiple of 16.
    ///
    /// # Errors
    /// [`ModelError::Device`], as of [`CudaLlama::load`](crate::CudaLlama::load).
    pub fn of(
        ordinal: usize,
        (weights, inputs): (&[f32], usize),
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let device = Device::open(ordinal)?;
        format.check(&device)?;
        Ok(Self { matrix: Matrix::of(&device, (weights, inputs), format)?, device })
    }

    /// The products with rows of inputs, (rows, outputs); what `added_to` has is added to, where there is something.
    ///
    /// # Errors
    /// [`ModelError::Device`] for a device that has no room, or fails.
    pub fn with(&self, rows: &[f32], added_to: Option<&[f32]>) -> Result<Vec<f32>, ModelError> {
        let Self { matrix, device } = self;
        let count = rows.len() / matrix.inputs;
        let numbers = count * matrix.outputs;
        let rows = Memory::of(device, rows, "rows")?;
        let output = match added_to {
            Some(sums) => Memory::of(device, sums, "sums")?,
            None => Memory::reserve(device, numbers, "sums")?,
        };
        let Product { kernel, grid, arguments } =
            Product::new(matrix, (rows.at(0), output.at(0), count), added_to.is_some());
        // Safety: these are a product's arguments, and the memory is there until the device has finished.
        unsafe { device.launch(kernel, grid, &arguments)? };
        let mut inbox = Locked::new();
        output.read(device, 0, inbox.reserve(device.stream(), numbers)?)?;
        device.finish()?;
        Ok(inbox.numbers(numbers).to_vec())
    }
}
