//! Chat templates: the model's own Jinja source, rendered the way `transformers` renders it.

use std::io;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use minijinja_contrib::pycompat;

use crate::error::ModelError;
use crate::tokenizer::Tokenizer;

/// Instructions a template may take: some thousand messages' worth, a fraction of a second.
const FUEL: u64 = 20_000_000;
/// Bytes a prompt may have: far beyond any context, far below what hurts.
const PROMPT_BYTES_MAX: usize = 64 << 20;
/// Source bytes of a template; the largest published ones (tool calling) have some 10 KiB.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// Characters of nobody, of which one that no message has breaks the special tokens that messages spell.
const MARKS: std::ops::RangeInclusive<char> = '\u{e000}'..='\u{e0ff}';
const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    pub content: String,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// Passes on what fits the limit.
struct Bounded(Vec<u8>);

impl ChatTemplate {
    /// Compiles a template; `file` is named in errors. `bos_token` and `eos_token` are the written tokens.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] for a template that does not parse.
    pub(crate) fn new(
        file: &Path,
        source: &str,
        bos_token: String,
        eos_token: String,
    ) -> Result<Self, ModelError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(ModelError::malformed(file, format!("a chat template of {} bytes", source.len())));
        }
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.expect("only whitespace differs from the default syntax");
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime_template_date(&format));
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|error| ModelError::malformed(file, format!("chat template: {error:#}")))?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the assistant begins.
    ///
    /// # Errors
    /// [`ModelError::Template`] where the template refuses the messages, or takes too long.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ModelError> {
        let template = self.environment.get_template(NAME).expect("added on construction");
        let mut prompt = Bounded(Vec::new());
        let message = |message: &Message| context! { role => &*message.role, content => &*message.content };
        let context = context! {
            messages => messages.iter().map(message).collect::<Vec<Value>>(),
            add_generation_prompt,
            bos_token => &*self.bos_token,
            eos_token => &*self.eos_token,
            tools => (),
            documents => (),
        };
        let rendered = template.render_captured_to(context, &mut prompt);
        rendered.map_err(|error| ModelError::Template(sentence(&error)))?;
        Ok(String::from_utf8(prompt.0).expect("a template renders text"))
    }
}

// What people say is no token of the template's.
impl ChatTemplate {
    /// Token ids of a conversation's prompt. Special tokens are the template's own: where a message spells one, its text is
    /// read as text, or a user could end its turn and begin the system's.
    ///
    /// # Errors
    /// As of [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>, ModelError> {
        let spoken = || messages.iter().flat_map(|message| [&message.role, &message.content]);
        let spelled: Vec<&str> =
            tokenizer.specials().filter(|special| spoken().any(|text| text.contains(special))).collect();
        if spelled.is_empty() {
            return tokenizer.encode(&self.render(messages, true)?, false);
        }
        // A mark behind the first character of each breaks it; the text is then read in the pieces between the marks.
        let Some(mark) = MARKS.clone().find(|mark| !spoken().any(|text| text.contains(*mark))) else {
            return Err(ModelError::Template(
                "the messages spell special tokens in too many ways".to_owned(),
            ));
        };
        let broken = |text: &str| {
            spelled.iter().fold(text.to_owned(), |text, special| {
                let first = special.chars().next().map_or(0, char::len_utf8);
                text.replace(special, &format!("{}{mark}{}", &special[..first], &special[first..]))
            })
        };
        let messages: Vec<Message> = messages
            .iter()
            .map(|message| Message { role: broken(&message.role), content: broken(&message.content) })
            .collect();
        let rendered = self.render(&messages, true)?;
        let mut tokens = Vec::new();
        for piece in rendered.split(mark) {
            tokens.extend(tokenizer.encode(piece, false)?);
        }
        Ok(tokens)
    }
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > PROMPT_BYTES_MAX {
            return Err(io::Error::other(format!("the prompt exceeds {PROMPT_BYTES_MAX} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `transformers` marks the assistant's words with `{% generation %}` blocks, which only training reads. They
/// become conditions that hold, so that the whitespace control of their tags stays what it is.
fn without_generation_blocks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        text.push_str(before);
        text.push_str("{%");
        let word_at = tag.find(|c: char| c != '-' && c != '+' && !c.is_whitespace()).unwrap_or(tag.len());
        let (control, body) = tag.split_at(word_at);
        let word_end = body.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(body.len());
        let (word, after) = body.split_at(word_end);
        text.push_str(control);
        text.push_str(match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        });
        rest = after;
    }
    text.push_str(rest);
    text
}

/// The error and its causes in one line: what a template raises is meant for the client.
fn sentence(error: &Error) -> String {
    let mut sentence = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        _ => error.to_string(),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        sentence = format!("{sentence}: {error}");
        cause = error.source();
    }
    sentence
}

