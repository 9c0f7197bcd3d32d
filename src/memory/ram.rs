//! Guest RAM mapped into this process: the only place that reads or writes guest memory.
//!
//! The guest, or another process that maps the same file, may change any byte at any time, so every
//! access is a volatile copy in or out; no Rust reference to guest bytes is ever handed out.

use std::fs::File;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory, VolatileSlice};

use crate::memory::MemoryLayout;
use crate::types::{PAGE_BYTES, PageNumber};

/// The RAM of one VM, shared with its VMM process or private to this one.
#[derive(Debug)]
pub struct GuestRam {
    layout: MemoryLayout,
    mapping: MmapRegion,
}

/// Guest RAM could not be mapped or an access was out of its bounds.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The mapping failed.
    #[error("cannot map {bytes} bytes of guest RAM")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The file is shorter than the layout.
    #[error("guest memory file has {actual} bytes: the layout needs {expected}")]
    ShortFile {
        /// Bytes of the layout.
        expected: u64,
        /// Bytes of the file.
        actual: u64,
    },
    /// The file's length could not be read.
    #[error("cannot read the length of the guest memory file")]
    Metadata(#[source] std::io::Error),
    /// A page that the VM does not have.
    #[error("page {page} is outside guest RAM of {pages} pages")]
    OutOfBounds {
        /// First page of the access.
        page: PageNumber,
        /// Pages of the VM.
        pages: u64,
    },
}

impl GuestRam {
    /// Maps `file`, which holds the regions of `layout` back to back, shared.
    ///
    /// # Errors
    /// The file is shorter than the layout, or the mapping fails.
    pub fn map(file: File, layout: MemoryLayout) -> Result<Self, RamError> {
        let expected = layout.bytes();
        let actual = file.metadata().map_err(RamError::Metadata)?.len();
        if actual < expected {
            return Err(RamError::ShortFile { expected, actual });
        }
        let bytes = usize::try_from(expected).unwrap_or(usize::MAX);
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), bytes).map_err(|source| RamError::Map { bytes: expected, source })?;
        Ok(Self { layout, mapping }.advised())
    }

    /// Fresh zeroed memory, private to this process.
    ///
    /// # Errors
    /// The mapping fails.
    pub fn anonymous(layout: MemoryLayout) -> Result<Self, RamError> {
        let bytes = layout.bytes();
        let mapping = MmapRegion::new(usize::try_from(bytes).unwrap_or(usize::MAX)).map_err(|source| RamError::Map { bytes, source })?;
        Ok(Self { layout, mapping }.advised())
    }

    /// Memory that a twin gets is there in pieces of 2 MiB where the host allows it: fewer faults while pages arrive, and fewer
    /// misses for the guest afterwards. QEMU asks for the same. What is never written stays without memory all the same.
    #[expect(unsafe_code, reason = "advice about a mapping of ours")]
    fn advised(self) -> Self {
        // SAFETY: the mapping is this process's own as long as `self` lives, and huge pages change nothing that can be read in it.
        let advised = unsafe { rustix::mm::madvise(self.mapping.as_ptr().cast(), self.mapping.size(), rustix::mm::Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages for guest memory");
        }
        self
    }

    /// Where the RAM lies in guest-physical space.
    #[must_use]
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Pages of RAM.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.layout.pages()
    }

    /// Where the mapping begins in this process, for requests that hand the kernel an address (KVM memory
    /// slots, madvise). Page `n` lies `n * PAGE_BYTES` behind it. Never to be dereferenced.
    #[must_use]
    pub fn host_address(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// The first page at or after `from` that has memory behind it; the pages between are zero and have
    /// never been written. `None` when only such pages follow. Reading those would allocate them.
    #[must_use]
    pub fn next_written(&self, from: PageNumber) -> Option<PageNumber> {
        let Some(file) = self.mapping.file_offset() else { return Some(from) };
        let offset = from.0.checked_mul(PAGE_BYTES as u64).filter(|offset| *offset < self.layout.bytes())?;
        match rustix::fs::seek(file.file(), rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => Some(PageNumber(data / PAGE_BYTES as u64)).filter(|page| page.0 < self.pages()),
            Err(rustix::io::Errno::NXIO) => None,
            // A file that does not know its holes has none.
            Err(_) => Some(from),
        }
    }

    fn slice(&self, page: PageNumber, count: u64) -> Result<VolatileSlice<'_>, RamError> {
        let refuse = || RamError::OutOfBounds { page, pages: self.pages() };
        let end = page.0.checked_add(count).filter(|end| *end <= self.pages()).ok_or_else(refuse)?;
        let offset = usize::try_from(page.0).map_err(|_| refuse())? * PAGE_BYTES;
        let bytes = usize::try_from(end - page.0).map_err(|_| refuse())? * PAGE_BYTES;
        self.mapping.get_slice(offset, bytes).map_err(|_| refuse())
    }

    /// Copies pages out, as many as `into` holds. `into.len()` is a multiple of a page.
    ///
    /// # Errors
    /// A page is outside the RAM.
    pub fn read(&self, first: PageNumber, into: &mut [u8]) -> Result<(), RamError> {
        self.slice(first, (into.len() / PAGE_BYTES) as u64)?.copy_to(into);
        Ok(())
    }

    /// Copies pages out like [`GuestRam::read`], but a page that was never written is zero in `into` and still has no
    /// memory behind it, except next to written ones: what follows those in the same 64 KiB is read along.
    ///
    /// # Errors
    /// A page is outside the RAM.
    pub fn read_written(&self, first: PageNumber, into: &mut [u8]) -> Result<(), RamError> {
        let refuse = || RamError::OutOfBounds { page: first, pages: self.pages() };
        self.slice(first, (into.len() / PAGE_BYTES) as u64)?;
        let (mut page, mut rest) = (first, into);
        while !rest.is_empty() {
            let pages = (rest.len() / PAGE_BYTES) as u64;
            let hole = self.next_written(page).map_or(pages, |written| written.0.saturating_sub(page.0).min(pages));
            let hole_bytes = usize::try_from(hole).map_err(|_| refuse())? * PAGE_BYTES;
            // INVARIANT(scratch-bound): `hole` is at most the pages of `rest`.
            let (zeroes, after) = rest.split_at_mut(hole_bytes);
            zeroes.fill(0);
            page = PageNumber(page.0 + hole);
            let block = usize::try_from(READ_ALONG_PAGES - page.0 % READ_ALONG_PAGES).map_err(|_| refuse())? * PAGE_BYTES;
            let (written, after) = after.split_at_mut(after.len().min(block));
            if !written.is_empty() {
                self.read(page, written)?;
            }
            page = PageNumber(page.0 + (written.len() / PAGE_BYTES) as u64);
            rest = after;
        }
        Ok(())
    }

    /// Copies pages in. `from.len()` is a multiple of a page.
    ///
    /// # Errors
    /// A page is outside the RAM.
    pub fn write(&self, first: PageNumber, from: &[u8]) -> Result<(), RamError> {
        self.slice(first, (from.len() / PAGE_BYTES) as u64)?.copy_from(from);
        Ok(())
    }

    /// Fills pages with zeroes.
    ///
    /// # Errors
    /// A page is outside the RAM.
    pub fn clear(&self, first: PageNumber, count: u64) -> Result<(), RamError> {
        let slice = self.slice(first, count)?;
        let zeroes = [0u8; PAGE_BYTES];
        for index in 0..slice.len() / PAGE_BYTES {
            slice.write_slice(&zeroes, index * PAGE_BYTES).map_err(|_| RamError::OutOfBounds { page: first, pages: self.pages() })?;
        }
        Ok(())
    }
}

