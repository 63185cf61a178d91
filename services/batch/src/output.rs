//! How lines of output become bytes: as they are, or as gzip members of a fixed number of lines.

use std::{io::Write as _, path::Path};

use flate2::{Compression, GzBuilder};

/// Lines of a gzip member: enough to compress well, few enough to wait for.
const MEMBER_LINES: u64 = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Plain,
    Gzip,
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
            Some(other @ ("zst" | "bz2" | "xz")) => {
                Err(format!("{}: .{other} is not written here; use .gz, or no compression", path.display()))
            }
            _ => Ok(Self::Plain),
        }
    }

    /// Lines that are written together.
    pub fn block_lines(self) -> u64 {
        match self {
            Self::Plain => 1,
            Self::Gzip => MEMBER_LINES,
        }
    }

    /// The same lines are the same bytes: a gzip member carries no time and no name.
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
