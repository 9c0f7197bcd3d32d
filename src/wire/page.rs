//! The body of a frame of pages: records, written in place and read without a copy.

use crate::limits;
use crate::types::{LaneIndex, PAGE_BYTES, PageNumber, Round};
use crate::wire::WireError;
use crate::wire::frame::{FRAME_HEADER_BYTES, FrameHeader, FrameKind};
use crate::wire::reader::{Reader, Writer};

const RUN_BYTES: usize = 8;
const RUN_FIRST_BITS: u32 = 40;

const ZERO: u8 = 1;
const RAW: u8 = 2;
const BATCH: u8 = 3;
const PADDING: u8 = 4;
const DUPLICATE: u8 = 5;
const DELTA: u8 = 6;
const AFTER: u8 = 7;
const PADDING_HEADER_BYTES: usize = 5;
const AFTER_BYTES: usize = 11;

/// LIMIT: padded frames differ in length by at least a page.
const BUCKET_BYTES_MIN: usize = PAGE_BYTES;

/// Consecutive pages, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    first: PageNumber,
    count: u64,
}

impl Run {
    /// `count` pages from `first` on, if both fit a record.
    #[must_use]
    pub fn new(first: PageNumber, count: u64) -> Option<Self> {
        ((1..=limits::FRAME_PAGES_MAX).contains(&count) && first.0 >> RUN_FIRST_BITS == 0).then_some(Self { first, count })
    }

    /// The first page.
    #[must_use]
    pub fn first(self) -> PageNumber {
        self.first
    }

    /// Pages, at least one and at most `FRAME_PAGES_MAX`.
    #[must_use]
    pub fn count(self) -> u64 {
        self.count
    }

    /// The page after the last.
    #[must_use]
    pub fn end(self) -> PageNumber {
        PageNumber(self.first.0 + self.count)
    }

    /// Bytes of the pages.
    #[must_use]
    pub fn bytes(self) -> usize {
        // INVARIANT(bounded-run): count <= FRAME_PAGES_MAX, checked by every constructor.
        usize::try_from(self.count).unwrap_or(0) * PAGE_BYTES
    }

    fn number(self) -> u64 {
        self.first.0 | self.count << RUN_FIRST_BITS
    }

    fn decode(reader: &mut Reader<'_>, count_max: u64) -> Result<Self, WireError> {
        let number = reader.u64("run")?;
        let count = reader.bounded("pages of run", number >> RUN_FIRST_BITS, 1, count_max)?;
        Ok(Self { first: PageNumber(number & ((1 << RUN_FIRST_BITS) - 1)), count })
    }
}

/// How the block of one batch is packed. Every batch names its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// LZ4 block format, without a length in front.
    Lz4,
    /// A Zstandard frame by itself.
    Zstd,
    /// The next part of the Zstandard frame that this lane's last batch of this kind continued or began.
    ZstdStream,
    /// The first part of a new one.
    ZstdStart,
}

const CODECS: [Codec; 4] = [Codec::Lz4, Codec::Zstd, Codec::ZstdStream, Codec::ZstdStart];

impl Codec {
    /// The codec's name, as errors show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::ZstdStream => "zstd stream",
            Self::ZstdStart => "zstd stream start",
        }
    }

    pub(super) fn from_number(number: u8) -> Option<Self> {
        CODECS.into_iter().find(|codec| codec.number() == number)
    }

    pub(super) fn number(self) -> u8 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
            Self::ZstdStream => 3,
            Self::ZstdStart => 4,
        }
    }
}

/// How far another lane has to have come before a frame may be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct After {
    /// The other lane.
    pub lane: LaneIndex,
    /// Frames that it has applied since its join.
    pub frames: u64,
}

/// Pages that were packed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch<'a> {
    /// How the block is packed.
    pub codec: Codec,
    /// Pages in all runs, at least one and at most `BATCH_PAGES_MAX`.
    pub pages: usize,
    /// The packed pages: fewer bytes than the pages have, or in a stream hardly more.
    pub block: &'a [u8],
    runs: &'a [u8],
}

impl<'a> Batch<'a> {
    /// The runs whose pages stand in the block one after the other.
    pub fn runs(&self) -> impl Iterator<Item = Run> + use<'a> {
        let (runs, _) = self.runs.as_chunks::<RUN_BYTES>();
        runs.iter().map(|bytes| {
            let number = u64::from_le_bytes(*bytes);
            Run { first: PageNumber(number & ((1 << RUN_FIRST_BITS) - 1)), count: number >> RUN_FIRST_BITS }
        })
    }
}

