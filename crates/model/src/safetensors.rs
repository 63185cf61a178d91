//! Safetensors files, one or sharded, as one set of named tensors.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};

use crate::error::ModelError;
use crate::weights::{Format, Stored, map_file};

/// Bytes of the header's length, in front of the header.
const LENGTH_BYTES: usize = 8;

/// Memory-mapped safetensors files; a tensor has one home.
pub(crate) struct Safetensors {
    shards: Vec<Shard>,
    homes: HashMap<String, usize>,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Start of the tensor data.
    data: usize,
    metadata: Metadata,
}

impl Safetensors {
    /// Maps the files and reads their headers, which the `safetensors` crate checks against their lengths.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Malformed`] for a truncated or corrupt file, or a tensor in two files.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let mut shards = Vec::with_capacity(paths.len());
        let mut homes = HashMap::new();
        for path in paths {
            let shard = Shard::of(path, map_file(path)?)?;
            for name in shard.metadata.offset_keys() {
                if let Some(other) = homes.insert(name.clone(), shards.len()) {
                    let other: &Shard = &shards[other];
                    let reason = format!("tensor '{name}' is also in {}", other.path.display());
                    return Err(ModelError::malformed(path, reason));
                }
            }
            shards.push(shard);
        }
        Ok(Self { shards, homes })
    }

    /// One file that was read.
    pub(crate) fn in_memory(path: &Path, memory: Mmap) -> Result<Self, ModelError> {
        let shard = Shard::of(path, memory)?;
        let homes = shard.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { shards: vec![shard], homes })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.homes.keys().map(String::as_str)
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.homes.contains_key(name)
    }

    /// The file that holds a tensor.
    pub(crate) fn home(&self, name: &str) -> Option<&Path> {
        self.homes.get(name).map(|shard| self.shards[*shard].path.as_path())
    }

    /// A tensor as it lies in its file.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for element types other than F32, F16 and BF16.
    pub(crate) fn stored(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError> {
        self.homes.get(name).map(|shard| self.shards[*shard].stored(name)).transpose()
    }
}

impl Shard {
    fn of(path: &Path, map: Mmap) -> Result<Self, ModelError> {
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| ModelError::malformed(path, format!("not a sound safetensors file: {error}")))?;
        Ok(Self { path: path.to_owned(), data: LENGTH_BYTES + header, map, metadata })
    }

    fn stored(&self, name: &str) -> Result<Stored<'_>, ModelError> {
        let info = self.metadata.info(name).expect("homes lists the tensors of this shard");
        let format = match info.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::BF16,
            other => {
                let feature = format!("tensor '{name}' of type {other:?}");
                return Err(ModelError::unsupported(&self.path, feature));
            }
        };
        let (start, end) = info.data_offsets;
        Ok(Stored { shape: &info.shape, format, bytes: &self.map[self.data + start..self.data + end] })
    }
}
