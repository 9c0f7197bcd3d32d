//! Frames that a hostile source may send, and what each is refused with.

use std::error::Error;

use lz4_flex::block::compress;
use proptest::prelude::*;

use super::*;
use crate::limits::{BATCH_PAGES_MAX, FRAME_BODY_BYTES_MAX, FRAME_PAGES_MAX, STRIPE_PAGES};
use crate::wire::{ErrorClass, LaneTotals};

/// The victim: lane 0 of 2, with stripe 0, stripe 2 and the short stripe 4 to itself.
const PAGES: u64 = 4 * STRIPE_PAGES + 50;

fn run(first: u64, count: u64) -> Vec<u8> {
    (first | count << 40).to_le_bytes().to_vec()
}

fn zero(first: u64, count: u64) -> Vec<u8> {
    [vec![1], run(first, count)].concat()
}

fn raw(first: u64, count: u64, bytes: usize) -> Vec<u8> {
    [vec![2], run(first, count), vec![0xab; bytes]].concat()
}

fn batch(codec: u8, runs: &[(u64, u64)], block: &[u8]) -> Vec<u8> {
    let block_bytes = u32::try_from(block.len()).unwrap();
    batch_with_length(codec, runs, block_bytes, block)
}

fn batch_with_length(codec: u8, runs: &[(u64, u64)], block_bytes: u32, block: &[u8]) -> Vec<u8> {
    let mut out = vec![3, codec];
    out.extend(u16::try_from(runs.len()).unwrap().to_le_bytes());
    out.extend(runs.iter().flat_map(|(first, count)| run(*first, *count)));
    out.extend(block_bytes.to_le_bytes());
    out.extend(block);
    out
}

fn padding(bytes: &[u8]) -> Vec<u8> {
    [&[4], u32::try_from(bytes.len()).unwrap().to_le_bytes().as_slice(), bytes].concat()
}

/// A frame as it is on the wire, every field free.
#[derive(Clone)]
struct Raw {
    kind: u8,
    reserved: u8,
    lane: u16,
    round: u32,
    sequence: u64,
    records: u32,
    body_bytes: Option<u32>,
    body: Vec<u8>,
}

