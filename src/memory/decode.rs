//! From frames of one lane, which a peer sent, to guest RAM.

use std::sync::Arc;

use crate::limits::{BATCH_PAGES_MAX, STRIPE_PAGES};
use crate::memory::ledger::Ledger;
use crate::memory::unpack::{Unpacked, Unpacker};
use crate::memory::versions::exclusive_or;
use crate::memory::{GuestRam, KeptDigests, PageCounts, PageSet, RamError, lane_of};
use crate::types::{LaneIndex, PAGE_BYTES, PageNumber, Round};
use crate::wire::{
    Batch, Codec, Compression, CompressionScope, ErrorClass, FrameHeader, FrameKind, LaneStanding, LaneTotals, Record, Records, Run,
    StreamTerms, WireError, decode_round_mark, padded_bytes,
};

/// A frame that does not belong where it came, or whose pages cannot be expanded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes are not a frame.
    #[error("frame {sequence} of lane {lane} is malformed")]
    Frame {
        /// The lane.
        lane: LaneIndex,
        /// The frame.
        sequence: u64,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// A piece of a stream among pages.
    #[error("frame of lane {lane} has a piece of a stream: expected pages")]
    Stream {
        /// The lane.
        lane: LaneIndex,
    },
    /// The body is not as long as the header says.
    #[error("frame has a body of {got} bytes: expected {expected}")]
    BodyLength {
        /// What the header says.
        expected: usize,
        /// What came.
        got: usize,
    },
    /// A frame of another lane.
    #[error("frame names lane {got}: expected lane {expected}")]
    Lane {
        /// This lane.
        expected: LaneIndex,
        /// The lane in the header.
        got: LaneIndex,
    },
    /// A frame is missing or came twice.
    #[error("frame of lane {lane} is out of order: expected sequence {expected}, got {got}")]
    Sequence {
        /// The lane.
        lane: LaneIndex,
        /// The next frame.
        expected: u64,
        /// The frame that came.
        got: u64,
    },
    /// A frame of a round that is over or that did not begin.
    #[error("frame of lane {lane} names round {got}: expected {}round {current}", if *.open { "" } else { "a round after " })]
    Round {
        /// The lane.
        lane: LaneIndex,
        /// Whether the mark of `current` is still to come.
        open: bool,
        /// The last round that had frames.
        current: Round,
        /// The round that came.
        got: Round,
    },
    /// A record that the terms of the stream exclude.
    #[error("frame of lane {lane} has a record of kind `{got}`: expected what was agreed, {expected}")]
    NotAgreed {
        /// The lane.
        lane: LaneIndex,
        /// What was agreed.
        expected: Box<str>,
        /// What came.
        got: &'static str,
    },
    /// A frame whose length says what is in it, where it was agreed that it does not.
    #[error("frame of lane {lane} has a body of {bytes} bytes: expected what was agreed, length padding to one of few lengths")]
    NotPadded {
        /// The lane.
        lane: LaneIndex,
        /// Its length.
        bytes: usize,
    },
    /// A page that the VM does not have.
    #[error("page {page} is outside guest RAM of {pages} pages")]
    PageOutOfBounds {
        /// The page.
        page: PageNumber,
        /// Pages of the VM.
        pages: u64,
    },
    /// A page that another lane carries.
    #[error("page {page} came on lane {got}: expected lane {expected}")]
    Affinity {
        /// The page.
        page: PageNumber,
        /// The lane that carries it.
        expected: LaneIndex,
        /// This lane.
        got: LaneIndex,
    },
    /// A page twice in one round.
    #[error("page {page} came twice in round {round}: expected once")]
    PageTwice {
        /// The page.
        page: PageNumber,
        /// The round.
        round: Round,
    },
    /// A block that its codec cannot read.
    #[error("block of a batch is not valid `{codec}`: expected {expected} bytes of pages")]
    Block {
        /// The codec.
        codec: &'static str,
        /// Bytes that the batch's pages have.
        expected: usize,
    },
    /// A block that expands to more or fewer bytes than its pages have.
    #[error("block of a batch expands to the wrong length: expected {expected} bytes, got {got}{}", if got > expected { " or more" } else { "" })]
    BlockLength {
        /// Bytes that the batch's pages have.
        expected: usize,
        /// Bytes that it expands to, as far as that was followed.
        got: usize,
    },
    /// The source counted something else than came here.
    #[error("totals of lane {lane} differ: expected {expected}, got {got}")]
    Totals {
        /// The lane.
        lane: LaneIndex,
        /// What came here.
        expected: Box<LaneTotals>,
        /// What the source says it sent.
        got: Box<LaneTotals>,
    },
    /// Guest RAM could not be written.
    #[error("cannot write guest RAM")]
    Ram(#[from] RamError),
}

impl DecodeError {
    /// Whose fault it is.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Ram(_) => ErrorClass::Local,
            _ => ErrorClass::PeerMisbehaved,
        }
    }
}

