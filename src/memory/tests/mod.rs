//! Source and destination of one migration, joined by lanes that a test holds in its hands.

mod hostile;
mod resemblance;
mod stream;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::memory::{
    DUPLICATES_KEY_BYTES, DecodeError, Decoder, Duplicates, Encoder, GuestRam, MemoryLayout, PageSet, Tracker, digest_ram,
};
use crate::types::{LaneIndex, PAGE_BYTES, PageNumber, RamRegion, Round};
use crate::wire::{After, Compression, CompressionScope, Durability, FRAME_HEADER_BYTES, FrameHeader, FrameKind, StreamTerms, afters};

pub(super) fn terms(lanes: u16, compression: Compression, compression_scope: CompressionScope, length_padding: bool) -> StreamTerms {
    StreamTerms { lanes, compression, compression_scope, length_padding, durability: Durability::None, verify: true }
}

pub(super) fn flat(pages: u64) -> GuestRam {
    GuestRam::anonymous(MemoryLayout::flat(pages).unwrap()).unwrap()
}

/// What a guest may put into a page.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content {
    Zero,
    Random(u64),
    Repetitive(u8),
    HalfRandom(u64),
    /// All zero but the last byte.
    LastByte(u8),
}

impl Content {
    pub(super) fn page(self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        match self {
            Self::Zero => {}
            Self::Random(seed) => noise(seed, &mut page),
            Self::Repetitive(byte) => page.fill(byte),
            Self::HalfRandom(seed) => noise(seed, &mut page[..PAGE_BYTES / 2]),
            Self::LastByte(byte) => page[PAGE_BYTES - 1] = byte,
        }
        page
    }
}

fn noise(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
}

/// A bug planted between the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// A page is taken out of a round after the tracker handed it over.
    SkipPage(PageNumber),
    /// The last frame with pages of a lane's round vanishes.
    DropLastPages(LaneIndex),
    /// The same, and the mark behind it is renumbered to hide that.
    DropLastPagesAndRenumber(LaneIndex),
    /// The mark of a lane's round vanishes.
    DropMark(LaneIndex),
}

/// What a lane has to send of one round.
struct Work {
    round: Round,
    pages: Arc<PageSet>,
    from: Option<PageNumber>,
}

pub(super) struct Pair {
    pub(super) source: GuestRam,
    pub(super) destination: GuestRam,
    pub(super) tracker: Tracker,
    pub(super) encoders: Vec<Encoder>,
    pub(super) decoders: Vec<Decoder>,
    pub(super) fault: Fault,
    dirty: PageSet,
    work: Vec<VecDeque<Work>>,
    lanes: Vec<VecDeque<Vec<u8>>>,
    marks: BTreeMap<Round, usize>,
    duplicates: Option<Arc<Duplicates>>,
    /// Whether lanes wait for each other where frames ask for it.
    pub(super) waits: bool,
}

impl Pair {
    pub(super) fn new(regions: &[RamRegion], terms: &StreamTerms) -> Self {
        let ram = || GuestRam::anonymous(MemoryLayout::new(regions.to_vec()).unwrap()).unwrap();
        let (source, destination) = (ram(), ram());
        let pages = source.pages();
        let lanes = || (0..terms.lanes).map(LaneIndex);
        Self {
            source,
            destination,
            tracker: Tracker::new(pages),
            encoders: lanes().map(|lane| Encoder::new(lane, terms.lanes, terms, pages)).collect(),
            decoders: lanes().map(|lane| Decoder::new(lane, terms.lanes, terms, pages)).collect(),
            fault: Fault::None,
            dirty: PageSet::full(pages),
            work: lanes().map(|_| VecDeque::new()).collect(),
            lanes: lanes().map(|_| VecDeque::new()).collect(),
            marks: BTreeMap::new(),
            duplicates: None,
            waits: true,
        }
    }

    /// The same with encoders that know of equal pages and earlier versions. Rounds must not overlap then.
    pub(super) fn knowing(regions: &[RamRegion], terms: &StreamTerms) -> Self {
        let mut pair = Self::new(regions, terms);
        let pages = pair.source.pages();
        let duplicates = Arc::new(Duplicates::new(pages, 1 << 20, [3; DUPLICATES_KEY_BYTES]));
        let encoder = |lane| Encoder::new(lane, terms.lanes, terms, pages).knowing(Arc::clone(&duplicates), 1 << 20, terms);
        pair.encoders = (0..terms.lanes).map(LaneIndex).map(encoder).collect();
        pair.duplicates = Some(duplicates);
        pair
    }

    /// The guest writes `count` pages, cut at the end of its RAM.
    pub(super) fn write(&mut self, first: u64, count: u64, content: Content) {
        let bytes = content.page();
        for page in (first..first + count).map(PageNumber).take_while(|page| page.0 < self.source.pages()) {
            self.source.write(page, &bytes).unwrap();
            self.dirty.insert(page);
        }
    }

