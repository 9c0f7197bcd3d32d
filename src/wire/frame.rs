//! Frames of a lane: a fixed header, then a body that the header bounds.

use crate::limits;
use crate::types::{LaneIndex, Round};
use crate::wire::disk::DISK_HEAD_BYTES;
use crate::wire::reader::{Reader, Writer};
use crate::wire::{Codec, LaneTotals, WireError};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 24;

/// Bytes of the body of a round mark.
pub(super) const ROUND_MARK_BYTES: usize = 40;

/// Bytes in front of a piece of a stream: codec, offset, length.
const STREAM_HEAD_BYTES: usize = 13;

/// The longest piece, in a Zstandard stream that does not make it smaller.
const STREAM_BODY_BYTES_MAX: usize = STREAM_HEAD_BYTES + limits::STREAM_CHUNK_BYTES_MAX + limits::STREAM_OVERHEAD_BYTES_MAX;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// Page records.
    Pages,
    /// The end of a round on this lane, with the lane's totals up to the frame before this one.
    RoundMark,
    /// A piece of a hypervisor's stream.
    Stream,
    /// A change to a disk.
    Disk,
}

impl FrameKind {
    fn number(self) -> u8 {
        match self {
            Self::Pages => 1,
            Self::RoundMark => 2,
            Self::Stream => 3,
            Self::Disk => 4,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Pages, Self::RoundMark, Self::Stream, Self::Disk].into_iter().find(|kind| kind.number() == number)
    }
}

/// What stands in front of a frame's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the body is.
    pub kind: FrameKind,
    /// The lane that carries it.
    pub lane: LaneIndex,
    /// The round that it belongs to.
    pub round: Round,
    /// Its place on the lane, counted from 0 since the join.
    pub sequence: u64,
    /// Records in the body; none in a round mark.
    pub records: u32,
    /// Bytes of the body, at most `FRAME_BODY_BYTES_MAX`.
    pub body_bytes: usize,
}

impl FrameHeader {
    /// The bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES);
        bytes.put_u8(self.kind.number());
        bytes.put_u8(0);
        bytes.put_u16(self.lane.0);
        bytes.put_u32(self.round.0);
        bytes.put_u64(self.sequence);
        bytes.put_u32(self.records);
        bytes.put_length(self.body_bytes);
        let mut out = [0; FRAME_HEADER_BYTES];
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = from;
        }
        out
    }

    /// The header in the bytes in front of a body. Every bound that does not depend on the
    /// migration is checked here, before a byte of the body is read.
    ///
    /// # Errors
    /// The kind is unknown, or a number is out of bounds for its kind.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader::new("frame", bytes);
        let number = reader.u8("kind")?;
        let kind =
            reader.known("kind", "1 (pages), 2 (round mark), 3 (stream) or 4 (disk)", u64::from(number), FrameKind::from_number(number))?;
        let reserved = reader.u8("reserved byte")?;
        reader.bounded("reserved byte", reserved, 0, 0)?;
        let lane = reader.u16("lane")?;
        let lane = LaneIndex(reader.bounded("lane", lane, 0, u64::from(limits::LANES_MAX) - 1)?);
        let round = reader.u32("round")?;
        let round = Round(reader.bounded("round", round, 1, u64::from(u32::MAX))?);
        let sequence = reader.u64("sequence")?;
        let (records_min, records_max, body_min, body_max) = match kind {
            FrameKind::Pages => (1, limits::FRAME_PAGES_MAX, 1, limits::FRAME_BODY_BYTES_MAX),
            FrameKind::RoundMark => (0, 0, ROUND_MARK_BYTES, ROUND_MARK_BYTES),
            FrameKind::Stream => (1, 1, STREAM_HEAD_BYTES + 1, STREAM_BODY_BYTES_MAX),
            FrameKind::Disk => (1, 1, DISK_HEAD_BYTES, DISK_HEAD_BYTES + limits::STREAM_CHUNK_BYTES_MAX),
        };
        let records = reader.u32("records")?;
        let records = reader.bounded("records", records, records_min, records_max)?;
        let body_bytes = reader.length("body length", body_min, body_max)?;
        reader.finish()?;
        Ok(Self { kind, lane, round, sequence, records, body_bytes })
    }
}

/// Appends the frame that ends a round on a lane. `totals` count every frame before this one.
pub fn put_round_mark(out: &mut Vec<u8>, lane: LaneIndex, round: Round, sequence: u64, totals: &LaneTotals) {
    let header = FrameHeader { kind: FrameKind::RoundMark, lane, round, sequence, records: 0, body_bytes: ROUND_MARK_BYTES };
    out.put(&header.encode());
    out.put_totals(totals);
}

/// The totals in the body of a round mark.
///
/// # Errors
/// The body has another length.
pub fn decode_round_mark(body: &[u8]) -> Result<LaneTotals, WireError> {
    let mut reader = Reader::new("round mark", body);
    let totals = reader.totals()?;
    reader.finish()?;
    Ok(totals)
}

/// A piece of a hypervisor's stream, as it stands in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamChunk<'a> {
    /// Where in the stream it begins.
    pub offset: u64,
    /// Bytes of the stream that it is.
    pub bytes: usize,
    /// How they are packed; nothing when they are as they were.
    pub codec: Option<Codec>,
    /// The bytes, packed or not.
    pub block: &'a [u8],
}

impl<'a> StreamChunk<'a> {
    /// Appends the whole frame.
    pub fn put(&self, out: &mut Vec<u8>, lane: LaneIndex, sequence: u64) {
        self.put_head(out, lane, sequence);
        out.put(self.block);
    }

    /// Appends what is in front of the block.
    pub fn put_head(&self, out: &mut Vec<u8>, lane: LaneIndex, sequence: u64) {
        let body_bytes = STREAM_HEAD_BYTES + self.block.len();
        let header = FrameHeader { kind: FrameKind::Stream, lane, round: Round(1), sequence, records: 1, body_bytes };
        out.put(&header.encode());
        out.put_u8(match self.codec {
            None => 0,
            Some(codec) => codec.number(),
        });
        out.put_u64(self.offset);
        out.put_length(self.bytes);
    }

    /// The piece in the body of a frame. Its end is a number that exists, and its length at most
    /// [`limits::STREAM_CHUNK_BYTES_MAX`].
    ///
    /// # Errors
    /// A number is out of bounds.
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new("stream frame", body);
        let codec = match reader.u8("codec")? {
            0 => None,
            number => {
                Some(reader.known("codec", "0 (none) to 4 (start of a zstd stream)", u64::from(number), Codec::from_number(number))?)
            }
        };
        let offset = reader.u64("offset")?;
        let offset = reader.bounded("offset", offset, 0, u64::MAX - limits::STREAM_CHUNK_BYTES_MAX as u64)?;
        let bytes = reader.length("length", 1, limits::STREAM_CHUNK_BYTES_MAX)?;
        let (min, max) = match codec {
            None => (bytes, bytes),
            Some(Codec::Lz4 | Codec::Zstd) => (1, bytes),
            Some(Codec::ZstdStream | Codec::ZstdStart) => (1, bytes + limits::STREAM_OVERHEAD_BYTES_MAX),
        };
        let block = reader.take("block", body.len().saturating_sub(STREAM_HEAD_BYTES))?;
        let length = u32::try_from(block.len()).unwrap_or(u32::MAX);
        reader.bounded("block", length, min as u64, max as u64)?;
        reader.finish()?;
        Ok(Self { offset, bytes, codec, block })
    }
}
