//! Compiles the contract without protoc; the same descriptor set feeds gRPC reflection.

use prost::Message as _;

const FILES: [&str; 5] = [
    "uniarm/v1/types.proto",
    "uniarm/v1/inference.proto",
    "uniarm/v1/base.proto",
    "uniarm/v1/reward.proto",
    "uniarm/v1/status.proto",
];

/// What a request is made of.
const RECORDED: [&str; 9] = [
    "GenerateRequest",
    "AnswerSoFar",
    "Input",
    "ChatMessages",
    "ChatMessage",
    "TokenIds",
    "Sampling",
    "GuidanceTerm",
    "ObjectiveWeight",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=uniarm");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut generated = tonic_prost_build::configure().bytes(".");
    // A record of a request holds it as JSON.
    for message in RECORDED {
        generated = generated.message_attribute(
            format!(".uniarm.v1.{message}"),
            "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default, rename_all = \"snake_case\")]",
        );
    }
    let variants = "#[derive(serde::Serialize, serde::Deserialize)] #[serde(rename_all = \"snake_case\")]";
    generated.enum_attribute(".uniarm.v1.Input.kind", variants).compile_fds(descriptors)?;
    Ok(())
}
