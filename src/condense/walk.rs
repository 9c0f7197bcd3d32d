//! Follows QEMU's stream from its first byte to its device sections: what frames it, and where the pages are.
//!
//! The form is that of `migration/savevm.c` and `migration/ram.c` of QEMU, the same from 7.2 to 10.0 for what is followed here.

mod commands;
mod gathered;

pub(super) use gathered::{Spot, word_of};
use serde::{Deserialize, Serialize};

use super::Unsound;
use super::look::{Look, Stop};
use crate::limits;
use crate::types::{PAGE_BYTES, VmUuid};

/// What a stream is written in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// Nobody here knows.
    Opaque,
    /// That of QEMU, for this guest.
    Qemu(Box<Expected>),
}

/// What a QEMU's stream has to say of its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Of the VM that was permitted.
    pub uuid: VmUuid,
    /// The machine type, such as `pc-q35-7.2`.
    pub machine: String,
    /// RAM of the guest, and what its devices have of their own.
    pub blocks: Vec<RamBlock>,
    /// Whether the guest may run at the destination before all of its pages are there. Then nothing may be unknown, and there is a way
    /// back.
    pub post_copy: bool,
}

/// A block of guest memory, which QEMU knows by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamBlock {
    /// QEMU's name for it.
    pub name: String,
    /// Bytes in use.
    pub used: u64,
    /// Bytes that it may grow to.
    pub max: u64,
}

/// Where a page lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) block: u16,
    pub(super) page: u64,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item {
    /// So many bytes that frame the stream.
    Framing(usize),
    /// So many bytes that announce a page. `follows`: they can be told from what came before.
    Header { bytes: usize, follows: bool },
    /// So many bytes that stand for a page of zeroes.
    Zero { bytes: usize, follows: bool },
    /// The content of a page.
    Page(Place),
    /// So many bytes, behind which the guest can run at the destination, though pages of it follow.
    Split(usize),
    /// Device sections, to the end of the stream.
    Tail,
    /// Nothing that is known, to the end of the stream.
    Opaque,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Magic,
    Configuration,
    Subsections,
    Capabilities(u32),
    Sections,
    Size,
    Blocks(u64),
    Records(Section),
    Content(Section),
    Footer(Section),
    /// Device sections that are needed at once, with so many bytes of them left.
    Package(u32),
    /// In front of the rest of a stream that was split, and lost.
    Again,
    /// Behind the last page of a stream that was split.
    End,
    Ended,
    Tail,
    Opaque,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Setup,
    Part,
    End,
}

#[derive(Debug)]
pub(super) struct Walk {
    expected: Option<Box<Expected>>,
    state: State,
    /// Bytes behind it.
    at: u64,
    uuid_seen: bool,
    /// The section that carries RAM.
    ram: Option<u32>,
    /// Blocks of RAM with their sizes, in the order of the stream.
    blocks: Vec<(Box<str>, u64)>,
    last: Option<Place>,
    /// Whether the guest can run at the destination.
    split: bool,
    why_opaque: Option<&'static str>,
    /// Why nothing in it may be unknown, if nothing may.
    needs: Option<&'static str>,
}

impl Walk {
    pub(super) fn new(grammar: Grammar) -> Self {
        let (expected, state) = match grammar {
            Grammar::Opaque => (None, State::Opaque),
            Grammar::Qemu(expected) => (Some(expected), State::Magic),
        };
        let why_opaque = expected.is_none().then_some("a hypervisor whose streams are not known here");
        let split = expected.as_ref().is_some_and(|expected| expected.post_copy);
        let needs = split.then_some("a stream that is known to its end, as post-copy needs");
        Self { expected, state, at: 0, uuid_seen: false, ram: None, blocks: Vec::new(), last: None, split: false, why_opaque, needs }
    }

    /// The rest of a stream that was split, which begins anew because a gateway was.
    pub(super) fn again(expected: Box<Expected>) -> Self {
        let blocks = expected.blocks.iter().map(|block| (block.name.as_str().into(), block.max)).collect();
        Self { state: State::Again, split: true, blocks, ..Self::new(Grammar::Qemu(expected)) }
    }

