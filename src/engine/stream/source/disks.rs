//! Disks of a guest that leaves: mirrored before its memory is sent, settled when it stands still.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::{Guest, Run, lock};
use crate::engine::EngineError;
use crate::engine::disks::{DiskOrder, DiskOut, DiskServer, Held, MirrorPace, digest_disks};
use crate::engine::handoff::{blocking, joined};
use crate::hypervisor::{Disk, HypervisorError, MirrorProgress};
use crate::migration::StreamSourceEvent;
use crate::telemetry::Phase;
use crate::types::{MigrationId, VmName};
use crate::wire::{DiskApplied, DiskDigests, DiskEnd, DiskHeld, Message};

/// Disks under way.
pub(super) struct Disks {
    order: DiskOrder,
    all: Vec<Disk>,
    /// The guest stays.
    only: bool,
    pub(super) out: Arc<DiskOut>,
    held: Arc<Held>,
    server: Option<DiskServer>,
    pub(super) said: MirrorProgress,
    pace: MirrorPace,
    /// Since when they are copied.
    began: Option<Instant>,
    /// How often the guest had to be slowed down.
    slowed: u32,
    settling: Option<JoinHandle<Result<Settled, EngineError>>>,
    settled: Option<Settled>,
}

/// What is said of disks that change no more.
struct Settled {
    end: DiskEnd,
    digests: Option<DiskDigests>,
    /// What the comparison took of the pause.
    took: Duration,
}

impl Disks {
    pub(super) fn new(order: DiskOrder, all: Vec<Disk>, only: bool) -> Self {
        Self {
            order,
            all,
            only,
            out: Arc::default(),
            held: Arc::default(),
            server: None,
            said: MirrorProgress::default(),
            pace: MirrorPace::default(),
            began: None,
            slowed: 0,
            settling: None,
            settled: None,
        }
    }

    /// Whether nothing but disks was to be copied, and they are there.
    pub(super) fn are_there_alone(&self) -> bool {
        self.only && self.settled.is_some()
    }

    fn bytes(&self) -> u64 {
        self.all.iter().map(|disk| disk.bytes).fold(0, u64::saturating_add)
    }

    /// What the pause may last longer for them.
    pub(super) fn pause(&self) -> Duration {
        let read = if self.order.verify { self.bytes() as f64 / VERIFY_BYTES_PER_SECOND } else { 0.0 };
        Duration::from_secs_f64(read)
    }
}

/// Waits for the end of settling; for ever where there is none.
pub(super) async fn settled(disks: &mut Option<Disks>) -> Result<(), EngineError> {
    let Some(Disks { settling, settled, .. }) = disks else { return std::future::pending().await };
    let ended = match settling {
        Some(task) => task.await,
        None => return std::future::pending().await,
    };
    *settling = None;
    *settled = Some(joined(ended)??);
    Ok(())
}

impl Run {
    /// Opens the lanes. What is to be sent on them is known when the destination has said what it holds.
    pub(super) async fn mirror(&mut self, lanes: u16) -> Result<(), EngineError> {
        self.lanes = lanes;
        let journal = Arc::clone(&self.evidence.journal);
        joined(tokio::task::spawn_blocking(move || journal.reserve()).await)??;
        self.phase = Phase::Storage;
        self.open_lanes().await
    }

    /// The destination says what its disks hold.
    pub(super) async fn disk_held(&mut self, said: &DiskHeld) -> Option<StreamSourceEvent> {
        let taken = match &self.disks {
            // Only behind ACCEPT.
            Some(disks) if said.migration == self.order.migration && self.phase == Phase::Storage => {
                disks.held.take(&disks.all, said.disk, &said.blocks, said.last)
            }
            _ => Err(EngineError::OutOfPlace { expected: self.machine.name(), got: "disk-held".to_owned() }),
        };
        let begun = match taken {
            Ok(()) => self.begin_mirrors().await,
            refused => refused,
        };
        begun.err().map(|error| self.give_up(error))
    }

    /// A destination that comes back says no more of its disks: what is not known is sent.
    pub(super) async fn disks_resumed(&mut self) -> Result<(), EngineError> {
        if self.phase == Phase::Storage
            && let Some(disks) = &self.disks
        {
            disks.held.close();
            self.begin_mirrors().await?;
        }
        Ok(())
    }

