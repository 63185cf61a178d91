//! Events become OpenAI's objects: one for a whole answer, or a chunk for each event of a stream.

use serde_json::{Map, Value, json};
use uniarm_proto::{
    ChoiceTranscript, Event, Transcript, digits::hexadecimal, pb, transcript::finish_reason_name,
};

use crate::{
    ask::{Call, Form},
    guidance,
    logprobs::{Detailed, decimal},
};

/// Turns the events of one request into the objects of its answer.
pub struct Writer {
    form: Form,
    /// Of the answer, and of each of its chunks.
    head: Map<String, Value>,
    answers: usize,
    /// What only the first chunk says.
    beginning: Option<Map<String, Value>>,
    /// Characters of each answer's tokens so far, which log-probabilities of a completion count.
    offsets: Vec<usize>,
    /// Costs differ from run to run; so do times.
    has_costs: bool,
}

// === impl Writer ===

impl Writer {
    /// `created`: seconds since 1970.
    pub fn new(form: Form, request_id: &str, answers: u32, created: u64) -> Self {
        let id = match form.call {
            Call::Chat => format!("chatcmpl-{request_id}"),
            Call::Completion => format!("cmpl-{request_id}"),
        };
        let object = match (form.call, form.is_streamed) {
            (Call::Chat, true) => "chat.completion.chunk",
            (Call::Chat, false) => "chat.completion",
            (Call::Completion, _) => "text_completion",
        };
        let head = named([("id", json!(id)), ("object", json!(object)), ("created", json!(created))]);
        let answers = answers as usize;
        Self { form, head, answers, beginning: None, offsets: vec![0; answers], has_costs: true }
    }

    /// Writes whole answers that are functions of the request and its tokens alone: without times and costs.
    pub fn reproducible(form: Form, name: &str) -> Self {
        Self { has_costs: false, ..Self::new(form, name, 0, 0) }
    }

    /// The chunks of an event, in order.
    pub fn chunks(&mut self, event: Event) -> Vec<Value> {
        match event {
            Event::Started(started) => self.started(&started),
            Event::Tokens(tokens) => self.tokens(&tokens).into_iter().collect(),
            Event::Finished(finished) => {
                let mut choice = self.piece(finished.choice, "");
                finish(&mut choice, &finished);
                vec![self.chunk(vec![choice])]
            }
            Event::Summary(summary) if self.form.has_usage => {
                let mut chunk = self.chunk(Vec::new());
                chunk["usage"] = usage(&summary);
                chunk["uniarm"] = Value::Object(ending(&summary));
                vec![chunk]
            }
            Event::Summary(_) => Vec::new(),
        }
    }

    /// The answer as a whole.
    pub fn whole(&self, transcript: &Transcript) -> Value {
        let started = transcript.started.clone().unwrap_or_default();
        let summary = transcript.summary.clone().unwrap_or_default();
        let choices = transcript.choices.iter().enumerate();
        let choices: Vec<_> = choices.map(|(index, choice)| self.choice(index, choice)).collect();
        let (mut usage, mut extension) = (usage(&summary), beginning(&started));
        extension.extend(ending(&summary));
        if !self.has_costs {
            for of_this_run in ["timing", "exchange", "speculation", "audit"] {
                extension.remove(of_this_run);
            }
            // What a cache held is another matter in the next run.
            usage.as_object_mut().map(|usage| usage.remove("prompt_tokens_details"));
        }
        let mut answer = self.head.clone();
        answer.insert("model".into(), json!(started.model));
        answer.insert("choices".into(), Value::Array(choices));
        answer.insert("usage".into(), usage);
        answer.insert("uniarm".into(), Value::Object(extension));
        Value::Object(answer)
    }

    fn choice(&self, index: usize, answer: &ChoiceTranscript) -> Value {
        let detailed = self.detailed(&answer.tokens, &answer.details);
        let mut choice = match self.form.call {
            Call::Chat => json!({
                "index": index,
                "message": { "role": "assistant", "content": answer.text, "refusal": null },
                "logprobs": detailed.map(|detailed| detailed.of_chat()),
            }),
            Call::Completion => json!({
                "index": index,
                "text": answer.text,
                "logprobs": detailed.map(|detailed| detailed.of_completion(0)),
            }),
        };
        mark(&mut choice, &answer.unguided);
        finish(&mut choice, &answer.finished.clone().unwrap_or_default());
        choice
    }

    fn started(&mut self, started: &pb::Started) -> Vec<Value> {
        self.head.insert("model".into(), json!(started.model));
        self.beginning = Some(beginning(started));
        if self.form.call == Call::Completion {
            return Vec::new();
        }
        let opening = |index| {
            json!({
                "index": index,
                "delta": { "role": "assistant", "content": "" },
                "logprobs": null,
                "finish_reason": null,
            })
        };
        (0..self.answers).map(|index| self.chunk(vec![opening(index)])).collect()
    }

