//! The pumps of a stream: one task a lane on the lane's own thread, at each end. Any lane carries any piece.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::inflow::Inflow;
use super::outflow::Outflow;
use crate::engine::EngineError;
use crate::engine::frames::Frames;
use crate::engine::limiter::Limiter;
use crate::engine::meter::Meter;
use crate::limits;
use crate::memory::{ChunkPacker, ChunkUnpacker};
use crate::transport::LaneIo;
use crate::types::MigrationId;
use crate::wire::{FRAME_HEADER_BYTES, FrameHeader, FrameKind, StreamChunk, StreamTerms};

/// What every lane of a source shares while one session lasts.
#[derive(Debug, Clone)]
pub(super) struct SendShared {
    pub(super) migration: MigrationId,
    pub(super) flow: Arc<Outflow>,
    pub(super) terms: StreamTerms,
    pub(super) level: Option<u8>,
    pub(super) limiter: Arc<Limiter>,
    pub(super) meter: Arc<Meter>,
    pub(super) frames: Frames,
    pub(super) failures: mpsc::Sender<EngineError>,
}

/// Sends pieces until something fails. Whoever drops it has what was not applied.
pub(super) async fn send_lane(mut io: LaneIo, shared: SendShared) {
    let mut packer = ChunkPacker::new(&shared.terms, shared.level);
    let mut sequence = 0;
    let source = loop {
        let piece = tokio::select! {
            piece = shared.flow.next() => piece,
            source = io.sender.closed() => break source,
        };
        let mut frame = shared.frames.take();
        let (codec, block) = packer.pack(&piece.bytes);
        StreamChunk { offset: piece.offset, bytes: piece.bytes.len(), codec, block }.put(&mut frame, io.lane, sequence);
        sequence += 1;
        shared.limiter.acquire(frame.len()).await;
        shared.meter.frame(0, frame.len() as u64);
        if let Err(source) = io.sender.write(shared.frames.lend(frame)).await {
            break source;
        }
        // Where there is room for the next frame at once, QUIC would not get to send this one.
        tokio::task::yield_now().await;
    };
    // Of a link that was given up nobody hears.
    let _ = shared.failures.send(EngineError::Transport { migration: shared.migration, source }).await;
}

/// What every lane of a destination shares while one session lasts.
#[derive(Debug, Clone)]
pub(super) struct ReceiveShared {
    pub(super) migration: MigrationId,
    pub(super) flow: Arc<Inflow>,
    pub(super) meter: Arc<Meter>,
    pub(super) failures: mpsc::Sender<EngineError>,
}

/// Takes pieces until the lane ends.
pub(super) async fn receive_lane(mut io: LaneIo, shared: ReceiveShared) {
    let mut body = BytesMut::zeroed(limits::FRAME_BODY_BYTES_MAX);
    let mut unpacker = ChunkUnpacker::default();
    let mut sequence = 0;
    loop {
        match receive_piece(&mut io, &shared, &mut unpacker, sequence, &mut body).await {
            Ok(true) => sequence += 1,
            Ok(false) => return,
            Err(error) => {
                let _ = shared.failures.send(error).await;
                return;
            }
        }
    }
}

async fn receive_piece(
    io: &mut LaneIo,
    shared: &ReceiveShared,
    unpacker: &mut ChunkUnpacker,
    sequence: u64,
    body: &mut BytesMut,
) -> Result<bool, EngineError> {
    let transport = |source| EngineError::Transport { migration: shared.migration, source };
    let out_of_place = |expected, got: String| EngineError::OutOfPlace { expected, got };
    let mut header = [0; FRAME_HEADER_BYTES];
    if !io.receiver.read_exact(&mut header).await.map_err(transport)? {
        return Ok(false);
    }
    let header = FrameHeader::decode(&header).map_err(EngineError::Wire)?;
    if header.kind != FrameKind::Stream || header.lane != io.lane || header.sequence != sequence {
        let got = format!("{:?} {} of lane {}", header.kind, header.sequence, header.lane);
        return Err(out_of_place("the next piece of a stream on this lane", got));
    }
    // The header's decoder bounds the length by the size of this buffer.
    let body = body.get_mut(..header.body_bytes).ok_or_else(|| EngineError::Bug("frame body above its bound".into()))?;
    if !io.receiver.read_exact(body).await.map_err(transport)? {
        return Err(out_of_place("the body of a frame", "the end of the lane".into()));
    }
    let chunk = StreamChunk::decode(body).map_err(EngineError::Wire)?;
    let mut piece = vec![0; chunk.bytes];
    // SPEC: PROTOCOL.md#must-exact-piece
    if !unpacker.unpack(chunk.codec, chunk.block, &mut piece) {
        return Err(out_of_place("a piece of the length that it says", format!("a block of {} bytes", chunk.block.len())));
    }
    shared.flow.take_in(chunk.offset, Bytes::from(piece))?;
    shared.meter.frame(0, header.body_bytes as u64);
    Ok(true)
}
