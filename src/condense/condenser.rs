//! From a stream to parcels.

use super::digest::StreamDigest;
use super::parcel::{self, Filling, HEAD_BYTES, Parcel};
use super::past::{Index, Kept, Past, Room};
use super::tail;
use super::walk::{ITEM_BYTES_MAX, Item, Place, Walk};
use super::{Grammar, Unsound};
use crate::limits;
use crate::memory::PageCounts;
use crate::types::PAGE_BYTES;

pub use super::past::PAST_KEY_BYTES;

/// Walks over a stream and condenses it. Whatever it was given is in parcels only after the walk.
#[derive(Debug)]
pub struct Condenser {
    walk: Walk,
    past: Past,
    index: Index,
    /// Said in front of everything else.
    room: Option<Room>,
    filling: Filling,
    full: Vec<Parcel>,
    /// Device sections, until all of them are here.
    tail: Option<Vec<u8>>,
    tail_checked: Option<bool>,
    difference: Vec<u8>,
    digest: StreamDigest,
    /// Bytes of parcels that are full.
    closed: u64,
    split: Option<Split>,
    counts: PageCounts,
}

/// Where a stream was split: behind it the guest can run, though pages of it follow.
#[derive(Debug, Clone)]
pub struct Split {
    /// Bytes of the parcels until there.
    pub bytes: u64,
    /// Over the stream until there.
    pub digest: StreamDigest,
}

impl Condenser {
    /// For a stream in this grammar. The destination remembers pages that come for the first time in `first` bytes, both ends those
    /// that come again in `again` bytes; without either every page goes out as it is. The key is random, and used for one stream.
    #[must_use]
    pub fn new(grammar: Grammar, [first, again]: [usize; 2], key: Box<[u8; PAST_KEY_BYTES]>) -> Self {
        let again = again.min(limits::STREAM_PAST_BYTES_MAX / 4);
        let room = Room::in_bytes(first.min(limits::STREAM_PAST_BYTES_MAX - again), again);
        Self {
            walk: Walk::new(grammar),
            past: Past::new(room, false),
            index: Index::new(room, key),
            room: Some(room).filter(|room| room.pages() > 0),
            filling: Filling::new(),
            full: Vec::new(),
            tail: None,
            tail_checked: None,
            difference: Vec::new(),
            digest: StreamDigest::default(),
            closed: 0,
            split: None,
            counts: PageCounts::default(),
        }
    }

    /// Takes the beginning of `bytes`, as much of it as is understood without what comes next; how much that is. All but the last
    /// few thousand bytes.
    ///
    /// # Errors
    /// It is not sound, and none of what is unsound is in a parcel.
    pub fn take_in(&mut self, bytes: &[u8]) -> Result<usize, Unsound> {
        let mut at = 0;
        while let Some(item) = self.walk.next(bytes.get(at..).unwrap_or_default())? {
            let rest = bytes.get(at..).unwrap_or_default();
            at += match item {
                Item::Framing(count) => self.framing(rest, count),
                Item::Header { bytes, follows } => {
                    self.digest.framing(rest.get(..bytes).unwrap_or_default());
                    if !follows {
                        self.put_bytes(rest.get(..bytes).unwrap_or_default());
                    }
                    bytes
                }
                Item::Zero { bytes, follows: false } => {
                    self.counts.zero += 1;
                    self.framing(rest, bytes)
                }
                Item::Zero { bytes, .. } => {
                    self.counts.zero += 1;
                    self.digest.framing(rest.get(..bytes).unwrap_or_default());
                    self.make_room(0);
                    self.filling.add(parcel::ZEROES, 1, &[]);
                    bytes
                }
                Item::Page(place) => self.page(place, rest),
                Item::Split(bytes) => self.split(rest, bytes),
                Item::Tail => self.tail(rest)?,
                Item::Opaque if rest.is_empty() => return Ok(at),
                Item::Opaque => self.framing(rest, rest.len()),
            };
            if item == Item::Tail {
                break;
            }
        }
        Ok(at)
    }

    /// Parcels that are full. With `all` also one that is not.
    pub fn parcels(&mut self, all: bool) -> std::vec::IntoIter<Parcel> {
        if all && !self.filling.is_empty() {
            self.close();
        }
        std::mem::take(&mut self.full).into_iter()
    }

    /// Where the stream was split, if it was: once, and not before something came behind it. WHY: until QEMU has written that, a stream that
    /// breaks has its guest go on by itself, and from there on it has not.
    pub fn take_split(&mut self) -> Option<Split> {
        self.split.take_if(|split| split.digest.bytes() < self.digest.bytes())
    }

