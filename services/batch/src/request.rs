//! A line becomes requests: our short form here, OpenAI's batch lines in `openai`; both may fan out over preferences.

use serde_json::{Map, Value};
use uniarm_proto::{GenerateRequest, pb};

use crate::{
    digest,
    fields::{Fields, LineError},
    openai,
    preferences::{Preference, weights},
    source::Line,
};

/// All fields of a short line.
const SHORT_FIELDS: [&str; 29] = [
    "id",
    "meta",
    "prompt",
    "messages",
    "system",
    "raw",
    "token_ids",
    "model",
    "guidance",
    "preference",
    "reward",
    "strength",
    "base_strength",
    "on_reward_loss",
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "stop",
    "stop_token_ids",
    "logprobs",
    "n",
    "ignore_eos",
    "priority",
];

const TERM_FIELDS: [&str; 4] = ["reward", "preference", "strength", "on_loss"];

const MESSAGE_FIELDS: [&str; 3] = ["role", "content", "name"];

/// What every line of a job has in common.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What a line does not say. Its input is not read.
    pub defaults: GenerateRequest,
    /// Prompts are continued as they are, without a chat template.
    pub is_raw: bool,
    /// Preferences that each line is asked under; empty: under its own.
    pub fan_out: Vec<Preference>,
    /// Lines without a seed draw theirs from this and their id.
    pub seed: u64,
}

/// A request, and what its line of output repeats of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub request: GenerateRequest,
    pub label: Label,
}

/// By what an answer is known.
#[derive(Debug, Clone, PartialEq)]
pub struct Label {
    pub form: Form,
    pub id: String,
    /// Of a line that was fanned out.
    pub preference: Option<Preference>,
    /// As the line has it.
    pub meta: Option<Value>,
    /// Of each token, in OpenAI's shape: how many alternatives are shown.
    pub alternatives: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Short,
    /// OpenAI's batch file; the request goes to `/v1/chat/completions`.
    Chat,
    /// And to `/v1/completions`.
    Completion,
}

// === impl Plan ===

impl Plan {
    /// Requests of each line.
    pub fn width(&self) -> u64 {
        self.fan_out.len().max(1) as u64
    }

    /// The requests of a line, [`Self::width`] of them, each with its label. Of a line that is none, what is wrong, and
    /// labels as far as they can be read.
    pub fn read(&self, line: &Line) -> Result<Vec<Planned>, (LineError, Vec<Label>)> {
        let mut label = Label {
            form: Form::Short,
            id: (line.index + 1).to_string(),
            preference: None,
            meta: None,
            alternatives: 0,
        };
        let request = self.read_request(line, &mut label);
        match request.and_then(|request| self.fan_out(&request, &label)) {
            Ok(planned) => Ok(planned),
            Err(error) => Err((error, self.labels(&label))),
        }
    }

