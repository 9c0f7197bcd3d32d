//! Why an image was not written, not believed or not restored.

use std::io;
use std::path::{Path, PathBuf};

use crate::memory::RamError;
use crate::types::MigrationId;

/// Why an image was not written, not believed or not restored.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file operation failed.
    #[error("cannot {what} image `{}`", .path.display())]
    File {
        /// The operation, e.g. `write`.
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The file is something else, or of another version of this program.
    #[error("`{}` begins with `{found}`: expected a `sealane.image/1`", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: String,
    },
    /// The image is not what was written.
    #[error("image `{}` is damaged: {why}", .path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// An image of another migration stands where one is to be written. It is left alone.
    #[error("image `{}` is of migration `{found}`: expected `{expected}` or no file", .path.display())]
    Occupied {
        /// The image.
        path: PathBuf,
        /// Whose image was to be written.
        expected: MigrationId,
        /// Whose image is there.
        found: MigrationId,
    },
    /// A sound image, but of something else than was asked for.
    #[error("image `{}` has {what} `{found}`: expected `{expected}`", .path.display())]
    Other {
        /// The image.
        path: PathBuf,
        /// What differs, e.g. `migration`.
        what: &'static str,
        /// What was asked for; of a digest or a machine a short hash.
        expected: String,
        /// What the image is of, likewise.
        found: String,
    },
    /// What was to be written is larger than any that this program reads.
    #[error("{what} of {bytes} bytes for image `{}`: expected at most {bytes_max}", .path.display())]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        bytes: usize,
        /// The bound in bytes.
        bytes_max: usize,
    },
    /// What was to be written, or what memory holds after restoring, is not what the final digest says.
    #[error("{what} for image `{}` is not what the final digest says", .path.display())]
    Digest {
        /// `device state`, `guest memory` or `restored guest memory`.
        what: &'static str,
        /// The image.
        path: PathBuf,
    },
    /// Guest RAM could not be accessed.
    #[error("cannot access guest RAM for image `{}`", .path.display())]
    Ram {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: RamError,
    },
}

impl ImageError {
    /// Whether the disk is full, the one failure that an operator can lift at once.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        let Self::File { source, .. } = self else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { what, path: path.to_owned(), source }
    }

    pub(super) fn damaged(path: &Path, why: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), why: why.into() }
    }

    pub(super) fn ram(path: &Path) -> impl FnOnce(RamError) -> Self {
        move |source| Self::Ram { path: path.to_owned(), source }
    }
}
