//! `uniarm label`: several answers to each prompt from a served model, scored by oracles, become preference pairs.
//!
//! The answers differ because the model is asked under several system texts (*styles*); the pairs are of the
//! conversation without them, so that training sees what serving will see.

mod pairing;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use uniarm_model::Message;
use uniarm_proto::{ChatMessage, GenerateRequest, Sampling};

use crate::{
    cluster_job::{self, Answer, Cluster, Identities, JobOptions, Journal, ModelsConfig, Question},
    oracle,
    prompts::{self, Prompt, PromptFormat},
    scoring::{self, ObjectiveConfig},
    whole_file,
};
use pairing::{Candidate, Paired};
pub use pairing::{PairingConfig, Prefer};

/// Samples of one style; more of the same distribution tell little.
const SAMPLES_MAX: u32 = 64;

/// A labelling, as its TOML file says it. Paths are relative to the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelConfig {
    /// The file of prompts.
    pub prompts: PathBuf,
    /// Which kind of file that is.
    #[serde(default)]
    pub format: PromptFormat,
    /// Of everything that is drawn: the answers, and which pairs stay.
    pub seed: u64,
    /// Answers to each prompt in each style.
    pub samples: u32,
    /// Of the answers.
    pub temperature: f32,
    /// Of the answers: the share of probability that tokens are drawn from.
    #[serde(default = "one")]
    pub top_p: f32,
    /// Tokens of an answer, at most.
    pub max_tokens: u32,
    /// What becomes of an answer that `max_tokens` cut off.
    #[serde(default)]
    pub unfinished: Unfinished,
    /// Ways of asking; each answers every prompt.
    pub styles: Vec<Style>,
    /// What the answers are scored for.
    pub objectives: Vec<ObjectiveConfig>,
    /// Which answers become pairs.
    #[serde(default)]
    pub pairs: PairingConfig,
    /// Which models answer.
    #[serde(default)]
    pub models: ModelsConfig,
}

/// A way of asking.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Style {
    /// What the summary calls it.
    pub name: String,
    /// System text; without it the conversation is asked as it is.
    pub system: Option<String>,
}

/// What becomes of an answer that `max_tokens` cut off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unfinished {
    /// Its pairs say that it is not finished, so that training does not learn to end where it was cut off.
    #[default]
    Keep,
    Drop,
}

/// What a labelling did: the file `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabelSummary {
    pub prompts: usize,
    pub answers: usize,
    /// Cut off by `max_tokens`.
    pub unfinished: usize,
    /// Empty ones, and unfinished ones under `unfinished = "drop"`.
    pub dropped_answers: usize,
    pub styles: Vec<StyleSummary>,
    #[serde(flatten)]
    pub pairing: pairing::PairingSummary,
}

/// Means over the answers of a style.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StyleSummary {
    pub name: String,
    pub tokens: f64,
    pub scores: Vec<f64>,
}

/// One answer to be sampled.
struct Planned {
    prompt: usize,
    style: usize,
    sample: u32,
}

/// A labelling with its files read.
struct Labelling<'a> {
    config: &'a LabelConfig,
    folder: &'a Path,
    prompts: Vec<Prompt>,
    plan: Vec<Planned>,
}

/// Samples, scores, pairs, and writes `answers.jsonl`, `pairs.jsonl` and `summary.json` into `out`.
///
/// # Errors
/// What is wrong with the configuration, a prompt, the cluster, an oracle or the disk. Answers so far are kept in
/// `out/journal.jsonl`, and the next call goes on from there.
pub async fn run(
    config: &LabelConfig,
    folder: &Path,
    out: &Path,
    identities: &Identities,
    cluster: &dyn Cluster,
    options: &JobOptions,
) -> anyhow::Result<LabelSummary> {
    config.check()?;
    let labelling = Labelling::new(config, folder)?;
    let mut journal = Journal::open(&out.join("journal.jsonl"))?;
    cluster_job::say_damaged(&journal);
    let questions = labelling.questions(identities);
    let answers = cluster_job::run(&questions, &mut journal, cluster, options).await?;
    labelling.finish(&answers, out, options.progress)
}

fn one() -> f32 {
    1.0
}

// === impl LabelConfig ===

