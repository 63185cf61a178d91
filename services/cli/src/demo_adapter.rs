//! The adapter that ships (adapters/positive-concise): part of the binary, so that a demo needs no file beside it.

use std::path::Path;

use anyhow::Context as _;
use tempfile::TempDir;

/// Under this name it is served.
pub const NAME: &str = "positive-concise";

/// What it was trained for.
pub const OBJECTIVES: [&str; 2] = ["positive", "concise"];

const FILES: [(&str, &[u8]); 2] = [
    ("adapter_config.json", include_bytes!("../../../adapters/positive-concise/adapter_config.json")),
    (
        "adapter_model.safetensors",
        include_bytes!("../../../adapters/positive-concise/adapter_model.safetensors"),
    ),
];

/// The adapter's folder, until this is dropped.
pub struct DemoAdapter(TempDir);

// === impl DemoAdapter ===

impl DemoAdapter {
    /// # Errors
    /// Where the folder for temporary files has no room.
    pub fn unpack() -> anyhow::Result<Self> {
        let folder = TempDir::new().context("unpacking the demo adapter")?;
        for (name, bytes) in FILES {
            let file = folder.path().join(name);
            std::fs::write(&file, bytes).with_context(|| format!("unpacking {}", file.display()))?;
        }
        Ok(Self(folder))
    }

    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// As `--adapter` takes it.
    pub fn flag(&self) -> String {
        format!("{NAME}={}", self.folder().display())
    }
}
