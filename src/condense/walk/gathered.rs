//! What somebody has to know of a stream who puts pages of other channels into it.

use super::super::look::Look;
use super::{CONTINUE, Expected, Grammar, Place, Section, State, Walk};
use crate::types::PAGE_BYTES;

/// Where a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::condense) enum Spot {
    /// In front of everything that is about pages, or in its list of blocks.
    Ahead,
    /// Behind that list.
    Setup,
    /// In a section with pages.
    Pages { last: bool },
    /// At the end of one, or of the setup.
    Footer { last: bool },
    /// Between two of them.
    Gap,
    /// Behind the last one.
    Behind,
}

impl Walk {
    /// A stream in which nothing may be unknown, and why.
    pub(in crate::condense) fn known(expected: Box<Expected>, needs: &'static str) -> Self {
        Self { needs: Some(needs), ..Self::new(Grammar::Qemu(expected)) }
    }

    /// The rest of a stream, from the place on where it was split.
    pub(in crate::condense) fn behind_split(expected: Box<Expected>) -> Self {
        Self { state: State::Sections, ..Self::again(expected) }
    }

    /// Pages that are waited for, as they come beside that: nothing frames them.
    pub(in crate::condense) fn urgent(expected: Box<Expected>) -> Self {
        Self { state: State::Records(Section::Part), ..Self::again(expected) }
    }

    pub(in crate::condense) fn spot(&self) -> Spot {
        let last = |section| section == Section::End;
        match self.state {
            State::Magic | State::Configuration | State::Subsections | State::Capabilities(_) | State::Size | State::Blocks(_) => {
                Spot::Ahead
            }
            State::Sections if self.ram.is_none() => Spot::Ahead,
            State::Sections => Spot::Gap,
            State::Records(Section::Setup) | State::Content(Section::Setup) => Spot::Setup,
            State::Records(section) | State::Content(section) => Spot::Pages { last: last(section) },
            State::Footer(section) => Spot::Footer { last: last(section) },
            State::Package(_) | State::Again | State::End | State::Ended | State::Tail | State::Opaque => Spot::Behind,
        }
    }

    /// Whether the end of a stream that was split has come.
    pub(in crate::condense) fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// The word that comes next, where it announces a page or something in its place.
    pub(in crate::condense) fn word(&self, bytes: &[u8]) -> Option<u64> {
        let State::Records(_) = self.state else { return None };
        Look::new(bytes, self.at).u64().ok()
    }

    /// Goes on behind a word that is about channels; its length.
    pub(in crate::condense) fn skip_word(&mut self) -> usize {
        self.at += size_of::<u64>() as u64;
        size_of::<u64>()
    }

    /// The page that was announced last.
    pub(in crate::condense) fn last(&self) -> Option<Place> {
        self.last
    }

    /// The number of the section with RAM.
    pub(in crate::condense) fn ram(&self) -> u32 {
        self.ram.unwrap_or(0)
    }

    /// The block of this name, and how many bytes it has.
    pub(in crate::condense) fn block_of(&self, name: &str) -> Option<(u16, u64)> {
        let (block, (_, used)) = self.blocks.iter().enumerate().find(|(_, (known, _))| **known == *name)?;
        u16::try_from(block).ok().map(|block| (block, *used))
    }

    pub(in crate::condense) fn block_name(&self, block: u16) -> &str {
        self.blocks.get(usize::from(block)).map_or("", |(name, _)| name)
    }
}

/// What announces a page.
pub(in crate::condense) fn word_of(place: Place, kind: u64, goes_on: bool) -> u64 {
    (place.page * PAGE_BYTES as u64) | kind | if goes_on { CONTINUE } else { 0 }
}
