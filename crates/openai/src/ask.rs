//! A body in OpenAI's terms becomes the request that gRPC would have brought. What it may hold is checked where every
//! request is checked; here only its shape is.

use std::time::Duration;

use serde_json::Value;
use uniarm_proto::{Refusal, Refused, limits::LOGPROBS_MAX, pb};

use crate::{
    fields::{Fields, ids_of, wrong},
    guidance,
};

/// Which of OpenAI's two calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Chat,
    Completion,
}

/// A body, read.
#[derive(Debug)]
pub struct Ask {
    /// Without a seed, where neither the body nor the template has one: whoever asks draws it.
    pub request: pb::GenerateRequest,
    pub timeout: Option<Duration>,
    pub form: Form,
}

/// In which form the answer is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    pub call: Call,
    pub is_streamed: bool,
    /// A last chunk of a stream says what it cost.
    pub has_usage: bool,
    /// Alternatives to show for each token; `None`: no log-probabilities.
    pub alternatives: Option<u32>,
    pub names: Names,
}

/// How this body named what gRPC names otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Where the body stands, with a dot behind it; empty where it is all there is.
    at: String,
    input: &'static str,
    length: &'static str,
    logprobs: &'static str,
    guidance_is_list: bool,
}

// === impl Call ===

impl Call {
    pub const ALL: [Self; 2] = [Self::Chat, Self::Completion];

    /// Where it is served.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completion => "/v1/completions",
        }
    }

    /// # Errors
    /// When no call has this path, in the words of a field that holds it.
    pub fn at(path: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|call| call.path() == path);
        let paths = || Self::ALL.map(Self::path).join(" or ");
        found.ok_or_else(|| format!("is {path:?}, wants {}", paths()))
    }
}

// === impl Ask ===

impl Ask {
    /// The body's request: what it does not say, `template` says.
    ///
    /// # Errors
    /// When the body is not of the form that the call wants; the field is named as the body names it.
    pub fn read(call: Call, mut fields: Fields, template: pb::GenerateRequest) -> Result<Self, Refusal> {
        let names = Names::of(call, &fields);
        let mut request = template;
        let alternatives = alternatives(call, &mut fields)?;
        let is_streamed = fields.flag("stream")?.unwrap_or(false);
        let has_usage = stream_options(&mut fields, is_streamed)?;
        guidance::read_guidance(&mut fields, &mut request)?;
        if let Some(model) = fields.text("model")? {
            request.model = model;
        }
        request.input = Some(pb::Input { kind: Some(input(call, &mut fields)?) });
        let sampling = request.sampling.get_or_insert_default();
        let length = fields.peek("max_tokens").and_then(Value::as_u64);
        read_sampling(&mut fields, sampling)?;
        max_completion_tokens(&mut fields, length, sampling)?;
        best_of(&mut fields, sampling)?;
        // One more than is shown: the chosen token takes the last place where it is not among them. And one at least,
        // or its own log-probability would not come.
        sampling.logprobs = alternatives.map(|shown| match shown {
            0..LOGPROBS_MAX => shown + 1,
            other => other,
        });
        if let Some(priority) = fields.word("priority", &guidance::PRIORITIES)? {
            request.priority = priority as i32;
        }
        if let Some(exchange) = fields.word("exchange", &guidance::EXCHANGES)? {
            request.exchange = exchange as i32;
        }
        request.base_strength = fields.number("base_strength")?.or(request.base_strength);
        request.audit = fields.flag("audit")?.unwrap_or(request.audit);
        let timeout = fields.count("timeout_ms")?.map(|timeout| Duration::from_millis(timeout.into()));
        fields.finish_body()?;
        Ok(Self { request, timeout, form: Form { call, is_streamed, has_usage, alternatives, names } })
    }
}

// === impl Names ===

impl Names {
    fn of(call: Call, fields: &Fields) -> Self {
        Self {
            at: if fields.at().is_empty() { String::new() } else { format!("{}.", fields.at()) },
            input: match call {
                Call::Chat => "messages",
                Call::Completion => "prompt",
            },
            length: if fields.has("max_completion_tokens") { "max_completion_tokens" } else { "max_tokens" },
            logprobs: match call {
                Call::Chat => "top_logprobs",
                Call::Completion => "logprobs",
            },
            guidance_is_list: fields.peek("guidance").is_some_and(Value::is_array),
        }
    }

