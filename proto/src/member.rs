//! Who is in the cluster: members, their roles, and the models they serve.

use std::fmt;

use crate::{
    AdapterFault, ProtocolError,
    limits::{NAME_BYTES_MAX, OBJECTIVES_MAX},
    pb,
    request::check_count,
};

/// Name of a process, stable over its restarts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(pub String);

/// Which life of a member: a restarted process is a different peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Router,
    Base,
    Reward,
}

/// The record of one process.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    pub id: MemberId,
    pub generation: Generation,
    pub role: Role,
    /// host:port of its gRPC service.
    pub address: String,
    pub tokenizer: Option<TokenizerFingerprint>,
    /// Logits of one row.
    pub vocabulary: u32,
    /// Sequences (base) or sessions (reward) that it holds at once.
    pub capacity: u32,
    pub base_model: Option<BaseModel>,
    pub reward_models: Vec<RewardModel>,
    pub group: String,
    pub rank: u32,
    pub size: u32,
    /// What the store's catalogue names and this reward worker does not serve.
    pub adapter_faults: Vec<AdapterFault>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseModel {
    pub name: String,
    pub context_tokens: u32,
    pub vocabulary: u32,
    pub has_chat_template: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RewardModel {
    /// As sessions name it: NAME@VERSION where it has a version.
    pub name: String,
    pub objectives: Vec<Objective>,
    pub backbone: String,
    /// moslora, pblora, lora, prompted or plain.
    pub method: String,
    /// A prompted model of one objective, which can stand for it in a mixed preference.
    pub single_objective: bool,
    /// Of the store's catalogue; 0: it is of its worker's command line, and has none.
    pub version: u64,
    /// No new request gets it by its bare name.
    pub retired: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objective {
    pub name: String,
    pub description: String,
}

/// Tokenizers agree when their cores do: vocabularies that differ only in trailing added tokens
/// (32000 / 32001) are cut to the shorter one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenizerFingerprint {
    pub core: [u8; 32],
    pub core_tokens: u32,
    pub full: [u8; 32],
}

/// Where a guidance term can be scored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RewardWorker {
    pub member: MemberId,
    pub generation: Generation,
    pub address: String,
}

// === impl MemberId ===

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Generation ===

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

// === impl Role ===

impl Role {
    /// The subcommand that plays it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Base => "base",
            Self::Reward => "reward",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl TryFrom<i32> for Role {
    type Error = ProtocolError;

    fn try_from(wire: i32) -> Result<Self, ProtocolError> {
        match pb::Role::try_from(wire) {
            Ok(pb::Role::Router) => Ok(Self::Router),
            Ok(pb::Role::Base) => Ok(Self::Base),
            Ok(pb::Role::Reward) => Ok(Self::Reward),
            Ok(pb::Role::Unspecified) | Err(_) => {
                Err(ProtocolError::invalid("role", format!("has the unknown value {wire}")))
            }
        }
    }
}

impl From<Role> for pb::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Router => Self::Router,
            Role::Base => Self::Base,
            Role::Reward => Self::Reward,
        }
    }
}

// === impl Member ===

impl Member {
    /// A member of this role without a name, an address or a model.
    pub fn new(role: Role) -> Self {
        Self {
            id: MemberId(String::new()),
            generation: Generation(0),
            role,
            address: String::new(),
            tokenizer: None,
            vocabulary: 0,
            capacity: 0,
            base_model: None,
            reward_models: Vec::new(),
            group: String::new(),
            rank: 0,
            size: 1,
            adapter_faults: Vec::new(),
        }
    }

    /// The worker of this record, as a place for a guidance term.
    pub fn as_reward_worker(&self) -> RewardWorker {
        RewardWorker { member: self.id.clone(), generation: self.generation, address: self.address.clone() }
    }
}

impl TryFrom<pb::Member> for Member {
    type Error = ProtocolError;

