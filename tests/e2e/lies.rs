//! Streams of a QEMU that lie, each by one change to a sound one: what is changed, and what is said of it.
//!
//! Where nothing is said, the lie is in what gateways do not follow, and QEMU itself refuses it.

use crate::guest::UUID;

/// What happens to a stream.
#[derive(Debug, Clone)]
pub enum Change {
    /// The first of these byte strings that comes is replaced.
    Replace(Vec<(Vec<u8>, Vec<u8>)>),
    /// The bit at this place is another.
    Flip(usize, u8),
    /// It ends behind so many bytes.
    Cut(usize),
    /// It ends behind these bytes.
    CutBehind(Vec<u8>),
    /// It has more bytes.
    Append(Vec<u8>),
    Nothing,
}

/// A stream on its way.
pub struct Changer {
    change: Change,
    held: Vec<u8>,
    passed: usize,
    done: bool,
    cut: bool,
}

impl Changer {
    pub fn new(change: Change) -> Self {
        Self { change, held: Vec::new(), passed: 0, done: false, cut: false }
    }

    /// Nothing follows what was fed last.
    pub fn has_cut(&self) -> bool {
        self.cut
    }

    /// More of it, changed; nothing is its end.
    pub fn feed(&mut self, more: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(more);
        let find = |held: &[u8], what: &[u8]| held.windows(what.len()).position(|window| window == what);
        let (held, ends) = (&mut self.held, more.is_empty());
        match &self.change {
            Change::Replace(pairs) if !self.done => {
                if let Some((at, (what, by))) = pairs.iter().find_map(|pair| Some((find(held, &pair.0)?, pair))) {
                    held.splice(at..at + what.len(), by.iter().copied());
                    self.done = true;
                }
            }
            Change::Flip(at, bit) if (self.passed..self.passed + held.len()).contains(at) && !self.done => {
                held[at - self.passed] ^= 1 << bit;
                self.done = true;
            }
            Change::Cut(at) if *at <= self.passed + held.len() => {
                held.truncate(at - self.passed);
                self.cut = true;
            }
            Change::CutBehind(what) => {
                if let Some(at) = find(held, what) {
                    held.truncate(at + what.len());
                    self.cut = true;
                }
            }
            Change::Append(more) if ends => held.extend_from_slice(more),
            _ => {}
        }
        // What is looked for may be cut in two. Nothing else is held back: whoever waits for it may have to be first.
        let looks = matches!(self.change, Change::Replace(_) | Change::CutBehind(_)) && !ends && !self.cut && !self.done;
        let keep = if looks { held.len().min(64) } else { 0 };
        let ready: Vec<u8> = held.drain(..held.len() - keep).collect();
        self.passed += ready.len();
        ready
    }
}

/// A change that nobody may take.
pub struct Lie {
    pub name: &'static str,
    pub change: Change,
    pub expected: &'static str,
}

fn lie(name: &'static str, find: &[u8], by: &[u8], expected: &'static str) -> Lie {
    Lie { name, change: Change::Replace(vec![(find.to_vec(), by.to_vec())]), expected }
}

