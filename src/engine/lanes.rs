//! The page pumps: one task a lane on the lane's own thread, at each end. What a lane knows outlives its connection.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, watch};

use crate::engine::EngineError;
use crate::engine::destination::Progress;
use crate::engine::digest::KeptUp;
use crate::engine::frames::Frames;
use crate::engine::handoff::joined;
use crate::engine::limiter::Limiter;
use crate::engine::meter::Meter;
use crate::engine::processors::RunDelay;
use crate::engine::source::{LaneLedger, Manner, Reached};
use crate::limits;
use crate::memory::{Adaptation, DUPLICATES_KEY_BYTES, Decoder, Duplicates, Effort, Encoder, FrameSent, GuestRam, PageCounts, PageSet};
use crate::transport::{LaneIo, LinkStats};
use crate::types::{LaneIndex, MigrationId, PAGE_BYTES, PageNumber, Round};
use crate::wire::{After, Compression, FRAME_HEADER_BYTES, FrameHeader, LaneStanding, LaneTotals, StreamTerms, afters};

/// What a source lane is told.
#[derive(Debug, Clone)]
pub(super) struct LaneRound {
    pub(super) round: Round,
    /// Pages of every lane; each takes those of its stripes.
    pub(super) pages: Arc<PageSet>,
}

/// What a lane says at the end of a round.
#[derive(Debug)]
pub(super) struct LaneReport {
    pub(super) lane: LaneIndex,
    pub(super) round: Round,
    /// Since the lane's join.
    pub(super) totals: LaneTotals,
    /// Since the migration began.
    pub(super) counts: PageCounts,
    /// UDP payload that the lane's connection has sent so far.
    pub(super) wire_bytes: u64,
    /// What the lane keeps at the source besides buffers, bytes.
    pub(super) table_bytes: usize,
    /// Time spent to make frames of pages, or pages of frames, since the migration began.
    pub(super) busy: Duration,
}

/// What every source lane of a migration shares.
#[derive(Debug, Clone)]
pub(super) struct SendShared {
    pub(super) migration: MigrationId,
    pub(super) ram: Arc<GuestRam>,
    pub(super) limiter: Arc<Limiter>,
    pub(super) meter: Arc<Meter>,
    pub(super) frames: Frames,
    pub(super) reports: mpsc::Sender<Result<LaneReport, EngineError>>,
}

/// How the pages of a migration are made smaller.
#[derive(Debug, Clone)]
pub(super) struct Packing {
    pub(super) terms: StreamTerms,
    pub(super) level: Option<u8>,
    /// Pages of the VM.
    pub(super) pages: u64,
    pub(super) duplicates: Arc<Duplicates>,
    /// Of all lanes.
    pub(super) versions_bytes_max: usize,
}

impl Packing {
    pub(super) fn new(terms: &StreamTerms, manner: &Manner, pages: u64) -> Self {
        let mut key = [0; DUPLICATES_KEY_BYTES];
        // A guest that knew the key could make pages that are taken for equal.
        let for_duplicates = manner.table_bytes / 5;
        let bytes_max = SystemRandom::new().fill(&mut key).map_or(0, |()| for_duplicates);
        let duplicates = Arc::new(Duplicates::new(pages, bytes_max, key));
        let versions_bytes_max = manner.table_bytes - for_duplicates;
        Self { terms: terms.clone(), level: manner.zstd_level, pages, duplicates, versions_bytes_max }
    }
}

/// A lane at the source: its encoder, and how far each frame of the round in flight reached, also for whoever comes after this
/// process.
#[derive(Debug)]
pub(super) struct SourceLane {
    lane: LaneIndex,
    lanes: u16,
    encoder: Encoder,
    /// Whether it finds out by itself how hard to try.
    adapts: bool,
    adaptation: Option<Adaptation>,
    /// Frames that it learned from.
    frames: u64,
    /// Time spent to make frames.
    busy: Duration,
    round: Round,
    /// Frame bytes since the join when the round began.
    before: u64,
    /// One entry a frame: 24 bytes for at least 64 pages, where the guest is not sparse.
    reached: Vec<Reached>,
    ledger: Option<LaneLedger>,
}

/// What became of a lane's round.
pub(super) struct Outstanding {
    /// Pages from here on did not arrive; nothing when all did.
    pub(super) from: Option<PageNumber>,
    /// Frame bytes that were made and did not arrive. Some may never have left this host.
    pub(super) lost_bytes: u64,
    /// Frame bytes that arrived since the join.
    pub(super) arrived_bytes: u64,
}

