//! `uniarm keys`: API keys of tenants.

use clap::Subcommand;
use uniarm_router::tenants::key::{KeyHash, draw};

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Draw a key: it is shown once, and the file of tenants (`uniarm router --tenants`) keeps its hash
    New {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

pub fn run(command: &KeysCommand) -> anyhow::Result<()> {
    let KeysCommand::New { json } = *command;
    let key = draw();
    let Some(hash) = KeyHash::of(&key) else { unreachable!("a drawn key is short") };
    if json {
        println!("{}", serde_json::json!({ "key": key, "hash": hash.to_string() }));
        return Ok(());
    }
    println!("key, for its holder (UNIARM_API_KEY, or the header authorization: Bearer KEY):\n\n    {key}\n");
    println!("hash, for `keys` of a tenant in the file of tenants:\n\n    \"{hash}\"");
    Ok(())
}
