//! What to send and how small it gets: guest RAM, page sets, dirty accounting, encoder, decoder.
//!
//! *Owns:* the mapping of guest RAM, the set of pages owed to the destination, the codecs of pages and of streams.
//! *Never:* async, sockets, hypervisors, clocks; nothing here is shared between two VMs.
//! *Invariants:* `one-copy` (a guest page is read once per send and everything after works on our
//! copy), `no-lost-dirt` (owed + in flight + applied = harvested), `lane-affinity` (a page always
//! uses the same lane), `page-scope` (in that scope no page changes the length of another),
//! `scratch-bound` and `block-bound` (the only indexing here is of buffers of ours whose size
//! bounds the index).
//! *Read first:* `layout.rs`, `pages.rs`, `ram.rs`, then `tracker.rs`, `encode.rs`, `decode.rs`.

mod adapt;
mod chunk;
mod decode;
mod digest;
mod duplicates;
mod encode;
mod layout;
mod ledger;
mod pack;
mod pages;
mod ram;
mod tracker;
mod unpack;
mod versions;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::wire::Compression;

pub use adapt::{Adaptation, FrameSent};
pub use chunk::{ChunkPacker, ChunkUnpacker};
pub use decode::{DecodeError, Decoder};
pub use digest::{KeptDigests, StripeDigest, combine_digests, differing_stripes, digest_ram, digest_stripe, digest_stripes, stripe_count};
pub use duplicates::{DUPLICATES_KEY_BYTES, Duplicates};
pub use encode::Encoder;
pub use layout::{LayoutError, MemoryLayout, lane_of};
pub use pages::PageSet;
pub use ram::{GuestRam, RamError};
pub use tracker::{Tracker, WrongRound};

/// How hard an encoder tries to make pages smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effort {
    /// Not at all.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard at this level.
    Zstd(i32),
}

impl Effort {
    /// Where an encoder begins on these terms. With `auto` that is nowhere: the first frames show what limits it.
    #[must_use]
    pub fn of(compression: Compression) -> Self {
        match compression {
            Compression::None | Compression::Auto => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd => Self::Zstd(ZSTD_LEVEL),
        }
    }
}

impl Effort {
    /// Pages that went through the codec after which a frame is closed. WHY: the thread that packs is the one that sends, and a
    /// path that hears nothing for many milliseconds slows down.
    fn frame_pages(self) -> u64 {
        match self {
            Self::None | Self::Lz4 => u64::MAX,
            Self::Zstd(..=1) => 256,
            Self::Zstd(..=3) => 128,
            Self::Zstd(_) => 1,
        }
    }
}

/// WHY: level 3 is Zstandard's own default, and the last one that two cores keep up a gigabit link with.
pub const ZSTD_LEVEL: i32 = 3;

/// Pages by what became of them on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageCounts {
    /// Only zeroes: sent as a number.
    pub zero: u64,
    /// Equal to a page that the destination has.
    pub duplicate: u64,
    /// Difference to the version that the destination has.
    pub delta: u64,
    /// Packed in a batch.
    pub compressed: u64,
    /// As they are.
    pub raw: u64,
}

impl PageCounts {
    /// All pages.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.zero + self.duplicate + self.delta + self.compressed + self.raw
    }

    /// Pages that went through a codec, whatever came of it.
    #[must_use]
    pub fn packed(&self) -> u64 {
        self.delta + self.compressed + self.raw
    }

    /// Adds the counts of another lane.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        self.duplicate += other.duplicate;
        self.delta += other.delta;
        self.compressed += other.compressed;
        self.raw += other.raw;
    }
}
