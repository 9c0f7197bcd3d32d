//! Which pages the destination has that equal another: one table for all lanes of a migration.
//!
//! `INVARIANT(origin-holds)`: a page is only named as an origin while the destination's copy cannot change: it went out in
//! the round under way, where no page goes out twice, or in an earlier one and in none since.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use xxhash_rust::xxh3::xxh3_128_with_secret;

use crate::limits::LANES_MAX;
use crate::memory::{PageSet, lane_of};
use crate::types::{LaneIndex, PageNumber, Round};

/// Bytes of the key: XXH3's default secret size.
pub const DUPLICATES_KEY_BYTES: usize = 192;

const SHARDS: usize = 64;
/// Entries that are looked at for one page.
const WAYS: usize = 8;
/// WHY: a table begins small, because most guests are, and doubles as it fills.
const SHARD_ENTRIES_MIN: usize = 64;
const ROUND_BITS: u32 = 24;

/// Pages that went out with their content, by a keyed hash of it. Bounded; what is pushed out is sent again, which costs bytes
/// and nothing else.
pub struct Duplicates {
    /// A guest that does not know it cannot make pages whose hashes collide.
    key: [u8; DUPLICATES_KEY_BYTES],
    shards: Vec<Mutex<Shard>>,
    shard_entries_max: usize,
    /// Pages that went out in a round after the first: what an earlier round brought of them is gone.
    resent: RwLock<(Round, PageSet)>,
    /// Frames that each lane has finished since its join. `INVARIANT(no-circle)`: a frame waits for finished ones only, so no two
    /// wait for each other.
    made: Vec<AtomicU64>,
}

impl std::fmt::Debug for Duplicates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Duplicates").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// A page that the destination has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) page: PageNumber,
    /// The frame that brings it in the round under way, on the lane of the page; nothing when an earlier round brought it.
    pub(super) frame: Option<u32>,
}

#[derive(Default)]
struct Shard {
    entries: Vec<Entry>,
    used: usize,
}

/// 24 bytes for a page: 96 bits of its hash, where it is, and what brought it.
#[derive(Clone, Copy)]
struct Entry {
    hash: u64,
    hash_more: u32,
    frame: u32,
    /// Page number, and the round above it; all ones when empty.
    place: u64,
}

const EMPTY: Entry = Entry { hash: 0, hash_more: 0, frame: 0, place: u64::MAX };

impl Entry {
    fn page(&self) -> PageNumber {
        PageNumber(self.place & ((1 << (u64::BITS - ROUND_BITS)) - 1))
    }

    fn round(&self) -> u64 {
        self.place >> (u64::BITS - ROUND_BITS)
    }

    fn is_of(&self, hash: u64, hash_more: u32) -> bool {
        self.place != u64::MAX && self.hash == hash && self.hash_more == hash_more
    }
}

