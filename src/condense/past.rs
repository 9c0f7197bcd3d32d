//! Pages that a stream has brought: what later ones may equal, or differ from.
//!
//! `INVARIANT(one-past)`: what is entered where follows from the parcels alone, so both ends have the same without a word about it.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_128_with_secret;

use super::walk::Place;
use crate::types::PAGE_BYTES;

/// How many pages each end remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Of those that came for the first time.
    pub(super) first: u32,
    /// Of those that came again.
    pub(super) again: u32,
}

impl Room {
    /// In so many bytes for each.
    pub(super) fn in_bytes(first: usize, again: usize) -> Self {
        let pages = |bytes: usize| u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        Self { first: pages(first), again: pages(again) }
    }

    pub(super) fn pages(self) -> u64 {
        u64::from(self.first) + u64::from(self.again)
    }
}

/// One of the two: a page that has come before is kept beside those that come once and would push it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    First,
    Again,
}

/// A page that is remembered, by how many were entered before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) kept: Kept,
    pub(super) number: u64,
}

/// The pages that came last, in a ring.
#[derive(Debug)]
struct Ring {
    pages_max: u32,
    entered: u64,
    /// What it holds, in pieces that are made when they are needed; none where nobody asks for content.
    pieces: Option<Vec<Box<[u8]>>>,
}

const PIECE_PAGES: usize = 512;

impl Ring {
    fn new(pages_max: u32, with_content: bool) -> Self {
        Self { pages_max, entered: 0, pieces: with_content.then(Vec::new) }
    }

    fn holds(&self, number: u64) -> bool {
        number < self.entered && self.entered - number <= u64::from(self.pages_max)
    }

    fn place(&self, number: u64) -> (usize, usize) {
        let slot = usize::try_from(number % u64::from(self.pages_max.max(1))).unwrap_or(0);
        (slot / PIECE_PAGES, slot % PIECE_PAGES * PAGE_BYTES)
    }

    fn get(&self, number: u64) -> Option<&[u8; PAGE_BYTES]> {
        let (piece, at) = self.place(number);
        let piece = self.pieces.as_ref()?.get(piece).filter(|_| self.holds(number))?;
        piece.get(at..).and_then(|rest| rest.first_chunk())
    }

    fn enter(&mut self, content: &[u8; PAGE_BYTES]) -> Option<u64> {
        if self.pages_max == 0 {
            return None;
        }
        let number = self.entered;
        let (piece, at) = self.place(number);
        if let Some(pieces) = &mut self.pieces {
            if pieces.len() <= piece {
                pieces.push(vec![0; PIECE_PAGES * PAGE_BYTES].into());
            }
            pieces.get_mut(piece).and_then(|piece| piece.get_mut(at..)?.first_chunk_mut()).map(|slot| *slot = *content)?;
        }
        self.entered += 1;
        Some(number)
    }
}

/// What both ends remember.
#[derive(Debug)]
pub(super) struct Past {
    first: Ring,
    again: Ring,
    /// Pages that came, by block.
    came: Vec<Vec<u64>>,
}

impl Past {
    /// The source has its pages of the first kind elsewhere: only what they hash to is asked for.
    pub(super) fn new(room: Room, with_content: bool) -> Self {
        Self { first: Ring::new(room.first, with_content), again: Ring::new(room.again, true), came: Vec::new() }
    }

    /// What it takes.
    pub(super) fn bytes(&self) -> usize {
        let pieces = |ring: &Ring| ring.pieces.as_ref().map_or(0, Vec::len) * PIECE_PAGES * PAGE_BYTES;
        let came: usize = self.came.iter().map(|words| words.len() * size_of::<u64>()).sum();
        pieces(&self.first) + pieces(&self.again) + came
    }

    fn ring(&self, kept: Kept) -> &Ring {
        match kept {
            Kept::First => &self.first,
            Kept::Again => &self.again,
        }
    }

    /// What a memory is, if it is still there.
    pub(super) fn get(&self, memory: Memory) -> Option<&[u8; PAGE_BYTES]> {
        self.ring(memory.kept).get(memory.number)
    }

    pub(super) fn holds(&self, memory: Memory) -> bool {
        self.ring(memory.kept).holds(memory.number)
    }

    /// How many were entered since, and itself: what a peer calls it by.
    pub(super) fn distance(&self, memory: Memory) -> u32 {
        u32::try_from(self.ring(memory.kept).entered - memory.number).unwrap_or(u32::MAX)
    }

    /// The other way round.
    pub(super) fn at_distance(&self, kept: Kept, distance: u32) -> Option<Memory> {
        let number = self.ring(kept).entered.checked_sub(u64::from(distance))?;
        Some(Memory { kept, number }).filter(|memory| self.holds(*memory))
    }

