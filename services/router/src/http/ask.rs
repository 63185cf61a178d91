//! A body in OpenAI's terms becomes the request that gRPC would have brought. What it may hold is checked where every
//! request is checked; here only its shape is.

use std::time::Duration;

use serde_json::Value;
use uniarm_proto::{Refusal, limits::LOGPROBS_MAX, pb};

use super::{
    fields::{Fields, ids_of, wrong},
    guidance,
};

/// Bits of a seed that is drawn: clients whose numbers are 64-bit floats can send it back.
const DRAWN_SEED_BITS: u32 = 53;

/// Which of OpenAI's two calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Chat,
    Completion,
}

/// A body, read.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) request: pb::GenerateRequest,
    pub(super) timeout: Option<Duration>,
    pub(super) form: Form,
}

/// In which form the answer is wanted.
#[derive(Debug, Clone)]
pub(super) struct Form {
    pub(super) call: Call,
    pub(super) is_streamed: bool,
    /// A last chunk of a stream says what it cost.
    pub(super) has_usage: bool,
    /// Alternatives to show for each token; `None`: no log-probabilities.
    pub(super) alternatives: Option<u32>,
    pub(super) names: Names,
}

/// How this body named what gRPC names otherwise.
#[derive(Debug, Clone)]
pub(super) struct Names {
    input: &'static str,
    length: &'static str,
    logprobs: &'static str,
    guidance_is_list: bool,
}

// === impl Ask ===

impl Ask {
    /// # Errors
    /// When the body is not of the form that the call wants; the field is named as the body names it.
    pub(super) fn read(call: Call, body: &[u8], request_id: &str) -> Result<Self, Refusal> {
        let mut fields = Fields::of_body(body)?;
        let names = Names::of(call, &fields);
        let alternatives = alternatives(call, &mut fields)?;
        let is_streamed = fields.flag("stream")?.unwrap_or(false);
        let has_usage = stream_options(&mut fields, is_streamed)?;
        let (terms, on_loss) = guidance::read(&mut fields)?;
        let request = pb::GenerateRequest {
            request_id: request_id.to_owned(),
            model: fields.text("model")?.unwrap_or_default(),
            input: Some(pb::Input { kind: Some(input(call, &mut fields)?) }),
            sampling: Some(sampling(&mut fields, alternatives)?),
            guidance: terms,
            on_reward_loss: on_loss as i32,
            priority: fields.word("priority", &guidance::PRIORITIES)?.unwrap_or_default() as i32,
            exchange: fields.word("exchange", &guidance::EXCHANGES)?.unwrap_or_default() as i32,
            base_strength: fields.number("base_strength")?,
            ..pb::GenerateRequest::default()
        };
        let timeout = fields.wide_count("timeout_ms")?.map(Duration::from_millis);
        fields.finish()?;
        Ok(Self { request, timeout, form: Form { call, is_streamed, has_usage, alternatives, names } })
    }
}

// === impl Names ===

impl Names {
    fn of(call: Call, fields: &Fields) -> Self {
        Self {
            input: match call {
                Call::Chat => "messages",
                Call::Completion => "prompt",
            },
            length: if fields.has("max_completion_tokens") { "max_completion_tokens" } else { "max_tokens" },
            logprobs: match call {
                Call::Chat => "top_logprobs",
                Call::Completion => "logprobs",
            },
            guidance_is_list: fields.is_list("guidance"),
        }
    }

    /// A field of the contract by the name that it had in the body.
    pub(super) fn of_field(&self, field: &str) -> String {
        if let Some(rest) = field.strip_prefix("input.chat.messages") {
            return format!("messages{rest}");
        }
        if let Some(rest) = field.strip_prefix("guidance[0]").filter(|_| !self.guidance_is_list) {
            return format!("guidance{rest}");
        }
        match field {
            "input" | "input.prompt" | "input.tokens" => self.input.to_owned(),
            "sampling.max_tokens" => self.length.to_owned(),
            "sampling.logprobs" => self.logprobs.to_owned(),
            "on_reward_loss" => "guidance.on_loss".to_owned(),
            "request_id" => "x-request-id".to_owned(),
            other => other.strip_prefix("sampling.").unwrap_or(other).to_owned(),
        }
    }
}

// === parts of a body ===

fn input(call: Call, fields: &mut Fields) -> Result<pb::input::Kind, Refusal> {
    match call {
        Call::Chat => {
            let Some(messages) = fields.value("messages") else {
                return Err(Refusal::invalid("messages", "is missing"));
            };
            let Value::Array(messages) = messages else {
                return Err(wrong("messages", "a list of messages", &messages));
            };
            let messages = messages.into_iter().enumerate();
            let messages = messages.map(|(index, value)| message(&format!("messages[{index}]"), value));
            Ok(pb::input::Kind::Chat(pb::ChatMessages { messages: messages.collect::<Result<_, _>>()? }))
        }
        Call::Completion => {
            let Some(prompt) = fields.value("prompt") else {
                return Err(Refusal::invalid("prompt", "is missing"));
            };
            prompt_of(prompt)
        }
    }
}

fn message(at: &str, value: Value) -> Result<pb::ChatMessage, Refusal> {
    let mut fields = Fields::of(at, value)?;
    let role = match fields.text("role")?.as_deref() {
        None => return Err(Refusal::invalid(fields.path("role"), "is missing")),
        // OpenAI's newer word; no template knows it.
        Some("developer") => "system".to_owned(),
        Some(role @ ("system" | "user" | "assistant")) => role.to_owned(),
        Some(other) => {
            let reason = format!("is {other:?}, wants system, developer, user or assistant");
            return Err(Refusal::invalid(fields.path("role"), reason));
        }
    };
    let content = match fields.value("content") {
        None => return Err(Refusal::invalid(fields.path("content"), "is missing")),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate();
            let parts = parts.map(|(index, part)| text_part(&format!("{at}.content[{index}]"), part));
            parts.collect::<Result<Vec<_>, _>>()?.concat()
        }
        Some(other) => {
            return Err(wrong(&fields.path("content"), "a string or a list of text parts", &other));
        }
    };
    fields.finish()?;
    Ok(pb::ChatMessage { role, content })
}

