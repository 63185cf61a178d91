//! The files of a host: their bytes in a folder, a record beside each, and bounds for all of them together.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    fs::{File, OpenOptions},
    io::AsyncWriteExt as _,
};
use uniarm_openai::Failure;

use super::record::Owner;
use crate::private;

/// Bytes of one file, as OpenAI has it.
pub const FILE_BYTES_MAX: u64 = 512 << 20;

/// Uploads at once: each holds a connection and a file that is not whole yet.
const UPLOADS_MAX: usize = 16;

/// Ending of a file that is being written: one that a crash left behind is nobody's.
const UNFINISHED: &str = "part";

/// A file on disk and on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    pub id: String,
    #[serde(default)]
    pub owner: Owner,
    pub bytes: u64,
    /// Seconds since 1970.
    pub created_at: u64,
    pub filename: String,
    pub purpose: String,
}

/// Bounds of what a host keeps.
#[derive(Debug, Clone, Copy)]
pub struct ShelfLimits {
    pub files_max: usize,
    /// Of all files, and of what batches write.
    pub bytes_max: u64,
}

#[derive(Debug)]
pub struct Shelf {
    folder: PathBuf,
    limits: ShelfLimits,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    files: BTreeMap<String, FileRecord>,
    /// Bytes of what is being written, by the name of who writes it.
    growing: BTreeMap<String, u64>,
    uploads: usize,
    /// Files that batches under way will need.
    promised: usize,
}

/// A file that is coming in. Dropped before its end, it leaves nothing behind.
pub struct Upload {
    shelf: Arc<Shelf>,
    id: String,
    file: File,
    bytes: u64,
    is_whole: bool,
}

// === impl FileRecord ===

impl FileRecord {
    pub fn as_json(&self) -> Value {
        let mut object = serde_json::to_value(self).expect("strings and numbers");
        object.as_object_mut().map(|fields| fields.remove("owner"));
        object["object"] = "file".into();
        object["status"] = "processed".into();
        object
    }
}

// === impl Shelf ===

impl Shelf {
    /// # Errors
    /// When the folder cannot be read or written.
    pub fn open(folder: PathBuf, limits: ShelfLimits) -> io::Result<Self> {
        private::make_folder(&folder)?;
        for path in paths(&folder, UNFINISHED)? {
            std::fs::remove_file(path)?;
        }
        let mut files = BTreeMap::new();
        for path in paths(&folder, "json")? {
            let record: FileRecord = read_record(&path)?;
            files.insert(record.id.clone(), record);
        }
        Ok(Self { folder, limits, held: Mutex::new(Held { files, ..Held::default() }) })
    }

    /// All files, the newest first.
    pub fn list(&self) -> Vec<FileRecord> {
        let mut files: Vec<_> = self.held.lock().files.values().cloned().collect();
        files.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        files
    }

    /// `param`: the field that names it.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn get(&self, param: &str, id: &str) -> Result<FileRecord, Failure> {
        self.held.lock().files.get(id).cloned().ok_or_else(|| not_here(param, id))
    }

    /// Where its bytes are. Only names that [`Self::get`] knows are paths.
    pub fn path(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    /// So many files will come.
    pub fn owe(&self, files: usize) {
        self.held.lock().promised += files;
    }

    /// They have come, or will not.
    pub fn release(&self, files: usize) {
        let mut held = self.held.lock();
        held.promised = held.promised.saturating_sub(files);
    }

    /// Takes note of so many bytes that `who` has written. False: there is no room for more.
    pub fn grows(&self, who: &str, bytes: u64) -> bool {
        let mut held = self.held.lock();
        held.growing.insert(who.to_owned(), bytes);
        held.bytes() <= self.limits.bytes_max
    }

    pub fn has_grown(&self, who: &str) {
        self.held.lock().growing.remove(who);
    }

    /// # Errors
    /// When there is no room, or the file system refuses.
    pub async fn begin_upload(self: &Arc<Self>) -> Result<Upload, Failure> {
        let id = format!("file-{:032x}", rand::random::<u128>());
        {
            let mut held = self.held.lock();
            self.limits.check(&held, 1, 0)?;
            if held.uploads >= UPLOADS_MAX {
                let message =
                    format!("{UPLOADS_MAX} files are coming in already; try again when one is whole");
                return Err(Failure::at_the_door(429, "uploads_full", message));
            }
            held.uploads += 1;
            held.growing.insert(id.clone(), 0);
        }
        let mut options = OpenOptions::from(private::to_write());
        let file = options.truncate(true).open(unfinished(&self.path(&id))).await;
        match file {
            Ok(file) => Ok(Upload { shelf: Arc::clone(self), id, file, bytes: 0, is_whole: false }),
            Err(error) => {
                self.end_upload(&id);
                Err(refused(&error))
            }
        }
    }

    /// Puts a whole file on the shelf, in the place of one with its id.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn put(&self, from: &Path, record: FileRecord) -> io::Result<()> {
        std::fs::rename(from, self.path(&record.id))?;
        write_record(&self.path(&format!("{}.json", record.id)), &record)?;
        self.held.lock().files.insert(record.id.clone(), record);
        Ok(())
    }

    /// # Errors
    /// When there is no such file, or the file system refuses.
    pub fn remove(&self, id: &str) -> Result<(), Failure> {
        let mut held = self.held.lock();
        held.files.remove(id).ok_or_else(|| not_here("file_id", id))?;
        // The record first: bytes without a record are nobody's.
        let record = std::fs::remove_file(self.path(&format!("{id}.json")));
        record.and_then(|()| std::fs::remove_file(self.path(id))).map_err(|error| refused(&error))
    }

    /// Where a file with this id may be written before it is put on the shelf.
    pub fn draft(&self, id: &str) -> PathBuf {
        unfinished(&self.path(id))
    }

    /// Whether so much more would fit.
    ///
    /// # Errors
    /// When there are too many files or bytes already.
    pub fn check_room(&self, files: usize, bytes: u64) -> Result<(), Failure> {
        self.limits.check(&self.held.lock(), files, bytes)
    }

    fn end_upload(&self, id: &str) {
        let mut held = self.held.lock();
        held.uploads -= 1;
        held.growing.remove(id);
    }
}