/// How far other lanes have to have come before a frame may be applied. A frame that is malformed says nothing here; whoever
/// applies it says why.
pub fn afters<'a>(header: &FrameHeader, body: &'a [u8]) -> impl Iterator<Item = After> + use<'a> {
    let records = if header.kind == FrameKind::Pages { Some(Records::new(header, body)) } else { None };
    let leading = records.into_iter().flatten().map_while(|record| if let Ok(Record::After(after)) = record { Some(after) } else { None });
    leading.filter(|after| after.frames > 0)
}

/// One record of a frame, borrowed from its body. Whether the pages exist, and on this lane, is
/// for the reader of the record to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// Pages that hold only zeroes.
    Zero(Run),
    /// Pages as they are.
    Raw {
        /// Which pages.
        run: Run,
        /// Their bytes, exactly `run.bytes()`.
        bytes: &'a [u8],
    },
    /// Pages packed together.
    Batch(Batch<'a>),
    /// What is to be combined by exclusive or with what the destination has of the pages, packed together.
    Delta(Batch<'a>),
    /// Pages that equal others, which the destination has.
    Duplicate {
        /// Which pages.
        run: Run,
        /// The first of as many pages that they equal, one by one.
        origin: PageNumber,
    },
    /// The records behind it speak of what another lane brings.
    After(After),
    /// So many bytes that mean nothing and hide the length of the frame.
    Padding(usize),
}

/// How long a body is with padding that has so many bytes without: up to the next multiple of a sixteenth of the
/// power of two above, so that a length tells four bits and its order of magnitude, and padding costs an eighth at most
/// of all but the shortest frames.
#[must_use]
pub fn padded_bytes(bare: usize) -> usize {
    let bucket = (bare.next_power_of_two() / 16).max(BUCKET_BYTES_MIN);
    bare.next_multiple_of(bucket).min(limits::FRAME_BODY_BYTES_MAX)
}

/// The records of one frame's body, one at a time. Ends after the first error.
#[derive(Debug)]
pub struct Records<'a> {
    reader: Reader<'a>,
    left: u32,
    pages_left: u64,
    /// Only records of this kind were read.
    only_after: bool,
    ended: bool,
}

impl<'a> Records<'a> {
    /// The records of `body`, which has to hold exactly `header.records` of them.
    #[must_use]
    pub fn new(header: &FrameHeader, body: &'a [u8]) -> Self {
        let reader = Reader::new("pages frame", body);
        Self { reader, left: header.records, pages_left: limits::FRAME_PAGES_MAX, only_after: true, ended: false }
    }

    fn record(&mut self) -> Result<Option<Record<'a>>, WireError> {
        if self.left == 0 {
            return self.reader.finish().map(|()| None);
        }
        self.left -= 1;
        let reader = &mut self.reader;
        let kind = reader.u8("record kind")?;
        let after_allowed = self.only_after;
        self.only_after &= kind == AFTER;
        let record = match kind {
            ZERO => Record::Zero(Run::decode(reader, self.pages_left)?),
            RAW => {
                let run = Run::decode(reader, self.pages_left)?;
                Record::Raw { run, bytes: reader.take("raw pages", run.bytes())? }
            }
            BATCH => Record::Batch(batch(reader, self.pages_left)?),
            DELTA => Record::Delta(batch(reader, self.pages_left)?),
            DUPLICATE => {
                let run = Run::decode(reader, self.pages_left)?;
                let last_max = (1 << RUN_FIRST_BITS) - run.count;
                Record::Duplicate {
                    run,
                    origin: PageNumber(reader.u64("origin").and_then(|first| reader.bounded("origin", first, 0, last_max))?),
                }
            }
            // SPEC: PROTOCOL.md#must-after-first
            AFTER if after_allowed => {
                let lane = reader.u16("lane to wait for")?;
                let lane = LaneIndex(reader.bounded("lane to wait for", lane, 0, u64::from(limits::LANES_MAX) - 1)?);
                Record::After(After { lane, frames: reader.u64("frames to wait for")? })
            }
            AFTER => return Err(reader.malformed("record kind", "`after` in front of all others", &[AFTER])),
            PADDING => {
                reader.bounded("records after padding", self.left, 0, 0)?;
                let bytes = reader.bytes("padding", limits::FRAME_BODY_BYTES_MAX)?;
                if bytes.iter().any(|byte| *byte != 0) {
                    return Err(reader.malformed("padding", "zeroes", b"other bytes"));
                }
                Record::Padding(bytes.len())
            }
            other => return reader.known("record kind", "1 (zero) to 7 (after)", u64::from(other), None),
        };
        self.pages_left -= match record {
            Record::Zero(run) | Record::Raw { run, .. } | Record::Duplicate { run, .. } => run.count,
            Record::Batch(batch) | Record::Delta(batch) => batch.pages as u64,
            Record::After(_) | Record::Padding(_) => 0,
        };
        Ok(Some(record))
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let record = self.record().transpose();
        self.ended = !matches!(record, Some(Ok(_)));
        record
    }
}

