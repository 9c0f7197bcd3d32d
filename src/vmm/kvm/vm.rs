//! One VM: creation, pause and resume, dirty tracking, state, end.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_pit_state2};
use kvm_ioctls::{Kvm, VmFd};

use super::cpuid::{self, Host};
use super::dirty::DirtyLog;
use super::vcpu::{Shared, Vcpu, lock};
use super::{boot, memory, save};
use crate::hypervisor::{Generation, GuestStatus, Machine, RunState};
use crate::limits;
use crate::memory::{GuestRam, PageSet};
use crate::types::{PAGE_BYTES, PageNumber};
use crate::vmm::config::{Boot, VmConfig};
use crate::vmm::error::VmmError;
use crate::vmm::exit::ExitVerdict;
use crate::vmm::generation::{self, GENERATION_ADDRESS};
use crate::vmm::serial::SerialPort;

/// KVM's own pages on processors that need them, in the hole below 4 GiB.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const TSS_ADDRESS: usize = 0xfffb_d000;
const SERIAL_GSI: u32 = 4;
/// A PIT mode that runs no timer in KVM.
const PIT_MODE_STOPPED: u8 = 5;

/// A VM in this process. Clones are handles to the same VM; when the last is gone, the VM ends.
#[derive(Debug, Clone)]
pub struct Vm {
    owner: Arc<Owner>,
}

#[derive(Debug)]
struct Owner(Inner);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.shared.update(|gate| gate.quit = true);
        self.0.shared.join();
    }
}

#[derive(Debug)]
struct Inner {
    vm: Arc<VmFd>,
    host: Host,
    machine: Machine,
    ram: Arc<GuestRam>,
    memory: File,
    /// Where the guest reads its generation.
    generation_page: PageNumber,
    shared: Arc<Shared>,
    /// One request at a time, and where the VM stands.
    life: Mutex<Life>,
}

/// Where a VM stands between requests.
#[derive(Debug)]
struct Life {
    phase: Phase,
    /// Clocks taken at the pause, given back at the resume.
    clocks: Option<Clocks>,
    /// `None` in an incoming VM. What the guest reads is the same, but for a write of its own.
    generation: Option<Generation>,
    /// Restored and never resumed.
    arrived: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Incoming,
    Running,
    Paused,
    /// Half-restored state: only good to be thrown away.
    Broken,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Incoming => "incoming",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Broken => "broken by a failed restore",
        }
    }
}

/// What stands still while the guest is paused.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clocks {
    pub(super) nanoseconds: u64,
    pub(super) pit: kvm_pit_state2,
}