impl LabelConfig {
    /// # Errors
    /// Names the file and the place, or the field that is wrong.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let config: Self = toml::from_str(&text).with_context(|| file.display().to_string())?;
        config.check().with_context(|| file.display().to_string())?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        if !(1..=SAMPLES_MAX).contains(&self.samples) {
            bail!("samples: is {}, wants 1 to {SAMPLES_MAX}", self.samples);
        }
        if self.styles.is_empty() {
            bail!("styles: is empty; one style without a system text asks the prompts as they are");
        }
        for (index, style) in self.styles.iter().enumerate() {
            if self.styles[..index].iter().any(|other| other.name == style.name) {
                bail!("styles[{index}].name: {:?} stands there twice", style.name);
            }
        }
        if self.styles.len() as u32 * self.samples < 2 {
            bail!("samples: one answer to a prompt makes no pair; ask for more, or add a style");
        }
        scoring::check(&self.objectives, 1)
    }
}

// === impl Labelling ===

impl<'a> Labelling<'a> {
    fn new(config: &'a LabelConfig, folder: &'a Path) -> anyhow::Result<Self> {
        let prompts = prompts::read(&folder.join(&config.prompts), config.format)?;
        let mut plan = Vec::new();
        for prompt in 0..prompts.len() {
            for style in 0..config.styles.len() {
                plan.extend((0..config.samples).map(|sample| Planned { prompt, style, sample }));
            }
        }
        Ok(Self { config, folder, prompts, plan })
    }

    fn questions(&self, identities: &Identities) -> Vec<Question> {
        let question = |planned: &Planned| {
            let request = self.request(planned);
            Question { key: identities.key(&request), request, origin: self.origin(planned) }
        };
        self.plan.iter().map(question).collect()
    }

    fn request(&self, planned: &Planned) -> GenerateRequest {
        let Planned { prompt, style, sample } = planned;
        let (prompt, style) = (&self.prompts[*prompt], &self.config.styles[*style]);
        let messages = styled(&prompt.messages, style.system.as_deref());
        let mut reasons = vec![style.name.clone(), sample.to_string()];
        reasons.extend(prompt.messages.iter().map(|message| message.content.clone()));
        let reasons: Vec<&str> = reasons.iter().map(String::as_str).collect();
        let sampling = Sampling {
            temperature: self.config.temperature,
            top_p: self.config.top_p,
            seed: Some(cluster_job::seed(self.config.seed, &reasons)),
            max_tokens: self.config.max_tokens,
            ..Sampling::default()
        };
        cluster_job::chat_request(messages, sampling)
    }

    fn origin(&self, planned: &Planned) -> String {
        let (file, line) = (self.config.prompts.display(), self.prompts[planned.prompt].line);
        format!(
            "{file}:{line}, style {:?}, sample {}",
            self.config.styles[planned.style].name, planned.sample
        )
    }

    fn finish(&self, answers: &[Answer], out: &Path, progress: bool) -> anyhow::Result<LabelSummary> {
        let kept: Vec<Option<&str>> = answers.iter().map(|answer| self.usable(answer)).collect();
        let used: Vec<usize> = (0..answers.len()).filter(|index| kept[*index].is_some()).collect();
        let asked = |index: &usize| oracle::Answer {
            messages: &self.prompts[self.plan[*index].prompt].messages,
            response: kept[*index].unwrap_or_default(),
        };
        let scored: Vec<oracle::Answer<'_>> = used.iter().map(asked).collect();
        let origin = |index: usize| self.origin(&self.plan[used[index]]);
        let scores = scoring::score_all(&self.config.objectives, self.folder, &scored, origin, progress)?;

        let candidates: Vec<Candidate<'_>> = used
            .iter()
            .zip(&scores)
            .map(|(index, scores)| Candidate {
                prompt: self.plan[*index].prompt,
                response: kept[*index].unwrap_or_default(),
                finished: answers[*index].is_finished(),
                scores,
            })
            .collect();
        let paired = pairing::pair(&candidates, &self.config.pairs, self.config.seed);
        let summary = LabelSummary {
            prompts: self.prompts.len(),
            answers: answers.len(),
            unfinished: answers.iter().filter(|answer| !answer.is_finished()).count(),
            dropped_answers: answers.len() - used.len(),
            styles: self.style_summaries(answers, &used, &scores),
            pairing: paired.summary.clone(),
        };
        whole_file::write(&out.join("answers.jsonl"), &self.answer_lines(answers, &used, &scores))?;
        whole_file::write(&out.join("pairs.jsonl"), &self.pair_lines(&candidates, &paired))?;
        let text = serde_json::to_string_pretty(&summary).context("a summary is JSON")? + "\n";
        whole_file::write(&out.join("summary.json"), text.as_bytes())?;
        Ok(summary)
    }