    fn read_request(&self, line: &Line, label: &mut Label) -> Result<pb::GenerateRequest, LineError> {
        let limit = crate::source::LINE_BYTES_MAX;
        let text =
            line.text.as_ref().ok_or_else(|| LineError::whole(format!("is longer than {limit} bytes")))?;
        let object: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|error| LineError::whole(format!("is no JSON object: {error}")))?;
        let mut fields = Fields::new(object);
        if fields.has("custom_id") || fields.has("body") {
            return openai::read_line(fields, self, label);
        }
        label.meta = fields.take("meta")?;
        if let Some(id) = fields.take::<Value>("id")? {
            label.id = text_or_number(id).ok_or_else(|| fields.error("id", "wants a string or a number"))?;
        }
        let mut request = self.template();
        request.input = Some(self.read_input(&mut fields)?);
        read_names(&mut fields, &mut request)?;
        read_guidance(&mut fields, &mut request, self)?;
        let sampling = request.sampling.get_or_insert_default();
        read_sampling(&mut fields, sampling)?;
        fields.finish(&SHORT_FIELDS)?;
        Ok(request)
    }

    /// A request that says what the flags say.
    pub(crate) fn template(&self) -> pb::GenerateRequest {
        let mut request = pb::GenerateRequest::from(self.defaults.clone());
        request.input = None;
        request.sampling.get_or_insert_default().seed = None;
        request
    }

    fn read_input(&self, fields: &mut Fields) -> Result<pb::Input, LineError> {
        let system: Option<String> = fields.take("system")?;
        let is_raw = fields.take("raw")?.unwrap_or(self.is_raw);
        let messages = fields.objects("messages")?;
        let kinds =
            (fields.take::<String>("prompt")?, messages.is_empty(), fields.take::<Vec<u32>>("token_ids")?);
        let kind = match kinds {
            (Some(prompt), true, None) if is_raw && system.is_none() => pb::input::Kind::Prompt(prompt),
            (Some(_), true, None) if is_raw => {
                return Err(fields.error("system", "wants a chat, and the prompt is raw"));
            }
            (Some(prompt), true, None) => chat(system, vec![message("user", prompt)]),
            (None, false, None) => {
                chat(system, messages.into_iter().map(read_message).collect::<Result<_, _>>()?)
            }
            (None, true, Some(ids)) if system.is_none() => pb::input::Kind::Tokens(pb::TokenIds { ids }),
            _ => return Err(LineError::whole("wants one of the fields prompt, messages and token_ids")),
        };
        Ok(pb::Input { kind: Some(kind) })
    }

    /// One request for each preference.
    fn fan_out(&self, request: &pb::GenerateRequest, label: &Label) -> Result<Vec<Planned>, LineError> {
        let mut planned = Vec::with_capacity(self.width() as usize);
        for label in self.labels(label) {
            let mut request = request.clone();
            if let Some(preference) = &label.preference {
                first_term(&mut request).preference = to_wire(preference.clone());
            }
            // The same noise under every preference: what differs between their answers is the preference.
            let seed = || digest::seed(self.seed, &[&label.id]);
            request.sampling.get_or_insert_default().seed.get_or_insert_with(seed);
            let request = request.try_into().map_err(|error| LineError::of_request(&error))?;
            planned.push(Planned { request, label });
        }
        Ok(planned)
    }

    fn labels(&self, label: &Label) -> Vec<Label> {
        let with =
            |preference: Option<&Preference>| Label { preference: preference.cloned(), ..label.clone() };
        match self.fan_out.as_slice() {
            [] => vec![with(None)],
            preferences => preferences.iter().map(|preference| with(Some(preference))).collect(),
        }
    }
}

// === parts of a line ===