/// WHY: one question about holes for 16 pages costs less than their copy.
const READ_ALONG_PAGES: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_without_touching_them() {
        let file = crate::hypervisor::attach::memory_file(8 * PAGE_BYTES as u64).unwrap();
        let ram = GuestRam::map(file, MemoryLayout::flat(8).unwrap()).unwrap();
        assert_eq!(ram.next_written(PageNumber(0)), None);
        ram.write(PageNumber(5), &[1; PAGE_BYTES]).unwrap();
        assert_eq!(ram.next_written(PageNumber(0)), Some(PageNumber(5)));
        assert_eq!(ram.next_written(PageNumber(5)), Some(PageNumber(5)));
        assert_eq!(ram.next_written(PageNumber(6)), None);
        assert_eq!(ram.next_written(PageNumber(u64::MAX)), None);
        let private = GuestRam::anonymous(MemoryLayout::flat(2).unwrap()).unwrap();
        assert_eq!(private.next_written(PageNumber(1)), Some(PageNumber(1)));
    }

    #[test]
    fn reading_what_was_written_leaves_the_holes_holes() {
        let file = crate::hypervisor::attach::memory_file(200 * PAGE_BYTES as u64).unwrap();
        let ram = GuestRam::map(file, MemoryLayout::flat(200).unwrap()).unwrap();
        for page in [40, 41, 90, 199] {
            ram.write(PageNumber(page), &[u8::try_from(page).unwrap(); PAGE_BYTES]).unwrap();
        }
        let mut bytes = vec![0xff; 150 * PAGE_BYTES];
        for first in [0, 45, 50] {
            ram.read_written(PageNumber(first), &mut bytes).unwrap();
            for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE_BYTES)) {
                let expected = if [40, 41, 90, 199].contains(&page) { u8::try_from(page).unwrap() } else { 0 };
                assert!(bytes.iter().all(|byte| *byte == expected), "{page}");
            }
            bytes.fill(0xff);
        }
        assert_eq!(ram.next_written(PageNumber(0)), Some(PageNumber(40)));
        assert_eq!(ram.next_written(PageNumber(48)), Some(PageNumber(90)));
        assert_eq!(ram.next_written(PageNumber(96)), Some(PageNumber(199)));
        assert!(ram.read_written(PageNumber(51), &mut bytes).is_err());
        assert!(ram.read_written(PageNumber(u64::MAX), &mut bytes).is_err());
    }

    #[test]
    fn accesses_stay_inside_the_ram() {
        let ram = GuestRam::anonymous(MemoryLayout::flat(3).unwrap()).unwrap();
        let page = [7u8; PAGE_BYTES];
        ram.write(PageNumber(2), &page).unwrap();
        let mut back = [0u8; 2 * PAGE_BYTES];
        ram.read(PageNumber(1), &mut back).unwrap();
        assert_eq!((back[0], back[PAGE_BYTES]), (0, 7));
        ram.clear(PageNumber(2), 1).unwrap();
        ram.read(PageNumber(2), &mut back[..PAGE_BYTES]).unwrap();
        assert!(back[..PAGE_BYTES].iter().all(|b| *b == 0));
        assert!(ram.write(PageNumber(3), &page).is_err());
        assert!(ram.read(PageNumber(2), &mut back).is_err());
        assert!(ram.clear(PageNumber(u64::MAX), 2).is_err());
    }
}
