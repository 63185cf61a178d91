//! Model files, and the forward pass over them: weights, tokenizer, chat template, adapters, logits.
//!
//! Modules stand in the order in which a model comes to life: found, read, and run.

mod config;
mod error;

mod hub;
mod source;

mod gguf;
mod safetensors;
mod weights;

mod template;
mod tokenizer;

mod forward;

mod adapter;

mod scripted;

pub use adapter::Conditioned;
pub use config::{Architecture, Config, Rope, RopeScaling};
pub use error::ModelError;
pub use forward::{Forward, Row};
pub use scripted::{ScriptedForward, ScriptedOptions};
pub use source::{ModelFiles, OpenOptions, open};
pub use template::{ChatTemplate, Message};
pub use tokenizer::{Tokenizer, TokenizerFingerprint};
pub use weights::Weights;
