//! What a QEMU that is given a guest writes back to the one that sends it: pages that it waits for, and how it went.
//!
//! The form is that of `source_return_path_thread` in `migration/migration.c` of QEMU.

use super::look::{Look, Stop};
use super::walk::{ITEM_BYTES_MAX, Item, Walk};
use super::{Expected, Grammar, Unsound};
use crate::limits;
use crate::types::PAGE_BYTES;

/// Follows one direction between two hypervisors.
pub trait Follow: Send + std::fmt::Debug {
    /// How many of `bytes`, which begin behind what was taken before, are whole and sound. What is left is less than
    /// [`FOLLOWED_BYTES_MAX`].
    ///
    /// # Errors
    /// What comes next is not sound.
    fn take_in(&mut self, bytes: &[u8]) -> Result<usize, Unsound>;
    /// Pages that were waited for until now.
    fn faults(&self) -> u64 {
        0
    }
}

/// Follows the way back of a stream, message by message.
#[derive(Debug)]
pub struct BackWalk {
    expected: Option<Box<Expected>>,
    at: u64,
    /// Bytes of a bitmap that are to come.
    bitmap: u64,
    /// The block that is asked of when none is named.
    named: Option<usize>,
    faults: u64,
    shut: bool,
}

impl BackWalk {
    /// For the stream of this grammar.
    #[must_use]
    pub fn new(grammar: Grammar) -> Self {
        let expected = match grammar {
            Grammar::Opaque => None,
            Grammar::Qemu(expected) => Some(expected),
        };
        Self { expected, at: 0, bitmap: 0, named: None, faults: 0, shut: false }
    }

    fn whole(&mut self, bytes: &[u8]) -> Result<usize, Unsound> {
        let mut taken = 0;
        loop {
            let rest = bytes.get(taken..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(taken);
            }
            let count = match self.next(rest) {
                Ok(count) => count,
                Err(Stop::Short) => return Ok(taken),
                Err(Stop::Unknown(why)) => return Err(Unsound { at: self.at, expected: "a message of the way back", got: why.to_owned() }),
                Err(Stop::Unsound(unsound)) => return Err(unsound),
            };
            taken += count;
            self.at += count as u64;
        }
    }

    fn next(&mut self, bytes: &[u8]) -> Result<usize, Stop> {
        let mut look = Look::new(bytes, self.at);
        if self.bitmap > 0 {
            let taken = usize::try_from(self.bitmap).unwrap_or(usize::MAX).min(look.left());
            self.bitmap -= taken as u64;
            return Ok(taken);
        }
        if self.shut {
            return Err(look.unsound("nothing behind the end of the way back", "more of it"));
        }
        let (kind, length) = (look.u16()?, look.u16()?);
        match (kind, length) {
            (SHUT, 4) => {
                look.u32()?;
                self.shut = true;
            }
            (PONG | RESUME_ACK, 4) => drop(look.u32()?),
            (SWITCHOVER_ACK, 0) => {}
            (REQ_PAGES, 12) => self.request(&mut look, None)?,
            (REQ_PAGES_ID, 14..=267) => {
                let (start, bytes, name) = (look.u64()?, look.u32()?, look.short_name()?);
                let block = self.block(&look, name)?;
                if usize::from(length) != 13 + name.len() {
                    return Err(look.unsound("the name of a block", &format!("{length} bytes")));
                }
                self.asked(&look, Some(block), start, bytes)?;
            }
            (RECV_BITMAP, 2..=256) => {
                let name = look.short_name()?;
                let block = self.block(&look, name)?;
                // A block that may grow has a bit for what it has in use.
                let (size, most) = (look.u64()?, (self.used(block) / PAGE_BYTES as u64).div_ceil(64) * 8);
                if usize::from(length) != 1 + name.len() || !size.is_multiple_of(8) || size == 0 || size > most {
                    return Err(look.unsound("a bitmap with a bit for each page of its block", &format!("{size} bytes")));
                }
                self.bitmap = size + BITMAP_END_BYTES;
            }
            _ => return Err(look.unsound("a message of the way back", &format!("type {kind} of {length} bytes"))),
        }
        Ok(look.at())
    }

    fn request(&mut self, look: &mut Look<'_>, block: Option<usize>) -> Result<(), Stop> {
        let (start, bytes) = (look.u64()?, look.u32()?);
        self.asked(look, block, start, bytes)
    }

    fn asked(&mut self, look: &Look<'_>, block: Option<usize>, start: u64, bytes: u32) -> Result<(), Stop> {
        let Some(block) = block.or(self.named) else { return Err(look.unsound("the name of a block", "none")) };
        let page = PAGE_BYTES as u64;
        let whole = start.is_multiple_of(page) && u64::from(bytes).is_multiple_of(page);
        if !whole || bytes == 0 || start.checked_add(u64::from(bytes)).is_none_or(|end| end > self.used(block)) {
            return Err(look.unsound("pages of their block", &format!("{bytes:#x} bytes at {start:#x}")));
        }
        self.named = Some(block);
        self.faults += u64::from(bytes) / page;
        Ok(())
    }

    /// Which block of the VM has this name.
    fn block(&self, look: &Look<'_>, name: &str) -> Result<usize, Stop> {
        let blocks = self.expected.iter().flat_map(|expected| &expected.blocks);
        blocks.take(limits::QEMU_BLOCKS_MAX).position(|block| block.name == name).ok_or_else(|| look.unsound("a block of the VM", name))
    }

    /// What a block may have in use.
    fn used(&self, block: usize) -> u64 {
        self.expected.as_ref().and_then(|expected| expected.blocks.get(block)).map_or(0, |block| block.max)
    }
}

// SPEC: PROTOCOL.md#must-walk-back
impl Follow for BackWalk {
    fn take_in(&mut self, bytes: &[u8]) -> Result<usize, Unsound> {
        self.whole(bytes)
    }

    fn faults(&self) -> u64 {
        self.faults
    }
}

// SPEC: PROTOCOL.md#must-walk-again
/// Follows the rest of the stream of a guest that was split, which a hypervisor begins anew when its gateway was started anew.
#[derive(Debug)]
pub struct AgainWalk(Option<Walk>);

impl AgainWalk {
    /// For the stream of this grammar.
    #[must_use]
    pub fn new(grammar: Grammar) -> Self {
        Self(match grammar {
            Grammar::Opaque => None,
            Grammar::Qemu(expected) => Some(Walk::again(expected)),
        })
    }
}

impl Follow for AgainWalk {
    fn take_in(&mut self, bytes: &[u8]) -> Result<usize, Unsound> {
        let unknown = |at| Unsound { at, expected: "the rest of a stream that is known", got: "another".to_owned() };
        let walk = self.0.as_mut().ok_or_else(|| unknown(0))?;
        let mut taken = 0;
        while let Some(item) = walk.next(bytes.get(taken..).unwrap_or_default())? {
            taken += match item {
                Item::Framing(bytes) | Item::Header { bytes, .. } | Item::Zero { bytes, .. } => bytes,
                Item::Page(_) => PAGE_BYTES,
                Item::Split(_) | Item::Tail | Item::Opaque => return Err(unknown(taken as u64)),
            };
        }
        Ok(taken)
    }
}

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;
/// What QEMU puts behind a bitmap.
const BITMAP_END_BYTES: u64 = 8;
/// What is looked at whole: in a stream a page and what announces it, and of the way back the message with the longest name.
pub const FOLLOWED_BYTES_MAX: usize = ITEM_BYTES_MAX;
