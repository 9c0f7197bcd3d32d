//! From dirty pages of one lane to frames.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use crate::limits::BATCH_PAGES_MAX;
use crate::memory::ledger::Ledger;
use crate::memory::{GuestRam, PageCounts, PageSet, RamError};
use crate::types::{LaneIndex, PAGE_BYTES, PageNumber, Round};
use crate::wire::{Codec, Compression, CompressionScope, LaneTotals, PagesFrame, Run, StreamTerms, put_round_mark};

/// WHY: a batch is closed from here on rather than filled up one scattered page at a time, so that
/// guest memory is read in pieces of at least 64 KiB where it is contiguous.
const BATCH_PAGES_FULL: usize = BATCH_PAGES_MAX * 3 / 4;

/// WHY: a batch that shrinks by less costs the destination a decompression for nothing.
const PACKED_PERCENT_MAX: usize = 94;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Makes the frames of one lane. Keeps nothing of the guest's but the batch it works on.
pub struct Encoder {
    lane: LaneIndex,
    lanes: u16,
    padded: bool,
    /// `INVARIANT(one-copy)`: guest pages are copied here once, and everything that is decided or
    /// sent comes from this copy, whatever the guest writes meanwhile.
    scratch: Box<[u8]>,
    runs: Vec<Run>,
    packer: Packer,
    ledger: Ledger,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder")
            .field("lane", &self.lane)
            .field("lanes", &self.lanes)
            .field("ledger", &self.ledger)
            .finish_non_exhaustive()
    }
}

impl Encoder {
    /// The encoder of `lane` of `lanes`, on the terms that both sides accepted.
    #[must_use]
    pub fn new(lane: LaneIndex, lanes: u16, terms: &StreamTerms) -> Self {
        Self {
            lane,
            lanes,
            padded: terms.length_padding,
            scratch: vec![0; BATCH_PAGES_MAX * PAGE_BYTES].into(),
            runs: Vec::with_capacity(BATCH_PAGES_MAX),
            packer: Packer::new(terms),
            ledger: Ledger::default(),
        }
    }

    /// Appends one frame with this lane's pages of `pages` from `from` on, as many as fit. Returns
    /// where the next frame goes on, or nothing after the last page. Without a page left, nothing
    /// is appended.
    ///
    /// # Errors
    /// `pages` names a page that the RAM does not have; nothing is appended.
    pub fn encode_frame(
        &mut self,
        ram: &GuestRam,
        round: Round,
        pages: &PageSet,
        from: PageNumber,
        out: &mut Vec<u8>,
    ) -> Result<Option<PageNumber>, RamError> {
        let start = out.len();
        let mut frame = PagesFrame::begin(out);
        let mut next = Some(from);
        while let Some(at) = next
            && frame.fits(BATCH_PAGES_MAX)
        {
            match self.gather(ram, pages, at, &mut frame) {
                Ok(after) => next = after,
                Err(error) => {
                    out.truncate(start);
                    return Err(error);
                }
            }
            // INVARIANT(scratch-bound): `gather` fills at most the scratch.
            let filled: usize = self.runs.iter().map(|run| run.bytes()).sum();
            self.packer.pack(&mut frame, &self.runs, &self.scratch[..filled]);
        }
        if self.padded {
            frame.pad();
        }
        let frame_pages = frame.pages();
        if frame.finish(self.lane, round, self.ledger.next_sequence()).is_some() {
            self.ledger.count(&[out.get(start..).unwrap_or_default()], frame_pages);
        }
        Ok(next.filter(|at| pages.next_run_of_lane(self.lane, self.lanes, *at, 1).is_some()))
    }

    /// Copies the next pages into the scratch and their runs into `runs`, until the batch is full
    /// or the frame is; zero pages go into the frame at once.
    fn gather(
        &mut self,
        ram: &GuestRam,
        pages: &PageSet,
        from: PageNumber,
        frame: &mut PagesFrame<'_>,
    ) -> Result<Option<PageNumber>, RamError> {
        self.runs.clear();
        let (mut at, mut filled) = (from, 0);
        let mut written = ram.next_written(from);
        while filled < BATCH_PAGES_FULL && frame.fits(BATCH_PAGES_MAX) {
            let room = BATCH_PAGES_MAX - filled;
            let Some((first, count)) = pages.next_run_of_lane(self.lane, self.lanes, at, room as u64) else { return Ok(None) };
            // What the guest never wrote need not be read, which would allocate it. If it is written from here
            // on, the dirty log knows.
            if written.is_some_and(|written| written < first) {
                written = ram.next_written(first);
            }
            if written.is_none_or(|written| written.0 >= first.0 + count) {
                if let Some(run) = Run::new(first, count) {
                    self.packer.zero(frame, run);
                }
                at = PageNumber(first.0 + count);
                continue;
            }
            let count = usize::try_from(count).unwrap_or(room).min(room);
            // INVARIANT(scratch-bound): filled + count <= BATCH_PAGES_MAX, the size of the scratch.
            ram.read(first, &mut self.scratch[filled * PAGE_BYTES..(filled + count) * PAGE_BYTES])?;
            let mut zeroes = RunBuilder::default();
            let mut others = RunBuilder::default();
            let read_at = filled;
            for index in 0..count {
                let page = PageNumber(first.0 + index as u64);
                let begin = (read_at + index) * PAGE_BYTES;
                if self.scratch[begin..begin + PAGE_BYTES] == ZERO_PAGE {
                    if let Some(run) = zeroes.add(page) {
                        self.packer.zero(frame, run);
                    }
                } else {
                    if let Some(run) = others.add(page) {
                        self.runs.push(run);
                    }
                    if filled != read_at + index {
                        self.scratch.copy_within(begin..begin + PAGE_BYTES, filled * PAGE_BYTES);
                    }
                    filled += 1;
                }
            }
            if let Some(run) = zeroes.end() {
                self.packer.zero(frame, run);
            }
            self.runs.extend(others.end());
            at = PageNumber(first.0 + count as u64);
        }
        Ok(Some(at))
    }

