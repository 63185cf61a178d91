//! A reward model or classifier in a Hugging Face folder: `config.json`, `tokenizer.json`, `model.safetensors`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::Deserialize;
use tokenizers::{PostProcessor as _, Tokenizer};

use super::{
    Answer, Oracle, OracleError,
    encoder::{Encoder, EncoderConfig},
};

const FILES: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];
/// Bytes of the weights: BERT-large in f32 has 1.3 GB, and they are held in memory.
const WEIGHTS_BYTES_MAX: u64 = 8 << 30;

/// One logit of a sequence classifier, before any softmax: prompt and response are its two segments.
///
/// The prompt is the last message of the user. What is over the model's length is cut away token by token from the
/// longer segment: from the beginning of a prompt, from the end of a response. Never from one that has no token over.
pub struct Classifier {
    name: String,
    folder: PathBuf,
    tokenizer: Tokenizer,
    encoder: Encoder,
    /// Which logit.
    label: usize,
    tokens_max: usize,
}

/// The part of `config.json` that is about labels.
#[derive(Deserialize)]
struct Labels {
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<usize>,
}

// === impl Classifier ===

impl Classifier {
    /// `spec` is `FOLDER` or `FOLDER#LABEL`, where the label is a name of `config.json` or an index. A model of one logit
    /// needs none.
    ///
    /// # Errors
    /// [`OracleError::Io`], [`OracleError::Malformed`] for files; [`OracleError::Classifier`] for labels.
    pub fn open(spec: &str) -> Result<Self, OracleError> {
        let (folder, label) =
            spec.rsplit_once('#').map_or((spec, None), |(folder, label)| (folder, Some(label)));
        let folder = PathBuf::from(folder);
        let [config_file, tokenizer_file, weights_file] = FILES.map(|file| folder.join(file));
        let text = std::fs::read(&config_file).map_err(|error| io(&config_file, error))?;
        let config: EncoderConfig = serde_json::from_slice(&text).map_err(|error| {
            malformed(&config_file, &format!("{error}; wants a model of type bert or distilbert"))
        })?;
        let labels: Labels =
            serde_json::from_slice(&text).map_err(|error| malformed(&config_file, &error))?;
        check(&config).map_err(|reason| malformed(&config_file, &reason))?;
        let (count, label) = labels
            .choose(label)
            .map_err(|reason| OracleError::Classifier { folder: folder.clone(), reason })?;
        let tokenizer = read_tokenizer(&tokenizer_file, config.vocab_size)?;
        let encoder = read_weights(&weights_file, &config, count)?;
        // The markers of an empty pair.
        let markers = tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(true));
        if markers + 2 > config.max_position_embeddings {
            let reason = format!("max_position_embeddings: {} holds no text", config.max_position_embeddings);
            return Err(malformed(&config_file, &reason));
        }
        let name =
            folder.file_name().map_or_else(|| spec.to_owned(), |name| name.to_string_lossy().into_owned());
        let tokens_max = config.max_position_embeddings - markers;
        Ok(Self { name, folder, tokenizer, encoder, label, tokens_max })
    }

    /// All logits of one answer, and how many tokens were read.
    fn logits(&self, prompt: &str, response: &str) -> Result<(Vec<f32>, usize), String> {
        let encode = |text: &str| self.tokenizer.encode_fast(text, false).map_err(|error| error.to_string());
        let (mut prompt, mut response) = (encode(prompt)?, encode(response)?);
        let (kept_prompt, kept_response) =
            kept(prompt.get_ids().len(), response.get_ids().len(), self.tokens_max);
        prompt.truncate(kept_prompt, 0, tokenizers::TruncationDirection::Left);
        response.truncate(kept_response, 0, tokenizers::TruncationDirection::Right);
        let pair =
            self.tokenizer.post_process(prompt, Some(response), true).map_err(|error| error.to_string())?;
        let logits =
            self.encoder.forward(pair.get_ids(), pair.get_type_ids()).map_err(|error| error.to_string())?;
        Ok((logits, pair.get_ids().len()))
    }
}

impl Oracle for Classifier {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError> {
        let failed = |reason| OracleError::Classifier { folder: self.folder.clone(), reason };
        let score = |answer: &Answer<'_>| {
            let prompt = answer.messages.iter().rev().find(|message| message.role == "user");
            let prompt = prompt.map_or("", |message| message.content.as_str());
            let logit = self.logits(prompt, answer.response).map_err(failed)?.0[self.label];
            if !logit.is_finite() {
                return Err(failed(format!("a logit is {logit}; are the weights whole?")));
            }
            Ok(f64::from(logit))
        };
        answers.iter().map(score).collect()
    }
}

/// Tokens that stay of a prompt and a response: the longer one gives way, the prompt where both are equal.
fn kept(prompt: usize, response: usize, most: usize) -> (usize, usize) {
    if prompt + response <= most {
        return (prompt, response);
    }
    let half = most / 2;
    if response <= half {
        (most - response, response)
    } else if prompt <= half {
        (prompt, most - prompt)
    } else {
        (half, most - half)
    }
}

fn check(config: &EncoderConfig) -> Result<(), String> {
    let EncoderConfig { hidden_size, num_attention_heads: heads, .. } = *config;
    if heads == 0 || hidden_size == 0 || !hidden_size.is_multiple_of(heads) {
        return Err(format!("{hidden_size} hidden units are not divided by {heads} heads"));
    }
    Ok(())
}