impl Raw {
    fn bytes(&self) -> Vec<u8> {
        let mut out = vec![self.kind, self.reserved];
        out.extend(self.lane.to_le_bytes());
        out.extend(self.round.to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(self.records.to_le_bytes());
        out.extend(self.body_bytes.unwrap_or(u32::try_from(self.body.len()).unwrap()).to_le_bytes());
        out.extend(&self.body);
        out
    }
}

fn pages(records: &[Vec<u8>]) -> Raw {
    let body = records.concat();
    let records = u32::try_from(records.len()).unwrap();
    Raw { kind: 1, reserved: 0, lane: 0, round: 1, sequence: 0, records, body_bytes: None, body }
}

fn mark(totals: LaneTotals) -> Raw {
    let body =
        [totals.frames.to_le_bytes().as_slice(), &totals.pages.to_le_bytes(), &totals.bytes.to_le_bytes(), &totals.digest.to_le_bytes()]
            .concat();
    Raw { kind: 2, records: 0, body, ..pages(&[]) }
}

/// What a lane without frames has carried.
fn nothing() -> LaneTotals {
    Decoder::new(LaneIndex(0), 2, &anything(), PAGES).totals()
}

/// What a destination says to some frames: the text of the refusal with its cause, or nothing.
fn verdict(frames: &[Raw]) -> Option<String> {
    verdict_on(&anything(), frames)
}

/// The terms that exclude nothing.
fn anything() -> StreamTerms {
    terms(2, Compression::Auto, CompressionScope::Stream, false)
}

fn verdict_on(terms: &StreamTerms, frames: &[Raw]) -> Option<String> {
    let ram = flat(PAGES);
    let mut decoder = Decoder::new(LaneIndex(0), 2, terms, PAGES);
    for frame in frames {
        let bytes = frame.bytes();
        let (header, body) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>().unwrap();
        let header = match FrameHeader::decode(header) {
            Ok(header) => header,
            Err(error) => {
                assert_eq!(error.class(), ErrorClass::PeerMisbehaved);
                return Some(error.to_string());
            }
        };
        if let Err(error) = decoder.apply(&header, body, &ram) {
            assert_eq!(error.class(), ErrorClass::PeerMisbehaved, "{error}");
            return Some(match error.source() {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            });
        }
    }
    None
}

fn check(cases: &[(&str, Vec<Raw>, &str)]) {
    for (name, frames, expected) in cases {
        assert_eq!(verdict(frames).as_deref(), Some(*expected), "{name}");
    }
}

fn malformed(reason: &str) -> String {
    format!("frame 0 of lane 0 is malformed: {reason}")
}

/// `pages` pages that are easy to pack.
fn packed(pages: usize) -> Vec<u8> {
    compress(&vec![7; pages * PAGE_BYTES])
}

#[test]
fn accepts_what_the_specification_allows() {
    let batch_max = batch(1, &[(1024, BATCH_PAGES_MAX as u64)], &packed(BATCH_PAGES_MAX));
    let scattered: Vec<(u64, u64)> = (0..BATCH_PAGES_MAX as u64).map(|index| (100 + 2 * index, 1)).collect();
    let accepted = [
        vec![pages(&[zero(0, 512), zero(1024, 512), zero(2048, 50)])],
        vec![pages(&[raw(0, 2, 2 * PAGE_BYTES), batch_max, batch(1, &scattered, &packed(BATCH_PAGES_MAX)), padding(&[0; 99])])],
        vec![pages(&[padding(&[])])],
        vec![mark(nothing())],
        vec![mark(nothing()), Raw { round: 7, sequence: 1, ..pages(&[zero(0, 1)]) }],
        vec![pages(&[zero(0, 1)]), Raw { sequence: 1, ..pages(&[zero(1, 1)]) }],
    ];
    for frames in accepted {
        assert_eq!(verdict(&frames), None);
    }
}

#[test]
fn refuses_a_hostile_header() {
    let good = pages(&[zero(0, 1)]);
    let body_max = u32::try_from(FRAME_BODY_BYTES_MAX).unwrap();
    let kind = "`kind` of `frame` is unknown: expected 1 (pages), 2 (round mark), 3 (stream) or 4 (disk), got";
    let body = "`body length` of `frame` is out of bounds: expected";
    let stream = Raw { kind: 3, records: 1, body: vec![0; 14], ..good.clone() };
    let disk = Raw { kind: 4, records: 1, body: vec![0; 64], ..good.clone() };
    let bounds = |field: &str, expected: &str| format!("`{field}` of `frame` is out of bounds: expected {expected}");
    check(&[
        ("kind zero", vec![Raw { kind: 0, ..good.clone() }], &format!("{kind} 0")),
        ("kind unknown", vec![Raw { kind: 5, ..good.clone() }], &format!("{kind} 5")),
        ("a piece of a stream", vec![stream], "frame of lane 0 has a piece of a stream: expected pages"),
        ("a change of a disk", vec![disk], "frame of lane 0 has a piece of a stream: expected pages"),
        ("kind of an opaque stream", vec![Raw { kind: 255, ..good.clone() }], &format!("{kind} 255")),
        ("reserved byte", vec![Raw { reserved: 1, ..good.clone() }], &bounds("reserved byte", "0 to 0, got 1")),
        ("lane over the limit", vec![Raw { lane: 16, ..good.clone() }], &bounds("lane", "0 to 15, got 16")),
        ("lane largest", vec![Raw { lane: u16::MAX, ..good.clone() }], &bounds("lane", "0 to 15, got 65535")),
        ("another lane", vec![Raw { lane: 1, ..good.clone() }], "frame names lane 1: expected lane 0"),
        ("round zero", vec![Raw { round: 0, ..good.clone() }], &bounds("round", "1 to 4294967295, got 0")),
        ("no records", vec![Raw { records: 0, ..good.clone() }], &bounds("records", "1 to 65536, got 0")),
        ("records over the limit", vec![Raw { records: 65537, ..good.clone() }], &bounds("records", "1 to 65536, got 65537")),
        ("records largest", vec![Raw { records: u32::MAX, ..good.clone() }], &bounds("records", "1 to 65536, got 4294967295")),
        ("empty body", vec![Raw { body: vec![], ..good.clone() }], &format!("{body} 1 to 524288, got 0")),
        ("oversize body", vec![Raw { body_bytes: Some(body_max + 1), ..good.clone() }], &format!("{body} 1 to 524288, got 524289")),
        ("largest body", vec![Raw { body_bytes: Some(u32::MAX), ..good.clone() }], &format!("{body} 1 to 524288, got 4294967295")),
        ("short body", vec![Raw { body_bytes: Some(10), ..good.clone() }], "frame has a body of 9 bytes: expected 10"),
        ("long body", vec![Raw { body_bytes: Some(8), ..good.clone() }], "frame has a body of 9 bytes: expected 8"),
        ("mark with records", vec![Raw { records: 1, ..mark(nothing()) }], &bounds("records", "0 to 0, got 1")),
        ("short mark", vec![Raw { body: vec![0; 39], ..mark(nothing()) }], &format!("{body} 40 to 40, got 39")),
        ("long mark", vec![Raw { body: vec![0; 41], ..mark(nothing()) }], &format!("{body} 40 to 40, got 41")),
    ]);
}

// SPEC: PROTOCOL.md#must-sequence
// SPEC: PROTOCOL.md#must-round-order
#[test]
fn refuses_frames_out_of_order() {
    let good = pages(&[zero(0, 1)]);
    let order = "frame of lane 0 is out of order: expected sequence";
    check(&[
        ("first is not 0", vec![Raw { sequence: 1, ..good.clone() }], &format!("{order} 0, got 1")),
        ("sequence largest", vec![Raw { sequence: u64::MAX, ..good.clone() }], &format!("{order} 0, got {}", u64::MAX)),
        ("duplicated", vec![good.clone(), good.clone()], &format!("{order} 1, got 0")),
        ("gap", vec![good.clone(), Raw { sequence: 2, ..pages(&[zero(1, 1)]) }], &format!("{order} 1, got 2")),
        (
            "next round without a mark",
            vec![good.clone(), Raw { sequence: 1, round: 2, ..good.clone() }],
            "frame of lane 0 names round 2: expected round 1",
        ),
        (
            "round ended before",
            vec![mark(nothing()), Raw { sequence: 1, ..good.clone() }],
            "frame of lane 0 names round 1: expected a round after round 1",
        ),
        (
            "round older",
            vec![Raw { round: 5, ..mark(nothing()) }, Raw { sequence: 1, round: 4, ..good.clone() }],
            "frame of lane 0 names round 4: expected a round after round 5",
        ),
        (
            "nothing after the last round",
            vec![Raw { round: u32::MAX, ..mark(nothing()) }, Raw { sequence: 1, round: u32::MAX, ..good.clone() }],
            "frame of lane 0 names round 4294967295: expected a round after round 4294967295",
        ),
        (
            "mark of another round",
            vec![good, Raw { sequence: 1, round: 2, ..mark(nothing()) }],
            "frame of lane 0 names round 2: expected round 1",
        ),
    ]);
}

#[test]
fn refuses_totals_that_are_not_what_came() {
    let lies = [
        LaneTotals { frames: 1, ..nothing() },
        LaneTotals { pages: 1, ..nothing() },
        LaneTotals { bytes: u64::MAX, ..nothing() },
        LaneTotals { digest: 0, ..nothing() },
    ];
    for lie in lies {
        assert_eq!(verdict(&[mark(lie)]).unwrap(), format!("totals of lane 0 differ: expected {}, got {lie}", nothing()));
    }
    assert!(verdict(&[pages(&[zero(0, 1)]), Raw { sequence: 1, ..mark(nothing()) }]).unwrap().starts_with("totals of lane 0 differ"));
}

// SPEC: PROTOCOL.md#must-lane-affinity
// SPEC: PROTOCOL.md#must-page-once
// SPEC: PROTOCOL.md#must-page-exists
// SPEC: PROTOCOL.md#must-padding-last
#[test]
fn refuses_hostile_records() {
    let kind = "`record kind` of `pages frame` is unknown: expected 1 (zero) to 7 (after), got";
    let ends = |field: &str, expected: usize, got: usize| {
        malformed(&format!("`pages frame` ends inside `{field}`: expected {expected} bytes, got {got}"))
    };
    let bounds = |field: &str, expected: &str| malformed(&format!("`{field}` of `pages frame` is out of bounds: expected {expected}"));
    let run_pages = |expected: &str| bounds("pages of run", expected);
    let outside = |page: u64| format!("page {page} is outside guest RAM of {PAGES} pages");
    let one_of = |record: Vec<u8>| vec![pages(&[record])];
    let frame_max = FRAME_PAGES_MAX;
    let trailing = |got: usize| malformed(&format!("`pages frame` has {got} bytes after its last field: expected 0"));
    let mut cut = pages(&[zero(0, 1)]);
    cut.body.truncate(5);
    check(&[
        ("record kind zero", one_of(vec![0; 9]), &malformed(&format!("{kind} 0"))),
        ("record kind unknown", one_of(vec![8; 9]), &malformed(&format!("{kind} 8"))),
        ("run cut", vec![cut], &ends("run", 8, 4)),
        ("fewer records than named", vec![Raw { records: 2, ..pages(&[zero(0, 1)]) }], &ends("record kind", 1, 0)),
        ("more records than named", vec![Raw { records: 1, ..pages(&[zero(0, 1), zero(1, 1)]) }], &trailing(9)),
        ("trailing byte", one_of([zero(0, 1), vec![0]].concat()), &trailing(1)),
        ("run of no pages", one_of(zero(0, 0)), &run_pages("1 to 65536, got 0")),
        ("run over the limit", one_of(zero(0, frame_max + 1)), &run_pages("1 to 65536, got 65537")),
        ("count overflow", one_of(zero(0, (1 << 24) - 1)), &run_pages("1 to 65536, got 16777215")),
        ("all ones", one_of([vec![1], vec![0xff; 8]].concat()), &run_pages("1 to 65536, got 16777215")),
        ("frame over its pages", vec![pages(&[zero(0, 512), zero(1024, 65025)])], &run_pages("1 to 65024, got 65025")),
        ("first page outside", one_of(zero(PAGES, 1)), &outside(PAGES)),
        ("last page outside", one_of(zero(PAGES - 1, 2)), &outside(PAGES)),
        ("page number largest", one_of(zero((1 << 40) - 1, 1)), &outside((1 << 40) - 1)),
        ("page number and count largest", one_of(zero((1 << 40) - 1, frame_max)), &outside((1 << 40) - 1)),
        ("page of another lane", one_of(zero(512, 1)), "page 512 came on lane 0: expected lane 1"),
        ("run into another lane", one_of(zero(511, 2)), "page 512 came on lane 0: expected lane 1"),
        ("run across another lane", one_of(zero(0, 1025)), "page 512 came on lane 0: expected lane 1"),
        ("raw of another lane", one_of(raw(600, 1, PAGE_BYTES)), "page 600 came on lane 0: expected lane 1"),
        ("raw outside", one_of(raw(PAGES - 1, 2, 2 * PAGE_BYTES)), &outside(PAGES)),
        ("raw without bytes", one_of(raw(0, 1, 0)), &ends("raw pages", 4096, 0)),
        ("raw a byte short", one_of(raw(0, 2, 2 * PAGE_BYTES - 1)), &ends("raw pages", 8192, 8191)),
        ("raw a byte long", one_of(raw(0, 1, PAGE_BYTES + 1)), &trailing(1)),
        ("raw of no pages", one_of(raw(0, 0, 0)), &run_pages("1 to 65536, got 0")),
        ("raw count without bytes", one_of(raw(0, frame_max, 0)), &ends("raw pages", 65536 * 4096, 0)),
        ("page twice in a frame", vec![pages(&[zero(3, 4), raw(6, 1, PAGE_BYTES)])], "page 6 came twice in round 1: expected once"),
        (
            "page twice in a round",
            vec![pages(&[zero(3, 4)]), Raw { sequence: 1, ..pages(&[zero(0, 4)]) }],
            "page 3 came twice in round 1: expected once",
        ),
        ("padding in front of a record", vec![pages(&[padding(&[0; 3]), zero(0, 1)])], &bounds("records after padding", "0 to 0, got 1")),
        (
            "padding that says something",
            one_of(padding(&[0, 0, 1])),
            &malformed("`padding` of `pages frame` is malformed: expected zeroes, got `other bytes`"),
        ),
        ("padding longer than a frame", one_of(vec![4, 1, 0, 8, 0]), &bounds("padding", "0 to 524288, got 524289")),
        ("padding cut", one_of(vec![4, 2, 0, 0, 0, 0]), &ends("padding", 2, 1)),
    ]);
}

/// A part of a stream, or a frame that ends.
fn stream(pages: usize, window_log: u32, end: bool) -> Vec<u8> {
    use zstd_safe::zstd_sys::ZSTD_EndDirective::{ZSTD_e_end, ZSTD_e_flush};
    use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer};
    let mut context = CCtx::create();
    context.set_parameter(CParameter::WindowLog(window_log)).unwrap();
    context.set_parameter(CParameter::ContentSizeFlag(false)).unwrap();
    let (bytes, mut packed) = (vec![7; pages * PAGE_BYTES], vec![0; 1 << 20]);
    let mut output = OutBuffer::around(packed.as_mut_slice());
    context.compress_stream2(&mut output, &mut InBuffer::around(&bytes), if end { ZSTD_e_end } else { ZSTD_e_flush }).unwrap();
    let written = output.pos();
    packed.truncate(written);
    packed
}

