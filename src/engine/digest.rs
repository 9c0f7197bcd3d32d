//! What both ends compute over a finished migration, to find that they agree.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::engine::EngineError;
use crate::engine::handoff::joined;
use crate::memory::{GuestRam, KeptDigests, PageSet};
use crate::types::LaneIndex;
use crate::wire::LaneTotals;

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest_bytes(&ring::digest::digest(&ring::digest::SHA256, bytes))
}

pub(super) fn digest_bytes(digest: &ring::digest::Digest) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

/// SHA-256 over every lane's totals, as the final digest has them.
pub(super) fn digest_totals(totals: &[LaneTotals]) -> [u8; 32] {
    sha256(&LaneTotals::canonical_bytes(totals))
}

pub(super) fn totals_differ(source: &[LaneTotals], destination: &[LaneTotals]) -> Option<EngineError> {
    let lanes = source.len().max(destination.len());
    let at = |totals: &[LaneTotals], lane: usize| totals.get(lane).copied().unwrap_or_default();
    let lane = (0..lanes).find(|lane| at(source, *lane) != at(destination, *lane))?;
    let index = LaneIndex(u16::try_from(lane).unwrap_or(u16::MAX));
    Some(EngineError::Totals { lane: index, sent: at(source, lane).frames, applied: at(destination, lane).frames })
}

/// The digest of guest RAM that is kept up to date while memory moves, so that little is left to be read in the pause.
#[derive(Debug)]
pub(super) struct KeptUp {
    digests: Arc<KeptDigests>,
    ram: Arc<GuestRam>,
    wake: Arc<Notify>,
    /// Ends with this.
    _follows: JoinSet<()>,
}

impl KeptUp {
    pub(super) fn start(ram: &Arc<GuestRam>) -> Self {
        let digests = Arc::new(KeptDigests::new(ram.pages()));
        let mut follows = JoinSet::new();
        let wake = Arc::<Notify>::default();
        let (kept, read, woken) = (Arc::clone(&digests), Arc::clone(ram), Arc::clone(&wake));
        follows.spawn(async move {
            loop {
                let _ = tokio::time::timeout(FOLLOW, woken.notified()).await;
                if let Err(error) = refresh(Arc::clone(&kept), Arc::clone(&read)).await {
                    // Whoever asks for the digest has the same error.
                    tracing::warn!(%error, "guest memory is not read ahead of the switch");
                    return;
                }
            }
        });
        Self { digests, ram: Arc::clone(ram), wake, _follows: follows }
    }

    pub(super) fn digests(&self) -> Arc<KeptDigests> {
        Arc::clone(&self.digests)
    }

    pub(super) fn touched(&self, pages: &PageSet) {
        self.digests.touched_all(pages);
    }

    /// Has what was touched read now, beside whatever the caller does next.
    pub(super) fn hurry(&self) {
        self.wake.notify_one();
    }

    /// Catches up.
    pub(super) fn refresh(&self) -> impl Future<Output = Result<(), EngineError>> + use<> {
        refresh(self.digests(), Arc::clone(&self.ram))
    }
}

async fn refresh(digests: Arc<KeptDigests>, ram: Arc<GuestRam>) -> Result<(), EngineError> {
    Ok(joined(tokio::task::spawn_blocking(move || digests.refresh(&ram, 0..digests.groups())).await)??)
}

/// WHY: what is read again because it changed meanwhile is work for nothing, and what was not read yet is to be read in the pause.
const FOLLOW: Duration = Duration::from_millis(50);

/// What is kept of guest RAM that does not change any more, brought up to date: on two threads, if much is to be read.
pub(super) fn digest_kept(kept: &KeptDigests, ram: &GuestRam) -> Result<u128, EngineError> {
    let (groups, half) = (kept.groups(), kept.groups() / 2);
    if kept.stale_blocks() < BLOCKS_FOR_A_THREAD {
        kept.refresh(ram, 0..groups)?;
    } else {
        std::thread::scope(|scope| {
            let high = scope.spawn(|| kept.refresh(ram, half..groups));
            kept.refresh(ram, 0..half)?;
            high.join().map_err(|_| EngineError::Bug("digest thread ended".into()))?.map_err(EngineError::from)
        })?;
    }
    Ok(kept.digest())
}

/// WHY: 4 MiB take several times as long to read as a thread takes to start.
const BLOCKS_FOR_A_THREAD: usize = 64;

/// Digest of all guest RAM.
pub(super) fn digest_memory(ram: &GuestRam) -> Result<u128, EngineError> {
    digest_kept(&KeptDigests::new(ram.pages()), ram)
}
