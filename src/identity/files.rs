//! Files that are either the old ones or the new ones, never half of each.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::IdentityError;

/// Mode of files that only their owner may read.
pub(super) const PRIVATE: u32 = 0o600;
/// Mode of files that everybody may read.
pub(super) const PUBLIC: u32 = 0o644;

/// Held while a directory is changed; released on drop.
pub(super) struct Lock {
    _file: File,
}

/// Creates the directory with mode 0700 when it is missing, and locks it.
pub(super) fn create_locked(dir: &Path) -> Result<Lock, IdentityError> {
    let failed = |source| IdentityError::File { action: "create", what: "directory", path: dir.to_owned(), source };
    if !dir.is_dir() {
        DirBuilder::new().mode(0o700).recursive(true).create(dir).map_err(failed)?;
    }
    lock(dir)
}

/// Waits until nobody else changes the directory.
pub(super) fn lock(dir: &Path) -> Result<Lock, IdentityError> {
    let failed = |source| IdentityError::File { action: "lock", what: "directory", path: dir.to_owned(), source };
    // The directory itself is locked, so no lock file is left behind.
    let file = File::open(dir).map_err(failed)?;
    file.lock().map_err(failed)?;
    Ok(Lock { _file: file })
}

/// Writes a file under a temporary name, makes it durable, and puts it in place.
pub(super) fn write(path: &Path, what: &'static str, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let written = replace(path, &temporary, bytes, mode);
    written.map_err(|source| IdentityError::File { action: "write", what, path: path.to_owned(), source })
}

fn replace(path: &Path, temporary: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // A leftover of a crash; the lock says that nobody is writing it now.
    match std::fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(temporary, path)?;
    let parent = path.parent().map_or_else(|| PathBuf::from("."), Path::to_owned);
    File::open(parent)?.sync_all()
}