fn duplicate(first: u64, count: u64, origin: u64) -> Vec<u8> {
    [vec![5], run(first, count), origin.to_le_bytes().to_vec()].concat()
}

fn after(lane: u16, frames: u64) -> Vec<u8> {
    [&[7], lane.to_le_bytes().as_slice(), &frames.to_le_bytes()].concat()
}

// SPEC: PROTOCOL.md#must-stream-begins
#[test]
fn refuses_hostile_streams_and_differences() {
    let start = |pages: usize| stream(pages, 20, false);
    let invalid =
        |codec: &str, pages: usize| format!("block of a batch is not valid `{codec}`: expected {} bytes of pages", pages * PAGE_BYTES);
    let length = |pages: usize, got: usize| {
        format!("block of a batch expands to the wrong length: expected {} bytes, got {got}", pages * PAGE_BYTES)
    };
    let one_of = |record: Vec<u8>| vec![pages(&[record])];
    let with = |kind: u8, mut record: Vec<u8>| {
        record[0] = kind;
        record
    };
    for good in [batch(4, &[(0, 3)], &start(3)), batch(2, &[(0, 3)], &stream(3, 20, true)), with(6, batch(4, &[(0, 3)], &start(3)))] {
        assert_eq!(verdict(&one_of(good)), None);
    }
    let two = |second: Vec<u8>| vec![pages(&[batch(4, &[(0, 3)], &start(3)), second])];
    check(&[
        ("a stream that was not begun", one_of(batch(3, &[(0, 3)], &start(3))), &invalid("zstd stream", 3)),
        ("a stream that ends", one_of(batch(4, &[(0, 3)], &stream(3, 20, true))), &invalid("zstd stream start", 3)),
        ("a window beyond the bound", one_of(batch(4, &[(0, 3)], &stream(3, 28, false))), &invalid("zstd stream start", 3)),
        ("a part that is too long", one_of(batch(4, &[(0, 2)], &start(3))), &format!("{} or more", length(2, 2 * PAGE_BYTES + 1))),
        ("a part that is too short", one_of(batch(4, &[(0, 4)], &start(3))), &length(4, 3 * PAGE_BYTES)),
        ("the same part again", two(batch(3, &[(3, 3)], &start(3))), &invalid("zstd stream", 3)),
        ("a frame that does not end", one_of(batch(2, &[(0, 3)], &start(3))), &invalid("zstd", 3)),
        ("a frame of more pages", one_of(batch(2, &[(0, 3)], &stream(100, 20, true))), &length(3, 3 * PAGE_BYTES)),
        ("no frame at all", one_of(batch(2, &[(0, 3)], &packed(3))), &invalid("zstd", 3)),
    ]);
    // A stream that failed is not gone on with.
    assert!(verdict(&two(batch(3, &[(3, 1)], &[1, 2, 3]))).is_some());
}

