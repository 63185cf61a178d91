//! How lines of output become bytes: as they are, or as gzip members or zstd frames of a fixed number of lines.

use std::{io::Write as _, path::Path};

use flate2::{Compression, GzBuilder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// Lines of a gzip member or a zstd frame: enough to compress well, few enough to wait for.
const MEMBER_LINES: u64 = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Plain,
    Gzip,
    Zstandard,
}

/// Where a line of output stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// At its request's place.
    Input,
    /// Behind those that finished before.
    Finished,
}

// === impl Encoding ===

impl Encoding {
    /// # Errors
    /// The ending of a compression that is not written here.
    pub fn of(path: &Path) -> Result<Self, String> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("gz") => Ok(Self::Gzip),
            Some("zst") => Ok(Self::Zstandard),
            Some(other @ ("bz2" | "xz")) => Err(format!(
                "{}: .{other} is not written here; use .zst, .gz, or no compression",
                path.display()
            )),
            _ => Ok(Self::Plain),
        }
    }

    /// Lines that are written together.
    pub fn block_lines(self) -> u64 {
        match self {
            Self::Plain => 1,
            Self::Gzip | Self::Zstandard => MEMBER_LINES,
        }
    }

    /// The same lines are the same bytes: compressed ones carry no time and no name.
    pub fn encode<'a>(self, lines: impl Iterator<Item = &'a str>) -> Vec<u8> {
        let mut text = Vec::new();
        for line in lines {
            text.extend_from_slice(line.as_bytes());
            text.push(b'\n');
        }
        match self {
            Self::Plain => text,
            Self::Gzip => {
                let mut member = GzBuilder::new().write(Vec::new(), Compression::default());
                let written = member.write_all(&text).and_then(|()| member.finish());
                written.expect("a vector takes all bytes")
            }
            Self::Zstandard => compress_to_vec(text.as_slice(), CompressionLevel::Fastest),
        }
    }
}

impl Order {
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Finished => "finished",
        }
    }
}
