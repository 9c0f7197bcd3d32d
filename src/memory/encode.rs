//! From dirty pages of one lane to frames.

use std::sync::Arc;

use crate::limits::BATCH_PAGES_MAX;
use crate::memory::duplicates::{Duplicates, Origin};
use crate::memory::ledger::Ledger;
use crate::memory::pack::{Packer, single_pages};
use crate::memory::versions::Versions;
use crate::memory::{Effort, GuestRam, PageCounts, PageSet, RamError, lane_of};
use crate::types::{LaneIndex, PAGE_BYTES, PageNumber, Round};
use crate::wire::{After, CompressionScope, LaneTotals, PagesFrame, Run, StreamTerms, put_round_mark};

/// WHY: a batch is closed from here on rather than filled up one scattered page at a time, so that
/// guest memory is read in pieces of at least 64 KiB where it is contiguous.
const BATCH_PAGES_FULL: usize = BATCH_PAGES_MAX * 3 / 4;

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
    /// Some of the pages that went out last as they are.
    sample: Vec<PageNumber>,
    packer: Packer,
    ledger: Ledger,
    /// What the destination has of equal pages, and of earlier versions.
    known: Option<Known>,
}

/// What makes pages smaller that others or earlier ones resemble; only in compression scope `stream`.
struct Known {
    duplicates: Arc<Duplicates>,
    /// Pages and their origins that the frame under way brings, in order.
    equal: Vec<(PageNumber, PageNumber)>,
    /// How far other lanes have to have come, by lane.
    afters: Vec<After>,
    versions: Versions,
    differences: Box<[u8]>,
    changed: Vec<PageNumber>,
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
    /// The encoder of `lane` of `lanes`, on the terms that both sides accepted, for a VM of `pages` pages.
    #[must_use]
    pub fn new(lane: LaneIndex, lanes: u16, terms: &StreamTerms, pages: u64) -> Self {
        let lane_bytes = pages.div_ceil(u64::from(lanes.max(1))).saturating_mul(PAGE_BYTES as u64);
        Self {
            lane,
            lanes,
            padded: terms.length_padding,
            scratch: vec![0; BATCH_PAGES_MAX * PAGE_BYTES].into(),
            runs: Vec::with_capacity(BATCH_PAGES_MAX),
            sample: Vec::with_capacity(BATCH_PAGES_MAX),
            packer: Packer::new(terms.compression_scope, Effort::of(terms.compression), lane_bytes),
            ledger: Ledger::default(),
            known: None,
        }
    }

    /// Shares what is known of equal pages with the other lanes of the migration, and keeps versions in at most so many bytes.
    /// Nothing changes where the terms do not let one page say something of another.
    #[must_use]
    pub fn knowing(mut self, duplicates: Arc<Duplicates>, versions_bytes_max: usize, terms: &StreamTerms) -> Self {
        if terms.compression_scope == CompressionScope::Stream {
            let lanes = (0..self.lanes).map(LaneIndex).filter(|lane| *lane != self.lane);
            self.known = Some(Known {
                duplicates,
                equal: Vec::new(),
                afters: lanes.map(|lane| After { lane, frames: 0 }).collect(),
                versions: Versions::new(versions_bytes_max),
                differences: vec![0; BATCH_PAGES_MAX * PAGE_BYTES].into(),
                changed: Vec::new(),
            });
        }
        self
    }

    /// How hard to try from the next frame on.
    pub fn set_effort(&mut self, effort: Effort) {
        self.packer.set_effort(effort);
    }

    /// How hard it tries.
    #[must_use]
    pub fn effort(&self) -> Effort {
        self.packer.effort()
    }

    /// Packs some of the pages that the last frame brought as they are, fast, and says how many bytes they have and would have had.
    pub fn probe(&mut self, ram: &GuestRam) -> (usize, usize) {
        let mut bytes = 0;
        for (page, to) in self.sample.iter().zip(self.scratch.chunks_exact_mut(PAGE_BYTES)) {
            bytes += if ram.read(*page, to).is_ok() { PAGE_BYTES } else { 0 };
        }
        let batch = self.scratch.get(..bytes).unwrap_or_default();
        (bytes, self.packer.probe(batch))
    }

