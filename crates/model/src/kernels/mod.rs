//! The arithmetic of a step on the CPU: fixed-order kernels whose bits do not depend on batch or machine.

// In reading order; blank lines keep rustfmt from sorting them.
pub mod simd;

pub mod buffer;

pub mod blocks;

pub mod panels;

pub mod tile;

pub mod block_tile;

pub mod rows;

pub mod gemm;

pub mod attention;

pub mod elementwise;

pub mod team;
