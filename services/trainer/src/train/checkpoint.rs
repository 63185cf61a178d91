//! Where a run stands, on disk: written whole or not at all, verified when read, the last two kept.
//!
//! ```text
//! magic | length of the header, u64 | header, JSON | parameters | both moments | best parameters | SHA-256 of all
//! ```
//!
//! Numbers are little-endian; the vectors are f32 of `count` numbers each, the last one only where there is a best.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::optimizer::AdamW;
use crate::whole_file;

const MAGIC: &[u8; 8] = b"UARMCKP1";
/// A header is a configuration and some numbers; more is not one.
const HEADER_BYTES_MAX: u64 = 16 << 20;
/// One that may be torn, and the one before it.
const KEPT: usize = 2;
const DIGEST_BYTES: usize = 32;

/// Where a run stands between two steps.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Steps done.
    pub step: u64,
    pub parameters: Vec<f32>,
    pub adam: AdamW,
    pub best: Option<Best>,
    /// Evaluations since the best one.
    pub without_better: u64,
    /// Length of the run's metrics.
    pub metrics_bytes: u64,
}

/// The weights with the lowest held-out loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    pub step: u64,
    pub loss: f64,
    pub parameters: Vec<f32>,
}

/// What a run's weights are a function of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    pub config: toml::Table,
    /// SHA-256 over the pairs as the network sees them.
    pub data: String,
    /// Fingerprint of the model.
    pub model: String,
}

/// Checkpoints of a run folder.
pub struct Checkpoints {
    folder: PathBuf,
}

/// What was found.
pub struct Found {
    pub file: PathBuf,
    pub state: State,
    pub identity: Identity,
}

#[derive(Serialize, Deserialize)]
struct Header {
    step: u64,
    count: usize,
    /// Step, and bits of the loss: text would round it.
    best: Option<(u64, u64)>,
    without_better: u64,
    metrics_bytes: u64,
    identity: Identity,
}

// === impl State ===

impl State {
    pub fn new(parameters: Vec<f32>) -> Self {
        let adam = AdamW::new(parameters.len());
        Self { step: 0, parameters, adam, best: None, without_better: 0, metrics_bytes: 0 }
    }

    pub fn to_bytes(&self, identity: &Identity) -> anyhow::Result<Vec<u8>> {
        let header = serde_json::to_vec(&Header {
            step: self.step,
            count: self.parameters.len(),
            best: self.best.as_ref().map(|best| (best.step, best.loss.to_bits())),
            without_better: self.without_better,
            metrics_bytes: self.metrics_bytes,
            identity: identity.clone(),
        })?;
        let mut bytes = Vec::with_capacity(header.len() + 16 * self.parameters.len() + 64);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&header);
        let vectors = [&self.parameters, &self.adam.first, &self.adam.second];
        for vector in vectors.into_iter().chain(self.best.iter().map(|best| &best.parameters)) {
            bytes.extend(vector.iter().flat_map(|number| number.to_le_bytes()));
        }
        let digest = Sha256::digest(&bytes);
        bytes.extend_from_slice(&digest);
        Ok(bytes)
    }

    /// # Errors
    /// Where the bytes are not what was written.
    pub fn from_bytes(bytes: &[u8]) -> anyhow::Result<(Self, Identity)> {
        ensure!(bytes.len() > MAGIC.len() + 8 + DIGEST_BYTES && bytes.starts_with(MAGIC), "no checkpoint");
        let (body, digest) = bytes.split_at(bytes.len() - DIGEST_BYTES);
        ensure!(Sha256::digest(body).as_slice() == digest, "the checksum does not match: torn or corrupt");
        let mut rest = &body[MAGIC.len()..];
        let mut length = [0; 8];
        rest.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= HEADER_BYTES_MAX && length <= rest.len() as u64, "a header of {length} bytes");
        let (header, numbers) = rest.split_at(length as usize);
        let header: Header = serde_json::from_slice(header).context("header")?;
        let vectors = 3 + usize::from(header.best.is_some());
        ensure!(Some(numbers.len()) == header.count.checked_mul(4 * vectors), "numbers are missing");
        let vector = |index: usize| {
            let numbers = &numbers[4 * header.count * index..4 * header.count * (index + 1)];
            let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("chunks of four"));
            numbers.chunks_exact(4).map(number).collect::<Vec<f32>>()
        };
        let best =
            header.best.map(|(step, loss)| Best { step, loss: f64::from_bits(loss), parameters: vector(3) });
        let state = Self {
            step: header.step,
            parameters: vector(0),
            adam: AdamW { first: vector(1), second: vector(2) },
            best,
            without_better: header.without_better,
            metrics_bytes: header.metrics_bytes,
        };
        Ok((state, header.identity))
    }
}

// === impl Identity ===

impl Identity {
    /// # Errors
    /// Says what is not as it was when the run began.
    pub fn check_same(&self, now: &Self) -> anyhow::Result<()> {
        let advice = "a run goes on only with what it began with; begin another with --out FOLDER";
        if let Some((field, before, now)) = difference("", &self.config, &now.config) {
            bail!("the configuration changed: {field} was {before} and is {now}; {advice}");
        }
        ensure!(
            self.model == now.model,
            "the model changed: its fingerprint was {} and is {}; {advice}",
            &self.model,
            &now.model
        );
        ensure!(
            self.data == now.data,
            "the pairs changed: their fingerprint was {} and is {}; {advice}",
            &self.data,
            &now.data
        );
        Ok(())
    }
}

