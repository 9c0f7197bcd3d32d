//! Digests of guest RAM, to compare what two gateways hold.
//!
//! RAM has stripes, and a stripe has blocks. The digest of a stripe is that of its blocks' digests, and that of the RAM is that of
//! its stripes' digests, so that what did not change need not be read again.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use xxhash_rust::xxh3::xxh3_128;

use crate::limits::STRIPE_PAGES;
use crate::memory::{GuestRam, PageSet, RamError};
use crate::types::{PAGE_BYTES, PageNumber};

/// The digest of one stripe of guest RAM: `STRIPE_PAGES` pages, or what is left at the end. XXH3-128 over the XXH3-128 of each of
/// its blocks of 64 KiB, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StripeDigest(pub u128);

/// WHY: 64 KiB stay in the first two caches between the copy and the hash, and a guest that changes a page has no more than that
/// read again.
const BLOCK_PAGES: u64 = 16;
const BLOCK_BYTES: usize = 16 * PAGE_BYTES;
const STRIPE_BLOCKS: usize = 32;
const _: () = assert!(STRIPE_BLOCKS as u64 * BLOCK_PAGES == STRIPE_PAGES);

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
    let mut blocks = Blocks::new(ram);
    let mut digests = Vec::new();
    for stripe in stripes {
        let end = ((stripe + 1) * STRIPE_PAGES).min(ram.pages());
        let of_blocks: Result<Vec<u128>, RamError> =
            (stripe * STRIPE_PAGES..end).step_by(BLOCK_BYTES / PAGE_BYTES).map(|page| blocks.digest(page / BLOCK_PAGES)).collect();
        digests.push(of_stripe(&of_blocks?));
    }
    Ok(digests)
}

fn of_stripe(blocks: &[u128]) -> StripeDigest {
    let bytes: Vec<u8> = blocks.iter().flat_map(|digest| digest.to_le_bytes()).collect();
    StripeDigest(xxh3_128(&bytes))
}

/// The digest of a stripe whose bytes were copied out.
#[must_use]
pub fn digest_stripe(bytes: &[u8]) -> StripeDigest {
    let blocks: Vec<u128> = bytes.chunks(BLOCK_BYTES).map(xxh3_128).collect();
    of_stripe(&blocks)
}

/// Reads blocks, in order best.
struct Blocks<'a> {
    ram: &'a GuestRam,
    block: Vec<u8>,
    /// The first page at or after the block read last that has memory behind it, if there is one; not known at first.
    written: Option<Option<PageNumber>>,
    hole: u128,
}

impl<'a> Blocks<'a> {
    fn new(ram: &'a GuestRam) -> Self {
        let block = vec![0; BLOCK_BYTES];
        Self { ram, hole: xxh3_128(&block), block, written: None }
    }

    fn digest(&mut self, index: u64) -> Result<u128, RamError> {
        let first = PageNumber(index * BLOCK_PAGES);
        let pages = self.ram.pages().saturating_sub(first.0).min(BLOCK_PAGES);
        let known = self.written.filter(|written| written.is_none_or(|written| written >= first));
        let written = known.unwrap_or_else(|| self.ram.next_written(first));
        self.written = Some(written);
        // A hole is zero; reading it would allocate it.
        if pages == BLOCK_PAGES && written.is_none_or(|written| written.0 >= first.0 + pages) {
            return Ok(self.hole);
        }
        let bytes = usize::try_from(pages).map_or(BLOCK_BYTES, |pages| pages * PAGE_BYTES);
        // INVARIANT(block-bound): `pages` is at most what the block holds.
        let block = &mut self.block[..bytes];
        self.ram.read(first, block)?;
        Ok(xxh3_128(block))
    }
}

/// The digests of all blocks of a RAM that changes, kept: only what was touched since is read again. Whoever changes the RAM says
/// so afterwards, or before whatever changed it can be asked for it (a guest's writes are in its dirty log).
pub struct KeptDigests {
    blocks: u64,
    groups: Vec<Group>,
}

/// 64 blocks.
struct Group {
    /// A bit for each block that may have changed since it was read.
    stale: AtomicU64,
    /// Held by whoever reads, so that what is older never replaces what is newer.
    digests: Mutex<Vec<u128>>,
}

impl std::fmt::Debug for KeptDigests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeptDigests").field("stale_blocks", &self.stale_blocks()).finish_non_exhaustive()
    }
}