    /// Harvests and gives every lane the new round to send.
    pub(super) fn begin_round(&mut self) {
        self.tracker.owe(&self.dirty.take());
        let (round, mut pages) = self.tracker.begin_round();
        if let Some(duplicates) = &self.duplicates {
            duplicates.begin_round(round, &pages);
        }
        if let Fault::SkipPage(page) = self.fault {
            let mut fewer = PageSet::clone(&pages);
            assert!(fewer.remove(page), "the fault has to hit a page of the round");
            pages = Arc::new(fewer);
        }
        for lane in &mut self.work {
            lane.push_back(Work { round, pages: Arc::clone(&pages), from: Some(PageNumber(0)) });
        }
    }

    /// One lane of the source sends its next frame. False if it has nothing to send.
    pub(super) fn send(&mut self, lane: usize) -> bool {
        let Some(work) = self.work[lane].front_mut() else { return false };
        let mut frame = Vec::new();
        let encoder = &mut self.encoders[lane];
        match work.from {
            Some(from) => work.from = encoder.encode_frame(&self.source, work.round, &work.pages, from, &mut frame).unwrap(),
            None => {
                encoder.round_mark(work.round, &mut frame);
                self.work[lane].pop_front();
            }
        }
        if !frame.is_empty() {
            self.lanes[lane].push_back(frame);
        }
        true
    }

    /// One lane of the destination applies its next frame. False if there is none.
    pub(super) fn deliver(&mut self, lane: usize) -> Result<bool, DecodeError> {
        let Some(frame) = self.lanes[lane].front() else { return Ok(false) };
        let waits_for = |after: After| self.decoders[usize::from(after.lane.0)].standing().frames < after.frames;
        if self.waits && afters(&header_of(frame), &frame[FRAME_HEADER_BYTES..]).any(waits_for) {
            return Ok(false);
        }
        let frame = self.lanes[lane].pop_front().unwrap();
        let (header, body) = frame.split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
        let header = FrameHeader::decode(header).unwrap();
        if let Some(round) = self.decoders[lane].apply(&header, body, &self.destination)? {
            let marks = self.marks.entry(round).or_default();
            *marks += 1;
            if *marks == self.lanes.len() {
                self.tracker.applied(round).unwrap();
            }
        }
        Ok(true)
    }

    /// Every lane breaks; what was on its way is gone.
    pub(super) fn interrupt(&mut self) {
        self.work.iter_mut().for_each(VecDeque::clear);
        self.lanes.iter_mut().for_each(VecDeque::clear);
        self.marks.clear();
        self.encoders.iter_mut().for_each(Encoder::rejoin);
        self.decoders.iter_mut().for_each(Decoder::rejoin);
        self.tracker.interrupted();
        self.duplicates.iter().for_each(|duplicates| duplicates.clear());
    }

    /// Sends and applies everything that is left, and one more round.
    pub(super) fn finish(&mut self) -> Result<(), DecodeError> {
        self.begin_round();
        self.run_out()
    }

    /// Sends and applies everything that is left.
    pub(super) fn run_out(&mut self) -> Result<(), DecodeError> {
        for lane in 0..self.lanes.len() {
            while self.send(lane) {}
        }
        self.plant();
        while !self.lanes.iter().all(VecDeque::is_empty) {
            let mut moved = false;
            for lane in 0..self.lanes.len() {
                while self.deliver(lane)? {
                    moved = true;
                }
            }
            assert!(moved, "every lane waits for another");
        }
        Ok(())
    }

    fn plant(&mut self) {
        match self.fault {
            Fault::None | Fault::SkipPage(_) => {}
            Fault::DropMark(lane) => {
                let mark = self.lanes[usize::from(lane.0)].pop_back().unwrap();
                assert_eq!(header_of(&mark).kind, FrameKind::RoundMark);
            }
            Fault::DropLastPages(lane) | Fault::DropLastPagesAndRenumber(lane) => {
                let frames = &mut self.lanes[usize::from(lane.0)];
                let mark = frames.pop_back().unwrap();
                let lost = header_of(&frames.pop_back().unwrap());
                assert_eq!(lost.kind, FrameKind::Pages);
                let mut header = header_of(&mark);
                if matches!(self.fault, Fault::DropLastPagesAndRenumber(_)) {
                    header.sequence = lost.sequence;
                }
                frames.push_back([&header.encode(), &mark[FRAME_HEADER_BYTES..]].concat());
            }
        }
    }

    pub(super) fn totals_agree(&self) -> bool {
        self.encoders.iter().zip(&self.decoders).all(|(encoder, decoder)| encoder.totals() == decoder.totals())
    }

    pub(super) fn memory_agrees(&self) -> bool {
        digest_ram(&self.source).unwrap() == digest_ram(&self.destination).unwrap()
    }
}

pub(super) fn header_of(frame: &[u8]) -> FrameHeader {
    FrameHeader::decode(frame.first_chunk().unwrap()).unwrap()
}
