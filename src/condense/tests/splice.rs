//! The rest of a stream that was split, and pages that are waited for beside it.

use std::collections::BTreeMap;

use super::super::{Expected, Follow, Grammar, Splice, URGENT_END, Unsound, UrgentWalk};
use super::streams::{Stream, content, grammar_of};
use crate::types::PAGE_BYTES;

const PING: &[u8] = b"\x08\0\x02\0\x04\0\0\0\x04";

fn expected() -> Box<Expected> {
    let Grammar::Qemu(expected) = grammar_of(true) else { panic!("no grammar") };
    expected
}

/// The rest of a stream, in which a page of another block stands in front of one that goes on.
fn rest() -> Stream {
    let stream = Stream::default().put(&[PING]).part(false).page("pc.ram", 3, &content(3)).page("acpi/tables", 0, &content(4)).end();
    let stream = stream.part(false).page("pc.ram", 8, &[0; PAGE_BYTES]).page("pc.ram", 9, &content(9)).end();
    stream.part(true).page("pc.ram", 10, &content(10)).end().put(&[b"\0"])
}

fn urgent() -> Stream {
    let stream = Stream::default().page("pc.ram", 100, &content(100)).page("pc.ram", 70, &[0; PAGE_BYTES]);
    stream.page("acpi/tables", 1, &content(1)).page("pc.ram", 2000, &content(2000))
}

/// What the hypervisor reads: each page once, by block and number.
fn placed(stream: &[u8]) -> BTreeMap<(String, u64), [u8; PAGE_BYTES]> {
    let mut at = 0;
    let mut take = |count: usize| {
        at += count;
        &stream[at - count..at]
    };
    let (mut pages, mut block, mut open) = (BTreeMap::new(), String::new(), false);
    loop {
        if !open {
            match take(1)[0] {
                8 => drop(take(PING.len() - 1)),
                kind @ (2 | 3) => open = take(4) == [0, 0, 0, 2] && kind > 0,
                0 => break,
                other => panic!("section {other}"),
            }
            continue;
        }
        let word = u64::from_be_bytes(take(8).try_into().unwrap());
        if word == 0x10 {
            assert_eq!(take(5), b"\x7e\0\0\0\x02");
            open = false;
            continue;
        }
        if word & 0x20 == 0 {
            let length = usize::from(take(1)[0]);
            block = String::from_utf8(take(length).to_vec()).unwrap();
        }
        let content = if word & 8 != 0 { take(PAGE_BYTES).try_into().unwrap() } else { [take(1)[0]; PAGE_BYTES] };
        assert!(pages.insert((block.clone(), word >> 12), content).is_none(), "{block} {word:#x} twice");
    }
    assert_eq!(at, stream.len());
    pages
}

fn all() -> BTreeMap<(String, u64), [u8; PAGE_BYTES]> {
    let urgent = Stream::default().part(true).put(&[&urgent().bytes]).end().put(&[b"\0"]);
    placed(&rest().bytes).into_iter().chain(placed(&urgent.bytes)).collect()
}

/// Wherever pages that are waited for come, and in whatever pieces, each page is placed once, as it is.
#[test]
fn pages_that_are_waited_for_come_in_wherever_the_rest_is() {
    let (rest, urgent) = (rest().bytes, urgent().u64(0x10).bytes);
    for cut in (0..rest.len()).step_by(7) {
        let mut splice = Splice::behind_split(expected());
        splice.take_in(&rest[..cut]).unwrap();
        let takes = splice.takes_urgent();
        assert!(takes || cut <= PING.len() + 5, "{cut}");
        if takes {
            let before = splice.out().len();
            let (first, second) = urgent.split_at(5000);
            splice.take_urgent(first).unwrap();
            assert!(splice.out().len() >= before + PAGE_BYTES, "{cut}: it waits for nothing");
            splice.take_urgent(second).unwrap();
        }
        splice.take_in(&rest[cut..]).unwrap();
        if !takes {
            assert!(splice.awaits_end());
            splice.take_urgent(&urgent).unwrap();
        }
        splice.end().unwrap();
        assert!(!splice.takes_urgent() && placed(splice.out()) == all(), "{cut}");
    }
}

