//! Digests of guest RAM, to compare what two gateways hold.

use std::ops::Range;

use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

use crate::limits::STRIPE_PAGES;
use crate::memory::{GuestRam, RamError};
use crate::types::{PAGE_BYTES, PageNumber};

/// The XXH3-128 of one stripe of guest RAM: `STRIPE_PAGES` pages, or what is left at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StripeDigest(pub u128);

/// WHY: 64 KiB stay in the first two caches between the copy and the hash.
const BLOCK_BYTES: usize = 64 * 1024;

/// Stripes of a VM's RAM; the last may be short.
#[must_use]
pub fn stripe_count(ram: &GuestRam) -> u64 {
    ram.pages().div_ceil(STRIPE_PAGES)
}

/// The digests of some stripes, in order. Disjoint ranges may be computed on several threads.
///
/// # Errors
/// A stripe is outside the RAM.
pub fn digest_stripes(ram: &GuestRam, stripes: Range<u64>) -> Result<Vec<StripeDigest>, RamError> {
    if stripes.end > stripe_count(ram) {
        return Err(RamError::OutOfBounds { page: PageNumber(stripes.end.saturating_mul(STRIPE_PAGES)), pages: ram.pages() });
    }
    let mut block = vec![0; BLOCK_BYTES];
    let zeroes = vec![0; BLOCK_BYTES];
    let mut written = ram.next_written(PageNumber(stripes.start.saturating_mul(STRIPE_PAGES)));
    let mut hash = Xxh3Default::new();
    let mut digests = Vec::new();
    for stripe in stripes {
        hash.reset();
        let end = ((stripe + 1) * STRIPE_PAGES).min(ram.pages());
        let mut page = stripe * STRIPE_PAGES;
        while page < end {
            let pages = ((BLOCK_BYTES / PAGE_BYTES) as u64).min(end - page);
            let bytes = usize::try_from(pages).map_or(BLOCK_BYTES, |pages| pages * PAGE_BYTES);
            // INVARIANT(block-bound): `pages` is at most what the block holds.
            let block = &mut block[..bytes];
            if written.is_some_and(|written| written.0 < page) {
                written = ram.next_written(PageNumber(page));
            }
            // A hole is zero; reading it would allocate it.
            if written.is_none_or(|written| written.0 >= page + pages) {
                hash.update(&zeroes[..bytes]);
            } else {
                ram.read(PageNumber(page), block)?;
                hash.update(block);
            }
            page += pages;
        }
        digests.push(StripeDigest(hash.digest128()));
    }
    Ok(digests)
}

/// The digest of a stripe whose bytes were copied out.
#[must_use]
pub fn digest_stripe(bytes: &[u8]) -> StripeDigest {
    StripeDigest(xxh3_128(bytes))
}

/// One digest from those of all stripes, in order.
#[must_use]
pub fn combine_digests(stripes: &[StripeDigest]) -> u128 {
    let bytes: Vec<u8> = stripes.iter().flat_map(|digest| digest.0.to_le_bytes()).collect();
    xxh3_128(&bytes)
}

/// The digest of all guest RAM, on the calling thread.
///
/// # Errors
/// None as long as the mapping holds.
pub fn digest_ram(ram: &GuestRam) -> Result<u128, RamError> {
    Ok(combine_digests(&digest_stripes(ram, 0..stripe_count(ram))?))
}

/// Which stripes differ; one that only one side has differs.
#[must_use]
pub fn differing_stripes(one: &[StripeDigest], other: &[StripeDigest]) -> Vec<u64> {
    (0..one.len().max(other.len())).filter(|index| one.get(*index) != other.get(*index)).map(|index| index as u64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryLayout;

    fn ram(pages: u64) -> GuestRam {
        GuestRam::anonymous(MemoryLayout::flat(pages).unwrap()).unwrap()
    }

    #[test]
    fn one_changed_byte_changes_its_stripe_and_the_whole() {
        let (one, other) = (ram(3 * STRIPE_PAGES + 5), ram(3 * STRIPE_PAGES + 5));
        let stripes = |ram: &GuestRam| digest_stripes(ram, 0..stripe_count(ram)).unwrap();
        assert_eq!(stripe_count(&one), 4);
        assert_eq!(digest_ram(&one).unwrap(), digest_ram(&other).unwrap());
        for page in [0, STRIPE_PAGES - 1, STRIPE_PAGES, 3 * STRIPE_PAGES + 4] {
            let mut bytes = [0; PAGE_BYTES];
            bytes[PAGE_BYTES - 1] = 1;
            other.write(PageNumber(page), &bytes).unwrap();
            assert_eq!(differing_stripes(&stripes(&one), &stripes(&other)), [page / STRIPE_PAGES]);
            assert_ne!(digest_ram(&one).unwrap(), digest_ram(&other).unwrap());
            other.clear(PageNumber(page), 1).unwrap();
        }
        assert_eq!(differing_stripes(&stripes(&one), &stripes(&other)[..3]), [3]);
    }

    #[test]
    fn every_page_counts() {
        let ram = ram(STRIPE_PAGES + 3);
        let mut digests = std::collections::BTreeSet::from([digest_ram(&ram).unwrap()]);
        for page in (0..ram.pages()).map(PageNumber) {
            ram.write(page, &[1; PAGE_BYTES]).unwrap();
            assert!(digests.insert(digest_ram(&ram).unwrap()), "{page}");
            ram.clear(page, 1).unwrap();
        }
    }

    #[test]
    fn ranges_computed_apart_combine_to_the_whole() {
        let ram = ram(3 * STRIPE_PAGES + 1);
        for page in (0..ram.pages()).step_by(7) {
            ram.write(PageNumber(page), &[u8::try_from(page % 251).unwrap(); PAGE_BYTES]).unwrap();
        }
        let mut parts = digest_stripes(&ram, 0..1).unwrap();
        parts.extend(digest_stripes(&ram, 1..3).unwrap());
        parts.extend(digest_stripes(&ram, 3..4).unwrap());
        assert_eq!(combine_digests(&parts), digest_ram(&ram).unwrap());
        let mut copy = vec![0; usize::try_from(STRIPE_PAGES).unwrap() * PAGE_BYTES];
        ram.read(PageNumber(STRIPE_PAGES), &mut copy).unwrap();
        assert_eq!(digest_stripe(&copy), parts[1]);
        parts.swap(0, 1);
        assert_ne!(combine_digests(&parts), digest_ram(&ram).unwrap());
        assert!(digest_stripes(&ram, 3..5).is_err());
    }
}
