//! Files that are there whole or not at all.

use std::{
    fs::File,
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;

/// Writes a file beside `file`, and puts it in its place once it is on the disk.
///
/// # Errors
/// Where the file system refuses; what was there before is then still there.
pub fn replace(file: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> anyhow::Result<()> {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = file.with_file_name(name);
    let written = File::create(&beside).and_then(|mut out| {
        write(&mut out)?;
        out.flush()?;
        out.sync_all()
    });
    let replaced = written.and_then(|()| std::fs::rename(&beside, file)).and_then(|()| sync_folder(file));
    if replaced.is_err() {
        // Half a file would take the room that the next attempt needs.
        let _ = std::fs::remove_file(&beside);
    }
    replaced.with_context(|| file.display().to_string())
}

/// The name is on the disk only when the folder is.
fn sync_folder(file: &Path) -> io::Result<()> {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}