fn batch<'a>(reader: &mut Reader<'a>, pages_left: u64) -> Result<Batch<'a>, WireError> {
    let number = reader.u8("codec")?;
    let known = Codec::from_number(number);
    let codec = reader.known("codec", "1 (lz4), 2 (zstd), 3 (zstd stream) or 4 (its start)", u64::from(number), known)?;
    let count = reader.u16("runs")?;
    let count = reader.bounded("runs", count, 1, limits::BATCH_PAGES_MAX as u64)?;
    let runs = reader.take("runs", usize::from(count) * RUN_BYTES)?;
    let mut pages = 0;
    let mut runs_reader = Reader::new("pages frame", runs);
    for _ in 0..count {
        let left = (limits::BATCH_PAGES_MAX as u64).min(pages_left) - pages;
        pages += Run::decode(&mut runs_reader, left)?.count;
    }
    let pages = usize::try_from(pages).unwrap_or(limits::BATCH_PAGES_MAX);
    // A stream goes on through pages that do not get smaller; what is by itself would go out as it is.
    let block_bytes_max = match codec {
        Codec::Lz4 | Codec::Zstd => pages * PAGE_BYTES - 1,
        Codec::ZstdStream | Codec::ZstdStart => pages * PAGE_BYTES + limits::STREAM_OVERHEAD_BYTES_MAX,
    };
    let block_bytes = reader.length("block length", 1, block_bytes_max)?;
    Ok(Batch { codec, pages, block: reader.take("block", block_bytes)?, runs })
}

/// Writes one frame of pages at the end of a buffer.
#[derive(Debug)]
pub struct PagesFrame<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    /// Records of other lanes to wait for, filled in at the end.
    afters: usize,
    records: u32,
    pages: u64,
    /// The record that the next page can join: where it begins, and its pages.
    open: Option<(usize, Run)>,
}

impl<'a> PagesFrame<'a> {
    /// Room that `pages` pages take at most, whatever records they end up in.
    #[must_use]
    pub const fn room_for(pages: usize) -> usize {
        pages * (1 + RUN_BYTES + PAGE_BYTES)
    }

    /// Begins a frame behind what `out` holds.
    #[must_use]
    pub fn begin(out: &'a mut Vec<u8>) -> Self {
        Self::begin_after(out, 0)
    }

    /// The same with room for `afters` records of lanes to wait for.
    #[must_use]
    pub fn begin_after(out: &'a mut Vec<u8>, afters: usize) -> Self {
        let start = out.len();
        out.resize(start + FRAME_HEADER_BYTES + afters * AFTER_BYTES, 0);
        let records = u32::try_from(afters).unwrap_or(u32::MAX);
        Self { out, start, afters, records, pages: 0, open: None }
    }

    fn body_bytes(&self) -> usize {
        self.out.len().saturating_sub(self.start + FRAME_HEADER_BYTES)
    }

    /// Whether so many more pages fit, as bytes and as pages, with a padding record behind them.
    #[must_use]
    pub fn fits(&self, pages: usize) -> bool {
        self.body_bytes() + Self::room_for(pages) + PADDING_HEADER_BYTES <= limits::FRAME_BODY_BYTES_MAX
            && self.pages + pages as u64 <= limits::FRAME_PAGES_MAX
    }