// SPEC: PROTOCOL.md#must-duplicate
// SPEC: PROTOCOL.md#must-after-first
#[test]
fn refuses_hostile_duplicates_and_afters() {
    let bounds = |field: &str, expected: &str| malformed(&format!("`{field}` of `pages frame` is out of bounds: expected {expected}"));
    let outside = |page: u64| format!("page {page} is outside guest RAM of {PAGES} pages");
    for good in [vec![after(1, 5), after(0, 0), duplicate(0, 100, 512)], vec![duplicate(0, 10, 5)], vec![after(15, 1)]] {
        assert_eq!(verdict(&[pages(&good)]), None);
    }
    let behind = "`record kind` of `pages frame` is malformed: expected `after` in front of all others, got";
    assert!(verdict(&[pages(&[zero(0, 1), after(1, 5)])]).unwrap().contains(behind));
    check(&[
        ("an origin outside", vec![pages(&[duplicate(0, 1, PAGES)])], &outside(PAGES)),
        ("an origin that ends outside", vec![pages(&[duplicate(0, 2, PAGES - 1)])], &outside(PAGES)),
        (
            "an origin beyond every number",
            vec![pages(&[duplicate(0, 2, u64::MAX)])],
            &bounds("origin", "0 to 1099511627774, got 18446744073709551615"),
        ),
        ("a page of another lane", vec![pages(&[duplicate(512, 1, 0)])], "page 512 came on lane 0: expected lane 1"),
        ("a page twice", vec![pages(&[zero(0, 1), duplicate(0, 1, 9)])], "page 0 came twice in round 1: expected once"),
        ("a lane that cannot be", vec![pages(&[after(16, 1)])], &bounds("lane to wait for", "0 to 15, got 16")),
    ]);
}