    /// What is wrong with a field of the contract, by the name that the field had in the body.
    #[must_use]
    pub fn in_body(&self, refused: Refused) -> Refused {
        let Some(field) = &refused.field else { return refused };
        let name = self.of_field(field);
        let message = match refused.message.strip_prefix(field.as_str()) {
            Some(rest) => format!("{name}{rest}"),
            None => refused.message.clone(),
        };
        Refused { field: Some(name), message, ..refused }
    }

    fn of_field(&self, field: &str) -> String {
        if field == "request_id" {
            return "x-request-id".to_owned();
        }
        let at = &self.at;
        if let Some(rest) = field.strip_prefix("input.chat.messages") {
            return format!("{at}messages{rest}");
        }
        if let Some(rest) = field.strip_prefix("guidance[0]").filter(|_| !self.guidance_is_list) {
            return format!("{at}guidance{rest}");
        }
        let name = match field {
            "input" | "input.prompt" | "input.tokens" => self.input,
            "sampling.max_tokens" => self.length,
            "sampling.logprobs" => self.logprobs,
            "on_reward_loss" => "guidance.on_loss",
            other => other.strip_prefix("sampling.").unwrap_or(other),
        };
        format!("{at}{name}")
    }
}

// === parts of a body ===

fn input(call: Call, fields: &mut Fields) -> Result<pb::input::Kind, Refusal> {
    match call {
        Call::Chat => fields.required("messages").and_then(|value| messages(&fields.path("messages"), value)),
        Call::Completion => fields.required("prompt").and_then(|value| prompt(&fields.path("prompt"), value)),
    }
}

/// A chat.
///
/// # Errors
/// When it is no list of messages that are texts.
pub fn messages(at: &str, value: Value) -> Result<pb::input::Kind, Refusal> {
    let Value::Array(messages) = value else { return Err(wrong(at, "a list of messages", &value)) };
    let messages = messages.into_iter().enumerate();
    let messages = messages.map(|(index, value)| message(&format!("{at}[{index}]"), value));
    Ok(pb::input::Kind::Chat(pb::ChatMessages { messages: messages.collect::<Result<_, _>>()? }))
}

fn message(at: &str, value: Value) -> Result<pb::ChatMessage, Refusal> {
    let mut fields = Fields::of(at, value)?;
    let role = match fields.text("role")?.as_deref() {
        None => return Err(fields.error("role", "is missing")),
        // OpenAI's newer word; no template knows it.
        Some("developer") => "system".to_owned(),
        Some(role @ ("system" | "user" | "assistant")) => role.to_owned(),
        Some(other) => {
            let reason = format!("is {other:?}, wants system, developer, user or assistant");
            return Err(fields.error("role", reason));
        }
    };
    let content = match fields.required("content")? {
        Value::String(text) => text,
        Value::Array(parts) => {
            let parts = parts.into_iter().enumerate();
            let parts = parts.map(|(index, part)| text_part(&format!("{at}.content[{index}]"), part));
            parts.collect::<Result<Vec<_>, _>>()?.concat()
        }
        other => return Err(wrong(&fields.path("content"), "a string or a list of text parts", &other)),
    };
    fields.finish()?;
    Ok(pb::ChatMessage { role, content })
}

fn text_part(at: &str, value: Value) -> Result<String, Refusal> {
    let mut fields = Fields::of(at, value)?;
    fields.word("type", &[("text", ())])?;
    let text = fields.text("text")?.ok_or_else(|| fields.error("text", "is missing"))?;
    fields.finish()?;
    Ok(text)
}

/// A string or token ids, alone or as the only one of a list.
fn prompt(at: &str, prompt: Value) -> Result<pb::input::Kind, Refusal> {
    if let Some(ids) = ids_of(&prompt) {
        return Ok(pb::input::Kind::Tokens(pb::TokenIds { ids }));
    }
    match prompt {
        Value::String(text) => Ok(pb::input::Kind::Prompt(text)),
        Value::Array(mut prompts) if prompts.len() == 1 && !prompts[0].is_number() => {
            self::prompt(at, prompts.remove(0))
        }
        Value::Array(prompts) if prompts.iter().all(Value::is_string) => Err(Refusal::invalid(
            at,
            format!("has {} prompts, wants one: send each in a request of its own", prompts.len()),
        )),
        other => Err(wrong(at, "a string or a list of token ids", &other)),
    }
}

