//! The page pumps: one task a lane on the lane's own thread, at each end.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use crate::engine::EngineError;
use crate::engine::limiter::Limiter;
use crate::engine::meter::Meter;
use crate::limits;
use crate::memory::{Decoder, Encoder, GuestRam, PageCounts, PageSet};
use crate::transport::LaneIo;
use crate::types::{LaneIndex, MigrationId, PageNumber, Round};
use crate::wire::{FRAME_HEADER_BYTES, FrameHeader, LaneTotals, StreamTerms};

/// What a source lane is told.
#[derive(Debug)]
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
    /// Since the lane's first frame.
    pub(super) totals: LaneTotals,
    /// Since the lane's first frame.
    pub(super) counts: PageCounts,
    /// UDP payload that the lane's connection has sent so far.
    pub(super) wire_bytes: u64,
}

/// What every source lane of a migration shares.
#[derive(Debug, Clone)]
pub(super) struct SendShared {
    pub(super) migration: MigrationId,
    pub(super) ram: Arc<GuestRam>,
    pub(super) lanes: u16,
    pub(super) terms: StreamTerms,
    pub(super) limiter: Arc<Limiter>,
    pub(super) meter: Arc<Meter>,
    pub(super) reports: mpsc::Sender<Result<LaneReport, EngineError>>,
}

/// Sends rounds until there are no more orders or something fails.
pub(super) async fn send_lane(mut io: LaneIo, shared: SendShared, mut rounds: mpsc::Receiver<LaneRound>) {
    let mut encoder = Encoder::new(io.lane, shared.lanes, &shared.terms);
    while let Some(order) = rounds.recv().await {
        let result = send_round(&mut io, &shared, &mut encoder, &order).await;
        let failed = result.is_err();
        if shared.reports.send(result).await.is_err() || failed {
            break;
        }
    }
    // The peer may be gone already.
    let _ = io.sender.finish().await;
}

async fn send_round(io: &mut LaneIo, shared: &SendShared, encoder: &mut Encoder, order: &LaneRound) -> Result<LaneReport, EngineError> {
    let transport = |source| EngineError::Transport { migration: shared.migration, source };
    let mut from = Some(PageNumber(0));
    while let Some(first) = from {
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + limits::FRAME_BODY_BYTES_MAX);
        let pages_before = encoder.totals().pages;
        from = encoder.encode_frame(&shared.ram, order.round, &order.pages, first, &mut frame)?;
        if frame.is_empty() {
            continue;
        }
        shared.limiter.acquire(frame.len()).await;
        shared.meter.frame(encoder.totals().pages - pages_before, frame.len() as u64);
        io.sender.write(Bytes::from(frame)).await.map_err(transport)?;
    }
    let mut mark = Vec::new();
    encoder.round_mark(order.round, &mut mark);
    io.sender.write(Bytes::from(mark)).await.map_err(transport)?;
    Ok(LaneReport {
        lane: io.lane,
        round: order.round,
        totals: encoder.totals(),
        counts: encoder.counts(),
        wire_bytes: io.sender.stats().sent_bytes,
    })
}

/// What every destination lane of a migration shares.
#[derive(Debug, Clone)]
pub(super) struct ReceiveShared {
    pub(super) migration: MigrationId,
    pub(super) ram: Arc<GuestRam>,
    pub(super) lanes: u16,
    pub(super) meter: Arc<Meter>,
    pub(super) seal: Arc<Seal>,
    pub(super) reports: mpsc::Sender<Result<LaneReport, EngineError>>,
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
    let mut decoder = Decoder::new(io.lane, shared.lanes, shared.ram.pages());
    let mut body = BytesMut::zeroed(limits::FRAME_BODY_BYTES_MAX);
    loop {
        match receive_frame(&mut io, &shared, &mut decoder, &mut body).await {
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
    let closed = shared.seal.0.read().unwrap_or_else(PoisonError::into_inner);
    if *closed {
        return Err(Some(EngineError::OutOfPlace { expected: "nothing behind the last round", got: "a frame".into() }));
    }
    let ended = decoder.apply(&header, body, &shared.ram).map_err(|source| Some(EngineError::Frame { lane, source }))?;
    drop(closed);
    shared.meter.frame(0, header.body_bytes as u64);
    Ok(ended.map(|round| LaneReport { lane, round, totals: decoder.totals(), counts: decoder.counts(), wire_bytes: 0 }))
}

fn ended_early(expected: &'static str) -> EngineError {
    EngineError::OutOfPlace { expected, got: "the end of the lane".into() }
}
