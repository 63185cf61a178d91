//! `uniarm adapters`: adapters made of adapters.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;
use uniarm_trainer::soup::{self, Ingredient};

#[derive(Debug, Args)]
pub struct AdaptersArgs {
    #[command(subcommand)]
    command: AdaptersCommand,
}

#[derive(Debug, Subcommand)]
enum AdaptersCommand {
    /// Mix plain LoRAs, one for each objective, into one adapter whose mean the preference of a request weighs
    Soup(SoupArgs),
}

#[derive(Debug, Args)]
struct SoupArgs {
    /// Folder of the new adapter
    #[arg(long)]
    output: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// An objective and the folder of its LoRA; the order is that of the preference
    #[arg(required = true, value_name = "OBJECTIVE=FOLDER", value_parser = ingredient)]
    loras: Vec<Ingredient>,
}

pub fn run(args: &AdaptersArgs) -> anyhow::Result<()> {
    let AdaptersCommand::Soup(SoupArgs { output, json, loras }) = &args.command;
    let soup = soup::cook(loras, output)?;
    if *json {
        let folder = output.display().to_string();
        println!("{}", json!({ "folder": folder, "rank": soup.rank, "modules": soup.modules }));
    } else {
        let count = loras.len();
        println!(
            "{}: {count} LoRAs, {} ranks together, {} linear layers",
            output.display(),
            soup.rank,
            soup.modules
        );
    }
    Ok(())
}

fn ingredient(text: &str) -> Result<Ingredient, String> {
    match text.split_once('=') {
        Some((objective, folder)) if !objective.is_empty() && !folder.is_empty() => {
            Ok(Ingredient { objective: objective.to_owned(), folder: folder.into() })
        }
        _ => Err("wants OBJECTIVE=FOLDER, such as positive=adapters/positive".to_owned()),
    }
}
