//! `uniarm replay`: records of requests, computed again. A token is a function of models, request and position, so a
//! record of what was answered and what a cluster computes are equal to the bit, or one of them was changed.

mod compare;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Args;
use futures_util::{StreamExt as _, stream};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use uniarm_proto::{
    ClusterClient,
    digits::{from_hexadecimal, hexadecimal},
};
use uniarm_router::audit::{self, GENESIS, Hash, Link, Record};

use crate::client::{self, EndpointArgs};
use compare::{Verdict, judge};

/// Records that are computed at once: enough to fill a batch, few enough to be a guest.
const AT_ONCE: usize = 8;

/// Digits of a hash that a person is shown.
const DIGITS: usize = 12;

#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// A folder of records (a router's --audit-dir), or a file of one; repeatable
    #[arg(required = true, value_name = "RECORDS")]
    pub records: Vec<PathBuf>,
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Only requests of this id; repeatable
    #[arg(long, value_name = "ID")]
    pub request_id: Vec<String>,
    /// Only the record of this hash, which its client was given; repeatable. A hash that no record has is an error
    #[arg(long, value_name = "HASH")]
    pub receipt: Vec<String>,
    /// Check that no record was changed, moved or left out, and compute nothing
    #[arg(long)]
    pub chain_only: bool,
    /// Print one JSON object for each record, and one for all of them
    #[arg(long)]
    pub json: bool,
}

/// Which records are asked for.
struct Wanted {
    ids: Vec<String>,
    receipts: Vec<Hash>,
}

/// What came of all records.
#[derive(Default)]
struct Totals {
    records: usize,
    replayed: usize,
    tokens: usize,
    changed: usize,
    impossible: usize,
    found: Vec<Hash>,
    last: Option<Hash>,
}

pub async fn run(args: ReplayArgs) -> anyhow::Result<()> {
    let wanted = Wanted::of(&args)?;
    let cluster = match args.chain_only {
        true => None,
        false => Some(client::dial(&args.endpoint).await?),
    };
    let files = args.records.iter().map(|path| files_of(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let bytes =
        files.iter().flatten().filter_map(|path| fs::metadata(path).ok()).map(|file| file.len()).sum();
    let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new(bytes) };
    let style = ProgressStyle::with_template("{bar:24} {bytes} of {total_bytes}, {msg}{eta} left");
    bar.set_style(style.expect("it is a template"));
    let mut totals = Totals::default();
    for chain in &files {
        totals.last = None;
        for path in chain {
            let links = read(path, &mut totals, &bar)?;
            let links = links.into_iter().filter(|link| wanted.has(link)).collect::<Vec<_>>();
            totals.found.extend(links.iter().map(|link| link.hash));
            if let Some(cluster) = &cluster {
                replay(links, cluster, args.json, &mut totals, &bar).await;
            }
        }
    }
    bar.finish_and_clear();
    report(&args, &wanted, &totals)
}

/// The files of one chain, in order.
fn files_of(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let files = audit::files(path).with_context(|| path.display().to_string())?;
    if files.is_empty() {
        bail!("{}: holds no records (000001.jsonl, …); is it a router's --audit-dir?", path.display());
    }
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

/// The records of a file, which is to follow the one before.
fn read(path: &Path, totals: &mut Totals, bar: &ProgressBar) -> anyhow::Result<Vec<Link>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut links = Vec::new();
    // The router may be writing the last line just now.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for (index, line) in whole.lines().enumerate() {
        // The first file of a chain, and no later one, begins with what nothing comes before.
        let is_first = index == 0 && path.file_stem().is_some_and(|stem| stem == "000001");
        let previous = totals.last.or(is_first.then_some(GENESIS));
        let link = Link::read(line, previous.as_ref())
            .with_context(|| format!("{}, line {}", path.display(), index + 1))?;
        totals.last = Some(link.hash);
        totals.records += 1;
        links.push(link);
    }
    bar.inc((text.len() - whole.len()) as u64);
    if links.is_empty() {
        bar.inc(whole.len() as u64);
    }
    Ok(links)
}

