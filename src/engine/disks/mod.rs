//! Disks that move with a guest: changes to them, from the NBD client at the source to the NBD server at the destination.
//!
//! ```text
//! QEMU ──NBD── serve ─> DiskOut ─> lanes ═════════> lanes ─> DiskIn ─> write ──NBD── QEMU
//!                          └───── kept until DISK-APPLIED ─────┘
//! ```
//!
//! A change goes on any lane, by itself: what is under way at once does not overlap, as the hypervisor's mirror sees to. So nothing
//! has to be put in order again, and a change that an outage took is sent again.
//!
//! *Invariants:* `disk-window` (what is under way is bounded, at both ends, so a slow link is felt by the mirror), `disk-once` (every
//! change is made once and then answered, whatever becomes of sessions and lanes).
//! What the destination's disks hold already it tells first, and `serve` answers by itself whatever would change nothing there (`held.rs`).
//!
//! *Read first:* `outgoing.rs`, `serve.rs`, `incoming.rs`.

mod digest;
mod held;
mod incoming;
mod outgoing;
mod pace;
mod serve;

pub(super) use digest::digest_disks;
pub(super) use held::{Held, tell_held};
pub(super) use incoming::DiskIn;
pub(super) use outgoing::{Change, DiskOut};
pub(super) use pace::MirrorPace;
pub(super) use serve::DiskServer;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How disks move with a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOrder {
    /// Where the gateway lets its hypervisor reach it.
    pub socket: PathBuf,
    /// Whether both ends read all disks in the pause, and compare.
    pub verify: bool,
}
