//! Giving up old entries. Their hashes stay, in the tiles, so that every head and every proof made before is as good as ever.
//!
//! Only whole segments go, and only where the log has grown far enough that the tile over their end is full: the tiles are durable
//! before the entry that says so is, and that before a file goes.

use std::io;

use crate::audit::commit::Writer;
use crate::audit::disk::DiskFile;
use crate::audit::entry::{Event, StoredEntry};
use crate::audit::error::AuditError;
use crate::audit::log::AuditLog;
use crate::audit::open::log_names;
use crate::audit::segment::{self, Found, Lines, Segment};
use crate::audit::tile::{self, Name, TilesOnDisk};
use crate::audit::tree::{TILE_WIDTH, root_at};
use crate::audit::walk::Walk;

impl AuditLog {
    /// Gives up entries that are older than `before`, in whole segments; returns the first entry that is kept.
    ///
    /// # Errors
    ///
    /// Files cannot be read or removed, or it could not be recorded that they go. What was not removed then is when the log is opened.
    pub fn prune(&self, before: jiff::Timestamp) -> Result<u64, AuditError> {
        let failed = || AuditError::io("prune", self.dir(), io::Error::other("the log has failed"));
        let wrap = |error| AuditError::io("prune", self.dir(), error);
        let known = self.known();
        let segments = segment::list(self.dir())?;
        let kept = segments.first().map_or(0, |segment| segment.first);
        let size = self.head().size;
        let mut first = kept;
        for segment in segments.iter().skip(1).filter(|segment| is_covered(segment.first, size)) {
            match first_time(segment).map_err(|error| AuditError::io("read", &segment.path, error))? {
                Some(time) if time < before => first = segment.first,
                _ => break,
            }
        }
        if first == kept {
            return Ok(kept);
        }
        self.inner().with_writer(|writer| make_durable(writer, kept, first)).ok_or_else(failed)?.map_err(wrap)?;
        for entry in known.before(first) {
            self.record(&entry)?;
        }
        let named =
            self.inner().with_writer(|writer| log_names(Event::Pruned, &writer.origin, writer.signer.as_ref())).ok_or_else(failed)?;
        self.record(&named.detail("first_index", first).detail("before", before.to_string()))?;
        self.inner().with_writer(|writer| finish(writer, first)).ok_or_else(failed)?.map_err(wrap)?;
        Ok(first)
    }
}

/// Whether the hashes of all entries before `first` are in full tiles of a log of `size`.
fn is_covered(first: u64, size: u64) -> bool {
    first.next_multiple_of(TILE_WIDTH as u64) <= size
}

/// When the first entry of a segment was made.
fn first_time(segment: &Segment) -> io::Result<Option<jiff::Timestamp>> {
    let mut line = Vec::new();
    let found = Lines::open(&segment.path)?.next(&mut line)?;
    let entry = if found == Found::Line { StoredEntry::parse(&line).ok() } else { None };
    Ok(entry.map(|entry| entry.time))
}

/// Makes the hashes of entries from `from` to before `to` survive a crash, once it is seen that they are those of the entries.
fn make_durable(writer: &mut Writer, from: u64, to: u64) -> io::Result<()> {
    writer.publisher.write_full(writer.disk.as_ref())?;
    let width = TILE_WIDTH as u64;
    let mut walk = Walk::new(&writer.dir).map_err(io::Error::other)?;
    walk.want(to);
    while walk.signed() < to {
        if walk.next().map_err(io::Error::other)?.is_none() {
            break;
        }
        walk.tree().take_full();
    }
    if walk.root_at(to) != root_at(&TilesOnDisk { dir: &writer.dir }, to).ok() {
        return Err(io::Error::other("the tiles are not those of the entries"));
    }
    for index in from / width..to.div_ceil(width) {
        let path = Name::hashes(0, index, TILE_WIDTH).path(&writer.dir);
        let file = DiskFile { file: segment::open(&path)?, path: path.clone() };
        writer.disk.sync(&file)?;
        for folder in path.ancestors().skip(1).take_while(|folder| folder.starts_with(&writer.dir)) {
            writer.disk.sync_dir(folder)?;
        }
    }
    Ok(())
}

/// Removes what is before `first`, and leaves what another run has removed.
pub(super) fn finish(writer: &Writer, first: u64) -> io::Result<()> {
    let segments = segment::list(&writer.dir).map_err(io::Error::other)?;
    let ends = segments.iter().skip(1).map(|segment| segment.first);
    // The oldest first, so that what is left is always one piece.
    for (segment, end) in segments.iter().zip(ends) {
        if end <= first {
            writer.disk.remove(&segment.path)?;
        }
    }
    if first == 0 {
        return Ok(());
    }
    let gone = |name: &Name| name.level.is_none() && name.index.saturating_add(1).saturating_mul(TILE_WIDTH as u64) <= first;
    for name in tile::list(&writer.dir)?.into_iter().filter_map(Result::ok).filter(gone) {
        writer.disk.remove(&name.path(&writer.dir))?;
    }
    writer.disk.sync_dir(&writer.dir)
}

/// The first entry that is kept after what an entry says; nothing if it is about something else.
pub(super) fn pruned_by(entry: &StoredEntry) -> Option<u64> {
    (entry.event == Event::Pruned).then(|| entry.detail.get("first_index")?.as_u64()).flatten()
}
