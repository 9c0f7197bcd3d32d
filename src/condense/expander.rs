//! From parcels, which a peer sent, to the stream.

use bytes::Bytes;

use super::digest::StreamDigest;
use super::parcel::{self, HEAD_BYTES, MARKS_BYTES};
use super::past::{Kept, Past, Room};
use super::tail;
use super::walk::{ITEM_BYTES_MAX, Item, Walk};
use super::{Grammar, Unsound};
use crate::limits;
use crate::types::PAGE_BYTES;

/// Makes the stream out of parcels, and walks over it as its source did before a byte of it is handed out.
#[derive(Debug)]
pub struct Expander {
    walk: Walk,
    past: Option<Past>,
    parcel: Bytes,
    /// What of the parcel is read.
    read: usize,
    /// The entry that is under way: its kind, and pages of it that are left.
    open: Option<(u8, u32)>,
    /// Whether the entry names a page that is remembered already.
    known: bool,
    /// The stream from here on; `walked` of it may be handed out.
    out: Vec<u8>,
    walked: usize,
    tail: Option<Vec<u8>>,
    tail_checked: Option<bool>,
    digest: StreamDigest,
    split: Option<StreamDigest>,
}

impl Expander {
    /// For a stream in this grammar.
    #[must_use]
    pub fn new(grammar: Grammar) -> Self {
        Self {
            walk: Walk::new(grammar),
            past: None,
            parcel: Bytes::new(),
            read: 0,
            open: None,
            known: false,
            out: Vec::with_capacity(OUT_BYTES + ITEM_BYTES_MAX),
            walked: 0,
            tail: None,
            tail_checked: None,
            digest: StreamDigest::default(),
            split: None,
        }
    }

    /// The next parcel. The one before is read to its end.
    pub fn begin(&mut self, parcel: Bytes) {
        (self.parcel, self.read, self.open) = (parcel, 0, None);
    }

    /// More of the stream; nothing when the parcel is read to its end.
    ///
    /// # Errors
    /// The parcel is none, or what it stands for is not sound. Nothing of that is handed out.
    pub fn expand(&mut self) -> Result<Option<&[u8]>, Unsound> {
        loop {
            self.out.drain(..self.walked);
            self.walked = 0;
            while self.out.len() < OUT_BYTES && self.entry()? {
                self.walk_on()?;
            }
            let done = self.read == self.parcel.len() && self.open.is_none();
            if self.walked > 0 || done {
                let out = self.out.get(..self.walked).unwrap_or_default();
                return Ok((!out.is_empty()).then_some(out));
            }
        }
    }

    /// The digest until the place where the stream was split, once; all of the parcel that ended there was handed out.
    pub fn take_split(&mut self) -> Option<StreamDigest> {
        self.split.take()
    }

    /// The stream has ended: the rest of it, and both digests.
    ///
    /// # Errors
    /// It may not end here.
    pub fn end(&mut self) -> Result<(Vec<u8>, StreamDigest), Unsound> {
        self.walk.may_end()?;
        if self.out.len() > self.walked {
            return Err(self.unsound("the end of the stream", "a part of something more"));
        }
        let tail = self.release_tail()?;
        Ok((tail, std::mem::take(&mut self.digest)))
    }

    /// The device sections, if they seem to be all there, as at the source: a hypervisor with a way back says that its stream has ended
    /// only when the other one has loaded them.
    ///
    /// # Errors
    /// They are not those that they list.
    pub fn let_tail_go(&mut self) -> Result<Vec<u8>, Unsound> {
        if self.tail.as_ref().is_some_and(|tail| tail::looks_whole(tail)) { self.release_tail() } else { Ok(Vec::new()) }
    }

    /// `INVARIANT(whole-tail)`
    fn release_tail(&mut self) -> Result<Vec<u8>, Unsound> {
        let tail = self.tail.take().unwrap_or_default();
        if !tail.is_empty() {
            self.tail_checked = Some(tail::check(&tail)?);
            self.digest.framing(&tail);
        }
        Ok(tail)
    }

