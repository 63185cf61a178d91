//! Every limit on what a message may hold, with its unit and its reason.

use std::time::Duration;

/// Bytes of one gRPC message to the front door: a prompt at its limit with room for the rest.
pub const REQUEST_MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Bytes of one message between workers. A step may carry a dense f32 row (608 KB at 152k tokens) for each
/// of up to 64 rows.
pub const WORKER_MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Bytes of a prompt or of all chat messages together: far above the context of any served model, so that
/// the tokenizer never sees what could not fit anyway.
pub const PROMPT_BYTES_MAX: usize = 1 << 20;

/// Chat messages of one request.
pub const CHAT_MESSAGES_MAX: usize = 1024;

/// Token ids of one input.
pub const INPUT_TOKENS_MAX: usize = 1 << 18;

/// Guidance terms of one request: each one is a session on a reward worker.
pub const GUIDANCE_TERMS_MAX: usize = 16;

/// Objectives of one preference.
pub const OBJECTIVES_MAX: usize = 64;

/// Bytes of a model, reward, objective or request name.
pub const NAME_BYTES_MAX: usize = 256;

/// |w|: beyond it f32 logits lose the digits that tell tokens apart.
pub const STRENGTH_MAX: f32 = 100.0;

/// Above it sampling is uniform for every real model.
pub const TEMPERATURE_MAX: f32 = 100.0;

/// Below it (and above 0) z/T overflows f32 for logits of ordinary size; 0 itself is greedy.
pub const TEMPERATURE_MIN_SAMPLING: f32 = 1e-3;

/// |penalty| for presence and frequency.
pub const PENALTY_MAX: f32 = 100.0;

/// Range of the repetition penalty.
pub const REPETITION_PENALTY: std::ops::RangeInclusive<f32> = 0.01..=100.0;

/// Stop strings; each is searched in every text delta.
pub const STOP_STRINGS_MAX: usize = 64;

/// Bytes of a stop string: that much text may be held back.
pub const STOP_STRING_BYTES_MAX: usize = 1024;

/// Stop token ids.
pub const STOP_TOKEN_IDS_MAX: usize = 1024;

/// Tokens of one answer; the model's context is the tighter limit.
pub const MAX_TOKENS_MAX: u32 = 1 << 20;

/// Nobody waits longer; a deadline that is further away is brought here. Beyond some thousand years a clock has no time.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Tokens of an answer when the request does not say.
pub const MAX_TOKENS_DEFAULT: u32 = 256;

/// Alternatives reported for each token.
pub const LOGPROBS_MAX: u32 = 20;

/// Answers to one request.
pub const CHOICES_MAX: u32 = 64;

/// Ids of one query for named logits: above it a whole row is cheaper.
pub const QUERY_IDS_MAX: usize = 1 << 16;

/// Length of the lists (K).
pub const LIST_LENGTH_MAX: u32 = 4096;

/// Tokens that a reward worker may be ahead of the last chosen one: rows that it holds for queries, and what one wrong
/// draft can waste.
pub const DRAFT_WINDOW_MAX: u32 = 64;

/// Logits of a row on a lane: many times the vocabulary of any served model.
pub const LANE_VALUES_MAX: u32 = 1 << 22;

/// Session operations in one message: every sequence of a large worker, a few times over.
pub const SESSION_OPS_MAX: usize = 1 << 14;