impl SourceLane {
    pub(super) fn new(lane: LaneIndex, lanes: u16, packing: &Packing, ledger: Option<LaneLedger>) -> Self {
        let Packing { terms, level, pages, duplicates, versions_bytes_max } = packing;
        let mut encoder = Encoder::new(lane, lanes, terms, *pages);
        // Who wants pages as they are wants no work done on them either.
        if terms.compression != Compression::None {
            encoder = encoder.knowing(Arc::clone(duplicates), versions_bytes_max / usize::from(lanes.max(1)), terms);
        }
        if let (Compression::Zstd, Some(level)) = (terms.compression, level) {
            encoder.set_effort(Effort::Zstd(i32::from(*level)));
        }
        let adapts = terms.compression == Compression::Auto;
        Self {
            lane,
            lanes,
            encoder,
            adapts,
            adaptation: None,
            frames: 0,
            busy: Duration::ZERO,
            round: Round(0),
            before: 0,
            reached: Vec::new(),
            ledger,
        }
    }

    /// As an earlier process left it.
    pub(super) fn after_restart(lane: LaneIndex, lanes: u16, packing: &Packing, ledger: LaneLedger) -> std::io::Result<Self> {
        let (round, before, reached) = ledger.read()?.unwrap_or_default();
        Ok(Self { round, before, reached, ..Self::new(lane, lanes, packing, Some(ledger)) })
    }

    /// What of `round` did not arrive, by what the destination says that it has applied; nothing when it cannot be so.
    pub(super) fn outstanding(&self, round: Round, standing: LaneStanding) -> Option<Outstanding> {
        let nothing_sent = self.round != round;
        let sent = self.reached.last().map_or(0, |last| last.bytes);
        let before = self.reached.first().map_or(0, |first| first.frames.saturating_sub(1));
        if nothing_sent || (standing.round < round && standing.frames <= before) {
            let arrived_bytes = self.before;
            let lost_bytes = if nothing_sent { 0 } else { sent.saturating_sub(arrived_bytes) };
            return Some(Outstanding { from: Some(PageNumber(0)), lost_bytes, arrived_bytes });
        }
        let at = self.reached.iter().find(|reached| reached.frames == standing.frames && standing.round == round)?;
        Some(Outstanding { from: at.next, lost_bytes: sent - at.bytes, arrived_bytes: at.bytes })
    }

    /// Adds this lane's pages of `pages` from `from` on to `missing`.
    pub(super) fn add_missing(&self, pages: &PageSet, from: PageNumber, missing: &mut PageSet) {
        let mut at = from;
        while let Some((first, count)) = pages.next_run_of_lane(self.lane, self.lanes, at, u64::MAX) {
            at = PageNumber(first.0.saturating_add(count));
            for page in first.0..at.0 {
                missing.insert(PageNumber(page));
            }
        }
    }

    /// Pages by how they were sent, since the migration began.
    pub(super) fn counts(&self) -> PageCounts {
        self.encoder.counts()
    }

    /// The lane joins anew.
    pub(super) fn rejoin(&mut self) {
        self.encoder.rejoin();
        self.reached.clear();
        (self.round, self.before) = (Round(0), 0);
    }

    fn begin(&mut self, round: Round) {
        let totals = self.encoder.totals();
        (self.round, self.before) = (round, totals.bytes);
        self.reached.clear();
        self.write(|ledger| ledger.begin(round, totals.frames, totals.bytes));
    }

    fn make(&mut self, shared: &SendShared, order: &LaneRound, first: PageNumber) -> Result<Made, EngineError> {
        let (started, before) = (Instant::now(), (self.encoder.totals().pages, self.encoder.counts().packed()));
        let mut frame = shared.frames.take();
        let next = self.encoder.encode_frame(&shared.ram, order.round, &order.pages, first, &mut frame)?;
        if !frame.is_empty() {
            self.frame_made(next);
        }
        let (pages, packed) = (self.encoder.totals().pages - before.0, self.encoder.counts().packed() - before.1);
        let took = started.elapsed();
        self.busy += took;
        Ok(Made { frame, next, pages, content: packed * PAGE_BYTES as u64, took })
    }

