//! One channel with pages: who begins it, and its packets.

use super::{Look, Stop, Unsound, Walk};
use crate::condense::walk::Place;
use crate::types::{PAGE_BYTES, VmUuid};

#[derive(Debug)]
pub(super) struct Channel {
    uuid: VmUuid,
    /// Which it is, once it has said so.
    pub(super) id: Option<u8>,
    /// Bytes behind it.
    pub(super) at: u64,
    /// Pages that come, or came with their announcement.
    pub(super) packet: Option<Packet>,
    /// Whether it waits for the main channel and the others.
    pub(super) waits: bool,
}

/// What a packet has.
#[derive(Debug)]
pub(super) struct Packet {
    block: u16,
    /// Numbers of pages, the last first; those of zeroes, which have no content, are in front.
    pages: Vec<u64>,
    /// How many of them are of zeroes.
    zeroes: usize,
    /// Whether the channel waits for the others behind it.
    pub(super) waits: bool,
}

impl Packet {
    /// The next page, and whether it is one of zeroes.
    pub(super) fn first(&self) -> Option<(Place, bool)> {
        let page = *self.pages.last()?;
        Some((Place { block: self.block, page }, self.pages.len() <= self.zeroes))
    }

    pub(super) fn pop(&mut self) {
        self.pages.pop();
    }
}

impl Channel {
    pub(super) fn new(uuid: VmUuid) -> Self {
        Self { uuid, id: None, at: 0, packet: None, waits: false }
    }

    pub(super) fn unsound(&self, expected: &'static str, got: &str) -> Unsound {
        let got = match self.id {
            Some(id) => format!("{got}, in channel {id}"),
            None => format!("{got}, in a channel"),
        };
        Unsound { at: self.at, expected, got }
    }

    /// Takes what stands in front of pages, of which there is none before all channels have `met`; how many bytes that is.
    pub(super) fn next(&mut self, bytes: &[u8], walk: &Walk, met: bool) -> Result<usize, Stop> {
        let mut look = Look::new(bytes, self.at);
        match self.id {
            None => self.id = Some(self.greeting(&mut look)?),
            Some(_) => self.packet = Some(packet(&mut look, walk, met)?),
        }
        self.at += look.at() as u64;
        Ok(look.at())
    }

    fn greeting(&self, look: &mut Look<'_>) -> Result<u8, Stop> {
        if (look.u32()?, look.u32()?) != (MAGIC, VERSION) {
            return Err(look.unsound("the beginning of a channel of version 1", "another"));
        }
        let uuid = VmUuid(look.take(16)?.try_into().map_err(|_| Stop::Short)?);
        if uuid != self.uuid {
            return Err(look.unsound("the UUID of the VM", &uuid.to_string()));
        }
        let id = look.u8()?;
        look.take(GREETING_UNUSED)?;
        Ok(id)
    }
}

/// What announces pages. QEMU gives it the same length always.
fn packet(look: &mut Look<'_>, walk: &Walk, met: bool) -> Result<Packet, Stop> {
    if (look.u32()?, look.u32()?) != (MAGIC, VERSION) {
        return Err(look.unsound("a packet of version 1", "another"));
    }
    let flags = look.u32()?;
    let (room, normal, bytes, _number, zeroes) = (look.u32()?, look.u32()?, look.u32()?, look.u64()?, look.u32()?);
    look.take(UNUSED)?;
    let (name, mut offsets) = (look.take(NAME_BYTES)?, Look::new(look.take(PACKET_PAGES * 8)?, 0));
    if flags & !SYNC != 0 {
        return Err(Stop::Unknown("a packet that is packed, or has no pages"));
    }
    let (of_pages, of_zeroes) = (usize::try_from(normal).unwrap_or(usize::MAX), usize::try_from(zeroes).unwrap_or(usize::MAX));
    let count = of_pages.saturating_add(of_zeroes);
    if count > PACKET_PAGES || count > usize::try_from(room).unwrap_or(0) {
        return Err(look.unsound("a bounded number of pages", &format!("{normal} and {zeroes} of zeroes")));
    }
    // Older ones leave it as it was where there is no page.
    if normal > 0 && u64::from(bytes) != u64::from(normal) * PAGE_BYTES as u64 {
        return Err(look.unsound("as many bytes as it has pages", &format!("{bytes} bytes for {normal}")));
    }
    let waits = flags & SYNC != 0;
    if count == 0 {
        return Ok(Packet { block: 0, pages: Vec::new(), zeroes: 0, waits });
    }
    if !met {
        return Err(look.unsound("to wait for the others in front of the first page", "a page"));
    }
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let name = Look::new(name, 0).name(length)?.to_owned();
    let (block, used) = walk.block_of(&name).ok_or_else(|| look.unsound("a block of RAM", &name))?;
    let mut pages = Vec::with_capacity(count);
    for _ in 0..count {
        let offset = offsets.u64()?;
        if offset >= used || !offset.is_multiple_of(PAGE_BYTES as u64) {
            return Err(look.unsound("a page of its block", &format!("{offset:#x}")));
        }
        pages.push(offset / PAGE_BYTES as u64);
    }
    pages.reverse();
    Ok(Packet { block, pages, zeroes: of_zeroes, waits })
}

const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
/// Behind the number of a channel.
const GREETING_UNUSED: usize = 7 + 32;
/// All channels wait for each other behind this packet.
const SYNC: u32 = 1;
/// LIMIT: pages in a packet: 512 KiB, in every version.
const PACKET_PAGES: usize = 128;
const UNUSED: usize = 28;
const NAME_BYTES: usize = 256;
