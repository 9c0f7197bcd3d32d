//! Sets of guest pages.

use crate::limits::STRIPE_PAGES;
use crate::types::{LaneIndex, PageNumber};

const WORD_BITS: u64 = 64;

/// A set of pages of one VM, one bit a page. Page numbers at or beyond `pages()` are not members.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageSet({} of {})", self.len(), self.pages)
    }
}

impl PageSet {
    /// No page of a VM with `pages` pages.
    #[must_use]
    pub fn empty(pages: u64) -> Self {
        Self { words: vec![0; usize::try_from(pages.div_ceil(WORD_BITS)).unwrap_or(usize::MAX)], pages }
    }

    /// Every page of a VM with `pages` pages.
    #[must_use]
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.words.fill(u64::MAX);
        set.clear_tail();
        set
    }

    /// A bitmap as KVM gives it: bit `n` of word `n / 64` is page `n`. Missing words are empty,
    /// bits beyond `pages` are dropped.
    #[must_use]
    pub fn from_words(pages: u64, words: &[u64]) -> Self {
        let mut set = Self::empty(pages);
        for (own, given) in set.words.iter_mut().zip(words) {
            *own = *given;
        }
        set.clear_tail();
        set
    }

    fn clear_tail(&mut self) {
        let used = self.pages % WORD_BITS;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// The bitmap, bit `n` of word `n / 64` being page `n`.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Pages of the VM, members or not.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn locate(&self, page: PageNumber) -> Option<(usize, u64)> {
        (page.0 < self.pages).then(|| (usize::try_from(page.0 / WORD_BITS).unwrap_or(usize::MAX), 1 << (page.0 % WORD_BITS)))
    }

    /// Adds a page; false if it was there or is no page of this VM.
    pub fn insert(&mut self, page: PageNumber) -> bool {
        let Some((word, bit)) = self.locate(page) else { return false };
        let Some(word) = self.words.get_mut(word) else { return false };
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Takes a page out; false if it was not there.
    pub fn remove(&mut self, page: PageNumber) -> bool {
        let Some((word, bit)) = self.locate(page) else { return false };
        let Some(word) = self.words.get_mut(word) else { return false };
        let there = *word & bit != 0;
        *word &= !bit;
        there
    }

    /// Whether a page is a member.
    #[must_use]
    pub fn contains(&self, page: PageNumber) -> bool {
        self.locate(page).and_then(|(word, bit)| Some(self.words.get(word)? & bit != 0)).unwrap_or(false)
    }

    /// Members.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is no member.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Adds every member of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (own, given) in self.words.iter_mut().zip(&other.words) {
            *own |= given;
        }
        self.clear_tail();
    }

    /// Takes out every member of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (own, given) in self.words.iter_mut().zip(&other.words) {
            *own &= !given;
        }
    }

    /// Empties the set and returns what it held.
    pub fn take(&mut self) -> Self {
        let pages = self.pages;
        std::mem::replace(self, Self::empty(pages))
    }

    /// The first run of consecutive members at or after `from`, cut to `pages_max` pages:
    /// (first page, count).
    #[must_use]
    pub fn next_run(&self, from: PageNumber, pages_max: u64) -> Option<(PageNumber, u64)> {
        self.next_run_before(from, PageNumber(u64::MAX), pages_max)
    }

    /// As [`next_run`](Self::next_run), of a run that begins before `end`; looks no further.
    #[must_use]
    pub fn next_run_before(&self, from: PageNumber, end: PageNumber, pages_max: u64) -> Option<(PageNumber, u64)> {
        let mut index = usize::try_from(from.0 / WORD_BITS).ok()?;
        let mut word = self.words.get(index)? & (u64::MAX << (from.0 % WORD_BITS));
        while word == 0 {
            index += 1;
            if index as u64 * WORD_BITS >= end.0 {
                return None;
            }
            word = *self.words.get(index)?;
        }
        let first = index as u64 * WORD_BITS + u64::from(word.trailing_zeros());
        if first >= end.0 {
            return None;
        }
        let mut end = first;
        while end - first < pages_max {
            let Some(word) = self.words.get(usize::try_from(end / WORD_BITS).ok()?) else { break };
            let ones = u64::from((!(word >> (end % WORD_BITS))).trailing_zeros()).min(WORD_BITS - end % WORD_BITS);
            end += ones;
            if ones == 0 || !end.is_multiple_of(WORD_BITS) {
                break;
            }
        }
        Some((PageNumber(first), (end - first).min(pages_max)))
    }

    /// As [`next_run`](Self::next_run), of the pages that `lane` of `lanes` carries.
    #[must_use]
    pub fn next_run_of_lane(&self, lane: LaneIndex, lanes: u16, from: PageNumber, pages_max: u64) -> Option<(PageNumber, u64)> {
        let (lane, lanes) = (u64::from(lane.0), u64::from(lanes.max(1)));
        let mut from = from.0;
        loop {
            let stripe = from / STRIPE_PAGES;
            let ahead = (lane % lanes + lanes - stripe % lanes) % lanes;
            if ahead > 0 {
                from = stripe.checked_add(ahead)?.checked_mul(STRIPE_PAGES)?;
            }
            let (first, count) = self.next_run(PageNumber(from), pages_max)?;
            let stripe = first.0 / STRIPE_PAGES;
            if lanes == 1 {
                return Some((first, count));
            }
            if stripe % lanes == lane {
                return Some((first, count.min((stripe + 1) * STRIPE_PAGES - first.0)));
            }
            from = first.0;
        }
    }

    /// Runs of consecutive members, lowest page first, each at most `pages_max` long.
    pub fn runs(&self, pages_max: u64) -> impl Iterator<Item = (PageNumber, u64)> + '_ {
        let mut from = PageNumber(0);
        std::iter::from_fn(move || {
            let (first, count) = self.next_run(from, pages_max)?;
            from = PageNumber(first.0 + count);
            Some((first, count))
        })
    }

    /// Members, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = PageNumber> + '_ {
        self.runs(u64::MAX).flat_map(|(first, count)| (first.0..first.0 + count).map(PageNumber))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn full_holds_exactly_the_pages_of_the_vm() {
        for pages in [1, 63, 64, 65, 1000] {
            let set = PageSet::full(pages);
            assert_eq!(set.len(), pages);
            assert!(!set.contains(PageNumber(pages)));
            assert_eq!(set.runs(u64::MAX).collect::<Vec<_>>(), [(PageNumber(0), pages)]);
        }
        assert!(PageSet::empty(0).is_empty());
    }

    #[test]
    fn bits_beyond_the_vm_are_dropped() {
        assert_eq!(PageSet::from_words(3, &[u64::MAX, u64::MAX]).len(), 3);
        assert!(!PageSet::empty(3).insert(PageNumber(3)));
    }

    proptest! {
        #[test]
        fn a_bounded_search_finds_what_a_whole_one_finds_in_there(
            words in prop::collection::vec(prop_oneof![Just(0), any::<u64>()], 1..9), from in 0u64..600, ahead in 0u64..600, max in 1u64..200,
        ) {
            let set = PageSet::from_words(words.len() as u64 * 64, &words);
            let (from, end) = (PageNumber(from), PageNumber(from + ahead));
            let expected = set.next_run(from, max).filter(|(first, _)| *first < end);
            prop_assert_eq!(set.next_run_before(from, end, max), expected);
        }

        #[test]
        fn the_lanes_share_out_every_page_once(words in prop::collection::vec(any::<u64>(), 1..80), lanes in 1u16..9, max in 1u64..600) {
            let set = PageSet::from_words(words.len() as u64 * 64, &words);
            let mut seen = PageSet::empty(set.pages());
            for lane in (0..lanes).map(LaneIndex) {
                let mut from = PageNumber(0);
                while let Some((first, count)) = set.next_run_of_lane(lane, lanes, from, max) {
                    prop_assert!(first >= from && (1..=max).contains(&count));
                    for page in (first.0..first.0 + count).map(PageNumber) {
                        prop_assert!(crate::memory::lane_of(page, lanes) == lane && seen.insert(page));
                    }
                    from = PageNumber(first.0 + count);
                }
            }
            prop_assert_eq!(seen, set);
        }

        #[test]
        fn behaves_as_a_set_of_integers(pages in 1u64..300, ops in prop::collection::vec((any::<bool>(), 0u64..320), 0..200), max in 1u64..70) {
            let mut set = PageSet::empty(pages);
            let mut model = BTreeSet::new();
            for (add, page) in ops {
                let number = PageNumber(page);
                if add {
                    prop_assert_eq!(set.insert(number), page < pages && model.insert(page));
                } else {
                    prop_assert_eq!(set.remove(number), model.remove(&page));
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.iter().map(|p| p.0).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            let mut seen = Vec::new();
            for (first, count) in set.runs(max) {
                prop_assert!(count >= 1 && count <= max);
                seen.extend(first.0..first.0 + count);
            }
            prop_assert_eq!(seen, model.into_iter().collect::<Vec<_>>());
        }
    }
}
