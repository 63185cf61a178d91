//! A request as the cluster works with it: every value checked, every default filled in.

use crate::{
    ProtocolError,
    limits::{
        CHAT_MESSAGES_MAX, CHOICES_MAX, GUIDANCE_TERMS_MAX, INPUT_TOKENS_MAX, LOGPROBS_MAX,
        MAX_TOKENS_DEFAULT, MAX_TOKENS_MAX, NAME_BYTES_MAX, OBJECTIVES_MAX, PENALTY_MAX, PROMPT_BYTES_MAX,
        REPETITION_PENALTY, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, STOP_TOKEN_IDS_MAX, STRENGTH_MAX,
        TEMPERATURE_MAX, TEMPERATURE_MIN_SAMPLING,
    },
    member::{Generation, RewardWorker},
    pb,
    progress::Progress,
};

/// Of so many places, one is kept for each class of priority above a request's own.
const PLACES_KEPT_SHARE: usize = 8;

/// What a client asks for. Built from the wire by `TryFrom`, which is the only validation there is.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// Empty until the router draws one.
    pub request_id: String,
    /// Empty: the only base model served.
    pub model: String,
    pub input: Input,
    pub sampling: Sampling,
    /// Weight of the base model's own logits; 0: the guidance terms alone choose.
    pub base_strength: f32,
    pub guidance: Vec<GuidanceTerm>,
    pub on_reward_loss: OnRewardLoss,
    pub priority: Priority,
    /// `None`: the base worker's own setting.
    pub exchange: Option<Exchange>,
    /// Tokens of each answer that the client has already.
    pub skip: u32,
    /// A record of it is kept.
    pub audit: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Raw text, no template.
    Prompt(String),
    /// Rendered by each model with its own template.
    Chat(Vec<ChatMessage>),
    Tokens(Vec<u32>),
}

impl Input {
    /// Whether it is read at once: nothing is rendered, and nothing but a system text is tokenised.
    pub fn is_tokens(&self) -> bool {
        matches!(self, Self::Tokens(_))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0: off.
    pub top_k: u32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off.
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// `None` until the router draws one.
    pub seed: Option<u64>,
    pub max_tokens: u32,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    /// `Some`: token details are wanted, with that many alternatives.
    pub logprobs: Option<u32>,
    pub n: u32,
    pub ignore_eos: bool,
}

/// One reward model that steers: base_strength · z_base + Σ strength · z_reward.
#[derive(Debug, Clone, PartialEq)]
pub struct GuidanceTerm {
    /// Empty until the router has resolved it.
    pub reward: String,
    /// Weights as asked: finite, non-negative, not all zero; normalised where they are used.
    pub preference: Vec<(String, f32)>,
    pub strength: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnRewardLoss {
    #[default]
    Wait,
    Fail,
    Unguided,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Priority {
    Low,
    #[default]
    Normal,
    High,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    Certified,
    Dense,
}

/// A request with its places: what a router hands to a base worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    pub request: GenerateRequest,
    /// How far its answers have come elsewhere.
    pub progress: Progress,
    /// For each guidance term, the workers that serve it, best first; never empty.
    pub placements: Vec<Vec<RewardWorker>>,
    /// The base worker's generation that was chosen.
    pub generation: Generation,
    /// Whose it is; 0: nobody's in particular.
    pub tenant: u64,
}

// === impl GenerateRequest ===

impl TryFrom<pb::GenerateRequest> for GenerateRequest {
    type Error = ProtocolError;