    /// Appends the frame that ends `round` on this lane.
    pub fn round_mark(&mut self, round: Round, out: &mut Vec<u8>) {
        let start = out.len();
        put_round_mark(out, self.lane, round, self.ledger.next_sequence(), &self.ledger.totals());
        self.ledger.count(&[out.get(start..).unwrap_or_default()], 0);
    }

    /// The lane joined again: sequence and totals begin anew.
    pub fn rejoin(&mut self) {
        self.ledger = Ledger::default();
    }

    /// What this lane carried since its join.
    #[must_use]
    pub fn totals(&self) -> LaneTotals {
        self.ledger.totals()
    }

    /// Pages sent by what became of them, since this encoder exists.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        self.packer.counts
    }
}

/// Joins pages that come in order into runs.
#[derive(Debug, Default)]
struct RunBuilder {
    first: u64,
    count: u64,
}

impl RunBuilder {
    /// Adds a page; gives the run in front of it if the page does not continue it.
    fn add(&mut self, page: PageNumber) -> Option<Run> {
        if self.count > 0 && page.0 == self.first + self.count {
            self.count += 1;
            return None;
        }
        let before = std::mem::replace(self, Self { first: page.0, count: 1 });
        before.end()
    }

    fn end(self) -> Option<Run> {
        Run::new(PageNumber(self.first), self.count)
    }
}

/// Chooses and writes the records of pages that are already copied.
struct Packer {
    codec: Option<Codec>,
    /// `INVARIANT(page-scope)`: every page is its own record, so that the length of one says
    /// nothing about another.
    page_by_page: bool,
    table: CompressTable,
    packed: Box<[u8]>,
    counts: PageCounts,
}

impl Packer {
    fn new(terms: &StreamTerms) -> Self {
        let codec = match terms.compression {
            Compression::None => None,
            Compression::Lz4 => Some(Codec::Lz4),
        };
        let page_by_page = terms.compression_scope == CompressionScope::Page;
        let pages_max = if page_by_page { 1 } else { BATCH_PAGES_MAX };
        let table = if page_by_page { CompressTable::small() } else { CompressTable::large() };
        let packed = vec![0; get_maximum_output_size(pages_max * PAGE_BYTES)].into();
        Self { codec, page_by_page, table, packed, counts: PageCounts::default() }
    }

    fn zero(&mut self, frame: &mut PagesFrame<'_>, run: Run) {
        self.counts.zero += run.count();
        if self.page_by_page {
            single_pages(run).for_each(|page| frame.zero(page));
        } else {
            frame.zero(run);
        }
    }

    fn pack(&mut self, frame: &mut PagesFrame<'_>, runs: &[Run], bytes: &[u8]) {
        if self.page_by_page {
            let pages = runs.iter().copied().flat_map(single_pages).zip(bytes.chunks_exact(PAGE_BYTES));
            pages.for_each(|(page, bytes)| self.pack_together(frame, &[page], bytes));
        } else if !runs.is_empty() {
            self.pack_together(frame, runs, bytes);
        }
    }

    fn pack_together(&mut self, frame: &mut PagesFrame<'_>, runs: &[Run], bytes: &[u8]) {
        let pages = (bytes.len() / PAGE_BYTES) as u64;
        if let Some(codec) = self.codec
            && let Ok(packed) = compress_into_with_table(bytes, &mut self.packed, &mut self.table)
            && packed * 100 < bytes.len() * PACKED_PERCENT_MAX
            && let Some(block) = self.packed.get(..packed)
        {
            frame.batch(codec, runs, block);
            self.counts.compressed += pages;
            return;
        }
        let mut rest = bytes;
        for run in runs {
            let (pages, after) = rest.split_at(run.bytes().min(rest.len()));
            frame.raw(*run, pages);
            rest = after;
        }
        self.counts.raw += pages;
    }
}

fn single_pages(run: Run) -> impl Iterator<Item = Run> {
    (run.first().0..run.end().0).filter_map(|page| Run::new(PageNumber(page), 1))
}