fn ends(name: &'static str, change: Change, expected: &'static str) -> Lie {
    Lie { name, change, expected }
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// The section with RAM is the first that QEMU has.
const START: &[u8] = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04";
/// Where the list of blocks ends and the first pages begin.
const LISTED: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01\x02\0\0\0\x01";
const TIMER: &[u8] = b"\x04\0\0\0\0\x05timer\0\0\0\0\0\0\0\x02";

/// About a guest whose firmware has so many bytes.
pub fn lies(bios: u64) -> Vec<Lie> {
    [of_the_head(), of_the_vm(), of_sections(), of_blocks(bios), of_pages(), of_commands(), of_devices()].into_iter().flatten().collect()
}

fn of_the_head() -> Vec<Lie> {
    vec![
        ends("no stream", Change::Cut(0), "expected the device sections"),
        ends("a part of a magic number", Change::Cut(5), "expected the device sections"),
        ends("a part of a machine type", Change::Cut(17), "expected the device sections"),
        ends("a part of a UUID", Change::Cut(55), "expected the device sections"),
        lie("another magic number", b"QEVM", b"QIMG", "version 3"),
        lie("another version", b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x04", "version 3"),
        lie("its head twice", b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x03QEVM\0\0\0\x03", ""),
        lie("no configuration", b"\x03\x07\0\0\0\x0d", b"\x03\x09\0\0\0\x0d", ""),
        lie("a machine type without end", b"\x07\0\0\0\x0d", b"\x07\xff\xff\xff\xff", "the name of a machine type"),
        lie("a machine type that is cut", b"\x07\0\0\0\x0d", b"\x07\0\0\0\x0c", "the machine type of the VM"),
        lie("another machine type", b"pc-i440fx-7.2", b"pc-i440fx-7.1", "the machine type of the VM"),
        lie("a machine type that moves a terminal", b"pc-i440fx", b"pc\x1bi440fx", "a printable name"),
    ]
}

fn of_the_vm() -> Vec<Lie> {
    let hex = UUID.replace('-', "");
    let uuid: Vec<u8> = (0..32).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    let another: Vec<u8> = uuid.iter().map(|byte| byte ^ 1).collect();
    let part = |version: u8, uuid: &[u8]| join(&[b"\x05\x12configuration/uuid\0\0\0", &[version], uuid]);
    let own = part(1, &uuid);
    let capabilities =
        |count: u8, names: &[u8]| join(&[b"\x05\x1aconfiguration/capabilities\0\0\0\x01", &[count], b"\0\0\x01", names, &own]);
    vec![
        lie("another UUID", &own, &part(1, &another), "the UUID of the VM"),
        lie("no UUID", &own, b"", "the UUID of the VM"),
        lie("two UUIDs", &own, &join(&[&own, &own]), "the UUID of the VM, once"),
        lie("a UUID of another version", &own, &part(2, &uuid), ""),
        lie("capabilities without end", &own, &capabilities(0xff, b""), "a few capabilities"),
        lie("memory elsewhere", &own, &capabilities(0, b"\x0amapped-ram"), "none of the capabilities"),
        lie("an unknown part", &own, &join(&[b"\x05\x04evil\0\0\0\x01", &own]), ""),
        lie("a part with a name without end", &own, &join(&[b"\x05\xff", &own]), "a printable name"),
    ]
}

fn of_sections() -> Vec<Lie> {
    let ends = |footer: &[u8], part: &[u8]| join(&[b"\0\0\0\0\0\0\0\x10", footer, part]);
    let (footer, part) = (b"\x7e\0\0\0\x01".as_slice(), b"\x02\0\0\0\x01".as_slice());
    vec![
        lie("an unknown type", START, b"\x09\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04", "expected a section"),
        lie("a device in front of RAM", START, &join(&[TIMER, START]), ""),
        lie("another device that is sent", START, b"\x01\0\0\0\x01\x03rom\0\0\0\0\0\0\0\x04", ""),
        lie("another instance", START, b"\x01\0\0\0\x01\x03ram\0\0\0\x01\0\0\0\x04", "one section with RAM"),
        lie("another version of RAM", START, b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x03", ""),
        lie("more before the beginning", START, &join(&[part, START]), "more of the section with RAM"),
        lie("RAM twice", LISTED, &ends(footer, &join(&[START, part])), "one section with RAM"),
        lie("the end of another section", LISTED, &ends(b"\x7e\0\0\0\x09", part), "the end of the section with RAM"),
        lie("no end of a section", LISTED, &ends(b"", part), ""),
        lie("more of another section", LISTED, &ends(footer, b"\x02\0\0\0\x07"), "more of the section with RAM"),
        lie("the last of another section", LISTED, &ends(footer, b"\x03\0\0\0\x07"), "more of the section with RAM"),
    ]
}

fn of_blocks(bios: u64) -> Vec<Lie> {
    let first = |size: u64, name: &[u8], used: u64| join(&[&size.to_be_bytes(), name, &used.to_be_bytes()]);
    // Of 64 MiB, its firmware, and what devices have of their own.
    let (all, ram) = (0x0404_2004 + bios, 0x0400_0000);
    let sound = first(all, b"\x06pc.ram", ram);
    vec![
        lie("no memory", &sound, &first(4, b"\x06pc.ram", ram), "the size of RAM"),
        lie("a size without its mark", &sound, &first(all & !4, b"\x06pc.ram", ram), "the size of RAM"),
        lie("memory without end", &sound, &first(u64::MAX << 12 | 4, b"\x06pc.ram", ram), "the size of RAM"),
        lie("less than its blocks", &sound, &first(0x0300_0004, b"\x06pc.ram", ram), "the size of RAM together"),
        lie("a smaller block", &sound, &first(all, b"\x06pc.ram", 0x0300_0000), "a block as large as the VM's"),
        lie("a larger block", &sound, &first(all, b"\x06pc.ram", 0x0408_0000), "the size of RAM together"),
        lie("an empty block", &sound, &first(all, b"\x06pc.ram", 0), "the size of RAM together"),
        lie("a part of a page", &sound, &first(all, b"\x06pc.ram", ram + 1), "the size of RAM together"),
        lie("another block", &sound, &first(all, b"\x06pc.rim", ram), "a block of the VM"),
        lie("a name without end", &sound, &first(all, b"\xffpc.ram", ram), "a printable name"),
        lie("a block without a name", &sound, &first(all, b"\0", ram), "a printable name"),
        lie("a block twice", b"\x07pc.bios", b"\x06pc.ram", "blocks of RAM, each once"),
    ]
}

fn of_pages() -> Vec<Lie> {
    // Whether it is one of zeroes is the guest's affair.
    let page = |kind: u8, high: u8, name: &[u8]| join(&[&[0, 0, 0, high, 0, 0, 0, kind], name]);
    let named = b"\x06pc.ram".as_slice();
    let either = |name, change: &dyn Fn(u8) -> Vec<u8>, expected| {
        let pairs = [2, 8].map(|kind| (join(&[b"\x02\0\0\0\x01", &page(kind, 0, named)]), join(&[b"\x02\0\0\0\x01", &change(kind)])));
        Lie { name, change: Change::Replace(pairs.to_vec()), expected }
    };
    vec![
        either("a page outside of its block", &|kind| page(kind, 1, named), "a page of its block"),
        either("a page far outside", &|kind| join(&[&[0xff; 6], &[0xf0, kind], named]), "a page of its block"),
        either("a page of no block", &|kind| page(kind | 0x20, 0, b""), "the name of a block"),
        either("a page of another block", &|kind| page(kind, 0, b"\x06pc.rim"), "a block of RAM"),
        either("a page of two kinds", &|_| page(0x0a, 0, named), "expected a page"),
        either("a page of no kind", &|_| page(0, 0, named), "expected a page"),
        either("another list of blocks", &|_| page(4, 0, named), "expected a page"),
        either("an unknown mark", &|kind| join(&[&[0, 0, 0, 0, 0, 0, 2, kind], named]), "expected a page"),
        either("the end of multifd", &|_| join(&[&[0, 0, 0, 0, 0, 0, 2, 0], named]), "expected a page"),
        either("a page that is a difference", &|_| page(0x40, 0, named), ""),
        either("a page that a plug-in sends", &|_| page(0x80, 0, named), ""),
        lie("pages among the list of blocks", LISTED, &join(&[&[0; 7], b"\x08\x06pc.ram"]), "expected a page"),
        lie("a page of sevens", b"\x22\0\0\0\0\0", b"\x22\x07\0\0\0\0", "a page of zeroes"),
        ends("its end among pages", Change::Cut(100_000), "expected the device sections"),
    ]
}

/// Each but one is about what a gateway has switched off; some start the guest.
fn of_commands() -> Vec<Lie> {
    const NAMES: [&str; 10] = [
        "open a way back",
        "ping",
        "post-copy is to come",
        "post-copy begins",
        "run by post-copy",
        "throw RAM away",
        "go on with post-copy",
        "a package of post-copy",
        "send what came",
        "COLO",
    ];
    let command = |number: u8, bytes: &[u8]| join(&[b"\x08\0", &[number, 0], &[u8::try_from(bytes.len()).unwrap()], bytes, START]);
    let numbered = NAMES.into_iter().zip(1..).map(|(name, number)| lie(name, START, &command(number, b""), "no command"));
    let more = [
        lie("a package of post-copy, with a size", START, &command(7, b"\xff\xff\xff\xff"), "no command"),
        lie("an unknown command", START, &command(99, b""), "no command"),
        lie("the start of the switch, and more", START, &command(11, b"more"), "no command"),
    ];
    numbered.chain(more).collect()
}

fn of_devices() -> Vec<Lie> {
    vec![
        lie("another device", b"\x05timer", b"\x05tamer", "the device that is listed"),
        lie("another instance of a device", TIMER, b"\x04\0\0\0\0\x05timer\0\0\0\x01\0\0\0\x02", "the device that is listed"),
        lie("another number of a section", TIMER, b"\x04\0\0\0\x63\x05timer\0\0\0\0\0\0\0\x02", "the end of the section of a device"),
        lie("another type of section", TIMER, b"\x05\0\0\0\0\x05timer\0\0\0\0\0\0\0\x02", "the device that is listed"),
        lie(
            "a device more",
            TIMER,
            &join(&[b"\x04\0\0\0\x63\x04evil\0\0\0\0\0\0\0\x01\x7e\0\0\0\x63", TIMER]),
            "the device that is listed",
        ),
        lie("a command among devices", TIMER, &join(&[b"\x08\0\x05\0\0", TIMER]), "the device that is listed"),
        lie("a list that is none", b"\"devices\": [", b"\"devices\"; [", "a description of device sections"),
        lie("a list of other pages", b"\"page_size\": 4096", b"\"page_size\": 8192", "a bounded list of devices"),
        lie("a list with another device", b"\"name\": \"timer\"", b"\"name\": \"tamer\"", "the device that is listed"),
        ends("its end in a device", Change::CutBehind(b"\x05timer".to_vec()), ""),
        ends("more behind its end", Change::Append(b"\x02\0\0\0\x02".to_vec()), "the end of the stream"),
        ends("another stream behind its end", Change::Append(b"QEVM\0\0\0\x03".to_vec()), "the end of the stream"),
    ]
}

/// Of a channel with pages (multifd), one of two: it says which it is, and then packets.
pub fn lies_of_a_channel() -> Vec<Lie> {
    const PACKET: usize = 64;
    // Behind the packet with which all wait for each other, which has no pages.
    const PAGES: usize = PACKET + 1344;
    let flip = |name, at, bit, expected| ends(name, Change::Flip(at, bit), expected);
    // Of one that ends nothing is expected: its QEMU ends the others then, and which end is seen first is chance.
    vec![
        flip("another beginning", 0, 0, "the beginning of a channel"),
        flip("another version", 7, 1, "the beginning of a channel"),
        flip("another UUID", 8, 0, "the UUID of the VM"),
        flip("the number of the other one", 24, 0, "channels, each once"),
        ends("a part of what it is", Change::Cut(10), ""),
        ends("nothing", Change::Cut(0), ""),
        flip("no packet", PACKET, 0, "a packet of version 1"),
        flip("a packet of another version", PACKET + 7, 1, "a packet of version 1"),
        flip("packed pages", PACKET + 11, 1, "packets of pages as they are"),
        flip("an unknown mark", PACKET + 8, 7, "packets of pages as they are"),
        flip("pages before all are there", PACKET + 11, 0, "in front of the first page"),
        flip("pages without end", PACKET + 16, 7, "a bounded number of pages"),
        flip("zeroes without end", PACKET + 32, 7, "a bounded number of pages"),
        flip("a page that there is no room for", PACKET + 19, 0, "a bounded number of pages"),
        flip("more pages than there is room for", PAGES + 15, 7, "a bounded number of pages"),
        flip("a page of no block", PAGES + 64, 0, "a block of RAM"),
        flip("a page outside of its block", PAGES + 320, 6, "a page of its block"),
        flip("a part of a page", PAGES + 327, 0, "a page of its block"),
        ends("its end in a packet", Change::Cut(PAGES + 100), ""),
        ends("its end behind some", Change::Cut(400_000), ""),
        ends("more behind its end", Change::Append(b"more".to_vec()), "pages until the last section"),
    ]
}