    /// What this lane keeps besides fixed buffers, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.packer.bytes() + self.known.as_ref().map_or(0, |known| known.versions.bytes())
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
        let mut frame = PagesFrame::begin_after(out, self.known.as_ref().map_or(0, |known| known.afters.len()));
        if let Some(known) = &mut self.known {
            known.versions.begin(round);
            known.afters.iter_mut().for_each(|after| after.frames = 0);
        }
        self.sample.clear();
        let as_they_are = self.packer.effort() == Effort::None && !self.packer.page_by_page();
        let mut next = Some(from);
        let packed_max = self.packer.counts.packed().saturating_add(self.packer.effort().frame_pages());
        while let Some(at) = next
            && frame.fits(BATCH_PAGES_MAX)
            && self.packer.counts.packed() < packed_max
        {
            let gathered =
                if as_they_are { self.copy(ram, pages, at, &mut frame) } else { self.gather_and_pack(ram, pages, at, &mut frame) };
            match gathered {
                Ok(after) => next = after,
                Err(error) => {
                    out.truncate(start);
                    return Err(error);
                }
            }
            if let Some(known) = &mut self.known {
                // Behind the batch: an origin may be in it.
                known.write(&mut self.packer, &mut frame);
            }
        }
        if self.padded {
            frame.pad();
        }
        let frame_pages = frame.pages();
        let afters = self.known.as_ref().map_or(&[][..], |known| &known.afters);
        if frame.finish_after(self.lane, round, self.ledger.next_sequence(), afters).is_some() {
            self.ledger.count(&[out.get(start..).unwrap_or_default()], frame_pages);
            if let Some(known) = &self.known {
                known.duplicates.made(self.lane, self.ledger.next_sequence());
            }
        }
        Ok(next.filter(|at| pages.next_run_of_lane(self.lane, self.lanes, *at, 1).is_some()))
    }

    fn gather_and_pack(
        &mut self,
        ram: &GuestRam,
        pages: &PageSet,
        from: PageNumber,
        frame: &mut PagesFrame<'_>,
    ) -> Result<Option<PageNumber>, RamError> {
        let next = self.gather(ram, pages, from, frame)?;
        // INVARIANT(scratch-bound): `gather` fills at most the scratch.
        let filled = self.runs.iter().map(|run| run.bytes()).sum();
        self.packer.pack(frame, &self.runs, &self.scratch[..filled]);
        Ok(next)
    }

    /// Copies the next pages one by one, and those that are nothing else on into the frame. A page that is looked at and copied on is
    /// still in the processor's nearest cache.
    fn copy(
        &mut self,
        ram: &GuestRam,
        pages: &PageSet,
        from: PageNumber,
        frame: &mut PagesFrame<'_>,
    ) -> Result<Option<PageNumber>, RamError> {
        let frame_number = self.ledger.next_sequence();
        let mut at = from;
        let mut written = ram.next_written(from);
        let mut room = BATCH_PAGES_MAX;
        while room > 0 && frame.fits(room + self.known.as_ref().map_or(0, Known::pages)) {
            let Some((first, count)) = pages.next_run_of_lane(self.lane, self.lanes, at, room as u64) else { return Ok(None) };
            if is_hole(ram, &mut written, first, count) {
                self.zero(frame, Run::new(first, count));
                at = PageNumber(first.0 + count);
                continue;
            }
            let mut zeroes = RunBuilder::default();
            for page in (first.0..first.0 + count).map(PageNumber) {
                // INVARIANT(one-copy): also here, one page at a time.
                let Some(content) = self.scratch.first_chunk_mut::<PAGE_BYTES>() else { return Ok(None) };
                ram.read(page, content)?;
                if *content == ZERO_PAGE {
                    let run = zeroes.add(page);
                    self.zero(frame, run);
                } else if !self.known.as_mut().is_some_and(|known| known.takes(page, content, frame_number, false)) {
                    frame.raw_page(page, content);
                    self.packer.counts.raw += 1;
                    if self.sample.len() < BATCH_PAGES_MAX {
                        self.sample.push(page);
                    }
                }
            }
            self.zero(frame, zeroes.end());
            room -= usize::try_from(count).unwrap_or(room).min(room);
            at = PageNumber(first.0 + count);
        }
        Ok(Some(at))
    }

    fn zero(&mut self, frame: &mut PagesFrame<'_>, run: Option<Run>) {
        if let Some(run) = run {
            self.packer.zero(frame, run);
            self.known.iter_mut().for_each(|known| known.emptied(run.first(), run.count()));
        }
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
        // The frame that these pages go out with, as it is counted by whoever waits for it.
        let frame_number = self.ledger.next_sequence();
        let mut written = ram.next_written(from);
        loop {
            let (changed, waiting) = self.known.as_ref().map_or((0, 0), |known| (known.changed.len(), known.pages()));
            if filled + changed >= BATCH_PAGES_FULL || !frame.fits(BATCH_PAGES_MAX + waiting) {
                break;
            }
            let room = BATCH_PAGES_MAX - filled - changed;
            let Some((first, count)) = pages.next_run_of_lane(self.lane, self.lanes, at, room as u64) else { return Ok(None) };
            if is_hole(ram, &mut written, first, count) {
                self.zero(frame, Run::new(first, count));
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
                    let run = zeroes.add(page);
                    self.zero(frame, run);
                } else if let Some(known) = &mut self.known
                    && known.takes(page, &self.scratch[begin..begin + PAGE_BYTES], frame_number, true)
                {
                    // It goes out as what it resembles.
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
            self.zero(frame, zeroes.end());
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
        self.packer.restart();
        if let Some(known) = &mut self.known {
            known.versions.clear();
        }
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

impl Known {
    /// Pages that wait to be written.
    fn pages(&self) -> usize {
        self.equal.len() + self.changed.len()
    }

    fn emptied(&mut self, first: PageNumber, count: u64) {
        (first.0..first.0 + count).for_each(|page| self.versions.forget(PageNumber(page)));
    }

    /// Whether the page goes out as a duplicate or a difference; what is kept of it is up to date either way.
    fn takes(&mut self, page: PageNumber, content: &[u8], frame: u64, compressing: bool) -> bool {
        if !compressing {
            self.versions.forget(page);
        }
        let lanes = u16::try_from(self.afters.len() + 1).unwrap_or(1);
        if let Some(Origin { page: origin, frame }) = self.duplicates.find_or_enter(content, page, frame, lanes) {
            let lane = lane_of(origin, lanes);
            if let (Some(frame), Some(after)) = (frame, self.afters.iter_mut().find(|after| after.lane == lane)) {
                after.frames = after.frames.max(u64::from(frame) + 1);
            }
            self.versions.forget(page);
            self.equal.push((page, origin));
            return true;
        }
        let at = self.changed.len() * PAGE_BYTES;
        let Some(difference) = self.differences.get_mut(at..at + PAGE_BYTES).filter(|_| compressing) else { return false };
        let differs = self.versions.renew(page, content, difference);
        if differs {
            self.changed.push(page);
        }
        differs
    }

    fn write(&mut self, packer: &mut Packer, frame: &mut PagesFrame<'_>) {
        let mut runs = Vec::new();
        let mut builder = RunBuilder::default();
        for page in self.changed.drain(..) {
            runs.extend(builder.add(page));
        }
        runs.extend(builder.end());
        let bytes: usize = runs.iter().map(|run| run.bytes()).sum();
        // INVARIANT(scratch-bound): `takes` fills at most the differences' scratch.
        if bytes > 0 && !packer.difference(frame, &runs, &self.differences[..bytes]) {
            for page in runs.iter().copied().flat_map(single_pages) {
                packer.raw(frame, page, self.versions.newest(page.first()));
            }
        }
        let mut run: Option<(PageNumber, PageNumber, u64)> = None;
        for (page, origin) in self.equal.drain(..) {
            run = match run {
                Some((first, from, count)) if page.0 == first.0 + count && origin.0 == from.0 + count => Some((first, from, count + 1)),
                before => {
                    write_equal(packer, frame, before);
                    Some((page, origin, 1))
                }
            };
        }
        write_equal(packer, frame, run);
    }
}

/// Whether the guest never wrote these pages. Then they need not be read, which would allocate them; if they are written from here
/// on, the dirty log knows. `written` is the first page that has memory behind it, from where was asked last.
fn is_hole(ram: &GuestRam, written: &mut Option<PageNumber>, first: PageNumber, count: u64) -> bool {
    if written.is_some_and(|written| written < first) {
        *written = ram.next_written(first);
    }
    written.is_none_or(|written| written.0 >= first.0 + count)
}

fn write_equal(packer: &mut Packer, frame: &mut PagesFrame<'_>, run: Option<(PageNumber, PageNumber, u64)>) {
    if let Some((first, origin, count)) = run
        && let Some(run) = Run::new(first, count)
    {
        packer.duplicate(frame, run, origin);
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
