//! Reads a log from its first entry on and checks every line against the chain.

use std::path::{Path, PathBuf};

use crate::audit::chain::{Chain, Head};
use crate::audit::entry::{StoredEntry, unhex32};
use crate::audit::error::AuditError;
use crate::audit::segment::{self, Found, Lines, Segment};

/// A position in a log; everything before it is checked.
#[derive(Debug)]
pub(super) struct Walk {
    segments: Vec<Segment>,
    /// How many segments have been begun.
    begun: usize,
    lines: Option<Lines>,
    chain: Chain,
    buffer: Vec<u8>,
}

impl Walk {
    pub(super) fn new(dir: &Path) -> Result<Self, AuditError> {
        let segments = segment::list(dir)?;
        Ok(Self { segments, begun: 0, lines: None, chain: Chain::from(Head::EMPTY), buffer: Vec::new() })
    }

    pub(super) fn head(&self) -> Head {
        self.chain.head()
    }

    /// The segment being read, and how many of its bytes are behind.
    pub(super) fn position(&self) -> Option<(&Segment, u64)> {
        let segment = self.segments.get(self.begun.checked_sub(1)?)?;
        Some((segment, self.lines.as_ref().map_or(0, |lines| lines.bytes)))
    }

    /// Segments not yet begun.
    pub(super) fn ahead(&self) -> &[Segment] {
        self.segments.get(self.begun..).unwrap_or_default()
    }

    /// The next entry, or nothing at the end.
    pub(super) fn next(&mut self) -> Result<Option<StoredEntry>, AuditError> {
        loop {
            if self.lines.is_none() && !self.begin()? {
                return Ok(None);
            }
            let path = self.path();
            let Some(lines) = &mut self.lines else { return Ok(None) };
            let found = lines.next(&mut self.buffer).map_err(|error| AuditError::io("read", &path, error))?;
            let damaged = |why: &str| AuditError::damaged(&path, self.chain.head().size, why);
            match found {
                Found::Line => return self.check(&path).map(Some),
                Found::Torn => return Err(damaged("the line has no end")),
                Found::TooLong => return Err(damaged("the line is longer than any that is written")),
                Found::End if self.ahead().is_empty() => return Ok(None),
                Found::End => self.lines = None,
            }
        }
    }

    fn begin(&mut self) -> Result<bool, AuditError> {
        let Some(segment) = self.segments.get(self.begun) else { return Ok(false) };
        let size = self.chain.head().size;
        if segment.first != size {
            return Err(AuditError::damaged(
                &segment.path,
                size,
                format!("the segment begins with entry {}, expected {size}", segment.first),
            ));
        }
        self.lines = Some(Lines::open(&segment.path).map_err(|error| AuditError::io("open", &segment.path, error))?);
        self.begun = self.begun.saturating_add(1);
        Ok(true)
    }

    fn path(&self) -> PathBuf {
        self.position().map(|(segment, _)| segment.path.clone()).unwrap_or_default()
    }

    fn check(&mut self, path: &Path) -> Result<StoredEntry, AuditError> {
        let at = self.chain.head().size;
        let damaged = |why: String| AuditError::damaged(path, at, why);
        let entry = StoredEntry::parse(&self.buffer).map_err(damaged)?;
        let prev = unhex32(&entry.prev).ok_or_else(|| damaged("`prev` is no hash".to_owned()))?;
        self.chain.verify(&self.buffer, entry.index, prev).map_err(damaged)?;
        Ok(entry)
    }
}
