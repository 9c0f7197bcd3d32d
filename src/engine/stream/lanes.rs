//! The pumps of a stream: one task a lane on the lane's own thread, at each end. Any lane carries any piece.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::inflow::Inflow;
use super::kept::Piece;
use super::outflow::Outflow;
use crate::engine::disks::{Change, DiskIn, DiskOut};
use crate::engine::frames::Frames;
use crate::engine::handoff::joined;
use crate::engine::lanes::PROBE_EVERY;
use crate::engine::limiter::Limiter;
use crate::engine::meter::Meter;
use crate::engine::processors::RunDelay;
use crate::engine::{CommonPath, EngineError};
use crate::limits;
use crate::memory::{Adaptation, ChunkPacker, ChunkUnpacker, Effort, FrameSent};
use crate::transport::{LaneIo, LinkStats};
use crate::types::{LaneIndex, MigrationId};
use crate::wire::{Codec, Compression, CompressionScope, DiskChunk, FRAME_HEADER_BYTES, FrameHeader, FrameKind, StreamChunk, StreamTerms};

/// What every lane of a source shares while one session lasts.
#[derive(Debug, Clone)]
pub(super) struct SendShared {
    pub(super) migration: MigrationId,
    pub(super) flow: Arc<Outflow>,
    pub(super) disks: Option<Arc<DiskOut>>,
    pub(super) terms: StreamTerms,
    pub(super) level: Option<u8>,
    /// About as much as one lane carries.
    pub(super) lane_bytes: u64,
    pub(super) limiter: Arc<Limiter>,
    pub(super) meter: Arc<Meter>,
    pub(super) frames: Frames,
    pub(super) failures: mpsc::Sender<EngineError>,
}

/// Sends pieces until something fails. Whoever drops it has what was not applied.
pub(super) async fn send_lane(mut io: LaneIo, shared: SendShared) {
    let source = match send_pieces(&mut io, &shared).await {
        Ok(never) => match never {},
        Err(error) => error,
    };
    // Of a link that was given up nobody hears.
    let _ = shared.failures.send(source).await;
}

/// What a lane carries next.
enum Work {
    Piece(Piece),
    /// A change of a disk, its number, and what is settled.
    Change(u64, u64, Change),
}

async fn next_work(shared: &SendShared) -> Work {
    tokio::select! {
        piece = shared.flow.next() => Work::Piece(piece),
        (number, settled, change) = next_change(shared.disks.as_deref()) => Work::Change(number, settled, change),
    }
}

/// A lane that packs one piece while it sends the one before.
struct Sending {
    packer: ChunkPacker,
    /// Changes of disks are packed each by itself: there are none of them in most streams.
    changes: Option<ChunkPacker>,
    /// Where it finds out by itself how hard to try.
    adaptation: Option<Adaptation>,
    sequence: u64,
}

/// A frame that was made and is to be sent.
struct Made {
    frame: Vec<u8>,
    /// What follows it, as it is.
    rest: Bytes,
    /// Pages that a codec made smaller.
    packed: u64,
    /// Bytes of the piece.
    content: u64,
    took: Duration,
    /// What a fast codec would leave of the piece, and how long it took to find out.
    probe: Option<(usize, Duration)>,
}

impl Made {
    fn wire_bytes(&self) -> usize {
        self.frame.len() + self.rest.len()
    }
}

impl Sending {
    fn make(&mut self, work: &Work, lane: LaneIndex, frame: Vec<u8>) -> Made {
        match work {
            Work::Piece(piece) => self.make_piece(piece, lane, frame),
            Work::Change(number, settled, change) => self.make_change((*number, *settled), change, lane, frame),
        }
    }

    fn make_change(&mut self, (number, settled): (u64, u64), change: &Change, lane: LaneIndex, mut frame: Vec<u8>) -> Made {
        let (began, data) = (Instant::now(), &change.data);
        let (codec, block) = match &mut self.changes {
            Some(packer) if !data.is_empty() => {
                packer.set_effort(self.packer.effort());
                packer.pack(data)
            }
            _ => (None, data.as_ref()),
        };
        let Change { disk, change, offset, bytes, .. } = *change;
        DiskChunk { disk, change, number, settled, offset, bytes, codec, block }.put(&mut frame, lane, self.sequence);
        self.sequence += 1;
        Made { frame, rest: Bytes::new(), packed: 0, content: data.len() as u64, took: began.elapsed(), probe: None }
    }