    // SPEC: PROTOCOL.md#must-walk
    /// The next item of `bytes`, which begin where the last one ended; nothing when they end inside of it, and then they are less
    /// than [`ITEM_BYTES_MAX`]. What it says is behind it afterwards.
    pub(super) fn next(&mut self, bytes: &[u8]) -> Result<Option<Item>, Unsound> {
        loop {
            if bytes.is_empty() && self.state != State::Opaque {
                return Ok(None);
            }
            match self.step(bytes) {
                Ok(Some(item)) => {
                    self.at += match item {
                        Item::Framing(bytes) | Item::Split(bytes) | Item::Header { bytes, .. } | Item::Zero { bytes, .. } => bytes as u64,
                        Item::Page(_) => PAGE_BYTES as u64,
                        Item::Tail | Item::Opaque => 0,
                    };
                    return Ok(Some(item));
                }
                // Another state looks at the same bytes.
                Ok(None) => {}
                Err(Stop::Short) => return Ok(None),
                Err(Stop::Unknown(why)) => match self.needs {
                    Some(expected) => return Err(Unsound { at: self.at, expected, got: why.to_owned() }),
                    None => (self.why_opaque, self.state) = (Some(why), State::Opaque),
                },
                Err(Stop::Unsound(unsound)) => return Err(unsound),
            }
        }
    }

    /// Whether the content of a page is what comes next.
    pub(super) fn awaits_page(&self) -> bool {
        matches!(self.state, State::Content(_))
    }

