//! One line for each record: its own JSON between the hash of the line before it and the hash of both.
//!
//! ```text
//! {"previous":"<hash>","hash":"<SHA-256 of previous and record>","record":{…}}
//! ```
//!
//! The bytes between `"record":` and the last brace are what is hashed, so that no two writers have to agree on a form of
//! JSON. Whoever can write the file can make a new chain, from the changed record on: a client that kept the hash of a
//! later answer notices, and so does a replay.

use sha2::{Digest as _, Sha256};
use uniarm_proto::digits::{from_hexadecimal, hexadecimal};

use super::record::Record;

/// SHA-256 over everything up to a record.
pub type Hash = [u8; 32];

/// What the first record of all follows.
pub const GENESIS: Hash = [0; 32];

const PREVIOUS: &str = "{\"previous\":\"";
const HASH: &str = "\",\"hash\":\"";
const RECORD: &str = "\",\"record\":";
const END: &str = "}";

/// A record at its place in the chain.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    pub previous: Hash,
    pub hash: Hash,
    pub record: Record,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("is no line of a chain of records")]
    Form,
    #[error("does not follow the line before it: a record is missing, or is not where it was")]
    Gap,
    #[error("has been changed: its hash is another one")]
    Changed,
    #[error("holds a record that cannot be read: {0}")]
    Record(String),
}

/// The line of `record`, with its end, and its hash.
pub(super) fn forge(previous: &Hash, record: &str) -> (String, Hash) {
    let hash = hash_of(previous, record.as_bytes());
    let [before, own] = [previous, &hash].map(|hash| hexadecimal(hash));
    (format!("{PREVIOUS}{before}{HASH}{own}{RECORD}{record}{END}\n"), hash)
}

fn hash_of(previous: &Hash, record: &[u8]) -> Hash {
    let mut digest = Sha256::new();
    digest.update(previous);
    digest.update(record);
    digest.finalize().into()
}

// === impl Link ===

impl Link {
    /// Reads a line without its end, which is to follow `previous` where that is known.
    ///
    /// # Errors
    /// When the line is none, follows another one, or is not what it was when it was written.
    pub fn read(line: &str, previous: Option<&Hash>) -> Result<Self, ChainError> {
        let (before, own, text) = parts(line).ok_or(ChainError::Form)?;
        let hash = |text: &str| from_hexadecimal(text).ok_or(ChainError::Form);
        let (before, own) = (hash(before)?, hash(own)?);
        if hash_of(&before, text.as_bytes()) != own {
            return Err(ChainError::Changed);
        }
        if previous.is_some_and(|previous| *previous != before) {
            return Err(ChainError::Gap);
        }
        let record = serde_json::from_str(text).map_err(|error| ChainError::Record(error.to_string()))?;
        Ok(Self { previous: before, hash: own, record })
    }
}

/// Previous hash, own hash and record, as they are written.
fn parts(line: &str) -> Option<(&str, &str, &str)> {
    let (previous, rest) = line.strip_prefix(PREVIOUS)?.split_once(HASH)?;
    let (own, rest) = rest.split_once(RECORD)?;
    Some((previous, own, rest.strip_suffix(END)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(names: &[&str]) -> Vec<String> {
        let mut previous = GENESIS;
        let forge_next = |name: &&str| {
            let record = Record { request_id: (*name).to_owned(), ..Record::default() };
            let (line, hash) = forge(&previous, &serde_json::to_string(&record).unwrap());
            previous = hash;
            line.trim_end().to_owned()
        };
        names.iter().map(forge_next).collect()
    }

    /// What is wrong first, and in which line.
    fn wrong(lines: &[String]) -> Option<(usize, ChainError)> {
        let mut previous = GENESIS;
        for (index, line) in lines.iter().enumerate() {
            match Link::read(line, Some(&previous)) {
                Ok(link) => previous = link.hash,
                Err(error) => return Some((index, error)),
            }
        }
        None
    }

    #[test]
    fn a_changed_a_missing_and_a_moved_record_are_noticed() {
        let lines = chain(&["a", "b", "c"]);
        assert_eq!(wrong(&lines), None);
        let mut changed = lines.clone();
        changed[1] = changed[1].replace("\"b\"", "\"x\"");
        assert_eq!(wrong(&changed), Some((1, ChainError::Changed)));
        let missing = [lines[0].clone(), lines[2].clone()];
        assert_eq!(wrong(&missing), Some((1, ChainError::Gap)));
        let moved = [lines[1].clone(), lines[0].clone(), lines[2].clone()];
        assert_eq!(wrong(&moved), Some((0, ChainError::Gap)));
        // Whoever forges a record's own hash breaks the line after it.
        let mut forged = lines.clone();
        forged[1] = chain(&["a", "x"])[1].clone();
        assert_eq!(wrong(&forged), Some((2, ChainError::Gap)));
    }

    #[test]
    fn what_is_no_line_is_an_error_and_never_a_panic() {
        let line = chain(&["a"]).remove(0);
        for end in 0..line.len() {
            assert!(Link::read(&line[..end], None).is_err(), "{end}");
        }
    }
}
