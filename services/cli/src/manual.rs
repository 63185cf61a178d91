//! `uniarm completions` and `uniarm man`: what a shell and a reader want to know of the command line.

mod reference;
mod schema;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::{args::Cli, complete, output};

#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// The shell: `uniarm completions bash > /etc/bash_completion.d/uniarm`
    pub shell: Shell,
}

#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// Write a page for each subcommand into this folder, instead of one page to standard output
    #[arg(long)]
    pub folder: Option<PathBuf>,
    /// Print the reference of options, files and variables instead (docs/configuration.md)
    #[arg(long, conflicts_with = "folder")]
    pub reference: bool,
}

pub fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    complete::write_script(args.shell, &mut script)?;
    output::say_bytes(&script);
    Ok(())
}

pub fn man(args: &ManArgs) -> anyhow::Result<()> {
    if args.reference {
        output::say_bytes(reference::page(Cli::command()).as_bytes());
        return Ok(());
    }
    match &args.folder {
        Some(folder) => std::fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
            .with_context(|| format!("cannot write pages into {}", folder.display())),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            output::say_bytes(&page);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subcommand_has_a_page_and_every_shell_a_script() {
        let folder = tempfile::tempdir().unwrap();
        man(&ManArgs { folder: Some(folder.path().to_owned()), reference: false }).unwrap();
        for command in Cli::command().get_subcommands() {
            let page = folder.path().join(format!("uniarm-{}.1", command.get_name()));
            assert!(page.exists(), "{} is missing", page.display());
        }
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
            let mut script = Vec::new();
            complete::write_script(shell, &mut script).unwrap();
            assert!(String::from_utf8(script).unwrap().contains("UNIARM_COMPLETE"), "{shell}");
        }
    }
}