fn text_part(at: &str, value: Value) -> Result<String, Refusal> {
    let mut fields = Fields::of(at, value)?;
    fields.word("type", &[("text", ())])?;
    let text = fields.text("text")?.ok_or_else(|| Refusal::invalid(fields.path("text"), "is missing"))?;
    fields.finish()?;
    Ok(text)
}

/// A string or token ids, alone or as the only one of a list.
fn prompt_of(prompt: Value) -> Result<pb::input::Kind, Refusal> {
    if let Some(ids) = ids_of(&prompt) {
        return Ok(pb::input::Kind::Tokens(pb::TokenIds { ids }));
    }
    match prompt {
        Value::String(text) => Ok(pb::input::Kind::Prompt(text)),
        Value::Array(mut prompts) if prompts.len() == 1 && !prompts[0].is_number() => {
            prompt_of(prompts.remove(0))
        }
        Value::Array(prompts) if prompts.iter().all(Value::is_string) => Err(Refusal::invalid(
            "prompt",
            format!("has {} prompts, wants one: send each in a request of its own", prompts.len()),
        )),
        other => Err(wrong("prompt", "a string or a list of token ids", &other)),
    }
}

fn sampling(fields: &mut Fields, alternatives: Option<u32>) -> Result<pb::Sampling, Refusal> {
    let n = fields.count("n")?;
    if let Some(best_of) = fields.count("best_of")?.filter(|best_of| *best_of != n.unwrap_or(1)) {
        let reason = format!("is {best_of}, wants n: no answers are made to be thrown away");
        return Err(Refusal::invalid("best_of", reason));
    }
    Ok(pb::Sampling {
        temperature: fields.number("temperature")?,
        top_k: fields.count("top_k")?.unwrap_or(0),
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?.unwrap_or(0.0),
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.0),
        seed: Some(
            fields.wide_count("seed")?.unwrap_or_else(|| rand::random::<u64>() >> (64 - DRAWN_SEED_BITS)),
        ),
        max_tokens: max_tokens(fields)?,
        stop: stop(fields)?,
        stop_token_ids: fields.ids("stop_token_ids")?.unwrap_or_default(),
        // One more than is shown: the chosen token takes the last place where it is not among them. And one at least,
        // or its own log-probability would not come.
        logprobs: alternatives.map(|shown| match shown {
            0..LOGPROBS_MAX => shown + 1,
            other => other,
        }),
        n,
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
    })
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, Refusal> {
    match (fields.count("max_tokens")?, fields.count("max_completion_tokens")?) {
        (Some(old), Some(new)) if old != new => {
            let reason = format!("is {old}, and max_completion_tokens is {new}: send one of them");
            Err(Refusal::invalid("max_tokens", reason))
        }
        (old, new) => Ok(new.or(old)),
    }
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, Refusal> {
    match fields.value("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop]),
        Some(Value::Array(stops)) => {
            let text = |(index, stop): (usize, Value)| match stop {
                Value::String(stop) => Ok(stop),
                other => Err(wrong(&format!("stop[{index}]"), "a string", &other)),
            };
            stops.into_iter().enumerate().map(text).collect()
        }
        Some(other) => Err(wrong("stop", "a string or a list of strings", &other)),
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
        (false, Some(_)) => Err(Refusal::invalid("top_logprobs", "wants logprobs true beside it")),
    }
}

fn stream_options(fields: &mut Fields, is_streamed: bool) -> Result<bool, Refusal> {
    let Some(options) = fields.value("stream_options") else { return Ok(false) };
    if !is_streamed {
        return Err(Refusal::invalid("stream_options", "wants stream true beside it"));
    }
    let mut options = Fields::of("stream_options", options)?;
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
    use crate::http::OPENAPI;

    fn read(call: Call, body: &Value) -> Result<Ask, Refusal> {
        Ask::read(call, body.to_string().as_bytes(), "r")
    }

    fn chat(more: Value) -> Value {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hello" }] });
        let Value::Object(more) = more else { panic!("{more} is no object") };
        body.as_object_mut().unwrap().extend(more);
        body
    }

    #[test]
    fn every_documented_field_is_read() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        for (call, schema, input) in [
            (Call::Chat, "ChatRequest", chat(json!({}))),
            (Call::Completion, "CompletionRequest", json!({ "prompt": "Hello" })),
        ] {
            let fields = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
            assert!(fields.len() > 20);
            for field in fields.keys() {
                let mut body = input.clone();
                body["stream"] = json!(true);
                // Of no field's kind.
                body[field] = json!([{ "no": "such" }]);
                let refusal = read(call, &body).unwrap_err();
                assert!(refusal.field.as_deref().unwrap().starts_with(field.as_str()), "{refusal:?}");
                let is_unknown = refusal.message.starts_with(&format!("{field}: is not supported"));
                assert!(!is_unknown, "{field} is documented, and not read");
            }
        }
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
    fn a_drawn_seed_survives_a_client_with_floats_for_numbers() {
        for _ in 0..100 {
            let request = read(Call::Chat, &chat(json!({}))).unwrap().request;
            let seed = request.sampling.unwrap().seed.unwrap();
            assert_eq!(seed as f64 as u64, seed);
        }
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
