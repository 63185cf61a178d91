//! docs/configuration.md: every option, every field of every file and every variable, out of the code that reads them.

use std::fmt::{Result, Write as _};

use clap::{Arg, ArgAction, Command};
use uniarm_trainer::{evaluate::EvalConfig, label::LabelConfig, train::config::TrainConfig};

use super::schema::Tables;

const OPENING: &str = "# Configuration

Every option of every subcommand, every field of every file, every variable. Written out of the code by

```console
$ uniarm man --reference >docs/configuration.md
```

and a test fails while the two differ. What the options are for is said elsewhere: [README](../README.md), [kubernetes](kubernetes.md), [tenants](tenants.md), \
[tls](tls.md), [shards](shards.md), [batch](batch.md), [training](training.md), [simulate](simulate.md).

An option wins over its variable, and a variable over the default. A variable that is a switch is on when it is `true`; one of an option \
that may be repeated has its values between commas.
";

/// Variables that no option stands for: name, who reads it, what it says.
const VARIABLES: [(&str, &str, &str); 12] = [
    (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "every role",
        "the collector of traces, where `--otlp-endpoint` names none",
    ),
    ("HF_HUB_CACHE", "`hf://` models", "the folder that they are kept in"),
    ("HF_HOME", "`hf://` models", "its folder `hub`, where HF_HUB_CACHE is not set"),
    ("XDG_CACHE_HOME", "`hf://` models", "its folder `huggingface/hub`, where HF_HOME is not set either"),
    ("HOME", "`hf://` models, the demo model", "its folder `.cache`, where none of these is set"),
    ("HF_HUB_OFFLINE", "`hf://` models", "anything but `0`: nothing is fetched, what is cached must do"),
    ("HF_ENDPOINT", "`hf://` models", "another hub than https://huggingface.co"),
    ("HF_TOKEN", "`hf://` models", "a token for models that ask for one"),
    ("UNIARM_DEMO_MODEL", "`up`, `demo`", "a file that is the demo model: nothing is fetched"),
    ("UNIARM_CACHE", "`up`, `demo`", "the folder that the demo model is kept in"),
    ("UNIARM_COMPLETE", "shells", "set by the scripts of `uniarm completions` alone"),
    ("COLUMNS", "`generate --compare`, `demo`", "characters of a line of the terminal"),
];

/// The whole page.
pub fn page(mut command: Command) -> String {
    command.build();
    let mut page = String::from(OPENING);
    write_page(&mut page, &command).expect("writing to a string cannot fail");
    page
}

fn write_page(page: &mut String, command: &Command) -> Result {
    writeln!(page, "\n## Command line")?;
    for subcommand in subcommands(command) {
        write_command(page, subcommand)?;
    }
    writeln!(page, "\n## Files\n\nTOML. A field that is not listed is refused.")?;
    let files = [
        ("Tenants", "`--tenants` ([docs/tenants.md](tenants.md))", uniarm_router::tenants::file_schema()),
        ("Training", "`uniarm train` ([docs/training.md](training.md))", schemars::schema_for!(TrainConfig)),
        ("Labelling", "`uniarm label` ([docs/training.md](training.md))", schemars::schema_for!(LabelConfig)),
        ("Evaluation", "`uniarm eval` ([docs/training.md](training.md))", schemars::schema_for!(EvalConfig)),
    ];
    for (title, reader, schema) in files {
        writeln!(page, "\n### {title}\n\nRead by {reader}.")?;
        Tables::of(schema.as_value()).write(page)?;
    }
    writeln!(page, "\n## Variables besides\n\n| variable | read for | says |\n|---|---|---|")?;
    for (name, reader, says) in VARIABLES {
        writeln!(page, "| `{name}` | {reader} | {says} |")?;
    }
    Ok(())
}

/// All that can be called, in the order of the help.
fn subcommands(command: &Command) -> Vec<&Command> {
    let own = command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help");
    own.flat_map(|sub| std::iter::once(sub).chain(subcommands(sub))).collect()
}

fn write_command(page: &mut String, command: &Command) -> Result {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    writeln!(page, "\n### {name}\n")?;
    if let Some(about) = command.get_about() {
        writeln!(page, "{}.", line(&about.to_string()))?;
    }
    let arguments: Vec<&Arg> = command.get_arguments().filter(|argument| is_own(argument)).collect();
    if !arguments.is_empty() {
        writeln!(page, "\n| option | variable | default | |\n|---|---|---|---|")?;
    }
    for argument in arguments {
        let variable = argument.get_env().map_or_else(String::new, |name| code(&name.to_string_lossy()));
        let defaults = argument.get_default_values().iter();
        let takes_value = argument.get_action().takes_values();
        let defaults: Vec<_> =
            defaults.filter(|_| takes_value).map(|value| code(&value.to_string_lossy())).collect();
        let default = if argument.is_required_set() { "required".to_owned() } else { defaults.join(" ") };
        let option = spelling(argument);
        writeln!(page, "| {option} | {variable} | {default} | {} |", explanation(argument))?;
    }
    Ok(())
}

