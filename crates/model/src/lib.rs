//! Model files, and the forward pass over them: weights, tokenizer, chat template, adapters, logits.
//!
//! Modules stand in the order in which a model comes to life: found, read, and run.

mod config;
mod error;

mod hub;
mod source;

mod gguf;
mod quantised;
mod safetensors;
mod weights;

mod template;
mod tokenizer;

mod forward;
mod likeliest;
mod listing;

mod lane;

pub mod kernels;

mod rope;

mod kv;

mod adapter;

mod division;
mod llama;
mod sharded;

pub mod reference;

mod scripted;

pub mod machine;

pub use adapter::{
    Adapter, AdapterFiles, Conditioned, Factors, Method, Mixing, Objective, PlainLora, StackedFactors,
};
pub use config::{Architecture, Config, Rope, RopeScaling};
pub use division::{Columns, Division, Linear, Outputs, Part};
pub use error::ModelError;
pub use forward::{Forward, Limits, Row};
pub use hub::cache_folder;
pub use kernels::attention::KvFormat;
pub use lane::{DeviceRow, Hangup, RowLanes, RowReceiver, RowSender};
pub use likeliest::{Candidate, Likeliest, Lists, NoiseAt, Ranking};
pub use listing::Listing;
pub use llama::{Llama, LlamaOptions, Operations, Plan, Token, micro_batches};
pub use rope::RopeTable;
pub use scripted::{ScriptedForward, ScriptedLists, ScriptedOptions};
pub use sharded::{Arithmetic, Leader, RankForward, Shard, Terms};
pub use source::{ModelFiles, OpenOptions, open};
pub use template::{ChatTemplate, Message};
pub use tokenizer::{Tokenizer, TokenizerFingerprint};
pub use weights::Weights;
