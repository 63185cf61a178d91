//! What simulated clients ask for, and what they must be answered: by an undisturbed cluster, and by the definition.

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use uniarm_decode::{History, Noise, Position, Sampling as DecodeSampling, Term, TermLogits, choose_dense};
use uniarm_model::{Forward as _, Row};
use uniarm_proto::{
    ChoiceTranscript, GenerateRequest, GuidanceTerm, Input, OnRewardLoss, Priority, Sampling, Transcript,
};

use crate::model::{Part, VOCABULARY, scripted};

/// The reward model that is its backbone as it is, and one under a system text.
pub const PLAIN: &str = "plain";
pub const PROMPTED: &str = "prompted";
pub const SYSTEM: &str = "t7 t8 t9";

/// Requests that schedules draw from: each is answered once without disturbance.
pub const POOL: usize = 36;

/// What a client does with a request.
#[derive(Clone, Debug)]
pub struct Client {
    /// Index in the pool.
    pub asked: usize,
    pub begins: Duration,
    pub timeout: Option<Duration>,
    /// Rests so long after each event.
    pub rests: Duration,
    /// Hangs up after so many events.
    pub hangs_up_after: Option<usize>,
}

/// Every sampler setting, several terms at several strengths, every policy, several answers.
pub fn pool() -> Vec<GenerateRequest> {
    let mut random = StdRng::seed_from_u64(0x5eed);
    (0..POOL).map(|index| request(index, &mut random)).collect()
}

fn request(index: usize, random: &mut StdRng) -> GenerateRequest {
    let prompt = (0..random.random_range(1..24)).map(|_| random.random_range(1..VOCABULARY as u32));
    let term =
        |reward: &str, strength| GuidanceTerm { reward: reward.into(), preference: Vec::new(), strength };
    let on_reward_loss = match index % 9 {
        4 => OnRewardLoss::Fail,
        7 | 8 => OnRewardLoss::Unguided,
        _ => OnRewardLoss::Wait,
    };
    // What follows an unguided token is checked by the definition, which is written for one plain term.
    let is_simple = on_reward_loss == OnRewardLoss::Unguided;
    let guidance = match index % 6 {
        _ if is_simple => vec![term(PLAIN, 1.0)],
        0 => vec![],
        1 | 2 => vec![term(PLAIN, 1.0)],
        3 => vec![term(PROMPTED, 0.8)],
        4 => vec![term(PROMPTED, 0.3), term(PLAIN, 0.9)],
        _ => vec![term(PLAIN, 0.7), term(PROMPTED, 0.5), term(PLAIN, -0.2)],
    };
    let unless_simple = |applies: bool| applies && !is_simple;
    GenerateRequest {
        request_id: format!("request-{index}"),
        model: String::new(),
        input: Input::Tokens(prompt.collect()),
        sampling: Sampling {
            temperature: [0.0, 0.7, 1.0][index % 3],
            top_k: if unless_simple(index % 5 == 1) { 20 } else { 0 },
            top_p: if unless_simple(index % 4 == 1) { 0.9 } else { 1.0 },
            repetition_penalty: if unless_simple(index % 5 == 2) { 1.3 } else { 1.0 },
            frequency_penalty: if unless_simple(index % 5 == 4) { 0.4 } else { 0.0 },
            seed: Some(random.random()),
            max_tokens: random.random_range(1..32),
            stop: if index % 8 == 5 { vec!["t77".into()] } else { Vec::new() },
            stop_token_ids: if index % 8 == 6 { vec![3, 5, 8] } else { Vec::new() },
            logprobs: if unless_simple(index % 9 == 3) { Some(2) } else { None },
            n: if index % 10 == 3 { 2 } else { 1 },
            ignore_eos: index.is_multiple_of(2),
            ..Sampling::default()
        },
        base_strength: 1.0,
        guidance,
        on_reward_loss,
        priority: [Priority::Normal, Priority::High, Priority::Low][index % 3],
        exchange: None,
        skip: 0,
        audit: false,
    }
}

/// What a client must never see in an answer; `undisturbed`: the same request's answer when nothing happened.
pub fn check_answer(
    request: &GenerateRequest,
    number: usize,
    got: &ChoiceTranscript,
    undisturbed: &Transcript,
) -> Result<(), String> {
    let expected = &undisturbed.choices[number];
    if let Some(first) = got.unguided.first() {
        if request.on_reward_loss != OnRewardLoss::Unguided {
            return Err(format!("answer {number} has an unguided token at {first}, which it did not allow"));
        }
        return check_definition(request, number, got);
    }
    if !expected.tokens.starts_with(&got.tokens) || !expected.text.starts_with(&got.text) {
        return Err(format!("answer {number} is {:?}, undisturbed {:?}", got.tokens, expected.tokens));
    }
    if got.details != expected.details[..got.details.len()] {
        return Err(format!("answer {number} has other details than undisturbed"));
    }
    if got.finished.is_some() && (got.finished != expected.finished || got.tokens != expected.tokens) {
        return Err(format!("answer {number} ended with {:?} after {:?}", got.finished, got.tokens));
    }
    Ok(())
}

/// Each token is what the definition says: of both models, or of the base model alone where it is marked.
fn check_definition(request: &GenerateRequest, number: usize, got: &ChoiceTranscript) -> Result<(), String> {
    let Input::Tokens(prompt) = &request.input else { return Err("a prompt of tokens was expected".into()) };
    let asked = &request.sampling;
    let sampling = DecodeSampling { temperature: asked.temperature, ..DecodeSampling::default() };
    let noise = Noise::new(asked.seed.unwrap_or(0), number as u32);
    let mut history = History::new(prompt);
    for (position, token) in got.tokens.iter().enumerate() {
        let read = [prompt.as_slice(), &got.tokens[..position]].concat();
        let (base, reward) = (logits(Part::Base, &read), logits(Part::Reward, &read));
        let terms = [Term { strength: request.guidance[0].strength, logits: TermLogits::Dense(&reward) }];
        let is_marked = got.unguided.contains(&(position as u32));
        let chosen = choose_dense(&Position {
            base: &base,
            terms: if is_marked { &[] } else { &terms },
            sampling: &sampling,
            history: &history,
            noise: &noise,
            position: position as u32,
        });
        if chosen != *token {
            return Err(format!(
                "answer {number} has {token} at {position}, {chosen} is the token (marked: {is_marked})"
            ));
        }
        history.push(*token);
    }
    Ok(())
}

/// The last row of a model that reads these tokens.
fn logits(part: Part, tokens: &[u32]) -> Vec<f32> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(8) as u32).collect();
    let mut logits = Vec::new();
    let row = Row { tokens, start: 0, blocks: &blocks, logits_from: tokens.len() - 1, adapter: None };
    scripted(part, blocks.len()).forward(&[row], &mut logits).unwrap();
    logits
}
