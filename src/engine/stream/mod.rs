//! Carries a hypervisor's own stream from one gateway to the other.
//!
//! *Owns:* what was read of the stream and is not applied (`outflow`), what came and waits for what is before it (`inflow`), the
//! lanes between, and the same handoff as for pages. *Never:* what the bytes mean.
//!
//! ```text
//! hypervisor ─> read ─> Outflow ─> lanes: pack, send ═> lanes: unpack ─> Inflow ─> write ─> hypervisor
//!                          └─────────── kept until STREAM-APPLIED ──────────────────┘
//! ```
//!
//! *Invariants:* `stream-window` (what is read and not applied is bounded, so the hypervisor's socket is not read beyond that, and
//! a slow link is felt by the guest's own hypervisor), `in-order-once` (the hypervisor is given every byte once, in order, whatever
//! becomes of sessions and lanes), `loaded-before-prepared` (the twin is loaded and paused, and all of the stream was hashed,
//! before anything is promised).
//! *Read first:* `outflow.rs`, `inflow.rs`, `lanes.rs`, `source.rs`, `destination.rs`.

mod destination;
mod inflow;
mod lanes;
mod outflow;
mod source;

pub use destination::run_stream_destination;
pub use source::run_stream_source;

use crate::engine::digest::sha256;
use crate::types::MigrationId;
use crate::wire::{FinalDigest, StreamEnd};

/// What a stream was, from its first byte to its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Whole {
    bytes: u64,
    /// SHA-256 over all of it.
    digest: [u8; 32],
}

impl Whole {
    /// What both ends have to agree on.
    fn final_digest(&self) -> FinalDigest {
        let end = StreamEnd { migration: MigrationId([0; 16]), bytes: self.bytes };
        FinalDigest { state: self.digest, lanes: sha256(&end.canonical_bytes()), memory: 0 }
    }
}
