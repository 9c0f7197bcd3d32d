//! What can go wrong with the log.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::types::SpiffeId;

/// Why something was not recorded, opened or believed. Cheap to clone: one failed commit answers many callers.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuditError {
    /// Another process, or another handle of this one, writes this log.
    #[error("cannot open audit log `{}`: another writer holds it", .dir.display())]
    Locked {
        /// The log's directory.
        dir: PathBuf,
    },
    /// A file operation failed and the log is as it was.
    #[error("cannot {what} `{}`", .path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The disk is full: the entry was not recorded, the log is as it was.
    #[error("cannot record in audit log `{}`: no space on its disk", .dir.display())]
    Disk {
        /// The log's directory.
        dir: PathBuf,
    },
    /// The checkpoint was not signed, so the entry was not recorded; the log is as it was.
    #[error("cannot record in audit log `{}`: its checkpoint is not signed: {why}", .dir.display())]
    Unsigned {
        /// The log's directory.
        dir: PathBuf,
        /// Why.
        why: String,
    },
    /// An earlier failure left the disk's contents unknown: nothing is recorded until the log is opened again.
    #[error("audit log `{}` has failed: {why}", .dir.display())]
    Failed {
        /// The log's directory.
        dir: PathBuf,
        /// The first failure.
        why: String,
    },
    /// The log is not what was written.
    #[error("audit log `{}` is damaged at entry {index}: {why}", .file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// The first entry that is wrong.
        index: u64,
        /// What is wrong.
        why: String,
    },
    /// A checkpoint is not one, or not the one expected.
    #[error("audit checkpoint of `{of}` refused: {why}")]
    Checkpoint {
        /// The log's directory, or the peer.
        of: String,
        /// Why.
        why: String,
    },
    /// The entry cannot be a line of the log.
    #[error("audit entry `{event}` refused: {why}")]
    Entry {
        /// The event.
        event: &'static str,
        /// Why.
        why: String,
    },
    /// A peer's log went back or forked.
    #[error("audit head of `{peer}` refused: {why}")]
    PeerHead {
        /// The peer.
        peer: SpiffeId,
        /// Why.
        why: String,
    },
}

impl AuditError {
    pub(super) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { what, path: path.to_owned(), source: Arc::new(source) }
    }

    /// With what is behind it, on one line.
    pub(super) fn in_full(&self) -> String {
        match self {
            Self::Io { source, .. } => format!("{self}: {source}"),
            other => other.to_string(),
        }
    }

    pub(super) fn damaged(file: &Path, index: u64, why: impl Into<String>) -> Self {
        Self::Damaged { file: file.to_owned(), index, why: why.into() }
    }
}
