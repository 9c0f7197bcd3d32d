//! Why the journal failed.

use std::path::{Path, PathBuf};

use crate::limits::JOURNAL_RECORD_BYTES_MAX;
use crate::types::InvalidValue;

/// Why the journal failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file or its directory cannot be made or opened.
    #[error("cannot open journal `{}`", .path.display())]
    File {
        /// The journal.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// Another process has it.
    #[error("journal `{}` is in use by another process", .path.display())]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// The file is something else, or damaged beyond repair.
    #[error("`{}` is not a journal of this gateway", .path.display())]
    NotAJournal {
        /// The file.
        path: PathBuf,
    },
    /// Another version of this program wrote it.
    #[error("journal `{}` has format `{found}`: expected `sealane.journal/1`", .path.display())]
    Format {
        /// The journal.
        path: PathBuf,
        /// What it says of itself.
        found: String,
    },
    /// The disk failed; nothing more is written until the journal is opened again.
    #[error("cannot {what} journal `{}`", .path.display())]
    Disk {
        /// What was tried, e.g. `append a handoff record to`.
        what: &'static str,
        /// The journal.
        path: PathBuf,
        /// What the store said.
        #[source]
        source: Box<redb::Error>,
    },
    /// A record is larger than any that this program writes.
    #[error("{what} of {bytes} bytes for journal `{}`: expected at most {JOURNAL_RECORD_BYTES_MAX}", .path.display())]
    TooLarge {
        /// Which kind.
        what: &'static str,
        /// The journal.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// A name in the file is not one.
    #[error("journal `{}` holds a bad name", .path.display())]
    Name {
        /// The journal.
        path: PathBuf,
        /// Which rule it breaks.
        #[source]
        source: InvalidValue,
    },
    /// The operating system gives no random bytes.
    #[error("no random bytes for the incarnation of a new journal")]
    Random,
}

impl JournalError {
    /// Whether the disk is full, the one failure that an operator can lift at once.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        let error = match self {
            Self::File { source, .. } => source,
            Self::Disk { source, .. } => match source.as_ref() {
                redb::Error::Io(error) => error,
                _ => return false,
            },
            _ => return false,
        };
        matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
    }

    pub(super) fn disk(what: &'static str, path: &Path, source: redb::Error) -> Self {
        Self::Disk { what, path: path.to_owned(), source: Box::new(source) }
    }

    pub(super) fn opening(path: &Path) -> impl FnOnce(redb::DatabaseError) -> Self {
        let path = path.to_owned();
        move |error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => Self::InUse { path },
            redb::DatabaseError::Storage(redb::StorageError::Corrupted(_)) => Self::NotAJournal { path },
            redb::DatabaseError::Storage(redb::StorageError::Io(source)) if source.kind() == std::io::ErrorKind::InvalidData => {
                Self::NotAJournal { path }
            }
            other => Self::Disk { what: "open", path, source: Box::new(other.into()) },
        }
    }
}