#[test]
fn the_last_section_ends_behind_the_last_page_that_is_waited_for() {
    let mut splice = Splice::behind_split(expected());
    let rest = rest().bytes;
    splice.take_in(&rest[..rest.len() - 1]).unwrap();
    assert!(!splice.awaits_end(), "the last byte has not come");
    splice.take_in(&rest[rest.len() - 1..]).unwrap();
    assert!(splice.awaits_end() && splice.end().is_err());
    splice.take_urgent(&urgent().bytes).unwrap();
    assert!(splice.awaits_end());
    splice.take_urgent(&URGENT_END).unwrap();
    splice.end().unwrap();
    assert!(placed(splice.out()) == all());
}

/// What begins anew is asked for pages that are there first, and nothing is put in between.
#[test]
fn the_rest_that_begins_anew_is_spliced_behind_its_handshake() {
    let handshake = [b"\x08\0\x0a\0\x07\x06pc.ram".as_slice(), b"\x08\0\x09\0\0"].concat();
    let mut splice = Splice::again(expected());
    splice.take_in(&handshake).unwrap();
    assert!(!splice.takes_urgent());
    assert_eq!(std::mem::take(splice.out()), handshake);
    splice.take_in(&rest().bytes).unwrap();
    splice.take_urgent(&urgent().u64(0x10).bytes).unwrap();
    splice.end().unwrap();
    assert!(placed(splice.out()) == all());
}

#[test]
fn what_is_no_page_is_refused_beside_a_stream() {
    let page = || Stream::default().page("pc.ram", 1, &content(1));
    let cases: &[(Vec<u8>, &str)] = &[
        (page().u64(0x10).u64(0x10).bytes, "more behind their end"),
        (page().u64(0x10).put(&[b"\x7e"]).bytes, "more behind their end"),
        (Stream::default().u64(0x1028).bytes, "the name of a block"),
        (Stream::default().u64(0x1008).put(&[b"\x05other"]).bytes, "a block of RAM"),
        (Stream::default().u64(4096 << 12 | 8).put(&[b"\x06pc.ram"]).bytes, "a page of its block"),
        (Stream::default().u64(u64::MAX << 12 | 8).put(&[b"\x06pc.ram"]).bytes, "a page of its block"),
        (Stream::default().u64(0x1002).put(&[b"\x06pc.ram\x07"]).bytes, "a page of zeroes"),
        (Stream::default().u64(0x1048).bytes, "packed already"),
        (Stream::default().u64(0x1004).bytes, "a page"),
        (Stream::default().u64(0x1200).bytes, "a page"),
        (page().part(false).u64(0).bytes, "a page"),
        (PING.to_vec(), "a page"),
    ];
    for (bytes, says) in cases {
        let refused = |error: Unsound| assert!(error.to_string().contains(says), "{error}: {says}");
        refused(UrgentWalk::new(grammar_of(true)).take_in(bytes).unwrap_err());
        let mut splice = Splice::behind_split(expected());
        splice.take_in(&rest().bytes[..20]).unwrap();
        refused(splice.take_urgent(bytes).unwrap_err());
        for end in 0..bytes.len() {
            // A part of it is no page, and nothing of that comes out.
            let _ = UrgentWalk::new(grammar_of(true)).take_in(&bytes[..end]);
        }
    }
    assert!(UrgentWalk::new(Grammar::Opaque).take_in(&page().bytes).is_err());
    let mut walk = UrgentWalk::new(grammar_of(true));
    assert_eq!(walk.take_in(&page().bytes[..4000]).unwrap(), 15, "its announcement");
}

#[test]
fn the_rest_is_followed_too() {
    let mut splice = Splice::behind_split(expected());
    assert!(splice.take_in(b"\x04").is_err());
    let mut splice = Splice::behind_split(expected());
    splice.take_in(&Stream::default().part(false).bytes).unwrap();
    assert!(splice.take_in(&Stream::default().u64(0x1028).bytes).is_err());
    assert!(splice.end().is_err());
}
