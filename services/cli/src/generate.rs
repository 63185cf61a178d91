//! `uniarm generate`: one request, streamed as text or printed as one JSON object.

use std::{str::FromStr, time::Duration};

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use serde_json::json;
use tonic::Status;
use uniarm_decode::{PreferenceError, PreferenceSpec};
use uniarm_proto::{
    ChatMessage, ChoiceTranscript, ClusterClient, Event, Exchange, GenerateRequest, GuidanceTerm, Input,
    OnRewardLoss, Priority, Sampling, Transcript, digits::hexadecimal, pb, transcript::finish_reason_name,
};

use crate::{
    args::{ExchangeMode, GenerateArgs, GuidanceArgs, LossPolicy, SamplingArgs},
    client::{self, ErrorObject},
    output, side_by_side, tint,
};

/// The column that every comparison has.
const UNGUIDED: &str = "unguided";

/// What stands beside the answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Compared {
    /// The unguided one, and no other.
    Unguided,
    Under(PreferenceSpec),
}

pub async fn run(args: Box<GenerateArgs>) -> anyhow::Result<()> {
    if args.sampling.logprobs.is_some() && !args.json {
        bail!("--logprobs wants --json, which prints them");
    }
    let timeout = args.timeout.map(Duration::from_secs_f64);
    let cluster = client::dial(&args.endpoint).await?;
    let mut request = request_of(&args, &cluster).await?;
    request.audit = args.audit;
    if !args.compare.is_empty() {
        return compare(&args.compare, &cluster, request, timeout).await;
    }
    if args.color {
        request.sampling.logprobs.get_or_insert(1);
    }
    if args.json {
        match client::generate(&cluster, request, timeout, |_| {}).await {
            Ok(transcript) => println!("{}", as_json(&transcript)),
            Err(status) => {
                println!("{}", json!({ "error": ErrorObject::from(&status) }));
                bail!("{}", sentence(&status));
            }
        }
        return Ok(());
    }
    let single = args.sampling.n == 1;
    let show = |event: &Event| {
        if let (true, Event::Tokens(tokens)) = (single, event) {
            let text = if args.color { tint::tinted(tokens) } else { tokens.text.clone() };
            print!("{text}");
            output::flush();
        }
    };
    let result = client::generate(&cluster, request, timeout, show).await;
    if single {
        println!();
    }
    let transcript = result.map_err(|status| anyhow::anyhow!("{}", sentence(&status)))?;
    if !single {
        for (number, choice) in transcript.choices.iter().enumerate() {
            println!("[{number}] {}", choice.text);
        }
    }
    eprintln!("{}", footer(&transcript));
    if args.color {
        eprintln!("[{}]", tint::LEGEND);
    }
    Ok(())
}

// === impl Compared ===

impl FromStr for Compared {
    type Err = PreferenceError;

    fn from_str(text: &str) -> Result<Self, PreferenceError> {
        if text == UNGUIDED { Ok(Self::Unguided) } else { text.parse().map(Self::Under) }
    }
}

/// The same request unguided, as asked, and under each of the preferences, with the same noise.
async fn compare(
    compared: &[Compared],
    cluster: &ClusterClient,
    request: GenerateRequest,
    timeout: Option<Duration>,
) -> anyhow::Result<()> {
    let mut columns = vec![(UNGUIDED.to_owned(), Vec::new())];
    // A strength or a reward model alone is for the preferences that follow.
    if request.guidance.iter().any(|term| !term.preference.is_empty()) {
        columns.push((title(&request.guidance), request.guidance.clone()));
    }
    for one in compared {
        let Compared::Under(preference) = one else { continue };
        let preference = weights(preference);
        let mut guidance = request.guidance.clone();
        match guidance.first_mut() {
            Some(first) => first.preference = preference,
            None => guidance.push(term(preference)),
        }
        columns.push((title(&guidance), guidance));
    }
    // Drawn once: what differs between the answers is the preference.
    let sampling = Sampling {
        seed: Some(request.sampling.seed.unwrap_or_else(rand::random)),
        ..request.sampling.clone()
    };
    let asked = columns.iter().map(|(_, guidance)| {
        let request =
            GenerateRequest { guidance: guidance.clone(), sampling: sampling.clone(), ..request.clone() };
        cluster.complete(request, timeout)
    });
    let answers: Result<Vec<Transcript>, Status> = join_all(asked).await.into_iter().collect();
    let answers = answers.map_err(|status| anyhow::anyhow!("{}", sentence(&status)))?;
    side_by_side::print(columns.iter().map(|(title, _)| title.as_str()).zip(&answers));
    Ok(())
}

