//! OpenAI's words for a request, its answer and its errors, whatever brings them: a call by HTTP, or a line of a batch.
//!
//! `fields` (an object, read field by field) → `ask` (a body becomes the request that gRPC would have brought;
//! `guidance` is the one field that OpenAI does not have) → `answer` (events become objects; `logprobs` their details);
//! `failure` is what any of it can end with. What values a request may hold is checked where every request is, in
//! `uniarm_proto`; here only shapes and names are.

mod answer;
mod ask;
mod failure;
mod fields;
mod guidance;
mod logprobs;

pub use answer::{Writer, costs};
pub use ask::{Ask, Call, Form, Names, messages, read_sampling};
pub use failure::Failure;
pub use fields::{Fields, did_you_mean};
pub use guidance::{LOSS_POLICIES, PRIORITIES, preference, read_guidance, read_term};
pub use logprobs::decimal;
