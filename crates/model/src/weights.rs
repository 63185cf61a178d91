//! Named tensors as f32, whatever file format and number format they are stored in.
//!
//! Names and row order are Hugging Face's. A `llama` GGUF holds the rows of the query and key projections in
//! the interleaved rotary order of the original release; they are put back into half-split order here, so
//! that no forward pass and no adapter ever sees the difference.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, Device, Tensor};
use memmap2::{Mmap, MmapMut};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::config::{Architecture, Config};
use crate::error::ModelError;
use crate::gguf::Gguf;
use crate::kernels::panels::{self, Numbers};
use crate::quantised;
use crate::safetensors::Safetensors;

/// Elements that one task decodes: large enough to pay for the task, small enough to share a matrix out.
const DECODE_ELEMENTS: usize = 1 << 18;
/// Bytes of one sample, and samples per tensor, in a fingerprint: enough to meet any change of training or
/// quantisation, few enough that a 7B model costs some 50 MB of reads.
const SAMPLE_BYTES: usize = 64;
const SAMPLES: usize = 16;

/// The tensors of one model, memory-mapped and decoded on demand.
pub struct Weights {
    store: Store,
    /// The model's file, or its folder; named in errors.
    path: PathBuf,
    /// Rows per head of query and key projections in interleaved rotary order.
    interleaved_head_dim: Option<usize>,
}

enum Store {
    Gguf(Box<Gguf>),
    Safetensors(Safetensors),
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    F16,
    BF16,
    /// Blocks of quantised elements along the last dimension.
    Blocks(GgmlDType),
}

/// A tensor as it lies in a file.
pub(crate) struct Stored<'a> {
    /// Row-major.
    pub shape: &'a [usize],
    pub format: Format,
    pub bytes: &'a [u8],
}

impl Weights {
    pub(crate) fn from_gguf(gguf: Gguf, config: &Config) -> Self {
        let interleaved = config.architecture == Architecture::Llama;
        Self {
            path: gguf.path().to_owned(),
            store: Store::Gguf(Box::new(gguf)),
            interleaved_head_dim: interleaved.then_some(config.head_dim),
        }
    }

    /// Tensors of one or more safetensors files; `path` names them together in errors.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Malformed`] for a truncated or corrupt file.
    pub fn from_safetensors(path: &Path, files: &[PathBuf]) -> Result<Self, ModelError> {
        let store = Store::Safetensors(Safetensors::open(files)?);
        Ok(Self { store, path: path.to_owned(), interleaved_head_dim: None })
    }

    /// Tensors of one safetensors file that was read, not mapped.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] for a corrupt file.
    pub(crate) fn from_memory(path: &Path, memory: Mmap) -> Result<Self, ModelError> {
        let store = Store::Safetensors(Safetensors::in_memory(path, memory)?);
        Ok(Self { store, path: path.to_owned(), interleaved_head_dim: None })
    }

