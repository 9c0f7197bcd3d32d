//! What one VMM process hosts, behind the attach protocol.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::attached::{AttachedVm, Surroundings};
use super::config::VmConfig;
use super::error::VmmError;
use super::kvm::Vm;
use crate::hypervisor::attach::{self, AttachedGuest, Refusal};
use crate::hypervisor::synthetic::{SYNTHETIC_KIND, SyntheticConfig, SyntheticVmm};
use crate::hypervisor::{GuestStatus, Machine};
use crate::memory::PageSet;

/// What a VMM process begins with.
#[derive(Debug)]
pub enum Process {
    /// A KVM guest that starts at once.
    Kvm(Box<VmConfig>),
    /// Threads that write memory as a guest would.
    Synthetic(SyntheticConfig),
    /// Nothing: what arrives decides.
    Incoming(Surroundings),
}

/// The guest's name in messages of this process; its gateway knows the operator's name.
const GUEST: &str = "guest";

/// Hosts one guest and serves it at `socket` until a gateway says quit. Returns the guest's own verdict,
/// if it gave one.
///
/// # Errors
/// The guest cannot be built or started, or the socket cannot be served.
pub fn serve(process: Process, socket: &Path) -> Result<Option<u32>, VmmError> {
    let guest: Arc<Mutex<dyn AttachedGuest>> = match process {
        Process::Kvm(config) => {
            let surroundings = Surroundings { hugepages: config.hugepages, serial: config.serial.clone(), overcommit: false };
            let vm = Vm::create(&config)?;
            vm.start()?;
            Arc::new(Mutex::new(AttachedVm::running(vm, surroundings)))
        }
        Process::Synthetic(config) => Arc::new(Mutex::new(SyntheticVmm::running(GUEST, &config).map_err(VmmError::Synthetic)?)),
        Process::Incoming(surroundings) => Arc::new(Mutex::new(IncomingVmm::new(surroundings))),
    };
    // Bound after the guest was built: whoever finds the socket finds a guest.
    let listener = attach::bind(socket).map_err(VmmError::local("bind the attach socket"))?;
    attach::serve(&listener, Arc::clone(&guest)).map_err(VmmError::local("serve the attach protocol"))?;
    // Nobody listens there any more; whoever replaced it meanwhile has a socket of its own.
    let _ = std::fs::remove_file(socket);
    let verdict = guest.lock().unwrap_or_else(PoisonError::into_inner).status().exit_code;
    Ok(verdict)
}

/// An empty VMM: which kind of guest it hosts is known when its machine is described.
#[derive(Debug)]
struct IncomingVmm {
    kvm: AttachedVm,
    synthetic: SyntheticVmm,
    is_synthetic: bool,
}

impl IncomingVmm {
    fn new(surroundings: Surroundings) -> Self {
        Self { kvm: AttachedVm::incoming(surroundings), synthetic: SyntheticVmm::incoming(GUEST), is_synthetic: false }
    }

    fn guest(&self) -> &dyn AttachedGuest {
        if self.is_synthetic { &self.synthetic } else { &self.kvm }
    }

    fn guest_mut(&mut self) -> &mut dyn AttachedGuest {
        if self.is_synthetic { &mut self.synthetic } else { &mut self.kvm }
    }
}

impl AttachedGuest for IncomingVmm {
    fn machine(&self) -> Result<Machine, Refusal> {
        self.guest().machine()
    }
    fn memory(&self) -> Result<File, Refusal> {
        self.guest().memory()
    }
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.guest_mut().start_tracking()
    }
    fn harvest(&mut self) -> Result<PageSet, Refusal> {
        self.guest_mut().harvest()
    }
    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.guest_mut().stop_tracking()
    }
    fn throttle(&mut self, percent: u8) -> Result<(), Refusal> {
        self.guest_mut().throttle(percent)
    }
    fn pause(&mut self) -> Result<(), Refusal> {
        self.guest_mut().pause()
    }
    fn resume(&mut self) -> Result<(), Refusal> {
        self.guest_mut().resume()
    }
    fn renew(&mut self) -> Result<(), Refusal> {
        self.guest_mut().renew()
    }
    fn save_state(&mut self) -> Result<Vec<u8>, Refusal> {
        self.guest_mut().save_state()
    }
    fn prepare(&mut self, machine: &Machine) -> Result<File, Vec<String>> {
        self.is_synthetic = match machine.kind.as_str() {
            SYNTHETIC_KIND => true,
            "kvm" => false,
            other => return Err(vec![format!("hypervisor `{other}`: this VMM hosts `kvm` and `synthetic`")]),
        };
        self.guest_mut().prepare(machine)
    }
    fn restore_state(&mut self, state: &[u8]) -> Result<(), Refusal> {
        self.guest_mut().restore_state(state)
    }
    fn status(&mut self) -> GuestStatus {
        self.guest_mut().status()
    }
    fn quit(&mut self) {
        self.guest_mut().quit();
    }
}