/// Applies the frames of one lane to guest RAM. After an error the lane is worthless: what the RAM
/// holds is neither the old version nor the new.
pub struct Decoder {
    lane: LaneIndex,
    pages: u64,
    compression: Compression,
    scope: CompressionScope,
    padded: bool,
    /// Last round that has frames.
    round: Round,
    /// Whether its mark is still to come.
    open: bool,
    /// Pages that may hold something else than zeroes, because we wrote them.
    written: LanePages,
    /// Pages that came in the open round.
    seen: LanePages,
    scratch: Box<[u8]>,
    /// For pages of ours that are read: those that others equal, and those that differences apply to.
    own: Box<[u8]>,
    unpacker: Unpacker,
    ledger: Ledger,
    counts: PageCounts,
    /// Hears of what is written.
    digests: Option<Arc<KeptDigests>>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("lane", &self.lane)
            .field("round", &self.round)
            .field("ledger", &self.ledger)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// The decoder of `lane` of `lanes` on the terms that both sides accepted, for fresh RAM of `pages` pages, all of them zero.
    #[must_use]
    pub fn new(lane: LaneIndex, lanes: u16, terms: &StreamTerms, pages: u64) -> Self {
        Self {
            lane,
            pages,
            compression: terms.compression,
            scope: terms.compression_scope,
            padded: terms.length_padding,
            round: Round(0),
            open: false,
            written: LanePages::empty(lanes, pages),
            seen: LanePages::empty(lanes, pages),
            scratch: vec![0; BATCH_PAGES_MAX * PAGE_BYTES].into(),
            own: vec![0; BATCH_PAGES_MAX * PAGE_BYTES].into(),
            unpacker: Unpacker::default(),
            ledger: Ledger::default(),
            counts: PageCounts::default(),
            digests: None,
        }
    }

    /// Tells `digests` what it writes.
    #[must_use]
    pub fn telling(self, digests: Option<Arc<KeptDigests>>) -> Self {
        Self { digests, ..self }
    }

    /// The decoder of a lane whose RAM an earlier decoder has written, nobody knows where; its last round was `round`.
    #[must_use]
    pub fn after_restart(lane: LaneIndex, lanes: u16, terms: &StreamTerms, pages: u64, round: Round) -> Self {
        let written = LanePages { set: PageSet::full(LanePages::empty(lanes, pages).set.pages()), lanes: lanes.max(1) };
        Self { round, written, ..Self::new(lane, lanes, terms, pages) }
    }

