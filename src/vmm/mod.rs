//! The reference VMM: what runs in the process of `sealane vmm run`.
//!
//! *Owns:* one KVM guest with its memory file, vCPUs, devices, dirty record and saved state, and the
//! payload guest that verifies itself. *Never:* a gateway's decision: it pauses, resumes, saves and
//! restores only when told. *Invariants:* a vCPU that counts as parked has completed its last port or
//! memory access; a page leaves the dirty record only into a harvest; state is checked whole before any
//! of it is applied; a guest that was paused or is incoming starts only by `resume`.
//! *Read first:* `config.rs`, `kvm/vm.rs`, `kvm/vcpu.rs`, then `payload.S`.

mod config;
mod error;
mod exit;
mod kvm;
mod payload;
mod payload_image;
mod serial;

pub use config::{Boot, ConsoleBuffer, DirtyMode, EntryMode, Hugepages, SerialSink, VmConfig, VmmOptions};
pub use error::VmmError;
pub use exit::ExitVerdict;
pub use kvm::{StateError, Vm, check_compatible, state_differences};
pub use payload::{PayloadConfig, PayloadFault, heartbeat_number};

/// Runs one VM until it ends. `serve` gets the handle before the first instruction: it serves the attach
/// protocol on threads of its own and returns at once.
///
/// # Errors
/// The VM cannot be built or started, or `serve` fails.
pub fn run<E: From<VmmError>>(options: &VmmOptions, serve: impl FnOnce(&Vm, &VmmOptions) -> Result<(), E>) -> Result<ExitVerdict, E> {
    let vm = Vm::create(&options.vm)?;
    serve(&vm, options)?;
    if options.start && !matches!(options.vm.boot, Boot::Incoming(_)) {
        vm.start()?;
    }
    Ok(vm.wait_exit())
}