    fn try_from(wire: pb::Member) -> Result<Self, ProtocolError> {
        if wire.id.is_empty() || wire.id.len() > NAME_BYTES_MAX {
            return Err(ProtocolError::invalid("id", format!("wants 1..={NAME_BYTES_MAX} bytes")));
        }
        let reward_models =
            wire.reward_models.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        Ok(Self {
            id: MemberId(wire.id),
            generation: Generation(wire.generation),
            role: wire.role.try_into()?,
            address: wire.address,
            tokenizer: wire.tokenizer.map(TryInto::try_into).transpose()?,
            vocabulary: wire.vocabulary,
            capacity: wire.capacity,
            base_model: wire.base_model.map(Into::into),
            reward_models,
            group: wire.group,
            rank: wire.rank,
            size: wire.size,
            adapter_faults: wire.adapter_faults.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<Member> for pb::Member {
    fn from(member: Member) -> Self {
        Self {
            id: member.id.0,
            generation: member.generation.0,
            role: pb::Role::from(member.role) as i32,
            address: member.address,
            tokenizer: member.tokenizer.map(Into::into),
            vocabulary: member.vocabulary,
            capacity: member.capacity,
            base_model: member.base_model.map(Into::into),
            reward_models: member.reward_models.into_iter().map(Into::into).collect(),
            group: member.group,
            rank: member.rank,
            size: member.size,
            adapter_faults: member.adapter_faults.into_iter().map(Into::into).collect(),
        }
    }
}

// === impl BaseModel ===

impl From<pb::BaseModel> for BaseModel {
    fn from(wire: pb::BaseModel) -> Self {
        let pb::BaseModel { name, context_tokens, vocabulary, has_chat_template } = wire;
        Self { name, context_tokens, vocabulary, has_chat_template }
    }
}

impl From<BaseModel> for pb::BaseModel {
    fn from(model: BaseModel) -> Self {
        let BaseModel { name, context_tokens, vocabulary, has_chat_template } = model;
        Self { name, context_tokens, vocabulary, has_chat_template }
    }
}

// === impl RewardModel ===

impl RewardModel {
    pub fn serves(&self, objective: &str) -> bool {
        self.objectives.iter().any(|served| served.name == objective)
    }

    /// The name without its version: what new requests say.
    pub fn bare_name(&self) -> &str {
        match self.name.rsplit_once('@') {
            Some((bare, _)) if self.version > 0 => bare,
            _ => &self.name,
        }
    }

    /// As clients see it in a list: under its bare name.
    #[must_use]
    pub fn as_listed(&self) -> Self {
        Self { name: self.bare_name().to_owned(), ..self.clone() }
    }
}

impl TryFrom<pb::RewardModel> for RewardModel {
    type Error = ProtocolError;

    fn try_from(wire: pb::RewardModel) -> Result<Self, ProtocolError> {
        check_count("reward_models.objectives", wire.objectives.len(), OBJECTIVES_MAX)?;
        let objectives = wire
            .objectives
            .into_iter()
            .map(|pb::Objective { name, description }| Objective { name, description })
            .collect();
        Ok(Self {
            name: wire.name,
            objectives,
            backbone: wire.backbone,
            method: wire.method,
            single_objective: wire.single_objective,
            version: wire.version,
            retired: wire.retired,
        })
    }
}

impl From<RewardModel> for pb::RewardModel {
    fn from(model: RewardModel) -> Self {
        Self {
            name: model.name,
            objectives: model
                .objectives
                .into_iter()
                .map(|Objective { name, description }| pb::Objective { name, description })
                .collect(),
            backbone: model.backbone,
            method: model.method,
            single_objective: model.single_objective,
            version: model.version,
            retired: model.retired,
        }
    }
}

// === impl TokenizerFingerprint ===

impl TokenizerFingerprint {
    /// Whether token ids mean the same text for both, up to the shorter vocabulary.
    pub fn agrees_with(&self, other: &Self) -> bool {
        self.full == other.full || (self.core == other.core && self.core_tokens == other.core_tokens)
    }
}

impl TryFrom<pb::TokenizerFingerprint> for TokenizerFingerprint {
    type Error = ProtocolError;

    fn try_from(wire: pb::TokenizerFingerprint) -> Result<Self, ProtocolError> {
        let hash = |field: &str, bytes: &[u8]| {
            bytes.try_into().map_err(|_| ProtocolError::invalid(field, "wants 32 bytes"))
        };
        Ok(Self {
            core: hash("tokenizer.core", &wire.core)?,
            core_tokens: wire.core_tokens,
            full: hash("tokenizer.full", &wire.full)?,
        })
    }
}

impl From<TokenizerFingerprint> for pb::TokenizerFingerprint {
    fn from(fingerprint: TokenizerFingerprint) -> Self {
        Self {
            core: fingerprint.core.to_vec().into(),
            core_tokens: fingerprint.core_tokens,
            full: fingerprint.full.to_vec().into(),
        }
    }
}

// === impl RewardWorker ===

impl From<pb::RewardWorker> for RewardWorker {
    fn from(wire: pb::RewardWorker) -> Self {
        Self { member: MemberId(wire.member), generation: Generation(wire.generation), address: wire.address }
    }
}

impl From<RewardWorker> for pb::RewardWorker {
    fn from(worker: RewardWorker) -> Self {
        Self { member: worker.member.0, generation: worker.generation.0, address: worker.address }
    }
}