    /// Applies one frame. Returns the round that it ended, if it did.
    ///
    /// # Errors
    /// [`DecodeError`]; some of the frame's pages may have been written.
    pub fn apply(&mut self, header: &FrameHeader, body: &[u8], ram: &GuestRam) -> Result<Option<Round>, DecodeError> {
        self.check_header(header, body)?;
        let malformed = |source| DecodeError::Frame { lane: header.lane, sequence: header.sequence, source };
        if matches!(header.kind, FrameKind::Stream | FrameKind::Disk) {
            return Err(DecodeError::Stream { lane: self.lane });
        }
        if header.kind == FrameKind::RoundMark {
            // SPEC: PROTOCOL.md#must-mark-totals
            let got = decode_round_mark(body).map_err(malformed)?;
            let expected = self.ledger.totals();
            if got != expected {
                return Err(DecodeError::Totals { lane: self.lane, expected: Box::new(expected), got: Box::new(got) });
            }
            self.end_round(header.round);
            self.ledger.count(&[&header.encode(), body], 0);
            return Ok(Some(header.round));
        }
        (self.round, self.open) = (header.round, true);
        let pages_before = self.counts.total();
        let mut ends_padded = false;
        for record in Records::new(header, body) {
            let record = record.map_err(malformed)?;
            self.check_agreed(&record)?;
            ends_padded = matches!(record, Record::Padding(zeroes) if padded_bytes(body.len().saturating_sub(zeroes)) == body.len());
            match record {
                Record::Zero(run) => self.zero(run, ram)?,
                Record::Raw { run, bytes } => {
                    self.accept(run)?;
                    ram.write(run.first(), bytes)?;
                    self.wrote(run);
                    self.counts.raw += run.count();
                }
                Record::Batch(batch) => self.batch(&batch, ram)?,
                Record::Delta(batch) => self.delta(&batch, ram)?,
                Record::Duplicate { run, origin } => self.duplicate(run, origin, ram)?,
                // Whoever calls has waited: it knows the other lanes.
                Record::After(_) | Record::Padding(_) => {}
            }
        }
        // SPEC: PROTOCOL.md#must-padding-last
        if self.padded && !ends_padded {
            return Err(DecodeError::NotPadded { lane: self.lane, bytes: header.body_bytes });
        }
        self.ledger.count(&[&header.encode(), body], self.counts.total() - pages_before);
        Ok(None)
    }

    fn check_header(&self, header: &FrameHeader, body: &[u8]) -> Result<(), DecodeError> {
        if header.lane != self.lane {
            return Err(DecodeError::Lane { expected: self.lane, got: header.lane });
        }
        // SPEC: PROTOCOL.md#must-sequence
        let expected = self.ledger.next_sequence();
        if header.sequence != expected {
            return Err(DecodeError::Sequence { lane: self.lane, expected, got: header.sequence });
        }
        // SPEC: PROTOCOL.md#must-round-order
        let in_order = if self.open { header.round == self.round } else { header.round > self.round };
        if !in_order {
            return Err(DecodeError::Round { lane: self.lane, open: self.open, current: self.round, got: header.round });
        }
        if body.len() != header.body_bytes {
            return Err(DecodeError::BodyLength { expected: header.body_bytes, got: body.len() });
        }
        Ok(())
    }

    // SPEC: PROTOCOL.md#must-agreed
    /// What a policy forbade at the offer does not come in later, record by record.
    fn check_agreed(&self, record: &Record<'_>) -> Result<(), DecodeError> {
        let stream = self.scope == CompressionScope::Stream;
        let codec = |codec| match codec {
            Codec::Lz4 => matches!(self.compression, Compression::Lz4 | Compression::Auto),
            Codec::Zstd => matches!(self.compression, Compression::Zstd | Compression::Auto),
            Codec::ZstdStream | Codec::ZstdStart => stream && matches!(self.compression, Compression::Zstd | Compression::Auto),
        };
        let pages = match record {
            Record::Zero(run) | Record::Raw { run, .. } | Record::Duplicate { run, .. } => run.count(),
            Record::Batch(batch) | Record::Delta(batch) => batch.pages as u64,
            Record::After(_) | Record::Padding(_) => 0,
        };
        let (agreed, got) = match record {
            _ if self.scope == CompressionScope::Page && pages > 1 => (false, "several pages"),
            Record::Batch(batch) => (codec(batch.codec), batch.codec.name()),
            Record::Delta(batch) => (stream && codec(batch.codec), "delta"),
            Record::Duplicate { .. } => (stream && self.compression != Compression::None, "duplicate"),
            Record::Zero(_) | Record::Raw { .. } | Record::After(_) | Record::Padding(_) => (true, ""),
        };
        if agreed {
            return Ok(());
        }
        let expected = format!("compression {:?} in scope {:?}", self.compression, self.scope).to_lowercase().into();
        Err(DecodeError::NotAgreed { lane: self.lane, expected, got })
    }

