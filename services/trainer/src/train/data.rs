//! The pairs of a run: read, tokenised, divided into those that are trained on and those that are held out.

use std::{collections::HashMap, path::PathBuf};

use anyhow::{Context as _, bail, ensure};
use sha2::{Digest as _, Sha256};
use uniarm_model::ModelFiles;
use uniarm_proto::digits::hexadecimal;

use super::{config::TrainConfig, draws::Draws};
use crate::{
    network::TokenPair,
    pairs::{
        self, BadLines,
        tokens::{PairReader, Scales},
    },
};

/// What a run learns from and is measured on.
#[derive(Clone, Debug, Default)]
pub struct Data {
    pub training: Vec<TokenPair>,
    pub held_out: Vec<TokenPair>,
    /// Lines that were left out.
    pub bad: BadLines,
}

// === impl Data ===

impl Data {
    /// # Errors
    /// Names the line and the field, or the file, that cannot be read.
    pub fn read(config: &TrainConfig, model: &ModelFiles) -> anyhow::Result<Self> {
        let name = &model.name;
        let reader = PairReader {
            tokenizer: model.tokenizer.as_ref().with_context(|| format!("{name} has no tokenizer.json"))?,
            template: model.template.as_ref().with_context(|| {
                format!("{name} has no chat template, which says where an answer begins and ends")
            })?,
            system: config.system.as_deref(),
            max_prompt_tokens: config.max_prompt_tokens,
            max_tokens: config.max_tokens,
        };
        let mut bad = BadLines::default();
        let training = tokens(config, &reader, &config.pairs, &mut bad)?;
        if training.is_empty() {
            ensure!(!bad.0.is_empty(), "pairs: the files have no lines");
            bail!("{bad}\nNo pair is left to train on");
        }
        let mut data = if config.held_out.is_empty() {
            Self::divided(config, training)
        } else {
            let mut held_out = tokens(config, &reader, &config.held_out, &mut bad)?;
            held_out.truncate(config.held_out_max);
            Self { training, held_out, bad: BadLines::default() }
        };
        data.bad = bad;
        let scales = Scales::of(&data.training);
        scales.apply(&mut data.training);
        scales.apply(&mut data.held_out);
        Ok(data)
    }

    /// Holds out conversations by a number drawn for each: all pairs of one, so that none is both learnt and tested.
    pub fn divided(config: &TrainConfig, pairs: Vec<TokenPair>) -> Self {
        let draws = Draws::new(config.seed);
        let wanted = (config.held_out_share * pairs.len() as f64).round() as usize;
        // A conversation that everything belongs to leaves something to learn from.
        let wanted = wanted.min(config.held_out_max).min(pairs.len() - 1);
        let mut sizes = HashMap::<u64, usize>::new();
        for pair in &pairs {
            *sizes.entry(draws.held_out(conversation(pair))).or_default() += 1;
        }
        let mut order: Vec<(u64, usize)> = sizes.into_iter().collect();
        order.sort_unstable();
        let mut count = 0;
        let mut last = None;
        for (drawn, size) in order {
            if count + size > wanted {
                break;
            }
            count += size;
            last = Some(drawn);
        }
        let (held_out, training) =
            pairs.into_iter().partition(|pair| last >= Some(draws.held_out(conversation(pair))));
        Self { training, held_out, bad: BadLines::default() }
    }

    /// SHA-256 over everything that the network will see of it.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (part, pairs) in [(0_u8, &self.training), (1, &self.held_out)] {
            for pair in pairs {
                hash.update([part]);
                for tokens in [&pair.prompt, &pair.answers[0], &pair.answers[1]] {
                    hash.update((tokens.len() as u64).to_le_bytes());
                    tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
                }
                let labels = pair.labels.signs.iter().chain(&pair.labels.margins);
                labels.for_each(|number| hash.update(number.to_le_bytes()));
            }
        }
        hexadecimal(&hash.finalize())
    }
}

fn tokens(
    config: &TrainConfig,
    reader: &PairReader<'_>,
    files: &[PathBuf],
    bad: &mut BadLines,
) -> anyhow::Result<Vec<TokenPair>> {
    let trained: Vec<String> = config.trained().into_iter().map(|objective| objective.name).collect();
    // Under `fail`, too: a pair that is too long is told beside one that is malformed.
    let mut read = pairs::read(files, &config.names(), &trained, pairs::OnBadLine::Skip)?;
    let tokens = reader.read(&mut read, &trained, config.ties)?;
    let mut read = read.checked(config.on_bad_line)?;
    bad.0.append(&mut read.bad.0);
    Ok(tokens)
}

/// First words of the digest of a prompt.
fn conversation(pair: &TokenPair) -> u64 {
    let mut hash = Sha256::new();
    pair.prompt.iter().for_each(|token| hash.update(token.to_le_bytes()));
    let digest = hash.finalize();
    u64::from_le_bytes(digest[..8].try_into().expect("a digest of 32 bytes"))
}
