//! The GGUF container: metadata and tensors of one memory-mapped file, every count checked against its length.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little endian.
//! Candle has a reader too; ours keeps the file mapped instead of reading each tensor through a seek, and
//! never allocates more than a small multiple of what the file holds, whatever its header claims.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use memmap2::Mmap;

use crate::error::ModelError;
use crate::weights::{Format, Stored, map_file};

const MAGIC: &[u8] = b"GGUF";
/// Alignment of tensor data where `general.alignment` says nothing.
const ALIGNMENT: usize = 32;
/// `GGML_MAX_DIMS`.
const DIMENSIONS_MAX: u32 = 4;
/// The smallest key-value pair: an empty key, a type and one byte. The smallest tensor entry: an empty
/// name, no dimensions, a type and an offset. They bound the counts of a header by the bytes left.
const METADATA_BYTES_MIN: usize = 8 + 4 + 1;
const TENSOR_BYTES_MIN: usize = 8 + 4 + 4 + 8;

/// An open GGUF file.
pub(crate) struct Gguf {
    path: PathBuf,
    map: Mmap,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Entry>,
}

/// A metadata value. Integer widths do not matter to anyone; arrays of arrays are not used by any model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Integer(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
}

/// Where a tensor lies. Dimensions are row-major, slowest first: the reverse of their order in the file.
struct Entry {
    shape: Vec<usize>,
    format: Format,
    offset: usize,
    bytes: usize,
}

/// A position in the mapped header; every step is checked against the end of the file.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl Gguf {
    /// Maps `path` and reads its header.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Malformed`] for a truncated or corrupt file,
    /// [`ModelError::Unsupported`] for tensor formats and versions that cannot be read.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let map = map_file(path)?;
        let mut reader = Reader { path, bytes: &map, at: 0 };
        let (tensor_count, metadata_count) = reader.preamble()?;

        let mut metadata = HashMap::new();
        for _ in 0..metadata_count {
            let key = reader.text("a metadata key")?;
            let kind = reader.u32("a metadata type")?;
            let value = reader.value(kind, &key)?;
            metadata.insert(key, value);
        }

        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let (name, entry) = reader.tensor_entry()?;
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(ModelError::malformed(path, format!("tensor '{name}' appears twice")));
            }
        }

        let alignment = alignment(&metadata).map_err(|reason| ModelError::malformed(path, reason))?;
        let data = reader.at.next_multiple_of(alignment);
        for (name, entry) in &mut tensors {
            let placed = entry.place(data, alignment, map.len());
            placed.map_err(|reason| ModelError::malformed(path, format!("tensor '{name}' {reason}")))?;
        }
        Ok(Self { path: path.to_owned(), map, metadata, tensors })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor as it lies in the file, by its GGUF name.
    pub(crate) fn stored(&self, name: &str) -> Option<Stored<'_>> {
        let entry = self.tensors.get(name)?;
        let bytes = &self.map[entry.offset..entry.offset + entry.bytes];
        Some(Stored { shape: &entry.shape, format: entry.format, bytes })
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn texts(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Value::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        }
    }

    pub(crate) fn float(&self, key: &str) -> Option<f32> {
        match self.get(key)? {
            Value::Float(float) => Some(*float as f32),
            Value::Integer(integer) => Some(*integer as f32),
            _ => None,
        }
    }

    /// A non-negative integer.
    pub(crate) fn count(&self, key: &str) -> Option<usize> {
        match self.get(key)? {
            Value::Integer(integer) => usize::try_from(*integer).ok(),
            _ => None,
        }
    }

    pub(crate) fn token_id(&self, key: &str) -> Option<u32> {
        self.count(key).and_then(|id| u32::try_from(id).ok())
    }
}

impl Entry {
    /// Turns the offset within the data section into one within the file. Blocks are read in place, so they
    /// must be aligned as the format promises.
    fn place(&mut self, data: usize, alignment: usize, file_bytes: usize) -> Result<(), String> {
        if !self.offset.is_multiple_of(alignment) {
            return Err(format!("is not aligned to {alignment} bytes"));
        }
        let start = data.checked_add(self.offset);
        let end = start.and_then(|start| start.checked_add(self.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes => {
                self.offset = start;
                Ok(())
            }
            _ => Err("lies outside the file: truncated or corrupt".to_owned()),
        }
    }
}

impl Reader<'_> {
    /// Magic, version and counts: (tensors, metadata pairs).
    fn preamble(&mut self) -> Result<(usize, usize), ModelError> {
        if self.take(MAGIC.len(), "the magic number")? != MAGIC {
            return Err(ModelError::malformed(self.path, "not a GGUF file"));
        }
        match self.u32("the version")? {
            2 | 3 => {}
            1 => return Err(ModelError::unsupported(self.path, "GGUF version 1")),
            other if other.swap_bytes() <= 3 => {
                return Err(ModelError::unsupported(self.path, "a big-endian GGUF"));
            }
            other => return Err(ModelError::unsupported(self.path, format!("GGUF version {other}"))),
        }
        let tensors = self.count("the tensor count", TENSOR_BYTES_MIN)?;
        let metadata = self.count("the metadata count", METADATA_BYTES_MIN)?;
        Ok((tensors, metadata))
    }