/// What is said of sampling replaces what `sampling` says; every form of a request has these fields by these names.
///
/// # Errors
/// When one is of another kind.
pub fn read_sampling(fields: &mut Fields, sampling: &mut pb::Sampling) -> Result<(), Refusal> {
    sampling.temperature = fields.number("temperature")?.or(sampling.temperature);
    sampling.top_k = fields.count("top_k")?.unwrap_or(sampling.top_k);
    sampling.top_p = fields.number("top_p")?.or(sampling.top_p);
    sampling.min_p = fields.number("min_p")?.unwrap_or(sampling.min_p);
    sampling.repetition_penalty = fields.number("repetition_penalty")?.or(sampling.repetition_penalty);
    sampling.presence_penalty = fields.number("presence_penalty")?.unwrap_or(sampling.presence_penalty);
    sampling.frequency_penalty = fields.number("frequency_penalty")?.unwrap_or(sampling.frequency_penalty);
    sampling.seed = fields.wide_count("seed")?.or(sampling.seed);
    sampling.max_tokens = fields.count("max_tokens")?.or(sampling.max_tokens);
    if let Some(stop) = stop(fields)? {
        sampling.stop = stop;
    }
    if let Some(ids) = fields.ids("stop_token_ids")? {
        sampling.stop_token_ids = ids;
    }
    sampling.n = fields.count("n")?.or(sampling.n);
    sampling.ignore_eos = fields.flag("ignore_eos")?.unwrap_or(sampling.ignore_eos);
    Ok(())
}

/// OpenAI's newer name of a field that `sampling` may have from the body already.
fn max_completion_tokens(
    fields: &mut Fields,
    old: Option<u64>,
    sampling: &mut pb::Sampling,
) -> Result<(), Refusal> {
    let new = fields.count("max_completion_tokens")?;
    if let (Some(old), Some(new)) = (old, new)
        && old != u64::from(new)
    {
        let reason = format!("is {old}, and max_completion_tokens is {new}: send one of them");
        return Err(fields.error("max_tokens", reason));
    }
    sampling.max_tokens = new.or(sampling.max_tokens);
    Ok(())
}

fn best_of(fields: &mut Fields, sampling: &pb::Sampling) -> Result<(), Refusal> {
    match fields.count("best_of")?.filter(|best_of| *best_of != sampling.n.unwrap_or(1)) {
        None => Ok(()),
        Some(best_of) => {
            let reason = format!("is {best_of}, wants n: no answers are made to be thrown away");
            Err(fields.error("best_of", reason))
        }
    }
}

fn stop(fields: &mut Fields) -> Result<Option<Vec<String>>, Refusal> {
    let at = fields.path("stop");
    match fields.value("stop") {
        None => Ok(None),
        Some(Value::String(stop)) => Ok(Some(vec![stop])),
        Some(Value::Array(stops)) => {
            let text = |(index, stop): (usize, Value)| match stop {
                Value::String(stop) => Ok(stop),
                other => Err(wrong(&format!("{at}[{index}]"), "a string", &other)),
            };
            stops.into_iter().enumerate().map(text).collect::<Result<_, _>>().map(Some)
        }
        Some(other) => Err(wrong(&at, "a string or a list of strings", &other)),
    }
}

