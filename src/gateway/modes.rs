//! What a guest has to be so that its memory can move as it is asked to.

use crate::config;
use crate::control::{MigrateRequest, Storage};
use crate::hypervisor::{Address, HypervisorError};
use crate::telemetry::{Problem, RunningOn, chain};
use crate::wire::ErrorClass;

/// A guest that cannot be split, before anything of it was sent.
pub(super) fn not_split(error: &HypervisorError) -> Problem {
    Problem::new(ErrorClass::PeerIncompatible, chain(error)).with_code("not-split").with_running_on(RunningOn::Source)
}

/// Only a hypervisor that sends its guest itself can split it, and disks have to be at both ends before that.
pub(super) fn split_at_all(vm: &config::Vm, address: &Address, request: &MigrateRequest) -> Result<(), Problem> {
    let why = match address {
        _ if !request.mode.may_split() => return Ok(()),
        Address::Attach(_) => "no QEMU's: `--mode precopy` is the only one that is built for it",
        Address::Qemu(_) if request.storage != Storage::None => "to move with its disks: with `--mode precopy` only is that built",
        Address::Qemu(_) => return Ok(()),
    };
    Err(Problem::new(ErrorClass::Misuse, format!("VM `{}` is {why}", vm.name)).with_code("not-built").with_running_on(RunningOn::Source))
}
