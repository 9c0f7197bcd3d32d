//! What the source knows of pages, in files: a gateway that was killed during rounds finds there what is still owed, and goes on.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use crate::memory::PageSet;
use crate::types::{LaneIndex, PageNumber, Round};

/// The pages that the destination does not have.
///
/// No promise: it survives the gateway's process and not the host, and so does the guest's memory.
/// `INVARIANT(owed-or-in-the-log)`: a dirty page is here before the VMM is asked for anything else, so at any moment it is owed
/// here or comes with the next harvest. A write that was cut off leaves pages too many, never too few.
#[derive(Debug)]
pub(super) struct Ledger(File);

/// What a ledger holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) lanes: u16,
    pub(super) round: Round,
    /// Whether the pages are in flight with `round`, or owed behind it.
    pub(super) in_flight: bool,
    pub(super) pages: PageSet,
}

const PAGES: &str = "pages";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 32;
/// The head has a page of the file for itself, so that it is written whole or not at all.
const SET_AT: u64 = 4096;

impl Ledger {
    /// Begins one in `directory`, which is made; nothing is owed in it yet.
    pub(super) fn create(directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        options().truncate(true).open(directory.join(PAGES)).map(Self)
    }

    /// Opens the one of an earlier gateway, of a guest with `pages` pages.
    pub(super) fn open(directory: &Path, pages: u64) -> io::Result<(Self, Left)> {
        let file = options().open(directory.join(PAGES))?;
        let mut head = [0; HEAD_BYTES];
        file.read_exact_at(&mut head, 0)?;
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let counted = u64::from(number(16)) | u64::from(number(20)) << 32;
        let (Ok(lanes), VERSION, true) = (u16::try_from(number(4)), number(0), counted == pages) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a ledger of {counted} pages: expected {pages}")));
        };
        let mut bytes = vec![0; PageSet::empty(pages).words().len() * 8];
        file.read_exact_at(&mut bytes, SET_AT)?;
        let words: Vec<u64> = bytes.chunks_exact(8).filter_map(|word| word.try_into().ok()).map(u64::from_le_bytes).collect();
        let pages = PageSet::from_words(pages, &words);
        Ok((Self(file), Left { lanes, round: Round(number(8)), in_flight: number(12) == 1, pages }))
    }

    /// Behind `round` nothing is in flight, and `pages` are owed.
    pub(super) fn owe(&self, lanes: u16, round: Round, pages: &PageSet) -> io::Result<()> {
        self.settle(lanes, round, pages.pages())?;
        let bytes: Vec<u8> = pages.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        self.0.write_all_at(&bytes, SET_AT)
    }

    /// Behind `round` nothing is in flight; what is owed follows with [`Ledger::owe`], and until then what was in flight is.
    pub(super) fn settle(&self, lanes: u16, round: Round, pages: u64) -> io::Result<()> {
        self.head(lanes, round, false, pages)
    }

    /// What was owed is in flight with `round`.
    pub(super) fn begin(&self, lanes: u16, round: Round, pages: u64) -> io::Result<()> {
        self.head(lanes, round, true, pages)
    }

    fn head(&self, lanes: u16, round: Round, in_flight: bool, pages: u64) -> io::Result<()> {
        let mut head = [0; HEAD_BYTES];
        let numbers = [VERSION, u32::from(lanes), round.0, u32::from(in_flight)];
        for (place, number) in head.chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        head[16..24].copy_from_slice(&pages.to_le_bytes());
        self.0.write_all_at(&head, 0)
    }
}

/// How far each frame of a lane's round reached, in the same directory.
#[derive(Debug)]
pub(in crate::engine) struct LaneLedger {
    file: File,
    entries: u64,
}

/// How far a lane had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Reached {
    /// Frames since the join, this one included.
    pub(in crate::engine) frames: u64,
    /// Frame bytes since the join, this one included.
    pub(in crate::engine) bytes: u64,
    /// Where the next frame goes on; nothing behind the last page.
    pub(in crate::engine) next: Option<PageNumber>,
}

/// Round, frames, bytes and page; a page of the file holds a whole number of them.
const ENTRY_BYTES: usize = 32;

impl LaneLedger {
    /// Makes the file, or opens the one of an earlier gateway.
    pub(in crate::engine) fn open(directory: &Path, lane: LaneIndex) -> io::Result<Self> {
        Ok(Self { file: options().open(directory.join(format!("lane-{}", lane.0)))?, entries: 0 })
    }

    /// A round begins, `bytes` and `frames` behind the join.
    pub(in crate::engine) fn begin(&mut self, round: Round, frames: u64, bytes: u64) -> io::Result<()> {
        self.entries = 0;
        self.note(round, Reached { frames, bytes, next: Some(PageNumber(0)) })
    }

