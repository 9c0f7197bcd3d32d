//! Rounds: what is owed goes to the lanes, and what the destination confirms is compared.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::ledger::{LaneLedger, Ledger};
use super::{Run, blocking, lock};
use crate::engine::EngineError;
use crate::engine::digest::{KeptUp, digest_kept, digest_memory, digest_totals, sha256, totals_differ};
use crate::engine::frames::Frames;
use crate::engine::lanes::{LaneReport, LaneRound, SendShared, SourceLane, send_lane};
use crate::limits;
use crate::memory::{PageCounts, PageSet, Tracker};
use crate::migration::{RoundMeasure, SourceEvent};
use crate::telemetry::Phase;
use crate::types::{LaneIndex, Round};
use crate::wire::{FinalDigest, LaneTotals, Message, RoundEnd, StateChunk};

/// The round on the lanes.
#[derive(Debug)]
pub(super) struct RoundUnderWay {
    pub(super) round: Round,
    last: bool,
    since: Instant,
    totals: Vec<Option<LaneTotals>>,
    /// Pages that were not zero, of all rounds before.
    content_before: u64,
    said: bool,
}

/// What the pause yields besides pages.
#[derive(Debug)]
pub(super) struct Finals {
    pub(super) state: Arc<[u8]>,
    state_digest: [u8; 32],
    memory: u128,
}

impl Run {
    pub(super) async fn begin(&mut self, lanes: u16) -> Result<(), EngineError> {
        crate::failpoint::hit!("source.begin");
        let guest = Arc::clone(&self.guest);
        blocking(move || Ok(lock(&guest).start_tracking()?)).await?;
        crate::failpoint::hit!("source.tracking");
        let mut tracker = Tracker::new(self.ram.pages());
        tracker.owe(&PageSet::full(self.ram.pages()));
        self.tracker = Some(tracker);
        self.keep_digests();
        let directory = self.order.ledger.as_deref();
        self.ledger = directory.map(|directory| self.written(Ledger::create(directory))).transpose()?.flatten();
        let encoder = |lane| {
            let ledger = directory.map(|directory| self.written(LaneLedger::open(directory, lane))).transpose()?.flatten();
            Ok(Arc::new(tokio::sync::Mutex::new(SourceLane::new(lane, lanes, &self.packing, ledger))))
        };
        self.encoders = (0..lanes).map(LaneIndex).map(encoder).collect::<Result<_, EngineError>>()?;
        self.write_owed()?;
        self.carried = vec![(PageCounts::default(), 0); usize::from(lanes)];
        self.open_lanes().await
    }

    /// Every lane joins, on the session that stands now.
    pub(super) async fn open_lanes(&mut self) -> Result<(), EngineError> {
        let migration = self.order.migration;
        let shared = SendShared {
            migration,
            ram: Arc::clone(&self.ram),
            limiter: Arc::clone(&self.limiter),
            meter: Arc::clone(&self.meter),
            frames: Frames::default(),
            reports: self.reports_in.clone(),
        };
        for (lane, encoder) in (0..).map(LaneIndex).zip(&self.encoders) {
            let (rounds_in, rounds) = mpsc::channel(1);
            let (shared, encoder) = (shared.clone(), Arc::clone(encoder));
            let task = move |io| send_lane(io, shared, encoder, rounds);
            let opened = self.link.session.open_lane(migration, lane, task).await;
            self.threads.push(opened.map_err(|source| EngineError::Transport { migration, source })?);
            self.lanes.push(rounds_in);
        }
        crate::failpoint::hit!("source.lanes-open");
        Ok(())
    }