    /// Nothing where tokens have not made a whole character yet, and nothing else is to be said of them.
    fn tokens(&mut self, tokens: &pb::Tokens) -> Option<Value> {
        let detailed = self.detailed(&tokens.ids, &tokens.details);
        if tokens.text.is_empty() && detailed.is_none() && tokens.unguided.is_empty() {
            return None;
        }
        let mut choice = self.piece(tokens.choice, &tokens.text);
        if let Some(detailed) = detailed {
            let offset = &mut self.offsets[tokens.choice as usize];
            choice["logprobs"] = match self.form.call {
                Call::Chat => detailed.of_chat(),
                Call::Completion => detailed.of_completion(*offset),
            };
            *offset += detailed.characters();
        }
        let positions: Vec<_> = tokens.unguided.iter().map(|index| tokens.position + index).collect();
        mark(&mut choice, &positions);
        Some(self.chunk(vec![choice]))
    }

    fn piece(&self, index: u32, text: &str) -> Value {
        match self.form.call {
            Call::Chat => {
                let delta = if text.is_empty() { json!({}) } else { json!({ "content": text }) };
                json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null })
            }
            Call::Completion => {
                json!({ "index": index, "text": text, "logprobs": null, "finish_reason": null })
            }
        }
    }

    fn chunk(&mut self, choices: Vec<Value>) -> Value {
        let mut chunk = self.head.clone();
        chunk.insert("choices".into(), Value::Array(choices));
        if self.form.has_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        if let Some(beginning) = self.beginning.take() {
            chunk.insert("uniarm".into(), Value::Object(beginning));
        }
        Value::Object(chunk)
    }

    fn detailed<'a>(&self, ids: &'a [u32], details: &'a [pb::TokenDetail]) -> Option<Detailed<'a>> {
        let shown = self.form.alternatives? as usize;
        (!details.is_empty()).then_some(Detailed { ids, details, shown })
    }
}

// === the extension `uniarm` ===

/// What a request became: enough to ask it again.
fn beginning(started: &pb::Started) -> Map<String, Value> {
    let fields = [
        ("seed", json!(started.seed)),
        ("guidance", started.guidance.iter().map(guidance::as_json).collect()),
        ("base_strength", decimal(started.base_strength.unwrap_or(1.0))),
    ];
    named(fields)
}

/// What is known when it is over.
fn ending(summary: &pb::Summary) -> Map<String, Value> {
    let mut fields = costs(summary);
    let usage = summary.usage.unwrap_or_default();
    fields.insert("unguided_tokens".to_owned(), json!(usage.unguided_tokens));
    if !summary.audit.is_empty() {
        fields.insert("audit".to_owned(), json!(hexadecimal(&summary.audit)));
    }
    fields
}

/// What a request cost, beyond tokens.
pub fn costs(summary: &pb::Summary) -> Map<String, Value> {
    let timing = summary.timing.unwrap_or_default();
    let (exchange, speculation) =
        (summary.exchange.unwrap_or_default(), summary.speculation.unwrap_or_default());
    let timing = json!({
        "queue_ms": timing.queue_ms,
        "first_token_ms": timing.first_token_ms,
        "total_ms": timing.total_ms,
        "reward_stall_ms": timing.reward_stall_ms,
    });
    let exchange = json!({
        "bytes": exchange.bytes,
        "certified": exchange.certified,
        "queried": exchange.queried,
        "dense": exchange.dense,
    });
    let speculation = json!({
        "base_passes": speculation.base_passes,
        "drafted": speculation.drafted,
        "accepted": speculation.accepted,
    });
    named([("timing", timing), ("exchange", exchange), ("speculation", speculation)])
}

fn named<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn usage(summary: &pb::Summary) -> Value {
    let usage = summary.usage.unwrap_or_default();
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_prompt_tokens },
    })
}

/// Marks tokens that were chosen without their reward.
fn mark(choice: &mut Value, unguided: &[u32]) {
    if !unguided.is_empty() {
        choice["uniarm"] = json!({ "unguided": unguided });
    }
}

/// OpenAI knows no full context: to its clients it is a length, and the extension says which.
fn finish(choice: &mut Value, finished: &pb::Finished) {
    choice["finish_reason"] = json!(match finished.reason() {
        pb::FinishReason::Context => "length",
        _ => finish_reason_name(finished),
    });
    if finished.reason() == pb::FinishReason::Context {
        choice["uniarm"]["finish_reason"] = json!("context");
    }
    if !finished.stop.is_empty() {
        choice["uniarm"]["stop"] = json!(finished.stop);
    }
}
