//! Activations of a step as a matrix that threads write together.

use crate::kernels::buffer::Buffer;
use crate::kernels::gemm::Output;

/// A row-major matrix of the workspace, shared out by rows or by columns.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub output: Output,
    pub width: usize,
}

impl Matrix {
    /// Of a buffer that `Workspace::reserve` made large enough, valid until the buffer is borrowed again.
    pub fn new(buffer: &mut Buffer, width: usize) -> Self {
        Self::over(buffer, width)
    }

    /// The same of rows that are elsewhere.
    pub fn over(rows: &mut [f32], width: usize) -> Self {
        // Safety: rows or columns are shared out wherever the value is used.
        Self { output: unsafe { Output::new(rows.as_mut_ptr(), width) }, width }
    }

    /// # Safety
    /// The row exists, and nobody else uses it.
    pub unsafe fn row<'a>(self, row: usize) -> &'a mut [f32] {
        unsafe { self.output.slice(row, 0..self.width) }
    }

    /// # Safety
    /// The rows exist, and nobody else uses them.
    pub unsafe fn rows<'a>(self, first: usize, count: usize) -> &'a mut [f32] {
        unsafe { self.output.slice(first, 0..self.width * count) }
    }
}
