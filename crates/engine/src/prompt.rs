//! From what a request says to the token ids that one model reads.

use uniarm_model::{ChatTemplate, Message, ModelError, Tokenizer};

/// What stands between a prompted reward model's system text and a raw prompt, which has no template to put it in.
const SYSTEM_SEPARATOR: &str = "\n\n";

/// A prompt before it is rendered.
#[derive(Debug, Clone, Copy)]
pub enum Prompt<'a> {
    /// Raw text, no template.
    Text(&'a str),
    /// Rendered with the model's own template.
    Chat(&'a [Message]),
    Tokens(&'a [u32]),
}

/// How one model reads prompts.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    /// Ids at and above it have no logits.
    pub vocabulary: usize,
}

/// Why a prompt cannot be read: a sentence about the request's `input`.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    #[error("the model has no chat template; send a raw prompt or token ids")]
    NoTemplate,
    #[error("token id {id} at index {index} is outside the vocabulary of {vocabulary}")]
    TokenOutside { id: u32, index: usize, vocabulary: usize },
    #[error("the prompt has no tokens")]
    Empty,
    #[error(transparent)]
    Model(#[from] ModelError),
}

// === impl Reader ===

impl Reader<'_> {
    /// Token ids of `prompt`. With `system`, that text takes the place of the request's own system messages:
    /// how a prompted reward model sees the request.
    ///
    /// # Errors
    /// When the model cannot read such a prompt, or an id is outside its vocabulary.
    pub fn read(&self, prompt: Prompt<'_>, system: Option<&str>) -> Result<Vec<u32>, PromptError> {
        let tokens = match prompt {
            Prompt::Text(text) => match system {
                None => self.tokenizer.encode(text, true)?,
                Some(system) => self.tokenizer.encode(&format!("{system}{SYSTEM_SEPARATOR}{text}"), true)?,
            },
            Prompt::Chat(messages) => {
                let template = self.template.ok_or(PromptError::NoTemplate)?;
                match system {
                    None => template.encode(self.tokenizer, messages)?,
                    Some(system) => template.encode(self.tokenizer, &with_system(messages, system))?,
                }
            }
            Prompt::Tokens(ids) => match system {
                None => ids.to_vec(),
                Some(system) => {
                    let mut tokens = self.tokenizer.encode(&format!("{system}{SYSTEM_SEPARATOR}"), true)?;
                    tokens.extend_from_slice(ids);
                    tokens
                }
            },
        };
        if let Some((index, id)) = tokens.iter().enumerate().find(|(_, id)| **id as usize >= self.vocabulary)
        {
            return Err(PromptError::TokenOutside { id: *id, index, vocabulary: self.vocabulary });
        }
        if tokens.is_empty() {
            return Err(PromptError::Empty);
        }
        Ok(tokens)
    }
}

fn with_system(messages: &[Message], system: &str) -> Vec<Message> {
    let own = Message { role: "system".into(), content: system.into() };
    std::iter::once(own).chain(messages.iter().filter(|m| m.role != "system").cloned()).collect()
}