    /// Learns from a frame that took so long, with the one before it to be sent beside. So long the lane's thread was `delayed`.
    fn adapt(&mut self, made: &Made, took: Duration, delayed: Duration, stats: &LinkStats, shared: &SendShared) {
        let Some(adaptation) = self.adaptation.as_mut().filter(|_| !made.frame.is_empty()) else { return };
        self.frames += 1;
        let (waiting, wire) = (took.saturating_sub(made.took), made.frame.len() as u64);
        let frame = FrameSent { packing: made.took, waiting, delayed, content: made.content, wire, ..FrameSent::default() };
        shared.meter.path().adapt(adaptation, frame, stats);
        if self.encoder.effort() == Effort::None && self.frames % PROBE_EVERY == 1 {
            let started = Instant::now();
            let (content, packed) = self.encoder.probe(&shared.ram);
            adaptation.probed(content, packed, started.elapsed());
        }
        self.encoder.set_effort(adaptation.effort());
    }

    fn frame_made(&mut self, next: Option<PageNumber>) {
        let (round, totals) = (self.round, self.encoder.totals());
        let reached = Reached { frames: totals.frames, bytes: totals.bytes, next };
        self.reached.push(reached);
        self.write(|ledger| ledger.note(round, reached));
    }

    /// What cannot be written is missed by a restart only, which then finds fewer frames than the destination has, and ends the
    /// attempt.
    fn write(&mut self, entry: impl FnOnce(&mut LaneLedger) -> std::io::Result<()>) {
        if let Some(Err(error)) = self.ledger.as_mut().map(entry) {
            tracing::warn!(lane = %self.lane, %error, "a restart of this gateway would end the migration");
            self.ledger = None;
        }
    }
}

/// Sends rounds until there are no more orders or something fails.
pub(super) async fn send_lane(mut io: LaneIo, shared: SendShared, lane: Arc<Mutex<SourceLane>>, mut rounds: mpsc::Receiver<LaneRound>) {
    let mut held = Some(lane.lock_owned().await);
    let mut run_delay = RunDelay::of_this_thread();
    while let Some(order) = next_order(&io, &shared, &mut rounds).await {
        let result = match (order, held.take()) {
            (Ok(order), Some(lane)) => send_round(&mut io, &shared, lane, &order, &mut run_delay).await,
            (Err(error), _) => Err(error),
            (Ok(_), None) => Err(EngineError::Bug("a lane goes on behind an error".into())),
        };
        let report = result.map(|(lane, report)| {
            held = Some(lane);
            report
        });
        if shared.reports.send(report).await.is_err() || held.is_none() {
            break;
        }
    }
    drop(held);
    // Of a link that was given up nobody hears; what its lanes carried is not complete. The peer may be gone already.
    if !shared.reports.is_closed() {
        let _ = io.sender.finish().await;
    }
}

/// A lane that waits hears of an outage too: what it sent last may not have arrived, and the session may outlive that. What
/// else ends a lane the session says better.
async fn next_order(io: &LaneIo, shared: &SendShared, rounds: &mut mpsc::Receiver<LaneRound>) -> Option<Result<LaneRound, EngineError>> {
    tokio::select! {
        order = rounds.recv() => order.map(Ok),
        source = io.sender.closed() => match source {
            source if source.is_outage() => Some(Err(EngineError::Transport { migration: shared.migration, source })),
            _ => rounds.recv().await.map(Ok),
        },
    }
}

/// A frame that was made and is to be sent.
struct Made {
    frame: Vec<u8>,
    /// Where the next one begins.
    next: Option<PageNumber>,
    pages: u64,
    /// Bytes of pages that went through the codec.
    content: u64,
    took: Duration,
}

type HeldLane = OwnedMutexGuard<SourceLane>;

