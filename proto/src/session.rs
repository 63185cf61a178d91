//! What base and reward workers say to each other about one session.

use bytes::Bytes;

use crate::{
    ProtocolError,
    limits::{DRAFT_WINDOW_MAX, INPUT_TOKENS_MAX, LANE_VALUES_MAX, LIST_LENGTH_MAX, QUERY_IDS_MAX},
    member::{Generation, MemberId, TokenizerFingerprint},
    pb,
    request::{Input, Priority, Sampling, check_count, preference_from_wire, preference_to_wire},
};

/// Microseconds, or rows: far above every true number.
const MEASURED_MAX: f32 = 1e9;

/// Points of a step's cost: a worker has one for each power of two.
const STEP_POINTS_MAX: usize = 32;

/// One guidance term of one sequence; the number is the base worker's, unique on its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// Raised each time the base worker opens the session again: answers to an earlier one are stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionGeneration(pub u32);

/// base → reward.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionOp {
    Open(Box<Open>),
    Advance(Advance),
    /// Named logits of the row at `position`; no ids: all of them.
    Query {
        position: u32,
        ids: Vec<u32>,
    },
    Pace(SessionPace),
    Close,
}

/// Tokens at positions `position ..`, chosen or drafted; asks for the row after each. Without ids: the tokens before
/// `chosen` are what the worker has there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advance {
    pub position: u32,
    pub ids: Vec<u32>,
    /// Rows that follow are of this branch.
    pub branch: u32,
    /// Tokens of the answer that are chosen.
    pub chosen: u32,
}

/// What a draft is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DraftMode {
    #[default]
    Off,
    Single,
    Dual,
}

/// How the worker runs ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SessionPace {
    pub draft: DraftMode,
    /// Tokens that it may be ahead of the last chosen one.
    pub window: u32,
    /// K from the next row on; 0: as opened.
    pub list_length: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Open {
    pub reward: String,
    pub preference: Vec<(String, f32)>,
    pub input: Input,
    /// Tokens of the answer so far; asks for the row at position `answer.len()`.
    pub answer: Vec<u32>,
    /// K; 0: whole rows.
    pub list_length: u32,
    pub priority: Priority,
    pub tokenizer: Option<TokenizerFingerprint>,
    pub vocabulary: u32,
    pub seed: u64,
    pub choice: u32,
    /// The answer will not be longer.
    pub answer_tokens_max: u32,
    /// Rank lists by scale · z + G, with this scale; 0: by z.
    pub noise_scale: f32,
    /// How the token is chosen: a draft is chosen like that.
    pub sampling: Sampling,
    /// Sum of the strengths of all terms.
    pub strength: f32,
    /// Weight of the base model's logits.
    pub base_strength: f32,
    /// Whose it is; 0: nobody's in particular.
    pub tenant: u64,
    pub pace: SessionPace,
    /// Rows come with their log normalizer.
    pub wants_normalizer: bool,
}

/// reward → base.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionReply {
    Opened {
        prompt_tokens: u32,
        vocabulary: u32,
        answer_tokens_max: u32,
        /// SHA-256 of the backbone's weights; empty where an older worker does not say.
        backbone: Bytes,
        /// The worker, and which of its lives; `None`: as dialled.
        worker: Option<(MemberId, Generation)>,
    },
    Row(SessionRow),
    Answer(Answer),
    /// The session is gone.
    Failure(Failure),
}

/// Reward logits at one position: a list (descending) or, without ids, a value for each id of the vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionRow {
    pub position: u32,
    pub ids: Vec<u32>,
    pub values: Vec<f32>,
    /// Over 0: so many values come over the lane, and none are here.
    pub lane_values: u32,
    /// 0 where the session does not want it.
    pub log_normalizer: f32,
    /// `Some`: the list is ranked with the noise, and every unlisted scale · z + G is at most this.
    pub floor: Option<f32>,
    pub branch: u32,
    /// The token that the worker goes on with by itself, and what it was made from. `None`: it waits.
    pub draft: Option<Draft>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draft {
    pub token: u32,
    pub mode: DraftMode,
}

/// Values in the order of the query's ids; without ids, of the vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub position: u32,
    pub ids: Vec<u32>,
    pub values: Vec<f32>,
    /// As of a row.
    pub lane_values: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: FailureCode,
    pub field: String,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureCode {
    /// Never succeeds.
    InvalidArgument,
    /// Later, or elsewhere.
    ResourceExhausted,
    Internal,
}

