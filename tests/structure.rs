//! The tree keeps its walls, and ARCHITECTURE.md names only what exists.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// What alters inputs in tests of any crate, and is part of nothing.
const FUZZING: &str = "uniarm-fuzz";

/// Direct dependencies of each member of the workspace, tests and build scripts included.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(repository())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .map(|package| {
            let names = package["dependencies"].as_array().unwrap().iter();
            let names = names.map(|dependency| dependency["name"].as_str().unwrap().to_owned());
            let names = names.filter(|name| name != FUZZING).collect();
            (package["name"].as_str().unwrap().to_owned(), names)
        })
        .collect()
}

/// Everything of ours below a member.
fn own_closure(all: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from.to_owned()];
    while let Some(name) = open.pop() {
        for dependency in all[&name].iter().filter(|dependency| all.contains_key(*dependency)) {
            if reached.insert(dependency.clone()) {
                open.push(dependency.clone());
            }
        }
    }
    reached
}

#[test]
fn dependencies_stay_behind_their_walls() {
    let all = dependencies();
    let only_in = |dependency: &str, allowed: &[&str]| {
        for (member, names) in &all {
            let has = names.iter().any(|name| name.starts_with(dependency));
            assert!(!has || allowed.contains(&member.as_str()), "{member} must not depend on {dependency}");
        }
    };
    only_in("candle", &["uniarm-model", "uniarm-trainer"]);
    only_in("cudarc", &["uniarm-cuda", "uniarm-collective"]);
    only_in("etcd-client", &["uniarm-cluster"]);
    let services = [
        "uniarm-proto",
        "uniarm-runtime",
        "uniarm-router",
        "uniarm-base",
        "uniarm-reward",
        "uniarm-batch",
        "uniarm-trainer",
        "uniarm",
        "uniarm-simulation",
    ];
    only_in("tonic", &services);

    for impure in ["tokio", "candle", "tonic", "rayon", "rand", "uniarm"] {
        let found = all["uniarm-decode"].iter().find(|name| name.starts_with(impure));
        assert!(found.is_none(), "decode is pure, but depends on {found:?}");
    }
    for foreign in ["tokio", "candle", "tonic", "uniarm"] {
        let found = all["uniarm-collective"].iter().find(|name| name.starts_with(foreign));
        assert!(
            found.is_none(),
            "a collective carries numbers and knows nothing else, but depends on {found:?}"
        );
    }
    for foreign in ["tokio", "candle", "tonic"] {
        let found = all["uniarm-cuda"].iter().find(|name| name.starts_with(foreign));
        assert!(found.is_none(), "kernels on a GPU need no {foreign}, but depend on {found:?}");
    }
    assert!(!own_closure(&all, "uniarm-model").contains("uniarm-decode"));
    for impure in
        ["tokio", "candle", "tonic", "rayon", "rand", "uniarm-model", "uniarm-engine", "uniarm-base"]
    {
        let found = all["uniarm-simulate"].iter().find(|name| name.starts_with(impure));
        assert!(found.is_none(), "a simulation is arithmetic, but depends on {found:?}");
    }
    let openai = ["serde_json", "uniarm-proto"].map(str::to_owned);
    assert_eq!(all["uniarm-openai"], BTreeSet::from(openai), "words need no transport");
    let router = own_closure(&all, "uniarm-router");
    for knowing in ["uniarm-decode", "uniarm-model", "uniarm-engine"] {
        assert!(!router.contains(knowing), "a router cannot choose a token, but depends on {knowing}");
    }
    // A router may run batches too; processes share one through the store.
    let below = ["uniarm-cluster", "uniarm-openai", "uniarm-proto", "uniarm-tls"].map(str::to_owned);
    assert_eq!(own_closure(&all, "uniarm-batch"), BTreeSet::from(below));
    assert!(!own_closure(&all, "uniarm-base").contains("uniarm-reward"));
    assert!(!own_closure(&all, "uniarm-reward").contains("uniarm-base"));
}

#[test]
fn documents_name_only_paths_that_exist() {
    for document in ["ARCHITECTURE.md", "README.md"] {
        let text = std::fs::read_to_string(repository().join(document)).unwrap();
        for word in text.split('`').skip(1).step_by(2) {
            let is_path = word.contains('/') && !word.contains([' ', '<', '*', '$', '{', '(', ':', '…', '=']);
            if is_path && !word.starts_with('/') && !word.starts_with("target/") && !word.starts_with("../") {
                assert!(repository().join(word).exists(), "{document} names `{word}`, which is not there");
            }
        }
    }
}

#[test]
fn sources_have_no_unfinished_business() {
    let output =
        Command::new("git").args(["ls-files", "*.rs", "*.proto", "*.sh"]).current_dir(repository()).output();
    let Ok(output) = output else { return println!("skipped: no git") };
    for file in String::from_utf8(output.stdout).unwrap().lines() {
        if file == "tests/structure.rs" {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(repository().join(file)) else { continue };
        for mark in ["todo!(", "unimplemented!(", "FIXME", "TODO", "#[ignore]"] {
            assert!(!text.contains(mark), "{file} contains {mark}");
        }
    }
}