async fn send_round(
    io: &mut LaneIo,
    shared: &SendShared,
    mut lane: HeldLane,
    order: &LaneRound,
    run_delay: &mut RunDelay,
) -> Result<(HeldLane, LaneReport), EngineError> {
    lane.begin(order.round);
    if lane.adapts {
        // What was learned of a link is good for the next round on it.
        let effort = lane.adaptation.get_or_insert_with(|| shared.meter.path().adaptation(&io.sender.stats())).effort();
        lane.encoder.set_effort(effort);
    }
    let mut from = Some(PageNumber(0));
    let mut ready = None;
    while from.is_some() || ready.is_some() {
        let since = Instant::now();
        let making = match from {
            // WHY: a codec takes milliseconds, and a path that hears nothing for so long slows down. What only copies is done
            // sooner than another thread begins.
            Some(first) if lane.encoder.effort() != Effort::None => {
                let (shared_too, order) = (shared.clone(), order.clone());
                let making = tokio::task::spawn_blocking(move || (lane.make(&shared_too, &order, first), lane));
                let (made, sent) = tokio::join!(making, send_frame(io, shared, ready.take()));
                let (made, held) = joined(made)?;
                lane = held;
                sent.and(made.map(Some))
            }
            Some(first) => send_frame(io, shared, ready.take()).await.and_then(|()| lane.make(shared, order, first).map(Some)),
            None => send_frame(io, shared, ready.take()).await.map(|()| None),
        };
        from = None;
        if let Some(made) = making? {
            from = made.next;
            let delayed = if lane.adapts { run_delay.since_asked() } else { Duration::ZERO };
            lane.adapt(&made, since.elapsed(), delayed, &io.sender.stats(), shared);
            ready = Some(made);
        }
    }
    let mut mark = Vec::new();
    lane.encoder.round_mark(order.round, &mut mark);
    lane.frame_made(None);
    io.sender.write(Bytes::from(mark)).await.map_err(|source| EngineError::Transport { migration: shared.migration, source })?;
    let report = LaneReport {
        lane: io.lane,
        round: order.round,
        totals: lane.encoder.totals(),
        counts: lane.encoder.counts(),
        wire_bytes: io.sender.stats().sent_bytes,
        table_bytes: lane.encoder.bytes(),
        busy: lane.busy,
    };
    Ok((lane, report))
}

async fn send_frame(io: &mut LaneIo, shared: &SendShared, made: Option<Made>) -> Result<(), EngineError> {
    let Some(Made { frame, pages, .. }) = made else { return Ok(()) };
    if frame.is_empty() {
        shared.frames.give_back(frame);
        return Ok(());
    }
    shared.limiter.acquire(frame.len()).await;
    shared.meter.frame(pages, frame.len() as u64);
    let written = io.sender.write(shared.frames.lend(frame)).await;
    written.map_err(|source| EngineError::Transport { migration: shared.migration, source })?;
    // Where there is room for the next frame at once, QUIC would not get to send this one.
    tokio::task::yield_now().await;
    Ok(())
}

/// WHY: a trial takes less time than a frame, and has to be rare where nothing comes of it.
pub(super) const PROBE_EVERY: u64 = 32;

/// The decoders of a migration, by lane. Whoever receives on a lane holds its decoder.
pub(super) type Decoders = Arc<[Mutex<Decoder>]>;

pub(super) fn decoders(lanes: u16, terms: &StreamTerms, pages: u64, kept_up: Option<&KeptUp>) -> Decoders {
    let decoder = |lane| Decoder::new(LaneIndex(lane), lanes, terms, pages).telling(kept_up.map(KeptUp::digests));
    (0..lanes).map(|lane| Mutex::new(decoder(lane))).collect()
}

/// The same for a twin that an earlier gateway has filled, up to these.
pub(super) fn decoders_after_restart(terms: &StreamTerms, pages: u64, standings: &[LaneStanding], kept_up: Option<&KeptUp>) -> Decoders {
    let lanes = u16::try_from(standings.len()).unwrap_or(limits::LANES_MAX);
    let standings = (0..lanes).map(LaneIndex).zip(standings);
    let decoder = |lane, round| Decoder::after_restart(lane, lanes, terms, pages, round).telling(kept_up.map(KeptUp::digests));
    standings.map(|(lane, standing)| Mutex::new(decoder(lane, standing.round))).collect()
}

/// What every destination lane of a migration shares while one session lasts.
#[derive(Debug, Clone)]
pub(super) struct ReceiveShared {
    pub(super) migration: MigrationId,
    pub(super) ram: Arc<GuestRam>,
    pub(super) decoders: Decoders,
    pub(super) progress: Option<Arc<Progress>>,
    pub(super) meter: Arc<Meter>,
    pub(super) seal: Arc<Seal>,
    pub(super) applied: Applied,
    pub(super) reports: mpsc::Sender<Result<LaneReport, EngineError>>,
}

/// How many frames each lane has applied since its join, for those that have to wait for it.
#[derive(Debug, Clone)]
pub(super) struct Applied(Arc<[watch::Sender<u64>]>);

impl Applied {
    pub(super) fn new(lanes: u16) -> Self {
        Self((0..lanes).map(|_| watch::Sender::new(0)).collect())
    }

    fn note(&self, lane: LaneIndex, frames: u64) {
        if let Some(applied) = self.0.get(usize::from(lane.0)) {
            applied.send_replace(frames);
        }
    }

