//! What lanes carry of a stream: parcels, each a row of entries.
//!
//! An entry begins with its kind and a number, little-endian, as `src/wire/PROTOCOL.md` has them under *Parcels*. A page of an entry
//! is announced by the entry, unless bytes in front of it have announced it.

use crate::limits;
use crate::types::PAGE_BYTES;

/// Kinds of entries.
pub(super) const BYTES: u8 = 1;
pub(super) const PAGES: u8 = 2;
pub(super) const ZEROES: u8 = 3;
pub(super) const SAME_FIRST: u8 = 4;
pub(super) const SAME_AGAIN: u8 = 5;
pub(super) const CHANGED: u8 = 6;
pub(super) const ROOM: u8 = 7;

/// The kind, and the number.
pub(super) const HEAD_BYTES: usize = 5;

/// A row of entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    /// The entries.
    pub bytes: Vec<u8>,
    /// Pages in it as they are.
    pub pages: u64,
}

/// A parcel that is being filled.
#[derive(Debug)]
pub(super) struct Filling {
    bytes: Vec<u8>,
    /// The kind of the last entry, where its number stands, and what it is.
    open: Option<(u8, usize, u32)>,
    /// Pages of any kind.
    pages: u64,
    plain: u64,
}

impl Filling {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::with_capacity(limits::STREAM_CHUNK_BYTES_MAX), open: None, pages: 0, plain: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether another entry with so many bytes fits, or an entry with more of them.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.bytes.len() + HEAD_BYTES + bytes <= limits::STREAM_CHUNK_BYTES_MAX && self.pages < PAGES_MAX
    }

    pub(super) fn room(&self) -> usize {
        limits::STREAM_CHUNK_BYTES_MAX.saturating_sub(self.bytes.len() + HEAD_BYTES)
    }

    /// The parcel; another begins.
    pub(super) fn take(&mut self) -> Parcel {
        let full = std::mem::replace(self, Self::new());
        Parcel { bytes: full.bytes, pages: full.plain }
    }

    /// Adds to the last entry if it is of that kind, and begins one otherwise; `count` is what its number grows by.
    pub(super) fn add(&mut self, kind: u8, count: u32, content: &[u8]) {
        match &mut self.open {
            Some((open, at, number)) if *open == kind => {
                *number = number.saturating_add(count);
                let bytes = number.to_le_bytes();
                self.bytes.iter_mut().skip(*at).zip(bytes).for_each(|(to, from)| *to = from);
            }
            _ => {
                self.bytes.push(kind);
                self.open = Some((kind, self.bytes.len(), count));
                self.bytes.extend_from_slice(&count.to_le_bytes());
            }
        }
        self.bytes.extend_from_slice(content);
        match kind {
            BYTES | ROOM => {}
            PAGES | ZEROES => self.pages += u64::from(count),
            _ => self.pages += 1,
        }
        self.plain += u64::from(count) * u64::from(kind == PAGES);
    }

    /// An entry by itself.
    pub(super) fn put(&mut self, kind: u8, number: u32, content: &[u8]) {
        self.open = None;
        self.add(kind, number, content);
        self.open = None;
    }
}

/// WHY: zeroes take no room, and one parcel must not be work without end.
const PAGES_MAX: u64 = limits::FRAME_PAGES_MAX;

/// Which 8-byte words of a page changed, then those.
pub(super) const MARKS_BYTES: usize = PAGE_BYTES / 64;

/// Writes what tells `new` from `old` into `into`; false when that is not worth it.
pub(super) fn difference(old: &[u8; PAGE_BYTES], new: &[u8; PAGE_BYTES], into: &mut Vec<u8>) -> bool {
    into.clear();
    into.resize(MARKS_BYTES, 0);
    let words = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
    for (index, (_, new)) in words.enumerate().filter(|(_, (old, new))| old != new) {
        if let Some(mark) = into.get_mut(index / 8) {
            *mark |= 1 << (index % 8);
        }
        into.extend_from_slice(new);
    }
    into.len() <= DIFFERENCE_BYTES_MAX
}

/// How many bytes follow the marks.
pub(super) fn changed_bytes(marks: &[u8; MARKS_BYTES]) -> usize {
    marks.iter().map(|mark| usize::try_from(mark.count_ones()).unwrap_or(0) * 8).sum()
}

/// Changes `page` by marks and as many words as they have.
pub(super) fn apply(marks: &[u8; MARKS_BYTES], words: &[u8], page: &mut [u8; PAGE_BYTES]) {
    let mut words = words.as_chunks::<8>().0.iter();
    for (index, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let marked = marks.get(index / 8).is_some_and(|mark| mark & 1 << (index % 8) != 0);
        if let Some(changed) = marked.then(|| words.next()).flatten() {
            *word = *changed;
        }
    }
}

/// WHY: more than that is no smaller than the page, packed.
const DIFFERENCE_BYTES_MAX: usize = PAGE_BYTES / 2;