/// How busy a reward worker is; travels on its streams.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Load {
    pub sessions: u32,
    pub waiting: u32,
    pub free_blocks: u32,
    pub total_blocks: u32,
    /// What recent steps cost: (rows, microseconds), ascending.
    pub step_points: Vec<(f32, f32)>,
    /// It is going away: sessions that can be had elsewhere should be.
    pub draining: bool,
    /// By priority, how long a session that is opened now stands in line for its first step.
    pub wait_ms: [u32; Priority::COUNT],
}

/// What a base worker has to say to one reward worker since its last message.
pub type OpBatch = Vec<(SessionId, SessionGeneration, SessionOp)>;

/// Replies of one step of a reward worker to one base worker.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ReplyBatch {
    pub replies: Vec<(SessionId, SessionGeneration, SessionReply)>,
    pub load: Option<Load>,
    pub lane: Option<LaneState>,
}

/// What has become of a lane that was offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneState {
    Joined,
    /// Why there is none, or none any more: what was announced and has not come does not come.
    Closed(String),
}

// === impl SessionOp ===

/// `Ok(None)` for an operation that this version does not know: the contract may grow.
pub fn op_from_wire(
    wire: pb::SessionOp,
) -> (SessionId, SessionGeneration, Result<Option<SessionOp>, ProtocolError>) {
    (
        SessionId(wire.session),
        SessionGeneration(wire.generation),
        wire.op.map(SessionOp::try_from).transpose(),
    )
}

pub fn op_to_wire(session: SessionId, generation: SessionGeneration, op: SessionOp) -> pb::SessionOp {
    pb::SessionOp { session: session.0, generation: generation.0, op: Some(op.into()) }
}

impl TryFrom<pb::session_op::Op> for SessionOp {
    type Error = ProtocolError;

    fn try_from(wire: pb::session_op::Op) -> Result<Self, ProtocolError> {
        Ok(match wire {
            pb::session_op::Op::Open(open) => Self::Open(Box::new(open.try_into()?)),
            pb::session_op::Op::Advance(pb::Advance { position, ids, branch, chosen }) => {
                check_count("advance.ids", ids.len(), INPUT_TOKENS_MAX)?;
                Self::Advance(Advance { position, ids, branch, chosen })
            }
            pb::session_op::Op::Pace(pace) => Self::Pace(pace.try_into()?),
            pb::session_op::Op::Query(pb::Query { position, ids }) => {
                check_count("query.ids", ids.len(), QUERY_IDS_MAX)?;
                Self::Query { position, ids }
            }
            pb::session_op::Op::Close(pb::Close {}) => Self::Close,
        })
    }
}

impl From<SessionOp> for pb::session_op::Op {
    fn from(op: SessionOp) -> Self {
        match op {
            SessionOp::Open(open) => Self::Open((*open).into()),
            SessionOp::Advance(Advance { position, ids, branch, chosen }) => {
                Self::Advance(pb::Advance { position, ids, branch, chosen })
            }
            SessionOp::Pace(pace) => Self::Pace(pace.into()),
            SessionOp::Query { position, ids } => Self::Query(pb::Query { position, ids }),
            SessionOp::Close => Self::Close(pb::Close {}),
        }
    }
}

// === impl Open ===

impl TryFrom<pb::Open> for Open {
    type Error = ProtocolError;

    fn try_from(wire: pb::Open) -> Result<Self, ProtocolError> {
        check_count("open.answer", wire.answer.len(), INPUT_TOKENS_MAX)?;
        check_count("open.list_length", wire.list_length as usize, LIST_LENGTH_MAX as usize)?;
        Ok(Self {
            preference: preference_from_wire("open.preference", wire.preference)?,
            input: wire.input.ok_or_else(|| ProtocolError::missing("open.input"))?.try_into()?,
            priority: Priority::from_wire(wire.priority)?,
            tokenizer: wire.tokenizer.map(TryInto::try_into).transpose()?,
            reward: wire.reward,
            answer: wire.answer,
            list_length: wire.list_length,
            vocabulary: wire.vocabulary,
            seed: wire.seed,
            choice: wire.choice,
            answer_tokens_max: wire.answer_tokens_max,
            noise_scale: wire.noise_scale,
            sampling: wire.sampling.unwrap_or_default().try_into()?,
            strength: wire.strength,
            base_strength: wire.base_strength.unwrap_or(1.0),
            tenant: wire.tenant,
            pace: wire.pace.unwrap_or_default().try_into()?,
            wants_normalizer: wire.wants_normalizer,
        })
    }
}

