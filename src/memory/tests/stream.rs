//! What leaves the source arrives, and what does not is noticed.

use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;
use crate::limits::{FRAME_BODY_BYTES_MAX, STRIPE_PAGES};
use crate::memory::PageCounts;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, u64, Content),
    BeginRound,
    Send(usize),
    Deliver(usize),
    Interrupt,
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        3 => Just(Content::Zero),
        2 => any::<u64>().prop_map(Content::Random),
        2 => any::<u8>().prop_map(Content::Repetitive),
        2 => any::<u64>().prop_map(Content::HalfRandom),
        1 => (1u8..).prop_map(Content::LastByte),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0u64..2400, prop_oneof![1u64..4, 1u64..700], content()).prop_map(|(first, count, content)| Op::Write(first, count, content)),
        2 => Just(Op::BeginRound),
        8 => (0usize..8).prop_map(Op::Send),
        8 => (0usize..8).prop_map(Op::Deliver),
        1 => Just(Op::Interrupt),
    ]
}

fn regions() -> impl Strategy<Value = Vec<RamRegion>> {
    prop::collection::vec((1u64..800, 0u64..5), 1..4).prop_map(|sizes| {
        let mut base = 0;
        let place = |(pages, hole): (u64, u64)| {
            let region = RamRegion { guest_base: base + hole * 4096, bytes: pages * 4096 };
            base = region.guest_base + region.bytes;
            region
        };
        sizes.into_iter().map(place).collect()
    })
}

fn any_terms() -> impl Strategy<Value = StreamTerms> {
    let compression = prop_oneof![Just(Compression::None), Just(Compression::Lz4)];
    let scope = prop_oneof![Just(CompressionScope::Page), Just(CompressionScope::Batch), Just(CompressionScope::Stream)];
    (1u16..=8, compression, scope, any::<bool>()).prop_map(|(lanes, compression, scope, padded)| terms(lanes, compression, scope, padded))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_destination_ends_up_equal_to_the_source(regions in regions(), terms in any_terms(), ops in prop::collection::vec(op(), 0..60)) {
        let mut pair = Pair::new(&regions, &terms);
        let lanes = usize::from(terms.lanes);
        for op in ops {
            match op {
                Op::Write(first, count, content) => pair.write(first % pair.source.pages(), count, content),
                Op::BeginRound => pair.begin_round(),
                Op::Send(lane) => { pair.send(lane % lanes); }
                Op::Deliver(lane) => { pair.deliver(lane % lanes).unwrap(); }
                Op::Interrupt => pair.interrupt(),
            }
        }
        pair.finish().unwrap();
        prop_assert!(pair.memory_agrees());
        prop_assert!(pair.totals_agree());
        prop_assert!(pair.tracker.is_settled());
        prop_assert_eq!(pair.tracker.applied_pages(), pair.source.pages());
    }
}

/// A VM whose last stripe is short, with something of everything in it.
fn furnished(terms: &StreamTerms) -> Pair {
    let mut pair = Pair::new(&[RamRegion { guest_base: 0, bytes: (4 * STRIPE_PAGES + 100) * 4096 }], terms);
    for page in 0..pair.source.pages() {
        let content = match page % 7 {
            0..3 => Content::Zero,
            3 | 4 => Content::Random(page),
            5 => Content::HalfRandom(page),
            _ => Content::Repetitive(7),
        };
        pair.write(page, 1, content);
    }
    pair
}

#[test]
fn a_skipped_dirty_page_is_caught_by_the_digest() {
    let mut pair = furnished(&terms(3, Compression::Lz4, CompressionScope::Stream, false));
    pair.fault = Fault::SkipPage(PageNumber(3));
    pair.finish().unwrap();
    assert!(pair.totals_agree(), "both ends counted the same frames");
    assert!(!pair.memory_agrees());
    let stripes = |ram| crate::memory::digest_stripes(ram, 0..crate::memory::stripe_count(ram)).unwrap();
    assert_eq!(crate::memory::differing_stripes(&stripes(&pair.source), &stripes(&pair.destination)), [0]);
}