async fn replay(
    links: Vec<Link>,
    cluster: &ClusterClient,
    as_json: bool,
    totals: &mut Totals,
    bar: &ProgressBar,
) {
    let share = links.iter().map(|link| tokens(&link.record)).sum::<usize>().max(1);
    let all = bar.length().unwrap_or(0).saturating_sub(bar.position());
    let judged = links.into_iter().map(|link| async move {
        let verdict = judge(&link.record, cluster).await;
        (link, verdict)
    });
    let mut judged = stream::iter(judged).buffered(AT_ONCE);
    while let Some((link, verdict)) = judged.next().await {
        totals.add(&link.record, &verdict);
        let line = if as_json { as_object(&link, &verdict).to_string() } else { as_line(&link, &verdict) };
        bar.suspend(|| println!("{line}"));
        bar.set_message(format!("{} requests, ", totals.replayed));
        bar.inc(all * tokens(&link.record) as u64 / share as u64);
    }
}

fn tokens(record: &Record) -> usize {
    record.answers.iter().map(|answer| answer.ids.len()).sum()
}

fn as_line(link: &Link, verdict: &Verdict) -> String {
    let Record { request_id, tenant, outcome, .. } = &link.record;
    let whose = if tenant.is_empty() { String::new() } else { format!(" of {tenant}") };
    let hash = &hexadecimal(&link.hash)[..DIGITS];
    let (word, rest) = match verdict {
        Verdict::Same => ("same", format!("{} tokens, {outcome}", tokens(&link.record))),
        Verdict::Changed(what) => ("CHANGED", what.clone()),
        Verdict::Impossible(why) => ("not tried", why.clone()),
    };
    format!("{word:<9} {hash} {request_id}{whose}: {rest}")
}

fn as_object(link: &Link, verdict: &Verdict) -> serde_json::Value {
    let (word, reason) = match verdict {
        Verdict::Same => ("same", None),
        Verdict::Changed(what) => ("changed", Some(what)),
        Verdict::Impossible(why) => ("impossible", Some(why)),
    };
    json!({
        "event": "record",
        "request_id": link.record.request_id,
        "tenant": link.record.tenant,
        "hash": hexadecimal(&link.hash),
        "tokens": tokens(&link.record),
        "verdict": word,
        "reason": reason,
    })
}

fn report(args: &ReplayArgs, wanted: &Wanted, totals: &Totals) -> anyhow::Result<()> {
    let Totals { records, replayed, tokens, changed, impossible, last, .. } = totals;
    if args.json {
        let last = last.map(|hash| hexadecimal(&hash));
        println!(
            "{}",
            json!({
                "event": "summary", "records": records, "replayed": replayed, "tokens": tokens,
                "changed": changed, "impossible": impossible, "last": last,
            })
        );
    } else {
        println!("{records} records, none changed, moved or left out of the chain");
        if let Some(last) = last {
            println!("the chain ends with {}", hexadecimal(last));
        }
        if !args.chain_only {
            println!(
                "{replayed} computed again, {tokens} tokens: {changed} differ, {impossible} could not be tried"
            );
        }
    }
    if let Some(receipt) = wanted.receipts.iter().find(|receipt| !totals.found.contains(receipt)) {
        let receipt = hexadecimal(receipt);
        bail!("no record has the hash {receipt}: it was left out, or made anew after it was changed");
    }
    if totals.found.is_empty() && *records > 0 {
        bail!("no record is of such a request; leave out --request-id to see all");
    }
    match (changed, impossible) {
        (0, 0) => Ok(()),
        (0, _) => bail!("{impossible} of {replayed} records could not be computed here"),
        _ => bail!("{changed} of {replayed} records are not what this cluster computes"),
    }
}

// === impl Wanted ===

impl Wanted {
    fn of(args: &ReplayArgs) -> anyhow::Result<Self> {
        let receipt = |text: &String| {
            let digits = 2 * GENESIS.len();
            from_hexadecimal(text)
                .with_context(|| format!("--receipt {text}: wants the {digits} hexadecimal digits of a hash"))
        };
        let receipts = args.receipt.iter().map(receipt).collect::<anyhow::Result<_>>()?;
        Ok(Self { ids: args.request_id.clone(), receipts })
    }

    fn has(&self, link: &Link) -> bool {
        let is_everything = self.ids.is_empty() && self.receipts.is_empty();
        is_everything || self.ids.contains(&link.record.request_id) || self.receipts.contains(&link.hash)
    }
}

// === impl Totals ===

impl Totals {
    fn add(&mut self, record: &Record, verdict: &Verdict) {
        self.replayed += 1;
        match verdict {
            Verdict::Same => self.tokens += tokens(record),
            Verdict::Changed(_) => self.changed += 1,
            Verdict::Impossible(_) => self.impossible += 1,
        }
    }
}