    fn make_piece(&mut self, piece: &Piece, lane: LaneIndex, mut frame: Vec<u8>) -> Made {
        let began = Instant::now();
        let (codec, block) = self.packer.pack(&piece.bytes);
        let packed = if codec.is_some() { piece.pages } else { 0 };
        let chunk = StreamChunk { offset: piece.offset, bytes: piece.bytes.len(), codec, block };
        let rest = if codec.is_some() {
            chunk.put(&mut frame, lane, self.sequence);
            Bytes::new()
        } else {
            chunk.put_head(&mut frame, lane, self.sequence);
            piece.bytes.clone()
        };
        let took = began.elapsed();
        self.sequence += 1;
        let probes = self.adaptation.is_some() && self.packer.effort() == Effort::None && self.sequence % PROBE_EVERY == 1;
        let probe = probes.then(|| {
            let began = Instant::now();
            (self.packer.probe(&piece.bytes), began.elapsed())
        });
        Made { frame, rest, packed, content: piece.bytes.len() as u64, took, probe }
    }

    /// Learns from a frame, beside which the one before it was sent in `sent`; the lane's thread was `delayed`.
    fn adapt(&mut self, made: &Made, sent: Duration, delayed: Duration, stats: &LinkStats, path: &CommonPath) {
        let Some(adaptation) = self.adaptation.as_mut().filter(|_| made.content > 0) else { return };
        let (waiting, wire) = (sent.saturating_sub(made.took), made.wire_bytes() as u64);
        let frame = FrameSent { packing: made.took, waiting, delayed, content: made.content, wire, ..FrameSent::default() };
        path.adapt(adaptation, frame, stats);
        if let Some((packed, took)) = made.probe {
            adaptation.probed(usize::try_from(made.content).unwrap_or(0), packed, took);
        }
        self.packer.set_effort(adaptation.effort());
    }
}

async fn send_pieces(io: &mut LaneIo, shared: &SendShared) -> Result<std::convert::Infallible, EngineError> {
    let adapts = shared.terms.compression == Compression::Auto && shared.terms.compression_scope != CompressionScope::Page;
    let mut lane = Box::new(Sending {
        packer: ChunkPacker::new(&shared.terms, shared.level, shared.lane_bytes),
        changes: shared.disks.is_some().then(|| ChunkPacker::new(&by_itself(&shared.terms), shared.level, shared.lane_bytes)),
        adaptation: adapts.then(|| shared.meter.path().adaptation(&io.sender.stats())),
        sequence: 0,
    });
    if let Some(adaptation) = &lane.adaptation {
        lane.packer.set_effort(adaptation.effort());
    }
    let (index, mut ready, mut run_delay) = (io.lane, None::<Made>, RunDelay::of_this_thread());
    loop {
        let making = async {
            let work = next_work(shared).await;
            let frame = shared.frames.take();
            // WHY: a codec takes milliseconds, and a path that hears nothing for so long slows down. What only copies is done
            // sooner than another thread begins.
            if lane.packer.effort() == Effort::None {
                return Ok((lane.make(&work, index, frame), lane));
            }
            joined(tokio::task::spawn_blocking(move || (lane.make(&work, index, frame), lane)).await)
        };
        let (made, sent) = match ready.take() {
            Some(ready) => tokio::try_join!(making, send_frame(io, shared, ready))?,
            None => tokio::select! {
                made = making => (made?, Duration::ZERO),
                source = io.sender.closed() => return Err(EngineError::Transport { migration: shared.migration, source }),
            },
        };
        let (made, held) = made;
        lane = held;
        lane.adapt(&made, sent, run_delay.since_asked(), &io.sender.stats(), shared.meter.path());
        ready = Some(made);
    }
}

/// How long it took.
async fn send_frame(io: &mut LaneIo, shared: &SendShared, made: Made) -> Result<Duration, EngineError> {
    let (began, bytes) = (Instant::now(), made.wire_bytes());
    shared.limiter.acquire(bytes).await;
    shared.meter.frame(made.packed, bytes as u64);
    let written = io.sender.write_chunks(&mut [shared.frames.lend(made.frame), made.rest]).await;
    written.map_err(|source| EngineError::Transport { migration: shared.migration, source })?;
    // Where there is room for the next frame at once, QUIC would not get to send this one.
    tokio::task::yield_now().await;
    Ok(began.elapsed())
}

/// The same, where nothing is looked back to.
fn by_itself(terms: &StreamTerms) -> StreamTerms {
    let scope = if terms.compression_scope == CompressionScope::Page { CompressionScope::Page } else { CompressionScope::Batch };
    StreamTerms { compression_scope: scope, ..terms.clone() }
}

async fn next_change(disks: Option<&DiskOut>) -> (u64, u64, Change) {
    match disks {
        Some(disks) => disks.next().await,
        None => std::future::pending().await,
    }
}

/// What every lane of a destination shares while one session lasts.
#[derive(Debug, Clone)]
pub(super) struct ReceiveShared {
    pub(super) migration: MigrationId,
    pub(super) flow: Arc<Inflow>,
    pub(super) disks: Option<Arc<DiskIn>>,
    pub(super) meter: Arc<Meter>,
    pub(super) failures: mpsc::Sender<EngineError>,
}

