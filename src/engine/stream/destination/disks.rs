//! Disks of a guest that arrives: changed through its hypervisor as long as it waits, then let go by everybody else.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::{Run, Twin, lock, wait};
use crate::engine::disks::{DiskIn, digest_disks, tell_held};
use crate::engine::handoff::{blocking, joined};
use crate::engine::{DiskFigures, EngineError};
use crate::hypervisor::Disk;
use crate::limits;
use crate::migration::StreamDestinationEvent;
use crate::storage::nbd::enter;
use crate::types::VmName;
use crate::wire::{DiskApplied, DiskDigests, DiskEnd, DiskHeld, Message};

type Digests = Vec<[u8; 32]>;
/// The next blocks of a disk.
type HeldBlocks = (u16, Vec<[u8; 16]>);

/// Disks under way.
pub(super) struct Disks {
    all: Vec<Disk>,
    at: PathBuf,
    pub(super) incoming: Arc<DiskIn>,
    writers: JoinSet<Result<(), EngineError>>,
    /// Those that may hold something.
    held: Vec<u16>,
    /// What is read of them, until the source knows.
    telling: Option<mpsc::Receiver<HeldBlocks>>,
    end: Option<DiskEnd>,
    closing: Option<JoinHandle<Result<Option<Digests>, EngineError>>>,
    /// What was read here, once nobody else has them.
    closed: Option<Option<Digests>>,
    theirs: Option<Digests>,
}

/// What happens to disks.
pub(super) enum Happened {
    /// The source has to be told something.
    Told,
    /// What blocks of a disk hold; nothing when all was read.
    Held(Option<HeldBlocks>),
    /// A writer has ended.
    Failed(EngineError),
    /// Only the hypervisor has them now.
    Closed(Result<Option<Digests>, EngineError>),
}

impl Disks {
    /// Has the twin's disks exported at `at`, and a writer for each.
    pub(super) async fn open(twin: &Twin, vm: &VmName, at: PathBuf, all: Vec<Disk>, held: Vec<u16>) -> Result<Self, EngineError> {
        let (exporting, there, disks) = (Arc::clone(twin), at.clone(), all.clone());
        blocking(move || Ok(lock(&exporting).export(&there, &disks, true)?)).await?;
        let (incoming, outputs) = DiskIn::new(&all);
        let mut writers = JoinSet::new();
        for (disk, output) in all.iter().zip(outputs) {
            let failed = |vm: &VmName, name: &str, what: &str| {
                let (vm, what) = (vm.clone(), format!("`{name}` cannot be {what}"));
                move |source| EngineError::Disk { vm, what, source }
            };
            let entering = async {
                let mut stream = UnixStream::connect(&at).await?;
                enter(&mut stream, &disk.device, true).await?;
                Ok(stream)
            };
            let entered = tokio::time::timeout(limits::GREETING_WITHIN, entering).await.unwrap_or_else(|late| Err(late.into()));
            let stream = entered.map_err(failed(vm, &disk.device, "entered"))?;
            let (incoming, failed) = (Arc::clone(&incoming), failed(vm, &disk.device, "written"));
            writers.spawn(async move { incoming.write(stream, output).await.map_err(failed) });
        }
        let mut disks = Self { all, at, incoming, writers, held, telling: None, end: None, closing: None, closed: None, theirs: None };
        disks.tell_again();
        Ok(disks)
    }

    /// Reads what its disks hold, for a source that knows nothing yet.
    pub(super) fn tell_again(&mut self) {
        let (blocks, telling) = mpsc::channel(HELD_QUEUE);
        let (at, all, held) = (self.at.clone(), self.all.clone(), self.held.clone());
        tokio::spawn(async move {
            if let Err(error) = tell_held(&at, &all, &held, &blocks).await {
                tracing::warn!(%error, "what is left of disks cannot be read: it is sent again");
            }
        });
        self.telling = Some(telling);
    }

    /// The source has come back, and takes for unknown what it was not told.
    pub(super) fn tell_no_more(&mut self) {
        self.telling = None;
    }

    /// Whether only the hypervisor has them, and they hold what they have to.
    pub(super) fn are_settled(&self) -> bool {
        let compared = !self.end.is_some_and(|end| end.verify) || self.theirs.is_some();
        self.closed.is_some() && compared
    }

    /// Whether everything was written and flushed.
    fn need_no_writer(&self) -> bool {
        self.closed.is_some() || (self.closing.is_some() && self.incoming.is_idle())
    }

    fn differ(&self) -> bool {
        matches!((&self.closed, &self.theirs), (Some(Some(ours)), Some(theirs)) if ours != theirs)
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        if let Some(closing) = &self.closing {
            closing.abort();
        }
        let _ = std::fs::remove_file(&self.at);
    }
}

/// Waits for what happens to disks; for ever where there are none.
pub(super) async fn happened(disks: &mut Option<Disks>) -> Happened {
    let Some(Disks { incoming, writers, closing, telling, .. }) = disks else { return std::future::pending().await };
    tokio::select! {
        () = incoming.to_tell() => Happened::Told,
        blocks = next(telling) => Happened::Held(blocks),
        Some(ended) = writers.join_next() => Happened::Failed(match joined(ended).and_then(|ended| ended) {
            Ok(()) => EngineError::Bug("a writer of a disk has ended".into()),
            Err(error) => error,
        }),
        closed = wait(closing) => {
            *closing = None;
            Happened::Closed(joined(closed).and_then(|closed| closed))
        }
    }
}

