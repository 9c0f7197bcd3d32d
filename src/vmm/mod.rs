//! The reference VMM: what runs in the process of `sealane vmm run`.
//!
//! *Owns:* one KVM guest with its memory file, vCPUs, devices, dirty record and saved state, and the
//! payload guest that verifies itself. *Never:* a gateway's decision: it pauses, resumes, saves and
//! restores only when told. *Invariants:* a vCPU that counts as parked has completed its last port or
//! memory access; a page leaves the dirty record only into a harvest; state is checked whole before any
//! of it is applied; a guest that was paused or is incoming starts only by `resume`; a change of the generation is in guest
//! memory before any vCPU runs.
//! *Read first:* `config.rs`, `kvm/vm.rs`, `kvm/vcpu.rs`, then `payload.S`.

mod attached;
mod config;
mod error;
mod exit;
mod generation;
mod kvm;
mod payload;
mod payload_image;
mod process;
mod serial;

pub use crate::hypervisor::synthetic::SyntheticConfig;
pub use attached::{AttachedVm, Surroundings};
pub use config::{Boot, ConsoleBuffer, DirtyMode, EntryMode, Hugepages, SerialSink, VmConfig};
pub use error::VmmError;
pub use exit::ExitVerdict;
pub use generation::GENERATION_ADDRESS;
pub use kvm::{StateError, Vm, check_compatible, state_differences};
pub use payload::{PayloadConfig, PayloadFault, generation_number, heartbeat_number};
pub use process::{Process, serve};

/// Whether guests can run under KVM here.
///
/// # Errors
/// `/dev/kvm` is missing, may not be opened, or is not the KVM that this VMM speaks to.
pub fn usable() -> Result<(), VmmError> {
    kvm::usable()
}
