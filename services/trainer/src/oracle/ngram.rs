//! A Bradley–Terry model on hashed word n-grams: the score of an answer is the sum of the weights of its words and pairs
//! of neighbouring words. Small enough to read, weak enough to need intervals.

use std::{collections::BTreeMap, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{Answer, Oracle, OracleError};

/// Bytes of a file: some thirty times what a million features need.
const FILE_BYTES_MAX: u64 = 512 << 20;
/// Features are hashed to this many bits. Two million n-grams would share a bucket with another one in one case of
/// two; the pairs of our experiments have a hundred thousand.
const BUCKET_BITS: u32 = 20;
const FORMAT: &str = "uniarm-ngram-1";

/// A fitted model.
#[derive(Clone, Debug, PartialEq)]
pub struct Ngram {
    objective: String,
    /// Ascending.
    buckets: Vec<u32>,
    /// Inverse document frequency of each bucket.
    rarity: Vec<f32>,
    weights: Vec<f32>,
    /// Whatever its maker wants to be known: settings, held-out accuracy.
    notes: BTreeMap<String, String>,
}

/// How often each bucket occurs, signed and damped, ascending by bucket.
pub(super) type Counts = Vec<(u32, f64)>;

/// Words, and neighbours of them, counted in buckets. A word is a run of letters, digits and apostrophes in lower case.
/// Half of the n-grams count negatively (signed hashing), so that in a shared bucket errors cancel on average. A count c
/// becomes sign(c)·(1 + ln |c|).
pub(super) fn counts(text: &str) -> Counts {
    let lower = text.to_lowercase().replace('’', "'");
    let words: Vec<&str> =
        lower.split(|c: char| !c.is_alphanumeric() && c != '\'').filter(|word| !word.is_empty()).collect();
    let mut counts: BTreeMap<u32, f64> = BTreeMap::new();
    let mut add = |hash: u64| {
        let sign = if hash >> 63 == 0 { 1.0 } else { -1.0 };
        *counts.entry(hash as u32 & ((1 << BUCKET_BITS) - 1)).or_default() += sign;
    };
    words.iter().for_each(|word| add(fingerprint(&[word])));
    words.windows(2).for_each(|pair| add(fingerprint(pair)));
    let damped = |(bucket, count): (u32, f64)| (bucket, count.signum() * (1.0 + count.abs().ln()));
    counts.into_iter().filter(|(_, count)| *count != 0.0).map(damped).collect()
}

/// FNV-1a over the words, each followed by a zero byte, and a final mix (its low bits alone are poor).
fn fingerprint(words: &[&str]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.bytes().chain([0]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

/// Counts times rarity, of length one; `index` finds a bucket's place. Unknown buckets are left out.
pub(super) fn unit_vector(
    counts: &Counts,
    index: impl Fn(u32) -> Option<usize>,
    rarity: &[f32],
) -> Vec<(usize, f64)> {
    let known = counts.iter().filter_map(|(bucket, count)| {
        let place = index(*bucket)?;
        Some((place, count * f64::from(rarity[place])))
    });
    let mut vector: Vec<(usize, f64)> = known.collect();
    let length = vector.iter().map(|(_, value)| value * value).sum::<f64>().sqrt();
    vector.iter_mut().for_each(|(_, value)| *value /= length);
    vector
}

// === impl Ngram ===

impl Ngram {
    /// `features` are (bucket, rarity, weight), ascending by bucket.
    pub(super) fn new(
        objective: &str,
        features: impl IntoIterator<Item = (u32, f32, f32)>,
        notes: BTreeMap<String, String>,
    ) -> Self {
        let mut model = Self {
            objective: objective.to_owned(),
            buckets: Vec::new(),
            rarity: Vec::new(),
            weights: Vec::new(),
            notes,
        };
        for (bucket, rarity, weight) in features {
            model.buckets.push(bucket);
            model.rarity.push(rarity);
            model.weights.push(weight);
        }
        model
    }

    pub fn features(&self) -> usize {
        self.buckets.len()
    }

    /// The score of one answer; 0 where it has no known word.
    pub fn score_of(&self, response: &str) -> f64 {
        let index = |bucket| self.buckets.binary_search(&bucket).ok();
        let vector = unit_vector(&counts(response), index, &self.rarity);
        vector.iter().map(|(place, value)| value * f64::from(self.weights[*place])).sum()
    }

    /// The bytes of a file: safetensors, described in docs/oracles.md.
    pub fn to_bytes(&self) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let shape = vec![self.buckets.len()];
        let bytes = |words: Vec<[u8; 4]>| words.concat();
        let buckets = bytes(self.buckets.iter().map(|value| value.to_le_bytes()).collect());
        let rarity = bytes(self.rarity.iter().map(|value| value.to_le_bytes()).collect());
        let weights = bytes(self.weights.iter().map(|value| value.to_le_bytes()).collect());
        let tensors = [
            ("buckets", TensorView::new(Dtype::U32, shape.clone(), &buckets)?),
            ("rarity", TensorView::new(Dtype::F32, shape.clone(), &rarity)?),
            ("weights", TensorView::new(Dtype::F32, shape, &weights)?),
        ];
        // One key only: the library writes keys in the order of a hash map, and equal models are equal bytes.
        let described = serde_json::json!({
            "format": FORMAT, "objective": self.objective, "bucket_bits": BUCKET_BITS, "notes": self.notes,
        });
        let metadata = [("uniarm".to_owned(), described.to_string())].into_iter().collect();
        safetensors::serialize(tensors, Some(metadata))
    }

    /// # Errors
    /// [`OracleError::Io`]; [`OracleError::Malformed`] for whatever else the file is.
    pub fn read(file: &Path) -> Result<Self, OracleError> {
        let io = |source| OracleError::Io { file: file.to_owned(), source };
        let malformed = |reason: String| OracleError::Malformed { file: file.to_owned(), reason };
        let size = std::fs::metadata(file).map_err(io)?.len();
        if size > FILE_BYTES_MAX {
            return Err(malformed(format!("{size} bytes; an n-gram model has at most {FILE_BYTES_MAX}")));
        }
        Self::parse(&std::fs::read(file).map_err(io)?).map_err(malformed)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let hint = "make one with `uniarm oracle fit`";
        let library = |error: safetensors::SafeTensorError| format!("not safetensors ({error}); {hint}");
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(library)?;
        let described = metadata.metadata().as_ref().and_then(|map| map.get("uniarm"));
        let described = described.ok_or_else(|| format!("not an n-gram model; {hint}"))?;
        let described: Described =
            serde_json::from_str(described).map_err(|error| format!("metadata \"uniarm\": {error}"))?;
        if described.format != FORMAT || described.bucket_bits != BUCKET_BITS {
            let found = format!("{}, {} bits", described.format, described.bucket_bits);
            return Err(format!("format {found}; this version reads {FORMAT}, {BUCKET_BITS} bits"));
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(library)?;
        let model = Self {
            objective: described.objective,
            buckets: words(&tensors, "buckets", Dtype::U32)?.map(u32::from_le_bytes).collect(),
            rarity: words(&tensors, "rarity", Dtype::F32)?.map(f32::from_le_bytes).collect(),
            weights: words(&tensors, "weights", Dtype::F32)?.map(f32::from_le_bytes).collect(),
            notes: described.notes,
        };
        model.check()?;
        Ok(model)
    }

    fn check(&self) -> Result<(), String> {
        if self.rarity.len() != self.buckets.len() || self.weights.len() != self.buckets.len() {
            return Err("buckets, rarity and weights differ in length".to_owned());
        }
        if !self.buckets.is_sorted_by(|a, b| a < b) {
            return Err("buckets: not ascending".to_owned());
        }
        let positive = |value: &f32| value.is_finite() && *value > 0.0;
        if let Some(index) = self.rarity.iter().position(|value| !positive(value)) {
            return Err(format!("rarity[{index}]: {}, wants a positive number", self.rarity[index]));
        }
        match self.weights.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(format!("weights[{index}]: {}, wants a finite number", self.weights[index])),
            None => Ok(()),
        }
    }
}

impl Oracle for Ngram {
    fn name(&self) -> &str {
        &self.objective
    }

    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError> {
        Ok(answers.iter().map(|answer| self.score_of(answer.response)).collect())
    }
}

/// What a file says of itself.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    format: String,
    objective: String,
    bucket_bits: u32,
    notes: BTreeMap<String, String>,
}

fn words<'a>(
    tensors: &'a SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
) -> Result<impl Iterator<Item = [u8; 4]> + 'a, String> {
    let tensor = tensors.tensor(name).map_err(|error| format!("tensor \"{name}\": {error}"))?;
    if tensor.dtype() != dtype {
        return Err(format!("tensor \"{name}\": {:?}, wants {dtype:?}", tensor.dtype()));
    }
    Ok(tensor.data().chunks_exact(4).map(|word| word.try_into().expect("chunks of four")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_words_are_equal_features_whatever_stands_between_them() {
        assert_eq!(counts("Don’t  panic!"), counts("don't PANIC"));
        assert_eq!(counts("a b").len(), 3, "two words and their neighbourhood");
        assert_ne!(counts("a b"), counts("b a"));
        assert!(counts(" … ").is_empty());
    }

    #[test]
    fn a_file_says_the_same_as_the_model_and_a_broken_one_says_what_is_wrong() {
        let bucket = counts("good")[0].0;
        let notes = BTreeMap::from([("pairs".to_owned(), "12".to_owned())]);
        let model = Ngram::new("helpful", [(bucket, 1.5, -2.0)], notes);
        let bytes = model.to_bytes().unwrap();
        assert_eq!(Ngram::parse(&bytes).unwrap(), model);
        assert_eq!(model.score_of("good").abs(), 2.0);
        assert_eq!(model.score_of("unknown words"), 0.0);

        let broken = Ngram { weights: vec![f32::NAN], ..model.clone() };
        let reason = Ngram::parse(&broken.to_bytes().unwrap()).unwrap_err();
        assert!(reason.starts_with("weights[0]"), "{reason}");
        assert!(Ngram::parse(b"{}").unwrap_err().contains("uniarm oracle fit"));
    }
}
