//! Where the tests of this crate find models, and how they run a sequence.
#![allow(dead_code)]

#[allow(clippy::unwrap_used)] // clippy knows tests, but not their helpers
#[path = "../files/mod.rs"]
mod files;
pub mod made_up;

use std::path::PathBuf;
use std::process::Command;

use uniarm_model::{Conditioned, Forward, Llama, ModelFiles, OpenOptions, Row};

/// The folder of recorded values, which is not part of the repository.
pub fn shared() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = std::env::var_os("UNIARM_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let found = folder.join("golden").is_dir().then_some(folder);
    if found.is_none() {
        println!("skipped: no recorded values (UNIARM_SHARED, or a folder 'shared' beside the repository)");
    }
    found
}

/// The demo model's GGUF.
pub fn demo_model() -> Option<ModelFiles> {
    let path = std::env::var("UNIARM_DEMO_MODEL").ok().or_else(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/fetch-demo-model.sh");
        let output = Command::new(script).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
    });
    let Some(path) = path else {
        println!("skipped: no demo model (UNIARM_DEMO_MODEL, or scripts/fetch-demo-model.sh)");
        return None;
    };
    Some(open(&path))
}

pub fn open(source: &str) -> ModelFiles {
    uniarm_model::open(source, &OpenOptions::default()).expect("a sound model")
}

/// A sequence and its blocks.
pub struct Sequence<'a> {
    pub tokens: Vec<u32>,
    pub computed: usize,
    pub blocks: Vec<u32>,
    pub adapter: Option<&'a Conditioned>,
}

impl<'a> Sequence<'a> {
    pub fn new(tokens: &[u32], blocks: std::ops::Range<u32>, adapter: Option<&'a Conditioned>) -> Self {
        Self { tokens: tokens.to_vec(), computed: 0, blocks: blocks.collect(), adapter }
    }

    /// All tokens that are not computed yet, with the logits of the last.
    pub fn row(&self) -> Row<'_> {
        let tokens = &self.tokens[self.computed..];
        Row {
            tokens,
            start: self.computed,
            blocks: &self.blocks,
            logits_from: tokens.len() - 1,
            adapter: self.adapter,
        }
    }
}

/// Logits after each sequence's last token, in one step.
pub fn step(model: &mut Llama, sequences: &mut [Sequence<'_>]) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    let rows: Vec<Row<'_>> = sequences.iter().map(Sequence::row).collect();
    model.forward(&rows, &mut logits).expect("sound rows");
    for sequence in sequences {
        sequence.computed = sequence.tokens.len();
    }
    logits.chunks_exact(model.vocabulary()).map(<[f32]>::to_vec).collect()
}

/// The greatest of the sums of logits over all sequences, decoded greedily; all sequences get each token.
pub fn greedy(model: &mut Llama, sequences: &mut [Sequence<'_>], eos: u32, tokens_max: usize) -> Vec<u32> {
    let mut answer = Vec::new();
    while answer.len() < tokens_max {
        let logits = step(model, sequences);
        let score = |token: usize| logits.iter().map(|row| row[token]).sum::<f32>();
        let best = (0..model.vocabulary()).max_by(|a, b| score(*a).total_cmp(&score(*b)).then(b.cmp(a)));
        let token = best.expect("a vocabulary") as u32;
        answer.push(token);
        if token == eos {
            break;
        }
        for sequence in sequences.iter_mut() {
            sequence.tokens.push(token);
        }
    }
    answer
}

pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}