    /// Pages written so far.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn record(&mut self, kind: u8, pages: u64) {
        self.records = self.records.saturating_add(1);
        self.pages += pages;
        self.open = None;
        self.out.put_u8(kind);
    }

    /// Adds pages that hold only zeroes.
    pub fn zero(&mut self, run: Run) {
        self.record(ZERO, run.count);
        self.out.put_u64(run.number());
    }

    /// Adds pages as they are; `bytes` has exactly `run.bytes()`.
    pub fn raw(&mut self, run: Run, bytes: &[u8]) {
        debug_assert_eq!(run.bytes(), bytes.len());
        self.record(RAW, run.count);
        self.out.put_u64(run.number());
        self.out.put(bytes);
    }

    /// Adds one page as it is, to the record in front of it where that brings the page before.
    pub fn raw_page(&mut self, page: PageNumber, bytes: &[u8; PAGE_BYTES]) {
        let joined = self.open.filter(|(_, run)| run.end() == page).and_then(|(at, run)| Some((at, Run::new(run.first, run.count + 1)?)));
        let Some((at, run)) = joined else {
            let run = Run { first: page, count: 1 };
            let at = self.out.len();
            self.raw(run, bytes);
            self.open = Some((at, run));
            return;
        };
        self.out.put(bytes);
        self.pages += 1;
        self.open = Some((at, run));
        for (to, from) in self.out.iter_mut().skip(at + 1).zip(run.number().to_le_bytes()) {
            *to = from;
        }
    }

    /// Adds pages that equal as many from `origin` on.
    pub fn duplicate(&mut self, run: Run, origin: PageNumber) {
        self.record(DUPLICATE, run.count);
        self.out.put_u64(run.number());
        self.out.put_u64(origin.0);
    }

    /// Adds the pages of `runs`, packed into `block`.
    pub fn batch(&mut self, codec: Codec, runs: &[Run], block: &[u8]) {
        self.packed(BATCH, codec, runs, block);
    }

    /// Adds what `block` holds packed to what the destination has of the pages of `runs`, by exclusive or.
    pub fn delta(&mut self, codec: Codec, runs: &[Run], block: &[u8]) {
        self.packed(DELTA, codec, runs, block);
    }

    fn packed(&mut self, kind: u8, codec: Codec, runs: &[Run], block: &[u8]) {
        self.record(kind, runs.iter().map(|run| run.count).sum());
        self.out.put_u8(codec.number());
        self.out.put_u16(u16::try_from(runs.len()).unwrap_or(u16::MAX));
        for run in runs {
            self.out.put_u64(run.number());
        }
        self.out.put_bytes(block);
    }

    /// Fills a frame that has records with zeroes up to the next of few lengths.
    pub fn pad(&mut self) {
        if self.pages == 0 {
            return;
        }
        let bare = self.body_bytes() + PADDING_HEADER_BYTES;
        let padding = padded_bytes(bare).saturating_sub(bare);
        self.record(PADDING, 0);
        self.out.put_length(padding);
        self.out.resize(self.out.len() + padding, 0);
    }

    /// Writes the header; a frame without pages leaves no bytes and gives none.
    #[must_use]
    pub fn finish(self, lane: LaneIndex, round: Round, sequence: u64) -> Option<FrameHeader> {
        self.finish_after(lane, round, sequence, &[])
    }

    /// The same with the lanes to wait for, as many as there is room for.
    #[must_use]
    pub fn finish_after(self, lane: LaneIndex, round: Round, sequence: u64, afters: &[After]) -> Option<FrameHeader> {
        debug_assert_eq!(self.afters, afters.len());
        if self.pages == 0 {
            self.out.truncate(self.start);
            return None;
        }
        let room = self.out.iter_mut().skip(self.start + FRAME_HEADER_BYTES);
        let bytes = afters.iter().flat_map(|after| {
            let [l0, l1] = after.lane.0.to_le_bytes();
            [AFTER, l0, l1].into_iter().chain(after.frames.to_le_bytes())
        });
        for (to, from) in room.zip(bytes) {
            *to = from;
        }
        let body_bytes = self.body_bytes();
        let header = FrameHeader { kind: FrameKind::Pages, lane, round, sequence, records: self.records, body_bytes };
        for (to, from) in self.out.iter_mut().skip(self.start).zip(header.encode()) {
            *to = from;
        }
        Some(header)
    }
}