// SPEC: PROTOCOL.md#must-exact-block
#[test]
fn refuses_hostile_batches() {
    let ends = |field: &str, expected: usize, got: usize| {
        malformed(&format!("`pages frame` ends inside `{field}`: expected {expected} bytes, got {got}"))
    };
    let bounds = |field: &str, expected: &str| malformed(&format!("`{field}` of `pages frame` is out of bounds: expected {expected}"));
    let codec = |got: u8| {
        malformed(&format!("`codec` of `pages frame` is unknown: expected 1 (lz4), 2 (zstd), 3 (zstd stream) or 4 (its start), got {got}"))
    };
    let length =
        |pages: usize, got: &str| format!("block of a batch expands to the wrong length: expected {} bytes, got {got}", pages * PAGE_BYTES);
    let garbage = |pages: usize| format!("block of a batch is not valid `lz4`: expected {} bytes of pages", pages * PAGE_BYTES);
    let one_of = |record: Vec<u8>| vec![pages(&[record])];
    // One match of 51 MB in 200 kB.
    let bomb: Vec<u8> = [vec![0x1f, 7, 1, 0], vec![0xff; 199_996]].concat();
    // A page that is one literal, as a block says it: too long to be worth a batch.
    let literal = compress(&Content::Random(5).page());
    let zero_offset = [0x1f, 7, 0, 0, 0xff, 0];
    let before_begin = [0x1f, 7, 2, 0, 0xff, 0];
    let many: Vec<(u64, u64)> = (0..=BATCH_PAGES_MAX as u64).map(|page| (page, 1)).collect();
    let half = packed(2)[..packed(2).len() / 2].to_vec();
    check(&[
        ("codec zero", one_of(batch(0, &[(0, 1)], &packed(1))), &codec(0)),
        ("codec unknown", one_of(batch(5, &[(0, 1)], &packed(1))), &codec(5)),
        ("no runs", one_of(batch(1, &[], &packed(1))), &bounds("runs", "1 to 64, got 0")),
        ("too many runs", one_of(batch(1, &many, &packed(1))), &bounds("runs", "1 to 64, got 65")),
        ("runs cut", one_of(vec![3, 1, 64, 0, 0, 0]), &ends("runs", 512, 2)),
        ("run of no pages", one_of(batch(1, &[(0, 1), (9, 0)], &packed(1))), &bounds("pages of run", "1 to 63, got 0")),
        ("too many pages", one_of(batch(1, &[(0, 65)], &packed(65))), &bounds("pages of run", "1 to 64, got 65")),
        ("too many pages in all", one_of(batch(1, &[(0, 63), (100, 2)], &packed(65))), &bounds("pages of run", "1 to 1, got 2")),
        ("page twice in a batch", one_of(batch(1, &[(5, 2), (6, 1)], &packed(3))), "page 6 came twice in round 1: expected once"),
        ("another lane", one_of(batch(1, &[(0, 1), (513, 1)], &packed(2))), "page 513 came on lane 0: expected lane 1"),
        (
            "outside",
            one_of(batch(1, &[(0, 1), (1 << 39, 1)], &packed(2))),
            &format!("page {} is outside guest RAM of {PAGES} pages", 1u64 << 39),
        ),
        ("no block", one_of(batch(1, &[(0, 1)], &[])), &bounds("block length", "1 to 4095, got 0")),
        ("block that did not shrink", one_of(batch(1, &[(0, 1)], &vec![0; 4096])), &bounds("block length", "1 to 4095, got 4096")),
        ("literal block", one_of(batch(1, &[(0, 1)], &literal)), &bounds("block length", &format!("1 to 4095, got {}", literal.len()))),
        (
            "block length largest",
            one_of(batch_with_length(1, &[(0, 1)], u32::MAX, &[])),
            &bounds("block length", "1 to 4095, got 4294967295"),
        ),
        ("block cut", one_of(batch_with_length(1, &[(0, 1)], 40, &packed(1)[..20])), &ends("block", 40, 20)),
        (
            "block length too small",
            one_of(batch_with_length(1, &[(0, 1)], u32::try_from(packed(1).len()).unwrap(), &[packed(1), vec![0; 4]].concat())),
            &malformed("`pages frame` has 4 bytes after its last field: expected 0"),
        ),
        ("garbage", one_of(batch(1, &[(0, 1)], &[0xff; 100])), &garbage(1)),
        ("zeroes", one_of(batch(1, &[(0, 1)], &[0; 1])), &length(1, "0")),
        ("offset zero", one_of(batch(1, &[(0, 1)], &zero_offset)), &garbage(1)),
        ("offset before the block", one_of(batch(1, &[(0, 1)], &before_begin)), &garbage(1)),
        ("half a block", one_of(batch(1, &[(0, 2)], &half)), &garbage(2)),
        ("fewer pages than named", one_of(batch(1, &[(0, 3)], &packed(2))), &length(3, "8192")),
        ("a byte too few", one_of(batch(1, &[(0, 1)], &compress(&[7; 4095]))), &length(1, "4095")),
        ("a byte too many", one_of(batch(1, &[(0, 1)], &compress(&[7; 4097]))), &length(1, "4097 or more")),
        ("more pages than named", one_of(batch(1, &[(0, 1)], &packed(2))), &length(1, "8186 or more")),
        ("bomb", one_of(batch(1, &[(0, 64)], &bomb)), &garbage(64)),
        ("bomb that ends well", one_of(batch(1, &[(0, 64)], &[bomb.as_slice(), &[0]].concat())), &length(64, "50999000 or more")),
    ]);
}