impl KeptDigests {
    /// For a RAM of so many pages, of which nothing was read yet. Takes 16 bytes for 64 KiB.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let blocks = pages.div_ceil(BLOCK_PAGES);
        let group = |first| {
            let count = usize::try_from(blocks - first).unwrap_or(GROUP).min(GROUP);
            let stale = if count == GROUP { u64::MAX } else { (1 << count) - 1 };
            Group { stale: AtomicU64::new(stale), digests: Mutex::new(vec![0; count]) }
        };
        Self { blocks, groups: (0..blocks).step_by(GROUP).map(group).collect() }
    }

    /// These pages may have changed.
    pub fn touched(&self, first: PageNumber, count: u64) {
        let end = first.0.saturating_add(count).div_ceil(BLOCK_PAGES).min(self.blocks);
        for block in first.0 / BLOCK_PAGES..end {
            let at = usize::try_from(block).unwrap_or(usize::MAX);
            if let Some(group) = self.groups.get(at / GROUP) {
                group.stale.fetch_or(1 << (at % GROUP), Ordering::AcqRel);
            }
        }
    }

    /// As [`touched`](Self::touched), for a set.
    pub fn touched_all(&self, pages: &PageSet) {
        pages.runs(u64::MAX).for_each(|(first, count)| self.touched(first, count));
    }

    /// Blocks that are to be read again.
    #[must_use]
    pub fn stale_blocks(&self) -> usize {
        self.groups.iter().map(|group| group.stale.load(Ordering::Acquire).count_ones() as usize).sum()
    }

    /// Groups of 64 blocks. Disjoint ranges of them may be read on several threads.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Reads what was touched of some groups, on the calling thread.
    ///
    /// # Errors
    /// The RAM has fewer pages than was said.
    pub fn refresh(&self, ram: &GuestRam, groups: Range<usize>) -> Result<(), RamError> {
        let mut reader = Blocks::new(ram);
        for (index, group) in self.groups.iter().enumerate().take(groups.end).skip(groups.start) {
            if group.stale.load(Ordering::Acquire) == 0 {
                continue;
            }
            let mut digests = group.digests.lock().unwrap_or_else(PoisonError::into_inner);
            // Taken before it is read: what is touched from here on is stale again.
            let mut taken = group.stale.swap(0, Ordering::AcqRel);
            // What was a hole may be none by now.
            reader.written = None;
            while taken != 0 {
                let bit = taken.trailing_zeros() as usize;
                let digest = reader.digest((index * GROUP + bit) as u64).inspect_err(|_| {
                    group.stale.fetch_or(taken, Ordering::AcqRel);
                })?;
                if let Some(place) = digests.get_mut(bit) {
                    *place = digest;
                }
                taken &= taken - 1;
            }
        }
        Ok(())
    }

    /// The digest of the RAM as it was read.
    #[must_use]
    pub fn digest(&self) -> u128 {
        let groups = self.groups.iter().map(|group| group.digests.lock().unwrap_or_else(PoisonError::into_inner).clone());
        let stripes: Vec<StripeDigest> =
            groups.flat_map(|digests| digests.chunks(STRIPE_BLOCKS).map(of_stripe).collect::<Vec<_>>()).collect();
        combine_digests(&stripes)
    }
}

const GROUP: usize = 64;
const _: () = assert!(GROUP.is_multiple_of(STRIPE_BLOCKS));

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
    fn what_is_kept_is_the_digest_of_what_is_there() {
        for pages in [1, 15, 16, 17, STRIPE_PAGES, 5 * STRIPE_PAGES + 33] {
            let ram = ram(pages);
            let kept = KeptDigests::new(pages);
            assert_eq!(kept.stale_blocks() as u64, pages.div_ceil(BLOCK_PAGES));
            let digest = || {
                kept.refresh(&ram, 0..kept.groups()).unwrap();
                kept.digest()
            };
            assert_eq!(digest(), digest_ram(&ram).unwrap());
            for (round, page) in [0, pages / 2, pages - 1, pages / 3].into_iter().map(PageNumber).enumerate() {
                ram.write(page, &[u8::try_from(round + 1).unwrap(); PAGE_BYTES]).unwrap();
                assert_ne!(digest(), digest_ram(&ram).unwrap(), "nobody said that it changed");
                kept.touched_all(&{
                    let mut set = PageSet::empty(pages);
                    set.insert(page);
                    set
                });
                assert_eq!(kept.stale_blocks(), 1);
                assert_eq!(digest(), digest_ram(&ram).unwrap());
                assert_eq!(kept.stale_blocks(), 0);
            }
            kept.touched(PageNumber(0), u64::MAX);
            assert_eq!(digest(), digest_ram(&ram).unwrap());
        }
    }

    #[test]
    fn a_hole_that_is_filled_while_others_are_read_is_read_again() {
        let pages = 128 * STRIPE_PAGES;
        let file = crate::hypervisor::attach::memory_file(pages * PAGE_BYTES as u64).unwrap();
        let ram = GuestRam::map(file, MemoryLayout::flat(pages).unwrap()).unwrap();
        let kept = KeptDigests::new(pages);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for page in (0..pages / BLOCK_PAGES).rev().map(|block| PageNumber(block * BLOCK_PAGES)) {
                    ram.write(page, &[7; PAGE_BYTES]).unwrap();
                    kept.touched(page, 1);
                }
            });
            while !writer.is_finished() {
                kept.refresh(&ram, 0..kept.groups()).unwrap();
            }
        });
        kept.refresh(&ram, 0..kept.groups()).unwrap();
        assert_eq!(kept.digest(), digest_ram(&ram).unwrap());
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
