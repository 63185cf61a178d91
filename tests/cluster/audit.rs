//! Records of requests: what was kept is what a cluster computes again, and whoever changes a record is found out.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use tonic::Request;
use uniarm_cluster::testing::EtcdServer;
use uniarm_proto::{Event, GenerateRequest, OnRewardLoss, digits::hexadecimal, pb};
use uniarm_router::audit::{Link, Record};

use crate::{
    harness::{Cluster, PROMPTED, Running, ask, free_address, knows_its_workers, machine, request, worker},
    http::post_as,
};

/// Whether it went well, its lines as JSON, and what it said went wrong.
fn replay(records: &Path, router: &str, flags: &[&str]) -> (bool, Vec<Value>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_uniarm"))
        .args(["replay", records.to_str().unwrap(), "--json", "--endpoint", &format!("http://{router}")])
        .args(flags)
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (output.status.success(), lines, String::from_utf8(output.stderr).unwrap())
}

fn file(folder: &Path) -> PathBuf {
    folder.join("000001.jsonl")
}

fn links(folder: &Path) -> Vec<Link> {
    let text = fs::read_to_string(file(folder)).unwrap();
    text.lines().map(|line| Link::read(line, None).unwrap()).collect()
}

/// Records with the changes of whoever may write the file: in a chain that is whole again.
fn forge(folder: &Path, change: impl Fn(&mut Record)) {
    let mut previous = [0_u8; 32].to_vec();
    let mut text = String::new();
    for mut link in links(folder) {
        change(&mut link.record);
        let record = serde_json::to_string(&link.record).unwrap();
        let both = [previous.as_slice(), record.as_bytes()].concat();
        let hash = ring::digest::digest(&ring::digest::SHA256, &both).as_ref().to_vec();
        let [before, own] = [&previous, &hash].map(|hash| hexadecimal(hash));
        text += &format!("{{\"previous\":\"{before}\",\"hash\":\"{own}\",\"record\":{record}}}\n");
        previous = hash;
    }
    fs::write(file(folder), text).unwrap();
}