    fn try_from(wire: pb::GenerateRequest) -> Result<Self, ProtocolError> {
        check_name("request_id", &wire.request_id)?;
        // It goes into logs, headers and names of records.
        if wire.request_id.contains(char::is_control) {
            return Err(ProtocolError::invalid("request_id", "has control characters"));
        }
        check_name("model", &wire.model)?;
        check_count("guidance", wire.guidance.len(), GUIDANCE_TERMS_MAX)?;
        let guidance = wire
            .guidance
            .into_iter()
            .enumerate()
            .map(|(index, term)| GuidanceTerm::from_wire(&format!("guidance[{index}]"), term))
            .collect::<Result<_, _>>()?;
        let request = Self {
            on_reward_loss: OnRewardLoss::from_wire(wire.on_reward_loss)?,
            priority: Priority::from_wire(wire.priority)?,
            exchange: Exchange::from_wire(wire.exchange)?,
            input: wire.input.ok_or_else(|| ProtocolError::missing("input"))?.try_into()?,
            sampling: wire.sampling.unwrap_or_default().try_into()?,
            request_id: wire.request_id,
            model: wire.model,
            base_strength: wire.base_strength.unwrap_or(1.0),
            guidance,
            skip: wire.skip,
            audit: wire.audit,
        };
        request.check_base_strength()?;
        Ok(request)
    }
}

impl GenerateRequest {
    /// What a request is that says nothing but its input.
    #[must_use]
    pub fn new(input: Input) -> Self {
        Self {
            request_id: String::new(),
            model: String::new(),
            input,
            sampling: Sampling::default(),
            base_strength: 1.0,
            guidance: Vec::new(),
            on_reward_loss: OnRewardLoss::default(),
            priority: Priority::default(),
            exchange: None,
            skip: 0,
            audit: false,
        }
    }

    /// Something has to choose: the base model, or a term that cannot be missed.
    fn check_base_strength(&self) -> Result<(), ProtocolError> {
        const FIELD: &str = "base_strength";
        check_range(FIELD, self.base_strength, &(0.0..=STRENGTH_MAX), "")?;
        if self.base_strength > 0.0 {
            return Ok(());
        }
        if self.guidance.iter().all(|term| term.strength == 0.0) {
            let reason = "is 0, which wants a guidance term with a strength: nothing else chooses a token";
            return Err(ProtocolError::invalid(FIELD, reason));
        }
        if self.on_reward_loss == OnRewardLoss::Unguided {
            let reason =
                "is 0, which wants on_reward_loss WAIT or FAIL: nothing chooses a token without its reward";
            return Err(ProtocolError::invalid(FIELD, reason));
        }
        Ok(())
    }
}

impl From<GenerateRequest> for pb::GenerateRequest {
    fn from(request: GenerateRequest) -> Self {
        Self {
            request_id: request.request_id,
            model: request.model,
            input: Some(request.input.into()),
            sampling: Some(request.sampling.into()),
            guidance: request.guidance.into_iter().map(Into::into).collect(),
            on_reward_loss: request.on_reward_loss.to_wire() as i32,
            priority: request.priority.to_wire() as i32,
            exchange: request.exchange.map_or(pb::Exchange::Unspecified, Exchange::to_wire) as i32,
            skip: request.skip,
            audit: request.audit,
            base_strength: Some(request.base_strength),
            // How far it has come is not of the request: see `Progress`.
            resume: Vec::new(),
        }
    }
}

// === impl Input ===

impl TryFrom<pb::Input> for Input {
    type Error = ProtocolError;

    fn try_from(wire: pb::Input) -> Result<Self, ProtocolError> {
        match wire.kind.ok_or_else(|| ProtocolError::missing("input"))? {
            pb::input::Kind::Prompt(text) => {
                check_bytes("input.prompt", text.len(), PROMPT_BYTES_MAX)?;
                if text.is_empty() {
                    return Err(ProtocolError::invalid("input.prompt", "is empty"));
                }
                Ok(Self::Prompt(text))
            }
            pb::input::Kind::Chat(chat) => Self::from_messages(chat.messages),
            pb::input::Kind::Tokens(tokens) => {
                check_count("input.tokens", tokens.ids.len(), INPUT_TOKENS_MAX)?;
                if tokens.ids.is_empty() {
                    return Err(ProtocolError::invalid("input.tokens", "is empty"));
                }
                Ok(Self::Tokens(tokens.ids))
            }
        }
    }
}

impl Input {
    fn from_messages(wire: Vec<pb::ChatMessage>) -> Result<Self, ProtocolError> {
        const FIELD: &str = "input.chat.messages";
        check_count(FIELD, wire.len(), CHAT_MESSAGES_MAX)?;
        if wire.is_empty() {
            return Err(ProtocolError::invalid(FIELD, "is empty"));
        }
        check_bytes(FIELD, wire.iter().map(|m| m.role.len() + m.content.len()).sum(), PROMPT_BYTES_MAX)?;
        let mut messages = Vec::with_capacity(wire.len());
        for (index, message) in wire.into_iter().enumerate() {
            if message.role.is_empty() || message.role.len() > NAME_BYTES_MAX {
                let field = format!("{FIELD}[{index}].role");
                return Err(ProtocolError::invalid(field, "wants a name such as system, user or assistant"));
            }
            messages.push(ChatMessage { role: message.role, content: message.content });
        }
        Ok(Self::Chat(messages))
    }
}

impl From<Input> for pb::Input {
    fn from(input: Input) -> Self {
        let kind = match input {
            Input::Prompt(text) => pb::input::Kind::Prompt(text),
            Input::Chat(messages) => pb::input::Kind::Chat(pb::ChatMessages {
                messages: messages
                    .into_iter()
                    .map(|ChatMessage { role, content }| pb::ChatMessage { role, content })
                    .collect(),
            }),
            Input::Tokens(ids) => pb::input::Kind::Tokens(pb::TokenIds { ids }),
        };
        Self { kind: Some(kind) }
    }
}

// === impl Sampling ===

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            max_tokens: MAX_TOKENS_DEFAULT,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            logprobs: None,
            n: 1,
            ignore_eos: false,
        }
    }
}

