//! OpenAI's batch files: lines as they are, and answers in the shape that their readers know.
//!
//! An answer has no clock in it and no random name, so that a job that was killed and continued writes the same bytes:
//! `created` is 0, and names are digests.

use serde::Serialize;
use serde_json::Value;
use uniarm_openai::{Ask, Call, Failure, Fields, Writer};
use uniarm_proto::{Refusal, Refused, Transcript, pb};

use crate::{
    digest,
    request::{Form, Label, Plan, text_or_number},
};

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
) -> Result<pb::GenerateRequest, Refusal> {
    label.form = Form::OpenAi(None);
    let id = fields.required("custom_id")?;
    label.id = text_or_number(id).ok_or_else(|| fields.error("custom_id", "wants a string"))?;
    fields.word("method", &[("POST", ())])?;
    let url = fields.text("url")?.ok_or_else(|| fields.error("url", "is missing"))?;
    let call = Call::at(&url).map_err(|reason| fields.error("url", reason))?;
    if let Some(only) = plan.only.filter(|only| *only != call) {
        return Err(fields.error("url", format!("is {url:?}, and the batch is for {}", only.path())));
    }
    let body = fields.object("body")?.ok_or_else(|| fields.error("body", "is missing"))?;
    fields.finish_strictly()?;
    plan.check_preference(&body)?;
    let Ask { request, timeout, form } = Ask::read(call, body, plan.template())?;
    if form.is_streamed {
        return Err(Refusal::invalid("body.stream", "is true, and a line has nobody to stream to"));
    }
    if timeout.is_some() {
        return Err(Refusal::invalid("body.timeout_ms", "is set, and nobody waits for a line: leave it out"));
    }
    label.form = Form::OpenAi(Some(form));
    Ok(request)
}

/// The line of output of an answer or a failure.
pub(crate) fn write_line(label: &Label, result: Result<&Transcript, &Refused>) -> String {
    let custom_id = custom_id(label);
    let name = |kind: &str| format!("{:016x}", digest::seed(0, &[kind, &custom_id]));
    let form = match &label.form {
        Form::OpenAi(form) => form.as_ref(),
        Form::Short => None,
    };
    let (status_code, body) = match result {
        Ok(transcript) => {
            let form = form.expect("what was answered has been read").clone();
            (200, Writer::reproducible(form, &name("answer")).whole(transcript))
        }
        Err(refused) => {
            let failure = match form {
                Some(form) => Failure::of_request(refused.clone(), &form.names),
                None => Failure::from(refused.clone()),
            };
            (failure.status, failure.body())
        }
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
