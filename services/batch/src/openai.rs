//! OpenAI's batch files: lines as they are, and answers in the shape that their readers know.
//!
//! An answer has no clock in it and no random name, so that a job that was killed and continued writes the same bytes:
//! `created` is 0, and names are digests.

use serde::Serialize;
use serde_json::{Map, Value, json};
use uniarm_proto::{ChoiceTranscript, Transcript, limits::LOGPROBS_MAX, pb, transcript::finish_reason_name};

use crate::{
    digest,
    failure::Failure,
    fields::{Fields, LineError},
    request::{Form, Label, Plan, read_guidance, read_message, read_sampling, text_or_number},
};

const LINE_FIELDS: [&str; 4] = ["custom_id", "method", "url", "body"];

const BODY_FIELDS: [&str; 33] = [
    "model",
    "messages",
    "prompt",
    "guidance",
    "base_strength",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "stop_token_ids",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "store",
    "service_tier",
    "logit_bias",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "safety_identifier",
];

/// They change no token, and are read over.
const IGNORED: [&str; 7] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "stream_options",
    "safety_identifier",
    "parallel_tool_calls",
];

/// A line of the output file.
#[derive(Serialize)]
struct OutputLine<'a> {
    id: String,
    custom_id: &'a str,
    response: Response,
    error: Option<()>,
}

#[derive(Serialize)]
struct Response {
    status_code: u16,
    request_id: String,
    body: Value,
}

/// The request of a line; the label gets the line's id and form.
pub(crate) fn read_line(
    mut fields: Fields,
    plan: &Plan,
    label: &mut Label,
) -> Result<pb::GenerateRequest, LineError> {
    label.form = Form::Chat;
    let id: Value = fields.required("custom_id")?;
    label.id = text_or_number(id).ok_or_else(|| fields.error("custom_id", "wants a string"))?;
    if let Some(method) = fields.take::<String>("method")?
        && method != "POST"
    {
        return Err(fields.error("method", format!("is {method:?}, wants POST")));
    }
    label.form = match fields.required::<String>("url")?.as_str() {
        "/v1/chat/completions" => Form::Chat,
        "/v1/completions" => Form::Completion,
        other => {
            let reason = format!("is {other:?}, wants /v1/chat/completions or /v1/completions");
            return Err(fields.error("url", reason));
        }
    };
    let body = fields.object("body")?.ok_or_else(|| fields.error("body", "is missing"))?;
    fields.finish(&LINE_FIELDS)?;
    read_body(body, plan, label)
}

fn read_body(mut body: Fields, plan: &Plan, label: &mut Label) -> Result<pb::GenerateRequest, LineError> {
    let form = label.form;
    let mut request = plan.template();
    request.input = Some(read_input(&mut body, form)?);
    if let Some(model) = body.take("model")? {
        request.model = model;
    }
    read_guidance(&mut body, &mut request, plan)?;
    let sampling = request.sampling.get_or_insert_default();
    if let Some(tokens) = body.take("max_completion_tokens")? {
        sampling.max_tokens = Some(tokens);
    }
    let shown = read_logprobs(&mut body, form)?;
    // One more than is shown: the chosen token takes the last place where it is not among them.
    sampling.logprobs = shown.map(|shown| (shown + 1).min(LOGPROBS_MAX));
    label.alternatives = shown.unwrap_or(0) as usize;
    read_sampling(&mut body, sampling)?;
    refuse_what_is_not_served(&mut body)?;
    for name in IGNORED {
        body.take::<Value>(name)?;
    }
    body.finish(&BODY_FIELDS)?;
    Ok(request)
}

fn read_input(body: &mut Fields, form: Form) -> Result<pb::Input, LineError> {
    let kind = match form {
        Form::Completion => match body.required::<Value>("prompt")? {
            Value::String(text) => pb::input::Kind::Prompt(text),
            ids => {
                let ids = serde_json::from_value(ids)
                    .map_err(|_| body.error("prompt", "wants one text, or one list of token ids"))?;
                pb::input::Kind::Tokens(pb::TokenIds { ids })
            }
        },
        Form::Chat | Form::Short => {
            let messages = body.objects("messages")?;
            if messages.is_empty() {
                return Err(body.error("messages", "is missing or empty"));
            }
            let messages = messages.into_iter().map(read_message).collect::<Result<_, _>>()?;
            pb::input::Kind::Chat(pb::ChatMessages { messages })
        }
    };
    Ok(pb::Input { kind: Some(kind) })
}

/// Alternatives to show: chats have a flag and a number, completions a number.
fn read_logprobs(body: &mut Fields, form: Form) -> Result<Option<u32>, LineError> {
    let shown = match form {
        Form::Completion => body.take::<u32>("logprobs")?,
        Form::Chat | Form::Short => {
            let top = body.take::<u32>("top_logprobs")?;
            let is_wanted = body.take::<bool>("logprobs")?.unwrap_or(false);
            if top.is_some() && !is_wanted {
                return Err(body.error("top_logprobs", "wants logprobs to be true"));
            }
            is_wanted.then_some(top.unwrap_or(0))
        }
    };
    match shown {
        Some(shown) if shown > LOGPROBS_MAX => {
            Err(body.error("logprobs", format!("asks for {shown} alternatives, the limit is {LOGPROBS_MAX}")))
        }
        shown => Ok(shown),
    }
}

