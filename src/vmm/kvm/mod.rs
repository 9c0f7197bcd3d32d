//! The part of the VMM that talks to KVM, and the only one with `unsafe` in it.
//!
//! *Owns:* the VM and its vCPU threads, the dirty record, saved state, the first instruction. *Never:*
//! sockets, decisions about a migration. *Invariants:* `park-complete` (`vcpu.rs`), `harvest-owned`
//! (`dirty.rs`), state is checked whole before any of it is applied (`state.rs`, `save.rs`).
//! *Read first:* `vm.rs`, `vcpu.rs`, `dirty.rs`, then `save.rs`, `state.rs`, `cpuid.rs`.
#![allow(unsafe_code, reason = "KVM requests and the pages that KVM shares with its VMM")]

mod boot;
mod cpuid;
mod dirty;
mod memory;
mod names;
mod pod;
mod save;
mod state;
mod sys;
mod vcpu;
mod vm;

pub use cpuid::check_compatible;
pub use state::{StateError, state_differences};
pub use vm::Vm;

#[cfg(test)]
mod tests;

/// Opens KVM and asks for everything that the VMM cannot do without.
pub(super) fn usable() -> Result<(), super::VmmError> {
    let kvm = kvm_ioctls::Kvm::new().map_err(|source| super::VmmError::NoKvm(source.into()))?;
    cpuid::Host::probe(&kvm).map(drop)
}
