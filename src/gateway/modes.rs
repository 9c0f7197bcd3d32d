//! On how many lanes and channels a guest's memory moves, and what it has to be so that it can move as it is asked to.

use crate::config;
use crate::control::{MigrateRequest, Storage};
use crate::hypervisor::{Address, HypervisorError};
use crate::limits;
use crate::telemetry::{Problem, RunningOn, chain};
use crate::wire::ErrorClass;

/// A guest that cannot be split, before anything of it was sent.
pub(super) fn not_split(error: &HypervisorError) -> Problem {
    Problem::new(ErrorClass::PeerIncompatible, chain(error)).with_code("not-split").with_running_on(RunningOn::Source)
}

/// On how many channels its hypervisor hands over pages. What a gateway has for all its guests is not for those that cannot do it.
pub(super) fn channels(vm: &config::Vm, address: &Address, request: &MigrateRequest, configured: u16) -> Result<u16, Problem> {
    let able = matches!(address, Address::Qemu(_)) && !request.mode.may_split();
    match request.channels {
        Some(wanted) if !(1..=limits::QEMU_CHANNELS_MAX).contains(&wanted) => {
            let why = format!("{wanted} channels: expected 1 to {}", limits::QEMU_CHANNELS_MAX);
            Err(Problem::new(ErrorClass::Misuse, why).with_running_on(RunningOn::Source))
        }
        Some(wanted) if wanted > 1 && !able => {
            let why = format!("VM `{}` cannot be sent on several channels: expected a QEMU's, with `--mode precopy`", vm.name);
            Err(Problem::new(ErrorClass::Misuse, why).with_code("not-built").with_running_on(RunningOn::Source))
        }
        Some(wanted) => Ok(wanted),
        None => Ok(if able { configured } else { 1 }),
    }
}

/// Only a hypervisor that sends its guest itself can split it, and not one that stays.
pub(super) fn split_at_all(vm: &config::Vm, address: &Address, request: &MigrateRequest) -> Result<(), Problem> {
    let why = match address {
        _ if !request.mode.may_split() => return Ok(()),
        Address::Attach(_) => "no QEMU's: `--mode precopy` is the only one that is built for it",
        Address::Qemu(_) if request.storage == Storage::Only => "to stay: its disks alone are copied with `--mode precopy`",
        Address::Qemu(_) => return Ok(()),
    };
    Err(Problem::new(ErrorClass::Misuse, format!("VM `{}` is {why}", vm.name)).with_code("not-built").with_running_on(RunningOn::Source))
}

/// Lanes for a VM whose request names none: at most the configured ones, and none for memory that is not there.
pub(super) fn lanes_for(configured: u16, memory_bytes: u64) -> u16 {
    let wanted = u16::try_from(memory_bytes / limits::LANE_RAM_BYTES).unwrap_or(u16::MAX);
    wanted.clamp(1, configured.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_for_256_mib() {
        for (configured, mebibytes, lanes) in
            [(4, 0, 1), (4, 64, 1), (4, 511, 1), (4, 512, 2), (4, 1024, 4), (4, 1 << 20, 4), (1, 1024, 1), (16, 64 << 20, 16)]
        {
            assert_eq!(lanes_for(configured, mebibytes << 20), lanes, "{mebibytes} MiB");
        }
    }
}
