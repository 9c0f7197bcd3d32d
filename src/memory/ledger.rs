//! What one lane carried, counted the same way at both ends.

use xxhash_rust::xxh3::Xxh3Default;

use crate::wire::LaneTotals;

/// The running totals of a lane since its join.
#[derive(Default)]
pub(super) struct Ledger {
    frames: u64,
    pages: u64,
    bytes: u64,
    hash: Xxh3Default,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.totals().fmt(f)
    }
}

impl Ledger {
    /// Counts one frame, given in one or more parts.
    pub(super) fn count(&mut self, parts: &[&[u8]], pages: u64) {
        self.frames += 1;
        self.pages += pages;
        for part in parts {
            self.bytes += part.len() as u64;
            self.hash.update(part);
        }
    }

    /// The sequence number of the next frame.
    pub(super) fn next_sequence(&self) -> u64 {
        self.frames
    }

    pub(super) fn totals(&self) -> LaneTotals {
        LaneTotals { frames: self.frames, pages: self.pages, bytes: self.bytes, digest: self.hash.digest128() }
    }
}
