//! A synthetic guest behind the attach protocol: what `sealane vmm run --synthetic` serves.

use std::fs::File;

use super::{SyntheticConfig, SyntheticGuest};
use crate::hypervisor::attach::{AttachedGuest, Refusal};
use crate::hypervisor::{Guest, GuestStatus, HypervisorError, Machine, PagedDestination, PagedSource, RunState};
use crate::memory::PageSet;

/// A VMM process around a [`SyntheticGuest`].
#[derive(Debug)]
pub struct SyntheticVmm {
    pub(super) name: String,
    /// `None` in an incoming VMM until a twin was prepared, and after quit.
    guest: Option<SyntheticGuest>,
}

impl SyntheticVmm {
    /// A VMM with a running guest.
    ///
    /// # Errors
    /// As [`SyntheticGuest::start`].
    pub fn running(name: &str, config: &SyntheticConfig) -> Result<Self, HypervisorError> {
        Ok(Self { name: name.to_owned(), guest: Some(SyntheticGuest::start(name, config)?) })
    }

    /// A VMM that waits for a guest.
    #[must_use]
    pub fn incoming(name: &str) -> Self {
        Self { name: name.to_owned(), guest: None }
    }

    fn guest(&self) -> Result<&SyntheticGuest, Refusal> {
        self.guest.as_ref().ok_or_else(|| Refusal::new("there is no guest"))
    }

    fn guest_mut(&mut self) -> Result<&mut SyntheticGuest, Refusal> {
        self.guest.as_mut().ok_or_else(|| Refusal::new("there is no guest"))
    }
}

impl AttachedGuest for SyntheticVmm {
    fn machine(&self) -> Result<Machine, Refusal> {
        Ok(self.guest()?.machine().clone())
    }
    fn memory(&self) -> Result<File, Refusal> {
        Ok(self.guest()?.memory()?)
    }
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        Ok(self.guest_mut()?.start_tracking()?)
    }
    fn harvest(&mut self) -> Result<PageSet, Refusal> {
        Ok(self.guest_mut()?.harvest()?)
    }
    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        Ok(self.guest_mut()?.stop_tracking()?)
    }
    fn throttle(&mut self, percent: u8) -> Result<(), Refusal> {
        Ok(self.guest_mut()?.throttle(percent)?)
    }
    fn pause(&mut self) -> Result<(), Refusal> {
        Ok(self.guest_mut()?.pause()?)
    }
    fn resume(&mut self) -> Result<(), Refusal> {
        Ok(PagedSource::resume(self.guest_mut()?)?)
    }
    fn renew(&mut self) -> Result<(), Refusal> {
        Ok(self.guest_mut()?.renew()?)
    }
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal> {
        Ok(PagedSource::save_state(self.guest_mut()?)?)
    }
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>> {
        let lacks = |error: HypervisorError| match error {
            HypervisorError::Incompatible { lacks, .. } => lacks,
            error => vec![Refusal::from(error).reason().to_owned()],
        };
        let guest = SyntheticGuest::incoming(&self.name, machine).map_err(lacks)?;
        let memory = guest.memory().map_err(|error| vec![error.to_string()])?;
        self.guest = Some(guest);
        Ok(memory)
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal> {
        Ok(self.guest_mut()?.restore_state(state)?)
    }
    fn status(&mut self) -> GuestStatus {
        match &self.guest {
            Some(guest) => guest.read_status(),
            None => GuestStatus { state: RunState::Incoming, exit_code: None, last_line: None, generation: None },
        }
    }
    fn quit(&mut self) {
        self.guest = None;
    }
}
