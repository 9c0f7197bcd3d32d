//! One group commit: entries and the checkpoint that covers them, in one write and one sync. The only code that changes a log.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::audit::disk::{Disk, DiskFile, is_full};
use crate::audit::entry::{Event, Place, Receipt, When, line};
use crate::audit::error::AuditError;
use crate::audit::note::{self, Checkpoint, Signer};
use crate::audit::segment::{checkpoint_path, segment_path};
use crate::audit::tile::{self, Publisher, TilesOnDisk};
use crate::audit::tree::{Hash, Tiles, Tree, leaf_hash, tiles_in};
use crate::audit::walk::checkpoint_line;
use crate::limits;
use crate::types::MigrationId;

/// An entry that waits for its commit.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) ticket: u64,
    pub(super) critical: bool,
    pub(super) event: Event,
    pub(super) migration: Option<MigrationId>,
    pub(super) fields: Map<String, Value>,
    pub(super) when: When,
}

/// What the one leader holds while it writes.
pub(super) struct Writer {
    pub(super) dir: PathBuf,
    pub(super) origin: String,
    pub(super) boot_id: String,
    pub(super) signer: Arc<dyn Signer>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) segment: DiskFile,
    /// Length of the segment up to the last commit.
    pub(super) segment_bytes: u64,
    pub(super) segment_bytes_max: u64,
    pub(super) tree: Tree,
    pub(super) publisher: Publisher,
    /// Whether writing checkpoint or tiles failed last.
    pub(super) behind: bool,
    /// Whether the reserve is on disk; without it only critical entries are taken.
    pub(super) reserve: bool,
}

/// What became of a batch.
pub(super) struct Committed {
    pub(super) results: Vec<(u64, Result<Receipt, AuditError>)>,
    /// Entries about handoffs, with their places.
    pub(super) handoffs: Vec<(MigrationId, u64, String)>,
    /// The new head, if anything was recorded.
    pub(super) head: Option<Checkpoint>,
    /// Why the log has failed, if it has.
    pub(super) failed: Option<String>,
}

/// What was written.
struct Written {
    checkpoint: Checkpoint,
    lines: Vec<String>,
}

/// Why a batch was not written.
enum Trouble {
    /// No space; the log is as it was.
    Full,
    /// Whoever has the key did not sign; the log is as it was.
    Unsigned(String),
    /// Nobody knows what is on disk.
    Fatal(String),
}

impl Writer {
    pub(super) fn commit(&mut self, batch: Vec<Queued>) -> Committed {
        let mut done = Committed { results: Vec::new(), handoffs: Vec::new(), head: None, failed: None };
        let mut batch = batch;
        if !self.reserve && batch.iter().any(|queued| !queued.critical) {
            self.restore_reserve();
        }
        if !self.reserve {
            self.refuse_ordinary(&mut batch, &mut done);
        }
        let mut outcome = self.write(&batch);
        if matches!(outcome, Err(Trouble::Full)) {
            self.refuse_ordinary(&mut batch, &mut done);
            // Spent once: from now on only what is critical gets in, until there is space for a new reserve.
            if self.reserve && !batch.is_empty() {
                self.release_reserve();
                outcome = self.write(&batch);
            }
        }
        match outcome {
            Ok(Some(Written { checkpoint, lines })) => {
                let first = checkpoint.size.saturating_sub(lines.len() as u64);
                for ((index, queued), line) in (first..).zip(&batch).zip(lines) {
                    done.results.push((queued.ticket, Ok(Receipt::new(index, queued.event, queued.migration))));
                    if let (Event::Handoff, Some(migration)) = (queued.event, queued.migration) {
                        done.handoffs.push((migration, index, line));
                    }
                }
                done.head = Some(checkpoint);
            }
            Ok(None) => {}
            Err(Trouble::Full) => {
                let dir = self.dir.clone();
                done.results.extend(batch.iter().map(|queued| (queued.ticket, Err(AuditError::Disk { dir: dir.clone() }))));
            }
            Err(Trouble::Unsigned(why)) => {
                let error = AuditError::Unsigned { dir: self.dir.clone(), why };
                done.results.extend(batch.iter().map(|queued| (queued.ticket, Err(error.clone()))));
            }
            Err(Trouble::Fatal(why)) => {
                let error = AuditError::Failed { dir: self.dir.clone(), why: why.clone() };
                done.results.extend(batch.iter().map(|queued| (queued.ticket, Err(error.clone()))));
                done.failed = Some(why);
            }
        }
        done
    }

    fn refuse_ordinary(&self, batch: &mut Vec<Queued>, done: &mut Committed) {
        for queued in batch.extract_if(.., |queued| !queued.critical) {
            done.results.push((queued.ticket, Err(AuditError::Disk { dir: self.dir.clone() })));
        }
    }

