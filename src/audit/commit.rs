//! One group commit: lines to the segment, then a checkpoint that covers them. The only code that changes a log.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::audit::chain::{Chain, Head};
use crate::audit::disk::{Disk, DiskFile, is_full};
use crate::audit::entry::{Event, Place, Receipt, When, line};
use crate::audit::error::AuditError;
use crate::audit::note::{self, Checkpoint, Signer};
use crate::audit::segment::{checkpoint_path, segment_path};
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
    pub(super) chain: Chain,
    /// Whether the reserve is on disk; without it only critical entries are taken.
    pub(super) reserve: bool,
}

/// What became of a batch.
pub(super) struct Committed {
    pub(super) results: Vec<(u64, Result<Receipt, AuditError>)>,
    /// The new head, if anything was recorded.
    pub(super) head: Option<Checkpoint>,
    /// Why the log has failed, if it has.
    pub(super) failed: Option<String>,
}

/// Why a batch was not written.
enum Trouble {
    /// No space; the log is as it was.
    Full,
    /// Nobody knows what is on disk.
    Fatal(String),
}

impl Writer {
    pub(super) fn commit(&mut self, batch: Vec<Queued>) -> Committed {
        let mut done = Committed { results: Vec::new(), head: None, failed: None };
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
            Ok(head) => {
                let first = head.as_ref().map_or(0, |head| head.size).saturating_sub(u64::try_from(batch.len()).unwrap_or(0));
                for (index, queued) in (first..).zip(&batch) {
                    done.results.push((queued.ticket, Ok(Receipt::new(index, queued.event, queued.migration))));
                }
                done.head = head;
            }
            Err(Trouble::Full) => {
                let dir = self.dir.clone();
                done.results.extend(batch.iter().map(|queued| (queued.ticket, Err(AuditError::Disk { dir: dir.clone() }))));
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

    /// All of `batch` or nothing. INVARIANT(receipt-is-durable): the order of syncs is what the receipts stand on.
    fn write(&mut self, batch: &[Queued]) -> Result<Option<Checkpoint>, Trouble> {
        if batch.is_empty() {
            return Ok(None);
        }
        if self.segment_bytes >= self.segment_bytes_max {
            self.rotate()?;
        }
        let mut chain = self.chain.clone();
        let mut bytes = Vec::new();
        for queued in batch {
            let Head { size: index, root: prev } = chain.head();
            let place = Place { index, prev, boot_id: &self.boot_id };
            let line = line(queued.fields.clone(), queued.when, &place).map_err(Trouble::Fatal)?;
            chain.append(line.as_bytes());
            bytes.extend_from_slice(line.as_bytes());
            bytes.push(b'\n');
        }
        let checkpoint = note::sign(self.signer.as_ref(), &self.origin, chain.head()).map_err(Trouble::Fatal)?;
        if let Err(error) = self.disk.append(&self.segment, &bytes) {
            return Err(self.undo("append to", &self.segment.path.clone(), &error));
        }
        self.disk.sync(&self.segment).map_err(|error| fatal("fsync", &self.segment.path, &error))?;
        self.publish(&checkpoint)?;
        self.chain = chain;
        self.segment_bytes = self.segment_bytes.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        Ok(Some(checkpoint))
    }

    /// Replaces the checkpoint, or takes the lines back.
    fn publish(&self, checkpoint: &Checkpoint) -> Result<(), Trouble> {
        let path = checkpoint_path(&self.dir);
        match replace(self.disk.as_ref(), &self.dir, &path, checkpoint.text.as_bytes()) {
            Ok(()) => Ok(()),
            Err(Replace::Before(what, error)) => Err(self.undo(what, &path, &error)),
            Err(Replace::Fatal(what, error)) => Err(fatal(what, &path, &error)),
        }
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
        let path = segment_path(&self.dir, self.chain.head().size);
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

fn fatal(what: &str, path: &Path, error: &io::Error) -> Trouble {
    Trouble::Fatal(format!("cannot {what} `{}`: {error}", path.display()))
}
