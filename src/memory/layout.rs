//! Where guest RAM lies in guest-physical space.

use crate::limits;
use crate::types::{LaneIndex, PAGE_BYTES, PageNumber, RamRegion};

const PAGE: u64 = PAGE_BYTES as u64;

/// A checked list of RAM regions: sorted, page-aligned, not overlapping, bounded.
/// The guest's memory file holds the regions back to back, without the holes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    regions: Vec<RamRegion>,
    pages: u64,
}

/// A list of regions that is not a memory layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region at all, or more than the limit.
    #[error("memory layout has {count} regions: expected 1 to {max}", max = limits::RAM_REGIONS_MAX)]
    RegionCount {
        /// Regions given.
        count: usize,
    },
    /// A region is empty, not page-aligned, or wraps around.
    #[error("memory region at {guest_base:#x} of {bytes} bytes is empty, not page-aligned or wraps around")]
    Region {
        /// First address of the region.
        guest_base: u64,
        /// Its length in bytes.
        bytes: u64,
    },
    /// A region begins before the one in front of it ends.
    #[error("memory region at {guest_base:#x} overlaps or precedes the one before it")]
    Order {
        /// First address of the region.
        guest_base: u64,
    },
    /// More RAM than this gateway accepts.
    #[error("memory layout has more than {max} bytes of RAM", max = limits::RAM_BYTES_MAX)]
    TooLarge,
}

impl MemoryLayout {
    /// Checks `regions`.
    ///
    /// # Errors
    /// [`LayoutError`] names the first region that breaks a rule.
    pub fn new(regions: Vec<RamRegion>) -> Result<Self, LayoutError> {
        if !(1..=limits::RAM_REGIONS_MAX).contains(&regions.len()) {
            return Err(LayoutError::RegionCount { count: regions.len() });
        }
        let mut previous_end = 0;
        let mut bytes_total = 0u64;
        for &RamRegion { guest_base, bytes } in &regions {
            let refuse = LayoutError::Region { guest_base, bytes };
            if bytes == 0 || !bytes.is_multiple_of(PAGE) || !guest_base.is_multiple_of(PAGE) {
                return Err(refuse);
            }
            let end = guest_base.checked_add(bytes).ok_or(refuse)?;
            if guest_base < previous_end {
                return Err(LayoutError::Order { guest_base });
            }
            bytes_total = bytes_total.checked_add(bytes).filter(|b| *b <= limits::RAM_BYTES_MAX).ok_or(LayoutError::TooLarge)?;
            previous_end = end;
        }
        Ok(Self { regions, pages: bytes_total / PAGE })
    }

    /// One region from address 0, the layout of tests and of memory images.
    ///
    /// # Errors
    /// As [`MemoryLayout::new`].
    pub fn flat(pages: u64) -> Result<Self, LayoutError> {
        Self::new(vec![RamRegion { guest_base: 0, bytes: pages.checked_mul(PAGE).ok_or(LayoutError::TooLarge)? }])
    }

    /// The regions, lowest address first.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Pages of RAM in all regions.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of RAM in all regions.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE
    }

    /// The regions with the first page number of each.
    pub fn regions_with_first_page(&self) -> impl Iterator<Item = (PageNumber, RamRegion)> + '_ {
        self.regions.iter().scan(0, |next, region| {
            let first = PageNumber(*next);
            *next += region.bytes / PAGE;
            Some((first, *region))
        })
    }

    /// The page that holds a guest-physical address, if that is RAM.
    #[must_use]
    pub fn page_of(&self, guest_address: u64) -> Option<PageNumber> {
        self.regions_with_first_page()
            .find(|(_, r)| guest_address >= r.guest_base && guest_address - r.guest_base < r.bytes)
            .map(|(first, r)| PageNumber(first.0 + (guest_address - r.guest_base) / PAGE))
    }
}

/// The lane that carries `page` when there are `lanes` lanes.
///
/// `INVARIANT(lane-affinity)`: a function of the page number alone, so that two versions of one page
/// cannot overtake each other.
#[must_use]
pub fn lane_of(page: PageNumber, lanes: u16) -> LaneIndex {
    let lane = (page.0 / limits::STRIPE_PAGES) % u64::from(lanes.max(1));
    LaneIndex(u16::try_from(lane).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest_base: u64, bytes: u64) -> RamRegion {
        RamRegion { guest_base, bytes }
    }

    #[test]
    fn pages_are_counted_through_the_hole() {
        let layout = MemoryLayout::new(vec![region(0, 2 * PAGE), region(1 << 32, 4 * PAGE)]).unwrap();
        assert_eq!(layout.pages(), 6);
        assert_eq!(layout.page_of(PAGE), Some(PageNumber(1)));
        assert_eq!(layout.page_of(2 * PAGE), None);
        assert_eq!(layout.page_of((1 << 32) + PAGE), Some(PageNumber(3)));
        assert_eq!(layout.page_of((1 << 32) + 4 * PAGE), None);
    }

    #[test]
    fn refuses_regions_that_break_a_rule() {
        let cases = [
            vec![],
            vec![region(0, 0)],
            vec![region(1, PAGE)],
            vec![region(0, PAGE + 1)],
            vec![region(u64::MAX - PAGE + 1, 2 * PAGE)],
            vec![region(0, 2 * PAGE), region(PAGE, PAGE)],
            vec![region(PAGE, PAGE), region(0, PAGE)],
            vec![region(0, limits::RAM_BYTES_MAX + PAGE)],
            vec![region(0, PAGE); limits::RAM_REGIONS_MAX + 1],
        ];
        for case in cases {
            assert!(MemoryLayout::new(case.clone()).is_err(), "{case:?}");
        }
    }

    #[test]
    fn a_page_keeps_its_lane() {
        assert_eq!(lane_of(PageNumber(0), 4), LaneIndex(0));
        assert_eq!(lane_of(PageNumber(limits::STRIPE_PAGES * 5), 4), LaneIndex(1));
        assert_eq!(lane_of(PageNumber(77), 0), LaneIndex(0));
    }
}
