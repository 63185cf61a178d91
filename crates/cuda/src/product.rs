//! Products with weights: which kernel computes one, over how many blocks.

use crate::device::Argument::{Address, Integer};
use crate::device::{Argument, Grid};
use crate::step::{WARP, integer};
use crate::weights::{Matrix, WeightFormat};

/// As in `kernels/matmul.cu`.
const MATMUL_WARPS: u32 = 8;
const MATMUL_COLUMNS: usize = 2;

/// A launch.
pub(crate) struct Product {
    pub kernel: &'static str,
    pub grid: Grid,
    pub arguments: [Argument; 7],
}

// === impl Product ===

impl Product {
    /// output = input · weightᵀ, or += where `add` is set; the first two are addresses. More rows to a warp than there are would be
    /// computed for nothing; no sum depends on the choice.
    pub fn new(weight: &Matrix, (input, output, rows): (u64, u64, usize), add: bool) -> Self {
        let together = rows.next_power_of_two().min(8);
        let kernel = match (weight.format(), together) {
            (WeightFormat::F32, 1) => "matmul_f32_1",
            (WeightFormat::F32, 2) => "matmul_f32_2",
            (WeightFormat::F32, 4) => "matmul_f32_4",
            (WeightFormat::F32, _) => "matmul_f32_8",
            (WeightFormat::Bf16, 1) => "matmul_bf16_1",
            (WeightFormat::Bf16, 2) => "matmul_bf16_2",
            (WeightFormat::Bf16, 4) => "matmul_bf16_4",
            (WeightFormat::Bf16, _) => "matmul_bf16_8",
        };
        let columns = MATMUL_COLUMNS * MATMUL_WARPS as usize;
        let blocks = [weight.outputs.div_ceil(columns), rows.div_ceil(together), 1];
        let arguments = [
            Address(weight.address()),
            Address(input),
            Address(output),
            integer(rows),
            integer(weight.inputs),
            integer(weight.outputs),
            Integer(i32::from(add)),
        ];
        Self { kernel, grid: Grid { blocks, threads: MATMUL_WARPS * WARP }, arguments }
    }
}
