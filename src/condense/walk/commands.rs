//! Commands in QEMU's stream: what precedes the pages of a guest that may run before all of them are there, and where it may.

use super::super::look::{Look, Stop};
use super::{COMMAND, EOF, Item, State, Walk};
use crate::limits;
use crate::types::PAGE_BYTES;

impl Walk {
    /// Whether the stream may be split.
    pub(super) fn may_split(&self) -> bool {
        self.expected.as_ref().is_some_and(|expected| expected.post_copy)
    }

    pub(super) fn command(&self, look: &mut Look<'_>) -> Result<State, Stop> {
        let (command, bytes) = (look.u16()?, look.u16()?);
        match (command, bytes) {
            (SWITCHOVER_START, 0) if !self.split => return Ok(State::Sections),
            // Any other is about post-copy, a way back or COLO; one of them starts the guest.
            _ if !self.may_split() => {
                return Err(look.unsound("no command but the start of the switch", &format!("command {command}")));
            }
            (OPEN_RETURN_PATH, 0) if !self.split => {}
            (PING, 4) => drop(look.u32()?),
            (POSTCOPY_ADVISE, 16) if !self.split => {
                // Sizes of pages, of the largest block and of the machine.
                if (look.u64()?, look.u64()?) != (PAGE_BYTES as u64, PAGE_BYTES as u64) {
                    return Err(look.unsound("pages of 4 KiB", "others"));
                }
            }
            (RAM_DISCARD, bytes) if !self.split && bytes <= DISCARD_BYTES_MAX => self.discard(look, usize::from(bytes))?,
            (PACKAGED, 4) if !self.split && !self.blocks.is_empty() => {
                let bytes = look.u32()?;
                let least = PACKAGE_BYTES_MIN..=u32::try_from(limits::STATE_BYTES_MAX).unwrap_or(u32::MAX);
                if !least.contains(&bytes) || look.take(LISTEN.len())? != LISTEN {
                    return Err(look.unsound("bounded device sections of a guest that waits for pages", &format!("{bytes} bytes")));
                }
                return Ok(State::Package(bytes - u32::from(LISTEN_BYTES)));
            }
            _ => return Err(look.unsound("a command of post-copy in its place", &format!("command {command} of {bytes} bytes"))),
        }
        Ok(State::Sections)
    }

    /// Pages that were sent and changed since: a version, a block, and ranges of it.
    fn discard(&self, look: &mut Look<'_>, bytes: usize) -> Result<(), Stop> {
        let begin = look.at();
        let (version, name, end) = (look.u8()?, look.short_name()?, look.u8()?);
        let Some((_, used)) = self.blocks.iter().find(|(known, _)| **known == *name).filter(|_| (version, end) == (0, 0)) else {
            return Err(look.unsound("a block of RAM", name));
        };
        let mut ranges = 0;
        while look.at() - begin < bytes {
            let (start, length) = (look.u64()?, look.u64()?);
            let whole = [start, length].iter().all(|bytes| bytes.is_multiple_of(PAGE_BYTES as u64)) && length > 0;
            if !whole || start.checked_add(length).is_none_or(|end| end > *used) {
                return Err(look.unsound("pages of their block", &format!("{length:#x} bytes at {start:#x}")));
            }
            ranges += 1;
        }
        if look.at() - begin != bytes || ranges == 0 {
            return Err(look.unsound("ranges of pages", &format!("{bytes} bytes")));
        }
        Ok(())
    }

    /// Nobody but its devices knows what is inside; behind it stands what lets the guest run.
    pub(super) fn package(&mut self, look: &mut Look<'_>, left: u32) -> Result<Item, Stop> {
        let inside = usize::try_from(left).unwrap_or(usize::MAX).saturating_sub(RUN.len());
        if inside > 0 {
            let taken = inside.min(look.left());
            look.take(taken)?;
            self.state = State::Package(left.saturating_sub(u32::try_from(taken).unwrap_or(u32::MAX)));
            return Ok(Item::Framing(taken));
        }
        if look.take(RUN.len())? != RUN {
            return Err(look.unsound("the command to run, behind the device sections", "something else"));
        }
        (self.split, self.state) = (true, State::Sections);
        Ok(Item::Split(RUN.len()))
    }

    /// Pages that are there are asked for, and then the rest of a stream goes on.
    pub(super) fn handshake(&self, look: &mut Look<'_>) -> Result<State, Stop> {
        match (look.u8()?, look.u16()?, look.u16()?) {
            (COMMAND, PING, 4) => drop(look.u32()?),
            (COMMAND, RECV_BITMAP, bytes @ 2..=256) => {
                let name = look.short_name()?;
                if usize::from(bytes) != 1 + name.len() || !self.blocks.iter().any(|(known, _)| **known == *name) {
                    return Err(look.unsound("a block of the VM", name));
                }
            }
            (COMMAND, POSTCOPY_RESUME, 0) => return Ok(State::Sections),
            (kind, command, _) => {
                let got = format!("type {kind:#04x}, command {command}");
                return Err(look.unsound("a question for pages that are there, or the command to go on", &got));
            }
        }
        Ok(State::Again)
    }

    pub(super) fn ended(&self, look: &mut Look<'_>) -> Result<State, Stop> {
        match look.u8()? {
            EOF => Ok(State::Ended),
            other => Err(look.unsound("the end of the stream", &format!("type {other:#04x}"))),
        }
    }
}

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;
/// Twelve ranges and the longest name.
const DISCARD_BYTES_MAX: u16 = 512;
const LISTEN: &[u8] = &[COMMAND, 0, 4, 0, 0];
const LISTEN_BYTES: u16 = 5;
const RUN: &[u8] = &[COMMAND, 0, 5, 0, 0];
const PACKAGE_BYTES_MIN: u32 = 10;
