//! Where a guest of the reference VMM reads its generation: one page of its memory.
//!
//! It lies between the video and the firmware area, in RAM that no memory map tells the guest of. The VMM writes it only
//! while no vCPU runs, so a guest never sees half of a change. A guest may write there too, to its own harm only: the VMM
//! never reads the page, and writes it whole at the next change.
//!
//! `docs/vmm-protocol.md` has the layout.

use crate::hypervisor::Generation;
use crate::types::PAGE_BYTES;

/// Guest-physical address of the page.
pub const GENERATION_ADDRESS: u64 = 0xd_0000;
const MAGIC: [u8; 8] = *b"SEALANEG";
const VERSION: u64 = 1;

/// The whole page.
pub(super) fn page(generation: Generation) -> Vec<u8> {
    let mut page = [&MAGIC[..], &VERSION.to_le_bytes(), &generation.to_bytes()].concat();
    page.resize(PAGE_BYTES, 0);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::GenerationId;

    #[test]
    fn the_page_is_laid_out_as_documented() {
        let page = page(Generation { id: GenerationId([0xab; 16]), count: 0x0102, disruptions: 0x0304 });
        assert_eq!((page.len(), &page[..8], &page[8..16]), (PAGE_BYTES, &b"SEALANEG"[..], &[1, 0, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(page[16..32], [0xab; 16]);
        assert_eq!((&page[32..40], &page[40..48]), (&[2, 1, 0, 0, 0, 0, 0, 0][..], &[4, 3, 0, 0, 0, 0, 0, 0][..]));
        assert!(page[48..].iter().all(|byte| *byte == 0));
    }
}