/// The first field that differs, with both values.
fn difference(path: &str, before: &toml::Table, now: &toml::Table) -> Option<(String, String, String)> {
    let shown = |value: Option<&toml::Value>| value.map_or_else(|| "absent".to_owned(), ToString::to_string);
    before.keys().chain(now.keys()).find_map(|key| {
        let name = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (before.get(key), now.get(key)) {
            (Some(toml::Value::Table(before)), Some(toml::Value::Table(now))) => {
                difference(&name, before, now)
            }
            (before, now) if before == now => None,
            (before, now) => Some((name, shown(before), shown(now))),
        }
    })
}

// === impl Checkpoints ===

impl Checkpoints {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Writes one, and removes those beyond the last two.
    ///
    /// # Errors
    /// Names the file, and the one that is still good.
    pub fn write(&self, state: &State, identity: &Identity) -> anyhow::Result<PathBuf> {
        let file = self.folder.join(format!("checkpoint-{:08}", state.step));
        let bytes = state.to_bytes(identity)?;
        whole_file::write(&file, &bytes).with_context(|| {
            let good = self.files().ok().and_then(|files| files.last().cloned());
            let good = good.map_or("there is none before it".to_owned(), |good| {
                format!("the last good one is {}", good.display())
            });
            format!("no checkpoint could be written, {good}; make room and go on with --resume")
        })?;
        let files = self.files()?;
        for old in &files[..files.len().saturating_sub(KEPT)] {
            std::fs::remove_file(old).with_context(|| old.display().to_string())?;
        }
        Ok(file)
    }

    /// The newest sound one; `tell` hears of those that are not.
    ///
    /// # Errors
    /// Where the folder cannot be read, or holds checkpoints of which none is sound.
    pub fn latest(&self, mut tell: impl FnMut(String)) -> anyhow::Result<Option<Found>> {
        let files = self.files()?;
        for file in files.iter().rev() {
            let mut bytes = Vec::new();
            let read = File::open(file).and_then(|mut from| from.read_to_end(&mut bytes));
            match read.map_err(anyhow::Error::from).and_then(|_| State::from_bytes(&bytes)) {
                Ok((state, identity)) => return Ok(Some(Found { file: file.clone(), state, identity })),
                Err(error) => tell(format!("{}: {error:#}; the one before it is used", file.display())),
            }
        }
        ensure!(
            files.is_empty(),
            "{}: no checkpoint is sound; begin another run with --out",
            self.folder.display()
        );
        Ok(None)
    }

    /// In the order of steps.
    pub fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(&self.folder).with_context(|| self.folder.display().to_string())?;
        let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let is_checkpoint = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix("checkpoint-")
                .is_some_and(|step| step.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let mut files: Vec<PathBuf> = paths.filter(is_checkpoint).collect();
        files.sort_unstable();
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use super::*;

    fn state(step: u64) -> State {
        State {
            step,
            parameters: vec![1.0, -0.0, f32::MIN_POSITIVE],
            adam: AdamW { first: vec![0.1, 0.2, 0.3], second: vec![4.0, 5.0, 6.0] },
            best: Some(Best { step: 2, loss: 0.1 + 0.2, parameters: vec![7.0, 8.0, 9.0] }),
            without_better: 3,
            metrics_bytes: 1234,
        }
    }

    fn identity(text: &str) -> Identity {
        Identity { config: toml::from_str(text).unwrap(), data: "d".into(), model: "m".into() }
    }

    #[test]
    fn the_last_two_are_kept_and_the_older_one_replaces_a_torn_one() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        assert!(checkpoints.latest(|_| ()).unwrap().is_none());
        for step in [5, 10, 15] {
            checkpoints.write(&state(step), &identity("")).unwrap();
        }
        assert_eq!(checkpoints.files().unwrap().len(), 2);
        let found = checkpoints.latest(|note| panic!("{note}")).unwrap().unwrap();
        assert_eq!((found.state, found.identity), (state(15), identity("")));

        let bytes = std::fs::read(&found.file).unwrap();
        for torn in [&bytes[..bytes.len() - 1], &bytes[..20], b""] {
            std::fs::write(&found.file, torn).unwrap();
            let mut notes = Vec::new();
            let older = checkpoints.latest(|note| notes.push(note)).unwrap().unwrap();
            assert_eq!((older.state.step, notes.len()), (10, 1), "{notes:?}");
        }
        let mut flipped = bytes;
        flipped[60] ^= 1;
        std::fs::write(&found.file, flipped).unwrap();
        assert_eq!(checkpoints.latest(|_| ()).unwrap().unwrap().state.step, 10);
        std::fs::write(folder.path().join("checkpoint-00000010"), "").unwrap();
        assert!(checkpoints.latest(|_| ()).is_err());
    }

    #[test]
    fn what_changed_is_named() {
        let before = identity("batch = 8\n[loss]\nglobal_beta = 0.1");
        let message = |now: &Identity| before.check_same(now).unwrap_err().to_string();
        let now = identity("batch = 8\n[loss]\nglobal_beta = 0.2");
        assert!(message(&now).contains("loss.global_beta was 0.1 and is 0.2"));
        let now = identity("batch = 8\nsystem = \"x\"\n[loss]\nglobal_beta = 0.1");
        assert!(message(&now).contains("system was absent and is \"x\""));
        assert!(message(&Identity { data: "e".into(), ..before.clone() }).starts_with("the pairs changed"));
        assert!(message(&Identity { model: "n".into(), ..before.clone() }).starts_with("the model changed"));
        before.check_same(&before).unwrap();
    }
}
