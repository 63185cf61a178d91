//! Tokenizers that exist only inside a GGUF, put together again from its vocabulary, merges and scores.

use std::collections::{BTreeMap, HashMap};

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::{Piece, Spelling};
use crate::error::ModelError;
use crate::gguf::{Gguf, Value};

/// How Qwen2 and Llama 3 cut text before merging (from their `tokenizer.json`); they differ in how many digits
/// stay together.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.token_type` (llama.cpp's `llama_token_type`).
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
/// Fills a vocabulary up to the rows of its embedding.
const UNUSED: i64 = 5;

/// The longest tokens of published vocabularies are runs of some hundred spaces.
const TOKEN_BYTES_MAX: usize = 4096;

/// A pipeline and what is needed to decode its tokens.
pub(super) struct Rebuilt {
    pub pipeline: tokenizers::Tokenizer,
    pub pieces: BTreeMap<u32, Piece>,
    pub spelling: Spelling,
}

/// The parts of a GGUF that describe its tokenizer.
struct Description<'a> {
    gguf: &'a Gguf,
    texts: &'a [String],
    kinds: Vec<i64>,
}

/// Puts the tokenizer of a GGUF together.
///
/// # Errors
/// [`ModelError::Malformed`]; [`ModelError::Unsupported`] for kinds and pre-tokenizers that are not known.
pub(super) fn rebuild(gguf: &Gguf) -> Result<Rebuilt, ModelError> {
    let description = Description::read(gguf)?;
    let (mut pipeline, spelling) = match gguf.text("tokenizer.ggml.model") {
        Some("gpt2") => (description.byte_level()?, Spelling::ByteLevel),
        Some("llama") => (description.sentence_piece()?, Spelling::SentencePiece),
        Some(other) => return Err(ModelError::unsupported(gguf.path(), format!("tokenizer '{other}'"))),
        None => return Err(ModelError::malformed(gguf.path(), "'tokenizer.ggml.model' is missing")),
    };
    let pieces = description.pieces();
    // Matched in the raw text, as llama.cpp does: normalisation must not hide a turn marker.
    for piece in pieces.values().filter(|piece| piece.added) {
        let token = AddedToken::from(piece.text.clone(), piece.special).normalized(false);
        pipeline.add_tokens([token]).map_err(|error| description.malformed(&error))?;
    }
    description.add_begin_of_text(&mut pipeline, spelling)?;
    Ok(Rebuilt { pipeline, pieces, spelling })
}

