//! Files that are there whole or not at all.

use std::{fs::File, io::Write as _, path::Path};

use anyhow::Context as _;

/// Writes a file beside its name, makes it durable, and renames it: a crash leaves the old one or the new one.
///
/// # Errors
/// Where the file system refuses; the old file is then still there.
pub fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let context = || format!("cannot write {}; the file before is untouched", path.display());
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder).with_context(context)?;
    let name = path.file_name().context("a file has a name")?.to_string_lossy();
    let part = folder.join(format!(".{name}.part"));
    let written = File::create(&part)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&part, path))
        // The name is on the disk only when the folder is.
        .and_then(|()| File::open(folder)?.sync_all());
    if written.is_err() {
        // What was begun is of no use, and on a full disk it is in the way.
        let _ = std::fs::remove_file(&part);
    }
    written.with_context(context)
}
