//! The files of a log and their lines.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::audit::error::AuditError;
use crate::limits;

/// One file of entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Index of its first entry, from its name.
    pub(super) first: u64,
    pub(super) path: PathBuf,
}

pub(super) fn segment_path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("audit-{first:020}.jsonl"))
}

pub(super) fn checkpoint_path(dir: &Path) -> PathBuf {
    dir.join("checkpoint")
}

/// All segments, in order.
pub(super) fn list(dir: &Path) -> Result<Vec<Segment>, AuditError> {
    let mut found = Vec::new();
    let wrap = |error| AuditError::io("read directory", dir, error);
    for item in fs::read_dir(dir).map_err(wrap)? {
        let name = item.map_err(wrap)?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.strip_prefix("audit-")?.strip_suffix(".jsonl")) else { continue };
        let first = number.parse().ok().filter(|first| segment_path(dir, *first).file_name() == Some(&name));
        let path = dir.join(&name);
        let Some(first) = first else { return Err(AuditError::damaged(&path, 0, "its name is not one of a segment")) };
        found.push(Segment { first, path });
        if found.len() > limits::AUDIT_SEGMENTS_MAX {
            return Err(AuditError::damaged(dir, 0, format!("more than {} segments", limits::AUDIT_SEGMENTS_MAX)));
        }
    }
    found.sort_by_key(|segment| segment.first);
    Ok(found)
}

/// Opens for reading; never follows a link.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(file)
}

/// A small file.
pub(super) fn read_file(path: &Path, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    open(path)?.take(limit).read_to_end(&mut bytes)?;
    if bytes.len() > bytes_max { Err(io::Error::other(format!("longer than {bytes_max} bytes"))) } else { Ok(bytes) }
}

/// A small file as text.
pub(super) fn read_text(path: &Path, bytes_max: usize) -> io::Result<String> {
    String::from_utf8(read_file(path, bytes_max)?).map_err(io::Error::other)
}

/// What was found where a line should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A line; the buffer holds it without its newline.
    Line,
    /// Bytes without a newline, at the end of the file.
    Torn,
    /// A line longer than any that is written.
    TooLong,
    /// Nothing.
    End,
}

/// The lines of one segment.
#[derive(Debug)]
pub(super) struct Lines {
    reader: BufReader<File>,
    /// Bytes of complete lines so far.
    pub(super) bytes: u64,
}

impl Lines {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { reader: BufReader::with_capacity(64 * 1024, open(path)?), bytes: 0 })
    }

    pub(super) fn next(&mut self, buffer: &mut Vec<u8>) -> io::Result<Found> {
        buffer.clear();
        let limit = u64::try_from(limits::AUDIT_LINE_BYTES_MAX).unwrap_or(u64::MAX).saturating_add(1);
        let read = self.reader.by_ref().take(limit).read_until(b'\n', buffer)?;
        if buffer.last() == Some(&b'\n') {
            buffer.pop();
            self.bytes = self.bytes.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
            return Ok(Found::Line);
        }
        Ok(match read {
            0 => Found::End,
            _ if buffer.len() > limits::AUDIT_LINE_BYTES_MAX => Found::TooLong,
            _ => Found::Torn,
        })
    }
}