    /// Has the hypervisor write to our end of the lanes, once it is known what need not be sent.
    async fn begin_mirrors(&mut self) -> Result<(), EngineError> {
        let vm = self.order.vm.to_string();
        let Some(disks) = self.disks.as_mut().filter(|disks| disks.server.is_none() && disks.held.is_complete()) else { return Ok(()) };
        let local = |source| HypervisorError::Local { vm, what: "cannot listen for disks", source };
        disks.server =
            Some(DiskServer::start(&disks.order.socket, &disks.all, Arc::clone(&disks.out), Arc::clone(&disks.held)).map_err(local)?);
        let (at, all) = (disks.order.socket.clone(), disks.all.clone());
        let in_place = !disks.held.is_empty();
        disks.began = Some(Instant::now());
        let out = Arc::clone(&disks.out);
        self.beside(move |guest| guest.mirror(&at, &all, in_place)).await?;
        out.has_begun();
        Ok(())
    }

    /// Whether these changes can have been applied; then they are.
    pub(super) fn are_applied(&self, applied: &DiskApplied) -> bool {
        let ours = applied.migration == self.order.migration;
        ours && self.disks.as_ref().is_some_and(|disks| disks.out.applied(&applied.changes))
    }

    /// How the mirrors are, while they are what is waited for.
    pub(super) async fn look_at_disks(&mut self) -> Option<StreamSourceEvent> {
        let copies = |disks: &Disks| disks.server.is_some() && disks.settling.is_none();
        if self.phase != Phase::Storage || !self.disks.as_ref().is_some_and(copies) {
            return None;
        }
        if self.outage.is_some() {
            self.disks.as_mut()?.pace.forget();
            return None;
        }
        let said = match self.beside(|guest| guest.mirror_progress()).await {
            Ok(said) => said,
            Err(error) => return Some(self.give_up(error)),
        };
        let disks = self.disks.as_mut()?;
        disks.said = said;
        if said.ready {
            tracing::info!(migration = %self.order.migration, "disks are equal at both ends");
            crate::failpoint::hit!("source.disks-mirrored");
            return Some(StreamSourceEvent::Mirrored);
        }
        if disks.pace.is_hopeless(Instant::now(), &said) {
            disks.pace.forget();
            let copied = disks.out.changed_bytes() as f64 / disks.began.map_or(1.0, |began| began.elapsed().as_secs_f64().max(1.0));
            disks.slowed += 1;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of bytes; saturates")]
            let each = (copied / f64::from(1 << disks.slowed.min(SLOWED_MAX)) / disks.all.len().max(1) as f64) as u64;
            let (each, all) = (each.max(WRITE_BYTES_PER_SECOND_MIN), disks.all.clone());
            tracing::warn!(migration = %self.order.migration, each, "the guest writes faster than its disks are copied: it is slowed down to so many bytes a second");
            if let Err(error) = self.beside(move |guest| guest.slow_writes(&all, each)).await {
                return Some(self.give_up(error));
            }
        }
        None
    }

    /// Ends the mirrors beside everything else: what they still copy has to be heard of.
    pub(super) fn settle(&mut self) -> Result<(), EngineError> {
        let (guest, paused, migration) = (Arc::clone(&self.guest), self.pause_max(), self.order.migration);
        let disks = self.disks.as_mut().ok_or_else(|| EngineError::Bug("disks to settle that are not there".into()))?;
        let within = if disks.only { STILL_WITHIN } else { paused };
        let (out, order, all) = (Arc::clone(&disks.out), disks.order.clone(), disks.all.clone());
        disks.settling = Some(tokio::spawn(settle(guest, (migration, self.order.vm.clone()), out, order, all, within)));
        Ok(())
    }

