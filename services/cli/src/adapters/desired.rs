//! `uniarm adapters put`, `list`, `remove` and `digest`: what the store says that reward workers are to serve.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::json;
use tokio::time::{Instant, timeout, timeout_at};
use uniarm_cluster::{Adapters, MemberStore, NewAdapter, Snapshot, StoreAddress, StoreError};
use uniarm_model::AdapterFiles;
use uniarm_proto::{
    adapter::{check_adapter_name, versioned},
    digits::{from_hexadecimal, hexadecimal},
};
use uniarm_reward::adapters::RETIRED_KEPT;

use super::seen::{Row, Verdicts, rows};
use crate::{bounds, complete, store::StoreArgs};

/// A store that does not answer within this is not there.
const STORE_PATIENCE: Duration = Duration::from_secs(10);

/// Digits of a digest in a table: enough to tell two apart.
const DIGEST_DIGITS: usize = 12;

#[derive(Debug, Args)]
pub struct PutArgs {
    /// Name that requests use
    #[arg(add = complete::adapter())]
    name: String,
    /// Folder of the adapter, which every reward worker sees under this path
    source: String,
    /// SHA-256 over its files, where the folder is not on this machine: `uniarm adapters digest` prints it
    #[arg(long, value_name = "SHA256")]
    digest: Option<String>,
    /// Seconds to wait for reward workers that serve it; 0 waits for none
    #[arg(long, default_value_t = 30.0, value_parser = bounds::seconds)]
    wait: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Name of the adapter
    #[arg(add = complete::adapter())]
    name: String,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Args)]
pub struct DigestArgs {
    /// Folder of the adapter
    folder: PathBuf,
}

/// Puts a version, and waits for what reward workers make of it.
pub async fn put(args: PutArgs) -> anyhow::Result<()> {
    let store = open(&args.store)?;
    let new = args.adapter()?;
    let record = answer(&args.store, store.put_adapter(new)).await?;
    let version = record.newest().version;
    let named = versioned(&args.name, version);
    let verdicts = match args.wait > 0.0 {
        true => wait(&*store, &args.name, version, Duration::from_secs_f64(args.wait)).await,
        false => Verdicts::default(),
    };
    store.close().await;
    if args.json {
        let mut object = verdicts.as_json();
        object["name"] = json!(args.name);
        object["version"] = json!(version);
        println!("{object}");
    } else {
        println!("{named}");
        if !verdicts.serving.is_empty() {
            println!("served by {}", verdicts.serving.join(", "));
            explain(&verdicts);
        }
    }
    if args.wait > 0.0 && verdicts.serving.is_empty() {
        bail!("{}", nobody_serves(&named, &args, &verdicts));
    }
    Ok(())
}

pub async fn list(args: ListArgs) -> anyhow::Result<()> {
    let store = open(&args.store)?;
    let (adapters, members) = answer(&args.store, read(&*store)).await?;
    store.close().await;
    let rows = rows(&adapters, &members);
    match args.json {
        true => println!("{}", json!({ "adapters": rows.iter().map(as_json).collect::<Vec<_>>() })),
        false => print(&rows),
    }
    Ok(())
}

pub async fn remove(args: RemoveArgs) -> anyhow::Result<()> {
    let store = open(&args.store)?;
    let removed = store.remove_adapter(&args.name);
    let removed = match timeout(STORE_PATIENCE, removed).await {
        Ok(Err(StoreError::UnknownAdapter { name })) => {
            let (adapters, _) = answer(&args.store, read(&*store)).await?;
            let live = adapters.records().iter().filter(|record| !record.is_removed());
            let names: Vec<&str> = live.map(|record| record.name.as_str()).collect();
            match names.is_empty() {
                true => bail!(
                    "the catalogue has no adapter {name:?}, and no other; `--adapter` of a worker is not in it"
                ),
                false => bail!("the catalogue has no adapter {name:?}; it has {}", names.join(", ")),
            }
        }
        Ok(removed) => removed?,
        Err(_) => bail!("{}", silent(&args.store)),
    };
    store.close().await;
    println!(
        "{} is removed: new requests do not get it; streams that began with it go on, and workers keep it for {} more \
         minutes",
        versioned(&args.name, removed.newest().version),
        RETIRED_KEPT.as_secs() / 60
    );
    Ok(())
}

pub fn digest(args: &DigestArgs) -> anyhow::Result<()> {
    println!("{}", hexadecimal(&AdapterFiles::read(&args.folder)?.digest));
    Ok(())
}

// === impl PutArgs ===

impl PutArgs {
    /// What is put; its files are read, where they are on this machine.
    fn adapter(&self) -> anyhow::Result<NewAdapter> {
        check_adapter_name(&self.name)?;
        if self.source.contains("://") {
            bail!(
                "adapters are not fetched: download {} into a folder that every reward worker sees, and put that folder",
                self.source
            );
        }
        let said = match &self.digest {
            Some(text) => Some(from_hexadecimal(text).context("--digest wants 64 hexadecimal digits")?),
            None => None,
        };
        let Ok(folder) = std::fs::canonicalize(&self.source) else {
            let digest = said.with_context(|| {
                format!(
                    "no folder {} on this machine: run this where it is, such as in a reward worker's pod, or say its \
                     --digest, which `uniarm adapters digest FOLDER` prints there",
                    self.source
                )
            })?;
            if !self.source.starts_with('/') {
                bail!("{}: a folder that is elsewhere wants its whole path", self.source);
            }
            let (name, source) = (self.name.clone(), self.source.clone());
            return Ok(NewAdapter { name, source, digest, backbone: None });
        };
        let files = AdapterFiles::read(&folder)?;
        if said.is_some_and(|digest| digest != files.digest) {
            bail!("--digest: the files in {} have the digest {}", self.source, hexadecimal(&files.digest));
        }
        let fingerprint = |text: &String| {
            from_hexadecimal(text).with_context(|| {
                format!("backbone_fingerprint of {} is {text:?}, wants 64 hexadecimal digits", self.source)
            })
        };
        let source = folder.to_str().context("the folder's path is not UTF-8")?.to_owned();
        let backbone = files.backbone.as_ref().map(fingerprint).transpose()?;
        Ok(NewAdapter { name: self.name.clone(), source, digest: files.digest, backbone })
    }
}