    /// Whether the last byte of a stream that was split was taken in. Who writes it may keep it open behind that.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.walk.has_ended()
    }

    /// Lets the device sections go out if they seem to be all there; more cannot come behind a list of them.
    ///
    /// # Errors
    /// They are not those that they list.
    pub fn let_tail_go(&mut self) -> Result<(), Unsound> {
        if self.tail.as_ref().is_some_and(|tail| tail::looks_whole(tail)) { self.release_tail() } else { Ok(()) }
    }

    /// The stream has ended, with `rest` that was not taken.
    ///
    /// # Errors
    /// It may not end here.
    pub fn end(&mut self, rest: &[u8]) -> Result<(), Unsound> {
        self.walk.may_end()?;
        self.release_tail()?;
        if !rest.is_empty() {
            return Err(tail::nothing_more(self.digest.bytes(), rest));
        }
        Ok(())
    }

    /// Bytes of the stream that were taken.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.digest.bytes()
    }

    /// What is remembered here, bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.past.bytes() + self.index.bytes()
    }

    /// Both digests, at the end.
    #[must_use]
    pub fn digest(&mut self) -> StreamDigest {
        std::mem::take(&mut self.digest)
    }

    /// Pages by what became of them. What a codec does to them afterwards is not known here.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Why some of the stream goes as it is, if it does.
    #[must_use]
    pub fn why_opaque(&self) -> Option<&'static str> {
        self.walk.why_opaque().or_else(|| (self.tail_checked == Some(false)).then_some("its device sections are not listed"))
    }

    fn close(&mut self) {
        if !self.filling.is_empty() {
            let parcel = self.filling.take();
            self.closed += parcel.bytes.len() as u64;
            self.full.push(parcel);
        }
        if let Some(Room { first, again }) = self.room.take() {
            // In front of what this parcel gets.
            self.filling.put(parcel::ROOM, first, &again.to_le_bytes());
        }
    }

    fn make_room(&mut self, bytes: usize) {
        if self.room.is_some() || !self.filling.has_room(bytes) {
            self.close();
        }
    }

    fn framing(&mut self, rest: &[u8], count: usize) -> usize {
        let bytes = rest.get(..count).unwrap_or_default();
        self.digest.framing(bytes);
        self.put_bytes(bytes);
        bytes.len()
    }

    /// A parcel ends where the stream is split, so that both ends know the place.
    fn split(&mut self, rest: &[u8], bytes: usize) -> usize {
        let taken = self.framing(rest, bytes);
        self.close();
        self.split = Some(Split { bytes: self.closed, digest: self.digest.clone() });
        taken
    }

    fn put_bytes(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.make_room(bytes.len().min(ITEM_BYTES_MAX));
            let (now, later) = bytes.split_at(bytes.len().min(self.filling.room()));
            self.filling.add(parcel::BYTES, u32::try_from(now.len()).unwrap_or(0), now);
            bytes = later;
        }
    }

    fn page(&mut self, place: Place, rest: &[u8]) -> usize {
        let Some(content) = rest.first_chunk::<PAGE_BYTES>() else { return 0 };
        self.digest.page(content);
        self.make_room(HEAD_BYTES + PAGE_BYTES);
        let (found, memory) = self.index.find(content, &self.past);
        if let Some(memory) = memory {
            let kind = if memory.kept == Kept::First { parcel::SAME_FIRST } else { parcel::SAME_AGAIN };
            self.filling.put(kind, self.past.distance(memory), &[]);
            self.counts.duplicate += 1;
        } else if let Some(memory) = self.changed(place, content) {
            self.filling.put(parcel::CHANGED, self.past.distance(memory), &self.difference);
            self.counts.delta += 1;
        } else {
            self.filling.add(parcel::PAGES, 1, content);
            self.counts.raw += 1;
        }
        if let Some(memory) = self.past.enter(place, content, memory.is_some()) {
            self.index.enter(found, place, memory, &self.past);
        }
        PAGE_BYTES
    }

    /// The version that a page changed from, if the difference is worth it.
    fn changed(&mut self, place: Place, content: &[u8; PAGE_BYTES]) -> Option<super::past::Memory> {
        let memory = self.index.version(place)?;
        let old = self.past.get(memory)?;
        parcel::difference(old, content, &mut self.difference).then_some(memory)
    }

    fn tail(&mut self, rest: &[u8]) -> Result<usize, Unsound> {
        match self.tail_checked {
            Some(false) => return Ok(self.framing(rest, rest.len())),
            Some(true) => return Err(tail::nothing_more(self.digest.bytes(), rest)),
            None => {}
        }
        let tail = self.tail.get_or_insert_default();
        tail.extend_from_slice(rest);
        if tail.len() > limits::STATE_BYTES_MAX {
            let tail = self.tail.take().unwrap_or_default();
            self.tail_checked = Some(false);
            self.framing(&tail, tail.len());
        }
        Ok(rest.len())
    }

    /// `INVARIANT(whole-tail)`
    fn release_tail(&mut self) -> Result<(), Unsound> {
        if let Some(tail) = self.tail.take() {
            self.tail_checked = Some(tail::check(&tail)?);
            self.framing(&tail, tail.len());
        }
        Ok(())
    }
}
