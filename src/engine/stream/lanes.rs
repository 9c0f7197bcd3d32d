//! The pumps of a stream: one task a lane on the lane's own thread, at each end. Any lane carries any piece.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::inflow::Inflow;
use super::outflow::{Outflow, Piece};
use crate::engine::EngineError;
use crate::engine::frames::Frames;
use crate::engine::handoff::joined;
use crate::engine::limiter::Limiter;
use crate::engine::meter::Meter;
use crate::limits;
use crate::memory::{Adaptation, ChunkPacker, ChunkUnpacker, Effort};
use crate::transport::LaneIo;
use crate::types::{LaneIndex, MigrationId};
use crate::wire::{Compression, CompressionScope, FRAME_HEADER_BYTES, FrameHeader, FrameKind, StreamChunk, StreamTerms};

/// What every lane of a source shares while one session lasts.
#[derive(Debug, Clone)]
pub(super) struct SendShared {
    pub(super) migration: MigrationId,
    pub(super) flow: Arc<Outflow>,
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

/// A lane that packs one piece while it sends the one before.
struct Sending {
    packer: ChunkPacker,
    /// Where it finds out by itself how hard to try.
    adaptation: Option<Adaptation>,
    sequence: u64,
}

/// A frame that was made and is to be sent.
struct Made {
    frame: Vec<u8>,
    /// Pages that a codec made smaller.
    packed: u64,
    /// Bytes of the piece.
    content: u64,
    took: Duration,
    /// What a fast codec would leave of the piece, and how long it took to find out.
    probe: Option<(usize, Duration)>,
}

impl Sending {
    fn make(&mut self, piece: &Piece, lane: LaneIndex, mut frame: Vec<u8>) -> Made {
        let began = Instant::now();
        let (codec, block) = self.packer.pack(&piece.bytes);
        let packed = if codec.is_some() { piece.pages } else { 0 };
        StreamChunk { offset: piece.offset, bytes: piece.bytes.len(), codec, block }.put(&mut frame, lane, self.sequence);
        let took = began.elapsed();
        self.sequence += 1;
        let probes = self.adaptation.is_some() && self.packer.effort() == Effort::None && self.sequence % PROBE_EVERY == 1;
        let probe = probes.then(|| {
            let began = Instant::now();
            (self.packer.probe(&piece.bytes), began.elapsed())
        });
        Made { frame, packed, content: piece.bytes.len() as u64, took, probe }
    }

    /// Learns from a frame, beside which the one before it was sent in `sent`; `path` is what the path takes in a second.
    fn adapt(&mut self, made: &Made, sent: Duration, path: u64) {
        let Some(adaptation) = &mut self.adaptation else { return };
        adaptation.sent(made.took, sent.saturating_sub(made.took), made.content, made.frame.len() as u64, path);
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
        adaptation: adapts.then(|| Adaptation::new(io.sender.stats().rtt)),
        sequence: 0,
    });
    if let Some(adaptation) = &lane.adaptation {
        lane.packer.set_effort(adaptation.effort());
    }
    let (index, mut ready) = (io.lane, None);
    loop {
        let making = async {
            let piece = shared.flow.next().await;
            let frame = shared.frames.take();
            // WHY: a codec takes milliseconds, and a path that hears nothing for so long slows down. What only copies is done
            // sooner than another thread begins.
            if lane.packer.effort() == Effort::None {
                return Ok((lane.make(&piece, index, frame), lane));
            }
            joined(tokio::task::spawn_blocking(move || (lane.make(&piece, index, frame), lane)).await)
        };
        let (made, sent) = match ready.take() {
            Some((frame, packed)) => tokio::try_join!(making, send_frame(io, shared, frame, packed))?,
            None => tokio::select! {
                made = making => (made?, Duration::ZERO),
                source = io.sender.closed() => return Err(EngineError::Transport { migration: shared.migration, source }),
            },
        };
        let (made, held) = made;
        lane = held;
        lane.adapt(&made, sent, io.sender.path_rate());
        ready = Some((made.frame, made.packed));
    }
}

/// How long it took.
async fn send_frame(io: &mut LaneIo, shared: &SendShared, frame: Vec<u8>, packed: u64) -> Result<Duration, EngineError> {
    let began = Instant::now();
    shared.limiter.acquire(frame.len()).await;
    shared.meter.frame(packed, frame.len() as u64);
    let written = io.sender.write(shared.frames.lend(frame)).await;
    written.map_err(|source| EngineError::Transport { migration: shared.migration, source })?;
    // Where there is room for the next frame at once, QUIC would not get to send this one.
    tokio::task::yield_now().await;
    Ok(began.elapsed())
}

/// WHY: a trial takes less time than a frame, and has to be rare where nothing comes of it.
const PROBE_EVERY: u64 = 32;

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