async fn next(telling: &mut Option<mpsc::Receiver<HeldBlocks>>) -> Option<HeldBlocks> {
    match telling {
        Some(telling) => telling.recv().await,
        None => std::future::pending().await,
    }
}

async fn close(
    twin: Twin,
    incoming: Arc<DiskIn>,
    all: Vec<Disk>,
    at: PathBuf,
    vm: VmName,
    verify: bool,
) -> Result<Option<Digests>, EngineError> {
    incoming.flush().await;
    let mut digests = None;
    if verify {
        let read = digest_disks(&at, &all).await;
        digests = Some(read.map_err(|source| EngineError::Disk { vm, what: "they cannot be read".into(), source })?);
    }
    blocking(move || Ok(lock(&twin).end_exports()?)).await?;
    Ok(digests)
}

impl Run {
    /// Whether only disks were to come, and the source has said that they did.
    pub(super) fn have_disks_alone(&self) -> bool {
        self.disks_only && self.disks.as_ref().is_some_and(|disks| disks.end.is_some())
    }

    /// What came of disks alone, once all did.
    pub(super) fn disks_there(&self) -> DiskFigures {
        let Some(disks) = self.disks.as_ref().filter(|_| self.have_disks_alone() && self.error.is_none()) else {
            return DiskFigures::default();
        };
        DiskFigures {
            only: true,
            count: disks.all.len(),
            bytes: disks.all.iter().map(|disk| disk.bytes).fold(0, u64::saturating_add),
            changed_bytes: disks.end.map_or(0, |end| end.bytes),
            ..DiskFigures::default()
        }
    }

    pub(super) async fn disks_happened(&mut self, happened: Happened) -> Option<StreamDestinationEvent> {
        match happened {
            Happened::Told => self.tell_changes().await,
            Happened::Held(blocks) => self.tell_held(blocks).await,
            // Writers lose their exports when those are taken away.
            Happened::Failed(_) if self.disks.as_ref().is_some_and(Disks::need_no_writer) => None,
            Happened::Failed(error) => self.machine.is_receiving().then(|| self.give_up(error)),
            Happened::Closed(Err(error)) => Some(self.give_up(error)),
            Happened::Closed(Ok(digests)) => {
                crate::failpoint::hit!("destination.disks-closed");
                let disks = self.disks.as_mut()?;
                disks.closed = Some(digests);
                self.disks_settled()
            }
        }
    }

    async fn tell_held(&mut self, blocks: Option<HeldBlocks>) -> Option<StreamDestinationEvent> {
        // The source can lead on only behind this.
        self.watch.led_on = Instant::now();
        let last = blocks.is_none();
        if last {
            self.disks.as_mut()?.tell_no_more();
        }
        if self.lost.is_some() {
            return None;
        }
        let (disk, blocks) = blocks.unwrap_or_default();
        match self.say(Message::DiskHeld(DiskHeld { migration: self.order.migration, disk, blocks, last })).await {
            Ok(()) => None,
            Err(error) => self.broken(error).await,
        }
    }

    async fn tell_changes(&mut self) -> Option<StreamDestinationEvent> {
        let disks = self.disks.as_ref()?;
        let changes = disks.incoming.take_to_tell();
        // Without a link it is sent again, and then named.
        if self.lost.is_some() || changes.is_empty() {
            return None;
        }
        match self.say(Message::DiskApplied(DiskApplied { migration: self.order.migration, changes })).await {
            Ok(()) => None,
            Err(error) => self.broken(error).await,
        }
    }

    // SPEC: PROTOCOL.md#must-disk-end
    /// No disk changes any more. It may be said again, by a source that lost its link.
    pub(super) fn disks_end(&mut self, end: DiskEnd) -> Option<StreamDestinationEvent> {
        let vm = self.order.vm.clone();
        let out_of_place = |got: &str| EngineError::OutOfPlace { expected: "changes of disks", got: got.to_owned() };
        let Some(disks) = &mut self.disks else { return Some(self.give_up(out_of_place("their end, where there are none"))) };
        match disks.end {
            Some(before) if before == end => return None,
            Some(_) => return Some(self.give_up(out_of_place("another end"))),
            None => {}
        }
        if let Err(error) = disks.incoming.end(end.changes, end.bytes) {
            return Some(self.give_up(error));
        }
        disks.end = Some(end);
        let (incoming, all, at) = (Arc::clone(&disks.incoming), disks.all.clone(), disks.at.clone());
        disks.closing = Some(tokio::spawn(close(Arc::clone(&self.twin), incoming, all, at, vm, end.verify)));
        None
    }

    pub(super) fn disks_digests(&mut self, digests: DiskDigests) -> Option<StreamDestinationEvent> {
        let disks = self.disks.as_mut().filter(|disks| disks.end.is_some_and(|end| end.verify) && digests.digests.len() == disks.all.len());
        let Some(disks) = disks else {
            let got = format!("{} digests", digests.digests.len());
            return Some(self.give_up(EngineError::OutOfPlace { expected: "one digest for each disk, behind their end", got }));
        };
        disks.theirs = Some(digests.digests);
        self.disks_settled()
    }

    fn disks_settled(&mut self) -> Option<StreamDestinationEvent> {
        if self.disks.as_ref().is_some_and(Disks::differ) {
            let error = EngineError::Digest { vm: self.order.vm.clone(), what: "what the disks hold" };
            return Some(self.give_up(error));
        }
        self.final_when_ready()
    }
}

/// WHY: reading goes on while the last message is sent.
const HELD_QUEUE: usize = 2;
