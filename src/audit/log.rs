//! The writer: many callers, one commit at a time.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::fcntl::Flock;
use rustix::time::{ClockId, clock_gettime};

use crate::audit::commit::{Committed, Queued, Writer};
use crate::audit::disk::{Disk, RealDisk};
use crate::audit::entry::{Entry, Receipt, When};
use crate::audit::error::AuditError;
use crate::audit::note::{Checkpoint, Signer};
use crate::audit::open;
use crate::audit::peers::{Handoffs, Known};
use crate::limits;
use crate::types::SpiffeId;

/// One gateway's log, open for writing. Handles are cheap to clone; every call blocks until it is durable, so async code
/// calls from `spawn_blocking`.
#[derive(Clone)]
pub struct AuditLog {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    dir: PathBuf,
    clock: Clock,
    shared: Mutex<Shared>,
    changed: Condvar,
    /// What peers and this log know of each other. Held while a head is recorded, so that two cannot pass each other.
    pub(super) known: Mutex<Known>,
    /// When each peer was shown the head last, by this process. Never held while anything is written: threads that serve others ask it.
    pub(super) shown_at: Mutex<HashMap<SpiffeId, Instant>>,
    /// The entries of handoffs that a peer may want proof of.
    pub(super) handoffs: Mutex<Handoffs>,
    /// Held as long as the log is open.
    _lock: Flock<File>,
}

struct Shared {
    queue: Vec<Queued>,
    next_ticket: u64,
    results: HashMap<u64, Result<Receipt, AuditError>>,
    /// Taken by the caller that commits for all.
    writer: Option<Writer>,
    failed: Option<String>,
    head: Checkpoint,
}

/// Wall clock, and time since the machine started for order when the wall clock jumps.
struct Clock {
    at_open_ns: u64,
    opened: Instant,
    /// Seconds by which the wall clock is wrong.
    #[cfg(test)]
    step: std::sync::atomic::AtomicI64,
}

impl Clock {
    fn start() -> Self {
        let since_boot = clock_gettime(ClockId::Boottime);
        let number = |part: i64| u64::try_from(part).unwrap_or(0);
        Self {
            at_open_ns: number(since_boot.tv_sec).saturating_mul(1_000_000_000).saturating_add(number(since_boot.tv_nsec)),
            opened: Instant::now(),
            #[cfg(test)]
            step: std::sync::atomic::AtomicI64::default(),
        }
    }

    fn now(&self) -> When {
        let elapsed = u64::try_from(self.opened.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let time = jiff::Timestamp::now();
        #[cfg(test)]
        let time = time + jiff::SignedDuration::from_secs(self.step.load(std::sync::atomic::Ordering::SeqCst));
        When { time, monotonic_ns: self.at_open_ns.saturating_add(elapsed) }
    }
}

impl AuditLog {
    /// Opens the log in `dir`, or begins one; `origin` names it in checkpoints and never changes.
    ///
    /// Bytes behind the last commit, which a crash may leave, are set aside in a `dropped-…` file and a `recovered` entry says so.
    ///
    /// # Errors
    ///
    /// Another writer, a log or checkpoint that does not verify, another origin or key than the log's, files that cannot be
    /// read or written.
    pub fn open(dir: &Path, origin: &str, signer: Arc<dyn Signer>) -> Result<Self, AuditError> {
        Self::open_on(Arc::new(RealDisk), dir, origin, signer, limits::AUDIT_SEGMENT_BYTES_MAX)
    }

    pub(super) fn open_on(
        disk: Arc<dyn Disk>,
        dir: &Path,
        origin: &str,
        signer: Arc<dyn Signer>,
        segment_bytes_max: u64,
    ) -> Result<Self, AuditError> {
        Self::with(dir, open::open(disk, dir, origin, signer, None, segment_bytes_max)?)
    }