/// Guidance as the head of a column.
fn title(guidance: &[GuidanceTerm]) -> String {
    let of_term = |term: &GuidanceTerm| {
        let weights: Vec<String> =
            term.preference.iter().map(|(name, weight)| format!("{name} {weight}")).collect();
        let name = if weights.is_empty() { term.reward.clone() } else { weights.join(", ") };
        if term.strength == 1.0 { name } else { format!("{name} (strength {})", term.strength) }
    };
    guidance.iter().map(of_term).collect::<Vec<_>>().join(" + ")
}

async fn request_of(args: &GenerateArgs, cluster: &ClusterClient) -> anyhow::Result<GenerateRequest> {
    let input = match &args.prompt {
        None => Input::Tokens(args.token_ids.clone()),
        Some(prompt) if args.raw || !has_template(args, cluster).await? => Input::Prompt(prompt.clone()),
        Some(prompt) => chat(args.system.as_deref(), prompt),
    };
    Ok(GenerateRequest {
        request_id: args.request_id.clone().unwrap_or_default(),
        model: args.model.clone().unwrap_or_default(),
        input,
        ..template(&args.guidance, &args.sampling)
    })
}

/// What these flags say of a request that has no input yet.
pub fn template(guidance: &GuidanceArgs, sampling: &SamplingArgs) -> GenerateRequest {
    GenerateRequest {
        request_id: String::new(),
        model: String::new(),
        input: Input::Chat(Vec::new()),
        sampling: sampling_of(sampling),
        base_strength: guidance.base_strength,
        guidance: guidance_of(guidance),
        on_reward_loss: match guidance.on_reward_loss {
            LossPolicy::Wait => OnRewardLoss::Wait,
            LossPolicy::Fail => OnRewardLoss::Fail,
            LossPolicy::Unguided => OnRewardLoss::Unguided,
        },
        priority: Priority::Normal,
        exchange: guidance.exchange.map(|exchange| match exchange {
            ExchangeMode::Certified => Exchange::Certified,
            ExchangeMode::Dense => Exchange::Dense,
        }),
        skip: 0,
        audit: false,
    }
}

/// A chat of one question.
pub fn chat(system: Option<&str>, prompt: &str) -> Input {
    let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let system = system.map(|content| message("system", content));
    Input::Chat(system.into_iter().chain([message("user", prompt)]).collect())
}

/// Whether the model that will answer takes chats.
async fn has_template(args: &GenerateArgs, cluster: &ClusterClient) -> anyhow::Result<bool> {
    let served = cluster.list_models().await.map_err(|status| anyhow::anyhow!("{}", sentence(&status)))?;
    let asked = args.model.as_deref();
    let models = &served.base_models;
    let model = models.iter().find(|model| asked.is_none_or(|name| name == model.name));
    Ok(model.is_none_or(|model| model.has_chat_template))
}

fn guidance_of(args: &GuidanceArgs) -> Vec<GuidanceTerm> {
    let mut terms = Vec::new();
    if args.preference.is_some() || args.strength.is_some() || args.reward.is_some() {
        terms.push(GuidanceTerm {
            reward: args.reward.clone().unwrap_or_default(),
            preference: args.preference.as_ref().map(weights).unwrap_or_default(),
            strength: args.strength.unwrap_or(1.0),
        });
    }
    terms.extend(args.term.iter().cloned());
    terms
}

/// A preference as requests carry it.
pub fn weights(preference: &PreferenceSpec) -> Vec<(String, f32)> {
    preference.iter().map(|(name, weight)| (name.to_owned(), weight)).collect()
}

/// Guidance by a preference alone.
pub fn term(preference: Vec<(String, f32)>) -> GuidanceTerm {
    GuidanceTerm { reward: String::new(), preference, strength: 1.0 }
}

/// `reward=NAME,strength=W,objective=weight,…`
pub fn parse_term(text: &str) -> anyhow::Result<GuidanceTerm> {
    let mut term = GuidanceTerm { reward: String::new(), preference: Vec::new(), strength: 1.0 };
    let mut objectives = Vec::new();
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("reward", name)) => name.clone_into(&mut term.reward),
            Some(("strength", number)) => {
                term.strength = number.parse().context("strength wants a number")?
            }
            _ => objectives.push(part),
        }
    }
    if !objectives.is_empty() {
        term.preference = weights(&objectives.join(",").parse()?);
    }
    Ok(term)
}

