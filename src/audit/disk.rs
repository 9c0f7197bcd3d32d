//! The file operations of the writer, as a seam: tests make each of them fail, and cut the power between two.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, OFlag, fallocate};

/// An open file and where it is.
#[derive(Debug)]
pub(super) struct DiskFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
}

/// What the writer does to the disk.
pub(super) trait Disk: Send + Sync + fmt::Debug {
    /// Opens for appending, 0600; creates it if it is not there; never follows a link.
    fn open(&self, path: &Path) -> io::Result<DiskFile>;
    /// Appends all of it, or fails having appended any part.
    fn append(&self, file: &DiskFile, bytes: &[u8]) -> io::Result<()>;
    /// Makes contents and length durable.
    fn sync(&self, file: &DiskFile) -> io::Result<()>;
    /// Cuts to `bytes`.
    fn truncate(&self, file: &DiskFile, bytes: u64) -> io::Result<()>;
    /// Takes `bytes` of space.
    fn allocate(&self, file: &DiskFile, bytes: u64) -> io::Result<()>;
    /// Gives a new file its blocks, as far as that can be had: one without is written to the disk when it replaces another, and that
    /// takes a millisecond, more than a commit.
    fn give_blocks(&self, _file: &DiskFile, _bytes: usize) {}
    /// Replaces `to`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Deletes; not being there is fine.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Creates a directory and those above it, 0700; being there is fine.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes names durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// The real one.
#[derive(Debug)]
pub(super) struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<DiskFile> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(OFlag::O_NOFOLLOW.bits()).open(path)?;
        Ok(DiskFile { path: path.to_owned(), file })
    }

    fn append(&self, file: &DiskFile, bytes: &[u8]) -> io::Result<()> {
        (&file.file).write_all(bytes)
    }

    fn sync(&self, file: &DiskFile) -> io::Result<()> {
        // The length is made durable with the contents; the times need not be.
        file.file.sync_data()
    }

    fn truncate(&self, file: &DiskFile, bytes: u64) -> io::Result<()> {
        file.file.set_len(bytes)
    }

    fn allocate(&self, file: &DiskFile, bytes: u64) -> io::Result<()> {
        let length = i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match fallocate(&file.file, FallocateFlags::empty(), 0, length) {
            Ok(()) => Ok(()),
            Err(nix::errno::Errno::EOPNOTSUPP) => {
                let zeros = vec![0; usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?];
                self.truncate(file, 0)?;
                self.append(file, &zeros)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn give_blocks(&self, file: &DiskFile, bytes: usize) {
        // Nothing is lost where it fails.
        let _ = fallocate(&file.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, i64::try_from(bytes).unwrap_or(0));
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

/// Whether it is only space that is missing.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