/// A frame with a record of every kind.
fn every_record() -> Raw {
    pages(&[zero(0, 3), raw(3, 1, PAGE_BYTES), batch(1, &[(4, 1), (6, 2)], &packed(3)), padding(&[0; 7])])
}

#[test]
fn a_frame_truncated_at_every_byte_is_refused() {
    let whole = every_record();
    assert_eq!(verdict(std::slice::from_ref(&whole)), None);
    let mut refusals = std::collections::BTreeSet::new();
    for end in 1..whole.body.len() {
        let cut = Raw { body: whole.body[..end].to_vec(), ..whole.clone() };
        let refusal = verdict(&[cut]).unwrap();
        assert!(refusal.starts_with("frame 0 of lane 0 is malformed: `pages frame` ends inside `"), "{end}: {refusal}");
        refusals.insert(refusal.split('`').nth(3).unwrap().to_owned());
    }
    let fields = ["block", "block length", "codec", "padding", "raw pages", "record kind", "run", "runs"];
    assert!(refusals.iter().map(String::as_str).eq(fields), "{refusals:?}");
}

proptest! {
    #[test]
    fn random_headers_and_bodies_never_panic(header in any::<[u8; FRAME_HEADER_BYTES]>(), body in prop::collection::vec(any::<u8>(), 0..600)) {
        if let Ok(header) = FrameHeader::decode(&header) {
            prop_assert_eq!(FrameHeader::decode(&header.encode()).unwrap(), header);
        }
        for records in [1, 2, 60] {
            let _ = verdict(&[Raw { records, body: [vec![1], body.clone()].concat(), ..pages(&[]) }]);
        }
    }

    #[test]
    fn frames_with_a_few_bytes_changed_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), sparse in any::<bool>()) {
        let mut frame = every_record();
        for (at, byte) in changes {
            // Most of a frame is the bytes of pages; the rest is where it hurts.
            let at = at.index(frame.body.len());
            let at = if sparse && (20..4100).contains(&at) { at % 20 } else { at };
            frame.body[at] = byte;
        }
        let _ = verdict(&[frame]);
    }

    #[test]
    fn random_blocks_never_panic(block in prop::collection::vec(any::<u8>(), 1..4000), count in 1u64..=64) {
        let _ = verdict(&[pages(&[batch(1, &[(0, count)], &block)])]);
    }
}

