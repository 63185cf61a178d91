//! What a job wrote becomes the two files of a batch: answers, and errors.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{ledger::waiting, private};

/// The part of a line of output that says where it belongs.
#[derive(Deserialize)]
struct Ended {
    response: Response,
}

#[derive(Deserialize)]
struct Response {
    status_code: u16,
}

/// A file that is there once it has a line.
struct Lazy {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    lines: u64,
}

/// Lines of the two files.
#[derive(Debug, PartialEq, Eq)]
pub struct Lines {
    pub answers: u64,
    pub errors: u64,
}

/// Writes the lines of `output` to `answers` and `errors`, and after them those that wait for one that will not come, where
/// the job was stopped; a file without lines is not made. A line that has no end is in the journal.
///
/// # Errors
/// When the file system refuses.
pub fn split(output: &Path, answers: PathBuf, errors: PathBuf) -> io::Result<Lines> {
    let mut answers = Lazy { path: answers, file: None, lines: 0 };
    let mut errors = Lazy { path: errors, file: None, lines: 0 };
    let file = match File::open(output) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Lines { answers: 0, errors: 0 }),
        Err(error) => return Err(error),
    };
    let mut reader = BufReader::new(file);
    let (mut line, mut written) = (Vec::new(), 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        if line.last() == Some(&b'\n') {
            if is_answer(&line) { &mut answers } else { &mut errors }.write(&line)?;
            written += 1;
        }
        line.clear();
    }
    for mut line in waiting(output, written)? {
        line.push('\n');
        if is_answer(line.as_bytes()) { &mut answers } else { &mut errors }.write(line.as_bytes())?;
    }
    Ok(Lines { answers: answers.finish()?, errors: errors.finish()? })
}

fn is_answer(line: &[u8]) -> bool {
    serde_json::from_slice(line).is_ok_and(|ended: Ended| ended.response.status_code == 200)
}

// === impl Lazy ===

impl Lazy {
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            empty => empty.insert(BufWriter::new(private::create(&self.path)?)),
        };
        self.lines += 1;
        file.write_all(line)
    }

    fn finish(self) -> io::Result<u64> {
        if let Some(file) = self.file {
            file.into_inner()?.sync_all()?;
        }
        Ok(self.lines)
    }
}