    /// Why the rest of the stream is not followed, if it is not.
    pub(super) fn why_opaque(&self) -> Option<&'static str> {
        self.why_opaque
    }

    /// What announces the page behind the last one, in the form that QEMU gives it.
    pub(super) fn following(&self, zero: bool) -> Option<[u8; HEADER_BYTES]> {
        let State::Records(Section::Part | Section::End) = self.state else { return None };
        let page = self.last?.page.checked_add(1)?;
        let kind = if zero { ZERO } else { PAGE };
        page.checked_mul(PAGE_BYTES as u64).map(|offset| (offset | CONTINUE | kind).to_be_bytes())
    }

    /// Whether a stream may end here, but for what its device sections are.
    pub(super) fn may_end(&self) -> Result<(), Unsound> {
        let got = match self.state {
            State::Tail | State::Ended | State::Opaque => return Ok(()),
            other => format!("its end, in `{other:?}`"),
        };
        Err(Unsound { at: self.at, expected: "the device sections", got })
    }

    fn step(&mut self, bytes: &[u8]) -> Result<Option<Item>, Stop> {
        let mut look = Look::new(bytes, self.at);
        let next = match self.state {
            State::Magic => {
                let got = look.u64()?;
                if got != MAGIC {
                    return Err(look.unsound("QEMU's stream of version 3", &format!("{got:#018x}")));
                }
                State::Configuration
            }
            State::Configuration => self.configuration(&mut look)?,
            State::Subsections => self.subsection(&mut look)?,
            State::Capabilities(left) => Self::capability(&mut look, left)?,
            State::Sections => self.section(&mut look)?,
            State::Size => self.size(&mut look)?,
            State::Blocks(left) => self.block(&mut look, left)?,
            State::Records(section) => return self.record(&mut look, section).map(Some),
            State::Content(section) => {
                look.take(PAGE_BYTES)?;
                self.state = State::Records(section);
                let place = self.last.ok_or_else(|| look.unsound("a page that was announced", "none"))?;
                return Ok(Some(Item::Page(place)));
            }
            State::Footer(section) => self.footer(&mut look, section)?,
            State::Again => self.handshake(&mut look)?,
            State::Package(left) => return self.package(&mut look, left).map(Some),
            State::End => self.ended(&mut look)?,
            State::Ended => return Err(look.unsound("the end of the stream", "more of it")),
            State::Tail => return Ok(Some(Item::Tail)),
            State::Opaque => return Ok(Some(Item::Opaque)),
        };
        self.state = next;
        Ok((look.at() > 0).then_some(Item::Framing(look.at())))
    }

    fn configuration(&self, look: &mut Look<'_>) -> Result<State, Stop> {
        if look.u8()? != CONFIGURATION {
            // Of machine types before 2.4.
            return Err(Stop::Unknown("it has no configuration, and so no UUID"));
        }
        let bytes = look.u32()?;
        if bytes > NAME_BYTES_MAX {
            return Err(look.unsound("the name of a machine type", &format!("{bytes} bytes")));
        }
        let machine = look.name(usize::try_from(bytes).unwrap_or(0))?;
        match &self.expected {
            Some(expected) if expected.machine != machine => Err(look.unsound("the machine type of the VM", machine)),
            _ => Ok(State::Subsections),
        }
    }

    fn subsection(&mut self, look: &mut Look<'_>) -> Result<State, Stop> {
        if look.peek()? != SUBSECTION {
            let unsound = || look.unsound("the UUID of the VM in its configuration", "none");
            return if self.uuid_seen { Ok(State::Sections) } else { Err(unsound()) };
        }
        look.u8()?;
        let name = look.short_name()?;
        let version = look.u32()?;
        match (name, version) {
            ("configuration/uuid", 1) => {
                let uuid = VmUuid(look.take(16)?.try_into().map_err(|_| Stop::Short)?);
                if self.uuid_seen || self.expected.as_ref().is_some_and(|expected| expected.uuid != uuid) {
                    return Err(look.unsound("the UUID of the VM, once", &uuid.to_string()));
                }
                self.uuid_seen = true;
                Ok(State::Subsections)
            }
            ("configuration/capabilities", 1) => match look.u32()? {
                count @ 0..=CAPABILITIES_MAX => Ok(State::Capabilities(count)),
                count => Err(look.unsound("a few capabilities", &count.to_string())),
            },
            ("configuration/target-page-bits", 1) => match look.u32()? {
                PAGE_BITS => Ok(State::Subsections),
                _ => Err(Stop::Unknown("its pages are not of 4 KiB")),
            },
            _ => Err(Stop::Unknown("a part of its configuration")),
        }
    }

    fn capability(look: &mut Look<'_>, left: u32) -> Result<State, Stop> {
        let Some(left) = left.checked_sub(1) else { return Ok(State::Subsections) };
        let name = look.short_name()?;
        if SWITCHED_OFF.contains(&name) {
            return Err(look.unsound("none of the capabilities that the gateway has switched off", name));
        }
        Ok(State::Capabilities(left))
    }

    fn section(&mut self, look: &mut Look<'_>) -> Result<State, Stop> {
        match look.u8()? {
            START if !self.split => {
                let (id, name, instance, version) = (look.u32()?, look.short_name()?, look.u32()?, look.u32()?);
                if name != "ram" {
                    return Err(Stop::Unknown("a device that is sent while the guest runs"));
                }
                if self.ram.is_some() || instance != 0 {
                    return Err(look.unsound("one section with RAM", "another"));
                }
                if version != RAM_VERSION {
                    return Err(Stop::Unknown("RAM of another version"));
                }
                self.ram = Some(id);
                Ok(State::Size)
            }
            kind @ (PART | END) => {
                let id = look.u32()?;
                if self.split {
                    // The rest of a stream does not say it again.
                    self.ram.get_or_insert(id);
                }
                if self.ram != Some(id) || self.blocks.is_empty() {
                    return Err(look.unsound("more of the section with RAM", &format!("section {id}")));
                }
                Ok(State::Records(if kind == PART { Section::Part } else { Section::End }))
            }
            FULL if !self.split => Err(Stop::Unknown("a device in front of RAM")),
            COMMAND => self.command(look),
            other => Err(look.unsound("a section", &format!("type {other:#04x}"))),
        }
    }

    fn size(&self, look: &mut Look<'_>) -> Result<State, Stop> {
        let word = look.u64()?;
        let (bytes, flags) = (word & !FLAGS, word & FLAGS);
        let blocks = self.expected.iter().flat_map(|expected| &expected.blocks);
        let most = blocks.map(|block| block.max).fold(0, u64::saturating_add);
        if flags != MEM_SIZE || bytes == 0 || bytes > most {
            return Err(look.unsound("the size of RAM", &format!("{word:#x}")));
        }
        Ok(State::Blocks(bytes))
    }

    fn block(&mut self, look: &mut Look<'_>, left: u64) -> Result<State, Stop> {
        let (name, used) = (look.short_name()?, look.u64()?);
        let unsound = |expected, got: &str| Err(look.unsound(expected, got));
        if self.blocks.len() >= limits::QEMU_BLOCKS_MAX || self.blocks.iter().any(|(known, _)| **known == *name) {
            return unsound("blocks of RAM, each once", name);
        }
        if used == 0 || !used.is_multiple_of(PAGE_BYTES as u64) || used > left {
            return unsound("blocks that have the size of RAM together", &format!("`{name}` of {used} bytes"));
        }
        match self.expected.iter().flat_map(|expected| &expected.blocks).find(|block| block.name == name) {
            // One that may grow may have grown since it was looked at.
            Some(block) if used == block.used || (block.used < block.max && used <= block.max) => {}
            Some(block) => return unsound("a block as large as the VM's", &format!("`{name}` of {used}, not {} bytes", block.used)),
            None => return unsound("a block of the VM", name),
        }
        self.blocks.push((name.into(), used));
        Ok(if used == left { State::Records(Section::Setup) } else { State::Blocks(left - used) })
    }

    fn record(&mut self, look: &mut Look<'_>, section: Section) -> Result<Item, Stop> {
        let word = look.u64()?;
        let (offset, flags) = (word & !FLAGS, word & FLAGS);
        if word == EOS {
            self.state = State::Footer(section);
            return Ok(Item::Framing(look.at()));
        }
        if flags & (XBZRLE | HOOK | COMPRESS) != 0 {
            return Err(Stop::Unknown("pages in a form that is packed already"));
        }
        let kind = flags & !CONTINUE;
        if !matches!(kind, ZERO | PAGE) || section == Section::Setup {
            return Err(look.unsound("a page", &format!("{word:#x}")));
        }
        let block = if flags == kind {
            let name = look.short_name()?;
            self.blocks.iter().position(|(known, _)| **known == *name).ok_or_else(|| look.unsound("a block of RAM", name))?
        } else {
            usize::from(self.last.ok_or_else(|| look.unsound("the name of a block", "none"))?.block)
        };
        let inside = self.blocks.get(block).is_some_and(|(_, used)| offset < *used);
        let Some(block) = u16::try_from(block).ok().filter(|_| inside) else {
            return Err(look.unsound("a page of its block", &format!("{offset:#x}")));
        };
        let place = Place { block, page: offset / PAGE_BYTES as u64 };
        let behind = self.last.filter(|last| last.page.checked_add(1) == Some(place.page) && last.block == block);
        let follows = flags != kind && behind.is_some();
        if kind == ZERO {
            let fill = look.u8()?;
            if fill != 0 {
                return Err(look.unsound("a page of zeroes", &format!("one of {fill:#04x}")));
            }
            self.last = Some(place);
            return Ok(Item::Zero { bytes: look.at(), follows });
        }
        self.last = Some(place);
        self.state = State::Content(section);
        Ok(Item::Header { bytes: look.at(), follows })
    }

    fn footer(&self, look: &mut Look<'_>, section: Section) -> Result<State, Stop> {
        if look.u8()? != FOOTER {
            // Of machine types before 2.4.
            return Err(Stop::Unknown("its sections have no end"));
        }
        let id = look.u32()?;
        if self.ram != Some(id) {
            return Err(look.unsound("the end of the section with RAM", &format!("section {id}")));
        }
        Ok(match section {
            Section::End if self.split => State::End,
            Section::End => State::Tail,
            Section::Setup | Section::Part => State::Sections,
        })
    }
}

