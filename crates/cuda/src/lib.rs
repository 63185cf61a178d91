//! The forward pass of a Llama model on an NVIDIA GPU: the [`Forward`](uniarm_model::Forward) of
//! `crates/model/src/llama.rs`, with kernels of our own.
//!
//! The crate needs no CUDA to be built: the driver (`libcuda`) and the compiler of kernels (`libnvrtc`) are looked for when a
//! model is loaded, so that one binary runs everywhere. Kernels (`src/kernels/`) are compiled then, for the device
//! that is there.
//!
//! **The promise of `Forward` holds here too**: logits are a function of the sequence and its adapter, bit for bit,
//! whatever the batch, the chunks and the blocks of the cache (`tests/fake_gpu.rs`). They are not the bits of the CPU, nor those of
//! another kind of GPU: a cluster in which tokens must not depend on the worker has base workers of one kind.
//!
//! **Ranks of a group** (`src/peers.rs`) each hold their outputs of every matrix, and hand each other activations from device to
//! device, over NCCL: the logits have the bits of one GPU, for any number of ranks (`tests/fake_group.rs`). Ranks of a stage hold
//! its layers alone; steps of many tokens pass through the stages in micro-batches.
//!
//! **Lists** of the likeliest tokens take the place of rows where they are enough: two kernels rank a row with its noise, bit for bit as
//! `crates/decode` does, and find the best of it; the row stays on the device, in a ring of the latest 256, until somebody asks
//! for it (`tests/fake_lists.rs`).
//!
//! **Lanes** (`src/lanes.rs`) carry whole rows from one model's device to another process's, over NCCL: kept rows are copied within the
//! device, and sent from there (`tests/fake_lanes.rs`).
//!
//! **Launches** of a step: 1 + 9 × layers, 2 more where logits are wanted, and another 2 where lists are. A layer: norm, product
//! (queries, keys, values), rotation and append, attention, product (output), norm, product (gate, up), gating, product
//! (down); residual additions are part of the products. Two more for each group of linear layers that an adapter of the step
//! reaches. One copy to the device (tokens, positions, slots, block tables, states of preferences, lists that are wanted), and
//! back what is wanted: one of rows, and one of lists. A step's copies are from and to locked pages of the host; a step
//! allocates only when it is larger than all before it.
//!
//! **Products** with weights of bf16 run on tensor cores, which multiply them with the three terms of bf16 that an activation is
//! cut into: nothing of it is lost, and the order of sums follows from the number of inputs (`kernels/matmul_bf16.cu`,
//! `tests/fake_products.rs`). That takes devices of compute capability 8.0 or later; weights of f32 do not.
//!
//! **Graphs** (`src/graphs.rs`) take the place of the launches of small steps that come again, as those of a steady batch do: one
//! call, with the very same kernels, grids and arguments (`tests/fake_graphs.rs`). Ranks of a group launch kernel by kernel.
//!
//! Not here yet: choosing tokens on the device.

mod adapters;
mod device;
mod graphs;
mod lanes;
mod lister;
mod llama;
mod locked;
mod memory;
mod peers;
mod product;
mod rates;
mod rows;
mod sheet;
mod step;
mod weights;
mod workspace;

pub use device::{Architecture, Gpu, check_kernels, gpus};
pub use lanes::CudaLanes;
pub use lister::list_rows;
pub use llama::{CudaLlama, CudaOptions};
pub use product::Products;
pub use rates::Rates;
pub use weights::WeightFormat;
