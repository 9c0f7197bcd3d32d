//! What the destination has of pages that go out again and again: the base of differences.

use std::collections::HashMap;

use crate::types::{PAGE_BYTES, PageNumber, Round};

/// The last version sent of the pages of one lane that went out in a round after the first. Bounded; what does not fit goes out
/// whole.
#[derive(Default)]
pub(super) struct Versions {
    pages: HashMap<PageNumber, Version>,
    pages_max: usize,
    round: Round,
}

struct Version {
    content: Box<[u8; PAGE_BYTES]>,
    sent_in: Round,
}

/// WHY: a page that the guest left alone for so many rounds makes room for one that it writes.
const IDLE_ROUNDS_MAX: u32 = 2;

/// WHY: a difference in more words than that is no smaller than the page, packed.
const WORDS_CHANGED_MAX: usize = PAGE_BYTES / 8 / 2;

impl Versions {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { pages: HashMap::new(), pages_max: bytes_max / PAGE_BYTES, round: Round(0) }
    }

    /// A round begins, or goes on.
    pub(super) fn begin(&mut self, round: Round) {
        if round > self.round && self.pages.len() * 10 >= self.pages_max * 9 {
            let oldest = round.0.saturating_sub(IDLE_ROUNDS_MAX);
            self.pages.retain(|_, version| version.sent_in.0 >= oldest);
        }
        self.round = round;
    }

    /// `content` goes out as the new version of `page`. True when `difference` holds what tells it from the version before, and
    /// that is worth more than the page itself.
    pub(super) fn renew(&mut self, page: PageNumber, content: &[u8], difference: &mut [u8]) -> bool {
        if self.round.0 < 2 || self.pages_max == 0 {
            return false;
        }
        if let Some(version) = self.pages.get_mut(&page) {
            let changed = exclusive_or(version.content.as_slice(), content, difference);
            version.content.copy_from_slice(content);
            version.sent_in = self.round;
            return changed <= WORDS_CHANGED_MAX;
        }
        if self.pages.len() < self.pages_max
            && let Ok(copy) = <Box<[u8; PAGE_BYTES]>>::try_from(Box::<[u8]>::from(content))
        {
            self.pages.insert(page, Version { content: copy, sent_in: self.round });
        }
        false
    }

    /// The version that was sent last.
    pub(super) fn newest(&self, page: PageNumber) -> &[u8] {
        self.pages.get(&page).map_or(&[], |version| version.content.as_slice())
    }

    /// The page goes out as something else.
    pub(super) fn forget(&mut self, page: PageNumber) {
        if !self.pages.is_empty() {
            self.pages.remove(&page);
        }
    }

    /// What of the last round arrived nobody here knows.
    pub(super) fn clear(&mut self) {
        self.pages = HashMap::new();
    }

    /// What it takes, bytes.
    pub(super) fn bytes(&self) -> usize {
        self.pages.len() * (PAGE_BYTES + size_of::<(PageNumber, Version)>())
    }
}

/// Puts `one ^ other` into `into` and counts the 8-byte words that differ. All have the same length.
pub(super) fn exclusive_or(one: &[u8], other: &[u8], into: &mut [u8]) -> usize {
    let (one, other, into) = (one.as_chunks::<8>().0, other.as_chunks::<8>().0, into.as_chunks_mut::<8>().0);
    let mut changed = 0;
    for ((into, one), other) in into.iter_mut().zip(one).zip(other) {
        let difference = u64::from_ne_bytes(*one) ^ u64::from_ne_bytes(*other);
        *into = difference.to_ne_bytes();
        changed += usize::from(difference != 0);
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageNumber = PageNumber(7);

    #[test]
    fn the_second_time_a_page_goes_out_again_is_a_difference() {
        let mut versions = Versions::new(1 << 20);
        let mut difference = [0; PAGE_BYTES];
        let (mut content, before) = ([1; PAGE_BYTES], [1; PAGE_BYTES]);
        versions.begin(Round(1));
        assert!(!versions.renew(PAGE, &content, &mut difference));
        assert_eq!(versions.bytes(), 0, "most pages go out once");
        versions.begin(Round(2));
        assert!(!versions.renew(PAGE, &content, &mut difference));
        content[100] = 9;
        versions.begin(Round(3));
        assert!(versions.renew(PAGE, &content, &mut difference));
        let restored: Vec<u8> = before.iter().zip(difference).map(|(old, change)| old ^ change).collect();
        assert_eq!(restored, content);
        versions.begin(Round(4));
        assert!(!versions.renew(PAGE, &[77; PAGE_BYTES], &mut difference), "all of it is new");
        versions.forget(PAGE);
        assert!(!versions.renew(PAGE, &[77; PAGE_BYTES], &mut difference));
    }

    #[test]
    fn what_the_guest_leaves_alone_makes_room() {
        let mut versions = Versions::new(10 * PAGE_BYTES);
        let mut difference = [0; PAGE_BYTES];
        versions.begin(Round(2));
        for page in 0..20 {
            versions.renew(PageNumber(page), &[1; PAGE_BYTES], &mut difference);
        }
        assert_eq!(versions.pages.len(), 10);
        for round in 3..=4 {
            versions.begin(Round(round));
            versions.renew(PageNumber(0), &[2; PAGE_BYTES], &mut difference);
        }
        versions.begin(Round(5));
        assert_eq!(versions.pages.len(), 1);
        versions.clear();
        assert_eq!(versions.bytes(), 0);
    }
}