/// `strftime` of a day that never changes, 26 July 2024: the one that the templates of Llama 3.1 fall back to
/// where there is no clock. A prompt that depends on today could not be rendered again by the worker that
/// takes a request over after midnight, or stands in another time zone.
fn strftime_template_date(format: &str) -> String {
    let mut text = String::with_capacity(format.len());
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        // `%-d` is `%d` without padding.
        let mut directive = characters.next();
        let plain = directive == Some('-');
        if plain {
            directive = characters.next();
        }
        text.push_str(match directive {
            Some('d' | 'e') => "26",
            Some('m') if plain => "7",
            Some('m') => "07",
            Some('b' | 'h') => "Jul",
            Some('B') => "July",
            Some('Y') => "2024",
            Some('y') => "24",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('j') => "208",
            Some('F') => "2024-07-26",
            Some('H' | 'M' | 'S') if plain => "0",
            Some('H' | 'M' | 'S') => "00",
            Some('T' | 'X') => "00:00:00",
            Some('%') => "%",
            _ => "",
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let tokens = ("<s>".to_owned(), "</s>".to_owned());
        ChatTemplate::new(Path::new("model"), source, tokens.0, tokens.1).unwrap()
    }

    fn conversation(turns: &[(&str, &str)]) -> Vec<Message> {
        let message = |(role, content): &(&str, &str)| Message {
            role: (*role).to_owned(),
            content: (*content).to_owned(),
        };
        turns.iter().map(message).collect()
    }

    #[test]
    fn a_template_in_the_style_of_mistral_alternates_or_raises() {
        let template = template(
            "{{ bos_token }}{% for message in messages %}\n\
             {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n\
             {{ raise_exception('roles must alternate user/assistant') }}\n\
             {% endif %}\n\
             {% if message['role'] == 'user' %}\n\
             {{ '[INST] ' + message['content'].strip() + ' [/INST]' }}\n\
             {% else %}\n\
             {{ ' ' + message['content'] + eos_token }}\n\
             {%- endif %}\n\
             {% endfor %}",
        );
        let prompt = template.render(&conversation(&[("user", " Hi! "), ("assistant", "Ho")]), true).unwrap();
        assert_eq!(prompt, "<s>[INST] Hi! [/INST]\n Ho</s>");
        let error = template.render(&conversation(&[("assistant", "Ho")]), true).unwrap_err();
        assert_eq!(error.to_string(), "chat template: roles must alternate user/assistant");
    }

    #[test]
    fn a_template_in_the_style_of_llama_3_renders_the_same_every_day() {
        let template = template(
            "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}\n\
             {%- if tools is not none %}tools{%- endif %}\n\
             {%- if messages[0]['role'] == 'system' %}\n\
             {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}\n\
             {%- else %}{%- set system = '' %}{%- endif %}\n\
             {{- 'Today Date: ' + date + '\\n' + system }}\n\
             {%- for message in messages %}{{- '\\n<' + message.role + '>' + message.content.split('</think>')[-1] }}\n\
             {%- endfor %}{%- if add_generation_prompt %}{{- '\\n<assistant>' }}{%- endif %}",
        );
        let turns = conversation(&[("system", " Be brief. "), ("user", "Hi"), ("assistant", "hm</think>Ho")]);
        let prompt = template.render(&turns, true).unwrap();
        assert_eq!(prompt, "Today Date: 26 Jul 2024\nBe brief.\n<user>Hi\n<assistant>Ho\n<assistant>");
        assert!(!template.render(&turns, false).unwrap().ends_with("\n<assistant>"));
    }

    #[test]
    fn blocks_that_mark_generation_change_nothing() {
        let marked =
            "{%- for m in messages -%}\n{%- generation %}{{ m.content }}{%-endgeneration-%}\n{% endfor %}.";
        let plain = "{%- for m in messages -%}\n{%- if true %}{{ m.content }}{%-endif-%}\n{% endfor %}.";
        let turns = conversation(&[("user", " a "), ("assistant", "{% generation %}")]);
        let prompt = template(marked).render(&turns, false).unwrap();
        assert_eq!(prompt, template(plain).render(&turns, false).unwrap());
        assert_eq!(prompt, " a {% generation %}.");
    }

    #[test]
    fn text_is_not_escaped_and_not_a_template() {
        let template = template("{{ messages[0]['content'] }}");
        let text = "<b> & {{ bos_token }} \"q\" 中";
        assert_eq!(template.render(&conversation(&[("user", text)]), false).unwrap(), text);
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
        assert!(matches!(template(endless).render(&[], false), Err(ModelError::Template(_))));
    }

    #[test]
    fn a_template_that_does_not_parse_names_its_file() {
        let error = ChatTemplate::new(Path::new("chat_template.jinja"), "{% if %}", "".into(), "".into());
        assert!(error.err().unwrap().to_string().starts_with("chat_template.jinja: chat template"));
    }
}