/// Better no answer than one that looks as if it had heeded them.
fn refuse_what_is_not_served(body: &mut Fields) -> Result<(), LineError> {
    if body.take::<bool>("stream")? == Some(true) {
        return Err(body.error("stream", "is true, and a line has nobody to stream to"));
    }
    for name in ["tools", "logit_bias", "tool_choice"] {
        let is_empty = match body.take::<Value>(name)? {
            None => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(object)) => object.is_empty(),
            Some(Value::String(text)) => text == "none" || text == "auto",
            Some(_) => false,
        };
        if !is_empty {
            return Err(body.error(name, "is not served; leave it out"));
        }
    }
    let format: Option<Map<String, Value>> = body.take("response_format")?;
    match format.as_ref().and_then(|format| format.get("type")).and_then(Value::as_str) {
        None if format.is_none() => Ok(()),
        Some("text") => Ok(()),
        _ => Err(body.error("response_format", "wants the type text: no other is served")),
    }
}

/// The line of output of an answer or a failure.
pub(crate) fn write_line(label: &Label, result: Result<&Transcript, &Failure>) -> String {
    let custom_id = custom_id(label);
    let name = |kind: &str| format!("{:016x}", digest::seed(0, &[kind, &custom_id]));
    let (status_code, body) = match result {
        Ok(transcript) => (200, answer(label, transcript, &name("answer"))),
        Err(failure) => (failure.http_status(), failure.as_openai()),
    };
    let response = Response { status_code, request_id: format!("req_{}", name("request")), body };
    let id = format!("batch_req_{}", name("line"));
    let line = OutputLine { id, custom_id: &custom_id, response, error: None };
    serde_json::to_string(&line).expect("strings, numbers and lists")
}

/// Ids stay unique when a line is fanned out: `id#harmless=0.3,helpful=0.7`.
fn custom_id(label: &Label) -> String {
    let Some(preference) = &label.preference else { return label.id.clone() };
    let weights: Vec<String> = preference.iter().map(|(name, weight)| format!("{name}={weight}")).collect();
    format!("{}#{}", label.id, weights.join(","))
}

fn answer(label: &Label, transcript: &Transcript, name: &str) -> Value {
    let started = transcript.started.clone().unwrap_or_default();
    let usage = transcript.summary.and_then(|summary| summary.usage).unwrap_or_default();
    let choices: Vec<Value> = transcript
        .choices
        .iter()
        .enumerate()
        .map(|(index, choice)| choice_json(label, index, choice))
        .collect();
    let (prefix, object) = match label.form {
        Form::Completion => ("cmpl", "text_completion"),
        Form::Chat | Form::Short => ("chatcmpl", "chat.completion"),
    };
    let mut usage_json = json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    });
    if usage.unguided_tokens > 0 {
        usage_json["unguided_tokens"] = usage.unguided_tokens.into();
    }
    json!({
        "id": format!("{prefix}-{name}"),
        "object": object,
        "created": 0,
        "model": started.model,
        "choices": choices,
        "usage": usage_json,
    })
}

fn choice_json(label: &Label, index: usize, choice: &ChoiceTranscript) -> Value {
    let reason = choice.finished.as_ref().map(|finished| match finish_reason_name(finished) {
        "context" => "length",
        other => other,
    });
    match label.form {
        Form::Completion => {
            json!({ "index": index, "text": choice.text, "finish_reason": reason, "logprobs": completion_logprobs(choice, label.alternatives) })
        }
        Form::Chat | Form::Short => json!({
            "index": index,
            "message": { "role": "assistant", "content": choice.text, "refusal": null },
            "finish_reason": reason,
            "logprobs": chat_logprobs(choice, label.alternatives),
        }),
    }
}

/// The chosen token among its alternatives.
fn chosen(id: u32, detail: &pb::TokenDetail) -> Option<&pb::Alternative> {
    detail.alternatives.iter().find(|alternative| alternative.id == id)
}

fn chat_logprobs(choice: &ChoiceTranscript, shown: usize) -> Option<Value> {
    if choice.details.is_empty() {
        return None;
    }
    let one = |alternative: &pb::Alternative| {
        json!({
            "token": alternative.text,
            "logprob": alternative.guided_logprob,
            "bytes": alternative.text.as_bytes(),
        })
    };
    let token = |(id, detail): (&u32, &pb::TokenDetail)| {
        let mut token = chosen(*id, detail).map_or(json!({}), one);
        token["top_logprobs"] = detail.alternatives.iter().take(shown).map(one).collect();
        token
    };
    let content: Vec<Value> = choice.tokens.iter().zip(&choice.details).map(token).collect();
    Some(json!({ "content": content, "refusal": null }))
}

fn completion_logprobs(choice: &ChoiceTranscript, shown: usize) -> Option<Value> {
    if choice.details.is_empty() {
        return None;
    }
    let own: Vec<Option<&pb::Alternative>> =
        choice.tokens.iter().zip(&choice.details).map(|(id, detail)| chosen(*id, detail)).collect();
    let top = |detail: &pb::TokenDetail| -> Map<String, Value> {
        detail
            .alternatives
            .iter()
            .take(shown)
            .map(|one| (one.text.clone(), one.guided_logprob.into()))
            .collect()
    };
    Some(json!({
        "tokens": own.iter().map(|one| one.map(|one| &one.text)).collect::<Vec<_>>(),
        "token_logprobs": own.iter().map(|one| one.map(|one| one.guided_logprob)).collect::<Vec<_>>(),
        "top_logprobs": choice.details.iter().map(top).collect::<Vec<_>>(),
    }))
}
