use bytes::Bytes;

use super::super::{Condenser, Expander, PAST_KEY_BYTES, Unsound};
use super::streams::{Stream, content, grammar_of};
use crate::types::PAGE_BYTES;

const ADVISE: &[u8] = b"\x08\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0";
const LISTEN: &[u8] = b"\x08\0\x04\0\0";
const RUN: &[u8] = b"\x08\0\x05\0\0";

/// As QEMU begins where there is a way back.
fn begun() -> Stream {
    Stream::head().put(&[b"\x08\0\x01\0\0", b"\x08\0\x02\0\x04\0\0\0\x01", ADVISE]).ram().part(false).page("pc.ram", 3, &content(3)).end()
}

fn discard(name: &str, ranges: &[(u64, u64)]) -> Vec<u8> {
    let ranges: Vec<u8> = ranges.iter().flat_map(|(start, length)| [start.to_be_bytes(), length.to_be_bytes()].concat()).collect();
    let body = [&[0, u8::try_from(name.len()).unwrap()], name.as_bytes(), &[0], &ranges].concat();
    [b"\x08\0\x06".as_slice(), &u16::try_from(body.len()).unwrap().to_be_bytes(), &body].concat()
}

fn package(inside: &[u8]) -> Vec<u8> {
    [b"\x08\0\x07\0\x04".as_slice(), &u32::try_from(inside.len()).unwrap().to_be_bytes(), inside].concat()
}

fn devices() -> Vec<u8> {
    let devices = Stream::default().device(0, "timer", b"12345678").device(3, "cpu", &[7; 300_000]).bytes;
    [LISTEN, &devices, b"\x08\0\x02\0\x04\0\0\0\x03", RUN].concat()
}

fn split() -> Stream {
    begun().put(&[&discard("pc.ram", &[(0x3000, 0x1000), (0x8000, 0x4000)]), &package(&devices())])
}

fn rest(stream: Stream) -> Stream {
    let stream = stream.put(&[b"\x08\0\x02\0\x04\0\0\0\x04"]).part(false).page("pc.ram", 3, &content(4)).end();
    stream.part(false).page("pc.ram", 8, &[0; PAGE_BYTES]).end().part(true).end().put(&[b"\0"])
}

/// The stream as it comes out, and both ends' place and digests of the split.
fn carried(stream: &[u8], piece: usize) -> Result<(Vec<u8>, [u64; 2]), Unsound> {
    let mut condenser = Condenser::new(grammar_of(true), [1 << 20, 1 << 18], Box::new([3; PAST_KEY_BYTES]));
    let mut expander = Expander::new(grammar_of(true));
    let (mut held, mut out, mut sent) = (Vec::new(), Vec::new(), 0);
    let (mut here, mut there) = ((0, None), (0, None));
    let mut give = |parcel: Vec<u8>, out: &mut Vec<u8>| -> Result<(), Unsound> {
        sent += parcel.len() as u64;
        expander.begin(Bytes::from(parcel));
        while let Some(bytes) = expander.expand()? {
            out.extend_from_slice(bytes);
        }
        out.extend(expander.let_tail_go()?);
        if let Some(digest) = expander.take_split() {
            there = (sent, Some(digest.finish()));
        }
        Ok(())
    };
    for piece in stream.chunks(piece) {
        held.extend_from_slice(piece);
        let taken = condenser.take_in(&held)?;
        held.drain(..taken);
        condenser.let_tail_go()?;
        let parcels = condenser.parcels(held.len() % 2 == 0);
        if let Some(split) = condenser.take_split() {
            here = (split.bytes, Some(split.digest.finish()));
        }
        parcels.map(|parcel| parcel.bytes).try_for_each(|parcel| give(parcel, &mut out))?;
    }
    condenser.parcels(true).map(|parcel| parcel.bytes).try_for_each(|parcel| give(parcel, &mut out))?;
    // Whoever sends it says that it has ended only when the other one has all of it.
    let all = out.len();
    condenser.end(&held)?;
    condenser.parcels(true).map(|parcel| parcel.bytes).try_for_each(|parcel| give(parcel, &mut out))?;
    assert_eq!(here.1, there.1);
    let (more, digest) = expander.end()?;
    assert_eq!(condenser.digest().finish(), digest.finish());
    assert_eq!((all, more.as_slice()), (stream.len(), [].as_slice()));
    Ok((out, [here.0, there.0]))
}

#[test]
fn a_stream_is_split_at_the_same_place_at_both_ends() {
    let stream = rest(split()).bytes;
    for piece in [1000, 5000, 1 << 20] {
        let (out, [here, there]) = carried(&stream, piece).unwrap();
        assert!(out == stream && here > 0 && here == there, "{piece}: {here} {there}");
    }
    // A guest that got there in time is not split, and ends as it always did.
    let whole = begun().part(true).end().device(1, "timer", b"1").described(&[("timer", 1)]).bytes;
    for piece in [1, 5000] {
        let (out, splits) = carried(&whole, piece).unwrap();
        assert!(out == whole && splits == [0, 0]);
    }
}

#[test]
fn a_split_that_lies_is_refused() {
    let after = || rest(split());
    let cases: &[(Stream, &str)] = &[
        (Stream::head().put(&[LISTEN]), "in its place"),
        (begun().put(&[RUN]), "in its place"),
        (begun().put(&[b"\x08\0\x08\0\0"]), "in its place"),
        (Stream::head().put(&[&package(&devices())]), "in its place"),
        (Stream::head().put(&[b"\x08\0\x03\0\x10\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\x10\0"]), "pages of 4 KiB"),
        (begun().put(&[&discard("pc.ram", &[(0x3000, 0x800)])]), "pages of their block"),
        (begun().put(&[&discard("pc.ram", &[(0, 0)])]), "pages of their block"),
        (begun().put(&[&discard("pc.ram", &[(u64::MAX - 0xfff, 0x1000)])]), "pages of their block"),
        (begun().put(&[&discard("pc.ram", &[(0, 4097 * 4096)])]), "pages of their block"),
        (begun().put(&[&discard("pc.ram", &[])]), "ranges of pages"),
        (begun().put(&[&discard("other", &[(0, 4096)])]), "a block of RAM"),
        (begun().put(&[&package(RUN)]), "bounded device sections"),
        (begun().put(&[b"\x08\0\x07\0\x04\xff\xff\xff\xff"]), "bounded device sections"),
        (begun().put(&[&package(&[&devices()[..], b"more"].concat())]), "the command to run"),
        (begun().put(&[&package(&devices()[5..])]), "bounded device sections"),
        (split().put(&[&package(&devices())]), "in its place"),
        (split().put(&[b"\x08\0\x0b\0\0"]), "in its place"),
        (split().put(&[&discard("pc.ram", &[(0, 4096)])]), "in its place"),
        (split().device(1, "timer", b"1"), "a section"),
        (split().part(true).end().put(&[b"\x04"]), "the end of the stream"),
        (after().put(&[b"\x02"]), "the end of the stream"),
        (split(), "the device sections"),
        (Stream::head().put(&[b"\x04\0\0\0\x01"]), "known to its end"),
        (begun().part(true).end().device(1, "timer", b"1").described(&[("timer", 2)]).put(&[b"}"]), "the end of the stream"),
    ];
    for (stream, expected) in cases {
        let refused = carried(&stream.bytes, 5000).expect_err(expected);
        assert!(refused.expected.contains(expected), "{expected}: {refused}");
    }
}
