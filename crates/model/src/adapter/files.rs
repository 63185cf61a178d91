//! An adapter's files as they lie in their folder: what they are known by, and what they say without a backbone.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::load::{CONFIG_FILE, Fields, TENSOR_FILE, read_config};
use crate::error::ModelError;

/// Bytes that are read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// An adapter before a backbone is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterFiles {
    /// SHA-256 over its configuration and then its tensors, byte for byte as they are stored.
    pub digest: [u8; 32],
    /// The backbone's fingerprint in hexadecimal digits, where it names one.
    pub backbone: Option<String>,
}

/// Both files of an adapter in memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AdapterContents {
    pub text: String,
    pub tensors: Vec<u8>,
}

impl AdapterFiles {
    /// Reads all of both files; that the tensors are those of an adapter shows only over a backbone.
    ///
    /// # Errors
    /// [`ModelError::Io`] for a file that is not there, [`ModelError::Malformed`] and [`ModelError::Adapter`] for a
    /// configuration that is none.
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let file = folder.join(CONFIG_FILE);
        let json: Value = serde_json::from_str(&read_config(&file)?)
            .map_err(|error| ModelError::malformed(&file, format!("not JSON: {error}")))?;
        Fields { json: &json, file: &file }.description()?;
        let backbone = json["backbone_fingerprint"].as_str().map(str::to_owned);
        Ok(Self { digest: Self::digest(folder)?, backbone })
    }

    /// SHA-256 over both files.
    ///
    /// # Errors
    /// [`ModelError::Io`] for a file that is not there.
    pub fn digest(folder: &Path) -> Result<[u8; 32], ModelError> {
        let mut hash = Sha256::new();
        let mut piece = vec![0; PIECE_BYTES];
        for name in [CONFIG_FILE, TENSOR_FILE] {
            let path = folder.join(name);
            let failed = |error| ModelError::io(&path, error);
            let mut file = File::open(&path).map_err(failed)?;
            loop {
                match file.read(&mut piece).map_err(failed)? {
                    0 => break,
                    length => hash.update(&piece[..length]),
                }
            }
        }
        Ok(hash.finalize().into())
    }
}