    /// Why some of the stream is not known, if it is not.
    #[must_use]
    pub fn why_opaque(&self) -> Option<&'static str> {
        self.walk.why_opaque().or_else(|| (self.tail_checked == Some(false)).then_some("its device sections are not listed"))
    }

    fn unsound(&self, expected: &'static str, got: &str) -> Unsound {
        Unsound { at: self.digest.bytes(), expected, got: got.to_owned() }
    }

    /// Adds what the next entry stands for, or a part of it; false behind the last.
    fn entry(&mut self) -> Result<bool, Unsound> {
        if let Some((kind, left)) = self.open.take() {
            self.one_page(kind)?;
            self.open = left.checked_sub(1).filter(|left| *left > 0).map(|left| (kind, left));
            return Ok(true);
        }
        if self.read == self.parcel.len() {
            return Ok(false);
        }
        let [kind, number @ ..] = self.take::<HEAD_BYTES>()?;
        let number = u32::from_le_bytes(number);
        self.known = matches!(kind, parcel::SAME_FIRST | parcel::SAME_AGAIN);
        match kind {
            parcel::BYTES => {
                let bytes = self.slice(usize::try_from(number).unwrap_or(usize::MAX))?;
                self.out.extend_from_slice(&bytes);
            }
            // SPEC: PROTOCOL.md#must-parcel-bounds
            parcel::PAGES | parcel::ZEROES => {
                if number == 0 || u64::from(number) > limits::FRAME_PAGES_MAX {
                    return Err(self.unsound("a bounded number of pages", &number.to_string()));
                }
                self.open = Some((kind, number));
            }
            parcel::SAME_FIRST | parcel::SAME_AGAIN => {
                let kept = if kind == parcel::SAME_FIRST { Kept::First } else { Kept::Again };
                let content = self.remembered(kept, number)?;
                self.push_page(&content)?;
            }
            parcel::CHANGED => {
                let mut content = self.remembered(Kept::Again, number)?;
                let marks = self.take::<MARKS_BYTES>()?;
                let words = self.slice(parcel::changed_bytes(&marks))?;
                parcel::apply(&marks, &words, &mut content);
                self.push_page(&content)?;
            }
            parcel::ROOM => self.make_past(number)?,
            other => return Err(self.unsound("an entry of a parcel", &format!("kind {other}"))),
        }
        Ok(true)
    }

    // SPEC: PROTOCOL.md#must-room
    /// `INVARIANT(past-bound)`
    fn make_past(&mut self, first: u32) -> Result<(), Unsound> {
        let room = Room { first, again: u32::from_le_bytes(self.take()?) };
        let most = (limits::STREAM_PAST_BYTES_MAX / PAGE_BYTES) as u64;
        if self.past.is_some() || self.digest.bytes() > 0 || !self.out.is_empty() || room.pages() > most {
            return Err(self.unsound("bounded room for pages, once, in front of the stream", &format!("{} pages", room.pages())));
        }
        self.past = Some(Past::new(room, true));
        Ok(())
    }

    fn one_page(&mut self, kind: u8) -> Result<(), Unsound> {
        if kind == parcel::PAGES {
            let content = self.slice(PAGE_BYTES)?;
            return self.push_page(&content);
        }
        let header = self.walk.following(true).filter(|_| self.is_settled());
        let header = header.ok_or_else(|| self.unsound("a page of zeroes behind another page", "one elsewhere"))?;
        self.out.extend_from_slice(&header);
        self.out.push(0);
        Ok(())
    }

    fn push_page(&mut self, content: &[u8]) -> Result<(), Unsound> {
        if !self.walk.awaits_page() {
            let header = self.walk.following(false).filter(|_| self.is_settled());
            let header = header.ok_or_else(|| self.unsound("a page where one may be", "one elsewhere"))?;
            self.out.extend_from_slice(&header);
        } else if !self.is_settled() {
            return Err(self.unsound("all of a page in one entry", "a part of it"));
        }
        self.out.extend_from_slice(content);
        Ok(())
    }

    /// Whether everything until here was walked over.
    fn is_settled(&self) -> bool {
        self.walked == self.out.len()
    }

    fn remembered(&self, kept: Kept, distance: u32) -> Result<[u8; PAGE_BYTES], Unsound> {
        let past = self.past.as_ref();
        let content = past.and_then(|past| past.get(past.at_distance(kept, distance)?));
        // SPEC: PROTOCOL.md#must-remembered
        content.copied().ok_or_else(|| self.unsound("a page that is remembered", &format!("the one {distance} before")))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Unsound> {
        let taken = self.parcel.get(self.read..).and_then(|rest| rest.first_chunk().copied());
        self.read += N;
        taken.ok_or_else(|| self.unsound("a whole entry", "a part of one"))
    }

    /// So many bytes of the parcel.
    fn slice(&mut self, bytes: usize) -> Result<Bytes, Unsound> {
        let end = self.read.checked_add(bytes).filter(|end| *end <= self.parcel.len());
        let end = end.ok_or_else(|| self.unsound("as many bytes as the entry has", "fewer"))?;
        let slice = self.parcel.slice(self.read..end);
        self.read = end;
        Ok(slice)
    }

    /// `INVARIANT(walked-first)`
    fn walk_on(&mut self) -> Result<(), Unsound> {
        while let Some(item) = self.walk.next(self.out.get(self.walked..).unwrap_or_default())? {
            let rest = self.out.get(self.walked..).unwrap_or_default();
            let count = match item {
                Item::Framing(bytes) | Item::Header { bytes, .. } | Item::Zero { bytes, .. } => bytes,
                Item::Split(bytes) => {
                    self.digest.framing(rest.get(..bytes).unwrap_or_default());
                    self.walked += bytes;
                    // SPEC: PROTOCOL.md#must-split-parcel
                    if self.walked < self.out.len() || self.read < self.parcel.len() || self.open.is_some() {
                        return Err(self.unsound("the end of a parcel where the stream is split", "more of it"));
                    }
                    self.split = Some(self.digest.clone());
                    return Ok(());
                }
                Item::Page(place) => {
                    let Some(content) = rest.first_chunk() else { return Ok(()) };
                    self.digest.page(content);
                    let known = self.known;
                    self.past.as_mut().map(|past| past.enter(place, content, known));
                    self.walked += PAGE_BYTES;
                    continue;
                }
                Item::Tail => {
                    let rest = self.out.split_off(self.walked);
                    return self.keep_tail(&rest);
                }
                Item::Opaque if rest.is_empty() => return Ok(()),
                Item::Opaque => rest.len(),
            };
            self.digest.framing(rest.get(..count).unwrap_or_default());
            self.walked += count;
        }
        Ok(())
    }

    fn keep_tail(&mut self, rest: &[u8]) -> Result<(), Unsound> {
        if self.tail_checked == Some(true) {
            return Err(tail::nothing_more(self.digest.bytes(), rest));
        }
        if self.tail_checked != Some(false) {
            let tail = self.tail.get_or_insert_default();
            tail.extend_from_slice(rest);
            if tail.len() <= limits::STATE_BYTES_MAX {
                return Ok(());
            }
            self.tail_checked = Some(false);
        }
        let passed = self.tail.take().unwrap_or_else(|| rest.to_vec());
        self.digest.framing(&passed);
        self.out.extend_from_slice(&passed);
        self.walked = self.out.len();
        Ok(())
    }
}

/// WHY: what is written at once, as much as a socket takes.
const OUT_BYTES: usize = 256 * 1024;