    /// All of `batch` or nothing. INVARIANT(receipt-is-durable): one sync covers the entries and the checkpoint.
    fn write(&mut self, batch: &[Queued]) -> Result<Option<Written>, Trouble> {
        if batch.is_empty() {
            return Ok(None);
        }
        if self.segment_bytes >= self.segment_bytes_max {
            self.rotate()?;
        }
        let since = self.tree.size();
        let mut tree = self.tree.clone();
        let mut bytes = Vec::new();
        let mut lines = Vec::new();
        for queued in batch {
            let place = Place { index: tree.size(), boot_id: &self.boot_id };
            let line = line(queued.fields.clone(), queued.when, &place).map_err(Trouble::Fatal)?;
            tree.append(leaf_hash(line.as_bytes()));
            bytes.extend_from_slice(line.as_bytes());
            bytes.push(b'\n');
            lines.push(line);
        }
        let checkpoint = note::sign(self.signer.as_ref(), &self.origin, tree.head()).map_err(Trouble::Unsigned)?;
        bytes.extend_from_slice(checkpoint_line(&checkpoint, since).as_bytes());
        bytes.push(b'\n');
        if let Err(error) = self.disk.append(&self.segment, &bytes) {
            return Err(self.undo("append to", &self.segment.path.clone(), &error));
        }
        self.disk.sync(&self.segment).map_err(|error| fatal("fsync", &self.segment.path, &error))?;
        self.tree = tree;
        for (index, line) in (since..).zip(&lines) {
            self.publisher.line(index, line.as_bytes());
        }
        let full = self.tree.take_full();
        self.publisher.tiles(full);
        self.segment_bytes = self.segment_bytes.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        Ok(Some(Written { checkpoint, lines }))
    }

    /// Shows the world the last head, and tiles that are full. Nothing depends on it: what fails here is made up for by the next
    /// commit, or when the log is opened.
    pub(super) fn publish_head(&mut self, head: &Checkpoint) {
        let shown = tile::write(self.disk.as_ref(), &checkpoint_path(&self.dir), head.text.as_bytes());
        let written = if self.publisher.has_pending() { self.publisher.write_full(self.disk.as_ref()) } else { Ok(()) };
        self.say_once(&shown.and(written));
    }

    /// Writes the tiles up to the last entry.
    pub(super) fn publish_tiles(&mut self) {
        let written = self.publisher.write_all(self.disk.as_ref(), &self.tree);
        self.say_once(&written);
    }

    /// That files for other programs are behind is said once, until they are not any more.
    fn say_once(&mut self, written: &io::Result<()>) {
        if let (Err(error), false) = (written, self.behind) {
            tracing::warn!(dir = %self.dir.display(), error = %error, "audit log: checkpoint or tiles are behind the log");
        }
        self.behind = written.is_err();
    }

    /// Cuts the segment back to the last commit. No partial line survives.
    fn undo(&self, what: &str, path: &Path, error: &io::Error) -> Trouble {
        let cut = self.disk.truncate(&self.segment, self.segment_bytes).and_then(|()| self.disk.sync(&self.segment));
        match cut {
            Ok(()) if is_full(error) => Trouble::Full,
            _ => fatal(what, path, error),
        }
    }

    /// A new segment, at an entry boundary.
    fn rotate(&mut self) -> Result<(), Trouble> {
        let path = segment_path(&self.dir, self.tree.size());
        let made = self.disk.open(&path).and_then(|segment| self.disk.sync_dir(&self.dir).map(|()| segment));
        match made {
            Ok(segment) => {
                self.segment = segment;
                self.segment_bytes = 0;
                Ok(())
            }
            // The old segment goes on; an empty file left behind is used when the time comes.
            Err(error) if is_full(&error) => Err(Trouble::Full),
            Err(error) => Err(fatal("create", &path, &error)),
        }
    }

    pub(super) fn restore_reserve(&mut self) {
        let path = self.dir.join("reserve");
        let made = self.disk.open(&path).and_then(|file| {
            self.disk.allocate(&file, limits::AUDIT_RESERVE_BYTES)?;
            self.disk.sync(&file)
        });
        self.reserve = made.is_ok();
        if !self.reserve {
            // A half-taken reserve only takes space away; that it could not be removed shows at the next write.
            let _ = self.disk.remove(&path);
        }
    }

    fn release_reserve(&mut self) {
        self.reserve = false;
        let removed = self.disk.remove(&self.dir.join("reserve"));
        // If it could not be given back, the write that follows finds no space and says so.
        let _ = removed.and_then(|()| self.disk.sync_dir(&self.dir));
    }
}

/// Where replacing a file stopped.
pub(super) enum Replace {
    /// The old one is still there.
    Before(&'static str, io::Error),
    /// Nobody knows.
    Fatal(&'static str, io::Error),
}

/// Replaces a small file so that after a crash it is the old or the new one.
pub(super) fn replace(disk: &dyn Disk, dir: &Path, path: &Path, bytes: &[u8]) -> Result<(), Replace> {
    let temporary = path.with_extension("tmp");
    let before = |what| move |error| Replace::Before(what, error);
    disk.remove(&temporary).map_err(before("replace"))?;
    let file = disk.open(&temporary).map_err(before("create"))?;
    disk.append(&file, bytes).map_err(before("write"))?;
    disk.sync(&file).map_err(|error| Replace::Fatal("fsync", error))?;
    disk.rename(&temporary, path).map_err(before("replace"))?;
    disk.sync_dir(dir).map_err(|error| Replace::Fatal("fsync the directory of", error))
}

/// The hashes of a log that is open: the right end is in memory, the rest in memory or on disk.
impl Tiles for Writer {
    fn tile(&self, level: usize, index: u64, width: usize) -> Result<Vec<Hash>, String> {
        if index == tiles_in(self.tree.size(), level) {
            return Ok(self.tree.edge(level).to_vec());
        }
        self.publisher.pending(level, index).map_or_else(|| TilesOnDisk { dir: &self.dir }.tile(level, index, width), Ok)
    }
}

fn fatal(what: &str, path: &Path, error: &io::Error) -> Trouble {
    Trouble::Fatal(format!("cannot {what} `{}`: {error}", path.display()))
}
