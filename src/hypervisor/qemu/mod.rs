//! The driver for an unmodified QEMU: its monitor, and the stream in which it sends its guest.
//!
//! *Owns:* QMP, what of two QEMUs has to be equal, the order of QEMU's own migration. *Never:* what is in the stream, decisions
//! about a migration. QEMU gets one end of a socket pair by its monitor, so no path exists that others could connect to; but for a source
//! that is told to use several channels, which takes a path only (`channels.rs`).
//!
//! ```text
//! source                                                  destination
//! capabilities: events, pause-before-switchover           capabilities: events, late-block-activate
//! getfd, migrate fd:            ── stream ──>             stop (no start by itself), getfd, migrate-incoming fd:
//! pre-switchover: the guest stands still
//! migrate-continue              ── rest ──>               completed, paused; the disks are nobody's
//! completed, postmigrate
//! (COMMIT)                                                cont takes the disks, announce-self
//! quit, or migrate_cancel and cont before COMMIT
//! ```
//!
//! With post-copy there is a way back, and the stream is split: at the source `postcopy-active` stands for `completed, postmigrate`, at
//! the destination `postcopy-active, paused` for `completed, paused`, and pages follow until both are `completed`. A source that is split
//! and keeps its guest is ended as if its destination had everything (`revive.rs`), and then `cont`.
//!
//! Disks that move too are mirrored before (`disks.rs`): the source writes to the NBD export of its gateway, the destination's
//! gateway writes to the NBD export of the other QEMU.
//!
//! *Invariants:* `no-self-start` (a destination is told to stop before it gets a byte, so that it is paused once loaded),
//! `as-it-was` (what was set at a source is set back when its guest goes on there, and no job, node or export of ours is left).
//! *Read first:* `qmp.rs`, `facts.rs`, `monitor.rs`, `source.rs`, `destination.rs`, `disks.rs`, `names.rs`, `revive.rs`, `channels.rs`.

mod channels;
mod destination;
mod disks;
mod facts;
mod monitor;
mod names;
mod qmp;
mod revive;
mod source;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use channels::Later;
pub use destination::QemuDestination;
pub use facts::QEMU_KIND;
pub use names::is_encrypted;
pub use source::{QemuSource, discard, inspect, observe};

/// How long a monitor may take for an answer. QEMU does nothing that is long inside a command of ours.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long somebody who only looks waits for a monitor that another client may have.
pub const LOOK_WITHIN: Duration = Duration::from_secs(1);
