//! What to send and how small it gets: guest RAM, page sets, dirty accounting, encoder, decoder.
//!
//! *Owns:* the mapping of guest RAM, the set of pages owed to the destination, the page codecs.
//! *Never:* async, sockets, hypervisors, clocks; nothing here is shared between two VMs.
//! *Invariants:* `one-copy` (a guest page is read once per send and everything after works on our
//! copy), `no-lost-dirt` (owed + in flight + applied = harvested), `lane-affinity` (a page always
//! uses the same lane).
//! *Read first:* `layout.rs`, `pages.rs`, `ram.rs`, then `tracker.rs`, `encode.rs`, `decode.rs`.

mod layout;
mod pages;
mod ram;

pub use layout::{LayoutError, MemoryLayout, lane_of};
pub use pages::PageSet;
pub use ram::{GuestRam, RamError};
