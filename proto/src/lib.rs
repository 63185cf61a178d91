//! The contract `uniarm.v1`: generated code, the domain types that replace it at every edge, and client constructors.
//!
//! Generated types stay inside the module that receives them: a receiver turns `pb::X` into `X` with `TryFrom`,
//! which names the bad field, and works with `X` from there on.

/// Generated from `proto/uniarm/v1/*.proto`.
#[allow(clippy::all, rust_2018_idioms, missing_docs)]
pub mod pb {
    tonic::include_proto!("uniarm.v1");
}

pub mod adapter;
pub mod client;
pub mod cluster_client;
pub mod deadline;
pub mod dice;
pub mod digits;
pub mod error;
pub mod limits;
pub mod member;
pub mod progress;
pub mod refusal;
pub mod request;
pub mod session;
pub mod transcript;

pub use adapter::{AdapterFault, AdapterRecord, AdapterVersion};
pub use cluster_client::{Answers, ClusterClient};
pub use dice::Dice;
pub use error::ProtocolError;
pub use member::{
    BaseModel, Generation, Member, MemberId, Objective, RewardModel, RewardWorker, Role, TokenizerFingerprint,
};
pub use pb::generate_response::Event;
pub use progress::{AnswerSoFar, Progress};
pub use refusal::{Code, Fault, Refusal, Refused};
pub use request::{
    ChatMessage, Exchange, GenerateRequest, GuidanceTerm, Input, OnRewardLoss, Placed, Priority, Sampling,
};
pub use session::{
    Advance, Answer, Draft, DraftMode, Failure, FailureCode, LaneState, Load, OpBatch, Open, ReplyBatch,
    SessionGeneration, SessionId, SessionOp, SessionPace, SessionReply, SessionRow,
};

pub use transcript::{ChoiceTranscript, Transcript};

/// Details of a status, as they travel.
pub type Details = bytes::Bytes;

/// All descriptors of the contract, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