pub(crate) fn text_or_number(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

pub(crate) fn message(role: &str, content: String) -> pb::ChatMessage {
    pb::ChatMessage { role: role.into(), content }
}

fn chat(system: Option<String>, messages: Vec<pb::ChatMessage>) -> pb::input::Kind {
    let system = system.map(|text| message("system", text));
    pb::input::Kind::Chat(pb::ChatMessages { messages: system.into_iter().chain(messages).collect() })
}

/// The content is a text, or a list of parts that are texts.
pub(crate) fn read_message(mut fields: Fields) -> Result<pb::ChatMessage, LineError> {
    let role: String = fields.required("role")?;
    let content = match fields.required::<Value>("content")? {
        Value::String(text) => text,
        Value::Array(parts) => {
            let text = |part: &Value| Some(part.get("text")?.as_str()?.to_owned());
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            texts.ok_or_else(|| fields.error("content", "wants a text, or parts of type text"))?.concat()
        }
        _ => return Err(fields.error("content", "wants a text")),
    };
    // OpenAI's clients may send it; no template of a served model knows it.
    fields.take::<Value>("name")?;
    fields.finish(&MESSAGE_FIELDS)?;
    let role = if role == "developer" { "system" } else { &role };
    Ok(message(role, content))
}

fn read_names(fields: &mut Fields, request: &mut pb::GenerateRequest) -> Result<(), LineError> {
    if let Some(model) = fields.take("model")? {
        request.model = model;
    }
    if let Some(name) = fields.take::<String>("priority")? {
        request.priority = match name.as_str() {
            "low" => pb::Priority::Low,
            "normal" => pb::Priority::Normal,
            "high" => pb::Priority::High,
            _ => return Err(fields.error("priority", "wants low, normal or high")),
        } as i32;
    }
    if let Some(name) = fields.take::<String>("on_reward_loss")? {
        request.on_reward_loss = loss_policy(fields, "on_reward_loss", &name)?;
    }
    Ok(())
}

fn loss_policy(fields: &Fields, field: &str, name: &str) -> Result<i32, LineError> {
    let policy = match name {
        "wait" => pb::OnRewardLoss::Wait,
        "fail" => pb::OnRewardLoss::Fail,
        "unguided" => pb::OnRewardLoss::Unguided,
        _ => return Err(fields.error(field, "wants wait, fail or unguided")),
    };
    Ok(policy as i32)
}

/// The first term, or one that guides with strength 1.
fn first_term(request: &mut pb::GenerateRequest) -> &mut pb::GuidanceTerm {
    if request.guidance.is_empty() {
        request.guidance.push(pb::GuidanceTerm::default());
    }
    &mut request.guidance[0]
}

/// Whole terms in `guidance`, or fields of the first one in the line itself.
pub(crate) fn read_guidance(
    fields: &mut Fields,
    request: &mut pb::GenerateRequest,
    plan: &Plan,
) -> Result<(), LineError> {
    if let Some(strength) = fields.take("base_strength")? {
        request.base_strength = Some(strength);
    }
    let has_own = ["reward", "strength", "preference"].iter().any(|name| fields.has(name));
    let terms = fields.objects("guidance")?;
    if has_own && !terms.is_empty() {
        return Err(
            fields.error("guidance", "stands beside reward, strength or preference; write one or the other")
        );
    }
    if has_own {
        read_term(fields, first_term(request), plan)?;
    }
    if !terms.is_empty() {
        request.guidance.clear();
    }
    for mut own in terms {
        let mut term = pb::GuidanceTerm::default();
        read_term(&mut own, &mut term, plan)?;
        request.guidance.push(term);
        if let Some(name) = own.take::<String>("on_loss")? {
            request.on_reward_loss = loss_policy(&own, "on_loss", &name)?;
        }
        own.finish(&TERM_FIELDS)?;
    }
    Ok(())
}

fn read_term(fields: &mut Fields, term: &mut pb::GuidanceTerm, plan: &Plan) -> Result<(), LineError> {
    if let Some(reward) = fields.take("reward")? {
        term.reward = reward;
    }
    if let Some(strength) = fields.take("strength")? {
        term.strength = Some(strength);
    }
    if let Some(object) = fields.take::<Map<String, Value>>("preference")? {
        if !plan.fan_out.is_empty() {
            let reason =
                "stands in the line, and --preferences gives every line its own; leave one of them out";
            return Err(fields.error("preference", reason));
        }
        term.preference = to_wire(weights(&object).map_err(|reason| fields.error("preference", reason))?);
    }
    Ok(())
}

fn to_wire(preference: Preference) -> Vec<pb::ObjectiveWeight> {
    preference.into_iter().map(|(objective, weight)| pb::ObjectiveWeight { objective, weight }).collect()
}

/// The fields that both forms have, by the same names.
pub(crate) fn read_sampling(fields: &mut Fields, sampling: &mut pb::Sampling) -> Result<(), LineError> {
    macro_rules! read {
        ($($name:ident),*) => {
            $(if let Some(value) = fields.take(stringify!($name))? {
                sampling.$name = value;
            })*
        };
    }
    macro_rules! read_optional {
        ($($name:ident),*) => {
            $(if let Some(value) = fields.take(stringify!($name))? {
                sampling.$name = Some(value);
            })*
        };
    }
    read!(top_k, min_p, presence_penalty, frequency_penalty, stop_token_ids, ignore_eos);
    read_optional!(temperature, top_p, repetition_penalty, seed, max_tokens, logprobs, n);
    if let Some(stop) = fields.take::<Value>("stop")? {
        sampling.stop = match stop {
            Value::String(text) => vec![text],
            list => serde_json::from_value(list)
                .map_err(|_| fields.error("stop", "wants a text or a list of texts"))?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests;