    pub(super) async fn send_round(&mut self, round: Round, last: bool) -> Result<(), EngineError> {
        let tracker = self.tracker.as_mut().ok_or_else(|| EngineError::Bug("no tracker".into()))?;
        let (begun, pages) = tracker.begin_round();
        if begun != round {
            return Err(EngineError::Bug(format!("round {round} was decided and {begun} begun")));
        }
        let (lanes, all) = (self.lane_count(), self.ram.pages());
        self.write(|ledger| ledger.begin(lanes, round, all))?;
        self.round = RoundUnderWay::new(round, last, self.lanes.len(), content(&self.counts()));
        self.figures.rounds = round.0;
        self.all_applied = false;
        self.packing.duplicates.begin_round(round, &pages);
        for lane in &self.lanes {
            // A lane that is gone has said why, or is about to.
            let _ = lane.send(LaneRound { round, pages: Arc::clone(&pages) }).await;
        }
        crate::failpoint::hit!("source.round-sent");
        Ok(())
    }

    /// The guest stands still. Saving its state may write guest memory, so the last harvest comes after;
    /// pages, state and digest then go out side by side.
    pub(super) async fn send_last(&mut self, round: Round) -> Result<(), EngineError> {
        crate::failpoint::hit!("source.paused");
        let guest = Arc::clone(&self.guest);
        let saved = blocking(move || {
            let mut guest = lock(&guest);
            let state = guest.save_state()?;
            crate::failpoint::hit!("source.state-saved");
            Ok((state, guest.harvest()?))
        });
        let (state, dirty) = self.alive_through(saved).await?;
        crate::failpoint::hit!("source.last-harvest");
        self.lap("state");
        self.owe(&dirty)?;
        self.limiter.set_final(true);
        let state: Arc<[u8]> = state.into();
        let (ram, verify, kept) = (Arc::clone(&self.ram), self.order.stream.verify, self.kept_up.as_ref().map(KeptUp::digests));
        let saved = Arc::clone(&state);
        self.finals = Some(tokio::task::spawn_blocking(move || {
            let memory = match kept {
                Some(kept) => digest_kept(&kept, &ram)?,
                None if verify => digest_memory(&ram)?,
                None => 0,
            };
            Ok(Finals { state_digest: sha256(&saved), state: saved, memory })
        }));
        self.send_round(round, true).await?;
        self.send_state(&state).await
    }

    /// The lanes were lost behind FINAL: the paused guest is as it was, and what did not arrive of it goes out again.
    pub(super) async fn send_last_again(&mut self, round: Round) -> Result<Option<SourceEvent>, EngineError> {
        self.digest = None;
        self.send_round(round, true).await?;
        let finals = self.paused.clone().ok_or_else(|| EngineError::Bug("FINAL was said of a guest that was not saved".into()))?;
        self.send_state(&finals.state).await?;
        Ok(self.saved(finals).await)
    }

    /// From here on the guest's memory is read ahead, unless all of it is to be read in the pause.
    pub(super) fn keep_digests(&mut self) {
        self.kept_up = (self.order.stream.verify && !self.order.manner.verify_in_pause).then(|| KeptUp::start(&self.ram));
    }

    /// Pages that the guest has written: owed to the destination, and to be read again for the digest.
    pub(super) fn owe(&mut self, dirty: &PageSet) -> Result<(), EngineError> {
        if let Some(kept_up) = &self.kept_up {
            kept_up.touched(dirty);
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.owe(dirty);
        }
        self.write_owed()
    }

    /// State and memory have their digests.
    pub(super) async fn saved(&mut self, finals: Arc<Finals>) -> Option<SourceEvent> {
        self.lap("digest");
        self.digest = Some(FinalDigest { state: finals.state_digest, lanes: [0; 32], memory: finals.memory });
        self.paused = Some(finals);
        self.finalised().await
    }

    async fn send_state(&mut self, state: &[u8]) -> Result<(), EngineError> {
        let total = state.len() as u64;
        let mut offset = 0;
        for piece in state.chunks(limits::STATE_CHUNK_BYTES_MAX) {
            let chunk = StateChunk { migration: self.order.migration, offset, total, bytes: piece.to_vec() };
            offset += piece.len() as u64;
            self.say(Message::StateChunk(chunk)).await?;
        }
        crate::failpoint::hit!("source.state-sent");
        Ok(())
    }