impl Duplicates {
    /// A table of at most `bytes_max` bytes for a VM with `pages` pages. The key is random, and used for one migration.
    #[must_use]
    pub fn new(pages: u64, bytes_max: usize, key: [u8; DUPLICATES_KEY_BYTES]) -> Self {
        let most = bytes_max / size_of::<Entry>() / SHARDS;
        // The largest power of two that fits, and none that the guest cannot fill.
        let wanted = usize::try_from(pages.div_ceil(SHARDS as u64)).unwrap_or(usize::MAX).saturating_mul(2).next_power_of_two();
        let shard_entries_max = if most == 0 { 0 } else { (1_usize << most.ilog2()).min(wanted).max(WAYS) };
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self {
            key,
            shards,
            shard_entries_max,
            resent: RwLock::new((Round(0), PageSet::empty(pages))),
            made: (0..LANES_MAX).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// A round begins, with these pages. The one before has ended on every lane, and is applied.
    pub fn begin_round(&self, round: Round, pages: &PageSet) {
        let mut resent = self.resent.write().unwrap_or_else(PoisonError::into_inner);
        if round.0 > 1 {
            resent.1.merge(pages);
        }
        resent.0 = round;
    }

    /// The lanes are gone: what of the last round arrived nobody here knows.
    pub fn clear(&self) {
        for shard in &self.shards {
            *shard.lock().unwrap_or_else(PoisonError::into_inner) = Shard::default();
        }
        self.made.iter().for_each(|made| made.store(0, Ordering::Release));
    }

    /// A lane has finished so many frames since its join.
    pub(super) fn made(&self, lane: LaneIndex, frames: u64) {
        if let Some(made) = self.made.get(usize::from(lane.0)) {
            made.store(frames, Ordering::Release);
        }
    }

    /// What the tables take, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let entries: usize = self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).entries.len()).sum();
        entries * size_of::<Entry>()
    }

    /// A page that holds `content` at the destination, other than `page` itself; without one, `page` is entered as such, to
    /// be brought by `frame` of its lane, one of `lanes`, in the round under way.
    pub(super) fn find_or_enter(&self, content: &[u8], page: PageNumber, frame: u64, lanes: u16) -> Option<Origin> {
        if self.shard_entries_max == 0 {
            return None;
        }
        let hash = xxh3_128_with_secret(content, &self.key);
        let [low, high] = [hash, hash >> 64].map(|half| u64::try_from(half & u128::from(u64::MAX)).unwrap_or(0));
        let hash_more = u32::try_from(high >> 32).unwrap_or(0);
        // The low bits of the high half choose the shard, the low half the place in it.
        let shard = usize::try_from(high % SHARDS as u64).unwrap_or(0);
        let resent = self.resent.read().unwrap_or_else(PoisonError::into_inner);
        let round = u64::from(resent.0.0);
        let holds = |entry: &Entry| entry.round() == round || !resent.1.contains(entry.page());
        let mut shard = self.shards.get(shard)?.lock().unwrap_or_else(PoisonError::into_inner);
        let place = page.0 | round << (u64::BITS - ROUND_BITS);
        // A number that does not fit is not entered; nothing is lost but a chance.
        let entry =
            u32::try_from(frame).ok().filter(|_| round < (1 << ROUND_BITS) - 1).map(|frame| Entry { hash: low, hash_more, frame, place });
        let found = shard.find_or_enter(low, hash_more, entry, self.shard_entries_max, holds).filter(|found| found.page() != page)?;
        drop(shard);
        let frame = (found.round() == round).then_some(found.frame);
        let lane = lane_of(found.page(), lanes);
        let made = self.made.get(usize::from(lane.0))?.load(Ordering::Acquire);
        let finished = frame.is_none_or(|frame| u64::from(frame) < made) || lane == lane_of(page, lanes);
        finished.then_some(Origin { page: found.page(), frame })
    }
}

impl Shard {
    fn find_or_enter(
        &mut self,
        hash: u64,
        hash_more: u32,
        entry: Option<Entry>,
        entries_max: usize,
        holds: impl Fn(&Entry) -> bool,
    ) -> Option<Entry> {
        if self.used * 2 >= self.entries.len() && self.entries.len() < entries_max {
            self.grow(entries_max);
        }
        let bucket = Self::bucket(&mut self.entries, hash)?;
        if let Some(found) = bucket.iter_mut().find(|other| other.is_of(hash, hash_more)) {
            if holds(found) {
                return Some(*found);
            }
            if let Some(entry) = entry {
                *found = entry;
            }
            return None;
        }
        let entry = entry?;
        // An empty place, or one that says nothing any more, or the one that the hash points at.
        let at = bucket.iter().position(|other| other.place == u64::MAX).or_else(|| bucket.iter().position(|other| !holds(other)));
        let at = at.unwrap_or_else(|| usize::try_from(hash >> 61).unwrap_or(0) % WAYS);
        let place = bucket.get_mut(at)?;
        self.used += usize::from(place.place == u64::MAX);
        *place = entry;
        None
    }

    fn bucket(entries: &mut [Entry], hash: u64) -> Option<&mut [Entry]> {
        let buckets = entries.len() / WAYS;
        let bucket = usize::try_from(hash).unwrap_or(0) & buckets.checked_sub(1)?;
        entries.get_mut(bucket * WAYS..(bucket + 1) * WAYS)
    }

