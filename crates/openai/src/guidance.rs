//! What steers: the one field that OpenAI's API does not have.

use serde_json::{Map, Value, json};
use uniarm_proto::{Refusal, pb};

use crate::{
    fields::{Fields, wrong},
    logprobs::decimal,
};

const FIELD: &str = "guidance";

/// Words for what to do with a token whose reward cannot be had.
pub const LOSS_POLICIES: [(&str, pb::OnRewardLoss); 3] = [
    ("wait", pb::OnRewardLoss::Wait),
    ("fail", pb::OnRewardLoss::Fail),
    ("unguided", pb::OnRewardLoss::Unguided),
];

pub const PRIORITIES: [(&str, pb::Priority); 3] =
    [("low", pb::Priority::Low), ("normal", pb::Priority::Normal), ("high", pb::Priority::High)];

pub(crate) const EXCHANGES: [(&str, pb::Exchange); 2] =
    [("certified", pb::Exchange::Certified), ("dense", pb::Exchange::Dense)];

/// Terms of a body replace those of the request; so does what is to be done when one is lost.
///
/// # Errors
/// When `guidance` is neither an object nor a list of them, or two terms disagree about their loss.
pub fn read_guidance(fields: &mut Fields, request: &mut pb::GenerateRequest) -> Result<(), Refusal> {
    let at = fields.path(FIELD);
    let values: Vec<(String, Value)> = match fields.value(FIELD) {
        None => return Ok(()),
        Some(Value::Array(terms)) => {
            terms.into_iter().enumerate().map(|(index, term)| (format!("{at}[{index}]"), term)).collect()
        }
        Some(term @ Value::Object(_)) => vec![(at, term)],
        Some(other) => return Err(wrong(&at, "an object or a list of objects", &other)),
    };
    if !values.is_empty() {
        request.guidance.clear();
    }
    let mut policy = None;
    for (at, value) in values {
        let mut fields = Fields::of(&at, value)?;
        let mut term = pb::GuidanceTerm::default();
        read_term(&mut fields, &mut term)?;
        let on_loss = fields.word("on_loss", &LOSS_POLICIES)?;
        fields.finish()?;
        if let (Some(on_loss), Some(known)) = (on_loss, policy)
            && on_loss != known
        {
            let reason =
                "differs from that of a term before it: a token has either all of its rewards or none";
            return Err(Refusal::invalid(format!("{at}.on_loss"), reason));
        }
        policy = policy.or(on_loss);
        request.guidance.push(term);
    }
    if let Some(policy) = policy {
        request.on_reward_loss = policy as i32;
    }
    Ok(())
}

/// The fields of one term, wherever they stand.
///
/// # Errors
/// When one is of another kind.
pub fn read_term(fields: &mut Fields, term: &mut pb::GuidanceTerm) -> Result<(), Refusal> {
    if let Some(reward) = fields.text("reward")? {
        term.reward = reward;
    }
    if let Some(value) = fields.value("preference") {
        term.preference = preference(&fields.path("preference"), value)?;
    }
    term.strength = fields.number("strength")?.or(term.strength);
    Ok(())
}

/// Objectives by name: a JSON object has no order, so that another one must not mean another sum.
///
/// # Errors
/// When it is no object of numbers.
pub fn preference(at: &str, value: Value) -> Result<Vec<pb::ObjectiveWeight>, Refusal> {
    let Value::Object(weights) = value else {
        return Err(wrong(at, "an object such as {\"harmless\": 0.7, \"helpful\": 0.3}", &value));
    };
    let mut preference = Vec::with_capacity(weights.len());
    for (objective, weight) in weights {
        let Some(number) = weight.as_f64() else {
            return Err(wrong(&format!("{at}.{objective}"), "a number", &weight));
        };
        preference.push(pb::ObjectiveWeight { objective, weight: number as f32 });
    }
    preference.sort_by(|a, b| a.objective.cmp(&b.objective));
    Ok(preference)
}

/// A term as a request would have it.
pub(crate) fn as_json(term: &pb::GuidanceTerm) -> Value {
    let weights = term.preference.iter().map(|weight| (weight.objective.clone(), decimal(weight.weight)));
    json!({
        "reward": term.reward,
        "preference": weights.collect::<Map<_, _>>(),
        "strength": decimal(term.strength.unwrap_or(1.0)),
    })
}
