//! A line becomes requests: our short form here, OpenAI's batch lines in `openai`; both may fan out over preferences.

use serde_json::{Map, Value};
use uniarm_openai::{
    Call, Fields, LOSS_POLICIES, PRIORITIES, messages, read_guidance, read_sampling, read_term,
};
use uniarm_proto::{GenerateRequest, Refusal, Refused, pb};

use crate::{digest, openai, preferences::Preference, source::Line};

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
    /// Nothing but OpenAI's lines for this call are requests; `None`: all are.
    pub only: Option<Call>,
}

/// A request, and what its line of output repeats of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub request: GenerateRequest,
    pub label: Label,
}

/// Why a line is no request, and the labels of its lines of output as far as they could be read.
#[derive(Debug)]
pub struct Unread {
    pub refused: Refused,
    pub labels: Vec<Label>,
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
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    Short,
    /// OpenAI's batch file; `None`: of a line that is no request.
    OpenAi(Option<uniarm_openai::Form>),
}

// === impl Plan ===

impl Plan {
    /// Requests of each line.
    pub fn width(&self) -> u64 {
        self.fan_out.len().max(1) as u64
    }

    /// The requests of a line, [`Self::width`] of them, each with its label.
    ///
    /// # Errors
    /// When the line is none.
    pub fn read(&self, line: &Line) -> Result<Vec<Planned>, Box<Unread>> {
        let id = (line.index + 1).to_string();
        let mut label = Label { form: Form::Short, id, preference: None, meta: None };
        let request = self.read_request(line, &mut label).map_err(Refused::from);
        request.and_then(|request| self.fan_out(&request, &label)).map_err(|refused| {
            if let Form::OpenAi(form) = &mut label.form {
                // Its error has the names of its fields already.
                *form = None;
            }
            Box::new(Unread { refused, labels: self.labels(&label) })
        })
    }

    fn read_request(&self, line: &Line, label: &mut Label) -> Result<pb::GenerateRequest, Refusal> {
        let limit = crate::source::LINE_BYTES_MAX;
        let too_long = || Refusal::unreadable(format!("is longer than {limit} bytes"));
        let object: Map<String, Value> = serde_json::from_slice(line.text.as_ref().ok_or_else(too_long)?)
            .map_err(|error| Refusal::unreadable(format!("is no JSON object: {error}")))?;
        let mut fields = Fields::of("", Value::Object(object))?;
        if fields.has("custom_id") || fields.has("body") {
            return openai::read_line(fields, self, label);
        }
        if self.only.is_some() {
            return Err(Refusal::unreadable("wants the fields custom_id, method, url and body"));
        }
        let request = self.read_short(&mut fields, label)?;
        fields.finish_strictly()?;
        Ok(request)
    }

    fn read_short(&self, fields: &mut Fields, label: &mut Label) -> Result<pb::GenerateRequest, Refusal> {
        label.meta = fields.value("meta");
        if let Some(id) = fields.value("id") {
            label.id = text_or_number(id).ok_or_else(|| fields.error("id", "wants a string or a number"))?;
        }
        let mut request = self.template();
        self.check_preference(fields)?;
        request.input = Some(self.read_input(fields)?);
        if let Some(model) = fields.text("model")? {
            request.model = model;
        }
        if let Some(priority) = fields.word("priority", &PRIORITIES)? {
            request.priority = priority as i32;
        }
        if let Some(policy) = fields.word("on_reward_loss", &LOSS_POLICIES)? {
            request.on_reward_loss = policy as i32;
        }
        request.base_strength = fields.number("base_strength")?.or(request.base_strength);
        let has_term = ["reward", "strength", "preference"].iter().any(|name| fields.has(name));
        if has_term && fields.has("guidance") {
            let reason = "stands beside reward, strength or preference; write one or the other";
            return Err(fields.error("guidance", reason));
        }
        if has_term {
            read_term(fields, first_term(&mut request))?;
        }
        read_guidance(fields, &mut request)?;
        let sampling = request.sampling.get_or_insert_default();
        read_sampling(fields, sampling)?;
        sampling.logprobs = fields.count("logprobs")?.or(sampling.logprobs);
        Ok(request)
    }