// SPEC: PROTOCOL.md#must-mark-totals
#[test]
fn a_lost_last_frame_is_caught_by_sequence_by_mark_and_by_totals() {
    for lane in (0..3).map(LaneIndex) {
        let lossy = |fault| {
            let mut pair = furnished(&terms(3, Compression::Lz4, CompressionScope::Stream, false));
            pair.fault = fault;
            (pair.finish(), pair)
        };
        let (result, _) = lossy(Fault::DropLastPages(lane));
        assert!(matches!(result, Err(DecodeError::Sequence { lane: on, .. }) if on == lane), "{result:?}");
        let (result, _) = lossy(Fault::DropLastPagesAndRenumber(lane));
        assert!(matches!(result, Err(DecodeError::Totals { lane: on, .. }) if on == lane), "{result:?}");
        let (result, pair) = lossy(Fault::DropMark(lane));
        assert!(result.is_ok() && !pair.totals_agree() && !pair.tracker.is_settled(), "{result:?}");
        let (result, pair) = lossy(Fault::None);
        assert!(result.is_ok() && pair.totals_agree() && pair.tracker.is_settled() && pair.memory_agrees(), "{result:?}");
    }
}

#[test]
fn pages_are_counted_by_class_the_same_at_both_ends() {
    for compression in [Compression::None, Compression::Lz4] {
        let mut pair = furnished(&terms(1, compression, CompressionScope::Page, false));
        pair.finish().unwrap();
        let pages = 4 * STRIPE_PAGES + 100;
        let of = |remainder: u64| (0..pages).filter(|page| page % 7 == remainder).count() as u64;
        let zero = of(0) + of(1) + of(2);
        let random = of(3) + of(4);
        let expected = match compression {
            Compression::None => PageCounts { zero, raw: pages - zero, ..PageCounts::default() },
            _ => PageCounts { zero, raw: random, compressed: pages - zero - random, ..PageCounts::default() },
        };
        assert_eq!(pair.encoders[0].counts(), expected);
        assert_eq!(pair.decoders[0].counts(), expected);
    }
}

#[test]
fn frames_stay_within_their_limits_whatever_the_pages_hold() {
    for content in [Content::Zero, Content::Random(1), Content::Repetitive(1), Content::HalfRandom(1)] {
        for scope in [CompressionScope::Page, CompressionScope::Batch] {
            let terms = terms(1, Compression::Lz4, scope, true);
            let ram = flat(5 * STRIPE_PAGES);
            // Every other page differs in kind, so that runs are as short as they get.
            for page in (0..ram.pages()).step_by(2) {
                ram.write(PageNumber(page), &content.page()).unwrap();
            }
            let mut encoder = Encoder::new(LaneIndex(0), 1, &terms, 1 << 12);
            let (mut from, mut pages) = (Some(PageNumber(0)), 0);
            while let Some(at) = from {
                let mut frame = Vec::new();
                from = encoder.encode_frame(&ram, Round(1), &PageSet::full(ram.pages()), at, &mut frame).unwrap();
                let header = header_of(&frame);
                assert_eq!(frame.len(), FRAME_HEADER_BYTES + header.body_bytes);
                assert!(header.body_bytes <= FRAME_BODY_BYTES_MAX);
                pages += encoder.totals().pages - pages;
            }
            assert_eq!(pages, ram.pages());
        }
    }
}

// SPEC: PROTOCOL.md#must-mark-every-lane
#[test]
fn an_empty_lane_sends_marks_only() {
    let mut encoder = Encoder::new(LaneIndex(1), 2, &terms(2, Compression::Lz4, CompressionScope::Stream, true), 1 << 12);
    let ram = flat(10);
    let mut out = vec![9];
    assert_eq!(encoder.encode_frame(&ram, Round(1), &PageSet::full(10), PageNumber(0), &mut out).unwrap(), None);
    assert_eq!(out, [9]);
    encoder.round_mark(Round(1), &mut out);
    assert_eq!(header_of(&out[1..]).sequence, 0);
}

#[test]
fn a_set_larger_than_the_ram_leaves_no_half_frame() {
    let mut encoder = Encoder::new(LaneIndex(0), 1, &terms(1, Compression::Lz4, CompressionScope::Stream, false), 1 << 12);
    let mut out = Vec::new();
    let refused = encoder.encode_frame(&flat(100), Round(1), &PageSet::full(101), PageNumber(0), &mut out);
    assert!(refused.is_err() && out.is_empty() && encoder.totals().frames == 0);
}

