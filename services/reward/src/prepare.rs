//! An `Open` becomes tokens and an adapter state, off the engine's thread: tokenising a long prompt must not hold
//! up a step.

use uniarm_decode::{Noise, Sampling, blocks::CacheRoot, preference::PreferenceSpec};
use uniarm_engine::prompt::{Prompt, Reader};
use uniarm_model::{Conditioned, Message};
use uniarm_proto::{Failure, FailureCode, Input, Open, Priority, SessionPace};

use crate::catalogue::{RewardCatalogue, Served};

/// A session that is ready to be scheduled.
pub(crate) struct Prepared {
    /// The reward's own rendering of the prompt, then the answer so far.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_tokens: usize,
    /// The prompt as the backbone reads it alone; empty where drafts of two rows make no sense.
    pub(crate) plain_prompt: Vec<u32>,
    pub(crate) adapter: Option<Conditioned>,
    pub(crate) root: CacheRoot,
    pub(crate) priority: Priority,
    /// 0: whole rows.
    pub(crate) list_length: usize,
    /// Logits that count: the shorter of the two vocabularies.
    pub(crate) vocabulary: usize,
    /// Tokens that the sequence may ever have.
    pub(crate) tokens_max: usize,
    pub(crate) noise: Noise,
    /// Strength over temperature, where lists are ranked with the noise.
    pub(crate) noise_scale: Option<f32>,
    /// How drafts are chosen.
    pub(crate) sampling: Sampling,
    pub(crate) strength: f32,
    pub(crate) base_strength: f32,
    pub(crate) tenant: u64,
    /// Tokens that end an answer.
    pub(crate) ends: Vec<u32>,
    pub(crate) pace: SessionPace,
    pub(crate) wants_normalizer: bool,
}

pub(crate) fn prepare(catalogue: &RewardCatalogue, open: &Open) -> Result<Prepared, Failure> {
    let backbone = &catalogue.backbone;
    let served = catalogue.find(&open.reward).ok_or_else(|| {
        let known: Vec<_> = catalogue.records().into_iter().map(|record| record.name).collect();
        invalid(
            "guidance.reward",
            format!("{:?} is not served here; served: {}", open.reward, known.join(", ")),
        )
    })?;
    check_tokenizer(catalogue, open)?;
    let weights = resolve_preference(served, &open.preference)?;
    let adapter = match &served.adapter {
        None => None,
        Some(adapter) => {
            let conditioned = adapter.condition(&weights);
            Some(conditioned.map_err(|error| invalid("guidance.preference", error.to_string()))?)
        }
    };

    let vocabulary = backbone.vocabulary.min(open.vocabulary as usize);
    let reader = Reader {
        tokenizer: &backbone.tokenizer,
        template: backbone.template.as_ref(),
        vocabulary: backbone.vocabulary,
    };
    let messages;
    let prompt = match &open.input {
        Input::Prompt(text) => Prompt::Text(text),
        Input::Tokens(ids) => Prompt::Tokens(ids),
        Input::Chat(chat) => {
            messages = chat
                .iter()
                .map(|m| Message { role: m.role.clone(), content: m.content.clone() })
                .collect::<Vec<_>>();
            Prompt::Chat(&messages)
        }
    };
    let mut tokens =
        reader.read(prompt, served.system.as_deref()).map_err(|error| invalid("input", error.to_string()))?;
    let prompt_tokens = tokens.len();
    let steers = served.adapter.is_some() || served.system.is_some();
    // Whatever keeps the backbone from reading the prompt alone keeps only drafts from being better.
    let plain_prompt = if steers { reader.read(prompt, None).unwrap_or_default() } else { Vec::new() };
    if let Some(id) = open.answer.iter().find(|id| **id as usize >= vocabulary) {
        return Err(invalid(
            "open.answer",
            format!("token id {id} is outside the vocabulary of {vocabulary}"),
        ));
    }
    tokens.extend_from_slice(&open.answer);
    if tokens.len() >= backbone.context_tokens {
        let limit = backbone.context_tokens;
        return Err(invalid(
            "input",
            format!("has {} tokens for reward {:?}, whose context is {limit}", tokens.len(), open.reward),
        ));
    }
    let tokens_max = (prompt_tokens + open.answer_tokens_max as usize).min(backbone.context_tokens);
    let plain_fits = plain_prompt.len() + tokens_max - prompt_tokens <= backbone.context_tokens;
    let eos = if open.sampling.ignore_eos { &[] } else { backbone.tokenizer.eos() };
    Ok(Prepared {
        tokens_max: tokens_max.max(tokens.len()),
        tokens,
        prompt_tokens,
        plain_prompt: if plain_fits { plain_prompt } else { Vec::new() },
        adapter,
        root: cache_root(served.adapter_number, &weights),
        priority: open.priority,
        list_length: open.list_length as usize,
        noise: Noise::new(open.seed, open.choice),
        noise_scale: (open.noise_scale > 0.0).then_some(open.noise_scale),
        vocabulary,
        sampling: decode_sampling(&open.sampling),
        strength: open.strength,
        base_strength: open.base_strength,
        tenant: open.tenant,
        ends: eos.iter().chain(&open.sampling.stop_token_ids).copied().collect(),
        pace: open.pace,
        wants_normalizer: open.wants_normalizer,
    })
}