    pub(super) async fn was_settled(&mut self, settled: Result<(), EngineError>) -> Option<StreamSourceEvent> {
        self.lap("disks");
        if let Err(error) = settled {
            return Some(self.give_up(error));
        }
        let disks = self.disks.as_mut()?;
        // Nobody writes to it any more.
        disks.server = None;
        crate::failpoint::hit!("source.disks-settled");
        if let Some(Settled { end, took, .. }) = &disks.settled {
            (self.figures.disks.count, self.figures.disks.bytes) = (disks.all.len(), disks.bytes());
            self.figures.disks.changed_bytes = end.bytes;
            self.figures.disks.held_bytes = disks.held.same_bytes();
            self.figures.disks.verify = end.verify.then_some(*took);
        }
        if let Err(error) = self.say_disks().await {
            // It is said again when the link stands.
            let lost = self.broken(error);
            if !matches!(lost, StreamSourceEvent::LinkLost) {
                return Some(lost);
            }
            self.link_lost().await;
        }
        Some(StreamSourceEvent::Settled)
    }

    /// That disks change no more, once that is so and where the link stands.
    pub(super) async fn say_disks(&mut self) -> Result<(), EngineError> {
        let said = self.disks.as_ref().and_then(|disks| disks.settled.as_ref()).filter(|_| self.outage.is_none());
        let Some((end, digests)) = said.map(|settled| (settled.end, settled.digests.clone())) else { return Ok(()) };
        self.say(Message::DiskEnd(end)).await?;
        match digests {
            Some(digests) => self.say(Message::DiskDigests(digests)).await,
            None => Ok(()),
        }
    }

    /// Nothing is taken of the hypervisor any more. One that waits for an answer is told that it fails, and goes on.
    pub(super) fn stop_disks(&mut self) {
        if let Some(disks) = &mut self.disks {
            disks.out.close();
            disks.server = None;
            if let Some(settling) = disks.settling.take() {
                settling.abort();
            }
        }
    }
}

async fn settle(
    guest: Guest,
    (migration, vm): (MigrationId, VmName),
    out: Arc<DiskOut>,
    order: DiskOrder,
    all: Vec<Disk>,
    within: Duration,
) -> Result<Settled, EngineError> {
    let DiskOrder { socket, verify, .. } = order;
    let ending = Arc::clone(&guest);
    blocking(move || Ok(lock(&ending).end_mirror(within)?)).await?;
    let (changes, bytes) = out.all_applied().await;
    let began = Instant::now();
    let mut digests = None;
    if verify {
        let at = socket.with_extension("own");
        let (own, exported, there) = (Arc::clone(&guest), all.clone(), at.clone());
        blocking(move || Ok(lock(&own).export(&there, &exported, false)?)).await?;
        let read = digest_disks(&at, &all).await;
        let removed = std::fs::remove_file(&at);
        tracing::debug!(?removed, "socket of own disks");
        blocking(move || Ok(lock(&guest).end_exports()?)).await?;
        digests = Some(DiskDigests {
            migration,
            digests: read.map_err(|source| EngineError::Disk { vm, what: "its own disks cannot be read".into(), source })?,
        });
    }
    Ok(Settled { end: DiskEnd { migration, changes, bytes, verify }, digests, took: began.elapsed() })
}

/// WHY: a guest that runs is caught between two of its writes; one that leaves no gap for so long leaves none.
const STILL_WITHIN: Duration = Duration::from_secs(60);
/// WHY: a slow disk; the pause is bounded by it, and what it takes is in the report.
const VERIFY_BYTES_PER_SECOND: f64 = 100e6;

/// WHY: copying goes on with half of the path or more; a guest that has to be slowed further hardly writes any more.
const SLOWED_MAX: u32 = 8;
/// What a guest may always write, one block of a mirror a second.
const WRITE_BYTES_PER_SECOND_MIN: u64 = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn settling_is_waited_for_again_when_the_wait_was_dropped() {
        let order = DiskOrder { socket: "x".into(), verify: false };
        let mut disks = Some(Disks::new(order, Vec::new(), false));
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        if let Some(disks) = &mut disks {
            disks.settling = Some(tokio::spawn(async move {
                let _ = gone.await;
                let end = DiskEnd { migration: MigrationId([0; 16]), changes: 1, bytes: 2, verify: false };
                Ok(Settled { end, digests: None, took: Duration::ZERO })
            }));
        }
        tokio::select! {
            biased;
            _ = settled(&mut disks) => panic!("nothing was settled"),
            () = tokio::task::yield_now() => {}
        }
        go.send(()).unwrap();
        settled(&mut disks).await.unwrap();
        assert!(disks.unwrap().settled.is_some_and(|settled| settled.end.changes == 1));
    }
}
