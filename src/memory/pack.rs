//! Codecs of the source: pages that are already copied, as records of a frame.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, ResetDirective, zstd_sys::ZSTD_EndDirective};

use crate::limits::{BATCH_PAGES_MAX, STREAM_OVERHEAD_BYTES_MAX, ZSTD_WINDOW_LOG_MAX};
use crate::memory::{Effort, PageCounts};
use crate::types::{PAGE_BYTES, PageNumber};
use crate::wire::{Codec, CompressionScope, PagesFrame, Run};

/// WHY: a batch that shrinks by less costs the destination a decompression for nothing.
const PACKED_PERCENT_MAX: usize = 94;

/// WHY: differences are mostly zeroes, and the fastest level finds those.
const DIFFERENCE_LEVEL: i32 = 1;

/// Chooses and writes the records of pages that are already copied.
pub(super) struct Packer {
    effort: Effort,
    scope: CompressionScope,
    table: CompressTable,
    packed: Box<[u8]>,
    stream: Stream,
    alone: Option<Alone>,
    pub(super) counts: PageCounts,
}

/// A Zstandard frame that goes on from batch to batch, so that matches reach back.
struct Stream {
    context: Option<CCtx<'static>>,
    /// The level that the frame was begun with; nothing when none is open.
    open: Option<i32>,
    window_log: u32,
}