    /// A frame of the round was made. Before it is sent: what the destination has is here.
    pub(in crate::engine) fn note(&mut self, round: Round, reached: Reached) -> io::Result<()> {
        let numbers = [u64::from(round.0), reached.frames, reached.bytes, reached.next.map_or(u64::MAX, |page| page.0)];
        let entry: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.file.write_all_at(&entry, self.entries * ENTRY_BYTES as u64)?;
        self.entries += 1;
        Ok(())
    }

    /// The round that began last, the frame bytes before it, and how far its frames reached. Entries behind them are of
    /// earlier rounds.
    pub(in crate::engine) fn read(&self) -> io::Result<Option<(Round, u64, Vec<Reached>)>> {
        let (mut begun, mut all) = (None, Vec::new());
        for at in 0.. {
            let mut entry = [0; ENTRY_BYTES];
            match self.file.read_exact_at(&mut entry, at * ENTRY_BYTES as u64) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error),
            }
            let number = |at: usize| entry[at * 8..].iter().take(8).rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
            let Ok(round) = u32::try_from(number(0)).map(Round) else { break };
            let reached =
                Reached { frames: number(1), bytes: number(2), next: Some(PageNumber(number(3))).filter(|page| page.0 != u64::MAX) };
            match begun {
                None => begun = Some((round, reached.frames, reached.bytes)),
                Some((first, frames, _)) if first == round && reached.frames == frames + at => all.push(reached),
                Some(_) => break,
            }
        }
        Ok(begun.map(|(round, _, bytes)| (round, bytes, all)))
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(1000);
        for page in pages {
            set.insert(PageNumber(*page));
        }
        set
    }

    #[test]
    fn what_is_owed_is_found_by_whoever_opens_it_next() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("ledger");
        let ledger = Ledger::create(&at).unwrap();
        ledger.owe(3, Round(7), &set(&[1, 64, 999])).unwrap();
        let left = |in_flight, round, pages: &[u64]| Left { lanes: 3, round: Round(round), in_flight, pages: set(pages) };
        assert_eq!(Ledger::open(&at, 1000).unwrap().1, left(false, 7, &[1, 64, 999]));
        ledger.begin(3, Round(8), 1000).unwrap();
        assert_eq!(Ledger::open(&at, 1000).unwrap().1, left(true, 8, &[1, 64, 999]));
        ledger.settle(3, Round(8), 1000).unwrap();
        assert_eq!(Ledger::open(&at, 1000).unwrap().1, left(false, 8, &[1, 64, 999]), "applied and not yet written: owed once more");
        ledger.owe(3, Round(8), &set(&[2])).unwrap();
        assert_eq!(Ledger::open(&at, 1000).unwrap().1, left(false, 8, &[2]));
    }

    #[test]
    fn a_ledger_of_another_guest_or_cut_short_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::create(directory.path()).unwrap();
        assert!(Ledger::open(directory.path(), 1000).is_err(), "nothing is in it");
        ledger.settle(3, Round(0), 1000).unwrap();
        assert!(Ledger::open(directory.path(), 1000).is_err(), "the set is missing");
        ledger.owe(3, Round(0), &set(&[1])).unwrap();
        assert!(Ledger::open(directory.path(), 1001).is_err(), "another size");
        assert!(Ledger::open(directory.path(), 1000).is_ok());
    }

    #[test]
    fn a_lane_finds_its_round_and_nothing_of_the_one_before() {
        let directory = tempfile::tempdir().unwrap();
        let mut lane = LaneLedger::open(directory.path(), LaneIndex(2)).unwrap();
        assert_eq!(lane.read().unwrap(), None);
        let reached = |frames, next: Option<u64>| Reached { frames, bytes: frames * 100, next: next.map(PageNumber) };
        lane.begin(Round(1), 0, 0).unwrap();
        for frame in 1..=5 {
            lane.note(Round(1), reached(frame, Some(frame * 10))).unwrap();
        }
        lane.begin(Round(2), 5, 500).unwrap();
        assert_eq!(lane.read().unwrap(), Some((Round(2), 500, vec![])));
        lane.note(Round(2), reached(6, Some(3))).unwrap();
        lane.note(Round(2), reached(7, None)).unwrap();
        let again = LaneLedger::open(directory.path(), LaneIndex(2)).unwrap();
        assert_eq!(again.read().unwrap(), Some((Round(2), 500, vec![reached(6, Some(3)), reached(7, None)])));
    }

    #[test]
    fn a_lane_that_lost_an_entry_ends_before_it() {
        let directory = tempfile::tempdir().unwrap();
        let mut lane = LaneLedger::open(directory.path(), LaneIndex(0)).unwrap();
        lane.begin(Round(1), 0, 0).unwrap();
        let reached = |frames| Reached { frames, bytes: 0, next: None };
        lane.note(Round(1), reached(1)).unwrap();
        lane.note(Round(1), reached(3)).unwrap();
        assert_eq!(lane.read().unwrap(), Some((Round(1), 0, vec![reached(1)])));
    }
}
