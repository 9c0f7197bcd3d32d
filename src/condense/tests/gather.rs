//! Several channels, gathered.

use std::collections::BTreeMap;

use super::super::{Expected, Gather, Grammar, Unsound};
use super::streams::{Stream, UUID, content, expanded, grammar, parcels};
use crate::types::PAGE_BYTES;

const FLUSH: u64 = 0x200;

fn expected() -> Expected {
    let Grammar::Qemu(expected) = grammar() else { panic!("no grammar") };
    *expected
}

fn greeting(id: u8) -> Vec<u8> {
    let mut bytes = [&0x1122_3344_u32.to_be_bytes()[..], &1_u32.to_be_bytes(), &UUID.0, &[id]].concat();
    bytes.resize(64, 0);
    bytes
}

/// A packet with these pages, and behind them those of zeroes.
fn packet(sync: bool, block: &str, pages: &[(u64, [u8; PAGE_BYTES])], zeroes: &[u64]) -> Vec<u8> {
    let word = |word: usize| u32::try_from(word).unwrap().to_be_bytes();
    let head = [word(0x1122_3344), word(1), word(usize::from(sync)), word(128), word(pages.len()), word(pages.len() * PAGE_BYTES)];
    let mut bytes = [&head.concat()[..], &7_u64.to_be_bytes(), &word(zeroes.len()), &[0; 28], block.as_bytes()].concat();
    bytes.resize(320, 0);
    for page in pages.iter().map(|(page, _)| page).chain(zeroes) {
        bytes.extend_from_slice(&(page * 4096).to_be_bytes());
    }
    bytes.resize(320 + 1024, 0);
    pages.iter().for_each(|(_, content)| bytes.extend_from_slice(content));
    bytes
}

fn sync() -> Vec<u8> {
    packet(true, "", &[], &[])
}

/// The end of a section or a round, as a QEMU says it.
fn meet(stream: Stream, rounds: bool) -> Stream {
    if rounds { stream.u64(FLUSH) } else { stream }
}

/// Three rounds on two channels, in which every page that is sent is another each time: what the main channel and the others have, and
/// what each page is in the end.
fn sent(rounds: bool) -> (Vec<Vec<u8>>, BTreeMap<u64, [u8; PAGE_BYTES]>) {
    let mut main = meet(Stream::head().ram_open(), rounds).end();
    let mut channels = vec![[greeting(1), sync()].concat(), [greeting(0), sync()].concat()];
    let mut memory = BTreeMap::new();
    for round in 1..=3_u64 {
        main = main.part(round == 3);
        for (index, channel) in channels.iter_mut().enumerate() {
            let pages: Vec<_> = (0..40).map(|page| (page * 2 + index as u64, content(page + round * 1000 + index as u64))).collect();
            let zeroes = [200 + index as u64, 300 + index as u64];
            memory.extend(pages.iter().copied());
            memory.extend(zeroes.map(|page| (page, [0; PAGE_BYTES])));
            let (first, more) = pages.split_at(25);
            channel.extend(packet(false, "pc.ram", first, &zeroes));
            // Older ones have the last pages wait with their packet.
            channel.extend(packet(!rounds, "pc.ram", more, &[]));
            channel.extend(if rounds { sync() } else { Vec::new() });
        }
        // What is of zeroes may be on the main channel.
        main = main.page("pc.ram", 400 + round, &[0; PAGE_BYTES]);
        memory.insert(400 + round, [0; PAGE_BYTES]);
        main = meet(main, rounds).end();
    }
    channels.insert(0, main.devices().bytes);
    (channels, memory)
}