impl From<Open> for pb::Open {
    fn from(open: Open) -> Self {
        Self {
            reward: open.reward,
            preference: preference_to_wire(open.preference),
            input: Some(open.input.into()),
            answer: open.answer,
            list_length: open.list_length,
            priority: open.priority.to_wire() as i32,
            tokenizer: open.tokenizer.map(Into::into),
            vocabulary: open.vocabulary,
            seed: open.seed,
            choice: open.choice,
            answer_tokens_max: open.answer_tokens_max,
            noise_scale: open.noise_scale,
            sampling: Some(open.sampling.into()),
            strength: open.strength,
            base_strength: Some(open.base_strength),
            tenant: open.tenant,
            pace: Some(open.pace.into()),
            wants_normalizer: open.wants_normalizer,
        }
    }
}

// === impl DraftMode ===

impl DraftMode {
    fn from_wire(wire: i32) -> Self {
        // A mode of a later version is one that this version cannot draft with.
        match pb::DraftMode::try_from(wire) {
            Ok(pb::DraftMode::Single) => Self::Single,
            Ok(pb::DraftMode::Dual) => Self::Dual,
            Ok(pb::DraftMode::Off | pb::DraftMode::Unspecified) | Err(_) => Self::Off,
        }
    }

    fn to_wire(self) -> pb::DraftMode {
        match self {
            Self::Off => pb::DraftMode::Off,
            Self::Single => pb::DraftMode::Single,
            Self::Dual => pb::DraftMode::Dual,
        }
    }
}

// === impl SessionPace ===

impl TryFrom<pb::Pace> for SessionPace {
    type Error = ProtocolError;

    fn try_from(wire: pb::Pace) -> Result<Self, ProtocolError> {
        check_count("pace.window", wire.window as usize, DRAFT_WINDOW_MAX as usize)?;
        check_count("pace.list_length", wire.list_length as usize, LIST_LENGTH_MAX as usize)?;
        let draft = DraftMode::from_wire(wire.draft);
        Ok(Self { draft, window: wire.window, list_length: wire.list_length })
    }
}

impl From<SessionPace> for pb::Pace {
    fn from(pace: SessionPace) -> Self {
        let SessionPace { draft, window, list_length } = pace;
        Self { draft: draft.to_wire() as i32, window, list_length }
    }
}

// === impl SessionReply ===

pub fn reply_from_wire(
    wire: pb::SessionReply,
) -> (SessionId, SessionGeneration, Result<Option<SessionReply>, ProtocolError>) {
    let reply = wire.reply.map(SessionReply::try_from).transpose();
    (SessionId(wire.session), SessionGeneration(wire.generation), reply)
}

pub fn reply_to_wire(
    session: SessionId,
    generation: SessionGeneration,
    reply: SessionReply,
) -> pb::SessionReply {
    pb::SessionReply { session: session.0, generation: generation.0, reply: Some(reply.into()) }
}

impl SessionReply {
    /// Bytes of payload: four for each id and each value. Framing is a few bytes more.
    pub fn payload_bytes(&self) -> usize {
        match self {
            Self::Row(row) => {
                let scalars = usize::from(row.floor.is_some()) + usize::from(row.draft.is_some());
                4 * (row.ids.len() + row.values.len() + scalars)
            }
            Self::Answer(Answer { ids, values, .. }) => 4 * (ids.len() + values.len()),
            Self::Opened { .. } | Self::Failure(_) => 0,
        }
    }
}

impl TryFrom<pb::session_reply::Reply> for SessionReply {
    type Error = ProtocolError;

    fn try_from(wire: pb::session_reply::Reply) -> Result<Self, ProtocolError> {
        Ok(match wire {
            pb::session_reply::Reply::Opened(pb::Opened {
                prompt_tokens,
                vocabulary,
                answer_tokens_max,
                backbone,
                member,
                member_generation,
            }) => Self::Opened {
                prompt_tokens,
                vocabulary,
                answer_tokens_max,
                backbone,
                worker: (!member.is_empty()).then_some((MemberId(member), Generation(member_generation))),
            },
            pb::session_reply::Reply::Row(row) => Self::Row(SessionRow {
                position: row.position,
                lane_values: lane_values_from_wire("row.lane_values", row.lane_values, &row.values)?,
                values: values_from_wire("row.values", &row.ids, &row.values)?,
                ids: row.ids,
                log_normalizer: row.log_normalizer,
                floor: row.floor,
                branch: row.branch,
                draft: row.draft.map(|token| Draft { token, mode: DraftMode::from_wire(row.drafted) }),
            }),
            pb::session_reply::Reply::Answer(answer) => Self::Answer(Answer {
                position: answer.position,
                lane_values: lane_values_from_wire("answer.lane_values", answer.lane_values, &answer.values)?,
                values: values_from_wire("answer.values", &answer.ids, &answer.values)?,
                ids: answer.ids,
            }),
            pb::session_reply::Reply::Failure(failure) => Self::Failure(failure.into()),
        })
    }
}

