//! Lines from files, patterns and standard input, compressed or not, one at a time.

mod zstandard;

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _, Write as _},
    path::{Path, PathBuf},
};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};
use uniarm_proto::limits::REQUEST_MESSAGE_BYTES_MAX;

use crate::{digest::hexadecimal, private};
pub(crate) use zstandard::Frames;

/// Bytes of a line: a longer one would not fit into a request either.
pub const LINE_BYTES_MAX: usize = REQUEST_MESSAGE_BYTES_MAX;

/// Files that patterns may name together: beyond, a pattern is a mistake.
const FILES_MAX: usize = 100_000;

/// Name of standard input on the command line.
pub const STANDARD_INPUT: &str = "-";

/// What some editors begin a file with; it says nothing in UTF-8.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Suffix of the copy of standard input beside the output: a second life needs the lines again.
const COPY_SUFFIX: &str = ".stdin";

/// The files of a job, in order.
#[derive(Debug, Clone)]
pub struct Source {
    files: Vec<PathBuf>,
}

/// Where a line stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub file: PathBuf,
    /// From 1.
    pub line: u64,
}

/// A line that is not blank.
#[derive(Debug)]
pub struct Line {
    pub place: Place,
    /// Counted over all files, from 0, without blank lines.
    pub index: u64,
    /// `None`: longer than [`LINE_BYTES_MAX`].
    pub text: Option<Vec<u8>>,
}

/// Reads the lines of a source from the first one on.
pub struct Lines {
    files: std::vec::IntoIter<PathBuf>,
    current: Option<(PathBuf, Box<dyn BufRead + Send>)>,
    line: u64,
    index: u64,
    digest: Sha256,
}

/// What was read at one place of a file.
enum Read {
    /// As in [`Line::text`].
    Line(Option<Vec<u8>>),
    End,
}

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{}: {source}", file.display())]
    File { file: PathBuf, source: io::Error },
    #[error("{pattern}: {reason}")]
    Pattern { pattern: String, reason: String },
}

// === impl Source ===

impl Source {
    /// `names`: files, patterns such as `part-*.jsonl.gz`, or `-` alone. Standard input is copied beside `output`.
    ///
    /// # Errors
    /// A pattern that is none or finds nothing, and a file that cannot be read or written.
    pub fn open(names: &[String], output: &Path) -> Result<Self, SourceError> {
        if names == [STANDARD_INPUT] {
            return Ok(Self { files: vec![copy_of_standard_input(output)?] });
        }
        let mut files = Vec::new();
        for name in names {
            files.extend(named_by(name)?);
            if files.len() > FILES_MAX {
                let reason = format!("names more than {FILES_MAX} files");
                return Err(SourceError::Pattern { pattern: name.clone(), reason });
            }
        }
        Ok(Self { files })
    }

    pub fn lines(&self) -> Lines {
        let files = self.files.clone().into_iter();
        Lines { files, current: None, line: 0, index: 0, digest: Sha256::new() }
    }

    /// Removes the copy of standard input, if that is what it reads: the job is done.
    pub fn forget_copy(&self, output: &Path) {
        if self.files == [copy_path(output)] {
            // A file that stays behind harms nobody.
            let _ = std::fs::remove_file(&self.files[0]);
        }
    }
}

/// A file is taken by its name, even where the name has a pattern's characters.
fn named_by(name: &str) -> Result<Vec<PathBuf>, SourceError> {
    let failed = |reason: String| SourceError::Pattern { pattern: name.to_owned(), reason };
    if name == STANDARD_INPUT {
        return Err(failed("standard input stands alone: no other file may be named with it".into()));
    }
    let path = PathBuf::from(name);
    if path.exists() || !name.contains(['*', '?', '[']) {
        return Ok(vec![path]);
    }
    let paths = glob::glob(name).map_err(|error| failed(error.to_string()))?;
    let files = paths.collect::<Result<Vec<_>, _>>().map_err(|error| failed(error.to_string()))?;
    match files.is_empty() {
        true => Err(failed("no file has such a name".into())),
        false => Ok(files),
    }
}

fn copy_path(output: &Path) -> PathBuf {
    let mut path = output.as_os_str().to_owned();
    path.push(COPY_SUFFIX);
    path.into()
}

fn copy_of_standard_input(output: &Path) -> Result<PathBuf, SourceError> {
    let copy = copy_path(output);
    let write = || -> io::Result<()> {
        let mut file = private::create(&copy)?;
        io::copy(&mut io::stdin().lock(), &mut file)?;
        file.flush()
    };
    write().map_err(|source| SourceError::File { file: copy.clone(), source })?;
    Ok(copy)
}

fn open(file: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    let reader = BufReader::new(File::open(file)?);
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => Ok(Box::new(BufReader::new(MultiGzDecoder::new(reader)))),
        Some("zst") => Ok(Box::new(BufReader::new(Frames::new(reader)))),
        Some("bz2" | "xz") => {
            let reason = "is compressed in a way that is not read here; use gzip or zstd, or `xzcat FILE | uniarm batch -`";
            Err(io::Error::new(io::ErrorKind::Unsupported, reason))
        }
        _ => Ok(Box::new(reader)),
    }
}

// === impl Lines ===

impl Lines {
    /// # Errors
    /// A file that cannot be read.
    pub fn next_line(&mut self) -> Result<Option<Line>, SourceError> {
        loop {
            let Some((file, reader)) = &mut self.current else {
                let Some(file) = self.files.next() else { return Ok(None) };
                let reader =
                    open(&file).map_err(|source| SourceError::File { file: file.clone(), source })?;
                self.line = 0;
                // Files are not joined: a line that ends with its file is a line.
                self.digest.update([0]);
                self.current = Some((file, reader));
                continue;
            };
            let text = read_line(reader, &mut self.digest)
                .map_err(|source| SourceError::File { file: file.clone(), source })?;
            match text {
                Read::End => self.current = None,
                Read::Line(mut text) => {
                    self.line += 1;
                    if let Some(text) =
                        text.as_mut().filter(|text| self.line == 1 && text.starts_with(BYTE_ORDER_MARK))
                    {
                        text.drain(..BYTE_ORDER_MARK.len());
                    }
                    if text.as_ref().is_some_and(|text| text.trim_ascii().is_empty()) {
                        continue;
                    }
                    let place = Place { file: file.clone(), line: self.line };
                    let index = self.index;
                    self.index += 1;
                    return Ok(Some(Line { place, index, text }));
                }
            }
        }
    }

    /// The next line's.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Of all that was read, in hexadecimal.
    pub fn digest(&self) -> String {
        hexadecimal(&self.digest.clone().finalize())
    }
}

/// Memory stays bounded, however long the line is.
fn read_line(reader: &mut impl BufRead, digest: &mut Sha256) -> io::Result<Read> {
    let mut text = Vec::new();
    let limit = LINE_BYTES_MAX as u64 + 1;
    if reader.by_ref().take(limit).read_until(b'\n', &mut text)? == 0 {
        return Ok(Read::End);
    }
    digest.update(&text);
    if text.last() == Some(&b'\n') || text.len() <= LINE_BYTES_MAX {
        return Ok(Read::Line(Some(text)));
    }
    loop {
        text.clear();
        reader.by_ref().take(limit).read_until(b'\n', &mut text)?;
        digest.update(&text);
        if text.last().is_none_or(|last| *last == b'\n') {
            return Ok(Read::Line(None));
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}