    fn end_round(&mut self, round: Round) {
        (self.round, self.open) = (round, false);
        self.seen.clear();
    }

    /// Takes a run of this round: inside the RAM, on its lane, and for the first time.
    fn accept(&mut self, run: Run) -> Result<(), DecodeError> {
        if run.end().0 > self.pages {
            return Err(DecodeError::PageOutOfBounds { page: PageNumber(run.first().0.max(self.pages)), pages: self.pages });
        }
        // SPEC: PROTOCOL.md#must-lane-affinity
        if let Some((page, expected)) = self.seen.stranger(run, self.lane) {
            return Err(DecodeError::Affinity { page, expected, got: self.lane });
        }
        // SPEC: PROTOCOL.md#must-page-once
        self.seen.insert_new(run).map_err(|page| DecodeError::PageTwice { page, round: self.round })
    }

    fn wrote(&mut self, run: Run) {
        self.written.insert(run);
        self.digests.iter().for_each(|digests| digests.touched(run.first(), run.count()));
    }

    /// Clears pages that we wrote before; the others are zero and stay unallocated.
    fn zero(&mut self, run: Run, ram: &GuestRam) -> Result<(), DecodeError> {
        self.accept(run)?;
        while let Some((first, count)) = self.written.take_run(run) {
            ram.clear(first, count)?;
            self.digests.iter().for_each(|digests| digests.touched(first, count));
        }
        self.counts.zero += run.count();
        Ok(())
    }

    fn batch(&mut self, batch: &Batch<'_>, ram: &GuestRam) -> Result<(), DecodeError> {
        self.unpack(batch)?;
        let mut at = 0;
        for run in batch.runs() {
            // INVARIANT(scratch-bound): the runs of a batch have `batch.pages` pages.
            ram.write(run.first(), &self.scratch[at..at + run.bytes()])?;
            self.wrote(run);
            at += run.bytes();
        }
        self.counts.compressed += batch.pages as u64;
        Ok(())
    }

    /// Takes the pages of a batch, and unpacks it into the scratch.
    fn unpack(&mut self, batch: &Batch<'_>) -> Result<(), DecodeError> {
        for run in batch.runs() {
            self.accept(run)?;
        }
        let expected = batch.pages * PAGE_BYTES;
        // INVARIANT(scratch-bound): a batch has at most BATCH_PAGES_MAX pages, checked by `Records`.
        self.unpacker.unpack(batch.codec, batch.block, &mut self.scratch[..expected]).map_err(|why| match why {
            Unpacked::Length(got) => DecodeError::BlockLength { expected, got },
            Unpacked::Invalid => DecodeError::Block { codec: batch.codec.name(), expected },
        })
    }

    // SPEC: PROTOCOL.md#must-delta
    fn delta(&mut self, batch: &Batch<'_>, ram: &GuestRam) -> Result<(), DecodeError> {
        self.unpack(batch)?;
        let mut at = 0;
        for run in batch.runs() {
            // INVARIANT(scratch-bound): as in `batch`; both scratches have one size.
            let (own, difference) = (&mut self.own[..run.bytes()], &mut self.scratch[at..at + run.bytes()]);
            ram.read(run.first(), own)?;
            for (page, difference) in own.chunks_exact_mut(PAGE_BYTES).zip(difference.chunks_exact(PAGE_BYTES)) {
                let before = <[u8; PAGE_BYTES]>::try_from(&*page).unwrap_or([0; PAGE_BYTES]);
                exclusive_or(&before, difference, page);
            }
            ram.write(run.first(), own)?;
            self.wrote(run);
            at += run.bytes();
        }
        self.counts.delta += batch.pages as u64;
        Ok(())
    }

