//! `uniarm chat`: a conversation in the terminal, steered by the same flags as `generate`.

use std::io::{BufRead as _, IsTerminal as _};

use anyhow::{Context as _, bail};
use clap::Args;
use uniarm_proto::{ChatMessage, ClusterClient, Event, GenerateRequest, Input};

use crate::{
    args::{GuidanceArgs, SamplingArgs},
    client::{self, EndpointArgs},
    failure::sentence,
    generate, output, tint,
};

const HELP: &str = "\
/preference NAME=WEIGHT,…   answer by this preference from now on; without one, unguided
/system TEXT                begin again with this system message
/reset                      forget the conversation
/help                       this list
Ctrl-D ends it.";

#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Base model [default: the only one served]
    #[arg(long)]
    pub model: Option<String>,
    /// System message
    #[arg(long)]
    pub system: Option<String>,
    /// Colour each token by what guidance did to it
    #[arg(long)]
    pub color: bool,
    #[command(flatten)]
    pub guidance: GuidanceArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// A conversation so far.
struct Chat {
    cluster: ClusterClient,
    template: GenerateRequest,
    messages: Vec<ChatMessage>,
    system: Option<String>,
    color: bool,
}

pub async fn run(args: Box<ChatArgs>) -> anyhow::Result<()> {
    if args.sampling.n != 1 {
        bail!("-n wants 1 in a chat, which goes on from one answer; `uniarm generate -n` gives several");
    }
    if args.sampling.logprobs.is_some() {
        bail!("--logprobs has no place in a chat; `uniarm generate --json --logprobs` prints them");
    }
    let cluster = client::dial(&args.endpoint).await?;
    let mut template = generate::template(&args.guidance, &args.sampling);
    template.model = args.model.clone().unwrap_or_default();
    if args.color {
        template.sampling.logprobs.get_or_insert(1);
    }
    let mut chat =
        Chat { cluster, template, messages: Vec::new(), system: args.system.clone(), color: args.color };
    let is_terminal = std::io::stdin().is_terminal();
    if is_terminal {
        println!("{HELP}");
    }
    loop {
        if is_terminal {
            print!("\n> ");
            output::flush();
        }
        let mut line = String::new();
        let read = tokio::task::block_in_place(|| std::io::stdin().lock().read_line(&mut line));
        if read.context("cannot read standard input")? == 0 {
            return Ok(());
        }
        // A wrong command or a refused question is no reason to lose the conversation.
        if let Err(error) = chat.take(line.trim()).await {
            eprintln!("error: {}", sentence(&error));
        }
    }
}

// === impl Chat ===

impl Chat {
    async fn take(&mut self, line: &str) -> anyhow::Result<()> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "" => {}
            "/help" => println!("{HELP}"),
            "/reset" => self.messages.clear(),
            "/system" => {
                self.system = Some(rest.to_owned()).filter(|text| !text.is_empty());
                self.messages.clear();
            }
            "/preference" => self.prefer(rest)?,
            word if word.starts_with('/') => {
                let known = ["/preference", "/system", "/reset", "/help"];
                bail!("{word} is no command{}", uniarm_openai::did_you_mean(word, &known));
            }
            _ => self.ask(line).await?,
        }
        Ok(())
    }

    fn prefer(&mut self, text: &str) -> anyhow::Result<()> {
        if text.is_empty() {
            self.template.guidance.clear();
            return Ok(());
        }
        let preference = generate::weights(&text.parse()?);
        match self.template.guidance.first_mut() {
            Some(term) => term.preference = preference,
            None => self.template.guidance.push(generate::term(preference)),
        }
        Ok(())
    }

    async fn ask(&mut self, question: &str) -> anyhow::Result<()> {
        let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
        let system = self.system.as_ref().map(|text| message("system", text));
        let turn = message("user", question);
        let messages = system.into_iter().chain(self.messages.iter().cloned()).chain([turn.clone()]);
        let request = GenerateRequest { input: Input::Chat(messages.collect()), ..self.template.clone() };
        let color = self.color;
        let show = |event: &Event| {
            if let Event::Tokens(tokens) = event {
                let text = if color { tint::tinted(tokens) } else { tokens.text.clone() };
                print!("{text}");
                output::flush();
            }
        };
        let result = client::generate(&self.cluster, request, None, show).await;
        println!();
        let transcript = result.map_err(|status| anyhow::anyhow!("{}", generate::sentence(&status)))?;
        let answer = transcript.choices.first().map_or("", |choice| choice.text.as_str());
        self.messages.extend([turn, message("assistant", answer)]);
        Ok(())
    }
}
