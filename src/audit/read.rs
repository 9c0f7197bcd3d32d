//! Reading a log for people and for proofs. No signature is checked here.

use std::collections::VecDeque;
use std::path::Path;

use crate::audit::entry::{Event, Outcome, StoredEntry};
use crate::audit::error::AuditError;
use crate::audit::note;
use crate::audit::open::read_checkpoint;
use crate::audit::proof::Proof;
use crate::audit::tree::prove_inclusion;
use crate::audit::verify::{is_live, is_torn};
use crate::audit::walk::Walk;
use crate::audit::witness::TilesOfWalk;
use crate::types::{MigrationId, VmName};

/// Which entries to show; what is not given matches everything.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// The VM, by name.
    pub vm: Option<VmName>,
    /// The peer, exactly as recorded.
    pub peer: Option<String>,
    /// The attempt.
    pub migration: Option<MigrationId>,
    /// What happened.
    pub event: Option<Event>,
    /// Not before this time.
    pub since: Option<jiff::Timestamp>,
    /// Before this time.
    pub until: Option<jiff::Timestamp>,
    /// What came of it.
    pub outcome: Option<Outcome>,
}

impl Filter {
    fn matches(&self, entry: &StoredEntry) -> bool {
        self.vm.as_ref().is_none_or(|vm| entry.vm.as_ref() == Some(vm))
            && self.peer.as_ref().is_none_or(|peer| entry.peer.as_ref() == Some(peer))
            && self.migration.is_none_or(|migration| entry.migration == Some(migration))
            && self.event.is_none_or(|event| entry.event == event)
            && self.since.is_none_or(|since| entry.time >= since)
            && self.until.is_none_or(|until| entry.time < until)
            && self.outcome.is_none_or(|outcome| entry.outcome == Some(outcome))
    }
}

/// The entries of the log in `dir` that match, oldest first. Ends at the first entry that is wrong, with the error. Signatures are
/// not checked.
///
/// # Errors
///
/// The directory cannot be read.
pub fn read(dir: &Path, filter: Filter) -> Result<Entries, AuditError> {
    Ok(Entries { walk: Some(Walk::new(dir)?), live: is_live(dir), filter, ready: VecDeque::new(), end: None })
}

/// Entries of a log, in order.
#[derive(Debug)]
pub struct Entries {
    /// Gone at the end.
    walk: Option<Walk>,
    live: bool,
    filter: Filter,
    ready: VecDeque<StoredEntry>,
    end: Option<AuditError>,
}

impl Entries {
    /// Reads the next commit.
    fn advance(&mut self) {
        let Some(mut walk) = self.walk.take() else { return };
        let commit = walk.next();
        walk.tree().take_full();
        match commit {
            Ok(Some(commit)) => {
                self.ready.extend(commit.lines.into_iter().map(|line| line.entry));
                self.walk = Some(walk);
            }
            // A live log's last commit may be in the making.
            Ok(None) if self.live => {}
            Err(error) if self.live && is_torn(&error) => {}
            Ok(None) => {
                let size = walk.signed();
                let unsigned = || AuditError::damaged(&walk.last_path(), size, "there is no checkpoint behind the entries from here on");
                self.end = (!walk.open_lines().is_empty()).then(unsigned);
            }
            Err(error) => {
                let bad = if let AuditError::Damaged { index, .. } = &error { *index } else { 0 };
                let before = walk.open_lines().iter().map(|line| &line.entry).filter(|entry| entry.index < bad);
                self.ready.extend(before.cloned());
                self.end = Some(error);
            }
        }
    }
}

impl Iterator for Entries {
    type Item = Result<StoredEntry, AuditError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.ready.pop_front() {
                Some(entry) if self.filter.matches(&entry) => return Some(Ok(entry)),
                Some(_) => {}
                None if self.walk.is_some() => self.advance(),
                None => return self.end.take().map(Err),
            }
        }
    }
}

/// The name of the log in `dir`, by its checkpoint, whose signature is not checked.
///
/// # Errors
///
/// There is no checkpoint, or none that can be read.
pub fn origin(dir: &Path) -> Result<String, AuditError> {
    let refuse = |why: String| AuditError::Checkpoint { of: dir.display().to_string(), why };
    let text = read_checkpoint(dir)?.ok_or_else(|| refuse("there is none".to_owned()))?;
    note::read(&text).map(|checkpoint| checkpoint.origin).map_err(refuse)
}

/// A proof that entry `index` is in the log in `dir`, under its last checkpoint.
///
/// # Errors
///
/// The log is damaged, or does not have the entry any more or yet.
pub fn prove(dir: &Path, index: u64) -> Result<String, AuditError> {
    let mut walk = Walk::new(dir)?;
    let (mut found, mut last) = (None, None);
    let live = is_live(dir);
    loop {
        match walk.next() {
            Ok(Some(commit)) => {
                found = found.or_else(|| commit.lines.into_iter().find(|line| line.entry.index == index));
                last = Some(commit.checkpoint);
            }
            Ok(None) => break,
            Err(error) if live && is_torn(&error) => break,
            Err(error) => return Err(error),
        }
        walk.tree().take_full();
    }
    let missing = || AuditError::damaged(dir, index, "the log does not have this entry");
    let (line, checkpoint) = found.zip(last).ok_or_else(missing)?;
    let tiles = TilesOfWalk { dir, tree: walk.tree() };
    let path = prove_inclusion(&tiles, index, checkpoint.size).map_err(|why| AuditError::damaged(dir, index, why))?;
    let text = Proof::text(&line.bytes, index, &path, &checkpoint.text);
    Proof::read(&text).map_err(|why| AuditError::damaged(dir, index, format!("{why}: the tiles are not those of the entries")))?;
    Ok(text)
}
