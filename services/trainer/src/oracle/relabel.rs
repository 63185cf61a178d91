//! Pairs divided so that no prompt is in two parts, and labelled by an oracle where people labelled another objective.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::{Answer, Oracle, OracleError, score_in_parts};
use crate::{
    pairs::{Judgement, Pair},
    whole_file,
};

/// Parts of one split.
const PARTS_MAX: usize = 16;

/// A named share of all prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub name: String,
    /// Of the sum of all shares.
    pub share: f64,
}

/// What became of a part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartFile {
    pub file: PathBuf,
    pub pairs: usize,
}

/// What labelling has found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Labelled {
    pub pairs: usize,
    /// Pairs whose two answers the oracle scores equal.
    pub ties: usize,
}

/// Where a conversation begins, as a number: eight bytes of the digest of its first message of a user. A dialogue that
/// stands in a file once for each of its turns stays together.
pub fn opening_hash(pair: &Pair) -> u64 {
    let opening = pair.messages.iter().find(|message| message.role == "user");
    let digest: [u8; 32] = Sha256::digest(opening.map_or("", |message| &message.content)).into();
    u64::from_le_bytes(digest[..8].try_into().expect("eight of thirty-two"))
}

/// Writes `<folder>/<part>.jsonl` for each part. Which part a pair is in depends on its opening and the shares alone: the
/// same prompt in another file falls into the part of the same name.
///
/// # Errors
/// For parts that make no sense, and where the file system refuses.
pub fn split(pairs: &[Pair], parts: &[Part], folder: &Path) -> anyhow::Result<Vec<PartFile>> {
    check_parts(parts)?;
    let total: f64 = parts.iter().map(|part| part.share).sum();
    let mut divided: Vec<Vec<&Pair>> = vec![Vec::new(); parts.len()];
    for pair in pairs {
        // 53 bits are what a float holds.
        let place = (opening_hash(pair) >> 11) as f64 / (1_u64 << 53) as f64 * total;
        let mut end = 0.0;
        let found = parts.iter().position(|part| {
            end += part.share;
            place < end
        });
        divided[found.unwrap_or(parts.len() - 1)].push(pair);
    }
    let write = |(part, pairs): (&Part, Vec<&Pair>)| {
        let file = folder.join(format!("{}.jsonl", part.name));
        whole_file::write(&file, &lines(pairs.iter().copied()))?;
        Ok(PartFile { file, pairs: pairs.len() })
    };
    parts.iter().zip(divided).map(write).collect()
}

/// Adds the scores of an oracle as another objective's opinion.
///
/// # Errors
/// The oracle's; where a pair has an opinion of that objective already.
pub fn label(
    pairs: &mut [Pair],
    objective: &str,
    oracle: &mut dyn Oracle,
    progress: impl FnMut(usize),
) -> anyhow::Result<Labelled> {
    if let Some(pair) = pairs.iter().find(|pair| pair.judgements.contains_key(objective)) {
        anyhow::bail!("{}: objective \"{objective}\" has judged this pair already", pair.place);
    }
    let scores = score_pairs(oracle, pairs.iter(), progress)?;
    let ties = scores.iter().filter(|[a, b]| a == b).count();
    for (pair, scores) in pairs.iter_mut().zip(scores) {
        pair.judgements.insert(objective.to_owned(), Judgement { preferred: None, scores: Some(scores) });
    }
    Ok(Labelled { pairs: pairs.len(), ties })
}

/// Writes a file of pairs, whole or not at all.
///
/// # Errors
/// Where the file system refuses.
pub fn write_pairs(pairs: &[Pair], file: &Path) -> anyhow::Result<()> {
    whole_file::write(file, &lines(pairs.iter()))
}

/// Writes the file of a model, whole or not at all.
///
/// # Errors
/// Where the file system refuses.
pub fn write_model(model: &super::Ngram, file: &Path) -> anyhow::Result<()> {
    whole_file::write(file, &model.to_bytes().context("a model becomes safetensors")?)
}

