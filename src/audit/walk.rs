//! Reads a log commit by commit and checks every line against the tree. Signatures are left to whoever has a key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::audit::entry::{StoredEntry, canonical_value};
use crate::audit::error::AuditError;
use crate::audit::note::{self, Checkpoint};
use crate::audit::segment::{self, Found, Lines, Segment};
use crate::audit::tile::TilesOnDisk;
use crate::audit::tree::{Hash, Head, TILE_WIDTH, Tiles as _, Tree, leaf_hash};
use crate::limits;

/// An entry and the bytes that it is.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) entry: StoredEntry,
    pub(super) bytes: Vec<u8>,
}

/// What became durable at once.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) lines: Vec<Line>,
    /// The head behind them, equal to the tree's; its signature is not checked.
    pub(super) checkpoint: Checkpoint,
}

/// The line that ends a commit.
pub(super) fn checkpoint_line(checkpoint: &Checkpoint, since: u64) -> String {
    let text = serde_json::Value::String(checkpoint.text.clone());
    format!("{CHECKPOINT_LINE}{text},\"since\":{since}}}")
}

const CHECKPOINT_LINE: &str = "{\"checkpoint\":";

/// Whether a line is one that ends a commit, or was meant to be.
pub(super) fn is_checkpoint_line(line: &[u8]) -> bool {
    line.starts_with(CHECKPOINT_LINE.as_bytes())
}

/// The checkpoint of a line, and the size of the one before it.
pub(super) fn parse_checkpoint_line(line: &[u8]) -> Result<(Checkpoint, u64), String> {
    let value = canonical_value(line)?;
    let fields = value.as_object().filter(|fields| fields.len() == 2).ok_or("is no checkpoint line: expected `checkpoint` and `since`")?;
    let since = fields.get("since").and_then(serde_json::Value::as_u64).ok_or("is no checkpoint line: `since` is no number")?;
    let text = fields.get("checkpoint").and_then(serde_json::Value::as_str).ok_or("is no checkpoint line: `checkpoint` is no text")?;
    Ok((note::read(text)?, since))
}

/// A position in a log; everything before it is checked.
#[derive(Debug)]
pub(super) struct Walk {
    dir: PathBuf,
    segments: Vec<Segment>,
    /// How many segments have been begun.
    begun: usize,
    lines: Option<Lines>,
    tree: Tree,
    /// Whether the hashes of entries that were pruned are in the tree.
    ready: bool,
    /// The size that the last checkpoint covers.
    signed: u64,
    /// Behind the last checkpoint: the number of segments begun and the bytes of the last of them.
    position: (usize, u64),
    /// The position before that.
    before: (usize, u64),
    /// Entries behind the last checkpoint.
    open: Vec<Line>,
    /// Roots at sizes that somebody wants to know.
    wanted: BTreeMap<u64, Option<Hash>>,
    buffer: Vec<u8>,
}

impl Walk {
    pub(super) fn new(dir: &Path) -> Result<Self, AuditError> {
        let segments = segment::list(dir)?;
        let signed = segments.first().map_or(0, |segment| segment.first);
        Ok(Self {
            dir: dir.to_owned(),
            segments,
            begun: 0,
            lines: None,
            tree: Tree::default(),
            ready: false,
            signed,
            position: (0, 0),
            before: (0, 0),
            open: Vec::new(),
            wanted: BTreeMap::new(),
            buffer: Vec::new(),
        })
    }

    /// Whether there is any file with entries.
    pub(super) fn has_segments(&self) -> bool {
        !self.segments.is_empty()
    }

    /// Asks for the root at a size, before it is passed.
    pub(super) fn want(&mut self, size: u64) {
        self.wanted.insert(size, (size == 0).then_some(Head::EMPTY.root));
    }

    /// The root at a size that was asked for; nothing if the log did not get there.
    pub(super) fn root_at(&self, size: u64) -> Option<Hash> {
        *self.wanted.get(&size)?
    }

    /// The first entry whose line is here; those before it were pruned.
    pub(super) fn first(&self) -> u64 {
        self.segments.first().map_or(0, |segment| segment.first)
    }

    /// Entries up to the last checkpoint.
    pub(super) fn signed(&self) -> u64 {
        self.signed
    }

    pub(super) fn tree(&mut self) -> &mut Tree {
        &mut self.tree
    }

    /// Entries that were read behind the last checkpoint.
    pub(super) fn open_lines(&self) -> &[Line] {
        &self.open
    }

    /// The segment in which the last checkpoint is, and its bytes up to there. Nothing if there was none.
    pub(super) fn position(&self) -> Option<(&Segment, u64)> {
        let (begun, bytes) = self.position;
        Some((self.segments.get(begun.checked_sub(1)?)?, bytes))
    }

    /// Segments behind the one of [`position`](Self::position).
    pub(super) fn ahead(&self) -> &[Segment] {
        self.segments.get(self.position.0..).unwrap_or_default()
    }

    /// The next commit, or nothing at the end; entries without a checkpoint behind them are in [`open_lines`](Self::open_lines).
    pub(super) fn next(&mut self) -> Result<Option<Commit>, AuditError> {
        if !self.ready {
            self.take_in_pruned()?;
            self.ready = true;
        }
        loop {
            if self.lines.is_none() && !self.begin()? {
                return Ok(None);
            }
            let path = self.last_path();
            let Some(lines) = &mut self.lines else { return Ok(None) };
            let found = lines.next(&mut self.buffer).map_err(|error| AuditError::io("read", &path, error))?;
            let damaged = |why: &str| AuditError::damaged(&path, self.tree.size(), why);
            match found {
                Found::Line if is_checkpoint_line(&self.buffer) => return self.close(&path).map(Some),
                Found::Line => self.take_in(&path)?,
                Found::Torn => return Err(damaged("the line has no end")),
                Found::TooLong => return Err(damaged("the line is longer than any that is written")),
                Found::End if self.begun == self.segments.len() => return Ok(None),
                Found::End if self.open.is_empty() => self.lines = None,
                Found::End => return Err(damaged("the segment ends without a checkpoint over its last entries")),
            }
        }
    }