impl From<SessionReply> for pb::session_reply::Reply {
    fn from(reply: SessionReply) -> Self {
        match reply {
            SessionReply::Opened { prompt_tokens, vocabulary, answer_tokens_max, backbone, worker } => {
                let (member, generation) = worker.map_or_else(Default::default, |(id, life)| (id.0, life.0));
                let member_generation = generation;
                Self::Opened(pb::Opened {
                    prompt_tokens,
                    vocabulary,
                    answer_tokens_max,
                    backbone,
                    member,
                    member_generation,
                })
            }
            SessionReply::Row(row) => Self::Row(pb::Row {
                position: row.position,
                ids: row.ids,
                values: values_to_wire(&row.values),
                log_normalizer: row.log_normalizer,
                floor: row.floor,
                branch: row.branch,
                draft: row.draft.map(|draft| draft.token),
                drafted: row.draft.map_or(DraftMode::Off, |draft| draft.mode).to_wire() as i32,
                lane_values: row.lane_values,
            }),
            SessionReply::Answer(answer) => Self::Answer(pb::Answer {
                position: answer.position,
                ids: answer.ids,
                values: values_to_wire(&answer.values),
                lane_values: answer.lane_values,
            }),
            SessionReply::Failure(failure) => Self::Failure(failure.into()),
        }
    }
}