impl TryFrom<pb::Sampling> for Sampling {
    type Error = ProtocolError;

    fn try_from(wire: pb::Sampling) -> Result<Self, ProtocolError> {
        let sampling = Self {
            temperature: wire.temperature.unwrap_or(1.0),
            top_k: wire.top_k,
            top_p: wire.top_p.unwrap_or(1.0),
            min_p: wire.min_p,
            repetition_penalty: wire.repetition_penalty.unwrap_or(1.0),
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            seed: wire.seed,
            max_tokens: wire.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT),
            stop: wire.stop,
            stop_token_ids: wire.stop_token_ids,
            logprobs: wire.logprobs,
            n: wire.n.unwrap_or(1),
            ignore_eos: wire.ignore_eos,
        };
        sampling.check_distribution()?;
        sampling.check_lengths()?;
        Ok(sampling)
    }
}

impl Sampling {
    fn check_distribution(&self) -> Result<(), ProtocolError> {
        let temperature = self.temperature;
        if temperature != 0.0 {
            check_range(
                "sampling.temperature",
                temperature,
                &(TEMPERATURE_MIN_SAMPLING..=TEMPERATURE_MAX),
                "0 (greedy) or ",
            )?;
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let reason = format!("is {}, wants a number in (0, 1]", self.top_p);
            return Err(ProtocolError::invalid("sampling.top_p", reason));
        }
        check_range("sampling.min_p", self.min_p, &(0.0..=1.0), "")?;
        check_range("sampling.repetition_penalty", self.repetition_penalty, &REPETITION_PENALTY, "")?;
        let penalties = -PENALTY_MAX..=PENALTY_MAX;
        check_range("sampling.presence_penalty", self.presence_penalty, &penalties, "")?;
        check_range("sampling.frequency_penalty", self.frequency_penalty, &penalties, "")
    }

    fn check_lengths(&self) -> Result<(), ProtocolError> {
        let between = |field: &str, value: u32, limit: u32| match value {
            0 => Err(ProtocolError::invalid(field, format!("is 0, wants 1..={limit}"))),
            _ => check_count(field, value as usize, limit as usize),
        };
        between("sampling.max_tokens", self.max_tokens, MAX_TOKENS_MAX)?;
        between("sampling.n", self.n, CHOICES_MAX)?;
        check_count("sampling.logprobs", self.logprobs.unwrap_or(0) as usize, LOGPROBS_MAX as usize)?;
        check_count("sampling.stop_token_ids", self.stop_token_ids.len(), STOP_TOKEN_IDS_MAX)?;
        check_count("sampling.stop", self.stop.len(), STOP_STRINGS_MAX)?;
        for (index, stop) in self.stop.iter().enumerate() {
            let field = format!("sampling.stop[{index}]");
            if stop.is_empty() {
                return Err(ProtocolError::invalid(field, "is empty"));
            }
            check_bytes(&field, stop.len(), STOP_STRING_BYTES_MAX)?;
        }
        Ok(())
    }
}