    /// A page came. `known`: it equals one that is remembered, so it need not be again.
    pub(super) fn enter(&mut self, place: Place, content: &[u8; PAGE_BYTES], known: bool) -> Option<Memory> {
        let kept = if self.came(place) { Kept::Again } else { Kept::First };
        if known {
            return None;
        }
        let number = match kept {
            Kept::First => self.first.enter(content),
            Kept::Again => self.again.enter(content),
        }?;
        Some(Memory { kept, number })
    }

    /// Whether it came before; from now on it did.
    fn came(&mut self, place: Place) -> bool {
        let block = usize::from(place.block);
        if self.came.len() <= block {
            self.came.resize_with(block + 1, Vec::new);
        }
        let Some((words, word)) = self.came.get_mut(block).zip(usize::try_from(place.page / 64).ok()) else { return true };
        if words.len() <= word {
            words.resize(word + 1, 0);
        }
        let bit = 1 << (place.page % 64);
        words.get_mut(word).is_none_or(|word| std::mem::replace(word, *word | bit) & bit != 0)
    }
}

/// Finds pages of the past by their content, and the last version of each that came again. The source's alone.
#[derive(Debug)]
pub(super) struct Index {
    /// A guest that does not know it cannot make pages whose hashes collide.
    key: Box<[u8; PAST_KEY_BYTES]>,
    entries: Vec<Entry>,
    versions: HashMap<Place, u64>,
    versions_max: usize,
}

/// Bytes of the key: XXH3's default secret size.
pub const PAST_KEY_BYTES: usize = 192;

#[derive(Debug, Clone, Copy)]
struct Entry {
    hash: u64,
    hash_more: u32,
    kept: Kept,
    number: u64,
}

const EMPTY: Entry = Entry { hash: 0, hash_more: 0, kept: Kept::First, number: u64::MAX };
/// Entries that are looked at for one page.
const WAYS: usize = 4;

impl Index {
    pub(super) fn new(room: Room, key: Box<[u8; PAST_KEY_BYTES]>) -> Self {
        let entries = usize::try_from(room.pages().saturating_mul(2).next_power_of_two()).unwrap_or(0);
        let entries = if room.pages() == 0 { 0 } else { entries.max(WAYS) };
        let versions_max = usize::try_from(room.again).unwrap_or(0);
        Self { key, entries: vec![EMPTY; entries], versions: HashMap::new(), versions_max }
    }

    /// What it takes.
    pub(super) fn bytes(&self) -> usize {
        self.entries.len() * size_of::<Entry>() + self.versions.len() * size_of::<(Place, u64)>()
    }

    fn hash(&self, content: &[u8]) -> (u64, u32) {
        let hash = xxh3_128_with_secret(content, self.key.as_slice());
        let part = |bits: u128| u64::try_from(bits & u128::from(u64::MAX)).unwrap_or(0);
        (part(hash), u32::try_from(hash >> 96).unwrap_or(0))
    }

    fn bucket(&mut self, hash: u64) -> Option<&mut [Entry]> {
        let buckets = self.entries.len() / WAYS;
        let at = usize::try_from(hash).unwrap_or(0) & buckets.checked_sub(1)?;
        self.entries.get_mut(at * WAYS..(at + 1) * WAYS)
    }

    /// A page of the past that has this content.
    pub(super) fn find(&mut self, content: &[u8], past: &Past) -> (Found, Option<Memory>) {
        let (hash, hash_more) = self.hash(content);
        let memory = |entry: &Entry| Memory { kept: entry.kept, number: entry.number };
        let found = self.bucket(hash).and_then(|bucket| bucket.iter().find(|entry| entry.hash == hash && entry.hash_more == hash_more));
        (Found { hash, hash_more }, found.map(memory).filter(|memory| past.holds(*memory)))
    }

    /// The version of a page that was entered last.
    pub(super) fn version(&self, place: Place) -> Option<Memory> {
        self.versions.get(&place).map(|number| Memory { kept: Kept::Again, number: *number })
    }

    /// A page was entered.
    pub(super) fn enter(&mut self, found: Found, place: Place, memory: Memory, past: &Past) {
        let Found { hash, hash_more } = found;
        if let Some(bucket) = self.bucket(hash) {
            let gone = |entry: &Entry| !past.holds(Memory { kept: entry.kept, number: entry.number });
            let at = bucket.iter().position(gone).unwrap_or(usize::try_from(hash >> 62).unwrap_or(0) % WAYS);
            if let Some(entry) = bucket.get_mut(at) {
                *entry = Entry { hash, hash_more, kept: memory.kept, number: memory.number };
            }
        }
        if memory.kept == Kept::Again {
            if self.versions.len() >= self.versions_max {
                self.versions.retain(|_, number| past.holds(Memory { kept: Kept::Again, number: *number }));
            }
            if self.versions.len() < self.versions_max {
                self.versions.insert(place, memory.number);
            }
        }
    }
}

/// What content hashes to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    hash: u64,
    hash_more: u32,
}