    fn tensor_entry(&mut self) -> Result<(String, Entry), ModelError> {
        let name = self.text("a tensor name")?;
        let dimensions = self.u32("a dimension count")?;
        if dimensions > DIMENSIONS_MAX {
            return Err(self.malformed(format!("tensor '{name}' has {dimensions} dimensions")));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            let size = self.u64("a dimension")?;
            shape.push(usize::try_from(size).unwrap_or(usize::MAX));
        }
        shape.reverse();
        let format = format_of(self.u32("a tensor type")?)
            .map_err(|kind| ModelError::unsupported(self.path, format!("tensor '{name}' of {kind}")))?;
        let offset = usize::try_from(self.u64("a tensor offset")?).unwrap_or(usize::MAX);
        let bytes = format
            .bytes(&shape)
            .ok_or_else(|| self.malformed(format!("tensor '{name}' cannot have shape {shape:?}")))?;
        Ok((name, Entry { shape, format, offset, bytes }))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, ModelError> {
        if kind == 9 {
            let element = self.u32(key)?;
            return self.array(element, key);
        }
        self.scalar(kind, key)
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::Integer(i64::from(self.array_of::<1>(key)?[0])),
            1 => Value::Integer(i64::from(i8::from_le_bytes(self.array_of(key)?))),
            2 => Value::Integer(i64::from(u16::from_le_bytes(self.array_of(key)?))),
            3 => Value::Integer(i64::from(i16::from_le_bytes(self.array_of(key)?))),
            4 => Value::Integer(i64::from(self.u32(key)?)),
            5 => Value::Integer(i64::from(i32::from_le_bytes(self.array_of(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array_of(key)?))),
            7 => Value::Flag(self.array_of::<1>(key)?[0] != 0),
            8 => Value::Text(self.text(key)?),
            // Nobody counts beyond 2^63.
            10 => Value::Integer(i64::try_from(self.u64(key)?).unwrap_or(i64::MAX)),
            11 => Value::Integer(i64::from_le_bytes(self.array_of(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array_of(key)?)),
            other => return Err(self.malformed(format!("'{key}' has unknown type {other}"))),
        })
    }

    fn array(&mut self, element: u32, key: &str) -> Result<Value, ModelError> {
        let bytes_min = match element {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(ModelError::unsupported(self.path, format!("'{key}', an array of arrays,"))),
            other => return Err(self.malformed(format!("'{key}' is an array of unknown type {other}"))),
        };
        let count = self.count(key, bytes_min)?;
        let (mut integers, mut floats, mut texts) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count {
            match self.scalar(element, key)? {
                Value::Integer(integer) => integers.push(integer),
                Value::Flag(flag) => integers.push(i64::from(flag)),
                Value::Float(float) => floats.push(float as f32),
                Value::Text(text) => texts.push(text),
                _ => unreachable!("a scalar is no array"),
            }
        }
        Ok(match element {
            8 => Value::Texts(texts),
            6 | 12 => Value::Floats(floats),
            _ => Value::Integers(integers),
        })
    }

    /// A count of things of at least `bytes_min` each, which must fit what is left of the file.
    fn count(&mut self, what: &str, bytes_min: usize) -> Result<usize, ModelError> {
        let count = self.u64(what)?;
        let fits = (self.bytes.len() - self.at) / bytes_min;
        match usize::try_from(count) {
            Ok(count) if count <= fits => Ok(count),
            _ => Err(self.malformed(format!("{what}: {count} entries do not fit the file"))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String, ModelError> {
        let length = self.count(what, 1)?;
        let bytes = self.take(length, what)?;
        // The format says UTF-8; vocabularies in the wild hold a few stray bytes that match no text anyway.
        Ok(String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned())
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array_of(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array_of(what)?))
    }

    fn array_of<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let bytes = self.take(N, what)?;
        Ok(bytes.try_into().expect("take returns as many bytes as asked for"))
    }

    fn take(&mut self, length: usize, what: &str) -> Result<&[u8], ModelError> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(self.malformed(format!("the file ends inside {what}")));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn malformed(&self, reason: String) -> ModelError {
        ModelError::malformed(self.path, reason)
    }
}

/// Tensor data and every tensor in it begin at a multiple of this.
fn alignment(metadata: &HashMap<String, Value>) -> Result<usize, String> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT),
        // The format asks for a multiple of 8.
        Some(Value::Integer(alignment @ 8..=65536)) if alignment % 8 == 0 => {
            Ok(usize::try_from(*alignment).expect("between 8 and 65536"))
        }
        Some(other) => Err(format!("general.alignment is {other:?}")),
    }
}

/// The tensor formats of ggml that are read; the error names one that is not.
fn format_of(kind: u32) -> Result<Format, String> {
    Ok(match kind {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Blocks(GgmlDType::Q4_0),
        3 => Format::Blocks(GgmlDType::Q4_1),
        6 => Format::Blocks(GgmlDType::Q5_0),
        7 => Format::Blocks(GgmlDType::Q5_1),
        8 => Format::Blocks(GgmlDType::Q8_0),
        10 => Format::Blocks(GgmlDType::Q2K),
        11 => Format::Blocks(GgmlDType::Q3K),
        12 => Format::Blocks(GgmlDType::Q4K),
        13 => Format::Blocks(GgmlDType::Q5K),
        14 => Format::Blocks(GgmlDType::Q6K),
        30 => Format::BF16,
        16..=23 | 29 => return Err(format!("an i-quant (ggml type {kind})")),
        other => return Err(format!("ggml type {other}")),
    })
}