    pub(super) async fn lane_reported(&mut self, report: LaneReport) -> Option<SourceEvent> {
        let lane = usize::from(report.lane.0);
        if report.round != self.round.round || lane >= self.round.totals.len() {
            return Some(self.give_up(EngineError::Bug("a lane reported another round".into())));
        }
        self.round.totals[lane] = Some(report.totals);
        self.carried[lane] = (report.counts, report.wire_bytes);
        self.tables.resize(self.carried.len(), 0);
        self.tables[lane] = report.table_bytes;
        self.busy.resize(self.carried.len(), Duration::ZERO);
        self.busy[lane] = report.busy;
        self.figures.encode = self.busy.iter().sum();
        let table_bytes = self.packing.duplicates.bytes() + self.tables.iter().sum::<usize>();
        self.figures.table_bytes = self.figures.table_bytes.max(table_bytes as u64);
        let lanes: Vec<LaneTotals> = self.round.totals.iter().copied().collect::<Option<_>>()?;
        self.figures.wire_bytes = self.carried_before + self.carried.iter().map(|(_, bytes)| bytes).sum::<u64>();
        let end = RoundEnd { migration: self.order.migration, round: self.round.round, last: self.round.last, lanes };
        if let Err(error) = self.say(Message::RoundEnd(end)).await {
            return Some(self.broken(error));
        }
        self.round.said = true;
        self.lap("last-pages");
        self.finalised().await
    }

    /// FINAL can be said when the last round, the state and the digests are all out.
    pub(super) async fn finalised(&mut self) -> Option<SourceEvent> {
        if !(self.round.last && self.round.said) {
            return None;
        }
        let mut digest = self.digest?;
        let totals: Vec<LaneTotals> = self.round.totals.iter().copied().collect::<Option<_>>()?;
        digest.lanes = digest_totals(&totals);
        self.digest = Some(digest);
        self.phase = Phase::Verify;
        crate::failpoint::hit!("source.final-ready");
        Some(SourceEvent::Finalised(digest))
    }

    pub(super) async fn round_applied(&mut self, round: Round, lanes: &[LaneTotals]) -> Option<SourceEvent> {
        let ours: Vec<LaneTotals> = self.round.totals.iter().copied().flatten().collect();
        if round != self.round.round || !self.round.said {
            return Some(
                self.give_up(EngineError::OutOfPlace { expected: "the end of the round under way", got: format!("round {round} applied") }),
            );
        }
        if let Some(error) = totals_differ(&ours, lanes) {
            return Some(self.give_up(error));
        }
        if let Some(Err(error)) = self.tracker.as_mut().map(|tracker| tracker.applied(round)) {
            return Some(self.give_up(EngineError::OutOfPlace { expected: "the oldest round in flight", got: error.to_string() }));
        }
        self.patience = None;
        if self.round.last {
            self.all_applied = true;
            return None;
        }
        crate::failpoint::hit!("source.round-applied");
        let duration = self.round.since.elapsed();
        let guest = Arc::clone(&self.guest);
        let dirty = match blocking(move || Ok(lock(&guest).harvest()?)).await {
            Ok(dirty) => dirty,
            Err(error) => return Some(self.give_up(error)),
        };
        crate::failpoint::hit!("source.harvested");
        let dirty_pages = dirty.len();
        if let Err(error) = self.owe(&dirty) {
            return Some(self.give_up(error));
        }
        let content_pages = content(&self.counts()) - self.round.content_before;
        Some(SourceEvent::RoundApplied(RoundMeasure { content_pages, duration, dirty_pages }))
    }
}

impl RoundUnderWay {
    pub(super) fn new(round: Round, last: bool, lanes: usize, content_before: u64) -> Self {
        Self { round, last, since: Instant::now(), totals: vec![None; lanes], content_before, said: false }
    }
}

fn content(counts: &PageCounts) -> u64 {
    counts.total() - counts.zero
}
