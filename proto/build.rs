//! Compiles the contract without protoc; the same descriptor set feeds gRPC reflection.

use prost::Message as _;

const FILES: [&str; 5] = [
    "uniarm/v1/types.proto",
    "uniarm/v1/inference.proto",
    "uniarm/v1/base.proto",
    "uniarm/v1/reward.proto",
    "uniarm/v1/status.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=uniarm");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
