//! A change to a disk, as it stands in a lane's frame.

use crate::limits;
use crate::types::{LaneIndex, Round};
use crate::wire::codec::{list, migration};
use crate::wire::reader::{Reader, Writer};
use crate::wire::{Codec, DiskApplied, DiskDigests, DiskEnd, DiskHeld, FrameHeader, FrameKind, Message, WireError};

/// Bytes in front of the block: codec, change, disk, number, settled, offset, length.
pub(super) const DISK_HEAD_BYTES: usize = 32;

/// What becomes of a range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskChange {
    /// It holds these bytes.
    Write,
    /// It reads as zeroes; it may become a hole.
    Zero,
    /// Nobody needs what it holds.
    Discard,
    /// What was applied before is on stable storage; about the whole disk.
    Flush,
}

const CHANGES: [DiskChange; 4] = [DiskChange::Write, DiskChange::Zero, DiskChange::Discard, DiskChange::Flush];

/// A change to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskChunk<'a> {
    /// Which disk of the offer, counted from 0.
    pub disk: u16,
    /// What becomes of the range.
    pub change: DiskChange,
    /// Its number among all changes to disks of this migration, counted from 0.
    pub number: u64,
    /// Every change below this number was applied, and the source knows.
    pub settled: u64,
    /// Where on the disk the range begins.
    pub offset: u64,
    /// Bytes of the range.
    pub bytes: u32,
    /// How `block` is packed; nothing when it is as it was.
    pub codec: Option<Codec>,
    /// What is written, packed or not; empty otherwise.
    pub block: &'a [u8],
}

impl<'a> DiskChunk<'a> {
    /// Appends the whole frame.
    pub fn put(&self, out: &mut Vec<u8>, lane: LaneIndex, sequence: u64) {
        let body_bytes = DISK_HEAD_BYTES + self.block.len();
        let header = FrameHeader { kind: FrameKind::Disk, lane, round: Round(1), sequence, records: 1, body_bytes };
        out.put(&header.encode());
        out.put_u8(match self.codec {
            None => 0,
            Some(Codec::Lz4) => 1,
            Some(_) => 2,
        });
        let change = CHANGES.iter().position(|change| *change == self.change).and_then(|index| u8::try_from(index + 1).ok());
        out.put_u8(change.unwrap_or(0));
        out.put_u16(self.disk);
        out.put_u64(self.number);
        out.put_u64(self.settled);
        out.put_u64(self.offset);
        out.put_u32(self.bytes);
        out.put(self.block);
    }

    /// The change in the body of a frame. Its end is a number that exists, what is written at most
    /// [`limits::STREAM_CHUNK_BYTES_MAX`] long, and its number within [`limits::DISK_CHANGES_MAX`] of what is settled.
    ///
    /// # Errors
    /// A number is out of bounds.
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new("disk frame", body);
        let codec = match reader.u8("codec")? {
            0 => None,
            1 => Some(Codec::Lz4),
            2 => Some(Codec::Zstd),
            other => return reader.known("codec", "0 (none), 1 (lz4) or 2 (zstd)", u64::from(other), None),
        };
        let number = reader.u8("change")?;
        let change = usize::from(number).checked_sub(1).and_then(|index| CHANGES.get(index)).copied();
        let change = reader.known("change", "1 (write), 2 (zero), 3 (discard) or 4 (flush)", u64::from(number), change)?;
        let disk = reader.u16("disk")?;
        let disk = reader.bounded("disk", disk, 0, limits::DISKS_MAX as u64 - 1)?;
        let (number, settled) = (reader.u64("number")?, reader.u64("settled")?);
        let number = reader.bounded("number", number, settled, settled.saturating_add(limits::DISK_CHANGES_MAX as u64 - 1))?;
        let offset = reader.u64("offset")?;
        let offset = reader.bounded("offset", offset, 0, limits::DISK_BYTES_MAX)?;
        let bytes = reader.u32("length")?;
        let (least, most) = match change {
            DiskChange::Write => (1, limits::STREAM_CHUNK_BYTES_MAX as u64),
            DiskChange::Zero | DiskChange::Discard => (1, u64::from(u32::MAX)),
            DiskChange::Flush => (0, 0),
        };
        let bytes = reader.bounded("length", bytes, least, most)?;
        let (least, most) = match (change, codec) {
            (DiskChange::Write, None) => (bytes, bytes),
            (DiskChange::Write, Some(_)) => (1, bytes),
            _ => (0, 0),
        };
        let block = reader.take("block", body.len().saturating_sub(DISK_HEAD_BYTES))?;
        let length = u32::try_from(block.len()).unwrap_or(u32::MAX);
        reader.bounded("block", length, u64::from(least), u64::from(most))?;
        reader.finish()?;
        Ok(Self { disk, change, number, settled, offset, bytes, codec, block })
    }
}