impl From<Sampling> for pb::Sampling {
    fn from(sampling: Sampling) -> Self {
        Self {
            temperature: Some(sampling.temperature),
            top_k: sampling.top_k,
            top_p: Some(sampling.top_p),
            min_p: sampling.min_p,
            repetition_penalty: Some(sampling.repetition_penalty),
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed,
            max_tokens: Some(sampling.max_tokens),
            stop: sampling.stop,
            stop_token_ids: sampling.stop_token_ids,
            logprobs: sampling.logprobs,
            n: Some(sampling.n),
            ignore_eos: sampling.ignore_eos,
        }
    }
}

// === impl GuidanceTerm ===

impl GuidanceTerm {
    fn from_wire(field: &str, wire: pb::GuidanceTerm) -> Result<Self, ProtocolError> {
        check_name(&format!("{field}.reward"), &wire.reward)?;
        let strength = wire.strength.unwrap_or(1.0);
        check_range(&format!("{field}.strength"), strength, &(-STRENGTH_MAX..=STRENGTH_MAX), "")?;
        let preference = preference_from_wire(&format!("{field}.preference"), wire.preference)?;
        Ok(Self { reward: wire.reward, preference, strength })
    }
}

/// Weights as asked, in the order of the wire. Empty is allowed: not every reward model has objectives.
pub(crate) fn preference_from_wire(
    field: &str,
    wire: Vec<pb::ObjectiveWeight>,
) -> Result<Vec<(String, f32)>, ProtocolError> {
    check_count(field, wire.len(), OBJECTIVES_MAX)?;
    let mut preference: Vec<(String, f32)> = Vec::with_capacity(wire.len());
    for pb::ObjectiveWeight { objective, weight } in wire {
        if objective.is_empty() || objective.len() > NAME_BYTES_MAX {
            return Err(ProtocolError::invalid(field, format!("wants names of 1..={NAME_BYTES_MAX} bytes")));
        }
        if !weight.is_finite() || weight < 0.0 {
            let reason = format!("weight {weight} of objective {objective:?} is not a finite number >= 0");
            return Err(ProtocolError::invalid(field, reason));
        }
        if preference.iter().any(|(name, _)| *name == objective) {
            return Err(ProtocolError::invalid(field, format!("names objective {objective:?} twice")));
        }
        preference.push((objective, weight));
    }
    if !preference.is_empty() && preference.iter().all(|(_, weight)| *weight == 0.0) {
        return Err(ProtocolError::invalid(field, "weights are all zero: at least one must be positive"));
    }
    Ok(preference)
}

pub(crate) fn preference_to_wire(preference: Vec<(String, f32)>) -> Vec<pb::ObjectiveWeight> {
    preference.into_iter().map(|(objective, weight)| pb::ObjectiveWeight { objective, weight }).collect()
}

impl From<GuidanceTerm> for pb::GuidanceTerm {
    fn from(term: GuidanceTerm) -> Self {
        Self {
            reward: term.reward,
            preference: preference_to_wire(term.preference),
            strength: Some(term.strength),
        }
    }
}

// === impl OnRewardLoss ===

impl OnRewardLoss {
    fn from_wire(wire: i32) -> Result<Self, ProtocolError> {
        match pb::OnRewardLoss::try_from(wire) {
            Ok(pb::OnRewardLoss::Unspecified | pb::OnRewardLoss::Wait) => Ok(Self::Wait),
            Ok(pb::OnRewardLoss::Fail) => Ok(Self::Fail),
            Ok(pb::OnRewardLoss::Unguided) => Ok(Self::Unguided),
            Err(_) => Err(unknown_enum("on_reward_loss", wire)),
        }
    }

    fn to_wire(self) -> pb::OnRewardLoss {
        match self {
            Self::Wait => pb::OnRewardLoss::Wait,
            Self::Fail => pb::OnRewardLoss::Fail,
            Self::Unguided => pb::OnRewardLoss::Unguided,
        }
    }
}

// === impl Priority ===

impl Priority {
    pub const COUNT: usize = 3;

    /// Of so many places, those that may be taken when a request of this priority has got one: some are kept for more
    /// urgent ones, so that no flood of batches, and no busy hour either, shuts them out.
    pub fn places(self, all: usize) -> usize {
        let kept = all / PLACES_KEPT_SHARE;
        match self {
            Self::Low => all - 2 * kept,
            Self::Normal => all - kept,
            Self::High => all,
        }
    }

