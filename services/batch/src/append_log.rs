//! A file that only grows by whole lines, belongs to one process at a time, survives a kill at any byte, and is its owner's to
//! read: lines are what people asked and were answered.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::private;

/// Seconds of work that a power cut may cost.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// A process that was forked a moment ago holds its parent's locks until its own program starts.
const FORK_PATIENCE: Duration = Duration::from_millis(500);
const FORK_PAUSE: Duration = Duration::from_millis(10);

/// Holds its file until it is dropped.
#[derive(Debug)]
pub struct AppendLog {
    path: PathBuf,
    file: File,
    bytes: u64,
    unsynced: usize,
    /// Lines that a power cut may cost.
    unsynced_max: usize,
    synced: Instant,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{}: {source}; what was there before is kept, make room or correct the path and repeat the command", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is in use by another process; wait for it or stop it", path.display())]
    Busy { path: PathBuf },
}

// === impl AppendLog ===

impl AppendLog {
    /// Opens or makes the file, and returns what it holds: whole lines. What follows the last line end was being
    /// written when its process died, and is cut off.
    ///
    /// # Errors
    /// When another process holds it, or the file system refuses.
    pub fn open(path: &Path, unsynced_max: usize) -> Result<(Self, Vec<u8>), LogError> {
        let failed = |source| LogError::File { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let mut file = open_locked(path, private::to_write())?;
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(failed)?;
        let whole = content.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        content.truncate(whole);
        file.set_len(whole as u64).map_err(failed)?;
        file.seek(SeekFrom::Start(whole as u64)).map_err(failed)?;
        let synced = Instant::now();
        let log =
            Self { path: path.to_owned(), file, bytes: whole as u64, unsynced: 0, unsynced_max, synced };
        Ok((log, content))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes a line with its line end.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn append(&mut self, line: &[u8]) -> Result<(), LogError> {
        self.file.write_all(line).map_err(|source| self.failed(source))?;
        self.bytes += line.len() as u64;
        self.unsynced += 1;
        if self.unsynced >= self.unsynced_max || self.synced.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    /// # Errors
    /// When the file system refuses.
    pub fn sync(&mut self) -> Result<(), LogError> {
        self.file.sync_data().map_err(|source| self.failed(source))?;
        self.unsynced = 0;
        self.synced = Instant::now();
        Ok(())
    }

    fn failed(&self, source: io::Error) -> LogError {
        LogError::File { path: self.path.clone(), source }
    }
}

/// A file to read and write that no other process has.
/// `made_with`: how it is made if it is not there.
pub(crate) fn open_locked(path: &Path, mut made_with: OpenOptions) -> Result<File, LogError> {
    let failed = |source| LogError::File { path: path.to_owned(), source };
    let file = made_with.read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if began.elapsed() < FORK_PATIENCE => {
                std::thread::sleep(FORK_PAUSE);
            }
            Err(TryLockError::WouldBlock) => return Err(LogError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
    }
}