impl Message {
    /// The body of a message about disks.
    pub(super) fn put_disks(&self, out: &mut Vec<u8>) {
        match self {
            Self::DiskApplied(applied) => {
                out.put(&applied.migration.0);
                out.put_length(applied.changes.len());
                applied.changes.iter().for_each(|number| out.put_u64(*number));
            }
            Self::DiskEnd(end) => {
                out.put(&end.migration.0);
                out.put_u64(end.changes);
                out.put_u64(end.bytes);
                out.put_u8(u8::from(end.verify));
            }
            Self::DiskDigests(digests) => {
                out.put(&digests.migration.0);
                out.put_length(digests.digests.len());
                digests.digests.iter().for_each(|digest| out.put(digest));
            }
            Self::DiskHeld(held) => {
                out.put(&held.migration.0);
                out.put_u16(held.disk);
                out.put_u8(u8::from(held.last));
                out.put_length(held.blocks.len());
                held.blocks.iter().for_each(|block| out.put(block));
            }
            _ => {}
        }
    }
}

/// The message about disks of a kind.
pub(super) fn message(kind: u8, reader: &mut Reader<'_>) -> Result<Message, WireError> {
    let migration = migration(reader)?;
    Ok(match kind {
        17 => Message::DiskApplied(DiskApplied {
            migration,
            changes: list(reader, "changes", limits::DISK_CHANGES_MAX, |reader| reader.u64("change"))?,
        }),
        18 => Message::DiskEnd(DiskEnd {
            migration,
            changes: reader.u64("changes")?,
            bytes: reader.u64("bytes")?,
            verify: reader.flag("verify")?,
        }),
        19 => Message::DiskDigests(DiskDigests {
            migration,
            digests: list(reader, "digests", limits::DISKS_MAX, |reader| reader.array("digest"))?,
        }),
        _ => {
            let (disk, last) = (reader.u16("disk")?, reader.flag("last")?);
            let count = reader.length("blocks", 0, limits::DISK_HELD_PART)?;
            let blocks = (0..count).map(|_| reader.array("block")).collect::<Result<_, _>>()?;
            Message::DiskHeld(DiskHeld { migration, disk, blocks, last })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::FRAME_HEADER_BYTES;

    fn chunk(change: DiskChange, codec: Option<Codec>, bytes: u32, block: &[u8]) -> DiskChunk<'_> {
        DiskChunk { disk: 3, change, number: 7, settled: 5, offset: 1 << 33, bytes, codec, block }
    }

    // SPEC: PROTOCOL.md#must-disk-window
    #[test]
    fn a_change_comes_back_as_it_was_and_a_hostile_one_does_not() {
        for chunk in [
            chunk(DiskChange::Write, None, 3, &[1, 2, 3]),
            chunk(DiskChange::Write, Some(Codec::Lz4), 9, &[1, 2, 3]),
            chunk(DiskChange::Write, Some(Codec::Zstd), 9, &[1, 2, 3]),
            chunk(DiskChange::Zero, None, u32::MAX, &[]),
            chunk(DiskChange::Discard, None, 1, &[]),
            chunk(DiskChange::Flush, None, 0, &[]),
        ] {
            let mut frame = Vec::new();
            chunk.put(&mut frame, LaneIndex(2), 4);
            let (header, body) = frame.split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
            let header = FrameHeader::decode(header).unwrap();
            assert_eq!((header.kind, header.lane, header.sequence, header.body_bytes), (FrameKind::Disk, LaneIndex(2), 4, body.len()));
            assert_eq!(DiskChunk::decode(body).unwrap(), chunk);
            for end in 0..body.len().min(DISK_HEAD_BYTES) {
                assert!(DiskChunk::decode(&body[..end]).is_err(), "{end}");
            }
        }
        let plain = chunk(DiskChange::Write, None, 3, &[1, 2, 3]);
        let most = u32::try_from(limits::STREAM_CHUNK_BYTES_MAX).unwrap();
        for (hostile, field) in [
            (DiskChunk { disk: u16::MAX, ..plain }, "disk"),
            (DiskChunk { number: 4, ..plain }, "number"),
            (DiskChunk { number: 5 + limits::DISK_CHANGES_MAX as u64, ..plain }, "number"),
            (DiskChunk { offset: u64::MAX, ..plain }, "offset"),
            (DiskChunk { bytes: 0, block: &[], ..plain }, "length"),
            (DiskChunk { bytes: most + 1, codec: Some(Codec::Lz4), ..plain }, "length"),
            (DiskChunk { bytes: 2, ..plain }, "block"),
            (DiskChunk { bytes: 2, codec: Some(Codec::Zstd), ..plain }, "block"),
            (DiskChunk { codec: Some(Codec::Zstd), block: &[], ..plain }, "block"),
            (DiskChunk { change: DiskChange::Zero, ..plain }, "block"),
            (DiskChunk { change: DiskChange::Flush, block: &[], ..plain }, "length"),
        ] {
            let mut frame = Vec::new();
            hostile.put(&mut frame, LaneIndex(2), 4);
            let refused = DiskChunk::decode(&frame[FRAME_HEADER_BYTES..]).unwrap_err().to_string();
            assert!(refused.contains(&format!("`{field}`")), "{refused}: {field}");
        }
        for (at, byte, field) in [(0, 3, "codec"), (1, 0, "change"), (1, 5, "change")] {
            let mut frame = Vec::new();
            plain.put(&mut frame, LaneIndex(2), 4);
            frame[FRAME_HEADER_BYTES + at] = byte;
            let refused = DiskChunk::decode(&frame[FRAME_HEADER_BYTES..]).unwrap_err().to_string();
            assert!(refused.contains(&format!("`{field}`")), "{refused}: {field}");
        }
    }
}