/// Zstandard frames of one batch each.
struct Alone(CCtx<'static>);

impl Packer {
    /// For a lane that carries `lane_bytes` of guest RAM.
    pub(super) fn new(scope: CompressionScope, effort: Effort, lane_bytes: u64) -> Self {
        // `INVARIANT(page-scope)`: every page is its own record, so that the length of one says nothing about another.
        let page_by_page = scope == CompressionScope::Page;
        let pages_max = if page_by_page { 1 } else { BATCH_PAGES_MAX };
        let table = if page_by_page { CompressTable::small() } else { CompressTable::large() };
        let bytes = pages_max * PAGE_BYTES;
        let packed = vec![0; get_maximum_output_size(bytes).max(zstd_safe::compress_bound(bytes))].into();
        // No wider than what there is to look back to.
        let window_log = lane_bytes.max(1).next_power_of_two().ilog2().clamp(WINDOW_LOG_MIN, ZSTD_WINDOW_LOG_MAX);
        let stream = Stream { context: None, open: None, window_log };
        Self { effort, scope, table, packed, stream, alone: None, counts: PageCounts::default() }
    }

    pub(super) fn set_effort(&mut self, effort: Effort) {
        self.effort = effort;
    }

    pub(super) fn effort(&self) -> Effort {
        self.effort
    }

    pub(super) fn page_by_page(&self) -> bool {
        self.scope == CompressionScope::Page
    }

    /// The destination's side of a stream is gone.
    pub(super) fn restart(&mut self) {
        self.stream.open = None;
    }

    /// What the contexts take, bytes.
    pub(super) fn bytes(&self) -> usize {
        let contexts = self.stream.context.iter().chain(self.alone.as_ref().map(|alone| &alone.0));
        self.packed.len() + contexts.map(CCtx::sizeof).sum::<usize>()
    }

    pub(super) fn zero(&mut self, frame: &mut PagesFrame<'_>, run: Run) {
        self.counts.zero += run.count();
        if self.page_by_page() {
            single_pages(run).for_each(|page| frame.zero(page));
        } else {
            frame.zero(run);
        }
    }

    pub(super) fn duplicate(&mut self, frame: &mut PagesFrame<'_>, run: Run, origin: PageNumber) {
        self.counts.duplicate += run.count();
        frame.duplicate(run, origin);
    }

    /// Pages of `runs` whose content is `bytes`, one after the other.
    pub(super) fn pack(&mut self, frame: &mut PagesFrame<'_>, runs: &[Run], bytes: &[u8]) {
        if self.page_by_page() {
            let pages = runs.iter().copied().flat_map(single_pages).zip(bytes.chunks_exact(PAGE_BYTES));
            pages.for_each(|(page, bytes)| self.pack_together(frame, &[page], bytes));
        } else if !runs.is_empty() {
            self.pack_together(frame, runs, bytes);
        }
    }

    fn pack_together(&mut self, frame: &mut PagesFrame<'_>, runs: &[Run], bytes: &[u8]) {
        if let Some((codec, packed)) = self.compress(bytes)
            && let Some(block) = self.packed.get(..packed)
        {
            frame.batch(codec, runs, block);
            self.counts.compressed += (bytes.len() / PAGE_BYTES) as u64;
            return;
        }
        let mut rest = bytes;
        for run in runs {
            let (pages, after) = rest.split_at(run.bytes().min(rest.len()));
            self.raw(frame, *run, pages);
            rest = after;
        }
    }

    /// Pages as they are.
    pub(super) fn raw(&mut self, frame: &mut PagesFrame<'_>, run: Run, bytes: &[u8]) {
        frame.raw(run, bytes);
        self.counts.raw += run.count();
    }

    /// Differences of pages, packed; false when they do not get smaller, and nothing was written.
    pub(super) fn difference(&mut self, frame: &mut PagesFrame<'_>, runs: &[Run], bytes: &[u8]) -> bool {
        let (codec, packed) = match self.effort {
            Effort::None => return false,
            Effort::Lz4 => (Codec::Lz4, self.lz4(bytes)),
            Effort::Zstd(_) => (Codec::Zstd, self.zstd(DIFFERENCE_LEVEL, bytes)),
        };
        let Some(block) = packed.filter(|packed| *packed < bytes.len()).and_then(|packed| self.packed.get(..packed)) else { return false };
        frame.delta(codec, runs, block);
        self.counts.delta += (bytes.len() / PAGE_BYTES) as u64;
        true
    }

    /// How many bytes of `bytes` are left when packed fast, for whoever wonders whether packing would pay.
    pub(super) fn probe(&mut self, bytes: &[u8]) -> usize {
        self.lz4(bytes).unwrap_or(bytes.len()).min(bytes.len())
    }

    /// Packs at most [`BATCH_PAGES_MAX`] pages of bytes, and says how; the bytes are in [`packed`](Self::packed). Nothing when it is
    /// not worth it.
    pub(super) fn compress(&mut self, bytes: &[u8]) -> Option<(Codec, usize)> {
        let worth = |packed: &usize| *packed * 100 < bytes.len() * PACKED_PERCENT_MAX;
        match self.effort {
            Effort::None => None,
            Effort::Lz4 => self.lz4(bytes).filter(worth).map(|packed| (Codec::Lz4, packed)),
            Effort::Zstd(level) if self.scope == CompressionScope::Stream => self.stream.next(level, bytes, &mut self.packed),
            Effort::Zstd(level) => self.zstd(level, bytes).filter(worth).map(|packed| (Codec::Zstd, packed)),
        }
    }

    /// What was packed last.
    pub(super) fn packed(&self, bytes: usize) -> &[u8] {
        self.packed.get(..bytes).unwrap_or_default()
    }

    fn lz4(&mut self, bytes: &[u8]) -> Option<usize> {
        compress_into_with_table(bytes, &mut self.packed, &mut self.table).ok()
    }

    fn zstd(&mut self, level: i32, bytes: &[u8]) -> Option<usize> {
        if self.alone.is_none() {
            self.alone = CCtx::try_create().map(Alone);
        }
        let context = &mut self.alone.as_mut()?.0;
        let plain = [CParameter::CompressionLevel(level), CParameter::ContentSizeFlag(false), CParameter::DictIdFlag(false)];
        plain.into_iter().try_for_each(|parameter| context.set_parameter(parameter).map(drop)).ok()?;
        context.compress2(&mut *self.packed, bytes).ok()
    }
}

impl Stream {
    /// The next part of the frame; nothing when it is larger than may be, and then another frame begins behind it.
    fn next(&mut self, level: i32, bytes: &[u8], packed: &mut [u8]) -> Option<(Codec, usize)> {
        let codec = if self.open == Some(level) { Codec::ZstdStream } else { Codec::ZstdStart };
        if codec == Codec::ZstdStart {
            self.begin(level)?;
        }
        self.open = None;
        let context = self.context.as_mut()?;
        let most = bytes.len() + STREAM_OVERHEAD_BYTES_MAX;
        let (mut input, mut output) = (InBuffer::around(bytes), OutBuffer::around(packed));
        while context.compress_stream2(&mut output, &mut input, ZSTD_EndDirective::ZSTD_e_flush).ok()? > 0 {
            if output.pos() > most {
                return None;
            }
        }
        let packed = output.pos();
        (packed <= most).then(|| {
            self.open = Some(level);
            (codec, packed)
        })
    }

    fn begin(&mut self, level: i32) -> Option<()> {
        if self.context.is_none() {
            self.context = CCtx::try_create();
        }
        let context = self.context.as_mut()?;
        context.reset(ResetDirective::SessionAndParameters).ok()?;
        let parameters = [
            CParameter::CompressionLevel(level),
            CParameter::WindowLog(self.window_log),
            CParameter::EnableLongDistanceMatching(true),
            CParameter::ContentSizeFlag(false),
            CParameter::DictIdFlag(false),
        ];
        parameters.into_iter().try_for_each(|parameter| context.set_parameter(parameter).map(drop)).ok()
    }
}

pub(super) fn single_pages(run: Run) -> impl Iterator<Item = Run> {
    (run.first().0..run.end().0).filter_map(|page| Run::new(PageNumber(page), 1))
}

/// WHY: less than a batch to look back to is no stream.
const WINDOW_LOG_MIN: u32 = 20;
