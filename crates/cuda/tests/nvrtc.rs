//! NVIDIA's compiler takes every kernel, down to machine code, on a machine without a GPU; and what is missing is said.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::path::Path;
use std::process::Command;

use uniarm_cuda::{Architecture, CudaLlama, CudaOptions, WeightFormat, check_kernels};
use uniarm_model::ModelError;

#[path = "support/fakes.rs"]
#[allow(dead_code)]
mod fakes;
#[path = "support/made_up.rs"]
#[allow(dead_code)]
mod made_up;

/// Set in the process that finds the compiler.
const COMPILER: &str = "UNIARM_TEST_NVRTC";

/// A T4, for weights of f32; A100, H100.
const ARCHITECTURES: [(u32, u32); 3] = [(7, 5), (8, 0), (9, 0)];

fn main() {
    if std::env::var_os(COMPILER).is_some() {
        return every_kernel_compiles();
    }
    what_is_missing_is_said();
    println!("ok      what is missing is said");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/nvrtc.sh");
    let output = Command::new(script).output().unwrap();
    match output.status.code() {
        Some(0) => fakes::again(Path::new(String::from_utf8(output.stdout).unwrap().trim()), COMPILER),
        Some(3) => {
            let reason = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
            println!("skipped: kernels are not compiled by NVIDIA's compiler: {reason}");
        }
        _ => panic!("{}", String::from_utf8_lossy(&output.stderr)),
    }
}

fn every_kernel_compiles() {
    for (major, minor) in ARCHITECTURES {
        for architecture in [Architecture::Real(major, minor), Architecture::Virtual(major, minor)] {
            check_kernels(architecture).unwrap();
        }
    }
    println!("ok      every kernel compiles for sm_75, sm_80 and sm_90");
    let Err(ModelError::Device(message)) = check_kernels(Architecture::Real(1, 0)) else { panic!() };
    assert!(message.contains("sm_10") && message.contains("gpu-architecture"), "{message}");
    println!("ok      the compiler's words are part of the error");
}

/// Where there is a GPU, or its libraries, they are not missing.
fn what_is_missing_is_said() {
    let files = made_up::LLAMA.scene().files;
    let options =
        CudaOptions { device: 999, kv_blocks: 2, block_tokens: 16, weights: WeightFormat::F32, graphs: true };
    let Err(ModelError::Device(message)) = CudaLlama::load(&files, &options) else { panic!() };
    assert!(
        ["no NVIDIA driver", "no compiler of kernels", "device 999 of"]
            .iter()
            .any(|said| message.starts_with(said)),
        "{message}"
    );
}