fn is_own(argument: &Arg) -> bool {
    let shows = matches!(
        argument.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    );
    !shows && !argument.is_hide_set()
}

/// `--flag VALUE`, `-f`, or `NAME`.
fn spelling(argument: &Arg) -> String {
    let names = argument.get_value_names().unwrap_or_default();
    let values: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
    let values = if argument.get_action().takes_values() { values.join(" ") } else { String::new() };
    let long = argument.get_long().map(|long| format!("--{long}"));
    let short = argument.get_short().map(|short| format!("-{short}"));
    let flags: Vec<String> = short.into_iter().chain(long).collect();
    code(format!("{} {values}", flags.join(", ")).trim())
}

/// The help text, and the values where there are few.
fn explanation(argument: &Arg) -> String {
    let help = argument.get_long_help().or_else(|| argument.get_help());
    let mut text = help.map_or_else(String::new, |help| line(&help.to_string()));
    let shown = |value: &clap::builder::PossibleValue| !value.is_hide_set();
    let values: Vec<String> = match argument.get_action().takes_values() {
        true => argument.get_possible_values().iter().filter(|value| shown(value)).map(possible).collect(),
        false => Vec::new(),
    };
    if !values.is_empty() {
        text = format!("{text}: {}", values.join(", "));
    }
    text
}

fn possible(value: &clap::builder::PossibleValue) -> String {
    let help = value.get_help().map_or_else(String::new, |help| format!(" ({})", line(&help.to_string())));
    format!("{}{help}", code(value.get_name()))
}

/// One line, in which nothing ends a cell of a table.
pub(super) fn line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|").replace('<', "&lt;")
}

pub(super) fn code(text: &str) -> String {
    format!("`{}`", text.replace('|', "\\|"))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path, process::Command as Program};

    use clap::CommandFactory as _;

    use super::*;
    use crate::args::Cli;

    fn repository() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
    }

    #[test]
    fn the_page_in_docs_is_what_the_code_says() {
        let page = page(Cli::command());
        let written = std::fs::read_to_string(repository().join("docs/configuration.md")).unwrap_or_default();
        let differs = page.lines().zip(written.lines()).position(|(code, docs)| code != docs);
        assert!(
            page == written,
            "docs/configuration.md is not what the code says, from line {} on: write it anew with \
             `cargo run --release -- man --reference >docs/configuration.md`",
            differs.unwrap_or_else(|| page.lines().count().min(written.lines().count())) + 1
        );
    }

    #[test]
    fn nothing_is_without_an_explanation() {
        let page = page(Cli::command());
        let mute: Vec<&str> = page.lines().filter(|row| row.ends_with("|  |")).collect();
        assert!(
            mute.is_empty(),
            "give each of these a doc comment where it is declared:\n{}",
            mute.join("\n")
        );
        for (what, row) in [
            ("an option", "| `--admin-cert FILE` | `UNIARM_ADMIN_CERT` |"),
            ("a default", "| `--list-length LIST_LENGTH` | `UNIARM_LIST_LENGTH` | `32` |"),
            ("values", "`certified`, `dense`"),
            ("a subcommand of a subcommand", "### uniarm keys new"),
            ("a field of a file", "| `requests_per_minute` | whole number |"),
            ("a table within a file", "`[optimizer]`"),
        ] {
            assert!(page.contains(row), "{what} is missing: {row}");
        }
    }

    /// Names in capitals in what reads the environment by itself.
    #[test]
    fn variables_that_the_code_reads_are_on_the_page() {
        let files = Program::new("git").args(["ls-files", "*.rs"]).current_dir(repository()).output();
        let Ok(files) = files else { return println!("skipped: no git") };
        let mut read = BTreeSet::new();
        for file in String::from_utf8(files.stdout).unwrap().lines() {
            let is_product =
                (file.starts_with("services/") || file.starts_with("crates/")) && file.contains("/src/");
            if !is_product || file.ends_with("testing.rs") || file.ends_with("/tests.rs") {
                continue;
            }
            let text = std::fs::read_to_string(repository().join(file)).unwrap_or_default();
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            if text.contains("env::var") || text.contains("CompleteEnv") {
                let is_name = |word: &&str| {
                    let is_capital = |letter: char| letter.is_ascii_uppercase() || letter == '_';
                    // Cargo's are read when the binary is built.
                    word.len() > 3 && word.chars().all(is_capital) && !word.starts_with("CARGO_")
                };
                read.extend(text.split('"').skip(1).step_by(2).filter(is_name).map(str::to_owned));
            }
        }
        assert!(read.contains("HF_TOKEN"), "the search finds nothing: {read:?}");
        for name in read {
            assert!(
                VARIABLES.iter().any(|(known, _, _)| *known == name),
                "{name} is read and not explained: add it to VARIABLES in services/cli/src/manual/reference.rs"
            );
        }
    }
}