/// Scores of both answers of every pair.
pub(super) fn score_pairs<'a>(
    oracle: &mut dyn Oracle,
    pairs: impl Iterator<Item = &'a Pair>,
    progress: impl FnMut(usize),
) -> Result<Vec<[f64; 2]>, OracleError> {
    let both = |pair: &'a Pair| {
        pair.responses.each_ref().map(|response| Answer { messages: &pair.messages, response })
    };
    let answers: Vec<Answer<'_>> = pairs.flat_map(both).collect();
    let scores = score_in_parts(oracle, &answers, progress)?;
    Ok(scores.chunks_exact(2).map(|scores| [scores[0], scores[1]]).collect())
}

fn check_parts(parts: &[Part]) -> anyhow::Result<()> {
    ensure!((2..=PARTS_MAX).contains(&parts.len()), "{} parts; wants 2 to {PARTS_MAX}", parts.len());
    for (index, part) in parts.iter().enumerate() {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        ensure!(
            !part.name.is_empty() && part.name.chars().all(plain),
            "part \"{}\": a name has letters, digits, - and _",
            part.name
        );
        ensure!(
            part.share.is_finite() && part.share > 0.0,
            "part \"{}\": share {}, wants a positive number",
            part.name,
            part.share
        );
        let earlier = &parts[..index];
        ensure!(!earlier.iter().any(|other| other.name == part.name), "part \"{}\" stands twice", part.name);
    }
    Ok(())
}

fn lines<'a>(pairs: impl Iterator<Item = &'a Pair>) -> Vec<u8> {
    pairs.flat_map(|pair| format!("{}\n", pair.to_json()).into_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        oracle::Brevity,
        pairs::{self, OnBadLine},
    };

    fn file(folder: &Path) -> PathBuf {
        let file = folder.join("pairs.jsonl");
        let line = |i: usize| {
            let opening = format!("question {}", i % 150);
            let turns = if i < 150 {
                ""
            } else {
                r#"{"role":"assistant","content":"Hm."},{"role":"user","content":"And?"}"#
            };
            let comma = if i < 150 { "" } else { "," };
            format!(
                r#"{{"messages":[{{"role":"user","content":"{opening}"}}{comma}{turns}],"response_a":"one two","response_b":"{i}","preferred":{{"helpful":"a"}}}}"#
            )
        };
        std::fs::write(&file, (0..300).map(|i| line(i) + "\n").collect::<String>()).unwrap();
        file
    }

    fn read(file: PathBuf) -> Vec<Pair> {
        pairs::read(&[file], &[], &[], OnBadLine::Fail).unwrap().pairs
    }

    #[test]
    fn no_prompt_is_in_two_parts_and_no_pair_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let all = read(file(folder.path()));
        let part = |name: &str, share| Part { name: name.to_owned(), share };
        let parts = [part("fit", 0.4), part("train", 0.5), part("eval", 0.1)];
        let files = split(&all, &parts, folder.path()).unwrap();
        assert_eq!(files.iter().map(|part| part.pairs).sum::<usize>(), 300);
        assert!((90..150).contains(&files[0].pairs), "{files:?}");
        let openings = |part: &PartFile| -> BTreeSet<String> {
            read(part.file.clone()).iter().map(|pair| pair.messages[0].content.clone()).collect()
        };
        let distinct: usize = files.iter().map(|part| openings(part).len()).sum();
        assert_eq!(distinct, 150);
        let twice = split(&all, &[part("a", 1.0), part("a", 1.0)], folder.path()).unwrap_err();
        assert_eq!(twice.to_string(), "part \"a\" stands twice");
    }

    #[test]
    fn labelled_pairs_carry_both_opinions_and_are_not_labelled_twice() {
        let folder = tempfile::tempdir().unwrap();
        let mut all = read(file(folder.path()));
        let labelled = label(&mut all, "brief", &mut Brevity, |_| {}).unwrap();
        assert_eq!(labelled, Labelled { pairs: 300, ties: 0 });
        let written = folder.path().join("labelled.jsonl");
        write_pairs(&all, &written).unwrap();
        let again = read(written);
        assert_eq!(again[7].judgements["brief"].sign(), -1.0);
        assert_eq!(again[7].judgements["helpful"].sign(), 1.0);
        let error = label(&mut all, "brief", &mut Brevity, |_| {}).unwrap_err().to_string();
        assert!(
            error.ends_with("pairs.jsonl:1: objective \"brief\" has judged this pair already"),
            "{error}"
        );
    }
}
