//! Everything that is linked is what deny.toml allows: its licences, its one registry, its walls. `cargo deny check` says the
//! same and knows of advisories besides; it is a program of its own, and needs a network.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use serde_json::Value;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

fn rules() -> toml::Table {
    std::fs::read_to_string(repository().join("deny.toml")).unwrap().parse().unwrap()
}

fn names(list: &toml::Value) -> BTreeSet<&str> {
    list.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

/// The packages that are built on this platform, and what each depends on, as `cargo metadata` has them.
fn metadata() -> Value {
    let host = String::from_utf8(Command::new("rustc").arg("-vV").output().unwrap().stdout).unwrap();
    let host = host.lines().find_map(|line| line.strip_prefix("host: ")).unwrap().to_owned();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", &host])
        .current_dir(repository())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Whether an SPDX expression, or one of the older form with `/` for `OR`, can be met by licences that are allowed.
fn is_met(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let met = any(&mut words, allowed);
    assert_eq!(words.next(), None, "{expression}");
    met
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let mut met = all(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        met |= all(words, allowed);
    }
    met
}

fn all(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let mut met = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words, allowed);
    }
    met
}

fn one(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let word = words.next().expect("a licence");
    if word == "(" {
        let met = any(words, allowed);
        assert_eq!(words.next(), Some(")"));
        return met;
    }
    match words.next_if_eq(&"WITH") {
        Some(_) => allowed.contains(format!("{word} WITH {}", words.next().unwrap()).as_str()),
        None => allowed.contains(word),
    }
}

#[test]
fn an_expression_of_licences_is_met_as_it_says() {
    let allowed = BTreeSet::from(["MIT", "Zlib", "Apache-2.0 WITH LLVM-exception"]);
    for met in [
        "MIT",
        "GPL-3.0 OR MIT",
        "GPL-3.0/MIT",
        "(MIT OR GPL-3.0) AND Zlib",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(is_met(met, &allowed), "{met}");
    }
    for unmet in
        ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Zlib) AND GPL-3.0", "Apache-2.0", "MIT WITH LLVM-exception"]
    {
        assert!(!is_met(unmet, &allowed), "{unmet}");
    }
}

#[test]
fn every_dependency_has_a_licence_that_is_allowed_and_comes_from_the_one_registry() {
    let (rules, metadata) = (rules(), metadata());
    let allowed = names(&rules["licenses"]["allow"]);
    let linked: BTreeSet<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["id"].as_str().unwrap())
        .collect();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let (mut count, mut registries) = (0, BTreeSet::new());
    for package in packages.filter(|package| linked.contains(package["id"].as_str().unwrap())) {
        let (name, licence) = (&package["name"], package["license"].as_str().unwrap_or_default());
        assert!(!licence.is_empty(), "{name} names no licence");
        assert!(is_met(licence, &allowed), "{name} is under {licence}, which deny.toml does not allow");
        if let Some(source) = package["source"].as_str() {
            assert!(source.starts_with("registry+"), "{name} comes from {source}");
            registries.insert(source);
            count += 1;
        }
    }
    assert_eq!(registries.len(), 1, "{registries:?}");
    assert!(count > 100, "{count} dependencies are not all");
}

#[test]
fn only_those_who_may_depend_on_what_stands_behind_a_wall() {
    let (rules, metadata) = (rules(), metadata());
    let packages = metadata["packages"].as_array().unwrap().iter();
    let named: BTreeMap<&str, &str> = packages
        .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
        .collect();
    for rule in rules["bans"]["deny"].as_array().unwrap() {
        let (banned, none) = (rule["crate"].as_str().unwrap(), toml::Value::Array(Vec::new()));
        let may = names(rule.get("wrappers").unwrap_or(&none));
        for node in metadata["resolve"]["nodes"].as_array().unwrap() {
            let name = named[node["id"].as_str().unwrap()];
            let dependencies = node["deps"].as_array().unwrap().iter();
            // As `cargo deny` does: what only tests depend on is linked into nothing.
            let mut linked = dependencies.filter(|dependency| {
                let kinds = dependency["dep_kinds"].as_array().unwrap();
                kinds.iter().any(|kind| kind["kind"].as_str() != Some("dev"))
            });
            let depends = linked.any(|dependency| named[dependency["pkg"].as_str().unwrap()] == banned);
            assert!(!depends || may.contains(name), "{name} must not depend on {banned}: {}", rule["reason"]);
        }
    }
}
