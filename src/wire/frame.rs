//! Frames of a lane: a fixed header, then a body that the header bounds.

use crate::limits;
use crate::types::{LaneIndex, Round};
use crate::wire::reader::{Reader, Writer};
use crate::wire::{LaneTotals, WireError};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 24;

/// Bytes of the body of a round mark.
pub(super) const ROUND_MARK_BYTES: usize = 40;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// Page records.
    Pages,
    /// The end of a round on this lane, with the lane's totals up to the frame before this one.
    RoundMark,
}

impl FrameKind {
    fn number(self) -> u8 {
        match self {
            Self::Pages => 1,
            Self::RoundMark => 2,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Pages, Self::RoundMark].into_iter().find(|kind| kind.number() == number)
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
        let kind = reader.known("kind", "1 (pages) or 2 (round mark)", u64::from(number), FrameKind::from_number(number))?;
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