fn decode_sampling(asked: &uniarm_proto::Sampling) -> Sampling {
    Sampling {
        temperature: asked.temperature,
        top_k: asked.top_k,
        top_p: asked.top_p,
        min_p: asked.min_p,
        repetition_penalty: asked.repetition_penalty,
        presence_penalty: asked.presence_penalty,
        frequency_penalty: asked.frequency_penalty,
    }
}

fn check_tokenizer(catalogue: &RewardCatalogue, open: &Open) -> Result<(), Failure> {
    let own = catalogue.tokenizer_fingerprint();
    match &open.tokenizer {
        Some(theirs) if !own.agrees_with(theirs) => Err(invalid(
            "guidance.reward",
            format!(
                "{:?} has another tokenizer than the base model: token ids would not mean the same",
                open.reward
            ),
        )),
        _ => Ok(()),
    }
}

/// Weights in the order of the reward's objectives; empty for a reward without any.
fn resolve_preference(served: &Served, asked: &[(String, f32)]) -> Result<Vec<f32>, Failure> {
    let field = "guidance.preference";
    let objectives: Vec<String> = served.record.objectives.iter().map(|o| o.name.clone()).collect();
    let name = &served.record.name;
    if asked.is_empty() {
        return match objectives.as_slice() {
            [] => Ok(Vec::new()),
            [_] => Ok(vec![1.0]),
            many => Err(invalid(field, format!("reward {name:?} wants weights for {}", many.join(", ")))),
        };
    }
    if objectives.is_empty() {
        return Err(invalid(field, format!("reward {name:?} has no objectives: send no preference")));
    }
    let preference = PreferenceSpec::new(asked.to_vec()).and_then(|spec| spec.resolve(&objectives));
    let preference = preference.map_err(|error| invalid(field, error.to_string()))?;
    Ok(preference.weights().to_vec())
}

/// Cached keys and values depend on the adapter and, from the first token on, on the preference. Two FNV-1a words'
/// worth of mixing is not needed: the scheduler's block hashes are what guards against collisions.
fn cache_root(adapter_number: u64, weights: &[f32]) -> CacheRoot {
    if adapter_number == 0 {
        return CacheRoot(0); // a system text is part of the tokens
    }
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    CacheRoot(
        weights.iter().fold(mix(1, adapter_number), |hash, weight| mix(hash, u64::from(weight.to_bits()))),
    )
}

fn invalid(field: &str, message: String) -> Failure {
    Failure { code: FailureCode::InvalidArgument, field: field.to_owned(), message }
}