#[test]
fn zero_pages_do_not_allocate_fresh_memory() {
    let file = tempfile::tempfile().unwrap();
    let pages = 2 * STRIPE_PAGES;
    file.set_len(pages * 4096).unwrap();
    let destination = GuestRam::map(file.try_clone().unwrap(), MemoryLayout::flat(pages).unwrap()).unwrap();
    let source = flat(pages);
    let mut encoder = Encoder::new(LaneIndex(0), 1, &terms(1, Compression::None, CompressionScope::Stream, false), 1 << 12);
    let mut decoder = Decoder::new(LaneIndex(0), 1, &terms(1, Compression::None, CompressionScope::Stream, false), pages);
    let mut round = Round(0);
    let mut move_all = |source: &GuestRam| {
        let mut frame = Vec::new();
        round = Round(round.0 + 1);
        assert_eq!(encoder.encode_frame(source, round, &PageSet::full(pages), PageNumber(0), &mut frame).unwrap(), None);
        decoder.apply(&header_of(&frame), &frame[FRAME_HEADER_BYTES..], &destination).unwrap();
        let mut mark = Vec::new();
        encoder.round_mark(round, &mut mark);
        assert_eq!(decoder.apply(&header_of(&mark), &mark[FRAME_HEADER_BYTES..], &destination).unwrap(), Some(round));
    };
    move_all(&source);
    assert_eq!(file.metadata().unwrap().blocks(), 0);
    // A page that was written and became zero is cleared.
    source.write(PageNumber(600), &Content::Random(1).page()).unwrap();
    move_all(&source);
    assert_ne!(digest_ram(&destination).unwrap(), digest_ram(&flat(pages)).unwrap());
    source.clear(PageNumber(600), 1).unwrap();
    move_all(&source);
    assert_eq!(digest_ram(&destination).unwrap(), digest_ram(&flat(pages)).unwrap());
}

/// Length of the frame that carries two neighbouring pages.
fn length_of(scope: CompressionScope, pages: [Content; 2]) -> usize {
    let ram = flat(2);
    ram.write(PageNumber(0), &pages[0].page()).unwrap();
    ram.write(PageNumber(1), &pages[1].page()).unwrap();
    let mut out = Vec::new();
    let mut encoder = Encoder::new(LaneIndex(0), 1, &terms(1, Compression::Lz4, scope, false), 1 << 12);
    encoder.encode_frame(&ram, Round(1), &PageSet::full(2), PageNumber(0), &mut out).unwrap();
    out.len()
}

// SPEC: PROTOCOL.md#must-page-scope
#[test]
fn in_page_scope_the_length_of_a_page_says_nothing_about_its_neighbour() {
    let secrets = [Content::Zero, Content::Random(1), Content::Random(2), Content::HalfRandom(3), Content::Repetitive(4)];
    let share = |scope, attacker, secret| length_of(scope, [attacker, secret]).abs_diff(length_of(scope, [Content::Random(99), secret]));
    let mut leaks = 0;
    for attacker in secrets {
        let scope = CompressionScope::Page;
        let alone = share(scope, attacker, secrets[0]);
        assert!(secrets.iter().all(|secret| share(scope, attacker, *secret) == alone), "{attacker:?}");
        // The control: a larger scope does leak, so the measurement can see it.
        let scope = CompressionScope::Stream;
        let alone = share(scope, attacker, secrets[0]);
        leaks += usize::from(secrets.iter().any(|secret| share(scope, attacker, *secret) != alone));
    }
    assert!(leaks > 0);
}

#[test]
fn padded_frames_have_few_lengths() {
    let lengths = |padded| {
        let mut lengths = std::collections::BTreeSet::new();
        for count in 1..100u64 {
            let ram = flat(count);
            for page in 0..count {
                ram.write(PageNumber(page), &Content::HalfRandom(page).page()).unwrap();
            }
            let mut out = Vec::new();
            let mut encoder = Encoder::new(LaneIndex(0), 1, &terms(1, Compression::Lz4, CompressionScope::Page, padded), 1 << 12);
            encoder.encode_frame(&ram, Round(1), &PageSet::full(count), PageNumber(0), &mut out).unwrap();
            lengths.insert(out.len());
        }
        lengths.len()
    };
    assert_eq!(lengths(false), 99);
    assert!(lengths(true) < 50, "{}", lengths(true));
}

#[test]
fn lanes_can_work_on_their_own_threads() {
    let mut pair = furnished(&terms(4, Compression::Lz4, CompressionScope::Stream, false));
    pair.begin_round();
    let (source, destination, full) = (&pair.source, &pair.destination, &PageSet::full(pair.source.pages()));
    std::thread::scope(|scope| {
        for (encoder, decoder) in pair.encoders.iter_mut().zip(&mut pair.decoders) {
            scope.spawn(move || {
                let mut from = Some(PageNumber(0));
                while let Some(at) = from {
                    let mut frame = Vec::new();
                    from = encoder.encode_frame(source, Round(1), full, at, &mut frame).unwrap();
                    decoder.apply(&header_of(&frame), &frame[FRAME_HEADER_BYTES..], destination).unwrap();
                }
            });
        }
    });
    assert!(pair.memory_agrees() && pair.totals_agree());
}