fn open(args: &StoreArgs) -> anyhow::Result<Arc<dyn MemberStore>> {
    if args.parse()? == StoreAddress::Memory {
        bail!(
            "--store wants etcd://host:port, the store of the cluster's members: only they can serve its catalogue"
        );
    }
    args.open()
}

/// What the store says, in time.
async fn answer<T>(
    args: &StoreArgs,
    asked: impl Future<Output = Result<T, StoreError>>,
) -> anyhow::Result<T> {
    match timeout(STORE_PATIENCE, asked).await {
        Ok(answered) => Ok(answered?),
        Err(_) => bail!("{}", silent(args)),
    }
}

fn silent(args: &StoreArgs) -> String {
    format!(
        "the store {} does not answer within {STORE_PATIENCE:?}; is it the --store of the workers?",
        args.address
    )
}

/// The catalogue and the members, once both have been read.
async fn read(store: &dyn MemberStore) -> Result<(Arc<Adapters>, Arc<Snapshot>), StoreError> {
    let (mut adapters, mut members) = (store.watch_adapters(), store.watch());
    let adapters = adapters.wait_for(|adapters| adapters.revision() > 0).await.map(|read| read.clone());
    let members = members.wait_for(|members| members.revision() > 0).await.map(|read| read.clone());
    match (adapters, members) {
        (Ok(adapters), Ok(members)) => Ok((adapters, members)),
        _ => Err(StoreError::Closed),
    }
}

/// Until every reward worker has had its say, or for so long.
async fn wait(store: &dyn MemberStore, name: &str, version: u64, patience: Duration) -> Verdicts {
    let deadline = Instant::now() + patience;
    let mut members = store.watch();
    loop {
        let verdicts = Verdicts::of(&members.borrow_and_update(), name, version);
        if verdicts.are_all_in() || !matches!(timeout_at(deadline, members.changed()).await, Ok(Ok(()))) {
            return verdicts;
        }
    }
}

fn nobody_serves(named: &str, args: &PutArgs, verdicts: &Verdicts) -> String {
    let said: Vec<String> =
        verdicts.faults.iter().map(|(worker, fault)| format!("{worker}: {}", fault.reason)).collect();
    let name = &args.name;
    let next = format!(
        "put the files right, and workers try again; put other ones, as the next version; or take it back: `uniarm adapters \
         remove {name}`"
    );
    match (said.is_empty(), verdicts.silent.is_empty()) {
        (false, _) => format!("no reward worker serves {named}; {}; {next}", said.join("; ")),
        (true, false) => {
            let silent = verdicts.silent.join(", ");
            format!("no word of {named} within {} s from {silent}; {next}", args.wait)
        }
        (true, true) => format!(
            "{named} is in the catalogue, and no reward worker is in the store to serve it; start one with --store {}",
            args.store.address
        ),
    }
}

/// Who does not serve what others do.
fn explain(verdicts: &Verdicts) {
    for (worker, fault) in &verdicts.faults {
        println!("not by {worker}: {}", fault.reason);
    }
    if !verdicts.silent.is_empty() {
        println!("no word yet from {}", verdicts.silent.join(", "));
    }
}

fn print(rows: &[Row]) {
    if rows.is_empty() {
        return println!("no adapters; `uniarm adapters put NAME FOLDER` adds one");
    }
    println!("{:<24} {:<16} {:>7}  {:<DIGEST_DIGITS$}  SOURCE", "ADAPTER", "STATE", "WORKERS", "DIGEST");
    for row in rows {
        let (digest, source) = match &row.known {
            Some(known) => (known.digest_text(), known.source.clone()),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let digest = &digest[..DIGEST_DIGITS.min(digest.len())];
        let (named, workers) = (versioned(&row.name, row.version), row.verdicts.serving.len());
        println!("{named:<24} {:<16} {workers:>7}  {digest:<DIGEST_DIGITS$}  {source}", row.state);
    }
    for row in rows.iter().filter(|row| row.state == "current") {
        let named = versioned(&row.name, row.version);
        for (worker, fault) in &row.verdicts.faults {
            println!("{named} is not served by {worker}: {}", fault.reason);
        }
    }
}

fn as_json(row: &Row) -> serde_json::Value {
    let mut object = row.verdicts.as_json();
    object["name"] = json!(row.name);
    object["version"] = json!(row.version);
    object["state"] = json!(row.state);
    if let Some(known) = &row.known {
        object["source"] = json!(known.source);
        object["digest"] = json!(known.digest_text());
        object["backbone_fingerprint"] = json!(known.backbone.map(|backbone| hexadecimal(&backbone)));
        object["put_at_ms"] = json!(known.put_at_ms);
        object["retired_at_ms"] = json!(known.retired_at_ms);
    }
    object
}
