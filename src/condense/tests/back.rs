use super::super::{AgainWalk, BackWalk, FOLLOWED_BYTES_MAX, Follow};
use super::streams::{RAM_PAGES, Stream, content, grammar_of};
use crate::types::PAGE_BYTES;

fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes(), u16::try_from(body.len()).unwrap().to_be_bytes().as_slice(), body].concat()
}

fn asked(page: u64, bytes: u32, name: Option<&str>) -> Vec<u8> {
    let pages = [(page * 4096).to_be_bytes().as_slice(), &bytes.to_be_bytes()].concat();
    match name {
        Some(name) => message(3, &[&pages, [u8::try_from(name.len()).unwrap()].as_slice(), name.as_bytes()].concat()),
        None => message(4, &pages),
    }
}

fn bitmap(name: &str, bytes: u64) -> Vec<u8> {
    let head = message(5, &[&[u8::try_from(name.len()).unwrap()], name.as_bytes()].concat());
    [head, bytes.to_be_bytes().to_vec(), vec![0xff; usize::try_from(bytes).unwrap()], vec![1; 8]].concat()
}

fn whole() -> Vec<u8> {
    let parts = [
        message(2, &[0, 0, 0, 1]),
        asked(7, 4096, Some("pc.ram")),
        asked(9, 8192, None),
        message(7, &[]),
        asked(1, 4096, Some("acpi/tables")),
        bitmap("pc.ram", RAM_PAGES / 8),
        bitmap("acpi/tables", 8),
        message(6, &[0, 0, 0, 1]),
        message(1, &[0, 0, 0, 0]),
    ];
    parts.concat()
}

#[test]
fn the_way_back_is_followed_however_it_is_cut() {
    for piece in [1, 7, 100, 10_000] {
        let (mut walk, mut held, mut taken) = (BackWalk::new(grammar_of(true)), Vec::new(), 0);
        for piece in whole().chunks(piece) {
            held.extend_from_slice(piece);
            let count = walk.take_in(&held).unwrap();
            held.drain(..count);
            taken += count;
            assert!(held.len() < FOLLOWED_BYTES_MAX);
        }
        assert_eq!((taken, walk.faults()), (whole().len(), 4));
    }
}

// SPEC: PROTOCOL.md#must-walk-back
#[test]
fn a_way_back_that_lies_is_refused() {
    let page = |page, bytes, name| [asked(7, 4096, Some("pc.ram")), asked(page, bytes, name)].concat();
    for (bytes, expected) in [
        (message(0, &[]), "a message of the way back"),
        (message(8, &[]), "a message of the way back"),
        (message(1, &[0; 8]), "a message of the way back"),
        (message(3, &[0; 12]), "a message of the way back"),
        (asked(7, 4096, None), "the name of a block"),
        (asked(7, 4096, Some("other")), "a block of the VM"),
        (page(RAM_PAGES, 4096, None), "pages of their block"),
        (page(RAM_PAGES - 1, 8192, None), "pages of their block"),
        (page(0, 0, None), "pages of their block"),
        (page(0, 100, Some("pc.ram")), "pages of their block"),
        (message(3, &[asked(7, 4096, Some("pc.ram"))[4..].to_vec(), vec![1; 9]].concat()), "the name of a block"),
        (bitmap("pc.ram", RAM_PAGES / 8 + 8), "a bit for each page"),
        (bitmap("other", 8), "a block of the VM"),
        ([whole(), message(2, &[0; 4])].concat(), "nothing behind the end"),
    ] {
        let mut walk = BackWalk::new(grammar_of(true));
        let refused = walk.take_in(&bytes).expect_err(expected);
        assert!(refused.expected.contains(expected), "{expected}: {refused}");
    }
    // Where the blocks are not known nothing can be asked for.
    assert!(BackWalk::new(super::super::Grammar::Opaque).take_in(&asked(7, 4096, Some("pc.ram"))).is_err());
}

fn command(command: u16, body: &[u8]) -> Vec<u8> {
    [&[8], message(command, body).as_slice()].concat()
}

fn bitmap_wanted(name: &str) -> Vec<u8> {
    command(10, &[&[u8::try_from(name.len()).unwrap()], name.as_bytes()].concat())
}

/// As QEMU goes on when it has got another socket.
fn again() -> Stream {
    let asks = [bitmap_wanted("pc.ram"), bitmap_wanted("acpi/tables"), command(2, &[0, 0, 0, 9]), command(9, &[])].concat();
    Stream::default().put(&[&asks])
}

// SPEC: PROTOCOL.md#must-walk-again
#[test]
fn the_rest_of_a_stream_is_followed_however_it_is_cut_and_refused_where_it_lies() {
    let rest = |stream: Stream| stream.part(false).page("pc.ram", 9, &content(9)).page("pc.ram", 10, &[0; PAGE_BYTES]).end();
    let whole = rest(again()).part(true).end().put(&[b"\0"]).bytes;
    for piece in [1, 100, 10_000] {
        let (mut walk, mut held, mut taken) = (AgainWalk::new(grammar_of(true)), Vec::new(), 0);
        for piece in whole.chunks(piece) {
            held.extend_from_slice(piece);
            let count = walk.take_in(&held).unwrap();
            held.drain(..count);
            taken += count;
            assert!(held.len() < FOLLOWED_BYTES_MAX);
        }
        assert_eq!(taken, whole.len());
    }
    for (stream, expected) in [
        (Stream::head(), "for pages that are there"),
        (Stream::default().put(&[&command(5, &[])]), "for pages that are there"),
        (Stream::default().put(&[&bitmap_wanted("other")]), "a block of the VM"),
        (rest(Stream::default()), "for pages that are there"),
        (again().put(&[&bitmap_wanted("pc.ram")]), "in its place"),
        (again().part(false).page("other", 9, &content(9)), "a block of RAM"),
        (again().part(false).page("pc.ram", RAM_PAGES, &content(9)), "a page of its block"),
        (again().device(1, "timer", b"1"), "a section"),
        (Stream::default().put(&[&whole, b"more"]), "the end of the stream"),
    ] {
        let refused = AgainWalk::new(grammar_of(true)).take_in(&stream.bytes).expect_err(expected);
        assert!(refused.expected.contains(expected), "{expected}: {refused}");
    }
    assert!(AgainWalk::new(super::super::Grammar::Opaque).take_in(&whole).is_err());
}