    // SPEC: PROTOCOL.md#must-duplicate
    fn duplicate(&mut self, run: Run, origin: PageNumber, ram: &GuestRam) -> Result<(), DecodeError> {
        self.accept(run)?;
        let mut done = 0;
        while done < run.count() {
            let pages = (run.count() - done).min(BATCH_PAGES_MAX as u64);
            // INVARIANT(scratch-bound): at most BATCH_PAGES_MAX pages.
            let own = &mut self.own[..usize::try_from(pages).unwrap_or(0) * PAGE_BYTES];
            let (from, to) = (PageNumber(origin.0 + done), PageNumber(run.first().0 + done));
            let outside =
                |_| DecodeError::PageOutOfBounds { page: PageNumber((origin.0 + run.count() - 1).max(self.pages)), pages: self.pages };
            ram.read(from, own).map_err(outside)?;
            ram.write(to, own)?;
            done += pages;
        }
        self.wrote(run);
        self.counts.duplicate += run.count();
        Ok(())
    }

    /// The lane joined again: sequence and totals begin anew, and what was interrupted comes again
    /// in a later round.
    pub fn rejoin(&mut self) {
        self.ledger = Ledger::default();
        self.unpacker.restart();
        self.end_round(self.round);
    }

    /// How far this lane has come since its join.
    #[must_use]
    pub fn standing(&self) -> LaneStanding {
        let frames = self.ledger.next_sequence();
        LaneStanding { round: if frames == 0 { Round(0) } else { self.round }, frames }
    }

    /// What this lane carried since its join.
    #[must_use]
    pub fn totals(&self) -> LaneTotals {
        self.ledger.totals()
    }

    /// Pages received by how they came, since this decoder exists.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        self.counts
    }
}

/// A set of the pages of one lane, without room for those of the others: a lane's stripes count as
/// if they lay back to back. Takes runs that lie on the lane only.
struct LanePages {
    set: PageSet,
    lanes: u16,
}

impl LanePages {
    fn empty(lanes: u16, pages: u64) -> Self {
        let lanes = lanes.max(1);
        let stripes = pages.div_ceil(STRIPE_PAGES).div_ceil(u64::from(lanes));
        Self { set: PageSet::empty(stripes * STRIPE_PAGES), lanes }
    }

    /// The first page of a run that is not on `lane`, and its lane.
    fn stranger(&self, run: Run, lane: LaneIndex) -> Option<(PageNumber, LaneIndex)> {
        let last_stripe = (run.end().0 - 1) / STRIPE_PAGES;
        (run.first().0 / STRIPE_PAGES..=last_stripe)
            .map(|stripe| PageNumber(run.first().0.max(stripe * STRIPE_PAGES)))
            .map(|page| (page, lane_of(page, self.lanes)))
            .find(|(_, owner)| *owner != lane)
    }

    fn local(&self, page: PageNumber) -> PageNumber {
        let stripe = page.0 / STRIPE_PAGES / u64::from(self.lanes);
        PageNumber(stripe * STRIPE_PAGES + page.0 % STRIPE_PAGES)
    }

    fn insert(&mut self, run: Run) {
        let first = self.local(run.first()).0;
        for page in first..first + run.count() {
            self.set.insert(PageNumber(page));
        }
    }

    /// Adds a run, or gives its first page that was there already.
    fn insert_new(&mut self, run: Run) -> Result<(), PageNumber> {
        let first = self.local(run.first()).0;
        for index in 0..run.count() {
            if !self.set.insert(PageNumber(first + index)) {
                return Err(PageNumber(run.first().0 + index));
            }
        }
        Ok(())
    }

    /// Takes the first members that lie in `run` out, as pages of the VM.
    fn take_run(&mut self, run: Run) -> Option<(PageNumber, u64)> {
        let local = self.local(run.first()).0;
        let end = local + run.count();
        let (first, count) = self.set.next_run_before(PageNumber(local), PageNumber(end), run.count())?;
        let count = count.min(end - first.0);
        for page in first.0..first.0 + count {
            self.set.remove(PageNumber(page));
        }
        Some((PageNumber(run.first().0 + (first.0 - local)), count))
    }

    fn clear(&mut self) {
        self.set.take();
    }
}