fn audited(prompt: &str, id: &str) -> GenerateRequest {
    let mut audited = request(prompt, &[("positive", 0.7), ("concise", 0.3)]);
    (audited.audit, audited.request_id) = (true, id.into());
    audited.sampling.temperature = 0.9;
    audited.sampling.n = 2;
    audited.sampling.presence_penalty = 0.3;
    audited.sampling.stop = vec!["!".into()];
    audited
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_computed_again_to_the_bit_and_what_was_changed_is_named() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let records = folder.path().join("records");
    let flags = ["--audit-dir", records.to_str().unwrap()];
    let cluster = Cluster::up(&[&PROMPTED[..], &flags].concat());
    let mut client = cluster.client().await;
    let mut receipts = Vec::new();
    for (number, prompt) in ["Tell me of the sea.", "Why is the sky blue?"].into_iter().enumerate() {
        let answered = ask(&mut client, audited(prompt, &format!("r{number}"))).await.unwrap();
        assert!(answered.choices.iter().all(|choice| choice.details.len() == choice.tokens.len()));
        receipts.push(hexadecimal(&answered.summary.unwrap().audit));
    }
    let plain = ask(&mut client, request("Hi!", &[])).await.unwrap();
    assert!(plain.summary.unwrap().audit.is_empty(), "nobody asked for a record");
    let body = json!({ "messages": [{ "role": "user", "content": "Hi!" }], "max_tokens": 4, "audit": true });
    let answered = post_as(&cluster.http, "/v1/chat/completions", "application/json", &body.to_string());
    let answered: Value = serde_json::from_str(&answered.body).unwrap();
    assert_eq!(answered["choices"][0]["logprobs"], Value::Null, "details are the record's, not the answer's");
    receipts.push(answered["uniarm"]["audit"].as_str().unwrap().into());

    let kept = links(&records);
    assert_eq!(kept.iter().map(|link| hexadecimal(&link.hash)).collect::<Vec<_>>(), receipts);
    assert_eq!(kept[0].record.answers[0].served.len(), 1, "one base and one reward worker made it all");
    let [base, reward] =
        [&kept[0].record.answers[0].served[0].base, &kept[0].record.answers[0].served[0].rewards[0]];
    assert_eq!((base.member.as_str(), reward.member.as_str()), ("base", "reward"));
    assert_eq!((base.weights.len(), &base.weights), (64, &reward.weights), "they share a model");

    let router = &cluster.router.address;
    let (is_well, lines, error) = replay(&records, router, &[]);
    assert!(is_well, "{lines:?} {error}");
    assert_eq!(lines.last().unwrap()["replayed"], 3);
    assert!(replay(&records, router, &["--receipt", &receipts[1]]).0);

    // Who changes a token breaks the chain; who makes a new chain cannot make the cluster say it.
    let text = fs::read_to_string(file(&records)).unwrap();
    let id = kept[1].record.answers[1].ids[2];
    fs::write(file(&records), text.replace("\"request_id\":\"r1\"", "\"request_id\":\"r9\"")).unwrap();
    let (is_well, _, error) = replay(&records, router, &["--chain-only"]);
    assert!(!is_well && error.contains("line 2") && error.contains("has been changed"), "{error}");
    fs::write(file(&records), &text).unwrap();
    forge(&records, |record| {
        if record.request_id == "r1" {
            record.answers[1].ids[2] = id + 1;
        }
    });
    assert!(replay(&records, router, &["--chain-only"]).0, "the chain is whole");
    let (is_well, lines, error) = replay(&records, router, &[]);
    assert!(!is_well && error.contains("1 of 3 records"), "{error}");
    assert_eq!((&lines[0]["verdict"], &lines[1]["verdict"]), (&json!("same"), &json!("changed")));
    let reason = lines[1]["reason"].as_str().unwrap();
    assert!(
        reason.starts_with(&format!("answer 1, token 2 is {} in the record, and {id}", id + 1)),
        "{reason}"
    );
    let (is_well, _, error) = replay(&records, router, &["--chain-only", "--receipt", &receipts[2]]);
    assert!(
        !is_well && error.contains("no record has the hash"),
        "its client kept what it was given: {error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_says_who_served_and_what_did_without_its_reward() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let records = folder.path().display().to_string();
    // Who comes back is another member: through a store its base worker hears so.
    let Some(etcd) = EtcdServer::start() else { return };
    let (store, at) = (etcd.address(), free_address());
    let _base = worker("base", &["--store", &store]);
    let mut reward = worker("reward", &[&PROMPTED[..], &["--store", &store, "--listen", &at]].concat());
    let router = Running::start("router", &["--store", &store, "--audit-dir", &records]);
    let mut client = knows_its_workers(&router.address).await;
    let mut asked = audited("Tell me of the sea.", "r0");
    asked.on_reward_loss = OnRewardLoss::Unguided;
    (asked.sampling.n, asked.sampling.stop, asked.sampling.max_tokens) = (1, Vec::new(), 600);
    asked.sampling.ignore_eos = true;
    let mut events =
        client.generate(Request::new(pb::GenerateRequest::from(asked))).await.unwrap().into_inner();
    let mut unguided = 0;
    while let Some(response) = events.message().await.unwrap() {
        if let Some(Event::Tokens(tokens)) = &response.event {
            match tokens.position {
                20 => reward.kill(),
                _ if reward.is_alive() || unguided < 30 => {}
                _ => reward.restart(),
            }
            unguided += tokens.unguided.len();
        }
    }
    let kept = links(folder.path());
    let answer = &kept[0].record.answers[0];
    assert_eq!((answer.ids.len(), answer.unguided.len()), (600, unguided));
    assert!(unguided > 0, "the reward worker was away");
    let rewards: Vec<_> = answer.served.iter().map(|served| served.rewards[0].generation).collect();
    assert_eq!((rewards.len(), rewards[1]), (3, 0), "before, without, and after: {:?}", answer.served);
    assert_ne!(rewards[0], rewards[2], "a restarted worker is another one");
    let (is_well, lines, error) = replay(folder.path(), &router.address, &[]);
    assert!(is_well, "{lines:?} {error}");
    // A guided token that is passed off as one without.
    forge(folder.path(), |record| record.answers[0].unguided.insert(0, 3));
    assert!(!replay(folder.path(), &router.address, &[]).0);
}