    /// Of entries that were pruned there are hashes, in the tiles.
    fn take_in_pruned(&mut self) -> Result<(), AuditError> {
        let first = self.first();
        let dir = self.dir.clone();
        let tiles = TilesOnDisk { dir: &dir };
        while self.tree.size() < first {
            let at = self.tree.size();
            let width = usize::try_from(first - at).unwrap_or(TILE_WIDTH).min(TILE_WIDTH);
            let hashes = tiles.tile(0, at / TILE_WIDTH as u64, width);
            let hashes = hashes.map_err(|why| AuditError::damaged(&dir, at, format!("of pruned entries the hashes are needed: {why}")))?;
            for hash in hashes.into_iter().take(width) {
                self.grow(hash);
            }
        }
        Ok(())
    }

    fn grow(&mut self, leaf: Hash) {
        self.tree.append(leaf);
        if let Some(root) = self.wanted.get_mut(&self.tree.size()) {
            *root = Some(self.tree.head().root);
        }
    }

    fn begin(&mut self) -> Result<bool, AuditError> {
        let Some(segment) = self.segments.get(self.begun) else { return Ok(false) };
        let size = self.tree.size();
        if segment.first != size {
            let why = format!("the segment begins with entry {}, expected {size}", segment.first);
            return Err(AuditError::damaged(&segment.path, size, why));
        }
        self.lines = Some(Lines::open(&segment.path).map_err(|error| AuditError::io("open", &segment.path, error))?);
        self.begun = self.begun.saturating_add(1);
        Ok(true)
    }

    /// The file that is being read.
    pub(super) fn last_path(&self) -> PathBuf {
        self.begun.checked_sub(1).and_then(|at| self.segments.get(at)).map(|segment| segment.path.clone()).unwrap_or_default()
    }

    fn take_in(&mut self, path: &Path) -> Result<(), AuditError> {
        let at = self.tree.size();
        let damaged = |why: String| AuditError::damaged(path, at, why);
        let entry = StoredEntry::parse(&self.buffer).map_err(damaged)?;
        if entry.index != at {
            return Err(damaged(format!("index is `{}`, expected `{at}`", entry.index)));
        }
        if self.open.len() == limits::AUDIT_BATCH_ENTRIES_MAX {
            return Err(damaged(format!("more than {} entries without a checkpoint", limits::AUDIT_BATCH_ENTRIES_MAX)));
        }
        self.grow(leaf_hash(&self.buffer));
        self.open.push(Line { entry, bytes: self.buffer.clone() });
        Ok(())
    }

    /// A checkpoint stands behind the entries that it covers, and behind no others.
    fn close(&mut self, path: &Path) -> Result<Commit, AuditError> {
        let head = self.tree.head();
        let damaged = |at: u64, why: String| AuditError::damaged(path, at, why);
        let (checkpoint, since) = parse_checkpoint_line(&self.buffer).map_err(|why| damaged(head.size, format!("the line {why}")))?;
        if since != self.signed {
            let why =
                format!("the checkpoint of {} entries follows one of {since}, the one before here is of {}", checkpoint.size, self.signed);
            return Err(damaged(self.signed, why));
        }
        if checkpoint.size != head.size || self.open.is_empty() {
            let why = format!("a checkpoint of {} entries stands behind entry {}", checkpoint.size, head.size.wrapping_sub(1));
            return Err(damaged(head.size.min(checkpoint.size), why));
        }
        if checkpoint.root != head.root {
            return Err(self.first_other(path));
        }
        let lines = std::mem::take(&mut self.open);
        self.signed = head.size;
        self.before = self.position;
        self.position = (self.begun, self.lines.as_ref().map_or(0, |lines| lines.bytes));
        Ok(Commit { lines, checkpoint })
    }

    /// Takes a commit back whose signature is not good.
    pub(super) fn unsign(&mut self, commit: &Commit, why: String) -> AuditError {
        let first = commit.lines.first().map_or(0, |line| line.entry.index);
        let path = self.last_path();
        self.signed = first;
        self.position = self.before;
        AuditError::damaged(&path, first, why)
    }

    /// Which entry of a commit is not the one that its checkpoint covers; the tiles may know it.
    fn first_other(&self, path: &Path) -> AuditError {
        let tiles = TilesOnDisk { dir: &self.dir };
        let kept = |index: u64| {
            let at = usize::try_from(index % TILE_WIDTH as u64).ok()?;
            tiles.tile(0, index / TILE_WIDTH as u64, at + 1).ok()?.get(at).copied()
        };
        let other = self.open.iter().find(|line| kept(line.entry.index).is_some_and(|hash| hash != leaf_hash(&line.bytes)));
        match (other, self.open.as_slice()) {
            (Some(line), _) => {
                AuditError::damaged(path, line.entry.index, "the entry is not the one that was signed: its hash is not the tile's")
            }
            (None, [one]) => AuditError::damaged(path, one.entry.index, "the entry is not the one that its checkpoint covers"),
            (None, _) => {
                let last = self.tree.size().saturating_sub(1);
                let why =
                    format!("one of the entries up to {last} is not the one that their checkpoint covers, or the checkpoint was changed");
                AuditError::damaged(path, self.signed, why)
            }
        }
    }
}
