//! What a shell may fill in: names that a running cluster serves, asked for where the flags' defaults and the environment say.

use std::{ffi::OsStr, io::Write, time::Duration};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser};
use clap_complete::{
    CompleteEnv, Shell,
    engine::{ArgValueCompleter, CompletionCandidate},
    env::Shells,
};
use uniarm_proto::pb::ListModelsResponse;

use crate::{
    args::Cli,
    client::{self, EndpointArgs},
};

/// With a shell's name in it, this program answers that shell instead of doing anything else.
const VARIABLE: &str = "UNIARM_COMPLETE";

/// Nobody waits longer for a key press.
const ANSWERED_WITHIN: Duration = Duration::from_millis(1000);

/// Flags that nobody has typed yet: their defaults, and the environment.
#[derive(Parser)]
struct Unsaid {
    #[command(flatten)]
    endpoint: EndpointArgs,
}

/// Answers a shell that asks, and ends; otherwise does nothing.
pub fn answer_shell() {
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).complete();
}

/// The script by which a shell asks.
pub fn write_script(shell: Shell, script: &mut impl Write) -> anyhow::Result<()> {
    let name = shell.to_string();
    let known = Shells::builtins();
    let completer = known.completer(&name).with_context(|| format!("no completions for {name}"))?;
    completer.write_registration(VARIABLE, "uniarm", "uniarm", "uniarm", script)?;
    if shell == Shell::Bash {
        writeln!(
            script,
            "# A preference, harmless=0.7,helpful=0.3, is one word.\nCOMP_WORDBREAKS=${{COMP_WORDBREAKS//=/}}"
        )?;
    }
    Ok(())
}

/// Of `--preference`: the objectives that are not there yet.
pub fn preference() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let served = served().unwrap_or_default();
        objectives(&served, &current.to_string_lossy())
    })
}

/// Of `--reward`.
pub fn reward() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let names = served().unwrap_or_default().reward_models.into_iter().map(|model| model.name);
        starting_with(names, &current.to_string_lossy())
    })
}

/// Of `uniarm adapters`: names that somebody serves a version of.
pub fn adapter() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let models = served().unwrap_or_default().reward_models.into_iter();
        let names = models.filter(|model| model.version > 0).map(|model| model.name);
        starting_with(names, &current.to_string_lossy())
    })
}

/// Of `--model`.
pub fn model() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let names = served().unwrap_or_default().base_models.into_iter().map(|model| model.name);
        starting_with(names, &current.to_string_lossy())
    })
}

fn starting_with(names: impl Iterator<Item = String>, begun: &str) -> Vec<CompletionCandidate> {
    names.filter(|name| name.starts_with(begun)).map(CompletionCandidate::new).collect()
}

fn objectives(served: &ListModelsResponse, current: &str) -> Vec<CompletionCandidate> {
    let (said, begun) = current.rsplit_once(',').map_or(("", current), |(said, begun)| (said, begun));
    let is_said = |name: &str| said.split(',').any(|part| part.split('=').next() == Some(name));
    let prefix = if said.is_empty() { String::new() } else { format!("{said},") };
    let objectives = served.reward_models.iter().flat_map(|model| &model.objectives);
    objectives
        .filter(|objective| objective.name.starts_with(begun) && !is_said(&objective.name))
        .map(|objective| {
            let value = format!("{prefix}{}=", objective.name);
            CompletionCandidate::new(value).help(Some(objective.description.clone().into()))
        })
        .collect()
}

/// What the cluster has; nothing where none answers in time.
fn served() -> Option<ListModelsResponse> {
    let endpoint = Unsaid::try_parse_from(["uniarm"]).ok()?.endpoint;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    runtime.block_on(async {
        let asked = async { client::dial(&endpoint).await.ok()?.list_models().await.ok() };
        tokio::time::timeout(ANSWERED_WITHIN, asked).await.ok().flatten()
    })
}

#[cfg(test)]
mod tests {
    use uniarm_proto::pb::{Objective, RewardModel};

    use super::*;

    #[test]
    fn objectives_follow_those_that_are_there() {
        let objective = |name: &str| Objective { name: name.to_owned(), description: String::new() };
        let objectives_served = ["harmless", "helpful", "humour"].map(objective).to_vec();
        let model = RewardModel { objectives: objectives_served, ..RewardModel::default() };
        let served = ListModelsResponse { reward_models: vec![model], ..ListModelsResponse::default() };
        let offered = |current: &str| -> Vec<String> {
            let found = objectives(&served, current);
            found.iter().map(|one| one.get_value().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(offered(""), ["harmless=", "helpful=", "humour="]);
        assert_eq!(offered("he"), ["helpful="]);
        assert_eq!(offered("helpful=0.3,h"), ["helpful=0.3,harmless=", "helpful=0.3,humour="]);
        assert!(offered("helpful=0.").is_empty());
    }
}