/// What an item has at most: the announcement of a page with the longest name, and the page.
pub(super) const ITEM_BYTES_MAX: usize = 512 + PAGE_BYTES;
/// What announces a page of the same block.
pub(super) const HEADER_BYTES: usize = 8;

const MAGIC: u64 = 0x5145_564d_0000_0003;
/// Types of sections.
pub(super) const EOF: u8 = 0;
const START: u8 = 1;
pub(super) const PART: u8 = 2;
pub(super) const END: u8 = 3;
pub(super) const FULL: u8 = 4;
const SUBSECTION: u8 = 5;
pub(super) const DESCRIPTION: u8 = 6;
const CONFIGURATION: u8 = 7;
pub(super) const COMMAND: u8 = 8;
pub(super) const FOOTER: u8 = 0x7e;
const RAM_VERSION: u32 = 4;
/// What stands in the low bits of a page's offset.
const FLAGS: u64 = PAGE_BYTES as u64 - 1;
pub(super) const ZERO: u64 = 0x02;
const MEM_SIZE: u64 = 0x04;
pub(super) const PAGE: u64 = 0x08;
pub(super) const EOS: u64 = 0x10;
const CONTINUE: u64 = 0x20;
const XBZRLE: u64 = 0x40;
const HOOK: u64 = 0x80;
const COMPRESS: u64 = 0x100;
/// All channels wait for each other, where there are several.
pub(super) const MULTIFD_FLUSH: u64 = 0x200;
const PAGE_BITS: u32 = 12;
const NAME_BYTES_MAX: u32 = 255;
/// Of which QEMU has some thirty.
const CAPABILITIES_MAX: u32 = 256;
/// Those that QEMU writes into its stream, and that the driver switches off: with each of them a part of the guest is elsewhere.
const SWITCHED_OFF: [&str; 2] = ["x-ignore-shared", "mapped-ram"];
