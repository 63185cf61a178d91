//! `uniarm adapters`: the catalogue that reward workers serve, and adapters made of adapters.

mod desired;
mod seen;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;
use uniarm_trainer::soup::{self, Ingredient};

use desired::{DigestArgs, ListArgs, PutArgs, RemoveArgs};

#[derive(Debug, Args)]
pub struct AdaptersArgs {
    #[command(subcommand)]
    command: AdaptersCommand,
}

#[derive(Debug, Subcommand)]
enum AdaptersCommand {
    /// Have the reward workers of a cluster serve an adapter, without a restart: the next version of its name
    Put(PutArgs),
    /// List the adapters that reward workers are to serve, and who does
    List(ListArgs),
    /// Take an adapter from new requests; what has begun with it goes on
    Remove(RemoveArgs),
    /// Print what an adapter's files are known by
    Digest(DigestArgs),
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

pub async fn run(args: AdaptersArgs) -> anyhow::Result<()> {
    match args.command {
        AdaptersCommand::Put(args) => desired::put(args).await,
        AdaptersCommand::List(args) => desired::list(args).await,
        AdaptersCommand::Remove(args) => desired::remove(args).await,
        AdaptersCommand::Digest(args) => desired::digest(&args),
        AdaptersCommand::Soup(args) => cook(&args),
    }
}

fn cook(SoupArgs { output, json, loras }: &SoupArgs) -> anyhow::Result<()> {
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