    async fn wait(&self, after: After) -> Result<(), EngineError> {
        let unknown = || EngineError::OutOfPlace { expected: "a lane of the migration to wait for", got: format!("lane {}", after.lane) };
        let mut applied = self.0.get(usize::from(after.lane.0)).ok_or_else(unknown)?.subscribe();
        // The sender is held here, so there is no other end to it.
        let _ = applied.wait_for(|frames| *frames >= after.frames).await;
        Ok(())
    }
}

/// `INVARIANT(sealed-memory)`: once the last round is complete, no lane writes guest memory any more.
#[derive(Debug, Default)]
pub(super) struct Seal(RwLock<bool>);

impl Seal {
    /// Returns when every write that had begun has ended; none begins afterwards.
    pub(super) fn close(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn is_closed(&self) -> bool {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Applies frames on the thread that decrypted them until the source finishes or something fails.
pub(super) async fn receive_lane(mut io: LaneIo, shared: ReceiveShared) {
    let Some(decoder) = shared.decoders.get(usize::from(io.lane.0)) else { return };
    let mut decoder = decoder.lock().await;
    let mut body = BytesMut::zeroed(limits::FRAME_BODY_BYTES_MAX);
    let mut busy = Duration::ZERO;
    loop {
        match receive_frame(&mut io, &shared, &mut decoder, &mut body, &mut busy).await {
            Ok(None) => {}
            Ok(Some(report)) => {
                if shared.reports.send(Ok(report)).await.is_err() {
                    return;
                }
            }
            // After the last round a lane may end as it likes.
            Err(None) | Err(Some(EngineError::Transport { .. })) if shared.seal.is_closed() => return,
            Err(error) => {
                let error = error.unwrap_or_else(|| ended_early("a frame"));
                drop(decoder);
                // Nobody listens any more when the migration has ended for another reason.
                let _ = shared.reports.send(Err(error)).await;
                return;
            }
        }
    }
}

async fn receive_frame(
    io: &mut LaneIo,
    shared: &ReceiveShared,
    decoder: &mut Decoder,
    body: &mut BytesMut,
    busy: &mut Duration,
) -> Result<Option<LaneReport>, Option<EngineError>> {
    let transport = |source| Some(EngineError::Transport { migration: shared.migration, source });
    let lane = io.lane;
    let mut header = [0; FRAME_HEADER_BYTES];
    if !io.receiver.read_exact(&mut header).await.map_err(transport)? {
        return Err(None);
    }
    let header = FrameHeader::decode(&header).map_err(|error| Some(EngineError::Wire(error)))?;
    // The header's decoder bounds the length by the size of this buffer.
    let body = body.get_mut(..header.body_bytes).ok_or_else(|| Some(EngineError::Bug("frame body above its bound".into())))?;
    if !body.is_empty() && !io.receiver.read_exact(body).await.map_err(transport)? {
        return Err(Some(ended_early("the body of a frame")));
    }
    // SPEC: PROTOCOL.md#must-after
    for after in afters(&header, body) {
        if after.lane == lane && after.frames > header.sequence {
            let expected = "an earlier frame of the same lane to wait for";
            return Err(Some(EngineError::OutOfPlace { expected, got: format!("frame {} of {}", after.frames, header.sequence) }));
        }
        tokio::select! {
            waited = shared.applied.wait(after) => waited.map_err(Some)?,
            source = io.sender.closed() => return Err(transport(source)),
        }
    }
    let closed = shared.seal.0.read().unwrap_or_else(PoisonError::into_inner);
    if *closed {
        return Err(Some(EngineError::OutOfPlace { expected: "nothing behind the last round", got: "a frame".into() }));
    }
    let began = Instant::now();
    let ended = decoder.apply(&header, body, &shared.ram).map_err(|source| Some(EngineError::Frame { lane, source }))?;
    *busy += began.elapsed();
    drop(closed);
    shared.applied.note(lane, decoder.standing().frames);
    if let Some(Err(error)) = shared.progress.as_ref().map(|progress| progress.note(lane, decoder.standing())) {
        // What is not noted would come again after a restart; after a lane that goes on it would not.
        return Err(Some(EngineError::Progress { migration: shared.migration, source: error }));
    }
    shared.meter.frame(0, header.body_bytes as u64);
    crate::failpoint::hit!("destination.frame-applied");
    Ok(ended.map(|round| LaneReport {
        lane,
        round,
        totals: decoder.totals(),
        counts: decoder.counts(),
        wire_bytes: 0,
        table_bytes: 0,
        busy: *busy,
    }))
}

fn ended_early(expected: &'static str) -> EngineError {
    EngineError::OutOfPlace { expected, got: "the end of the lane".into() }
}