    /// A line that every preference is asked under has none of its own.
    pub(crate) fn check_preference(&self, fields: &Fields) -> Result<(), Refusal> {
        let has_one = |term: &Value| term.get("preference").is_some_and(|preference| !preference.is_null());
        let in_guidance = match fields.peek("guidance") {
            None => false,
            Some(Value::Array(terms)) => terms.iter().any(has_one),
            Some(term) => has_one(term),
        };
        if self.fan_out.is_empty() || !(in_guidance || fields.has("preference")) {
            return Ok(());
        }
        let reason = "stands in the line, and --preferences gives every line its own; leave one of them out";
        Err(fields.error("preference", reason))
    }

    /// A request that says what the flags say.
    pub(crate) fn template(&self) -> pb::GenerateRequest {
        let mut request = pb::GenerateRequest::from(self.defaults.clone());
        request.input = None;
        request.sampling.get_or_insert_default().seed = None;
        request
    }

    fn read_input(&self, fields: &mut Fields) -> Result<pb::Input, Refusal> {
        let system = fields.text("system")?;
        let is_raw = fields.flag("raw")?.unwrap_or(self.is_raw);
        let kinds = (fields.text("prompt")?, fields.value("messages"), fields.ids("token_ids")?);
        let kind = match kinds {
            (Some(prompt), None, None) if is_raw && system.is_none() => pb::input::Kind::Prompt(prompt),
            (Some(_), None, None) if is_raw => {
                return Err(fields.error("system", "wants a chat, and the prompt is raw"));
            }
            (Some(prompt), None, None) => chat(system, vec![message("user", prompt)]),
            (None, Some(list), None) => match messages("messages", list)? {
                pb::input::Kind::Chat(messages) => chat(system, messages.messages),
                other => other,
            },
            (None, None, Some(ids)) if system.is_none() => pb::input::Kind::Tokens(pb::TokenIds { ids }),
            _ => {
                let reason = "wants one of the fields prompt, messages and token_ids";
                return Err(Refusal::unreadable(reason));
            }
        };
        Ok(pb::Input { kind: Some(kind) })
    }

    /// One request for each preference.
    fn fan_out(&self, request: &pb::GenerateRequest, label: &Label) -> Result<Vec<Planned>, Refused> {
        let mut planned = Vec::with_capacity(self.width() as usize);
        for label in self.labels(label) {
            let mut request = request.clone();
            if let Some(preference) = &label.preference {
                first_term(&mut request).preference = to_wire(preference.clone());
            }
            // The same noise under every preference: what differs between their answers is the preference.
            let seed = || digest::seed(self.seed, &[&label.id]);
            request.sampling.get_or_insert_default().seed.get_or_insert_with(seed);
            let request = request.try_into().map_err(|error| label.in_line(Refusal::from(error).into()))?;
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

// === impl Label ===

impl Label {
    /// What is wrong with a field of the contract, by the name that the field had in the line.
    fn in_line(&self, refused: Refused) -> Refused {
        if let Form::OpenAi(Some(form)) = &self.form {
            return form.names.in_body(refused);
        }
        // A short line is flat.
        let flat = |text: String| text.strip_prefix("sampling.").map_or(text.clone(), str::to_owned);
        Refused { field: refused.field.map(flat), message: flat(refused.message), ..refused }
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

fn message(role: &str, content: String) -> pb::ChatMessage {
    pb::ChatMessage { role: role.into(), content }
}

fn chat(system: Option<String>, messages: Vec<pb::ChatMessage>) -> pb::input::Kind {
    let system = system.map(|text| message("system", text));
    pb::input::Kind::Chat(pb::ChatMessages { messages: system.into_iter().chain(messages).collect() })
}

/// The first term, or one that guides with strength 1.
fn first_term(request: &mut pb::GenerateRequest) -> &mut pb::GuidanceTerm {
    if request.guidance.is_empty() {
        request.guidance.push(pb::GuidanceTerm::default());
    }
    &mut request.guidance[0]
}

fn to_wire(preference: Preference) -> Vec<pb::ObjectiveWeight> {
    preference.into_iter().map(|(objective, weight)| pb::ObjectiveWeight { objective, weight }).collect()
}

#[cfg(test)]
mod tests;