// === impl ShelfLimits ===

impl ShelfLimits {
    fn check(&self, held: &Held, files: usize, bytes: u64) -> Result<(), Failure> {
        let Self { files_max, bytes_max } = self;
        if held.files.len() + held.uploads + held.promised + files > *files_max {
            let message = format!("{files_max} files are the limit: delete some");
            return Err(Failure::at_the_door(429, "files_full", message));
        }
        if held.bytes() + bytes > *bytes_max {
            let message = format!("{bytes_max} bytes are the limit of all files: delete some");
            return Err(Failure::at_the_door(429, "storage_full", message));
        }
        Ok(())
    }
}

// === impl Held ===

impl Held {
    fn bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes).sum::<u64>() + self.growing.values().sum::<u64>()
    }
}

// === impl Upload ===

impl Upload {
    /// # Errors
    /// When the file becomes too large, the shelf is full, or the file system refuses.
    pub async fn write(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        self.bytes += chunk.len() as u64;
        if self.bytes > FILE_BYTES_MAX {
            let message = format!("file: has more than {FILE_BYTES_MAX} bytes: split it");
            let failure = Failure::at_the_door(413, "body_too_large", message);
            return Err(Failure { param: Some("file".into()), ..failure });
        }
        {
            let mut held = self.shelf.held.lock();
            self.shelf.limits.check(&held, 0, chunk.len() as u64)?;
            held.growing.insert(self.id.clone(), self.bytes);
        }
        self.file.write_all(chunk).await.map_err(|error| refused(&error))
    }

    /// # Errors
    /// When the file system refuses.
    pub async fn finish(
        mut self,
        owner: Owner,
        filename: String,
        purpose: String,
        now: u64,
    ) -> Result<FileRecord, Failure> {
        let synced = async {
            self.file.flush().await?;
            self.file.sync_all().await
        };
        synced.await.map_err(|error| refused(&error))?;
        let (id, bytes) = (self.id.clone(), self.bytes);
        let record = FileRecord { id, owner, bytes, created_at: now, filename, purpose };
        let put = tokio::task::block_in_place(|| self.shelf.put(&self.shelf.draft(&self.id), record.clone()));
        put.map_err(|error| refused(&error))?;
        self.is_whole = true;
        Ok(record)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.shelf.end_upload(&self.id);
        if !self.is_whole {
            // What stays behind is removed at the next start.
            let _ = std::fs::remove_file(self.shelf.draft(&self.id));
        }
    }
}

// === records on disk ===

/// Files of a folder with this ending.
pub fn paths(folder: &Path, ending: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
    Ok(found)
}

pub fn read_record<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let text = std::fs::read(path)?;
    serde_json::from_slice(&text).map_err(|error| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} is no record: {error}", path.display()))
    })
}

/// Whole or not at all, whatever happens meanwhile.
pub fn write_record<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let text = serde_json::to_vec(record)?;
    let fresh = unfinished(path);
    private::write(&fresh, &text)?;
    std::fs::rename(&fresh, path)
}

fn unfinished(path: &Path) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(".");
    path.push(UNFINISHED);
    path.into()
}

/// Of a name that nobody has.
pub fn not_here(param: &str, id: &str) -> Failure {
    let message = format!("{param}: {id:?} is not here");
    Failure { param: Some(param.to_owned()), ..Failure::at_the_door(404, "not_found", message) }
}

/// What a client hears of a folder that fails; why it does is for whoever runs the router.
pub const STORAGE_FAILED: &str = "files cannot be kept or read here at present; try again later";

/// Of a file system that does not do what it should.
pub fn refused(error: &io::Error) -> Failure {
    tracing::error!(%error, "the folder of files and batches (--batch-dir) cannot be used");
    Failure::at_the_door(500, "storage_failed", STORAGE_FAILED)
}