/// Gathers channels that come in pieces of so many bytes, each as much as `order` says of it.
fn gathered(channels: &[Vec<u8>], piece: usize, mut order: impl FnMut() -> usize) -> Result<Vec<u8>, Unsound> {
    let mut gather = Gather::new(expected(), channels.len() - 1);
    let (mut came, mut taken, mut out) = (vec![0; channels.len()], vec![0; channels.len()], Vec::new());
    let mut idle = 0;
    while taken[0] < channels[0].len() || came != taken {
        let index = order() % channels.len();
        came[index] = (came[index] + piece).min(channels[index].len());
        let bytes = &channels[index][taken[index]..came[index]];
        let count = if index == 0 { gather.take_main(bytes)? } else { gather.take_channel(index - 1, bytes)? };
        taken[index] += count;
        out.append(gather.gathered());
        idle = if count == 0 { idle + 1 } else { 0 };
        if idle > 10_000 {
            break;
        }
    }
    gather.end_main(channels[0].len() - taken[0])?;
    for index in 1..channels.len() {
        gather.end_channel(index - 1, channels[index].len() - taken[index])?;
    }
    Ok(out)
}

fn random(mut state: u64) -> impl FnMut() -> usize {
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 40).unwrap()
    }
}

/// What a destination's memory is, once a stream of one channel was loaded.
fn loaded(stream: &[u8]) -> BTreeMap<u64, [u8; PAGE_BYTES]> {
    let mut walk = super::super::walk::Walk::new(grammar());
    let (mut memory, mut at) = (BTreeMap::new(), 0);
    while let Some(item) = walk.next(&stream[at..]).unwrap() {
        use super::super::walk::Item;
        at += match item {
            Item::Framing(bytes) | Item::Header { bytes, .. } => bytes,
            Item::Zero { bytes, .. } => {
                memory.insert(walk.last().unwrap().page, [0; PAGE_BYTES]);
                bytes
            }
            Item::Page(place) => {
                memory.insert(place.page, *stream[at..].first_chunk().unwrap());
                PAGE_BYTES
            }
            Item::Tail => return memory,
            other => panic!("{other:?}"),
        };
    }
    panic!("no devices");
}

#[test]
fn channels_become_a_stream_that_says_the_same_in_whatever_order_they_come() {
    for rounds in [false, true] {
        let (channels, memory) = sent(rounds);
        for seed in 0..60 {
            let piece = [1000, 4096, 9000, 100_000][usize::try_from(seed % 4).unwrap()];
            let stream = gathered(&channels, piece, random(seed)).unwrap();
            assert!(loaded(&stream) == memory, "seed {seed}");
            // What comes behind the pages is as it was.
            let devices = Stream::default().devices().bytes;
            assert!(stream.ends_with(&devices) && stream.starts_with(&Stream::head().bytes));
            let (condensed, said) = parcels(&stream, 5000, 1 << 20).unwrap();
            let (back, found) = expanded(&condensed);
            assert!(back == stream && found.unwrap() == said);
        }
    }
}

#[test]
fn nothing_comes_out_before_what_has_to_be_in_front_of_it() {
    for rounds in [false, true] {
        let (channels, _) = sent(rounds);
        let mut gather = Gather::new(expected(), 2);
        // The main channel waits for the others.
        let main = gather.take_main(&channels[0]).unwrap();
        assert!(main < Stream::head().ram_open().bytes.len() + 8);
        let first = gather.take_channel(0, &channels[1]).unwrap();
        assert_eq!(first, 64 + 1344);
        assert_eq!(gather.take_channel(0, &channels[1][first..]).unwrap(), 0, "it waits for the other");
        assert_eq!(gather.take_main(&channels[0][main..]).unwrap(), 0);
        gather.take_channel(1, &channels[2]).unwrap();
        assert!(gather.take_main(&channels[0][main..]).unwrap() > 0);
        // The end of the section is not needed for pages to go on.
        assert!(gather.take_channel(0, &channels[1][first..]).unwrap() > 40 * PAGE_BYTES);
    }
}

fn refused(change: impl Fn(&mut Vec<Vec<u8>>)) -> Unsound {
    let (mut channels, _) = sent(true);
    change(&mut channels);
    gathered(&channels, 100_000, random(1)).map(|stream| stream.len()).unwrap_err()
}

