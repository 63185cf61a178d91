//! The one error type of this crate: every variant is a sentence a person can act on.

use std::path::{Path, PathBuf};

use uniarm_collective::CollectiveError;

/// What can go wrong between a model's name and its logits.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The source is neither a GGUF file, a model folder nor an `hf://` address.
    #[error("no model at '{model}': {reason}")]
    NotFound { model: String, reason: String },

    /// The operating system refused to read or write a file.
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: std::io::Error },

    /// A file is truncated, corrupt or contradicts itself.
    #[error("{}: {reason}", .file.display())]
    Malformed { file: PathBuf, reason: String },

    /// A file is sound, but describes something that this crate does not run.
    #[error("{}: {feature} is not supported", .file.display())]
    Unsupported { file: PathBuf, feature: String },

    /// A tensor that the architecture needs is absent.
    #[error("{}: tensor '{name}' is missing", .file.display())]
    MissingTensor { file: PathBuf, name: String },

    /// A tensor is there with other dimensions than the configuration implies.
    #[error("{}: tensor '{name}' has shape {found:?} instead of {expected:?}", .file.display())]
    Shape { file: PathBuf, name: String, expected: Vec<usize>, found: Vec<usize> },

    /// An adapter does not belong to this backbone, or is not a sound adapter.
    #[error("adapter {}: {reason}", .file.display())]
    Adapter { file: PathBuf, reason: String },

    /// A preference, a row or a message breaks the contract of the function it was given to.
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },

    /// Another rank of a sharded model is lost, late or not what it should be: the group is over.
    #[error("the group of shards is over: {0}")]
    Group(#[from] CollectiveError),

    /// A way of rows between two devices is closed, or cannot be had.
    #[error("the lane of rows: {0}")]
    Lane(CollectiveError),

    /// A GPU, its driver or its compiler is missing, or refused; the sentence says what to do.
    #[error("device: {0}")]
    Device(String),

    /// The tokenizer cannot encode a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// The chat template does not render these messages.
    #[error("chat template: {0}")]
    Template(String),

    /// A download failed for good, or is not allowed (offline).
    #[error("{url}: {reason}")]
    Download { url: String, reason: String },

    /// A candle operation failed: a defect of this crate unless memory ran out.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn malformed(file: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { file: file.to_owned(), reason: reason.into() }
    }

    pub(crate) fn unsupported(file: &Path, feature: impl Into<String>) -> Self {
        Self::Unsupported { file: file.to_owned(), feature: feature.into() }
    }

    /// Of [`Forward::listed_rows`](crate::Forward::listed_rows): a row is asked for too late.
    pub fn row_not_kept() -> Self {
        Self::Invalid { field: "numbers", reason: "the row behind a list is not kept any more".to_owned() }
    }
}