    pub(crate) fn from_wire(wire: i32) -> Result<Self, ProtocolError> {
        match pb::Priority::try_from(wire) {
            Ok(pb::Priority::Low) => Ok(Self::Low),
            Ok(pb::Priority::Unspecified | pb::Priority::Normal) => Ok(Self::Normal),
            Ok(pb::Priority::High) => Ok(Self::High),
            Err(_) => Err(unknown_enum("priority", wire)),
        }
    }

    pub(crate) fn to_wire(self) -> pb::Priority {
        match self {
            Self::Low => pb::Priority::Low,
            Self::Normal => pb::Priority::Normal,
            Self::High => pb::Priority::High,
        }
    }
}

// === impl Exchange ===

impl Exchange {
    fn from_wire(wire: i32) -> Result<Option<Self>, ProtocolError> {
        match pb::Exchange::try_from(wire) {
            Ok(pb::Exchange::Unspecified) => Ok(None),
            Ok(pb::Exchange::Certified) => Ok(Some(Self::Certified)),
            Ok(pb::Exchange::Dense) => Ok(Some(Self::Dense)),
            Err(_) => Err(unknown_enum("exchange", wire)),
        }
    }

    fn to_wire(self) -> pb::Exchange {
        match self {
            Self::Certified => pb::Exchange::Certified,
            Self::Dense => pb::Exchange::Dense,
        }
    }
}

// === impl Placed ===

impl TryFrom<pb::RunRequest> for Placed {
    type Error = ProtocolError;

    fn try_from(wire: pb::RunRequest) -> Result<Self, ProtocolError> {
        let mut request = wire.request.ok_or_else(|| ProtocolError::missing("request"))?;
        let progress = Progress::from_wire(std::mem::take(&mut request.resume))?;
        let request: GenerateRequest = request.try_into()?;
        progress.check(&request.sampling)?;
        if wire.placements.len() != request.guidance.len() {
            return Err(ProtocolError::invalid("placements", "wants one for each guidance term"));
        }
        let placements = wire
            .placements
            .into_iter()
            .map(|placement| {
                if placement.workers.is_empty() {
                    return Err(ProtocolError::missing("placements.workers"));
                }
                Ok(placement.workers.into_iter().map(Into::into).collect())
            })
            .collect::<Result<_, _>>()?;
        let (generation, tenant) = (Generation(wire.generation), wire.tenant);
        Ok(Self { request, progress, placements, generation, tenant })
    }
}

impl From<Placed> for pb::RunRequest {
    fn from(placed: Placed) -> Self {
        let resume = placed.progress.into();
        Self {
            request: Some(pb::GenerateRequest { resume, ..placed.request.into() }),
            placements: placed
                .placements
                .into_iter()
                .map(|workers| pb::RewardPlacement { workers: workers.into_iter().map(Into::into).collect() })
                .collect(),
            generation: placed.generation.0,
            tenant: placed.tenant,
        }
    }
}

// === checks ===

fn check_name(field: &str, name: &str) -> Result<(), ProtocolError> {
    check_bytes(field, name.len(), NAME_BYTES_MAX)
}

fn check_bytes(field: &str, bytes: usize, limit: usize) -> Result<(), ProtocolError> {
    if bytes > limit {
        return Err(ProtocolError::invalid(field, format!("has {bytes} bytes, the limit is {limit}")));
    }
    Ok(())
}

pub(crate) fn check_count(field: &str, count: usize, limit: usize) -> Result<(), ProtocolError> {
    if count > limit {
        return Err(ProtocolError::invalid(field, format!("is {count}, the limit is {limit}")));
    }
    Ok(())
}

fn check_range(
    field: &str,
    value: f32,
    range: &std::ops::RangeInclusive<f32>,
    or: &str,
) -> Result<(), ProtocolError> {
    if !range.contains(&value) {
        let reason = format!("is {value}, wants {or}a number between {} and {}", range.start(), range.end());
        return Err(ProtocolError::invalid(field, reason));
    }
    Ok(())
}