    /// The model's file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.store {
            Store::Gguf(gguf) => gguf_name(name).is_some_and(|name| gguf.contains(&name)),
            Store::Safetensors(files) => files.contains(name),
        }
    }

    /// Names as they stand in the files: Hugging Face's, or those of GGUF. In no order.
    pub fn stored_names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match &self.store {
            Store::Gguf(gguf) => Box::new(gguf.names()),
            Store::Safetensors(files) => Box::new(files.names()),
        }
    }

    /// Dimensions of a tensor, row-major.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`]; [`ModelError::Unsupported`] for its number format.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>, ModelError> {
        Ok(self.stored(name)?.shape.to_vec())
    }

    /// A tensor as f32 on the CPU: contiguous, of exactly `shape`, with Hugging Face's name and row order.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::Shape`], [`ModelError::Unsupported`] for its number format.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let rows = shape.first().copied().unwrap_or(0);
        self.rows(name, shape, 0..rows)
    }

    /// Rows of a tensor of `shape`, as f32 (rows.len(), …). Other rows are not read: what a shard needs. The
    /// rows of a vector are its elements.
    ///
    /// # Errors
    /// As [`Weights::tensor`]; [`ModelError::Invalid`] for rows beyond the tensor.
    pub fn rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Tensor, ModelError> {
        let stored = self.stored(name)?;
        self.check_shape(name, &stored, shape)?;
        if rows.start > rows.end || rows.end > shape.first().copied().unwrap_or(0) {
            let reason = format!("{rows:?} of tensor '{name}' with shape {shape:?}");
            return Err(ModelError::Invalid { field: "rows", reason });
        }
        let mut wanted = shape.to_vec();
        wanted[0] = rows.len();
        let elements = match self.interleaved_head_dim.filter(|_| is_rotary(name)) {
            Some(head_dim) => half_split(&stored, rows, head_dim),
            None => stored.decode(rows),
        };
        let elements = elements.map_err(|reason| ModelError::malformed(&self.file_of(name), reason))?;
        Ok(Tensor::from_vec(elements, wanted, &Device::Cpu)?)
    }

    /// Rows of a tensor as plain numbers, row-major; errors as of [`Weights::rows`].
    pub fn floats(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        Ok(self.rows(name, shape, rows)?.flatten_all()?.to_vec1()?)
    }

    /// How a kernel holds a matrix without loss and without waste: as it is stored, or as f32 where no kernel
    /// takes that format.
    ///
    /// # Errors
    /// As [`Weights::shape`].
    pub(crate) fn format(&self, name: &str) -> Result<panels::Format, ModelError> {
        Ok(match self.stored(name)?.format {
            Format::F32 => panels::Format::F32,
            Format::F16 => panels::Format::F16,
            Format::BF16 => panels::Format::BF16,
            Format::Blocks(kind) => {
                quantised::format(kind).map_or(panels::Format::F32, panels::Format::Blocks)
            }
        })
    }

    /// Rows of a matrix of `shape` in `format`, which is f32 or one that covers [`Weights::format`] of its name.
    /// Other rows are not read.
    ///
    /// # Errors
    /// As [`Weights::tensor`].
    pub(crate) fn numbers(
        &self,
        name: &str,
        shape: &[usize; 2],
        wanted: Range<usize>,
        format: panels::Format,
    ) -> Result<Numbers, ModelError> {
        if format == panels::Format::F32 {
            return Ok(Numbers::F32(self.floats(name, shape, wanted)?));
        }
        let stored = self.stored(name)?;
        self.check_shape(name, &stored, shape)?;
        let [rows, inputs] = *shape;
        let row_bytes = stored.bytes.len() / rows;
        let ordered: Cow<'_, [u8]> = match self.interleaved_head_dim.filter(|_| is_rotary(name)) {
            None => stored.bytes[wanted.start * row_bytes..wanted.end * row_bytes].into(),
            Some(head_dim) if rows % head_dim == 0 => wanted
                .flat_map(|row| &stored.bytes[interleaved_row(row, head_dim) * row_bytes..][..row_bytes])
                .copied()
                .collect(),
            Some(head_dim) => {
                let reason = format!("{rows} rows are not whole heads of {head_dim}");
                return Err(ModelError::malformed(&self.file_of(name), reason));
            }
        };
        let bits = || ordered.as_chunks().0.iter().map(|bits| u16::from_le_bytes(*bits)).collect();
        Ok(match (stored.format, format) {
            (Format::F16, panels::Format::F16) => Numbers::F16(bits()),
            (Format::BF16, panels::Format::BF16) => Numbers::BF16(bits()),
            (Format::Blocks(kind), panels::Format::Blocks(format)) => {
                let blocks = quantised::decode(kind, &ordered, inputs).expect("a format that kernels take");
                Numbers::Blocks(blocks.widen(format))
            }
            _ => unreachable!("{format:?} does not cover tensor '{name}'"),
        })
    }

    /// Checks that the files hold the tensors of `config`, in their shapes, and no others: a surplus tensor
    /// belongs to an architecture that would run here and answer nonsense.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::Shape`], [`ModelError::Unsupported`].
    pub(crate) fn check(&self, config: &Config) -> Result<(), ModelError> {
        let mut known = HashSet::new();
        for (name, expected) in layout(config) {
            let found = self.stored(&name)?.shape;
            if found != expected {
                let (file, found) = (self.file_of(&name), found.to_vec());
                return Err(ModelError::Shape { file, name, expected, found });
            }
            known.insert(match &self.store {
                Store::Gguf(_) => gguf_name(&name).expect("every tensor of the layout has a GGUF name"),
                Store::Safetensors(_) => name,
            });
        }
        match self.stored_names().find(|name| !known.contains(*name) && !is_redundant(name, config)) {
            None => Ok(()),
            Some(surplus) => {
                let feature = format!("tensor '{surplus}' (an unknown variant of the architecture)");
                Err(ModelError::unsupported(&self.path, feature))
            }
        }
    }

    /// Identity of a backbone at the price of a glance: SHA-256 over what the forward pass takes from the
    /// configuration and, for each tensor in the order of [`layout`], its name, shape and stored bytes at 16
    /// evenly spread places. Sharding, file names and repository revisions do not matter; another training,
    /// fine-tuning or quantisation does.
    pub(crate) fn fingerprint(&self, config: &Config) -> Result<[u8; 32], ModelError> {
        let mut hash = Sha256::new();
        hash.update(b"uniarm backbone 1\n");
        for count in [config.heads, config.kv_heads, config.head_dim] {
            hash.update((count as u64).to_le_bytes());
        }
        hash.update(config.rms_norm_epsilon.to_le_bytes());
        for frequency in config.rope.frequencies(config.head_dim) {
            // As f32: a GGUF stores the outcome of rope scaling, a config.json its parameters.
            hash.update((frequency as f32).to_le_bytes());
        }
        for (name, _) in layout(config) {
            let stored = self.stored(&name)?;
            hash.update(format!("{name} {:?}\n", stored.shape));
            let last = stored.bytes.len().saturating_sub(SAMPLE_BYTES);
            for sample in 0..SAMPLES {
                let start = last * sample / (SAMPLES - 1);
                hash.update(&stored.bytes[start..stored.bytes.len().min(start + SAMPLE_BYTES)]);
            }
        }
        Ok(hash.finalize().into())
    }

    fn stored(&self, name: &str) -> Result<Stored<'_>, ModelError> {
        let stored = match &self.store {
            Store::Gguf(gguf) => gguf_name(name).and_then(|name| gguf.stored(&name)),
            Store::Safetensors(files) => files.stored(name)?,
        };
        stored.ok_or_else(|| ModelError::MissingTensor { file: self.path.clone(), name: name.to_owned() })
    }

    fn check_shape(&self, name: &str, stored: &Stored<'_>, shape: &[usize]) -> Result<(), ModelError> {
        if stored.shape == shape {
            return Ok(());
        }
        let (expected, found) = (shape.to_vec(), stored.shape.to_vec());
        Err(ModelError::Shape { file: self.file_of(name), name: name.to_owned(), expected, found })
    }

    fn file_of(&self, name: &str) -> PathBuf {
        match &self.store {
            Store::Gguf(_) => self.path.clone(),
            Store::Safetensors(files) => files.home(name).unwrap_or(&self.path).to_owned(),
        }
    }
}