impl<'a> Description<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self, ModelError> {
        let texts = gguf
            .texts("tokenizer.ggml.tokens")
            .ok_or_else(|| ModelError::malformed(gguf.path(), "'tokenizer.ggml.tokens' is missing"))?;
        if let Some(long) = texts.iter().find(|text| text.len() > TOKEN_BYTES_MAX) {
            let reason = format!("a token of {} bytes", long.len());
            return Err(ModelError::malformed(gguf.path(), reason));
        }
        let kinds = match gguf.get("tokenizer.ggml.token_type") {
            Some(Value::Integers(kinds)) if kinds.len() == texts.len() => kinds.clone(),
            Some(_) => {
                let reason = "'tokenizer.ggml.token_type' does not fit the tokens";
                return Err(ModelError::malformed(gguf.path(), reason));
            }
            None => vec![NORMAL; texts.len()],
        };
        Ok(Self { gguf, texts, kinds })
    }

    fn tokens(&self) -> impl Iterator<Item = (u32, &'a str, i64)> {
        let kinds = self.kinds.iter().copied();
        (0_u32..).zip(self.texts).zip(kinds).map(|((id, text), kind)| (id, text.as_str(), kind))
    }

    fn pieces(&self) -> BTreeMap<u32, Piece> {
        self.tokens()
            .filter(|(_, _, kind)| *kind != UNUSED)
            .map(|(id, text, kind)| {
                let special = matches!(kind, CONTROL | UNKNOWN);
                (id, Piece { text: text.to_owned(), added: special || kind == USER_DEFINED, special })
            })
            .collect()
    }

    fn vocabulary(&self) -> Vocab {
        let used = self.tokens().filter(|(_, _, kind)| *kind != UNUSED);
        used.map(|(id, text, _)| (text.to_owned(), id)).collect()
    }

    /// Byte-level BPE: `tokenizer.ggml.merges` and the pre-tokenizer that `tokenizer.ggml.pre` names.
    fn byte_level(&self) -> Result<tokenizers::Tokenizer, ModelError> {
        let (pre_tokenizer, nfc, ignore_merges) = self.pre_tokenizer()?;
        let vocabulary = self.vocabulary();
        let merges = self.merges(&vocabulary)?;
        let model = BPE::builder()
            .vocab_and_merges(vocabulary, merges)
            .ignore_merges(ignore_merges)
            .build()
            .map_err(|error| self.malformed(&error))?;
        let mut pipeline = tokenizers::Tokenizer::new(model);
        if nfc {
            pipeline.with_normalizer(Some(NFC)).map_err(|error| self.malformed(&error))?;
        }
        pipeline.with_pre_tokenizer(Some(pre_tokenizer));
        Ok(pipeline)
    }

    /// (pre-tokenizer, whether text is NFC-normalised first, whether whole words are looked up before merging).
    fn pre_tokenizer(&self) -> Result<(PreTokenizerWrapper, bool, bool), ModelError> {
        let gpt2 = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
        let sequence = |first: PreTokenizerWrapper, second: PreTokenizerWrapper| {
            PreTokenizerWrapper::from(PreTokenizers::new(vec![first, second]))
        };
        let split = |pattern: &str| -> Result<PreTokenizerWrapper, ModelError> {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            let split = split.map_err(|error| self.malformed(&error))?;
            Ok(sequence(split.into(), ByteLevel::new(false, true, false).into()))
        };
        match self.gguf.text("tokenizer.ggml.pre") {
            Some("gpt-2" | "gpt2") => Ok((gpt2(), false, false)),
            Some("smollm" | "starcoder" | "refact" | "command-r" | "codeshell") => {
                Ok((sequence(Digits::new(true).into(), gpt2()), false, false))
            }
            Some("qwen2" | "deepseek-r1-qwen") => Ok((split(QWEN2_SPLIT)?, true, false)),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok((split(LLAMA3_SPLIT)?, false, true)),
            Some(other) => Err(ModelError::unsupported(self.gguf.path(), format!("pre-tokenizer '{other}'"))),
            None => Err(ModelError::unsupported(self.gguf.path(), "BPE without 'tokenizer.ggml.pre'")),
        }
    }

    fn merges(&self, vocabulary: &Vocab) -> Result<Merges, ModelError> {
        let lines = self
            .gguf
            .texts("tokenizer.ggml.merges")
            .ok_or_else(|| ModelError::malformed(self.gguf.path(), "'tokenizer.ggml.merges' is missing"))?;
        let mut merges = Merges::with_capacity(lines.len());
        for line in lines {
            // Checked here: the builder indexes with the length of an unknown product.
            match line.split_once(' ') {
                Some((left, right)) if vocabulary.contains_key(&format!("{left}{right}")) => {
                    merges.push((left.to_owned(), right.to_owned()));
                }
                _ => {
                    let reason = format!("merge '{line}' makes no token");
                    return Err(ModelError::malformed(self.gguf.path(), reason));
                }
            }
        }
        Ok(merges)
    }

    /// SentencePiece BPE (Llama 1 and 2, Mistral, TinyLlama): a pair merges if it makes a token, the best
    /// score first, and characters without a token fall back to bytes.
    fn sentence_piece(&self) -> Result<tokenizers::Tokenizer, ModelError> {
        let mut builder = BPE::builder()
            .vocab_and_merges(self.vocabulary(), self.merges_by_score()?)
            .fuse_unk(true)
            .byte_fallback(true);
        if let Some((_, unknown, _)) = self.tokens().find(|(_, _, kind)| *kind == UNKNOWN) {
            builder = builder.unk_token(unknown.to_owned());
        }
        let model = builder.build().map_err(|error| self.malformed(&error))?;
        let mut pipeline = tokenizers::Tokenizer::new(model);

        let space = super::META_SPACE.to_string();
        let mut normalizers = Vec::<NormalizerWrapper>::new();
        if self.gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
            normalizers.push(Prepend::new(space.clone()).into());
        }
        normalizers.push(Replace::new(" ", space).map_err(|error| self.malformed(&error))?.into());
        pipeline
            .with_normalizer(Some(Normalizers::new(normalizers)))
            .map_err(|error| self.malformed(&error))?;
        Ok(pipeline)
    }

    /// Every way to make a token out of two others, in the order in which SentencePiece would merge: by score
    /// of the product; among equals the longer left part, then the longer right part (the order of
    /// `transformers`' own conversion, so that both give the same ids).
    fn merges_by_score(&self) -> Result<Merges, ModelError> {
        let scores = match self.gguf.get("tokenizer.ggml.scores") {
            Some(Value::Floats(scores)) if scores.len() == self.texts.len() => scores,
            _ => {
                let reason = "'tokenizer.ggml.scores' is missing or does not fit the tokens";
                return Err(ModelError::malformed(self.gguf.path(), reason));
            }
        };
        let ids: HashMap<&str, u32> =
            self.tokens().filter(|(_, _, kind)| *kind == NORMAL).map(|(id, text, _)| (text, id)).collect();
        let mut merges = Vec::new();
        for (id, text, _) in self.tokens().filter(|(_, _, kind)| *kind == NORMAL) {
            let mut pairs: Vec<(u32, u32, usize)> = text
                .char_indices()
                .skip(1)
                .filter_map(|(at, _)| Some((*ids.get(&text[..at])?, *ids.get(&text[at..])?, at)))
                .collect();
            pairs.sort_unstable();
            merges.extend(pairs.into_iter().map(|(_, _, at)| (scores[id as usize], text.split_at(at))));
        }
        let characters = |text: &str| text.chars().count();
        let key = |(left, right): (&str, &str)| (characters(left), characters(right));
        merges.sort_by(|(a_score, a), (b_score, b)| b_score.total_cmp(a_score).then(key(*b).cmp(&key(*a))));
        Ok(merges.into_iter().map(|(_, (left, right))| (left.to_owned(), right.to_owned())).collect())
    }

    /// Encoding with special tokens begins with begin-of-text where the file says so or, as in llama.cpp,
    /// where it says nothing and the family does.
    fn add_begin_of_text(
        &self,
        pipeline: &mut tokenizers::Tokenizer,
        spelling: Spelling,
    ) -> Result<(), ModelError> {
        let llama3 =
            matches!(self.gguf.text("tokenizer.ggml.pre"), Some("llama-bpe" | "llama3" | "llama-v3"));
        let family = spelling == Spelling::SentencePiece || llama3;
        if !self.gguf.flag("tokenizer.ggml.add_bos_token").unwrap_or(family) {
            return Ok(());
        }
        let begin = self.gguf.token_id("tokenizer.ggml.bos_token_id");
        let Some((id, text)) = begin.and_then(|id| Some((id, self.texts.get(id as usize)?))) else {
            let reason = "begin-of-text is to be added, but 'tokenizer.ggml.bos_token_id' names no token";
            return Err(ModelError::malformed(self.gguf.path(), reason));
        };
        let processor = TemplateProcessing::builder()
            .try_single(vec![text.clone(), "$A".to_owned()])
            .map_err(|reason| ModelError::malformed(self.gguf.path(), reason))?
            .special_tokens(vec![(text.clone(), id)])
            .build()
            .map_err(|error| self.malformed(&error.into()))?;
        pipeline.with_post_processor(Some(processor));
        Ok(())
    }

    fn malformed(&self, error: &tokenizers::Error) -> ModelError {
        ModelError::malformed(self.gguf.path(), format!("tokenizer: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::gguf::Gguf;
    use crate::tokenizer::Tokenizer;

    /// llama.cpp keeps vocabularies of published models with texts (`.inp`) and the ids that their original
    /// tokenizers gave (`.out`). `LLAMA_CPP` names a checkout of it.
    #[test]
    fn published_vocabularies_give_the_ids_of_their_original_tokenizers() {
        let Some(checkout) = std::env::var_os("LLAMA_CPP") else {
            println!("skipped: LLAMA_CPP names no checkout of llama.cpp");
            return;
        };
        for name in ["llama-spm", "llama-bpe", "qwen2", "gpt-2", "starcoder", "refact", "command-r"] {
            let path = Path::new(&checkout).join(format!("models/ggml-vocab-{name}.gguf"));
            let beside =
                |kind: &str| std::fs::read_to_string(path.with_extension(format!("gguf.{kind}"))).unwrap();
            let tokenizer = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
            let (texts, answers) = (beside("inp"), beside("out"));
            let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
            assert!(texts.len() > 40, "{name}");
            for (text, answer) in texts.iter().zip(answers.lines()) {
                let expected: Vec<u32> = answer.split_whitespace().map(|id| id.parse().unwrap()).collect();
                assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{name}: {text:?}");
                let bytes: Vec<u8> =
                    expected.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
                let decoded = String::from_utf8(bytes).unwrap();
                assert_eq!(decoded.trim_start_matches(' '), text.trim_start_matches(' '), "{name}");
            }
        }
    }
}