fn sampling_of(args: &SamplingArgs) -> Sampling {
    Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        seed: args.seed,
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        stop_token_ids: args.stop_token_id.clone(),
        logprobs: args.logprobs,
        n: args.n,
        ignore_eos: args.ignore_eos,
    }
}

/// What a person should read of a status.
pub fn sentence(status: &Status) -> String {
    let retry = ErrorObject::from(status).retry_after_ms;
    let retry = retry.map_or(String::new(), |delay| format!("; try again in {delay} ms"));
    format!("{}{retry}", status.message())
}

fn footer(transcript: &Transcript) -> String {
    let summary = transcript.summary.clone().unwrap_or_default();
    let (usage, timing) = (summary.usage.unwrap_or_default(), summary.timing.unwrap_or_default());
    let exchange = summary.exchange.unwrap_or_default();
    let seconds = timing.total_ms / 1e3;
    let mut line = format!(
        "[{} tokens in {seconds:.1} s, {:.1}/s; first after {:.0} ms",
        usage.completion_tokens,
        f64::from(usage.completion_tokens) / seconds.max(1e-9),
        timing.first_token_ms
    );
    let guided = exchange.certified + exchange.queried + exchange.dense;
    if guided > 0 {
        let bytes = exchange.bytes as f64 / f64::from(guided);
        let share = 100.0 * f64::from(exchange.certified) / f64::from(guided);
        line.push_str(&format!("; {bytes:.0} bytes of reward per token, {share:.1} % certified"));
    }
    let speculation = summary.speculation.unwrap_or_default();
    if speculation.drafted > 0 {
        let passes = f64::from(speculation.base_passes) / f64::from(usage.completion_tokens.max(1));
        line.push_str(&format!("; {passes:.2} base passes per token"));
    }
    if usage.unguided_tokens > 0 {
        line.push_str(&format!("; {} tokens UNGUIDED", usage.unguided_tokens));
    }
    if !summary.audit.is_empty() {
        line.push_str(&format!("; record {}", hexadecimal(&summary.audit)));
    }
    line + "]"
}

fn as_json(transcript: &Transcript) -> serde_json::Value {
    let started = transcript.started.clone().unwrap_or_default();
    let summary = transcript.summary.clone().unwrap_or_default();
    let usage = summary.usage.unwrap_or_default();
    let mut object = json!({
        "request_id": started.request_id,
        "model": started.model,
        "seed": started.seed,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_prompt_tokens": usage.cached_prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "unguided_tokens": usage.unguided_tokens,
        },
    });
    let fields = object.as_object_mut().expect("it is an object");
    fields.extend(uniarm_openai::costs(&summary));
    if !summary.audit.is_empty() {
        fields.insert("audit".into(), json!(hexadecimal(&summary.audit)));
    }
    let empty = ChoiceTranscript::default();
    fields.extend(choice_fields(transcript.choices.first().unwrap_or(&empty)));
    if transcript.choices.len() > 1 {
        let choices =
            transcript.choices.iter().map(|choice| serde_json::Value::Object(choice_fields(choice)));
        fields.insert("choices".into(), choices.collect());
    }
    object
}

fn choice_fields(choice: &ChoiceTranscript) -> serde_json::Map<String, serde_json::Value> {
    let mut fields = serde_json::Map::new();
    fields.insert("tokens".into(), json!(choice.tokens));
    fields.insert("text".into(), json!(choice.text));
    fields.insert("finish_reason".into(), json!(choice.finished.as_ref().map(finish_reason_name)));
    if !choice.unguided.is_empty() {
        fields.insert("unguided".into(), json!(choice.unguided));
    }
    if !choice.details.is_empty() {
        fields.insert("logprobs".into(), choice.details.iter().map(detail_json).collect());
    }
    fields
}

fn detail_json(detail: &pb::TokenDetail) -> serde_json::Value {
    let alternative = |alternative: &pb::Alternative| {
        json!({
            "id": alternative.id,
            "text": alternative.text,
            "base_logprob": alternative.base_logprob,
            "reward_contribution": alternative.reward_contribution,
            "guided_logprob": alternative.guided_logprob,
        })
    };
    json!({
        "base_logprob": detail.base_logprob,
        "reward_contribution": detail.reward_contribution,
        "alternatives": detail.alternatives.iter().map(alternative).collect::<Vec<_>>(),
    })
}