    /// A log that was opened, once what has to be is recorded.
    pub(super) fn with(dir: &Path, opened: open::Opened) -> Result<Self, AuditError> {
        let shared = Shared {
            queue: Vec::new(),
            next_ticket: 0,
            results: HashMap::new(),
            writer: Some(opened.writer),
            failed: None,
            head: opened.head,
        };
        let log = Self {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                clock: Clock::start(),
                shared: Mutex::new(shared),
                changed: Condvar::new(),
                known: Mutex::new(opened.known),
                shown_at: Mutex::default(),
                handoffs: Mutex::new(opened.handoffs),
                _lock: opened.lock,
            }),
        };
        for entry in &opened.entries {
            log.record_critical(entry)?;
        }
        log.publish();
        Ok(log)
    }

    /// Records an entry; when it returns, the entry and a checkpoint that covers it are on disk.
    ///
    /// # Errors
    ///
    /// The entry was not recorded. After [`AuditError::Disk`] the log is as it was; after [`AuditError::Failed`] nothing
    /// is recorded any more.
    pub fn record(&self, entry: &Entry) -> Result<Receipt, AuditError> {
        self.enqueue(entry, false)
    }

    /// Like [`record`](Self::record), for what a handoff in flight needs to come to its end: when the disk is full it may use the
    /// reserve.
    ///
    /// # Errors
    ///
    /// As for [`record`](Self::record).
    pub fn record_critical(&self, entry: &Entry) -> Result<Receipt, AuditError> {
        self.enqueue(entry, true)
    }

    /// The last durable head, to send to peers.
    #[must_use]
    pub fn head(&self) -> Checkpoint {
        self.inner.shared().head.clone()
    }

    /// Writes checkpoint and tiles up to the last entry, for other programs. The log itself never needs them to be up to date: the last
    /// head is written with every commit that has more than entries of handoffs, tiles when they are full, and both when the log is opened,
    /// and when it is closed.
    /// What cannot be written is made up for later.
    pub fn publish(&self) {
        let head = self.head();
        self.inner.with_writer(|writer| {
            if writer.publisher.is_behind(&writer.tree) {
                writer.publish_head(&head);
                writer.publish_tiles();
            }
        });
    }

    #[cfg(test)]
    pub(super) fn step_clock(&self, seconds: i64) {
        self.inner.clock.step.store(seconds, std::sync::atomic::Ordering::SeqCst);
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }

    pub(super) fn dir(&self) -> &Path {
        &self.inner.dir
    }

    fn enqueue(&self, entry: &Entry, critical: bool) -> Result<Receipt, AuditError> {
        let fields = entry.fields()?;
        let inner = &self.inner;
        let mut shared = inner.shared();
        while shared.queue.len() >= limits::AUDIT_BATCH_ENTRIES_MAX && shared.failed.is_none() {
            shared = inner.wait(shared);
        }
        if let Some(why) = &shared.failed {
            return Err(inner.failed(why));
        }
        let ticket = shared.next_ticket;
        shared.next_ticket = ticket.saturating_add(1);
        let when = inner.clock.now();
        shared.queue.push(Queued { ticket, critical, event: entry.event, migration: entry.migration, fields, when });
        loop {
            if let Some(result) = shared.results.remove(&ticket) {
                return result;
            }
            if let Some(why) = &shared.failed {
                return Err(inner.failed(why));
            }
            shared = match shared.writer.take() {
                Some(writer) => inner.lead(shared, writer),
                None => inner.wait(shared),
            };
        }
    }
}

impl Inner {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many entries wait for the next commit.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.shared().queue.len()
    }

    fn failed(&self, why: &str) -> AuditError {
        AuditError::Failed { dir: self.dir.clone(), why: why.to_owned() }
    }

    fn wait<'a>(&'a self, shared: MutexGuard<'a, Shared>) -> MutexGuard<'a, Shared> {
        self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits everything that waits, the caller's own entry included.
    fn lead<'a>(&'a self, mut shared: MutexGuard<'a, Shared>, mut writer: Writer) -> MutexGuard<'a, Shared> {
        let batch = std::mem::take(&mut shared.queue);
        drop(shared);
        let hurried = batch.iter().all(|queued| queued.critical);
        // If the signer panics, nobody waits for ever and nothing is recorded any more.
        let guard = Leading { inner: self };
        let Committed { results, handoffs, head, failed } = writer.commit(batch);
        std::mem::forget(guard);
        self.handoffs.lock().unwrap_or_else(PoisonError::into_inner).extend(handoffs);
        let mut shared = self.shared();
        shared.results.extend(results);
        shared.failed = failed;
        if let Some(head) = &head {
            shared.head = head.clone();
        }
        self.changed.notify_all();
        // Others have their receipts already. A handoff, for which a guest stands still, does not wait for files that nothing depends on:
        // the next commit writes them, or whoever calls `publish`.
        if let Some(head) = head.filter(|_| !hurried) {
            drop(shared);
            writer.publish_head(&head);
            shared = self.shared();
        }
        shared.writer = Some(writer);
        self.changed.notify_all();
        shared
    }

    /// Waits until nobody writes. Nothing if the writer is gone.
    pub(super) fn with_writer<T>(&self, work: impl FnOnce(&mut Writer) -> T) -> Option<T> {
        let mut shared = self.shared();
        let mut writer = loop {
            match shared.writer.take() {
                Some(writer) => break writer,
                None if shared.failed.is_some() => return None,
                None => shared = self.wait(shared),
            }
        };
        drop(shared);
        let guard = Leading { inner: self };
        let done = work(&mut writer);
        std::mem::forget(guard);
        self.shared().writer = Some(writer);
        self.changed.notify_all();
        Some(done)
    }
}

/// The right end of the tree is written once more, so that other programs find all of it.
impl Drop for Inner {
    fn drop(&mut self) {
        let shared = self.shared.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let (Some(writer), None) = (&mut shared.writer, &shared.failed) {
            writer.publish_head(&shared.head);
            writer.publish_tiles();
        }
    }
}

struct Leading<'a> {
    inner: &'a Inner,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        self.inner.shared().failed = Some("the writer stopped in the middle of a commit".to_owned());
        self.inner.changed.notify_all();
    }
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditLog").field("dir", &self.inner.dir).finish_non_exhaustive()
    }
}