impl Vm {
    /// Builds the VM with its vCPUs stopped at the first instruction, or, for [`Boot::Incoming`], empty.
    ///
    /// # Errors
    /// The configuration is out of bounds, this host lacks something, or the guest image cannot be loaded.
    pub fn create(config: &VmConfig) -> Result<Self, VmmError> {
        let kvm = Kvm::new().map_err(|source| VmmError::NoKvm(source.into()))?;
        let host = Host::probe(&kvm)?;
        let memory = memory::create(config.layout.bytes(), config.hugepages)?;
        let vm = Arc::new(kvm.create_vm().map_err(VmmError::kvm("KVM_CREATE_VM"))?);
        let ram = Arc::new(
            GuestRam::map(memory.try_clone().map_err(VmmError::local("share guest memory"))?, config.layout.clone())
                .map_err(VmmError::Ram)?,
        );
        let generation_page = generation_page(&ram)?;
        memory::advise(&ram, config.hugepages)?;
        let mut dirty = DirtyLog::new(Arc::clone(&vm), Arc::clone(&ram), config.dirty)?;
        create_devices(&vm)?;
        let irq_vm = Arc::clone(&vm);
        let pulse = move || {
            irq_vm.set_irq_line(SERIAL_GSI, true).map_err(io::Error::from)?;
            irq_vm.set_irq_line(SERIAL_GSI, false).map_err(io::Error::from)
        };
        let serial = SerialPort::new(&config.serial, Arc::new(pulse))?;

        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let fd = vm.create_vcpu(index.into()).map_err(VmmError::kvm("KVM_CREATE_VCPU"))?;
            dirty.add_vcpu(&fd)?;
            vcpus.push(Vcpu::new(fd)?);
        }
        let (machine, phase, generation) = match &config.boot {
            Boot::Incoming(machine) => {
                let lacks = cpuid::lacks_of(machine, &host, None);
                if !lacks.is_empty() {
                    return Err(VmmError::Incompatible { lacks });
                }
                (machine.clone(), Phase::Incoming, None)
            }
            boot => {
                for (index, vcpu) in (0u32..).zip(&vcpus) {
                    let table = Host::cpuid_of(&host.cpuid, index, config.vcpus)?;
                    vcpu.lock().set_cpuid2(&table).map_err(VmmError::kvm("KVM_SET_CPUID2"))?;
                }
                boot::load(boot, &memory, &config.layout, &vcpus, &host)?;
                let generation = Generation::first().map_err(VmmError::local("make a generation id"))?;
                write_first(&ram, generation_page, generation)?;
                (describe(config, &host, &vcpus)?, Phase::Paused, Some(generation))
            }
        };
        let shared = Arc::new(Shared::new(vcpus, serial, dirty));
        shared.spawn()?;
        let life = Mutex::new(Life { phase, clocks: None, generation, arrived: false });
        Ok(Self { owner: Arc::new(Owner(Inner { vm, host, machine, ram, memory, generation_page, shared, life })) })
    }

    fn inner(&self) -> &Inner {
        &self.owner.0
    }

    /// What the destination has to provide.
    #[must_use]
    pub fn describe(&self) -> &Machine {
        &self.inner().machine
    }

    /// The file behind guest RAM, to be passed to a gateway: regions back to back, size sealed.
    ///
    /// # Errors
    /// The process has no file descriptor left.
    pub fn memfd(&self) -> Result<File, VmmError> {
        self.inner().memory.try_clone().map_err(VmmError::local("share guest memory"))
    }

    /// Guest RAM, mapped into this process.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.inner().ram
    }

    /// Starts the vCPUs of a new VM; the same as [`Vm::resume`].
    ///
    /// # Errors
    /// As [`Vm::resume`].
    pub fn start(&self) -> Result<(), VmmError> {
        self.resume()
    }

    /// From now on every page that the guest writes is recorded.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn start_tracking(&self) -> Result<(), VmmError> {
        lock(&self.inner().shared.dirty).start()
    }

    /// Pages written since the last harvest. Reading clears the record: the caller owns the set.
    /// After [`Vm::save_state`] one more harvest is due, because saving may write guest memory.
    ///
    /// # Errors
    /// Tracking is off, or KVM refuses; then every page must be taken as written.
    pub fn harvest(&self) -> Result<PageSet, VmmError> {
        let mut dirty = lock(&self.inner().shared.dirty);
        if !dirty.is_tracking() {
            return Err(VmmError::Misuse { request: "harvest", expected: "tracked", actual: "not tracked" });
        }
        dirty.harvest()
    }

    /// Recording ends.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn stop_tracking(&self) -> Result<(), VmmError> {
        lock(&self.inner().shared.dirty).stop()
    }

    /// Stops every vCPU between two instructions, and the timer with them. Idempotent.
    ///
    /// # Errors
    /// A vCPU does not stop within `PARK_WAIT_MAX`; the guest then runs on.
    pub fn pause(&self) -> Result<(), VmmError> {
        let inner = self.inner();
        let mut life = lock(&inner.life);
        if life.phase != Phase::Running {
            return Ok(());
        }
        inner.shared.update(|gate| gate.paused = true);
        if let Err(error) = inner.shared.wait_parked().and_then(|()| {
            life.clocks = Some(stop_clocks(&inner.vm)?);
            Ok(())
        }) {
            inner.shared.update(|gate| gate.paused = false);
            return Err(error);
        }
        life.phase = Phase::Paused;
        Ok(())
    }

    /// Lets the vCPUs go on. Idempotent. A guest that came from elsewhere finds its disruption counter raised.
    ///
    /// # Errors
    /// The VM has no state yet, its state was refused half-way, or KVM refuses.
    pub fn resume(&self) -> Result<(), VmmError> {
        let inner = self.inner();
        let mut life = lock(&inner.life);
        match life.phase {
            Phase::Running => return Ok(()),
            Phase::Paused => {}
            Phase::Incoming | Phase::Broken => {
                return Err(VmmError::Misuse { request: "resume", expected: "paused", actual: life.phase.name() });
            }
        }
        if life.arrived {
            inner.change_generation(&mut life, |generation| Ok(generation.disrupted()))?;
            life.arrived = false;
        }
        if let Some(clocks) = life.clocks {
            save::start_clocks(&inner.vm, &clocks)?;
            life.clocks = None;
            if inner.host.kvmclock_ctrl {
                for vcpu in &inner.shared.vcpus {
                    // WHY ignored: it fails for guests that do not use kvmclock.
                    let _ = vcpu.lock().kvmclock_ctrl();
                }
            }
        }
        inner.shared.update(|gate| gate.paused = false);
        life.phase = Phase::Running;
        Ok(())
    }

    /// Gives the paused guest a new generation id and raises its generation counter.
    ///
    /// # Errors
    /// The guest is not paused, or the system has no random numbers.
    pub fn renew(&self) -> Result<(), VmmError> {
        let inner = self.inner();
        let mut life = lock(&inner.life);
        if life.phase != Phase::Paused {
            return Err(VmmError::Misuse { request: "renew the generation", expected: "paused", actual: life.phase.name() });
        }
        inner.change_generation(&mut life, |generation| generation.renewed().map_err(VmmError::local("make a generation id")))
    }

    /// Takes `percent` of vCPU time away from the guest; 0 ends it.
    ///
    /// # Errors
    /// More than `THROTTLE_PERCENT_MAX`.
    pub fn throttle(&self, percent: u8) -> Result<(), VmmError> {
        if percent > limits::THROTTLE_PERCENT_MAX {
            let reason = format!("expected 0 to {}, got {percent}", limits::THROTTLE_PERCENT_MAX);
            return Err(VmmError::Config { field: "throttle", reason });
        }
        self.inner().shared.update(|gate| gate.throttle_percent = percent);
        Ok(())
    }

    /// All vCPU and device state of the paused guest.
    ///
    /// # Errors
    /// The guest is not paused, or KVM refuses.
    pub fn save_state(&self) -> Result<Vec<u8>, VmmError> {
        let inner = self.inner();
        let life = lock(&inner.life);
        let (Phase::Paused, Some(generation)) = (life.phase, life.generation) else {
            return Err(VmmError::Misuse { request: "save state", expected: "paused", actual: life.phase.name() });
        };
        let clocks = match life.clocks {
            Some(clocks) => clocks,
            None => save::read_clocks(&inner.vm)?,
        };
        save::save(&inner.vm, &inner.shared, &inner.host, inner.ram.pages(), &clocks, generation).map(|state| state.encode())
    }

    /// Checks all state first, then applies it; the guest stays paused.
    ///
    /// # Errors
    /// The state is malformed or does not fit this machine: nothing was applied. Or KVM refused a part
    /// of it: this VM can then only be thrown away.
    pub fn restore_state(&self, state: &[u8]) -> Result<(), VmmError> {
        let inner = self.inner();
        let mut life = lock(&inner.life);
        if life.phase != Phase::Incoming {
            return Err(VmmError::Misuse { request: "restore state", expected: "incoming", actual: life.phase.name() });
        }
        let state = save::check(state, &inner.machine, &inner.host, inner.ram.pages()).map_err(VmmError::State)?;
        if let Err(error) = save::restore(&inner.vm, &inner.shared, &inner.host, &state) {
            life.phase = Phase::Broken;
            return Err(error);
        }
        let clocks = Clocks { nanoseconds: state.clock_nanoseconds, pit: state.pit };
        set_pit(&inner.vm, &stopped(clocks.pit))?;
        life.clocks = Some(clocks);
        // The page itself came with guest memory.
        (life.generation, life.arrived) = (Some(state.generation), true);
        life.phase = Phase::Paused;
        Ok(())
    }

    /// How the guest is.
    #[must_use]
    pub fn status(&self) -> GuestStatus {
        let inner = self.inner();
        let (phase, generation) = {
            let life = lock(&inner.life);
            (life.phase, life.generation)
        };
        let ended = lock(&inner.shared.gate).ended.clone();
        let state = match (phase, &ended) {
            (_, Some(_)) => RunState::Ended,
            (Phase::Incoming | Phase::Broken, None) => RunState::Incoming,
            (Phase::Running, None) => RunState::Running,
            (Phase::Paused, None) => RunState::Paused,
        };
        let last_line = lock(&inner.shared.serial).last_line();
        GuestStatus { state, exit_code: ended.map(|verdict| verdict.code()), last_line, generation }
    }

    /// Ends the VM: vCPUs stop for good and [`Vm::wait_exit`] returns. Memory goes with the last handle.
    pub fn quit(&self) {
        self.inner().shared.update(|gate| gate.quit = true);
    }

    /// Waits until the guest ends by itself or the VM is told to quit.
    #[must_use]
    pub fn wait_exit(&self) -> ExitVerdict {
        let shared = &self.inner().shared;
        let mut gate = lock(&shared.gate);
        loop {
            if let Some(verdict) = &gate.ended {
                let verdict = verdict.clone();
                drop(gate);
                lock(&shared.serial).finish();
                return verdict;
            }
            if gate.quit {
                return ExitVerdict::Quit;
            }
            gate = shared.changed.wait(gate).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

impl Inner {
    /// Shows the guest another generation. No vCPU runs: the caller holds `life` of a paused VM.
    fn change_generation(&self, life: &mut Life, change: impl FnOnce(Generation) -> Result<Generation, VmmError>) -> Result<(), VmmError> {
        let Some(generation) = life.generation else { return Ok(()) };
        let generation = change(generation)?;
        self.ram.write(self.generation_page, &generation::page(generation)).map_err(VmmError::Ram)?;
        lock(&self.shared.dirty).mark(self.generation_page);
        life.generation = Some(generation);
        Ok(())
    }
}

fn generation_page(ram: &GuestRam) -> Result<PageNumber, VmmError> {
    let reason = || format!("expected RAM at {GENERATION_ADDRESS:#x}, where the guest reads its generation");
    ram.layout().page_of(GENERATION_ADDRESS).ok_or_else(|| VmmError::Config { field: "layout", reason: reason() })
}

/// Before the first instruction; what was loaded must not lie there.
fn write_first(ram: &GuestRam, page: PageNumber, generation: Generation) -> Result<(), VmmError> {
    let mut loaded = vec![0; PAGE_BYTES];
    ram.read(page, &mut loaded).map_err(VmmError::Ram)?;
    if loaded.iter().any(|byte| *byte != 0) {
        let reason = format!("the image covers {GENERATION_ADDRESS:#x}, where the guest reads its generation");
        return Err(VmmError::Config { field: "boot", reason });
    }
    ram.write(page, &generation::page(generation)).map_err(VmmError::Ram)
}

fn create_devices(vm: &VmFd) -> Result<(), VmmError> {
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(VmmError::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(VmmError::kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(VmmError::kvm("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(VmmError::kvm("KVM_CREATE_PIT2"))?;
    super::sys::drop_missed_ticks(vm).map_err(VmmError::kvm("KVM_REINJECT_CONTROL"))
}

fn describe(config: &VmConfig, host: &Host, vcpus: &[Vcpu]) -> Result<Machine, VmmError> {
    let msrs = vcpus.first().map(|vcpu| save::readable_msrs(&vcpu.lock(), &host.msrs)).transpose()?.unwrap_or_default();
    let profile = serde_json::to_value(host.profile(msrs))
        .map_err(|error| VmmError::Local { what: "describe the machine", source: io::Error::other(error) })?;
    let (kind, regions) = (cpuid::KIND.to_owned(), config.layout.regions().to_vec());
    Ok(Machine {
        kind,
        uuid: config.uuid,
        regions,
        vcpus: config.vcpus,
        profile,
        disks: Vec::new(),
        disks_only: false,
        mode: crate::types::Mode::Precopy,
    })
}

/// Reads the clocks and stops the timer, so that a long pause leaves no ticks behind.
fn stop_clocks(vm: &VmFd) -> Result<Clocks, VmmError> {
    let clocks = save::read_clocks(vm)?;
    set_pit(vm, &stopped(clocks.pit))?;
    Ok(clocks)
}

fn set_pit(vm: &VmFd, pit: &kvm_pit_state2) -> Result<(), VmmError> {
    vm.set_pit2(pit).map_err(VmmError::kvm("KVM_SET_PIT2"))
}

fn stopped(mut pit: kvm_pit_state2) -> kvm_pit_state2 {
    pit.channels[0].mode = PIT_MODE_STOPPED;
    pit
}