// SPEC: PROTOCOL.md#must-agreed
#[test]
fn refuses_what_the_terms_exclude() {
    use Compression as C;
    use CompressionScope as S;
    let block = packed(2);
    let lz4 = || batch(1, &[(0, 2)], &block);
    let lone = || batch(1, &[(0, 1)], &compress(&[7; PAGE_BYTES]));
    let delta = || [vec![6], lz4().split_off(1)].concat();
    let duplicate = || [vec![5], run(1, 1), 0_u64.to_le_bytes().to_vec()].concat();
    let zstd = |codec| batch(codec, &[(0, 2)], &[0; 8]);
    let refused = |terms: &str, got: &str| format!("frame of lane 0 has a record of kind `{got}`: expected what was agreed, {terms}");
    let none = "compression none in scope stream";
    for (compression, scope, record, expected) in [
        (C::None, S::Stream, lz4(), refused(none, "lz4")),
        (C::None, S::Stream, zstd(2), refused(none, "zstd")),
        (C::None, S::Stream, zstd(4), refused(none, "zstd stream start")),
        (C::None, S::Stream, delta(), refused(none, "delta")),
        (C::None, S::Stream, duplicate(), refused(none, "duplicate")),
        (C::Lz4, S::Stream, zstd(2), refused("compression lz4 in scope stream", "zstd")),
        (C::Zstd, S::Stream, lz4(), refused("compression zstd in scope stream", "lz4")),
        (C::Zstd, S::Batch, zstd(4), refused("compression zstd in scope batch", "zstd stream start")),
        (C::Auto, S::Batch, zstd(3), refused("compression auto in scope batch", "zstd stream")),
        (C::Auto, S::Batch, delta(), refused("compression auto in scope batch", "delta")),
        (C::Auto, S::Batch, duplicate(), refused("compression auto in scope batch", "duplicate")),
        (C::Auto, S::Page, zero(0, 2), refused("compression auto in scope page", "several pages")),
        (C::Auto, S::Page, raw(0, 2, 2 * PAGE_BYTES), refused("compression auto in scope page", "several pages")),
        (C::Lz4, S::Page, lz4(), refused("compression lz4 in scope page", "several pages")),
    ] {
        assert_eq!(verdict_on(&terms(2, compression, scope, false), &[pages(&[record])]), Some(expected));
    }
    for (compression, scope, record) in [
        (C::Lz4, S::Stream, lz4()),
        (C::Auto, S::Batch, lz4()),
        (C::Lz4, S::Page, lone()),
        (C::Auto, S::Page, zero(0, 1)),
        (C::Lz4, S::Stream, duplicate()),
        (C::None, S::Batch, zero(0, 2)),
    ] {
        assert_eq!(verdict_on(&terms(2, compression, scope, false), &[pages(&[record])]), None, "{compression:?}, {scope:?}");
    }
}

// SPEC: PROTOCOL.md#must-padding-last
#[test]
fn refuses_frames_that_are_not_padded_where_that_was_agreed() {
    let padded = terms(1, Compression::None, CompressionScope::Page, true);
    let fits = 4096 - zero(0, 1).len() - 5;
    for (zeroes, good) in [(None, false), (Some(0), false), (Some(fits - 1), false), (Some(fits), true), (Some(fits + 1), false)] {
        let records: Vec<_> = [Some(zero(0, 1)), zeroes.map(|zeroes| padding(&vec![0; zeroes]))].into_iter().flatten().collect();
        let verdict = verdict_on(&padded, &[pages(&records)]);
        assert_eq!(verdict.is_none(), good, "{zeroes:?}: {verdict:?}");
        assert!(good || verdict.unwrap().contains("length padding to one of few lengths"));
    }
}