impl Format {
    /// Bytes of a tensor, if there can be one of this format and shape.
    pub(crate) fn bytes(self, shape: &[usize]) -> Option<usize> {
        let last = *shape.last()?;
        let elements = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size))?;
        if elements == 0 || !last.is_multiple_of(self.block_elements()) {
            return None;
        }
        self.bytes_of(elements)
    }

    /// Bytes of a run of whole blocks.
    fn bytes_of(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Blocks(kind) => kind.block_size(),
        }
    }

    fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Blocks(kind) => kind.type_size(),
        }
    }

    /// Decodes whole blocks: `bytes` holds exactly `out.len()` elements.
    fn decode(self, bytes: &[u8], out: &mut [f32]) -> Result<(), String> {
        match self {
            Self::F32 => each(bytes, out, f32::from_le_bytes),
            Self::F16 => each(bytes, out, |pair| half::f16::from_le_bytes(pair).to_f32()),
            Self::BF16 => each(bytes, out, |pair| half::bf16::from_le_bytes(pair).to_f32()),
            Self::Blocks(kind) => {
                // Candle reads blocks in place and asserts their alignment.
                debug_assert!(bytes.as_ptr().addr().is_multiple_of(2));
                match kind.from_data(Cow::Borrowed(bytes)).dequantize(out.len()) {
                    Ok(CpuStorage::F32(elements)) => out.copy_from_slice(&elements),
                    Ok(_) => return Err(format!("{kind:?} did not decode to f32")),
                    Err(error) => return Err(error.to_string()),
                }
            }
        }
        Ok(())
    }
}

impl Stored<'_> {
    /// Elements of rows, row-major.
    pub(crate) fn decode(&self, rows: Range<usize>) -> Result<Vec<f32>, String> {
        let row_elements: usize = self.shape[1..].iter().product();
        let split = || format!("rows {rows:?} of shape {:?} split a block of {:?}", self.shape, self.format);
        let start = self.format.bytes_of(rows.start * row_elements).ok_or_else(split)?;
        let end = self.format.bytes_of(rows.end * row_elements).ok_or_else(split)?;

        let mut elements = vec![0.0; rows.len() * row_elements];
        let task_elements = DECODE_ELEMENTS.next_multiple_of(self.format.block_elements());
        let task_bytes = self.format.bytes_of(task_elements).expect("a multiple of the block");
        elements
            .par_chunks_mut(task_elements)
            .zip(self.bytes[start..end].par_chunks(task_bytes))
            .try_for_each(|(out, bytes)| self.format.decode(bytes, out))?;
        Ok(elements)
    }
}

