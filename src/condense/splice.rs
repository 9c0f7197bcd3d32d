//! The rest of a stream that was split, and the pages that somebody waits for, which come beside it (`postcopy-preempt`): both become one
//! stream, in which those pages are wherever the rest was when they came.
//!
//! Behind a split each page comes once, on either of the two, so what order they take does not matter. No byte comes out but in whole
//! pages, so there is always room for another one.

use super::sections::Sections;
use super::walk::{EOS, Expected, Item, Place, Spot, Walk};
use super::{Follow, Grammar, Unsound};
use crate::types::PAGE_BYTES;

/// What ends the pages that are waited for.
pub const URGENT_END: [u8; 8] = EOS.to_be_bytes();

/// The end of the last section, its number, and the end of the stream.
const END_BYTES: usize = URGENT_END.len() + 5 + 1;

/// Splices.
#[derive(Debug)]
pub struct Splice {
    walk: Walk,
    held: Vec<u8>,
    urgent: UrgentWalk,
    urgent_held: Vec<u8>,
    out: Sections,
}

impl Splice {
    /// For a stream from the place on where it was split.
    #[must_use]
    pub fn behind_split(expected: Box<Expected>) -> Self {
        Self::of(Walk::behind_split(expected.clone()), expected)
    }

    /// For the rest of one that begins anew, because a gateway did.
    #[must_use]
    pub fn again(expected: Box<Expected>) -> Self {
        Self::of(Walk::again(expected.clone()), expected)
    }

    fn of(walk: Walk, expected: Box<Expected>) -> Self {
        let urgent = UrgentWalk(Some(Walk::urgent(expected)));
        Self { walk, held: Vec::new(), urgent, urgent_held: Vec::new(), out: Sections::default() }
    }

    /// Takes more of the rest of the stream.
    ///
    /// # Errors
    /// It is not sound.
    pub fn take_in(&mut self, bytes: &[u8]) -> Result<(), Unsound> {
        self.held.extend_from_slice(bytes);
        self.go_on()
    }

    /// Takes more of the pages that are waited for, when [`takes_urgent`](Self::takes_urgent) says so.
    ///
    /// # Errors
    /// They are not sound.
    pub fn take_urgent(&mut self, bytes: &[u8]) -> Result<(), Unsound> {
        self.urgent_held.extend_from_slice(bytes);
        let mut pages = Vec::new();
        let taken = self.urgent.follow(&self.urgent_held, |place, at| pages.push((place, at)))?;
        for (place, at) in pages {
            let content = at.and_then(|at| self.urgent_held.get(at..)).and_then(<[u8]>::first_chunk);
            self.out.page(&self.walk, place, content);
        }
        self.urgent_held.drain(..taken);
        if !matches!(self.walk.spot(), Spot::Pages { .. }) {
            // The rest may be long in coming.
            self.out.close(&self.walk, false);
        }
        self.go_on()
    }

    /// Whether there is a place for pages that are waited for.
    #[must_use]
    pub fn takes_urgent(&self) -> bool {
        !self.urgent.has_ended() && matches!(self.walk.spot(), Spot::Pages { .. } | Spot::Gap | Spot::Footer { last: false })
    }

    /// Whether nothing of the rest is missing, so that what there is of pages that are waited for is all there will be.
    #[must_use]
    pub fn awaits_end(&self) -> bool {
        self.held.len() >= END_BYTES && self.is_last(&self.held) && !self.urgent.has_ended()
    }

    /// Whether the end of the last section comes next. Behind it nothing takes a page any more.
    fn is_last(&self, rest: &[u8]) -> bool {
        self.walk.spot() == Spot::Pages { last: true } && self.walk.word(rest) == Some(EOS)
    }

    /// Whether more of the rest is of use now.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        self.held.len() < super::FOLLOWED_BYTES_MAX
    }

    /// What has come out since this was asked last.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out.bytes
    }

    /// Both have ended.
    ///
    /// # Errors
    /// They may not end here.
    pub fn end(&self) -> Result<(), Unsound> {
        self.walk.may_end()?;
        if !self.held.is_empty() || !self.urgent.has_ended() {
            return Err(Unsound { at: 0, expected: "the end of the stream", got: "a part of something more".to_owned() });
        }
        Ok(())
    }

    fn go_on(&mut self) -> Result<(), Unsound> {
        let mut at = 0;
        loop {
            let (rest, before) = (self.held.get(at..).unwrap_or_default(), self.walk.spot());
            if self.is_last(rest) && !self.urgent.has_ended() {
                break;
            }
            let Some(item) = self.walk.next(rest)? else { break };
            let Some(count) = self.out.take(&self.walk, before, item, rest) else {
                return Err(Unsound { at: at as u64, expected: "the rest of a stream that was split", got: "another".to_owned() });
            };
            at += count;
        }
        self.held.drain(..at);
        Ok(())
    }
}

// SPEC: PROTOCOL.md#must-walk-urgent
/// Follows pages that are waited for, which come beside the rest of a stream, to their end.
#[derive(Debug)]
pub struct UrgentWalk(Option<Walk>);

impl UrgentWalk {
    /// For the stream of this grammar.
    #[must_use]
    pub fn new(grammar: Grammar) -> Self {
        Self(match grammar {
            Grammar::Opaque => None,
            Grammar::Qemu(expected) => Some(Walk::urgent(expected)),
        })
    }

    /// Whether their end has come.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.as_ref().is_some_and(|walk| matches!(walk.spot(), Spot::Footer { .. }))
    }

    /// Tells of each page, and where its content is if it has one; how many of `bytes` were taken.
    fn follow(&mut self, bytes: &[u8], mut page: impl FnMut(Place, Option<usize>)) -> Result<usize, Unsound> {
        let unsound = |at: usize, got: &str| Unsound { at: at as u64, expected: "pages that are waited for", got: got.to_owned() };
        let mut at = 0;
        while at < bytes.len() {
            if self.has_ended() {
                return Err(unsound(at, "more behind their end"));
            }
            let walk = self.0.as_mut().ok_or_else(|| unsound(0, "a stream that is not known"))?;
            let Some(item) = walk.next(bytes.get(at..).unwrap_or_default())? else { break };
            at += match item {
                Item::Framing(count) | Item::Header { bytes: count, .. } => count,
                Item::Zero { bytes: count, .. } => {
                    walk.last().into_iter().for_each(|place| page(place, None));
                    count
                }
                Item::Page(place) => {
                    page(place, Some(at));
                    PAGE_BYTES
                }
                Item::Split(_) | Item::Tail | Item::Opaque => return Err(unsound(at, "something else")),
            };
        }
        Ok(at)
    }
}

impl Follow for UrgentWalk {
    fn take_in(&mut self, bytes: &[u8]) -> Result<usize, Unsound> {
        self.follow(bytes, |_, _| {})
    }
}
