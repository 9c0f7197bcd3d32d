//! Pages that equal others, and pages that resemble what the destination has of them.

use proptest::prelude::*;

use super::{Content, Pair, terms};
use crate::memory::{Effort, PageCounts};
use crate::types::{PAGE_BYTES, PageNumber, RamRegion};
use crate::wire::{Compression, CompressionScope, StreamTerms};

/// Four stripes, so that two and three lanes have some each.
const PAGES: u64 = 2048;

fn regions() -> Vec<RamRegion> {
    vec![RamRegion { guest_base: 0, bytes: PAGES * PAGE_BYTES as u64 }]
}

fn pair(lanes: u16, compression: Compression) -> Pair {
    Pair::knowing(&regions(), &stream(lanes, compression))
}

fn stream(lanes: u16, compression: Compression) -> StreamTerms {
    terms(lanes, compression, CompressionScope::Stream, false)
}

fn counts(pair: &Pair) -> PageCounts {
    let mut sum = PageCounts::default();
    pair.encoders.iter().for_each(|encoder| sum.add(&encoder.counts()));
    sum
}

fn received(pair: &Pair) -> PageCounts {
    let mut sum = PageCounts::default();
    pair.decoders.iter().for_each(|decoder| sum.add(&decoder.counts()));
    sum
}

/// The guest changes a few bytes of a page.
fn touch(pair: &mut Pair, page: u64, value: u8) {
    let mut bytes = [0; PAGE_BYTES];
    pair.source.read(PageNumber(page), &mut bytes).unwrap();
    bytes[usize::from(value) * 8 + 100] ^= value | 1;
    pair.source.write(PageNumber(page), &bytes).unwrap();
    pair.dirty.insert(PageNumber(page));
}

#[test]
fn equal_pages_are_sent_once_whatever_lane_they_are_on() {
    let mut pair = pair(2, Compression::Lz4);
    for page in 0..PAGES {
        pair.write(page, 1, Content::Random(page % 100));
    }
    pair.finish().unwrap();
    assert!(pair.memory_agrees() && pair.totals_agree());
    let sent = counts(&pair);
    assert_eq!(sent, received(&pair));
    assert_eq!((sent.raw + sent.compressed, sent.duplicate), (100, PAGES - 100));
}

#[test]
fn a_lane_that_does_not_wait_for_the_other_is_noticed() {
    let mut pair = pair(2, Compression::Lz4);
    pair.waits = false;
    // Lane 1 is applied first; what its pages equal comes on lane 0.
    for page in 0..1024 {
        pair.write(page, 1, Content::Random(page % 512));
    }
    pair.begin_round();
    for lane in [0, 1] {
        while pair.send(lane) {}
    }
    for lane in [1, 0] {
        while pair.deliver(lane).unwrap() {}
    }
    assert!(!pair.memory_agrees());
}

#[test]
fn a_page_that_changes_a_little_again_and_again_goes_out_as_a_difference() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut pair = pair(2, compression);
        for page in 0..64 {
            pair.write(page, 1, Content::Random(page));
        }
        pair.finish().unwrap();
        for round in 1..=4 {
            for page in 0..64 {
                touch(&mut pair, page, round);
            }
            let before: u64 = pair.encoders.iter().map(|encoder| encoder.totals().bytes).sum();
            pair.finish().unwrap();
            assert!(pair.memory_agrees(), "{compression:?}, round {round}");
            let bytes: u64 = pair.encoders.iter().map(|encoder| encoder.totals().bytes).sum::<u64>() - before;
            // The first time again they are kept, from then on they are a hundredth.
            // (A stream that looks back has them already.)
            assert!(bytes < 64 * PAGE_BYTES as u64 / 20 || round == 1, "{compression:?}, round {round}: {bytes} bytes");
        }
        assert_eq!((counts(&pair).delta, received(&pair).delta), (64 * 3, 64 * 3));
    }
}

#[test]
fn in_smaller_scopes_no_page_says_anything_of_another() {
    for scope in [CompressionScope::Page, CompressionScope::Batch] {
        let mut pair = Pair::knowing(&regions(), &terms(2, Compression::Lz4, scope, false));
        for round in 0..3 {
            for page in 0..200 {
                pair.write(page, 1, Content::Random(7));
                touch(&mut pair, page, round);
            }
            pair.finish().unwrap();
        }
        let sent = counts(&pair);
        assert_eq!((sent.duplicate, sent.delta), (0, 0));
        assert!(pair.memory_agrees());
    }
}

#[test]
fn a_stream_looks_back_to_what_the_lane_has_carried() {
    let bytes = |scope| {
        let mut pair = Pair::knowing(&regions(), &terms(1, Compression::Zstd, scope, false));
        for page in 0..PAGES {
            // No page equals another, and each has a half that one far away has.
            pair.write(page, 1, Content::Random(page % 1024));
            touch(&mut pair, page, u8::try_from(page / 1024).unwrap() + 1);
        }
        pair.finish().unwrap();
        assert!(pair.memory_agrees());
        pair.encoders[0].totals().bytes
    };
    assert!(bytes(CompressionScope::Stream) * 10 < bytes(CompressionScope::Batch) * 6);
}

const EFFORTS: [Effort; 5] = [Effort::None, Effort::Lz4, Effort::Zstd(1), Effort::Zstd(3), Effort::None];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn whatever_the_guest_does_the_destination_has_its_memory(
        lanes in 1_u16..4,
        rounds in prop::collection::vec(
            (
                prop::collection::vec((0..PAGES, 1_u64..40, 0_u64..12), 0..12),
                prop::collection::vec((0..PAGES, 0_u8..30), 0..30),
                // Which lane moves next, whether it sends or delivers, and how hard it tries.
                prop::collection::vec((0_usize..3, any::<bool>(), 0_usize..5), 0..40),
                any::<bool>(),
            ),
            1..6,
        ),
    ) {
        let mut pair = pair(lanes, Compression::Auto);
        for (writes, touches, steps, cut) in rounds {
            for (page, count, seed) in writes {
                let content = match seed { 0 => Content::Zero, 1 => Content::Repetitive(7), seed => Content::Random(seed) };
                pair.write(page, count, content);
            }
            for (page, value) in touches {
                touch(&mut pair, page, value);
            }
            pair.begin_round();
            for (lane, sends, effort) in steps {
                let lane = lane % usize::from(lanes);
                pair.encoders[lane].set_effort(EFFORTS[effort]);
                if sends {
                    pair.send(lane);
                } else {
                    pair.deliver(lane).unwrap();
                }
            }
            if cut {
                pair.interrupt();
            } else {
                pair.run_out().unwrap();
                prop_assert!(pair.memory_agrees() && pair.totals_agree());
            }
        }
        pair.finish().unwrap();
        prop_assert!(pair.memory_agrees() && pair.totals_agree());
    }
}