/// What a lane keeps from one frame to the next.
#[derive(Default)]
struct Receiving {
    /// Of pieces, and of changes.
    unpackers: [ChunkUnpacker; 2],
    sequence: u64,
    frames: Frames,
}

/// Takes pieces until the lane ends.
pub(super) async fn receive_lane(mut io: LaneIo, shared: ReceiveShared) {
    let mut lane = Receiving::default();
    loop {
        match receive_piece(&mut io, &shared, &mut lane).await {
            Ok(true) => lane.sequence += 1,
            Ok(false) => return,
            Err(error) => {
                let _ = shared.failures.send(error).await;
                return;
            }
        }
    }
}

async fn receive_piece(io: &mut LaneIo, shared: &ReceiveShared, lane: &mut Receiving) -> Result<bool, EngineError> {
    let transport = |source| EngineError::Transport { migration: shared.migration, source };
    let mut header = [0; FRAME_HEADER_BYTES];
    if !io.receiver.read_exact(&mut header).await.map_err(transport)? {
        return Ok(false);
    }
    let header = FrameHeader::decode(&header).map_err(EngineError::Wire)?;
    if !matches!(header.kind, FrameKind::Stream | FrameKind::Disk) || header.lane != io.lane || header.sequence != lane.sequence {
        let got = format!("{:?} {} of lane {}", header.kind, header.sequence, header.lane);
        return Err(out_of_place("the next piece of a stream or change of a disk on this lane", got));
    }
    // The header's decoder has bounded the length.
    let mut body = lane.frames.take_filled(header.body_bytes);
    if !io.receiver.read_exact(&mut body).await.map_err(transport)? {
        return Err(out_of_place("the body of a frame", "the end of the lane".into()));
    }
    let body = lane.frames.lend(body);
    if header.kind == FrameKind::Disk {
        let chunk = DiskChunk::decode(&body).map_err(EngineError::Wire)?;
        let disks = shared.disks.as_deref().ok_or_else(|| out_of_place("a piece of a stream", "a change of a disk".into()))?;
        let written = if chunk.block.is_empty() { 0 } else { usize::try_from(chunk.bytes).unwrap_or(0) };
        disks.take_in(&chunk, lane.expand(1, &body, chunk.codec, chunk.block, written)?)?;
    } else {
        let chunk = StreamChunk::decode(&body).map_err(EngineError::Wire)?;
        shared.flow.take_in(chunk.offset, lane.expand(0, &body, chunk.codec, chunk.block, chunk.bytes)?)?;
    }
    shared.meter.frame(0, header.body_bytes as u64);
    Ok(true)
}

/// WHY: a piece keeps the buffer that it lies in, and a window has room for many small ones.
const KEEPS_BUFFER_BYTES: usize = limits::STREAM_CHUNK_BYTES_MAX / 4 * 3;

impl Receiving {
    /// The `bytes` bytes that the block of a frame's body stands for.
    fn expand(&mut self, which: usize, body: &Bytes, codec: Option<Codec>, block: &[u8], bytes: usize) -> Result<Bytes, EngineError> {
        // SPEC: PROTOCOL.md#must-exact-piece
        let refused = || out_of_place("a piece of the length that it says", format!("a block of {} bytes", block.len()));
        let Some(codec) = codec else {
            return match block.len() {
                length if length != bytes => Err(refused()),
                length if length < KEEPS_BUFFER_BYTES => Ok(Bytes::copy_from_slice(block)),
                _ => Ok(body.slice_ref(block)),
            };
        };
        let keeps = bytes >= KEEPS_BUFFER_BYTES;
        let mut piece = if keeps { self.frames.take_filled(bytes) } else { vec![0; bytes] };
        let fits = self.unpackers.get_mut(which).is_some_and(|unpacker| unpacker.unpack(codec, block, &mut piece));
        fits.then(|| if keeps { self.frames.lend(piece) } else { piece.into() }).ok_or_else(refused)
    }
}

fn out_of_place(expected: &'static str, got: String) -> EngineError {
    EngineError::OutOfPlace { expected, got }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_keeps_the_buffer_that_it_fills_and_no_other() {
        let mut lane = Receiving::default();
        for (bytes, kept) in [(10, false), (KEEPS_BUFFER_BYTES, true)] {
            let body = Bytes::from(vec![7; bytes + 13]);
            let block = &body[13..];
            let piece = lane.expand(0, &body, None, block, bytes).unwrap();
            assert_eq!((&piece[..], piece.as_ptr() == block.as_ptr()), (block, kept));
            assert!(lane.expand(0, &body, None, block, bytes - 1).is_err());
            assert!(lane.expand(0, &body, Some(Codec::Zstd), block, bytes).is_err());
        }
    }
}