/// f32 little-endian. `bytes` is 2.5 times faster on the wire than `repeated float` (measured at 128 KB).
fn values_from_wire(field: &str, ids: &[u32], wire: &Bytes) -> Result<Vec<f32>, ProtocolError> {
    let (values, rest) = wire.as_chunks::<4>();
    if !rest.is_empty() || !(ids.is_empty() || ids.len() == values.len()) {
        return Err(ProtocolError::invalid(field, "wants four bytes for each id"));
    }
    Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// Values are here or on the lane, and what is on the lane is a whole row: ids would want as many values here.
fn lane_values_from_wire(field: &str, count: u32, here: &Bytes) -> Result<u32, ProtocolError> {
    check_count(field, count as usize, LANE_VALUES_MAX as usize)?;
    match count > 0 && !here.is_empty() {
        true => Err(ProtocolError::invalid(field, "says that values come which are here")),
        false => Ok(count),
    }
}

fn values_to_wire(values: &[f32]) -> Bytes {
    let mut wire = Vec::with_capacity(4 * values.len());
    for value in values {
        wire.extend_from_slice(&value.to_le_bytes());
    }
    wire.into()
}

// === impl LaneState ===

impl From<pb::LaneState> for LaneState {
    fn from(wire: pb::LaneState) -> Self {
        if wire.closed.is_empty() { Self::Joined } else { Self::Closed(wire.closed) }
    }
}

impl From<LaneState> for pb::LaneState {
    fn from(state: LaneState) -> Self {
        match state {
            LaneState::Joined => Self { closed: String::new() },
            LaneState::Closed(reason) if reason.is_empty() => Self { closed: "closed".to_owned() },
            LaneState::Closed(closed) => Self { closed },
        }
    }
}

// === impl Failure ===

impl From<pb::Failure> for Failure {
    fn from(wire: pb::Failure) -> Self {
        let code = match wire.code() {
            pb::FailureCode::InvalidArgument => FailureCode::InvalidArgument,
            pb::FailureCode::ResourceExhausted => FailureCode::ResourceExhausted,
            pb::FailureCode::Internal | pb::FailureCode::Unspecified => FailureCode::Internal,
        };
        Self { code, field: wire.field, message: wire.message }
    }
}

impl From<Failure> for pb::Failure {
    fn from(failure: Failure) -> Self {
        let code = match failure.code {
            FailureCode::InvalidArgument => pb::FailureCode::InvalidArgument,
            FailureCode::ResourceExhausted => pb::FailureCode::ResourceExhausted,
            FailureCode::Internal => pb::FailureCode::Internal,
        };
        Self { code: code as i32, field: failure.field, message: failure.message }
    }
}

// === impl Load ===

impl From<pb::RewardLoad> for Load {
    fn from(wire: pb::RewardLoad) -> Self {
        Self {
            sessions: wire.sessions,
            waiting: wire.waiting,
            free_blocks: wire.free_blocks,
            total_blocks: wire.total_blocks,
            step_points: wire
                .step_points
                .into_iter()
                .take(STEP_POINTS_MAX)
                .map(|point| (measured(point.rows), measured(point.microseconds)))
                .collect(),
            draining: wire.draining,
            wait_ms: std::array::from_fn(|priority| wire.wait_ms.get(priority).copied().unwrap_or(0)),
        }
    }
}

/// A measurement that somebody else made: whatever it says, arithmetic goes on.
fn measured(value: f32) -> f32 {
    if value.is_finite() { value.clamp(0.0, MEASURED_MAX) } else { 0.0 }
}

impl From<Load> for pb::RewardLoad {
    fn from(load: Load) -> Self {
        Self {
            sessions: load.sessions,
            waiting: load.waiting,
            free_blocks: load.free_blocks,
            total_blocks: load.total_blocks,
            step_points: load
                .step_points
                .into_iter()
                .map(|(rows, microseconds)| pb::StepPoint { rows, microseconds })
                .collect(),
            draining: load.draining,
            wait_ms: if load.wait_ms == [0; Priority::COUNT] { Vec::new() } else { load.wait_ms.into() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_the_wire_bit_for_bit() {
        let row = SessionRow {
            position: 3,
            ids: vec![7, 2],
            values: vec![f32::MIN_POSITIVE, -0.0],
            lane_values: 0,
            log_normalizer: 12.5,
            floor: Some(-0.5),
            branch: 4,
            draft: Some(Draft { token: 7, mode: DraftMode::Dual }),
        };
        let wire = reply_to_wire(SessionId(1), SessionGeneration(2), SessionReply::Row(row.clone()));
        let (session, generation, reply) = reply_from_wire(wire);
        assert_eq!((session, generation), (SessionId(1), SessionGeneration(2)));
        let Ok(Some(SessionReply::Row(again))) = reply else { panic!("{reply:?}") };
        assert_eq!(again.values[1].to_bits(), (-0.0f32).to_bits());
        assert_eq!(again, row);
    }

    #[test]
    fn a_row_whose_ids_and_values_differ_in_number_is_refused() {
        let row = pb::Row { ids: vec![1, 2], values: Bytes::from_static(&[0; 4]), ..Default::default() };
        let error = SessionReply::try_from(pb::session_reply::Reply::Row(row)).unwrap_err();
        assert_eq!(error.field(), "row.values");
    }

    #[test]
    fn rows_on_a_lane_say_how_long_they_are_and_have_nothing_here() {
        let answer = Answer { position: 3, ids: Vec::new(), values: Vec::new(), lane_values: 49_152 };
        let wire: pb::session_reply::Reply = SessionReply::Answer(answer.clone()).into();
        assert_eq!(SessionReply::try_from(wire), Ok(SessionReply::Answer(answer)));

        let row = pb::Row { position: 3, lane_values: 91, ..pb::Row::default() };
        let Ok(SessionReply::Row(read)) = SessionReply::try_from(pb::session_reply::Reply::Row(row.clone()))
        else {
            panic!("a row on a lane")
        };
        assert_eq!((read.lane_values, &read.values), (91, &Vec::new()));
        for wrong in [
            pb::Row { lane_values: LANE_VALUES_MAX + 1, ..row.clone() },
            pb::Row { values: Bytes::from_static(&[0; 4]), ..row.clone() },
        ] {
            let error = SessionReply::try_from(pb::session_reply::Reply::Row(wrong)).unwrap_err();
            assert_eq!(error.field(), "row.lane_values");
        }
        // Ids would want values here.
        let listed = pb::Row { ids: vec![7], ..row };
        let error = SessionReply::try_from(pb::session_reply::Reply::Row(listed)).unwrap_err();
        assert_eq!(error.field(), "row.values");
    }

    #[test]
    fn what_has_become_of_a_lane_survives_the_wire() {
        for state in [LaneState::Joined, LaneState::Closed("no GPU".to_owned())] {
            assert_eq!(LaneState::from(pb::LaneState::from(state.clone())), state);
        }
        let silent = pb::LaneState::from(LaneState::Closed(String::new()));
        assert_ne!(
            LaneState::from(silent),
            LaneState::Joined,
            "a lane without a reason is closed nonetheless"
        );
    }
}