    fn grow(&mut self, entries_max: usize) {
        let entries = (self.entries.len() * 2).clamp(SHARD_ENTRIES_MIN.min(entries_max), entries_max);
        let before = std::mem::replace(&mut self.entries, vec![EMPTY; entries]);
        self.used = 0;
        for entry in before.into_iter().filter(|entry| entry.place != u64::MAX) {
            let free =
                Self::bucket(&mut self.entries, entry.hash).and_then(|bucket| bucket.iter_mut().find(|other| other.place == u64::MAX));
            if let Some(free) = free {
                *free = entry;
                self.used += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(number: u64) -> Vec<u8> {
        number.to_le_bytes().repeat(512)
    }

    fn table(pages: u64, bytes: usize) -> Duplicates {
        let table = Duplicates::new(pages, bytes, [7; DUPLICATES_KEY_BYTES]);
        table.begin_round(Round(1), &PageSet::full(pages));
        table
    }

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(100);
        for page in pages {
            set.insert(PageNumber(*page));
        }
        set
    }

    #[test]
    fn a_page_that_went_out_in_this_round_is_an_origin_behind_its_frame() {
        let table = table(100, 1 << 20);
        assert_eq!(table.find_or_enter(&content(1), PageNumber(3), 5, 1), None);
        assert_eq!(table.find_or_enter(&content(1), PageNumber(9), 6, 1), Some(Origin { page: PageNumber(3), frame: Some(5) }));
        assert_eq!(table.find_or_enter(&content(2), PageNumber(9), 6, 1), None);
    }

    #[test]
    fn what_went_out_again_since_is_no_origin_and_what_did_not_is() {
        let table = table(100, 1 << 20);
        for page in 1..=3 {
            assert_eq!(table.find_or_enter(&content(page), PageNumber(page), 0, 1), None);
        }
        table.begin_round(Round(2), &set(&[2, 50, 51]));
        // Page 2 will change in this round, whether or not it has gone out yet.
        assert_eq!(table.find_or_enter(&content(2), PageNumber(50), 0, 1), None);
        assert_eq!(table.find_or_enter(&content(1), PageNumber(51), 1, 1), Some(Origin { page: PageNumber(1), frame: None }));
        // Page 50 has it now.
        assert_eq!(table.find_or_enter(&content(2), PageNumber(2), 2, 1), Some(Origin { page: PageNumber(50), frame: Some(0) }));
        table.begin_round(Round(3), &set(&[60]));
        assert_eq!(table.find_or_enter(&content(2), PageNumber(60), 0, 1), None, "page 50 went out again in round 2");
        assert_eq!(table.find_or_enter(&content(3), PageNumber(60), 0, 1), Some(Origin { page: PageNumber(3), frame: None }));
    }

    #[test]
    fn a_frame_that_is_not_finished_is_waited_for_on_its_own_lane_only() {
        let table = Duplicates::new(2048, 1 << 20, [7; DUPLICATES_KEY_BYTES]);
        table.begin_round(Round(1), &PageSet::full(2048));
        table.find_or_enter(&content(1), PageNumber(3), 5, 2);
        // The lane of page 600 may be building what that frame will wait for.
        assert_eq!(table.find_or_enter(&content(1), PageNumber(600), 0, 2), None);
        let origin = Some(Origin { page: PageNumber(3), frame: Some(5) });
        assert_eq!(table.find_or_enter(&content(1), PageNumber(4), 5, 2), origin);
        table.made(LaneIndex(0), 6);
        assert_eq!(table.find_or_enter(&content(1), PageNumber(600), 0, 2), origin);
        table.clear();
        table.find_or_enter(&content(1), PageNumber(3), 5, 2);
        assert_eq!(table.find_or_enter(&content(1), PageNumber(600), 0, 2), None, "frames count from 0 behind a join");
    }

    #[test]
    fn a_page_is_not_its_own_origin() {
        let table = table(100, 1 << 20);
        table.find_or_enter(&content(1), PageNumber(3), 0, 1);
        assert_eq!(table.find_or_enter(&content(1), PageNumber(3), 1, 1), None);
    }

    #[test]
    fn nothing_is_known_of_a_round_that_was_cut_off() {
        let table = table(100, 1 << 20);
        table.find_or_enter(&content(1), PageNumber(3), 0, 1);
        table.clear();
        assert_eq!(table.bytes(), 0);
        assert_eq!(table.find_or_enter(&content(1), PageNumber(4), 0, 1), None);
    }

    #[test]
    fn it_stays_within_its_bytes_and_finds_most() {
        let (pages, bytes) = (100_000, 1 << 20);
        let table = table(pages, bytes);
        for page in 0..pages {
            assert_eq!(table.find_or_enter(&content(page), PageNumber(page), 0, 1), None);
        }
        assert!(table.bytes() <= bytes && table.bytes() > bytes / 4, "{}", table.bytes());
        let again = |table: &Duplicates, pages: std::ops::Range<u64>| {
            pages.filter(|page| table.find_or_enter(&content(*page), PageNumber(page + 1_000_000), 0, 1).is_some()).count()
        };
        assert!(again(&table, pages - 10_000..pages) > 5_000, "what came last is mostly there");
        let roomy = Duplicates::new(pages, 64 << 20, [7; DUPLICATES_KEY_BYTES]);
        roomy.begin_round(Round(1), &PageSet::full(pages));
        for page in 0..pages {
            roomy.find_or_enter(&content(page), PageNumber(page), 0, 1);
        }
        assert!(again(&roomy, 0..pages) > 97_000, "with room for all nearly all are there");
        assert_eq!(Duplicates::new(pages, 0, [7; DUPLICATES_KEY_BYTES]).find_or_enter(&content(1), PageNumber(1), 0, 1), None);
    }
}