    /// What of an answer training may see.
    fn usable<'t>(&self, answer: &'t Answer) -> Option<&'t str> {
        let text = answer.text.trim();
        let kept = answer.is_finished() || self.config.unfinished == Unfinished::Keep;
        (kept && !text.is_empty()).then_some(text)
    }

    fn style_summaries(&self, answers: &[Answer], used: &[usize], scores: &[Vec<f64>]) -> Vec<StyleSummary> {
        let of_style = |style: usize| {
            let own: Vec<usize> =
                (0..used.len()).filter(|place| self.plan[used[*place]].style == style).collect();
            let mean = |value: &dyn Fn(usize) -> f64| {
                own.iter().map(|place| value(*place)).sum::<f64>() / own.len().max(1) as f64
            };
            StyleSummary {
                name: self.config.styles[style].name.clone(),
                tokens: mean(&|place| f64::from(answers[used[place]].tokens)),
                scores: (0..self.config.objectives.len())
                    .map(|objective| mean(&|place| scores[place][objective]))
                    .collect(),
            }
        };
        (0..self.config.styles.len()).map(of_style).collect()
    }

    /// Every answer, in the order of the plan, with its scores where it was usable.
    fn answer_lines(&self, answers: &[Answer], used: &[usize], scores: &[Vec<f64>]) -> Vec<u8> {
        let mut places = used.iter().zip(scores).peekable();
        let mut lines = Vec::new();
        for (index, (planned, answer)) in self.plan.iter().zip(answers).enumerate() {
            let mut line = json!({
                "prompt_id": self.prompts[planned.prompt].id,
                "style": self.config.styles[planned.style].name,
                "sample": planned.sample,
                "response": answer.text,
                "tokens": answer.tokens,
                "finish_reason": answer.finish_reason,
            });
            if let Some((_, scores)) = places.next_if(|(used, _)| **used == index) {
                for (objective, score) in self.config.objectives.iter().zip(scores) {
                    line["scores"][&objective.name] = json!(score);
                }
            }
            lines.extend(format!("{line}\n").into_bytes());
        }
        lines
    }

    fn pair_lines(&self, candidates: &[Candidate<'_>], paired: &Paired) -> Vec<u8> {
        let mut lines = Vec::new();
        for [a, b] in &paired.pairs {
            let (a, b) = (&candidates[*a], &candidates[*b]);
            let messages: Vec<_> = self.prompts[a.prompt]
                .messages
                .iter()
                .map(|message| json!({ "role": message.role, "content": message.content }))
                .collect();
            let mut line = json!({
                "messages": messages,
                "response_a": a.response,
                "response_b": b.response,
            });
            if !(a.finished && b.finished) {
                line["finished"] = json!({ "a": a.finished, "b": b.finished });
            }
            for (index, objective) in self.config.objectives.iter().enumerate() {
                line["scores"][&objective.name] = json!({ "a": a.scores[index], "b": b.scores[index] });
            }
            lines.extend(format!("{line}\n").into_bytes());
        }
        lines
    }
}

/// A conversation under another system text.
fn styled(messages: &[Message], system: Option<&str>) -> Vec<ChatMessage> {
    let own = messages.iter().filter(|message| system.is_none() || message.role != "system");
    let own = own.map(|message| ChatMessage { role: message.role.clone(), content: message.content.clone() });
    let system = system.map(|text| ChatMessage { role: "system".into(), content: text.to_owned() });
    system.into_iter().chain(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_style_replaces_the_system_text_and_nothing_else() {
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let messages = [message("system", "Be kind."), message("user", "Hi")];
        let texts = |system| -> Vec<String> {
            styled(&messages, system).into_iter().map(|message| message.content).collect()
        };
        assert_eq!(texts(None), ["Be kind.", "Hi"]);
        assert_eq!(texts(Some("Be brief.")), ["Be brief.", "Hi"]);
    }
}