fn read_tokenizer(file: &Path, vocabulary: usize) -> Result<Tokenizer, OracleError> {
    let bytes = std::fs::read(file).map_err(|error| io(file, error))?;
    // The library panics on some files, and a file is foreign data.
    let parsed = std::panic::catch_unwind(|| Tokenizer::from_bytes(&bytes));
    let parsed = parsed.map_err(|_| malformed(file, &"the file is corrupt"))?;
    let mut tokenizer = parsed.map_err(|error| malformed(file, &error))?;
    // Cutting is done here, where both segments are known.
    tokenizer.with_truncation(None).map_err(|error| malformed(file, &error))?;
    tokenizer.with_padding(None);
    let size = tokenizer.get_vocab_size(true);
    if size > vocabulary {
        let reason = format!("{size} tokens, but the model has rows for {vocabulary}");
        return Err(malformed(file, &reason));
    }
    Ok(tokenizer)
}

fn read_weights(file: &Path, config: &EncoderConfig, labels: usize) -> Result<Encoder, OracleError> {
    let size = std::fs::metadata(file).map_err(|error| io(file, error))?.len();
    if size > WEIGHTS_BYTES_MAX {
        return Err(malformed(file, &format!("{size} bytes; at most {WEIGHTS_BYTES_MAX}")));
    }
    let bytes = std::fs::read(file).map_err(|error| io(file, error))?;
    VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)
        .and_then(|weights| Encoder::load(config, labels, &weights))
        .map_err(|error| malformed(file, &error))
}

fn io(file: &Path, source: std::io::Error) -> OracleError {
    OracleError::Io { file: file.to_owned(), source }
}

fn malformed(file: &Path, reason: &dyn std::fmt::Display) -> OracleError {
    OracleError::Malformed { file: file.to_owned(), reason: reason.to_string() }
}

// === impl Labels ===

impl Labels {
    /// How many logits there are, and the index of the one that is asked for.
    fn choose(&self, asked: Option<&str>) -> Result<(usize, usize), String> {
        let named: Vec<(usize, &str)> = self
            .id2label
            .iter()
            .flatten()
            .filter_map(|(index, name)| Some((index.parse().ok()?, name.as_str())))
            .collect();
        // What `transformers` assumes of a file that says nothing.
        let count = self.id2label.as_ref().map(BTreeMap::len).or(self.num_labels).unwrap_or(2);
        let known = || {
            let names = named.iter().map(|(index, name)| format!("{index} = {name}"));
            format!("it has {count} labels: {}", names.collect::<Vec<_>>().join(", "))
        };
        let index = match asked {
            None if count == 1 => 0,
            None => return Err(format!("which label is the score? Write FOLDER#LABEL; {}", known())),
            Some(asked) => {
                let by_name = named.iter().find(|(_, name)| *name == asked).map(|(index, _)| *index);
                let found = by_name.or_else(|| asked.parse().ok()).filter(|index| *index < count);
                found.ok_or_else(|| format!("there is no label \"{asked}\"; {}", known()))?
            }
        };
        Ok((count, index))
    }
}

#[cfg(test)]
mod tests {
    use uniarm_model::Message;

    use super::*;

    /// What transformers 5.24 computes in float64 of the same text, cut to 64 tokens as is documented.
    #[derive(Deserialize)]
    struct Recorded {
        prompt: String,
        response: String,
        tokens: usize,
        logits: Vec<f64>,
    }

    fn golden(family: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
    }

    fn compare(family: &str, label: &str) {
        let folder = golden(family);
        let mut classifier = Classifier::open(&format!("{}{label}", folder.display())).unwrap();
        let text = std::fs::read(folder.join("recorded.json")).unwrap();
        let recorded: Vec<Recorded> = serde_json::from_slice(&text).unwrap();
        assert!(recorded.iter().any(|case| case.tokens == 64), "some are cut");
        for Recorded { prompt, response, tokens, logits } in recorded {
            let (found, read) = classifier.logits(&prompt, &response).unwrap();
            assert_eq!(read, tokens, "{prompt} / {response}");
            for (found, logit) in found.iter().zip(&logits) {
                assert!((f64::from(*found) - logit).abs() < 2e-5, "{family}: {found}, not {logit}");
            }
            let messages = [Message { role: "user".to_owned(), content: prompt }];
            let score = classifier.score(&[Answer { messages: &messages, response: &response }]).unwrap();
            assert!((score[0] - logits[classifier.label]).abs() < 2e-5);
        }
    }

    #[test]
    fn bert_gives_the_recorded_logit() {
        compare("bert", "");
    }

    #[test]
    fn distilbert_gives_the_recorded_logits_by_name_and_by_index() {
        compare("distilbert", "#positive");
        compare("distilbert", "#0");
    }

    #[test]
    fn the_longer_segment_gives_way() {
        let by_tokens = |mut prompt: usize, mut response: usize, most: usize| {
            while prompt + response > most {
                if prompt >= response { prompt -= 1 } else { response -= 1 }
            }
            (prompt, response)
        };
        for most in 1..12 {
            for prompt in 0..15 {
                for response in 0..15 {
                    assert_eq!(kept(prompt, response, most), by_tokens(prompt, response, most));
                }
            }
        }
    }

    #[test]
    fn labels_that_are_not_there_and_files_that_are_missing_are_named() {
        let reason = |spec: String| Classifier::open(&spec).err().unwrap().to_string();
        let distilbert = golden("distilbert").display().to_string();
        let which = reason(distilbert.clone());
        assert!(which.contains("Write FOLDER#LABEL; it has 3 labels: 0 = negative, 1 = neutral"), "{which}");
        assert!(reason(format!("{distilbert}#7")).contains("there is no label \"7\""));
        let folder = tempfile::tempdir().unwrap();
        assert!(reason(folder.path().display().to_string()).contains("config.json: No such file"));
        std::fs::write(folder.path().join("config.json"), r#"{"model_type": "roberta"}"#).unwrap();
        assert!(
            reason(folder.path().display().to_string()).contains("wants a model of type bert or distilbert")
        );
    }
}