/// Maps a file for reading.
///
/// # Errors
/// [`ModelError::Io`]; [`ModelError::Malformed`] for an empty file.
pub(crate) fn map_file(path: &Path) -> Result<Mmap, ModelError> {
    let file = File::open(path).map_err(|error| ModelError::io(path, error))?;
    let metadata = file.metadata().map_err(|error| ModelError::io(path, error))?;
    if !metadata.is_file() {
        return Err(ModelError::malformed(path, "not a file"));
    }
    if metadata.len() == 0 {
        return Err(ModelError::malformed(path, "the file is empty"));
    }
    // SAFETY: the map is only read. Model files are replaced by renaming, never rewritten in place; who
    // truncates one under a running process gets SIGBUS, as with every memory-mapped loader.
    unsafe { Mmap::map(&file) }.map_err(|error| ModelError::io(path, error))
}

/// A copy of a file in memory, which stays as it is whatever becomes of the file. For small files that are read while their
/// process serves others.
pub(crate) fn read_file(path: &Path, bytes_max: u64) -> Result<Mmap, ModelError> {
    let failed = |error| ModelError::io(path, error);
    let mut file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let bytes = metadata.len();
    if !metadata.is_file() || bytes == 0 || bytes > bytes_max {
        return Err(ModelError::malformed(path, format!("not a file of 1..={bytes_max} bytes")));
    }
    let mut memory = MmapMut::map_anon(bytes as usize).map_err(failed)?;
    file.read_exact(&mut memory).map_err(failed)?;
    memory.make_read_only().map_err(failed)
}

/// The same of bytes that are in memory.
pub(crate) fn read_only(bytes: &[u8]) -> std::io::Result<Mmap> {
    let mut memory = MmapMut::map_anon(bytes.len())?;
    memory.copy_from_slice(bytes);
    memory.make_read_only()
}

/// The tensors of an architecture in the order of the forward pass: Hugging Face name and shape.
pub(crate) fn layout(config: &Config) -> Vec<(String, Vec<usize>)> {
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let queries = config.heads * config.head_dim;
    let keys = config.kv_heads * config.head_dim;

    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocabulary, hidden])];
    for layer in 0..config.layers {
        let mut push = |name: &str, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape));
        };
        push("input_layernorm.weight", vec![hidden]);
        for (projection, rows) in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)] {
            push(&format!("self_attn.{projection}.weight"), vec![rows, hidden]);
            if config.qkv_bias {
                push(&format!("self_attn.{projection}.bias"), vec![rows]);
            }
        }
        push("self_attn.o_proj.weight", vec![hidden, queries]);
        push("post_attention_layernorm.weight", vec![hidden]);
        push("mlp.gate_proj.weight", vec![intermediate, hidden]);
        push("mlp.up_proj.weight", vec![intermediate, hidden]);
        push("mlp.down_proj.weight", vec![hidden, intermediate]);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tied_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocabulary, hidden]));
    }
    tensors
}

/// What a GGUF calls a tensor of [`layout`].
fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{module}.{kind}"))
}

/// Tensors that some files carry and no forward pass reads: rotary tables (the configuration has them) and
/// a copy of tied embeddings.
fn is_redundant(name: &str, config: &Config) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || name == "rope_freqs.weight"
        || (config.tied_embeddings && name == "lm_head.weight")
}

/// Whether rows of this tensor are rotated pairwise.
fn is_rotary(name: &str) -> bool {
    name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.")
}

/// Decodes rows of a matrix or vector whose heads store row pairs (0, d/2), (1, d/2 + 1), … side by side,
/// and puts them into half-split order: 0..d/2, then d/2..d.
fn half_split(stored: &Stored<'_>, rows: Range<usize>, head_dim: usize) -> Result<Vec<f32>, String> {
    let whole_heads = rows.start / head_dim * head_dim..rows.end.next_multiple_of(head_dim);
    if whole_heads.end > stored.shape[0] {
        return Err(format!("{} rows are not whole heads of {head_dim}", stored.shape[0]));
    }
    let interleaved = stored.decode(whole_heads.clone())?;
    let row_elements: usize = stored.shape[1..].iter().product();
    let mut elements = Vec::with_capacity(rows.len() * row_elements);
    for row in rows {
        let source = interleaved_row(row, head_dim) - whole_heads.start;
        elements.extend_from_slice(&interleaved[source * row_elements..][..row_elements]);
    }
    Ok(elements)
}

/// Where a row of half-split order lies in interleaved order.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (out, element) in out.iter_mut().zip(elements) {
        *out = decode(*element);
    }
}