fn unknown_enum(field: &str, value: i32) -> ProtocolError {
    ProtocolError::invalid(field, format!("has the unknown value {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_kept_for_each_higher_class_where_there_are_enough() {
        let places = |all| [Priority::Low, Priority::Normal, Priority::High].map(|class| class.places(all));
        assert_eq!(places(64), [48, 56, 64]);
        assert_eq!(places(7), [7, 7, 7]);
    }

    fn valid() -> pb::GenerateRequest {
        pb::GenerateRequest {
            input: Some(pb::Input { kind: Some(pb::input::Kind::Prompt("hello".into())) }),
            sampling: Some(pb::Sampling::default()),
            guidance: vec![pb::GuidanceTerm {
                preference: vec![pb::ObjectiveWeight { objective: "harmless".into(), weight: 0.7 }],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn refused_field(change: impl FnOnce(&mut pb::GenerateRequest)) -> String {
        let mut wire = valid();
        change(&mut wire);
        GenerateRequest::try_from(wire).expect_err("must be refused").field().to_owned()
    }

    fn refused_sampling(change: impl FnOnce(&mut pb::Sampling)) -> String {
        refused_field(|wire| change(wire.sampling.as_mut().unwrap()))
    }

    fn refused_weights(weights: &[(&str, f32)]) -> String {
        refused_field(|wire| {
            wire.guidance[0].preference = preference_to_wire(
                weights.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect(),
            );
        })
    }

    #[test]
    fn a_request_survives_the_wire_unchanged() {
        let request = GenerateRequest::try_from(valid()).unwrap();
        let again = GenerateRequest::try_from(pb::GenerateRequest::from(request.clone())).unwrap();
        assert_eq!(request, again);
    }

    #[test]
    fn something_has_to_choose_a_token() {
        let without_base = |change: fn(&mut pb::GenerateRequest)| {
            let mut wire = pb::GenerateRequest { base_strength: Some(0.0), ..valid() };
            change(&mut wire);
            GenerateRequest::try_from(wire)
        };
        assert_eq!(without_base(|_| ()).unwrap().base_strength, 0.0);
        let refused = [
            without_base(|r| r.guidance.clear()),
            without_base(|r| r.guidance[0].strength = Some(0.0)),
            without_base(|r| r.on_reward_loss = pb::OnRewardLoss::Unguided as i32),
        ];
        for refused in refused {
            assert_eq!(refused.expect_err("must be refused").field(), "base_strength");
        }
        assert_eq!(GenerateRequest::try_from(valid()).unwrap().base_strength, 1.0);
    }

    #[test]
    fn each_bad_value_names_its_field() {
        assert_eq!(refused_field(|r| r.input = None), "input");
        assert_eq!(refused_field(|r| r.priority = 77), "priority");
        assert_eq!(refused_field(|r| r.request_id = "a\nb".into()), "request_id");
        assert_eq!(refused_field(|r| r.guidance[0].strength = Some(f32::NAN)), "guidance[0].strength");
        assert_eq!(refused_field(|r| r.base_strength = Some(-0.5)), "base_strength");
        assert_eq!(refused_field(|r| r.base_strength = Some(f32::INFINITY)), "base_strength");
        assert_eq!(refused_sampling(|s| s.max_tokens = Some(0)), "sampling.max_tokens");
        assert_eq!(refused_sampling(|s| s.temperature = Some(-1.0)), "sampling.temperature");
        assert_eq!(refused_sampling(|s| s.temperature = Some(1e9)), "sampling.temperature");
        assert_eq!(refused_sampling(|s| s.temperature = Some(f32::NAN)), "sampling.temperature");
        assert_eq!(refused_sampling(|s| s.top_p = Some(0.0)), "sampling.top_p");
        assert_eq!(refused_sampling(|s| s.stop = vec!["x".into(); 1_000_000]), "sampling.stop");
        assert_eq!(refused_sampling(|s| s.stop_token_ids = vec![0; 1_000_000]), "sampling.stop_token_ids");
        assert_eq!(refused_sampling(|s| s.n = Some(0)), "sampling.n");
        assert_eq!(refused_weights(&[("a", -0.1)]), "guidance[0].preference");
        assert_eq!(refused_weights(&[("a", f32::NAN)]), "guidance[0].preference");
        assert_eq!(refused_weights(&[("a", 0.0), ("b", 0.0)]), "guidance[0].preference");
        assert_eq!(refused_weights(&[("a", 0.5), ("a", 0.5)]), "guidance[0].preference");
    }
}
