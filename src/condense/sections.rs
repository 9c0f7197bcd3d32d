//! Sections with pages in place of those that a stream had: they take what came of other channels too.

use super::walk::{self, END, EOS, Item, PAGE, PART, Place, Spot, Walk, ZERO};
use crate::types::PAGE_BYTES;

/// What comes out.
#[derive(Debug, Default)]
pub(super) struct Sections {
    pub(super) bytes: Vec<u8>,
    /// The section with pages that is open, and whether it is the last.
    open: Option<bool>,
    /// The block of the last page in it.
    block: Option<u16>,
}

impl Sections {
    /// What `walk`, which was `before`, has found in front of `rest`, if it is a page or frames some; how much of it that was.
    pub(super) fn take(&mut self, walk: &Walk, before: Spot, item: Item, rest: &[u8]) -> Option<usize> {
        match item {
            Item::Framing(count) => {
                self.framing(walk, before, rest.get(..count).unwrap_or_default());
                Some(count)
            }
            Item::Header { bytes, .. } => Some(bytes),
            Item::Zero { bytes, .. } => {
                if let Some(place) = walk.last() {
                    self.page(walk, place, None);
                }
                Some(bytes)
            }
            Item::Page(place) => {
                self.page(walk, place, rest.first_chunk());
                Some(PAGE_BYTES)
            }
            Item::Tail | Item::Split(_) | Item::Opaque => None,
        }
    }

    /// What frames the main channel, which `walk` was `before` and has followed.
    fn framing(&mut self, walk: &Walk, before: Spot, bytes: &[u8]) {
        match (before, walk.spot()) {
            // Sections with pages begin with their first page, and end as one.
            (Spot::Gap | Spot::Ahead, Spot::Pages { last: false }) | (Spot::Footer { .. }, _) => {}
            (_, Spot::Footer { .. }) => {
                self.bytes.extend_from_slice(if before == Spot::Setup { bytes } else { &[] });
                self.close(walk, before == Spot::Setup);
            }
            (Spot::Gap | Spot::Ahead, Spot::Pages { last: true }) => {
                self.close(walk, false);
                self.begin(walk, true);
            }
            _ => {
                self.close(walk, false);
                self.bytes.extend_from_slice(bytes);
            }
        }
    }

    /// A page, or one of zeroes, in the section that is open.
    pub(super) fn page(&mut self, walk: &Walk, place: Place, content: Option<&[u8; PAGE_BYTES]>) {
        if self.open.is_none() {
            self.begin(walk, false);
        }
        let goes_on = self.block.replace(place.block) == Some(place.block);
        let kind = if content.is_some() { PAGE } else { ZERO };
        let word = walk::word_of(place, kind, goes_on);
        self.bytes.extend_from_slice(&word.to_be_bytes());
        if !goes_on {
            let name = walk.block_name(place.block);
            self.bytes.push(u8::try_from(name.len()).unwrap_or(0));
            self.bytes.extend_from_slice(name.as_bytes());
        }
        self.bytes.extend_from_slice(content.map_or(&[0], <[u8; PAGE_BYTES]>::as_slice));
    }

    fn begin(&mut self, walk: &Walk, last: bool) {
        self.bytes.push(if last { END } else { PART });
        self.bytes.extend_from_slice(&walk.ram().to_be_bytes());
        (self.open, self.block) = (Some(last), None);
    }

    /// Ends the section that is open, or that of the setup.
    pub(super) fn close(&mut self, walk: &Walk, setup: bool) {
        if self.open.take().is_some() {
            self.bytes.extend_from_slice(&EOS.to_be_bytes());
        } else if !setup {
            return;
        }
        self.bytes.push(walk::FOOTER);
        self.bytes.extend_from_slice(&walk.ram().to_be_bytes());
    }
}
