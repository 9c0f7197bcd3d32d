//! Streams in the form of QEMU's, and what both ends make of them.

use bytes::Bytes;

use super::super::{Condenser, Expander, Expected, Grammar, PAST_KEY_BYTES, RamBlock, Unsound};
use crate::types::{PAGE_BYTES, VmUuid};

/// Over what frames a stream, and over its pages.
type Digests = ([u8; 32], u128);

pub(super) const UUID: VmUuid = VmUuid([7; 16]);
pub(super) const RAM_PAGES: u64 = 4096;

pub(super) fn grammar() -> Grammar {
    grammar_of(false)
}

pub(super) fn grammar_of(post_copy: bool) -> Grammar {
    let block = |name: &str, used, max| RamBlock { name: name.to_owned(), used, max };
    let blocks = vec![block("pc.ram", RAM_PAGES * 4096, RAM_PAGES * 4096), block("acpi/tables", 4096, 8192)];
    Grammar::Qemu(Box::new(Expected { uuid: UUID, machine: "pc-q35-7.2".to_owned(), blocks, post_copy }))
}

/// A stream that is being written.
#[derive(Default, Clone)]
pub(super) struct Stream {
    pub(super) bytes: Vec<u8>,
    last: Option<(&'static str, u64)>,
}

impl Stream {
    pub(super) fn put(mut self, parts: &[&[u8]]) -> Self {
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self
    }

    pub(super) fn u64(self, word: u64) -> Self {
        self.put(&[&word.to_be_bytes()])
    }

    fn name(self, name: &str) -> Self {
        let length = u8::try_from(name.len()).unwrap();
        self.put(&[&[length], name.as_bytes()])
    }

    pub(super) fn head() -> Self {
        let head = Self::default().put(&[b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2"]);
        head.put(&[b"\x05"]).name("configuration/uuid").put(&[&1_u32.to_be_bytes(), &UUID.0])
    }

    pub(super) fn ram(self) -> Self {
        self.ram_open().end()
    }

    pub(super) fn ram_open(self) -> Self {
        self.put(&[b"\x01\0\0\0\x02"]).name("ram").put(&[b"\0\0\0\0\0\0\0\x04"]).blocks()
    }

    pub(super) fn blocks(self) -> Self {
        self.u64((RAM_PAGES * 4096 + 4096) | 4).name("pc.ram").u64(RAM_PAGES * 4096).name("acpi/tables").u64(4096)
    }

    /// The end of a section with RAM.
    pub(super) fn end(self) -> Self {
        self.u64(0x10).put(&[b"\x7e\0\0\0\x02"])
    }

    pub(super) fn part(self, last: bool) -> Self {
        self.put(&[&[if last { 3 } else { 2 }], b"\0\0\0\x02"])
    }

    pub(super) fn page(mut self, block: &'static str, page: u64, content: &[u8; PAGE_BYTES]) -> Self {
        let zero = content.iter().all(|byte| *byte == 0);
        let goes_on = self.last.is_some_and(|(last, _)| last == block);
        let word = (page * 4096) | if zero { 2 } else { 8 } | if goes_on { 0x20 } else { 0 };
        self.last = Some((block, page));
        let announced = if goes_on { self.u64(word) } else { self.u64(word).name(block) };
        announced.put(&[if zero { &[0] } else { content }])
    }

    pub(super) fn device(self, id: u8, name: &str, body: &[u8]) -> Self {
        self.put(&[b"\x04\0\0\0", &[id]]).name(name).put(&[b"\0\0\0\0\0\0\0\x01", body, b"\x7e\0\0\0", &[id]])
    }

    pub(super) fn described(self, devices: &[(&str, usize)]) -> Self {
        let device = |(name, bytes): &(&str, usize)| serde_json::json!({ "name": name, "instance_id": 0, "fields": [{ "size": bytes }] });
        let devices: Vec<_> = devices.iter().map(device).collect();
        let text = serde_json::json!({ "page_size": 4096, "devices": devices }).to_string();
        self.put(&[b"\0\x06", &u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()])
    }

    pub(super) fn devices(self) -> Self {
        // One has in it what looks like its end, and one is described wrongly.
        let devices = self.device(0, "timer", b"12345678").device(3, "cpu", b"x\x7e\0\0\0\x03\x04y").device(4, "net", &[9; 300]);
        devices.described(&[("timer", 8), ("cpu", 8), ("net", 7)])
    }
}

pub(super) fn content(number: u64) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    let mut state = number | 1;
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    page
}

/// A whole one: three passes with zeroes, equal pages, pages that change, pages out of order, another block.
pub(super) fn whole() -> Stream {
    let mut stream = Stream::head().ram().part(false);
    for page in 0..600 {
        stream = stream.page("pc.ram", page, &if page % 3 == 0 { [0; PAGE_BYTES] } else { content(page % 200) });
    }
    stream = stream.page("acpi/tables", 0, &content(5)).end().part(false);
    for pass in 0..3 {
        for page in (10..52).rev().map(|page| page * 7) {
            let mut content = content(page);
            content[pass] = 99;
            stream = stream.page("pc.ram", page, &content);
        }
    }
    stream.end().put(&[b"\x08\0\x0b\0\0"]).part(true).page("pc.ram", 4095, &content(77)).end().devices()
}

/// The parcels of a stream that comes in pieces of so many bytes.
pub(super) fn parcels(stream: &[u8], piece: usize, past_bytes: usize) -> Result<(Vec<Vec<u8>>, Digests), Unsound> {
    let mut condenser = Condenser::new(grammar(), [past_bytes, past_bytes / 4], Box::new([3; PAST_KEY_BYTES]));
    let (mut held, mut parcels) = (Vec::new(), Vec::new());
    for piece in stream.chunks(piece) {
        held.extend_from_slice(piece);
        let taken = condenser.take_in(&held)?;
        held.drain(..taken);
        condenser.let_tail_go()?;
        parcels.extend(condenser.parcels(held.len() % 2 == 0).map(|parcel| parcel.bytes));
    }
    condenser.end(&held)?;
    parcels.extend(condenser.parcels(true).map(|parcel| parcel.bytes));
    Ok((parcels, condenser.digest().finish()))
}

/// The stream that parcels stand for, and what the other end refuses in the middle of it.
pub(super) fn expanded(parcels: &[Vec<u8>]) -> (Vec<u8>, Result<Digests, Unsound>) {
    let mut expander = Expander::new(grammar());
    let mut stream = Vec::new();
    for parcel in parcels {
        expander.begin(Bytes::copy_from_slice(parcel));
        loop {
            match expander.expand() {
                Ok(Some(bytes)) => stream.extend_from_slice(bytes),
                Ok(None) => break,
                Err(unsound) => return (stream, Err(unsound)),
            }
        }
    }
    let ended = expander.end().map(|(rest, digest)| {
        stream.extend_from_slice(&rest);
        digest.finish()
    });
    (stream, ended)
}