#[test]
fn channels_that_lie_are_refused() {
    /// Behind the greeting and the first packet.
    const FIRST: usize = 64 + 1344;
    type Lie = (fn(&mut Vec<Vec<u8>>), &'static str);
    let lies: &[Lie] = &[
        (|channels| channels[1][0] = 9, "the beginning of a channel"),
        (|channels| channels[1][7] = 2, "the beginning of a channel"),
        (|channels| channels[1][10] ^= 1, "the UUID of the VM"),
        (|channels| channels[2][24] = 1, "channels, each once"),
        (|channels| channels[1][64] = 0, "a packet of version 1"),
        (|channels| channels[1][FIRST + 7] = 3, "a packet of version 1"),
        (|channels| channels[1][FIRST + 11] = 2, "packets of pages as they are"),
        (|channels| channels[1][FIRST + 11] = 64, "packets of pages as they are"),
        (|channels| channels[1][FIRST + 15] = 3, "a bounded number of pages"),
        (|channels| channels[1][FIRST + 16] = 0xff, "a bounded number of pages"),
        (|channels| channels[1][FIRST + 32..FIRST + 36].fill(0xff), "a bounded number of pages"),
        (|channels| channels[1][FIRST + 19] = 24, "as many bytes as it has pages"),
        (|channels| channels[1][FIRST + 23] = 1, "as many bytes as it has pages"),
        (|channels| channels[1][FIRST + 64] = b'q', "a block of RAM"),
        (|channels| channels[1][FIRST + 64] = 7, "a printable name"),
        (|channels| channels[1][FIRST + 64] = 0, "a printable name"),
        (|channels| channels[1][FIRST + 64..FIRST + 320].fill(b'a'), "a block of RAM"),
        (|channels| channels[1][FIRST + 320] = 1, "a page of its block"),
        (|channels| channels[1][FIRST + 327] = 1, "a page of its block"),
        (|channels| drop(channels[1].drain(64..FIRST)), "to wait for the others in front of the first page"),
        (|channels| channels[1].extend(packet(false, "pc.ram", &[(1, content(1))], &[])), "no page behind the last section"),
        (|channels| channels[1].extend(packet(false, "pc.ram", &[], &[1])), "no page behind the last section"),
        (|channels| channels[1].truncate(FIRST + 5000), "the device sections"),
        (|channels| channels[1].extend([0x11, 0x22, 0x33]), "pages until the last section has ended"),
        (|channels| channels[0].truncate(Stream::head().ram_open().bytes.len() + 30), "the device sections"),
    ];
    for (change, expected) in lies {
        let refused = refused(change);
        assert!(refused.expected.contains(expected), "{expected}: {refused}");
    }
    // One that ends too early is noticed when it ends.
    let mut gather = Gather::new(expected(), 1);
    gather.take_channel(0, &greeting(0)).unwrap();
    assert!(gather.end_channel(0, 0).unwrap_err().expected.contains("pages until the last section"));
    assert!(gather.take_channel(1, &[]).is_err());
    // Pages in front of all else are what is wrong with them, also before their block is known.
    let early = gather.take_channel(0, &packet(false, "pc.ram", &[], &[1])).unwrap_err();
    assert!(early.expected.contains("in front of the first page"), "{early}");
}

#[test]
fn a_main_channel_that_is_not_known_to_its_end_is_refused() {
    let opaque = Stream::head().put(&[b"\x04\0\0\0\x01\x0evirtio-mem-pre\0\0\0\0\0\0\0\x01"]).bytes;
    let refused = Gather::new(expected(), 1).take_main(&opaque).unwrap_err();
    assert!(refused.expected.contains("as several channels need"), "{refused}");
}

/// Whatever is changed, what comes out is either refused or a stream that a destination can follow.
#[test]
fn changed_channels_come_to_no_more_than_other_pages() {
    let (good, _) = sent(true);
    let mut next = random(11);
    let mut refused = 0;
    for _ in 0..400 {
        let mut changed = good.clone();
        let channel = next() % changed.len();
        let within = if next().is_multiple_of(2) { 3000 } else { usize::MAX };
        let at = next() % changed[channel].len().min(within);
        changed[channel][at] ^= 1 << (next() % 8);
        match gathered(&changed, 50_000, random(3)).and_then(|stream| parcels(&stream, 1 << 20, 0)) {
            Ok(_) => {}
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 50, "{refused}");
}
