//! The reference VMM behind the attach protocol: a KVM guest, or an empty VMM that waits for one.

use std::fs::File;

use super::config::{Hugepages, SerialSink, VmConfig};
use super::error::VmmError;
use super::kvm::{Vm, check_compatible, state_differences};
use crate::hypervisor::attach::{AttachedGuest, Refusal};
use crate::hypervisor::{GuestStatus, Machine, RunState};
use crate::memory::PageSet;

/// What an incoming guest gets besides what its machine says.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Page size behind guest RAM.
    pub hugepages: Hugepages,
    /// Where the serial console goes.
    pub serial: SerialSink,
    /// Whether a guest may have more memory than this host has available now.
    pub overcommit: bool,
}

/// A KVM guest that a gateway can attach to.
#[derive(Debug)]
pub struct AttachedVm {
    surroundings: Surroundings,
    /// `None` in an incoming VMM until a twin was prepared, and after quit.
    vm: Option<Vm>,
}

impl AttachedVm {
    /// A VMM with a guest.
    #[must_use]
    pub fn running(vm: Vm, surroundings: Surroundings) -> Self {
        Self { surroundings, vm: Some(vm) }
    }

    /// A VMM that waits for a guest.
    #[must_use]
    pub fn incoming(surroundings: Surroundings) -> Self {
        Self { surroundings, vm: None }
    }

    fn vm(&self) -> Result<&Vm, Refusal> {
        self.vm.as_ref().ok_or_else(|| Refusal::new("there is no guest"))
    }

    fn build(&self, machine: &Machine) -> Result<(Vm, File), VmmError> {
        let mut config = VmConfig::incoming(machine.clone())?;
        config.hugepages = self.surroundings.hugepages;
        config.serial = self.surroundings.serial.clone();
        let vm = Vm::create(&config)?;
        let memory = vm.memfd()?;
        Ok((vm, memory))
    }
}

impl AttachedGuest for AttachedVm {
    fn machine(&self) -> Result<Machine, Refusal> {
        Ok(self.vm()?.describe().clone())
    }
    fn memory(&self) -> Result<File, Refusal> {
        Ok(self.vm()?.memfd()?)
    }
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        Ok(self.vm()?.start_tracking()?)
    }
    fn harvest(&mut self) -> Result<PageSet, Refusal> {
        Ok(self.vm()?.harvest()?)
    }
    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        Ok(self.vm()?.stop_tracking()?)
    }
    fn throttle(&mut self, percent: u8) -> Result<(), Refusal> {
        Ok(self.vm()?.throttle(percent)?)
    }
    fn pause(&mut self) -> Result<(), Refusal> {
        Ok(self.vm()?.pause()?)
    }
    fn resume(&mut self) -> Result<(), Refusal> {
        Ok(self.vm()?.resume()?)
    }
    fn renew(&mut self) -> Result<(), Refusal> {
        Ok(self.vm()?.renew()?)
    }
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal> {
        Ok(self.vm()?.save_state()?)
    }
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>> {
        let lacks = check_compatible(machine, self.surroundings.overcommit);
        if !lacks.is_empty() {
            return Err(lacks);
        }
        let (vm, memory) = self.build(machine).map_err(|error| match error {
            VmmError::Incompatible { lacks } => lacks,
            other => vec![Refusal::from(other).reason().to_owned()],
        })?;
        self.vm = Some(vm);
        Ok(memory)
    }
    /// What was applied is read back: a register or device that KVM did not take as it was given would
    /// make the guest go on from another place.
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal> {
        let vm = self.vm()?;
        vm.restore_state(state)?;
        let differences = state_differences(state, &vm.save_state()?)?;
        if differences.is_empty() {
            Ok(())
        } else {
            Err(Refusal::new(format!("KVM did not take the state as it was given: {}", differences.join(", "))))
        }
    }
    fn status(&mut self) -> GuestStatus {
        match &self.vm {
            Some(vm) => vm.status(),
            None => GuestStatus { state: RunState::Incoming, exit_code: None, last_line: None, generation: None },
        }
    }
    fn quit(&mut self) {
        if let Some(vm) = self.vm.take() {
            vm.quit();
        }
    }
}
