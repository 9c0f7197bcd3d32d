//! The attach protocol: how a gateway reaches a guest that lives in its VMM's process.
//!
//! *Owns:* messages and their bytes, the VMM's side (`serve`), the gateway's side (`AttachedSource`,
//! `AttachedDestination`). *Never:* decisions about a migration; guest
//! bytes in a message (pages are read and written in the shared memory file).
//!
//! ```text
//! gateway process                                  VMM process
//! AttachedSource ── request, one at a time ──────> serve ── AttachedGuest (vCPUs, devices, dirty log)
//!       │        <───── answer, memory file ──────   │
//!       └───────────── guest RAM, one memfd ─────────┘
//! ```
//!
//! *Invariants:* `death-changes-nothing` (a connection that ends leaves the guest as it was),
//! `harvest-delivered` (a harvest that did not reach a gateway is part of the next one),
//! `one-controller`, `sealed-memory` (a VMM cannot make its gateway fault).
//! *Read first:* `docs/vmm-protocol.md`, then `protocol.rs`, `guest.rs`, `session.rs`, `server.rs`, `client.rs`, `wire.rs`.

mod client;
mod guest;
mod protocol;
mod ram_file;
mod server;
mod session;
mod wire;

#[cfg(test)]
mod tests;

pub use client::{AttachedDestination, AttachedSource, Timeouts, discard, inspect, observe};
pub use guest::{AttachedGuest, Refusal};
pub use protocol::{ATTACH_VERSION, Attachment};
pub use ram_file::memory_file;
pub use server::{bind, serve};

pub(in crate::hypervisor) use client::dial;
pub(in crate::hypervisor) use protocol::printable;
