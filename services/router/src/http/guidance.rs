//! What steers: the one field that OpenAI's API does not have.

use serde_json::{Map, Value, json};
use uniarm_proto::{Refusal, pb};

use super::{
    fields::{Fields, wrong},
    logprobs::decimal,
};

const FIELD: &str = "guidance";

/// Words for what to do with a token whose reward cannot be had.
const LOSS_POLICIES: [(&str, pb::OnRewardLoss); 3] = [
    ("wait", pb::OnRewardLoss::Wait),
    ("fail", pb::OnRewardLoss::Fail),
    ("unguided", pb::OnRewardLoss::Unguided),
];

pub(super) const PRIORITIES: [(&str, pb::Priority); 3] =
    [("low", pb::Priority::Low), ("normal", pb::Priority::Normal), ("high", pb::Priority::High)];

pub(super) const EXCHANGES: [(&str, pb::Exchange); 2] =
    [("certified", pb::Exchange::Certified), ("dense", pb::Exchange::Dense)];

/// The terms of a body, and what is to be done when one is lost.
///
/// # Errors
/// When `guidance` is neither an object nor a list of them, or two terms disagree about their loss.
pub(super) fn read(fields: &mut Fields) -> Result<(Vec<pb::GuidanceTerm>, pb::OnRewardLoss), Refusal> {
    let values: Vec<(String, Value)> = match fields.value(FIELD) {
        None => Vec::new(),
        Some(Value::Array(terms)) => {
            terms.into_iter().enumerate().map(|(index, term)| (format!("{FIELD}[{index}]"), term)).collect()
        }
        Some(term @ Value::Object(_)) => vec![(FIELD.to_owned(), term)],
        Some(other) => return Err(wrong(FIELD, "an object or a list of objects", &other)),
    };
    let (mut terms, mut policy) = (Vec::with_capacity(values.len()), None);
    for (at, value) in values {
        let (term, on_loss) = term(&at, value)?;
        if let (Some(on_loss), Some(known)) = (on_loss, policy)
            && on_loss != known
        {
            let reason =
                "differs from that of a term before it: a token has either all of its rewards or none";
            return Err(Refusal::invalid(format!("{at}.on_loss"), reason));
        }
        policy = policy.or(on_loss);
        terms.push(term);
    }
    Ok((terms, policy.unwrap_or_default()))
}

fn term(at: &str, value: Value) -> Result<(pb::GuidanceTerm, Option<pb::OnRewardLoss>), Refusal> {
    let mut fields = Fields::of(at, value)?;
    let preference = match fields.value("preference") {
        None => Vec::new(),
        Some(value) => preference(&fields.path("preference"), value)?,
    };
    let term = pb::GuidanceTerm {
        reward: fields.text("reward")?.unwrap_or_default(),
        preference,
        strength: fields.number("strength")?,
    };
    let on_loss = fields.word("on_loss", &LOSS_POLICIES)?;
    fields.finish()?;
    Ok((term, on_loss))
}

/// Objectives by name: a JSON object has no order, so that another one must not mean another sum.
fn preference(at: &str, value: Value) -> Result<Vec<pb::ObjectiveWeight>, Refusal> {
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
pub(super) fn as_json(term: &pb::GuidanceTerm) -> Value {
    let weights = term.preference.iter().map(|weight| (weight.objective.clone(), decimal(weight.weight)));
    json!({
        "reward": term.reward,
        "preference": weights.collect::<Map<_, _>>(),
        "strength": decimal(term.strength.unwrap_or(1.0)),
    })
}
