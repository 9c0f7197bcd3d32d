//! What a page of a synthetic guest holds: a function of seed, page and visit, so that anybody can check it.

use crate::types::PAGE_BYTES;

/// Which pages a writer writes, in which order, and how often each was written after `visits` visits.
///
/// Writer `w` of `n` owns pages `w, w + n, w + 2n, ...` of the working set and goes through them in a
/// stride that is coprime to their number, so that one counter says what every page must hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Course {
    writer: u64,
    writers: u64,
    own: u64,
    stride: u64,
}

impl Course {
    pub(super) fn new(seed: u64, writer: u32, writers: u32, working_set_pages: u64) -> Self {
        let (writer, writers) = (u64::from(writer), u64::from(writers.max(1)));
        let own = working_set_pages.saturating_sub(writer).div_ceil(writers);
        let mut stride = (mix(seed ^ writer) % own.max(1)).max(1);
        while gcd(stride, own) > 1 {
            stride -= 1;
        }
        Self { writer, writers, own, stride }
    }

    /// Pages of this writer; without any it never writes.
    pub(super) fn pages(&self) -> u64 {
        self.own
    }

    /// The page of visit `visit`, counted from 0.
    pub(super) fn page(&self, visit: u64) -> u64 {
        let step = u128::from(visit % self.own.max(1)) * u128::from(self.stride) % u128::from(self.own.max(1));
        u64::try_from(step).unwrap_or(0) * self.writers + self.writer
    }

    /// The visit in which the page of `visit` was written before, if it was.
    pub(super) fn before(&self, visit: u64) -> Option<u64> {
        visit.checked_sub(self.own)
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A well-mixed 64-bit value (the finaliser of `SplitMix64`).
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fill(page: &mut [u8; PAGE_BYTES], word: impl Fn(u64) -> u64) {
    for (index, bytes) in (0u64..).zip(page.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&word(index).to_le_bytes());
    }
}

/// A page before anybody wrote it: zero, one of a few that occur often, text-like, or random.
pub(super) fn untouched(seed: u64, number: u64, page: &mut [u8; PAGE_BYTES]) {
    let key = mix(seed ^ number.wrapping_mul(0x1_0000_0001));
    match key % 8 {
        0..3 => page.fill(0),
        3 | 4 => fill(page, |index| mix(seed ^ ((key >> 8) % 4)) ^ (index % 64)),
        5 | 6 => fill(page, |index| mix(key ^ (index / 16)) & 0x0f0f_0f0f_0f0f_0f0f),
        _ => fill(page, |index| mix(key.wrapping_add(index))),
    }
}

/// A page after visit `visit`: a header that names page and visit, a random quarter, and words that repeat.
pub(super) fn written(seed: u64, number: u64, visit: u64, page: &mut [u8; PAGE_BYTES]) {
    let key = mix(seed ^ mix(number) ^ visit.rotate_left(32));
    fill(page, |index| match index {
        0 => number,
        1 => visit,
        2 => key,
        3..128 => mix(key.wrapping_add(index)),
        _ => key ^ (index % 8),
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn writers_share_the_working_set_and_visit_every_page_once_a_pass() {
        for (pages, writers) in [(1, 1), (10, 3), (64, 4), (97, 5), (2, 4)] {
            let mut seen = BTreeSet::new();
            for writer in 0..writers {
                let course = Course::new(42, writer, writers, pages);
                for visit in 0..course.pages() {
                    assert!(seen.insert(course.page(visit)));
                    let next = visit + course.pages();
                    assert_eq!((course.page(next), course.before(next), course.before(visit)), (course.page(visit), Some(visit), None));
                }
            }
            assert_eq!(seen, (0..pages).collect());
        }
    }

    #[test]
    fn every_page_and_visit_looks_different() {
        let mut pages = BTreeSet::new();
        for number in 0..20 {
            for visit in 0..20 {
                let mut page = [0; PAGE_BYTES];
                written(1, number, visit, &mut page);
                assert!(pages.insert(page.to_vec()));
            }
        }
    }
}
