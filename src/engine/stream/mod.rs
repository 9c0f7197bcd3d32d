//! Carries a hypervisor's own stream from one gateway to the other.
//!
//! *Owns:* what was read of the stream and is not applied (`outflow`), what came and waits for what is before it (`inflow`), the
//! lanes between, and the same handoff as for pages. *Never:* what the bytes mean: that knows `condense`.
//!
//! ```text
//! hypervisor ─> read, condense ─> Outflow ─> lanes: pack, send ═> lanes: unpack ─> Inflow ─> expand, write ─> hypervisor
//!                                    └──────────── kept until STREAM-APPLIED ──────────────────────┘
//! ```
//!
//! *Invariants:* `stream-window` (what is read and not applied is bounded, so the hypervisor's socket is not read beyond that, and
//! a slow link is felt by the guest's own hypervisor), `in-order-once` (the hypervisor is given every byte once, in order, whatever
//! becomes of sessions and lanes), `loaded-before-prepared` (the twin is loaded and paused, and all of the stream was hashed,
//! before anything is promised).
//! *Read first:* `outflow.rs`, `inflow.rs`, `lanes.rs`, `source.rs`, `destination.rs`.

mod back;
mod destination;
mod inflow;
mod intake;
mod kept;
mod lanes;
mod outflow;
mod rest;
mod source;
mod urgent;

pub use destination::run_stream_destination;
pub(in crate::engine) use rest::Rest;
pub use source::run_stream_source;

use crate::condense::{StreamDigest, Unsound};
use crate::engine::EngineError;
use crate::engine::digest::sha256;
use crate::hypervisor::HypervisorError;
use crate::types::{MigrationId, VmName};
use crate::wire::{FinalDigest, StreamEnd};

/// What a stream was, from its first byte to its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Whole {
    /// Bytes of all parcels.
    bytes: u64,
    /// SHA-256 over all that is not pages.
    framing: [u8; 32],
    /// XXH3-128 over the pages.
    pages: u128,
}

impl Whole {
    fn new(bytes: u64, digest: StreamDigest) -> Self {
        let (framing, pages) = digest.finish();
        Self { bytes, framing, pages }
    }

    /// What both ends have to agree on.
    fn final_digest(&self) -> FinalDigest {
        let end = StreamEnd { migration: MigrationId([0; 16]), bytes: self.bytes };
        FinalDigest { state: self.framing, lanes: sha256(&end.canonical_bytes()), memory: self.pages }
    }
}

/// Why a stream came to no end.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Unsound(#[from] Unsound),
}

impl Broken {
    /// The error of a hypervisor here.
    fn of_hypervisor(self, vm: &VmName, what: &'static str) -> HypervisorError {
        let vm = vm.to_string();
        match self {
            Self::Io(source) => HypervisorError::Local { vm, what, source },
            Self::Unsound(unsound) => HypervisorError::Protocol { vm, reason: unsound.to_string() },
        }
    }

    /// The error of a peer that sent what is not sound; otherwise nothing.
    fn of_peer(&self, vm: &VmName) -> Option<EngineError> {
        match self {
            Self::Unsound(unsound) => Some(EngineError::Unsound { vm: vm.clone(), source: unsound.clone() }),
            Self::Io(_) => None,
        }
    }
}