/// How many alternatives are wanted: a flag and a number in a chat, a number alone in a completion.
fn alternatives(call: Call, fields: &mut Fields) -> Result<Option<u32>, Refusal> {
    if call == Call::Completion {
        return fields.count("logprobs");
    }
    let (is_wanted, number) = (fields.flag("logprobs")?.unwrap_or(false), fields.count("top_logprobs")?);
    match (is_wanted, number) {
        (true, number) => Ok(Some(number.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(fields.error("top_logprobs", "wants logprobs true beside it")),
    }
}

fn stream_options(fields: &mut Fields, is_streamed: bool) -> Result<bool, Refusal> {
    if fields.has("stream_options") && !is_streamed {
        return Err(fields.error("stream_options", "wants stream true beside it"));
    }
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    let has_usage = options.flag("include_usage")?.unwrap_or(false);
    // Padding against eavesdroppers who count bytes: the words are not changed by it.
    options.flag("include_obfuscation")?;
    options.finish()?;
    Ok(has_usage)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(call: Call, body: &Value) -> Result<Ask, Refusal> {
        let fields = Fields::of_body(body.to_string().as_bytes())?;
        Ask::read(call, fields, pb::GenerateRequest::default())
    }

    fn chat(more: Value) -> Value {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hello" }] });
        let Value::Object(more) = more else { panic!("{more} is no object") };
        body.as_object_mut().unwrap().extend(more);
        body
    }

    #[test]
    fn a_chat_becomes_the_request_that_grpc_would_have_brought() {
        let body = chat(json!({
            "model": "m", "temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 18_446_744_073_709_551_615u64,
            "stop": "END", "max_completion_tokens": 9, "presence_penalty": -1, "logprobs": true, "top_logprobs": 3,
            "guidance": { "preference": { "b": 1, "a": 0.25 }, "strength": 2, "on_loss": "unguided" },
            "timeout_ms": 1500,
        }));
        let Ask { request, timeout, form } = read(Call::Chat, &body).unwrap();
        let sampling = request.sampling.unwrap();
        assert_eq!((sampling.seed, sampling.max_tokens, sampling.n), (Some(u64::MAX), Some(9), Some(2)));
        assert_eq!((sampling.stop, sampling.logprobs), (vec!["END".to_owned()], Some(4)));
        assert_eq!(request.on_reward_loss, pb::OnRewardLoss::Unguided as i32);
        let weights: Vec<_> =
            request.guidance[0].preference.iter().map(|w| (w.objective.as_str(), w.weight)).collect();
        assert_eq!(weights, [("a", 0.25), ("b", 1.0)], "by name, whatever the order of the body");
        assert_eq!((timeout, form.alternatives), (Some(Duration::from_millis(1500)), Some(3)));
    }

    #[test]
    fn what_a_body_does_not_say_the_template_says() {
        let sampling = pb::Sampling { top_k: 5, seed: Some(3), n: Some(2), ..pb::Sampling::default() };
        let template = pb::GenerateRequest {
            model: "m".into(),
            sampling: Some(sampling.clone()),
            guidance: vec![pb::GuidanceTerm { reward: "kind".into(), ..pb::GuidanceTerm::default() }],
            on_reward_loss: pb::OnRewardLoss::Fail as i32,
            ..pb::GenerateRequest::default()
        };
        let read = |body: &Value| {
            let fields = Fields::of("body", body.clone())?;
            Ask::read(Call::Chat, fields, template.clone())
        };
        let plain = read(&chat(json!({ "best_of": 2 }))).unwrap().request;
        assert_eq!(plain, pb::GenerateRequest { input: plain.input.clone(), ..template.clone() });
        let own = json!({ "top_k": 0, "guidance": { "strength": 2 }, "max_completion_tokens": 9 });
        let own = read(&chat(own)).unwrap().request;
        assert_eq!((&own.model, own.guidance[0].reward.as_str()), (&template.model, ""));
        let max_tokens = Some(9);
        assert_eq!(own.sampling, Some(pb::Sampling { top_k: 0, max_tokens, ..sampling }));
        let field = read(&chat(json!({ "stop": [1] }))).unwrap_err().field;
        assert_eq!(field.as_deref(), Some("body.stop[0]"), "where the body stands");
    }

    #[test]
    fn prompts_are_text_or_ids_and_one() {
        let kind = |prompt: Value| {
            let ask = read(Call::Completion, &json!({ "prompt": prompt }));
            ask.map(|ask| ask.request.input.unwrap().kind.unwrap())
        };
        let ids = pb::input::Kind::Tokens(pb::TokenIds { ids: vec![1, 2] });
        assert_eq!(kind(json!([1, 2])), Ok(ids.clone()));
        assert_eq!(kind(json!([[1, 2]])), Ok(ids));
        assert_eq!(kind(json!(["one"])), Ok(pb::input::Kind::Prompt("one".into())));
        for wrong in
            [json!(["one", "two"]), json!([1, "two"]), json!({}), json!([1.5]), json!([[["deep"]], 1])]
        {
            assert_eq!(kind(wrong).unwrap_err().field.as_deref(), Some("prompt"));
        }
    }

    #[test]
    fn fields_that_contradict_each_other_are_refused() {
        for (body, field) in [
            (json!({ "max_tokens": 5, "max_completion_tokens": 6 }), "max_tokens"),
            (json!({ "top_logprobs": 2 }), "top_logprobs"),
            (json!({ "stream_options": { "include_usage": true } }), "stream_options"),
            (json!({ "best_of": 3 }), "best_of"),
            (json!({ "guidance": [{ "on_loss": "wait" }, { "on_loss": "fail" }] }), "guidance[1].on_loss"),
            (json!({ "guidance": { "preference": { "a": "much" } } }), "guidance.preference.a"),
            (json!({ "messages": [{ "role": "tool", "content": "" }] }), "messages[0].role"),
            (json!({ "messages": [{ "role": "user", "content": null }] }), "messages[0].content"),
            (json!({ "messages": [{ "role": "user", "content": "", "name": "me" }] }), "messages[0].name"),
        ] {
            assert_eq!(read(Call::Chat, &chat(body)).unwrap_err().field.as_deref(), Some(field));
        }
    }
}
